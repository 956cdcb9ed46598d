"""What softmax alone does to random numbers as there are more of them, beside what theory says."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from eyechart.results import figures
from eyechart.results.base import Kept
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@storable
@dataclass(frozen=True, eq=False, repr=False)
class SyntheticCurve(Kept):
    """A distance by sequence length, measured on random numbers: there is no model and no text.

    Attributes:
        name: What was tried.
        source: Paper and place.
        quantity: What was measured, with its unit.
        lengths: n, ascending.
        values: The measured distance, one row a draw.
        predicted: What theory says, None where it says nothing.
        prediction: The formula behind ``predicted``, in words.
        settings: The arguments, ``lengths`` and ``seed`` apart.
        seed: Seed of the draws, None where nothing is drawn.
        versions: eyechart, python, torch, transformers and transformer-lens.
    """

    name: str
    source: str
    quantity: str
    lengths: tuple[int, ...]
    values: Float[Tensor, "draw length"]
    predicted: Float[Tensor, " length"] | None
    prediction: str
    settings: dict[str, str | int | float | bool]
    seed: int | None
    versions: dict[str, str]

    @property
    def mean(self) -> Float[Tensor, " length"]:
        """Mean over draws."""
        return self.values.mean(dim=0)

    def to_frame(self) -> "pd.DataFrame":
        """One row a length: mean, lowest and highest over draws, and the prediction if any."""
        import pandas as pd

        columns = {
            "length": list(self.lengths),
            "mean": self.mean.tolist(),
            "lowest": self.values.amin(dim=0).tolist(),
            "highest": self.values.amax(dim=0).tolist(),
        }
        if self.predicted is not None:
            columns["predicted"] = self.predicted.tolist()
        return pd.DataFrame(columns)

    def plot(self) -> "go.Figure":
        """Mean with the band of all draws, and the prediction dashed; both axes logarithmic."""
        import plotly.graph_objects as go

        # Zero has no place on a logarithmic axis.
        table = self.to_frame().replace(0.0, None)
        x, blue = list(self.lengths), "#4f7fd0"
        figure = go.Figure()
        for bound, fill in (("lowest", None), ("highest", "tonexty")):
            figure.add_scatter(
                x=x, y=table[bound], name=bound, line={"width": 0}, fill=fill, showlegend=False
            )
        figure.add_scatter(x=x, y=table["mean"], name="mean of draws", line={"color": blue})
        figure.update_traces(mode="lines", fillcolor="rgba(79,127,208,0.25)")
        if self.predicted is not None:
            dash = {"color": figures.GREY, "dash": "dash"}
            name = figures.plain(self.prediction)
            figure.add_scatter(x=x, y=table["predicted"], name=name, mode="lines", line=dash)
        figure.update_xaxes(title_text="n", type="log")
        figure.update_yaxes(title_text=figures.plain(self.quantity), type="log")
        return figures.dress(figure, height=420)

    def lines(self) -> tuple[str, ...]:
        """The two ends of the curve, and how far theory is from it."""
        first, last = float(self.mean[0]), float(self.mean[-1])
        said = [
            f"{self.quantity}: {first:.4g} at n={self.lengths[0]}, {last:.4g} at "
            f"n={self.lengths[-1]} (mean of {len(self.values)})"
        ]
        if self.predicted is not None:
            said.append(
                f"predicted, {self.prediction}: {float(self.predicted[0]):.4g} and "
                f"{float(self.predicted[-1]):.4g}"
            )
        return tuple(said)

    def _title(self) -> str:
        return f"{self.name} ({self.source})"
