"""``eyechart.dispersion``: how sharp real heads are, against the bounds on softmax."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.kernels import AttentionCall, attend, blocks
from eyechart.models import facts_of
from eyechart.probes import Look, Observations, Probe, capture
from eyechart.results import Provenance, Sequences
from eyechart.results.dispersion import Dispersion, RowExtremes
from eyechart.sequences import Inputs, prepare

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_BLOCK = 256  # queries of a pattern that are reduced at once


def dispersion(
    model: "TransformerBridge",
    inputs: Inputs | None = None,
    *,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
    accumulate: Literal["float32", "float64"] = "float64",
) -> Dispersion:
    """The spread of every query's scores, its largest weight, and what the one allows the other.

    Lemma 2.1 and Proposition 3.1 of Velickovic et al., arXiv 2410.01104, on real heads, from one
    forward pass: scores are computed from queries and keys, as attention meets them, a block at a
    time, so that no n x n pattern is kept. Layers that cannot be taken over are read by their
    pattern, in float32 at least.

    Args:
        model: A TransformerBridge.
        inputs: String, strings, token ids ``[batch position]`` or Sequences; by default a short
            English text.
        prepend_bos: See :func:`eyechart.sequences.prepare`.
        batch_size: Sequences a pass; all at once by default.
        accumulate: Number format of scores and weights. float32 takes half the time; weights below
            1e-38, and with them spreads above 87 nats, are then cut off. For devices without
            float64.

    Returns:
        Spread, weights and bounds ``[batch layer head query]``.

    Raises:
        UsageError: unknown number format; or heads are skipped under a lens.
        InputError, CaptureError, NonFiniteError, UnsupportedModelError: as
            :func:`eyechart.capture`.
    """
    if accumulate not in ("float32", "float64"):
        raise UsageError(f"accumulate must be 'float32' or 'float64', got {accumulate!r}")
    prepared = prepare(model, inputs, prepend_bos=prepend_bos)
    probe = DispersionProbe(facts_of(model).n_layers, getattr(torch, accumulate))
    (result,) = capture(model, prepared, [probe], batch_size=batch_size)
    return result


class DispersionProbe(Probe[Dispersion]):
    """Reduces every attention row to its extremes.

    Args:
        n_layers: Blocks of the model.
        accumulate: Number format of scores and weights.
    """

    def __init__(self, n_layers: int, accumulate: torch.dtype = torch.float64) -> None:
        self.n_layers, self.accumulate = n_layers, accumulate

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """Attention."""
        return ("attention",)

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        """Extremes of each row of one layer."""
        if isinstance(activation, AttentionCall):
            # Asking for a statistic has heads refused that are skipped and so have no rows.
            attend(activation, look.tokens, look.mask, statistics=("largest",))
            kind = torch.promote_types(activation.q.dtype, self.accumulate)
            exact = replace(activation, rounded=None)  # a lens may round what softmax gives
            found = _reduced(rows for _, _, rows in blocks(exact, kind))
            found["possible"] = possible_spread(activation, kind)
        else:
            pattern = activation.to(torch.promote_types(activation.dtype, self.accumulate))
            found = _reduced(pattern.split(_BLOCK, dim=2))
            found["possible"] = torch.full_like(found["rows.spread"], torch.nan)
        padding = ~look.mask[:, None]
        return {name: values.masked_fill(padding, torch.nan) for name, values in found.items()}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> Dispersion:
        """The layers stacked; a block without attention is NaN."""

        def stacked(name: str) -> Tensor:
            return observations.stack("attention", name, self.n_layers)

        parts = {
            part: RowExtremes(
                **{field.name: stacked(f"{part}.{field.name}") for field in fields(RowExtremes)}
            )
            for part in ("rows", "without_first")
        }
        return Dispersion(sequences, provenance, possible=stacked("possible"), **parts)


def row_extremes(
    rows: Float[Tensor, "batch head query key"],
) -> dict[str, dict[str, Float[Tensor, "batch head query"]]]:
    """The fields of :class:`~eyechart.results.dispersion.RowExtremes`, from weights.

    Of whole rows ("rows") and of rows without the first key ("without_first"). The spread is the
    logarithm of the ratio of the extreme weights: what divides them all, a learned sink's part
    included, cancels. Keys of weight zero are not seen; a row that sees none is NaN.
    """
    # The first key is added to what is found of the others, so that rows are gone through once. To
    # take it away would lose digits where it has nearly all mass.
    first, others = rows[..., 0], rows[..., 1:] if rows.shape[-1] > 1 else torch.zeros_like(rows)
    seen = others > 0
    keys, mass, largest = seen.sum(dim=-1), others.sum(dim=-1), others.amax(dim=-1)
    smallest = others.where(seen, torch.inf).amin(dim=-1)
    return {
        "without_first": _fields(keys, mass, largest, smallest),
        "rows": _fields(
            keys + (first > 0),
            mass + first,
            torch.maximum(largest, first),
            torch.minimum(smallest, first.where(first > 0, torch.inf)),
        ),
    }


def _fields(keys: Tensor, mass: Tensor, largest: Tensor, smallest: Tensor) -> dict[str, Tensor]:
    found = {
        "keys": keys.to(mass.dtype),
        "spread": largest.log() - smallest.log(),
        "largest": largest / mass,
        "smallest": smallest / mass,
    }
    return {name: values.where(keys > 0, torch.nan) for name, values in found.items()}


def possible_spread(call: AttentionCall, kind: torch.dtype) -> Float[Tensor, "batch head query"]:
    """How far apart scores of these queries and keys can be: 2 scale |q_i| max_j |k_j|, j <= i.

    From Cauchy and Schwarz, the first step of Proposition 3.1 of arXiv 2410.01104, which goes on to
    bound |q| and |k| by the weights' largest singular values; rotations keep lengths. A soft cap
    bounds it too.
    """
    longest = call.k.to(kind).norm(dim=-1).cummax(dim=-1).values
    longest = longest.repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)
    spread = 2 * abs(call.scale) * call.q.to(kind).norm(dim=-1) * longest
    return spread if call.softcap is None else spread.clamp(max=2 * call.softcap)


def _reduced(blocks_of_rows: Iterable[Tensor]) -> dict[str, Tensor]:
    """Extremes of all rows, a block at a time; names are "rows.spread" and the like."""
    parts = [
        {f"{part}.{name}": values for part in found for name, values in found[part].items()}
        for found in map(row_extremes, blocks_of_rows)
    ]
    return {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}
