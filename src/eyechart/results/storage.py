"""Results on disk: one ``manifest.json`` beside one safetensors file.

The manifest is the commit point. Tensors go to a file named by its own hash; the manifest that
names it is renamed into place last, and only then is the tensor file of the result before removed.
A save that is killed at any moment therefore leaves the old result or the new one, never a mixture.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from eyechart.errors import ResultError
from eyechart.results.files import write_text_whole, write_whole

FORMAT = 1
MANIFEST = "manifest.json"

T = TypeVar("T")
_STORABLE: dict[str, type] = {}


def storable(cls: type[T]) -> type[T]:
    """Let a frozen dataclass be a part of a saved result, under its class name."""
    if cls.__name__ in _STORABLE:
        raise TypeError(f"two storable classes are named {cls.__name__}")
    _STORABLE[cls.__name__] = cls
    return cls


def save_tree(root: Any, folder: Path) -> Path:
    """Write a storable dataclass, and all that is in it, to ``folder``; returns the manifest."""
    tensors: dict[str, Tensor] = {}
    tree = _pack(root, "", tensors, {})
    content = save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    data = folder / f"tensors-{digest[:16]}.safetensors"
    write_whole(data, lambda temporary: temporary.write_bytes(content))
    manifest = {
        "format": FORMAT,
        "kind": type(root).__name__,
        "tensors": {"file": data.name, "sha256": digest},
        "result": tree,
    }
    path = folder / MANIFEST
    before = _tensor_file_of(path)
    write_text_whole(path, json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False))
    if before is not None and before != data.name:
        (folder / before).unlink(missing_ok=True)
    return path


def open_tree(path: Path) -> Any:
    """Read what :func:`save_tree` wrote. ``path`` is the folder or its manifest.

    Raises:
        ResultError: nothing is there, a file is missing or altered, or the kind is unknown.
    """
    manifest_path = path / MANIFEST if path.is_dir() else path
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        form, tree, stored = manifest["format"], manifest["result"], manifest["tensors"]
    except FileNotFoundError as problem:
        raise ResultError(
            f"no saved result at {str(path)!r}: expected a folder with {MANIFEST}, "
            "as written by a result's save() or by `eyechart exam --out DIR`."
        ) from problem
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ResultError(
            f"{str(manifest_path)!r} is not an eyechart manifest: {problem}"
        ) from problem
    if form != FORMAT:
        raise ResultError(
            f"{str(manifest_path)!r} has format {form}; this eyechart reads format {FORMAT}. "
            "Open it with the eyechart version named in it."
        )
    data = manifest_path.parent / Path(stored["file"]).name
    try:
        content = data.read_bytes()
        if hashlib.sha256(content).hexdigest() != stored["sha256"]:
            raise ResultError(f"{str(data)!r} was altered after it was saved (hash differs).")
        tensors = load(content)
    except (OSError, SafetensorError) as problem:
        raise ResultError(f"the tensors of {str(path)!r} cannot be read: {problem}") from problem
    return _unpack(tree, tensors)


def same(left: Any, right: Any) -> bool:
    """Exact equality of two trees; NaN equals NaN, because padding is NaN on purpose."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        equal = left == right
        if left.is_floating_point():
            equal |= left.isnan() & right.isnan()
        return bool(equal.all())
    if dataclasses.is_dataclass(left):
        return all(
            same(getattr(left, field.name), getattr(right, field.name))
            for field in dataclasses.fields(left)
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def _pack(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    if isinstance(value, Tensor):
        # One tensor held by several parts (the tokens, usually) is stored once.
        if id(value) not in seen:
            seen[id(value)] = name
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": seen[id(value)]}
    if type(value).__name__ in _STORABLE and dataclasses.is_dataclass(value):
        fields = {
            field.name: _pack(
                getattr(value, field.name), f"{name}/{field.name}".lstrip("/"), tensors, seen
            )
            for field in dataclasses.fields(value)
        }
        return {"$type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [_pack(item, f"{name}/{index}", tensors, seen) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {
            str(key): _pack(item, f"{name}/{key}", tensors, seen) for key, item in value.items()
        }
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be part of a saved result")


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return tuple(_unpack(item, tensors) for item in tree)
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        try:
            return tensors[tree["$tensor"]]
        except KeyError as problem:
            raise ResultError(f"the saved result lacks the tensor {problem}") from problem
    kind = tree.get("$type")
    values = {key: _unpack(item, tensors) for key, item in tree.items() if key != "$type"}
    if kind is None:
        return values
    if kind not in _STORABLE:
        raise ResultError(
            f"unknown kind of result {kind!r}; this eyechart knows {', '.join(sorted(_STORABLE))}."
        )
    try:
        return _STORABLE[kind](**values)
    except (TypeError, ValueError) as problem:
        raise ResultError(f"the saved {kind} does not fit this eyechart: {problem}") from problem


def _tensor_file_of(manifest: Path) -> str | None:
    try:
        return Path(json.loads(manifest.read_text(encoding="utf-8"))["tensors"]["file"]).name
    except (OSError, ValueError, KeyError, TypeError):
        return None
