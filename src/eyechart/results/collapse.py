"""How far apart n and n + 1 repeated tokens are, layer by layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.results import figures
from eyechart.results.base import Result
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

DISTANCES = ("l1", "l2", "linf", "relative", "cosine")


@storable
@dataclass(frozen=True, eq=False, repr=False)
class CollapseCurve(Result):
    """Distance between the last token's representations of two prompts that differ by one token.

    Theorem 4.2 of Barbero et al., arXiv 2406.04267: append the last token once more, and the last
    representation hardly moves. The layer axis has an entry for the embedding, one after each
    block, and, where the model has one, a last entry for the final norm's output.

    Attributes:
        family: What is repeated ("repeat": one token).
        lengths: n, the number of repetitions in the shorter prompt of each pair.
        layer_labels: Names of the entries of the layer axis.
        l1: Sum of absolute differences.
        l2: Euclidean distance.
        linf: Largest absolute difference.
        relative: L1 distance over the L1 length of the longer prompt's representation.
        cosine: One minus the cosine similarity.
    """

    family: str
    lengths: tuple[int, ...]
    layer_labels: tuple[str, ...]
    l1: Float[Tensor, "layer length"]
    l2: Float[Tensor, "layer length"]
    linf: Float[Tensor, "layer length"]
    relative: Float[Tensor, "layer length"]
    cosine: Float[Tensor, "layer length"]

    @property
    def forward_passes(self) -> int:
        """Forward passes the curve cost."""
        return self.provenance.forward_passes

    def onset(self, layer: int = -1, fraction: float = 0.1) -> int | None:
        """Where collapse sets in: the first n from which ``relative`` stays below a fraction.

        The fraction is of the relative distance at the shortest length. None where the distance
        does not stay below it at the longest length measured, or is zero from the start (no
        prefix, rotary positions: every repetition is the same, so there is nothing to collapse).
        """
        if not 0 < fraction < 1:
            raise UsageError(f"fraction must be between 0 and 1, got {fraction}")
        curve = self.relative[layer].tolist()
        if curve[0] == 0:
            return None
        onset = None
        for length, value in zip(reversed(self.lengths), reversed(curve), strict=True):
            if value >= fraction * curve[0]:
                break
            onset = length
        return onset

    def to_frame(self) -> "pd.DataFrame":
        """One row a (layer, length)."""
        import pandas as pd

        rows = [
            {"layer": label, "length": length}
            | {name: float(getattr(self, name)[i, j]) for name in DISTANCES}
            for i, label in enumerate(self.layer_labels)
            for j, length in enumerate(self.lengths)
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "go.Figure":
        """Relative distance by length: every layer thin, the last entry bold, log-log."""
        return figures.collapse_curves(self.relative, self.lengths, self.layer_labels)

    def lines(self) -> tuple[str, ...]:
        """The first and last distance, and where collapse sets in."""
        first, last = (float(self.relative[-1, i]) for i in (0, -1))
        where = self.layer_labels[-1]
        onset = self.onset()
        return (
            f"{where}: relative distance of n and n+1 goes from {first:.3g} at "
            f"n={self.lengths[0]} to {last:.3g} at n={self.lengths[-1]}",
            f"collapse sets in at n={onset} (below a tenth of the first distance from there on)"
            if onset is not None
            else f"no collapse to a tenth of the first distance up to n={self.lengths[-1]}",
        )
