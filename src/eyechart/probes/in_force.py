"""What is in force on a model for a while, such as the edits and the notes of lenses."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

T = TypeVar("T")


class InForce(Generic[T]):
    """Things by model, in the order in which they were entered; forgotten with the model."""

    def __init__(self) -> None:
        self._by_model: weakref.WeakKeyDictionary[TransformerBridge, list[T]] = (
            weakref.WeakKeyDictionary()
        )

    @contextmanager
    def entered(self, model: "TransformerBridge", thing: T) -> Iterator[None]:
        """Keep a thing in force until the block is left, whatever happens."""
        things = self._by_model.setdefault(model, [])
        things.append(thing)
        try:
            yield
        finally:
            things.remove(thing)

    def on(self, model: "TransformerBridge") -> tuple[T, ...]:
        """What is in force on a model."""
        return tuple(self._by_model.get(model, ()))
