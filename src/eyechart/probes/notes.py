"""What is in force on a model that a reader of its results should know."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from eyechart.probes.in_force import InForce

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_NOTES: InForce[str] = InForce()


def noted(model: "TransformerBridge", note: str) -> AbstractContextManager[None]:
    """Write ``note`` into the provenance of everything that is measured on a model meanwhile."""
    return _NOTES.entered(model, note)


def notes_of(model: "TransformerBridge") -> tuple[str, ...]:
    """The notes in force, in the order in which they were entered."""
    return _NOTES.on(model)
