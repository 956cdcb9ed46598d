"""Statistics of attention rows and columns, for every head; and whole patterns of a few heads."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.results import figures
from eyechart.results.base import Result, head_name
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

# Of every query. A name of AttentionStatistics.masses will do wherever one of these does.
Statistic = Literal["first", "diagonal", "previous", "entropy", "largest", "distance"]
STATISTICS: tuple[Statistic, ...] = (
    "first",
    "diagonal",
    "previous",
    "entropy",
    "largest",
    "distance",
)

MEASURED = (*STATISTICS, "received")
"""Everything that can be computed of a head without naming a set of keys."""

PATTERN_TOKENS = 256
"""Patterns are for looking at; beyond this length pages explode and eyes give up."""

# What a reader wants first: the statistic, its key in summaries, and the heads it finds.
LEADERS: tuple[tuple[Statistic, str, str], ...] = (
    ("first", "sinks", "strongest sinks"),
    ("diagonal", "diagonal_heads", "diagonal heads"),
    ("previous", "previous_token_heads", "previous-token heads"),
)


@storable
@dataclass(frozen=True, eq=False, repr=False)
class AttentionStatistics(Result):
    """What every attention row (query) and column (key) of every head looks at.

    Masses are shares of one query's attention, between 0 and 1. Padding is NaN, and so is a layer
    that has no attention (in hybrid models), so that the layer axis always counts blocks, and a
    statistic that was not asked for. Definitions: :mod:`eyechart.kernels.definitions`.

    Attributes:
        first: Mass on the first token.
        diagonal: Mass on the query's own token.
        previous: Mass on the token before; 0 for the first query, which has none.
        entropy: Entropy of the row in nats, over the keys that exist (a virtual sink is not one).
        largest: Largest mass on any one key.
        distance: Mean distance from query to key, in tokens, weighted by mass.
        received: Mean mass a key gets from the queries that can see it; ``received[..., 0]`` is
            the importance of the first token in Gu et al., arXiv 2410.10781.
        virtual_sink: Mass on a learned sink that is no token (gpt-oss), None elsewhere.
        backend: How each layer was computed: "fused" without its pattern, "pattern" by reducing it,
            "none" where it has no attention.
        masses: Mass on each target (:mod:`eyechart.targets`), ``[batch layer head query]`` by its
            name.
        computed: What was asked for of the statistics above.
        reasons: Why a layer that was to be fused was read by its pattern; empty otherwise.
    """

    first: Float[Tensor, "batch layer head query"]
    diagonal: Float[Tensor, "batch layer head query"]
    previous: Float[Tensor, "batch layer head query"]
    entropy: Float[Tensor, "batch layer head query"]
    largest: Float[Tensor, "batch layer head query"]
    distance: Float[Tensor, "batch layer head query"]
    received: Float[Tensor, "batch layer head key"]
    virtual_sink: Float[Tensor, "batch layer head query"] | None
    backend: tuple[str, ...]
    masses: dict[str, Tensor] = field(default_factory=dict)
    computed: tuple[str, ...] = MEASURED
    reasons: tuple[str, ...] = ()

    @property
    def normalised_entropy(self) -> Float[Tensor, "batch layer head query"]:
        """Entropy over log(i + 1), that of a query which looks at all it sees alike: 0 to 1.

        NaN for the first query, which has no choice.
        """
        queries = torch.arange(self.entropy.shape[-1], dtype=self.entropy.dtype)
        return self.entropy / queries.log1p().where(queries > 0, torch.nan)

    def of_queries(self, statistic: str) -> Float[Tensor, "batch layer head query"]:
        """One statistic, normalised entropy or mass by its name.

        Raises:
            UsageError: there is none of that name, or it was not asked for.
        """
        if statistic in self.masses:
            return self.masses[statistic]
        known = [*STATISTICS, "normalised_entropy", *self.masses]
        if statistic not in known:
            raise UsageError(f"unknown statistic {statistic!r}; there are {', '.join(known)}")
        if statistic.removeprefix("normalised_") not in self.computed:
            raise UsageError(
                f"{statistic} was not computed; ask for it: "
                f"attention_statistics(..., statistics={(*self.computed, statistic)})"
            )
        return getattr(self, statistic)

    def by_head(self, statistic: Statistic | str) -> Float[Tensor, "layer head"]:
        """Mean of one statistic over queries and sequences, every query counting the same.

        ``first`` is averaged over all queries, as the published sink metric is. All others leave
        out the first query, which can only look at itself and so says nothing about the head.
        """
        values = self.of_queries(statistic)
        start = 0 if statistic == "first" or values.shape[-1] == 1 else 1
        together = rearrange(
            values[..., start:], "batch layer head query -> layer head (batch query)"
        )
        return together.nanmean(dim=-1)

    def strongest(
        self, statistic: Statistic | str, count: int = 5
    ) -> tuple[tuple[int, int, float], ...]:
        """The heads with the largest mean of a statistic, as ``(layer, head, value)``."""
        scores = self.by_head(statistic).nan_to_num(-torch.inf)
        heads = scores.shape[1]
        best = scores.flatten().topk(min(count, scores.numel()))
        return tuple(
            (index // heads, index % heads, value)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if value > -torch.inf
        )

    @property
    def sink_length(self) -> int:
        """Length at which to state the sink rate: 64 as published, or what the sequences allow."""
        return min(64, *self.sequences.lengths)

    def sink_rate(self, eps: float = 0.3, length: int | None = None) -> float:
        """Share of heads whose mean mass on the first token exceeds ``eps``.

        The mean is taken over all queries of one sequence, the share over layers and heads, the
        result over sequences (Gu et al., arXiv 2410.10781, Sink_1^eps). It falls with length, so
        compare at one length: ``length=64`` looks at the first 64 tokens only, as published, which
        under a causal mask equals a run on those tokens alone.

        Raises:
            UsageError: eps is not in (0, 1), or a sequence is shorter than ``length``.
        """
        if not 0 < eps < 1:
            raise UsageError(f"eps must be between 0 and 1, got {eps}")
        if length is not None and not 0 < length <= min(self.sequences.lengths):
            shortest = min(self.sequences.lengths)
            raise UsageError(f"length={length}, but the shortest sequence has {shortest} tokens")
        mean = self.of_queries("first")[..., :length].nanmean(dim=-1)
        return float((mean > eps)[~mean.isnan()].float().mean())

    def to_frame(self) -> "pd.DataFrame":
        """One row a head, with the mean of every statistic (see :meth:`by_head`)."""
        import pandas as pd

        layers, heads = self.first.shape[1:3]
        return pd.DataFrame(
            {
                "layer": torch.arange(layers).repeat_interleave(heads).numpy(),
                "head": torch.arange(heads).repeat(layers).numpy(),
                **{name: self.by_head(name).flatten().numpy() for name in self._names()},
            }
        )

    def plot(self) -> "go.Figure":
        """Layer-by-head maps of the masses and the entropy."""
        drawn = ("first", "diagonal", "previous", "entropy", *self.masses)
        return figures.head_maps(
            {name: self.by_head(name) for name in self._names() if name in drawn}
        )

    def _names(self) -> list[str]:
        return [*(name for name in STATISTICS if name in self.computed), *self.masses]

    def lines(self) -> tuple[str, ...]:
        """Sink rate and the head that leads each statistic."""
        said = []
        if "first" in self.computed:
            rate = self.sink_rate(length=self.sink_length)
            said.append(f"sink rate {rate:.2f} (eps 0.3, first {self.sink_length} tokens)")
        leaders = [(name, words) for name, _, words in LEADERS if name in self.computed]
        leaders += [(name, f"most on {name}") for name in self.masses]
        for name, words in leaders:
            heads = ", ".join(
                f"{head_name(l, h)} {value:.3f}" for l, h, value in self.strongest(name, 3)
            )
            said.append(f"{words}: {heads}")
        return tuple(said)


@storable
@dataclass(frozen=True, eq=False, repr=False)
class AttentionPatterns(Result):
    """Whole attention patterns of a few chosen heads, to look at.

    Attributes:
        heads: The chosen heads as ``(layer, head)``.
        reasons: Why each was chosen.
        pattern: Attention, one matrix a chosen head; padding rows are NaN.
    """

    heads: tuple[tuple[int, int], ...]
    reasons: tuple[str, ...]
    pattern: Float[Tensor, "batch head query key"]

    def to_frame(self) -> "pd.DataFrame":
        """One row a (sequence, head, query, key) with key <= query."""
        import pandas as pd

        batch, head, query, key = (self.pattern.nan_to_num().tril() != 0).nonzero(as_tuple=True)
        chosen = torch.tensor(self.heads)
        return pd.DataFrame(
            {
                "batch": batch.numpy(),
                "layer": chosen[head, 0].numpy(),
                "head": chosen[head, 1].numpy(),
                "query": query.numpy(),
                "key": key.numpy(),
                "attention": self.pattern[batch, head, query, key].numpy(),
            }
        )

    def plot(self) -> "go.Figure":
        """The patterns of the first sequence, side by side."""
        names = [head_name(*head) for head in self.heads]
        return figures.patterns(self.pattern[0], names, list(self.sequences.labels[0]))

    def lines(self) -> tuple[str, ...]:
        """The heads and why they were chosen."""
        return tuple(
            f"{head_name(*head)}: {reason}"
            for head, reason in zip(self.heads, self.reasons, strict=True)
        )
