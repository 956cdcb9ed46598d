"""Finished layers kept on disk, so that an interrupted census goes on where it was."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eyechart.results.files import write_whole


class Partial:
    """Where the layers of one census are kept.

    Args:
        folder: Where; None keeps nothing.
        about: Everything the numbers depend on; another census in the same folder does not mix
            with this one.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any]) -> None:
        self.folder = folder
        said = json.dumps(about, sort_keys=True, default=str)
        self.name = hashlib.sha256(said.encode()).hexdigest()[:16]
        self.resumed = 0

    def open(self, layer: int) -> dict[str, Tensor] | None:
        """A finished layer, None where there is none or it is damaged."""
        if self.folder is None or not self._path(layer).exists():
            return None
        try:
            found = load_file(self._path(layer))
        except (OSError, SafetensorError):
            return None
        self.resumed += 1
        return found

    def keep(self, layer: int, found: dict[str, Tensor]) -> None:
        """Keep a finished layer."""
        if self.folder is not None:
            write_whole(self._path(layer), lambda temporary: save_file(found, temporary))

    def clear(self) -> None:
        """Remove what was kept of this census; the whole of it is there now."""
        if self.folder is not None:
            for path in self.folder.glob(f"{self.name}-*.safetensors"):
                path.unlink(missing_ok=True)

    def _path(self, layer: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.name}-{layer:03d}.safetensors"
