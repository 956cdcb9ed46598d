"""Everything about a model's collapse in one result."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eyechart.errors import UsageError
from eyechart.results import collapse_figures
from eyechart.results.base import Result
from eyechart.results.collapse import CollapseCurve
from eyechart.results.collapse_words import conclusion, overview
from eyechart.results.ladder import PrecisionLadder
from eyechart.results.rank import RankCollapse
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@storable
@dataclass(frozen=True, eq=False, repr=False)
class CollapseStudy(Result):
    """Collapse of several families of sequences, on a ladder of formats, and of a text's rank.

    Attributes:
        curves: One a family.
        ladder: The first family in coarser and coarser formats; None where not asked for.
        rank: How a text's tokens become alike; None where not asked for.
        failures: What went wrong and what to do, by the name of the part that failed.
    """

    curves: tuple[CollapseCurve, ...]
    ladder: PrecisionLadder | None = None
    rank: RankCollapse | None = None
    failures: dict[str, str] = field(default_factory=dict)

    def curve(self, family: str) -> CollapseCurve:
        """The curve of a family.

        Raises:
            UsageError: it was not measured.
        """
        for curve in self.curves:
            if curve.family == family:
                return curve
        there = ", ".join(curve.family for curve in self.curves) or "none"
        raise UsageError(f"family {family!r} was not measured; there are {there}")

    def horizons(self) -> "pd.DataFrame":
        """One row a (place, format) of the ladder; without one, the first family's formats."""
        if self.ladder is not None:
            return self.ladder.horizons()
        table = self.curves[0].horizons()
        if len(table):
            table.insert(0, "place", "final")
        return table

    def summary(self) -> dict[str, Any]:
        """The numbers of the printed summary, ready for JSON."""
        return {
            "model": self.provenance.model,
            "conclusion": overview(self.curves),
            "families": [
                _finite(row) | {"conclusion": conclusion(curve)}
                for row, curve in zip(self._rows(), self.curves, strict=True)
            ],
            "horizons": [
                _finite({str(key): value for key, value in row.items()})
                for row in self.horizons().astype(object).to_dict("records")
            ],
            "failures": dict(self.failures),
        }

    def to_frame(self) -> "pd.DataFrame":
        """One row a family: distances at both ends, onset, slope with its interval, references."""
        import pandas as pd

        return pd.DataFrame(self._rows())

    def plot(self) -> "go.Figure":
        """Relative distance of every family by length, against unrelated prompts and the floor."""
        return collapse_figures.families(self.curves)

    def lines(self) -> tuple[str, ...]:
        """The lines of every part, and of every failure."""
        parts = (*self.curves, self.ladder, self.rank)
        said = [line for part in parts if part is not None for line in part.lines()]
        return (*said, *(f"{part} failed: {why}" for part, why in self.failures.items()))

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for curve in self.curves:
            law = curve.fit()
            rows.append(
                {
                    "family": curve.family,
                    "about": curve.about,
                    "n_first": curve.lengths[0],
                    "n_last": curve.lengths[-1],
                    "relative_first": float(curve.relative[-1, 0]),
                    "relative_last": float(curve.relative[-1, -1]),
                    "control": curve.control_name,
                    "control_last": None if curve.control is None else float(curve.control[-1, -1]),
                    "onset": curve.onset(),
                    "slope": None if law is None else law.slope,
                    "slope_low": None if law is None else law.low,
                    "slope_high": None if law is None else law.high,
                    "unrelated": float(curve.unrelated["relative"][-1])
                    if curve.unrelated
                    else None,
                    "floor": curve.floor(),
                }
            )
        return rows


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON has it: None for what is no finite number, whole numbers of tokens whole."""
    found: dict[str, Any] = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    if found.get("horizon") is not None:
        found["horizon"] = int(found["horizon"])
    return found
