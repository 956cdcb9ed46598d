"""What is in force on a model that a reader of its results should know."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@contextmanager
def noted(model: "TransformerBridge", note: str) -> Iterator[None]:
    """Write ``note`` into the provenance of everything that is measured on a model meanwhile."""
    notes = _NOTES.setdefault(model, [])
    notes.append(note)
    try:
        yield
    finally:
        notes.remove(note)


def notes_of(model: "TransformerBridge") -> tuple[str, ...]:
    """The notes in force, in the order in which they were entered."""
    return tuple(_NOTES.get(model, ()))


_NOTES: "weakref.WeakKeyDictionary[TransformerBridge, list[str]]" = weakref.WeakKeyDictionary()
