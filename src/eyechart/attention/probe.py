"""The probe behind :func:`eyechart.attention_statistics`: rows and columns of every head."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.kernels import AttentionCall, Reducer, attend, kernel_for, seers
from eyechart.models import ModelFacts
from eyechart.probes import Look, Observations, Probe
from eyechart.results import MEASURED, STATISTICS, AttentionStatistics, Provenance, Sequences
from eyechart.targets import Target

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_BLOCK = 256  # queries of a pattern that are reduced at once, so that what is made of them is small


class AttentionProbe(Probe[AttentionStatistics]):
    """Keeps :class:`AttentionStatistics` of each layer while the layer runs.

    Args:
        n_layers: Blocks of the model.
        accumulate: Number format of softmax and sums, float32 or float64; what comes in a wider
            format is kept in it.
        statistics: What to compute.
        targets: Sets of keys whose mass to compute, resolved for this model and text.
        fused: Take the layers over where that is possible, so that no pattern exists; False reads
            the pattern.
    """

    def __init__(
        self,
        n_layers: int,
        accumulate: torch.dtype = torch.float32,
        statistics: Collection[str] = MEASURED,
        targets: Sequence[Target] = (),
        fused: bool = False,
    ) -> None:
        unknown = sorted(set(statistics) - set(MEASURED))
        if unknown or not (statistics or targets):
            raise UsageError(
                f"unknown statistics {', '.join(map(repr, unknown))}; choose from "
                f"{', '.join(MEASURED)}"
                if unknown
                else "nothing to compute: give statistics or targets"
            )
        names = [target.name for target in targets]
        if len(set(names)) < len(names):
            raise UsageError(f"two targets have the same name: {', '.join(names)}")
        self.n_layers, self.accumulate, self.fused = n_layers, accumulate, fused
        self._sites = ("attention",) if fused else ("pattern",)
        self.statistics = tuple(name for name in MEASURED if name in statistics)
        self.targets = tuple(targets)

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """Attention, or the pattern where that is asked for."""
        return self._sites

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        """Row and column statistics of one layer."""
        if isinstance(activation, AttentionCall):
            sinks = () if activation.sinks is None else ("virtual_sink",)
            found = attend(
                activation,
                look.tokens,
                look.mask,
                statistics=(*self.statistics, *sinks),
                targets=self.targets,
                accumulate=self.accumulate,
            )
        else:
            sinks = () if look.sinks is None else ("virtual_sink",)
            pattern = activation.to(torch.promote_types(activation.dtype, self.accumulate))
            found = reduce_pattern(
                pattern, look.tokens, look.mask, (*self.statistics, *sinks), self.targets
            )
        if "received" in found:
            found["received"] = found["received"] / seers(look.mask)[:, None]
        return {
            name: values.masked_fill(~look.mask[:, None, :], torch.nan)
            for name, values in found.items()
        }

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> AttentionStatistics:
        """The layers stacked; a block without attention is NaN, and so is what was not chosen."""
        (site,) = self._sites
        some = (*self.statistics, *(target.name for target in self.targets))[0]
        seen = observations.layers(site, some)
        whole = observations.stack(site, some, self.n_layers)
        blank = torch.full((), torch.nan, dtype=whole.dtype).expand(whole.shape)

        def stacked(name: str) -> Tensor:
            return observations.stack(site, name, self.n_layers)

        return AttentionStatistics(
            sequences=sequences,
            provenance=provenance,
            virtual_sink=(
                stacked("virtual_sink") if observations.layers(site, "virtual_sink") else None
            ),
            masses={target.name: stacked(target.name) for target in self.targets},
            computed=self.statistics,
            backend=tuple(
                "none" if l not in seen else "fused" if l in observations.fused else "pattern"
                for l in range(self.n_layers)
            ),
            reasons=tuple(observations.reasons.get(l, "") for l in range(self.n_layers)),
            **{
                name: stacked(name) if name in self.statistics else blank
                for name in (*STATISTICS, "received")
            },
        )

    def notes(self, facts: ModelFacts) -> Sequence[str]:
        """Why no kernel written for the device does the work, where none does."""
        if not self.fused:
            return ()
        slower = kernel_for(torch.device(facts.device), self.accumulate, facts.dtype).reason
        return (f"fused statistics are computed through torch: {slower}",) if slower else ()


def reduce_pattern(
    pattern: Float[Tensor, "batch head query key"],
    tokens: Int[Tensor, "batch query"],
    mask: Bool[Tensor, "batch query"],
    statistics: Collection[str] = MEASURED,
    targets: Sequence[Target] = (),
) -> dict[str, Tensor]:
    """Statistics of one layer's whole pattern, ``[batch head position]``; received is a sum."""
    reducer = Reducer(statistics, targets, tokens, mask)
    for begin in range(0, pattern.shape[2], _BLOCK):
        end = min(begin + _BLOCK, pattern.shape[2])
        reducer.add(begin, pattern[:, :, begin:end, :end])
    return reducer.finish()
