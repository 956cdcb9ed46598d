"""Files written whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from eyechart.errors import UsageError


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary neighbour of ``path``, then rename it into place.

    A reader sees the old file or the new one; a killed process leaves only a ``.tmp`` neighbour
    that nothing reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes files private; results are meant to be shared like any other file.
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("r+b") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text_whole(path: Path, text: str) -> Path:
    """:func:`write_whole` for UTF-8 text."""
    return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def ensure_writable(folder: str | os.PathLike[str]) -> Path:
    """Make ``folder`` and try to write in it, so that a long computation is not lost at its end.

    Raises:
        UsageError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise UsageError(
            f"cannot write to {str(folder)!r}: {problem.strerror or problem}. "
            "Choose a folder you may write to (--out DIR on the command line)."
        ) from problem
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
