"""Everything one prompt allows, in one result."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from eyechart.errors import ResultError
from eyechart.results.attention import LEADERS, AttentionPatterns, AttentionStatistics
from eyechart.results.base import Result, head_name
from eyechart.results.collapse import CollapseCurve
from eyechart.results.collapse_study import CollapseStudy
from eyechart.results.collapse_words import conclusion
from eyechart.results.flow import InformationFlow
from eyechart.results.heads import HeadCensus
from eyechart.results.residual import ResidualNorms
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_NOTHING = (None, None, None, None)


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Exam(Result):
    """The measurements of one exam; a part that failed is None here and told in ``failures``.

    Attributes:
        residual: Norms of the residual stream and massive activations.
        attention: Statistics of every head.
        patterns: Patterns of the most striking heads, at most 256 tokens.
        collapse: Distance of n and n + 1 repeated tokens.
        failures: What went wrong and what to do, by the name of the part that failed.
        flow: Where the last token's information comes from; None in exams of older versions.
        heads: What each head looks at and is for; None where no census was asked for.
        collapse_study: Collapse of several families and formats; None where it was not asked for.
    """

    residual: ResidualNorms | None
    attention: AttentionStatistics | None
    patterns: AttentionPatterns | None
    collapse: CollapseCurve | None
    failures: dict[str, str] = field(default_factory=dict)
    flow: InformationFlow | None = None
    heads: HeadCensus | None = None
    collapse_study: CollapseStudy | None = None

    @classmethod
    def of_flow(cls, flow: InformationFlow) -> Self:
        """An exam of which nothing but the information flow was asked for."""
        return cls(flow.sequences, flow.provenance, *_NOTHING, flow=flow)

    @classmethod
    def of_heads(cls, heads: HeadCensus) -> Self:
        """An exam of which nothing but the census of heads was asked for."""
        return cls(heads.sequences, heads.provenance, *_NOTHING, heads=heads)

    @classmethod
    def of_collapse(cls, study: CollapseStudy) -> Self:
        """An exam of which nothing but the study of collapse was asked for."""
        failures = {f"collapse, {part}": why for part, why in study.failures.items()}
        given = (study.sequences, study.provenance, *_NOTHING)
        return cls(*given, failures=failures, collapse_study=study)

    def summary(self) -> dict[str, Any]:
        """The numbers of the printed summary, ready for JSON."""
        said: dict[str, Any] = {
            "model": self.provenance.model,
            "tokens": list(self.sequences.lengths),
            "failures": dict(self.failures),
        }
        if self.attention is not None:
            length = self.attention.sink_length
            said["sink_rate"] = {
                "value": self.attention.sink_rate(length=length),
                "eps": 0.3,
                "length": length,
            }
            for statistic, key, _ in LEADERS:
                said[key] = [
                    {"head": head_name(layer, head), "mass": mass}
                    for layer, head, mass in self.attention.strongest(statistic, 3)
                ]
        if self.residual is not None:
            massive = self.residual.massive()
            said["massive_activations"] = {
                "count": len(massive),
                "largest": massive[0]._asdict() if massive else None,
            }
        if self.collapse is not None:
            said["collapse"] = {
                "lengths": list(self.collapse.lengths),
                "relative": self.collapse.relative[-1].tolist(),
                "onset": self.collapse.onset(),
                "conclusion": conclusion(self.collapse),
            }
        if self.flow is not None:
            said["information_flow"] = self.flow.summary()
        if self.heads is not None:
            said["heads"] = self.heads.summary()
        if self.collapse_study is not None:
            said["collapse_study"] = self.collapse_study.summary()
        return said

    def to_frame(self) -> "pd.DataFrame":
        """The table of heads, the part most often wanted."""
        if self.attention is None:
            raise ResultError("the heads of this exam were not measured; see failures")
        return self.attention.to_frame()

    def plot(self) -> "go.Figure":
        """The maps of heads."""
        if self.attention is None:
            raise ResultError("the heads of this exam were not measured; see failures")
        return self.attention.plot()

    def lines(self) -> tuple[str, ...]:
        """The lines of every part, and of every failure."""
        parts = (
            self.attention,
            self.residual,
            self.collapse,
            self.flow,
            self.heads,
            self.collapse_study,
        )
        said = [line for part in parts if part is not None for line in part.lines()]
        said += [f"{part} failed: {message}" for part, message in self.failures.items()]
        return tuple(said)
