"""A folder of converted models: built once, whole or not at all, checked every time.

Two processes that want the same model at once build it once: the second waits for the first's
lock. A build happens in a temporary folder on the same file system and is renamed into place when
it is complete, with the hashes of its files inside; an entry whose files do not match is removed
and built again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
import xxhash
from filelock import FileLock

from eyechart.errors import UsageError
from eyechart.results.files import ensure_writable

_SEAL = "eyechart.json"


def cache_folder() -> Path:
    """``EYECHART_CACHE`` if set, else the platform's cache folder for eyechart."""
    chosen = os.environ.get("EYECHART_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("eyechart")


def entry_folder(name: str, recipe: str) -> Path:
    """Where ``name`` lives; a change of recipe moves it, so that old builds are never mistaken."""
    return cache_folder() / "models" / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def is_cached(name: str, recipe: str) -> bool:
    """Whether a sealed build is there. Cheap: does not check the hashes."""
    return (entry_folder(name, recipe) / _SEAL).is_file()


def cached(name: str, recipe: str, build: Callable[[Path], None]) -> Path:
    """The folder of a complete, verified build of ``name``, building it if necessary.

    Args:
        name: What is cached.
        recipe: Text that changes whenever the build would give something else.
        build: Fills an empty folder.

    Raises:
        UsageError: the cache folder cannot be written to.
    """
    folder = entry_folder(name, recipe)
    if _intact(folder):
        return folder
    try:
        ensure_writable(folder.parent)
    except UsageError as problem:
        raise UsageError(
            f"the model cache {str(cache_folder())!r} is not writable; "
            "set EYECHART_CACHE to a folder that is."
        ) from problem
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if _intact(folder):  # another process built it while this one waited
            return folder
        _sweep(folder)
        work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            build(work)
            _seal(work)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _seal(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): _checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / _SEAL).write_text(json.dumps({"xxh3_128": files}, indent=1), encoding="utf-8")


def _intact(folder: Path) -> bool:
    try:
        files = json.loads((folder / _SEAL).read_text(encoding="utf-8"))["xxh3_128"]
        return all(_checksum(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sweep(folder: Path) -> None:
    """Remove a damaged entry and what killed builds left behind; called with the lock held."""
    shutil.rmtree(folder, ignore_errors=True)
    for left in folder.parent.glob(f"{folder.name}.*.part"):
        shutil.rmtree(left, ignore_errors=True)


def _checksum(path: Path) -> str:
    # Against damage, not against attack (what was downloaded is pinned by SHA-256): fast enough to
    # read half a gigabyte on every open.
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
