"""Collapse on a ladder of number formats: where a model is rounded, and how coarsely."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eyechart.errors import UsageError
from eyechart.results import collapse_figures
from eyechart.results.base import Result
from eyechart.results.collapse import CollapseCurve
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@storable
@dataclass(frozen=True, eq=False, repr=False)
class PrecisionLadder(Result):
    """The same collapse curve with parts of the model in coarser and coarser formats.

    Barbero et al., arXiv 2406.04267, section 4 (quantisation): lower precision makes two prompts
    indistinguishable at shorter lengths. On every rung the final representations are read in the
    rung's own format.

    Attributes:
        base: The model as it is, read in every format.
        rungs: By place and format ("stream", "bfloat16"): the curve of the model so rounded.
        failures: Rungs that could not be measured, and why.
    """

    base: CollapseCurve
    rungs: dict[str, dict[str, CollapseCurve]]
    failures: dict[str, str]

    @property
    def lengths(self) -> tuple[int, ...]:
        """n, as in the base curve."""
        return self.base.lengths

    def curve(self, place: str, format: str) -> CollapseCurve:
        """One rung; at "final" the base itself, of which only the reading is rounded.

        Raises:
            UsageError: it was not measured.
        """
        if place == "final" and format in self.base.formats:
            return self.base
        found = self.rungs.get(place, {}).get(format)
        if found is None:
            there = "; ".join(f"{name}: {', '.join(made)}" for name, made in self.rungs.items())
            raise UsageError(f"{format!r} at {place!r} was not measured; there are {there}")
        return found

    def to_frame(self) -> "pd.DataFrame":
        """One row a (place, format, length): relative distance, shares of equal coordinates."""
        import pandas as pd

        return pd.DataFrame(
            {
                "place": place,
                "format": name,
                "length": n,
                "relative": float(curve.relative[-1, index]),
                "identical": float(curve.identical[curve.formats.index(name), index]),
                "expected": float(curve.expected[curve.formats.index(name), index]),
            }
            for place, name, curve in self._all()
            if curve.identical is not None and curve.expected is not None
            for index, n in enumerate(curve.lengths)
        )

    def horizons(self) -> "pd.DataFrame":
        """One row a (place, format): distances at both ends, the horizon seen and predicted."""
        import pandas as pd

        # One curve may be read in several formats; its line is fitted once.
        curves = {id(curve): curve for _, _, curve in self._all()}
        fits = {key: curve.fit() for key, curve in curves.items()}
        tables = {key: curve.horizons().set_index("format") for key, curve in curves.items()}
        return pd.DataFrame(
            {
                "place": place,
                "format": name,
                "relative_first": float(curve.relative[-1, 0]),
                "relative_last": float(curve.relative[-1, -1]),
                "slope": None if (law := fits[id(curve)]) is None else law.slope,
                **tables[id(curve)].loc[name].to_dict(),
            }
            for place, name, curve in self._all()
        )

    def plot(self) -> "go.Figure":
        """Share of coordinates that coincide, by length, a panel a place and a line a format."""
        return collapse_figures.ladder(self.to_frame())

    def lines(self) -> tuple[str, ...]:
        """At the longest length: the share of coordinates that coincide in each format."""
        said = []
        for place in dict.fromkeys(place for place, _, _ in self._all()):
            shares = [
                f"{name} {float(curve.identical[curve.formats.index(name), -1]):.2g}"
                for where, name, curve in self._all()
                if where == place and curve.identical is not None
            ]
            said.append(
                f"{place}: coordinates that coincide at n={self.lengths[-1]}: {', '.join(shares)}"
            )
        said += [f"{name} failed: {why}" for name, why in self.failures.items()]
        return tuple(said)

    def _all(self) -> list[tuple[str, str, CollapseCurve]]:
        read = [("final", name, self.base) for name in self.base.formats]
        run = [
            (place, name, curve)
            for place, made in self.rungs.items()
            for name, curve in made.items()
        ]
        return read + run
