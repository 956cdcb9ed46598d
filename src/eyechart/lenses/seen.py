"""How a lens on attention reaches every call of a model's attention, eyechart's own and others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eyechart.errors import UnsupportedModelError
from eyechart.kernels import AttentionCall, attend, differentiable
from eyechart.models import facts_of
from eyechart.probes.plan import fusable
from eyechart.probes.seam import Edit, edited, edits_of, taken_over

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@contextmanager
def seen_through(model: "TransformerBridge", edit: Edit) -> Iterator[None]:
    """Change every call of a model's attention before it is computed.

    Raises:
        UnsupportedModelError: attention of this model is not computed where it could be changed.
    """
    facts = facts_of(model)
    layers, reasons = fusable(model, facts, ())
    if reasons:
        layer, reason = next(iter(sorted(reasons.items())))
        raise UnsupportedModelError(
            f"attention of {facts.name} cannot be seen through a lens: layer {layer}: {reason}."
        )

    def handle(layer: int, call: AttentionCall) -> Tensor:
        for each in edits_of(model):
            each(layer, call)
        if torch.is_grad_enabled():
            return differentiable(call)
        shape = (call.q.shape[0], call.length)
        tokens = torch.zeros(shape, dtype=torch.long, device=call.q.device)
        attend(call, tokens, torch.ones_like(tokens, dtype=torch.bool))
        assert call.output is not None
        return call.output

    with edited(model, edit), taken_over(model, sorted(layers), True, handle):
        yield
