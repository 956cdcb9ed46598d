"""``eyechart.residual_norms``: how long the residual stream is, and where it explodes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eyechart.probes import Look, Observations, Probe, capture, has_site
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


class ResidualProbe(Probe[ResidualNorms]):
    """Reduces the residual stream to its length, its largest coordinates and its median."""

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """The stream into the first block, out of every block, and the final norm's output."""
        final = ("final_norm",) if has_site(model, "final_norm") else ()
        return ("resid_pre", "resid_post", *final)

    def observe(self, activation: Tensor, look: Look) -> Mapping[str, Tensor]:
        """Norm, largest coordinates, median; the input of later blocks is the output of earlier."""
        if look.site == "resid_pre" and look.layer != 0:
            return {}
        stream = activation.to(torch.promote_types(activation.dtype, torch.float32))
        padding = ~look.mask
        norm = stream.norm(dim=-1).masked_fill(padding, torch.nan)
        if look.site == "final_norm":
            return {"norm": norm}
        top = stream.abs().topk(min(RANKS, stream.shape[-1]), dim=-1).indices
        median = torch.stack(
            [row[real].abs().median() for row, real in zip(stream, look.mask, strict=True)]
        )
        return {
            "norm": norm,
            "largest": stream.gather(-1, top).masked_fill(padding[..., None], torch.nan),
            "largest_dimension": top.masked_fill(padding[..., None], -1),
            "median": median,
        }

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> ResidualNorms:
        """Embedding first, then every block."""

        def stacked(name: str) -> Tensor:
            embedding = observations.one("resid_pre", name)
            return torch.cat([embedding[:, None], observations.stack("resid_post", name)], dim=1)

        final = observations.layers("final_norm", "norm")
        return ResidualNorms(
            sequences=sequences,
            provenance=provenance,
            norm=stacked("norm"),
            final_norm=final.get(None),
            largest=stacked("largest"),
            largest_dimension=stacked("largest_dimension"),
            median=stacked("median"),
        )
