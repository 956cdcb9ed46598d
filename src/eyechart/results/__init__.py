"""Results: frozen, saved whole or not at all, and free of any model."""

from eyechart.results.attention import (
    LEADERS,
    MEASURED,
    PATTERN_TOKENS,
    STATISTICS,
    AttentionPatterns,
    AttentionStatistics,
)
from eyechart.results.base import Provenance, Result, head_name, open_result
from eyechart.results.collapse import CollapseCurve
from eyechart.results.exam import Exam
from eyechart.results.flow import CHEAP, TRUTHS, InformationFlow
from eyechart.results.residual import MassiveActivation, ResidualNorms
from eyechart.results.sequences import Sequences
from eyechart.results.sinks import SinkProfile

__all__ = [
    "CHEAP",
    "LEADERS",
    "MEASURED",
    "PATTERN_TOKENS",
    "STATISTICS",
    "TRUTHS",
    "AttentionPatterns",
    "AttentionStatistics",
    "CollapseCurve",
    "Exam",
    "InformationFlow",
    "MassiveActivation",
    "Provenance",
    "ResidualNorms",
    "Result",
    "Sequences",
    "SinkProfile",
    "head_name",
    "open_result",
]
