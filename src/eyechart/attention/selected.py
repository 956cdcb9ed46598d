"""Whole patterns of a few chosen heads, for looking at."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eyechart.probes import Look, Observations, Probe
from eyechart.results import AttentionPatterns, Provenance, Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class PatternProbe(Probe[AttentionPatterns]):
    """Keeps the patterns of chosen heads; n x n each, so meant for a few heads and short text.

    Args:
        heads: ``(layer, head)`` of each.
        reasons: Why each was chosen.
    """

    def __init__(self, heads: Sequence[tuple[int, int]], reasons: Sequence[str]) -> None:
        if len(heads) != len(reasons) or not heads:
            raise ValueError("every chosen head needs a reason, and there must be at least one")
        self.heads, self.reasons = tuple(heads), tuple(reasons)

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """The pattern."""
        return ("pattern",)

    def observe(self, activation: Tensor, look: Look) -> Mapping[str, Tensor]:
        """The chosen heads of this layer."""
        rows = activation.float().masked_fill(~look.mask[:, None, :, None], torch.nan)
        return {
            f"head {head}": rows[:, head].clone()
            for layer, head in self.heads
            if layer == look.layer
        }

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> AttentionPatterns:
        """The patterns in the order the heads were given."""
        chosen = [
            observations.layers("pattern", f"head {head}")[layer] for layer, head in self.heads
        ]
        return AttentionPatterns(
            sequences=sequences,
            provenance=provenance,
            heads=self.heads,
            reasons=self.reasons,
            pattern=torch.stack(chosen, dim=1),
        )
