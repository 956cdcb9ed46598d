"""How sharp heads are, and how sharp the spread of their scores allows them to be."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from eyechart.results import figures
from eyechart.results.base import Result
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@storable
@dataclass(frozen=True, eq=False)
class RowExtremes:
    """The extremes of attention rows, and the bounds on them of Velickovic et al.

    arXiv 2410.01104, Lemma 2.1: softmax over n scores that lie within delta of each other gives
    each a weight between exp(-delta)/n and exp(delta)/n; and none more than
    1/(1 + (n - 1) exp(-delta)), which is reached where one score is highest and all others are
    lowest. While delta stays bounded, weights fall as 1/n: softmax must disperse.

    Weights are shares of the mass on these keys, so that the lemma holds where something else has
    mass as well (a learned sink that is no key, the first token taken out).

    Attributes:
        keys: n, how many keys the query sees. One whose weight is too small for the number format
            (below exp(-700) in float64) does not count.
        spread: delta, the highest less the lowest score over those keys, in nats, scale and soft
            cap included.
        largest: Largest weight.
        smallest: Smallest weight.
    """

    keys: Float[Tensor, "batch layer head query"]
    spread: Float[Tensor, "batch layer head query"]
    largest: Float[Tensor, "batch layer head query"]
    smallest: Float[Tensor, "batch layer head query"]

    @property
    def lowest_allowed(self) -> Float[Tensor, "batch layer head query"]:
        """The lemma's lower bound of every weight, exp(-delta)/n."""
        return (-self.spread).exp() / self.keys

    @property
    def highest_allowed(self) -> Float[Tensor, "batch layer head query"]:
        """The lemma's upper bound of every weight, exp(delta)/n; where delta is large, above 1."""
        return self.spread.exp() / self.keys

    @property
    def reachable(self) -> Float[Tensor, "batch layer head query"]:
        """The upper bound that can be reached, 1/(1 + (n - 1) exp(-delta))."""
        return 1 / (1 + (self.keys - 1) * (-self.spread).exp())

    @property
    def violated(self) -> Bool[Tensor, "batch layer head query"]:
        """Where a weight is out of bounds by more than rounding: nowhere, says the lemma."""
        most = 1 + rounding(self.spread)
        return (
            (self.smallest * most < self.lowest_allowed)
            | (self.largest > self.highest_allowed * most)
            | (self.largest > self.reachable * most)
        )


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Dispersion(Result):
    """Every attention row against what its scores allow. Padding and blocks without attention: NaN.

    Attributes:
        rows: Over all keys that a query sees.
        without_first: Once the first token is taken out and the rest made to sum to one; NaN where
            nothing is left.
        possible: What the spread could be at most, in nats: twice the scaled product of the query's
            length and the longest key's, the first step of Proposition 3.1 of arXiv 2410.01104, or
            twice the soft cap. NaN where a layer was read by its pattern.
    """

    rows: RowExtremes
    without_first: RowExtremes
    possible: Float[Tensor, "batch layer head query"]

    @property
    def violated(self) -> Bool[Tensor, "batch layer head query"]:
        """Rows where a bound does not hold: none, unless something was measured wrongly."""
        spread, slack = self.rows.spread, rounding(self.rows.spread)
        beyond = spread > self.possible * (1 + slack) + slack
        return self.rows.violated | self.without_first.violated | beyond

    def by_head(
        self, values: Float[Tensor, "batch layer head query"], begin: float = 0.75
    ) -> Float[Tensor, "layer head"]:
        """Mean over late queries: those from a share of their sequence on, the last quarter."""
        mask = self.sequences.mask
        at = torch.arange(mask.shape[1])
        late = mask & (at >= begin * (mask.sum(dim=1, keepdim=True) - 1))
        chosen = values.where(late[:, None, None], torch.nan)
        together = rearrange(chosen, "batch layer head query -> layer head (batch query)")
        return together.nanmean(dim=-1)

    def to_frame(self) -> "pd.DataFrame":
        """One row a head: means over the last quarter of queries, and violations over all."""
        import pandas as pd

        layers, heads = self.possible.shape[1:3]
        means = {
            "keys": self.rows.keys,
            "spread": self.rows.spread,
            "possible": self.possible,
            "largest": self.rows.largest,
            "reachable": self.rows.reachable,
            "spread_without_first": self.without_first.spread,
            "largest_without_first": self.without_first.largest,
            "reachable_without_first": self.without_first.reachable,
        }
        return pd.DataFrame(
            {
                "layer": torch.arange(layers).repeat_interleave(heads).numpy(),
                "head": torch.arange(heads).repeat(layers).numpy(),
                **{name: self.by_head(values).flatten().numpy() for name, values in means.items()},
                "violations": self.violated.sum(dim=(0, 3)).flatten().numpy(),
            }
        )

    def plot(self) -> "go.Figure":
        """Largest weight without the first token by position: median and middle 80 % of heads.

        Beside it the median of what the spread of these scores allows, and 1/n, which is uniform
        attention. Both axes are logarithmic.
        """
        import plotly.graph_objects as go

        others = self.without_first
        low, middle, high = _quantiles(others.largest)
        x, blue = list(range(len(middle))), "#4f7fd0"
        figure = go.Figure()
        for values, fill in ((low, None), (high, "tonexty")):
            figure.add_scatter(x=x, y=values, line={"width": 0}, fill=fill, showlegend=False)
        figure.add_scatter(x=x, y=middle, name="largest weight without the first token")
        figure.update_traces(line_color=blue, fillcolor="rgba(79,127,208,0.25)")
        for values, name, dash in (
            (others.reachable, "what the spread of the scores allows", "dash"),
            (1 / others.keys, "uniform attention", "dot"),
        ):
            line = {"color": figures.GREY, "dash": dash}
            figure.add_scatter(x=x, y=_quantiles(values)[1], name=name, line=line)
        figure.update_traces(mode="lines")
        figure.update_xaxes(title_text="position of the query", type="log")
        figure.update_yaxes(title_text="weight, median over heads", type="log")
        return figures.dress(figure, height=460)

    def lines(self) -> tuple[str, ...]:
        """How sharp late queries are, what their spread allows, and whether the bounds hold."""
        others = self.without_first
        keys, spread, largest, reachable = (
            float(self.by_head(values).nanmedian())
            for values in (others.keys, others.spread, others.largest, others.reachable)
        )
        needed = f"; half needs {math.log(keys - 1):.3g} nats" if keys > 1 else ""
        measured = int((~self.rows.spread.isnan()).sum())
        return (
            f"without the first token, the largest weight of late queries is {largest:.3g} in the "
            f"median head ({keys:.0f} keys)",
            f"their scores spread over {spread:.3g} nats, which allows {reachable:.3g}{needed}",
            f"bounds of arXiv 2410.01104 violated in {int(self.violated.sum())} of {measured} rows",
        )


def rounding(values: Tensor) -> float:
    """Relative difference that rounding may make of quantities that are equal."""
    return 1024 * torch.finfo(values.dtype).eps


def _quantiles(values: Float[Tensor, "batch layer head query"]) -> list[list[float | None]]:
    """10 %, 50 % and 90 % over heads, layers and sequences, by query."""
    every = rearrange(values, "batch layer head query -> query (batch layer head)")
    marks = torch.tensor([0.1, 0.5, 0.9], dtype=every.dtype)
    return figures.rows(every.nanquantile(marks, dim=-1))
