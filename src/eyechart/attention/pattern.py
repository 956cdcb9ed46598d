"""Statistics from the attention pattern itself: what faster ways are tested against."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eyechart.probes import Look, Observations, Probe
from eyechart.results import STATISTICS, AttentionStatistics, Provenance, Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class AttentionProbe(Probe[AttentionStatistics]):
    """Reduces each layer's pattern to :class:`AttentionStatistics` while the layer runs.

    Args:
        n_layers: Blocks of the model.
        accumulate: Number format of the sums, float32 or float64; a pattern in a wider format is
            kept in it.
    """

    def __init__(self, n_layers: int, accumulate: torch.dtype = torch.float32) -> None:
        self.n_layers, self.accumulate = n_layers, accumulate

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """The pattern."""
        return ("pattern",)

    def observe(self, activation: Tensor, look: Look) -> Mapping[str, Tensor]:
        """Row and column statistics of one layer."""
        pattern = activation.to(torch.promote_types(activation.dtype, self.accumulate))
        kept = reduce_pattern(pattern, look.mask)
        if look.sinks is not None:
            kept["virtual_sink"] = _blank(1 - pattern.sum(dim=-1), look.mask)
        return kept

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> AttentionStatistics:
        """The layers stacked; a block without attention is NaN."""
        seen = observations.layers("pattern", "first")
        stacked = {
            name: observations.stack("pattern", name, self.n_layers)
            for name in (*STATISTICS, "received")
        }
        virtual = (
            observations.stack("pattern", "virtual_sink", self.n_layers)
            if observations.layers("pattern", "virtual_sink")
            else None
        )
        return AttentionStatistics(
            sequences=sequences,
            provenance=provenance,
            virtual_sink=virtual,
            backend=tuple("pattern" if l in seen else "none" for l in range(self.n_layers)),
            **stacked,
        )


def reduce_pattern(
    pattern: Float[Tensor, "batch head query key"], mask: Bool[Tensor, "batch query"]
) -> dict[str, Tensor]:
    """All statistics of one layer's pattern; NaN on padding.

    With a_ij the mass query i puts on key j: first a_i0; diagonal a_ii; previous a_i,i-1; entropy
    -sum_j a_ij log a_ij (nats); largest max_j a_ij; distance sum_j a_ij (i - j) (tokens); received
    by key j the mean of a_ij over the real queries i >= j.
    """
    length = pattern.shape[-1]
    position = torch.arange(length, device=pattern.device, dtype=pattern.dtype)
    previous = torch.zeros_like(pattern[..., 0])
    previous[..., 1:] = pattern.diagonal(offset=-1, dim1=-2, dim2=-1)
    rows = {
        "first": pattern[..., 0].clone(),
        "diagonal": pattern.diagonal(dim1=-2, dim2=-1).clone(),
        "previous": previous,
        # xlogy is 0 where the mass is 0, as the limit is.
        "entropy": -torch.xlogy(pattern, pattern).sum(dim=-1),
        "largest": pattern.amax(dim=-1),
        "distance": position * pattern.sum(dim=-1) - pattern @ position,
    }
    real = mask[:, None, :]
    # Queries that can see key j: the real ones from j on.
    seers = mask.flip(-1).cumsum(-1).flip(-1)[:, None, :]
    received = torch.where(real[..., None], pattern, 0).sum(dim=-2) / seers
    return {name: _blank(values, mask) for name, values in rows.items()} | {
        "received": _blank(received, mask)
    }


def _blank(
    values: Float[Tensor, "batch head position"], mask: Bool[Tensor, "batch position"]
) -> Float[Tensor, "batch head position"]:
    return values.masked_fill(~mask[:, None, :], torch.nan)
