"""``eyechart.residual_norms``: how long the residual stream is, and where it explodes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eyechart.probes import Look, Observations, StreamProbe, capture
from eyechart.results import Provenance, ResidualNorms, Sequences
from eyechart.sequences import Inputs

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

RANKS = 3


def residual_norms(
    model: "TransformerBridge",
    inputs: Inputs,
    *,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
) -> ResidualNorms:
    """Euclidean length of the residual stream by layer and position, with massive activations.

    Massive activations follow Sun et al., arXiv 2402.17762, section 2: the three largest
    magnitudes of every position and the median magnitude of every layer are kept, and
    :meth:`~eyechart.results.ResidualNorms.massive` applies the rule.

    Args:
        model: A TransformerBridge.
        inputs: String, strings, token ids ``[batch position]`` or Sequences.
        prepend_bos: See :func:`eyechart.sequences.prepare`.
        batch_size: Sequences a pass; all at once by default.

    Raises:
        InputError, CaptureError, NonFiniteError, UnsupportedModelError: as
            :func:`eyechart.capture`.
    """
    (result,) = capture(
        model, inputs, [ResidualProbe()], prepend_bos=prepend_bos, batch_size=batch_size
    )
    return result


class ResidualProbe(StreamProbe[ResidualNorms]):
    """Reduces the residual stream to its length, its largest coordinates and its median."""

    def reduce(self, stream: Tensor, look: Look) -> Mapping[str, Tensor]:
        """Norm, largest coordinates, median."""
        padding = ~look.mask
        norm = stream.norm(dim=-1).masked_fill(padding, torch.nan)
        if look.site == "final_norm":
            return {"norm": norm}
        top = stream.abs().topk(min(RANKS, stream.shape[-1]), dim=-1).indices
        rows = zip(stream, look.mask, strict=True)
        return {
            "norm": norm,
            "largest": stream.gather(-1, top).masked_fill(padding[..., None], torch.nan),
            "largest_dimension": top.masked_fill(padding[..., None], -1),
            "median": torch.stack([row[real].abs().median() for row, real in rows]),
        }

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> ResidualNorms:
        """Embedding first, then every block."""
        return ResidualNorms(
            sequences=sequences,
            provenance=provenance,
            norm=self.by_depth(observations, "norm"),
            final_norm=self.after_final_norm(observations, "norm"),
            largest=self.by_depth(observations, "largest"),
            largest_dimension=self.by_depth(observations, "largest_dimension"),
            median=self.by_depth(observations, "median"),
        )
