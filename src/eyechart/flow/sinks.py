"""The first token against the others: its mass, its values, its key, its stream."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eyechart.errors import CaptureError
from eyechart.flow.modules import output_matrix
from eyechart.kernels import AttentionCall, attend
from eyechart.probes import Look, Observations, StreamProbe
from eyechart.results import Provenance, Sequences, SinkProfile

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

EPS = 0.3


class SinkProbe(StreamProbe[tuple[SinkProfile, Provenance]]):
    """Compares the first token with the others in every layer.

    Args:
        model: The model that will run.
        accumulate: Number format of softmax and sums.
    """

    def __init__(self, model: "TransformerBridge", accumulate: torch.dtype) -> None:
        self.model, self.accumulate = model, accumulate

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """The stream and attention."""
        return ("resid_pre", "resid_post", "attention")

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        """Ratios and cosines of one layer, or of the stream at one depth."""
        if look.site != "attention":
            return super().observe(activation, look)
        if not isinstance(activation, AttentionCall):
            return {"first": _mean(activation[..., 0], look.mask[:, None])}
        call = activation
        found = attend(
            call, look.tokens, look.mask, statistics=("first",), accumulate=self.accumulate
        )
        wide = torch.promote_types(call.q.dtype, torch.float32)
        q, k, v = call.q.to(wide), call.k.to(wide), call.v.to(wide)
        shared = q.shape[1] // k.shape[1]
        kept = {
            "first": _mean(found["first"], look.mask[:, None]),
            "value": _over_others(v.norm(dim=-1), look.mask).repeat_interleave(shared, dim=1),
            "key": _over_others(k.norm(dim=-1), look.mask).repeat_interleave(shared, dim=1),
        }
        kept["cosine"], kept["others"] = _cosines(q, k, look.mask, call.start)
        assert look.layer is not None
        with contextlib.suppress(CaptureError):  # a head's part of W_O cannot be told apart
            heads, width = q.shape[1], v.shape[-1]
            out = output_matrix(self.model, look.layer, heads, width, call.v[0, 0, 0]).to(wide)
            v = v.repeat_interleave(shared, dim=1)
            # |v W_O|^2 = v (W_O W_O^T) v, without the vectors of d_model.
            square = out @ out.transpose(-1, -2)
            written = torch.einsum("bhkd,hde,bhke->bhk", v, square, v).clamp(min=0).sqrt()
            kept["output"] = _over_others(written, look.mask)
        return kept

    def reduce(self, stream: Tensor, look: Look) -> Mapping[str, Tensor]:
        """Length of the first token's stream over the others'."""
        return {"residual": _over_others(stream.norm(dim=-1)[:, None], look.mask)[:, 0]}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> tuple[SinkProfile, Provenance]:
        """Blocks without attention are NaN."""
        first = observations.stack("attention", "first", int(self.model.cfg.n_layers))

        def of(name: str) -> Tensor:
            if not observations.layers("attention", name):
                return torch.full_like(first, torch.nan)
            return observations.stack("attention", name, int(self.model.cfg.n_layers))

        there = ~first.isnan()
        profile = SinkProfile(
            prepend_bos=sequences.prepend_bos,
            mass=first.mean(dim=-1),
            rate=((first > EPS) & there)
            .float()
            .mean(dim=(0, 2))
            .where(there.all(dim=2).all(dim=0), torch.nan),
            value_norm=of("value"),
            output_norm=of("output") if observations.layers("attention", "output") else None,
            key_norm=of("key"),
            cosine=of("cosine"),
            cosine_others=of("others"),
            residual=self.by_depth(observations, "residual"),
        )
        return profile, provenance


def _mean(
    values: Float[Tensor, "batch head query"], mask: Bool[Tensor, "batch one query"]
) -> Float[Tensor, "batch head"]:
    return values.where(mask, torch.nan).nanmean(dim=-1)


def _over_others(
    size: Float[Tensor, "batch head key"], mask: Bool[Tensor, "batch key"]
) -> Float[Tensor, "batch head"]:
    """The first token's over the median of the others; NaN where there are no others."""
    others = size.where(mask[:, None], torch.nan)[..., 1:]
    if not others.shape[-1]:
        return torch.full_like(size[..., 0], torch.nan)
    return size[..., 0] / others.nanmedian(dim=-1).values


def _cosines(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    mask: Bool[Tensor, "batch query"],
    start: Int[Tensor, "batch_or_one query"] | None,
) -> tuple[Float[Tensor, "batch head"], Float[Tensor, "batch head"]]:
    """Mean cosine of queries with the first key, and with the other keys that each of them sees."""
    unit = torch.nn.functional.normalize
    q, k = unit(q, dim=-1), unit(k, dim=-1).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    # Sums of unit keys up to each query: the mean over pairs without the pairs.
    sums = k.cumsum(dim=2)
    at = torch.arange(k.shape[2], device=k.device)
    last = at.new_zeros(1, len(at)) if start is None else (start.long() - 1).clamp(min=0)
    unseen = sums.gather(2, last[:, None, :, None].expand_as(sums))  # up to the last not seen
    others = ((sums - unseen) * q).sum(dim=-1) / (at - last)[:, None]
    first = (q * k[:, :, :1]).sum(dim=-1)
    later = mask[:, None, 1:]
    return _mean(first[..., 1:], later), _mean(others[..., 1:], later)
