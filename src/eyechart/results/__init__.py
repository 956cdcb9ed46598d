"""Results: frozen, saved whole or not at all, and free of any model."""

from eyechart.results.attention import (
    LEADERS,
    MEASURED,
    PATTERN_TOKENS,
    STATISTICS,
    AttentionPatterns,
    AttentionStatistics,
)
from eyechart.results.base import Kept, Provenance, Result, head_name, open_result
from eyechart.results.collapse import CollapseCurve
from eyechart.results.collapse_study import CollapseStudy
from eyechart.results.dispersion import Dispersion, RowExtremes
from eyechart.results.exam import Exam
from eyechart.results.flow import CHEAP, TRUTHS, InformationFlow
from eyechart.results.head_names import KINDS, HeadNames
from eyechart.results.head_set import HeadPrice, HeadSet
from eyechart.results.head_trials import REPLACEMENTS, HeadTrials
from eyechart.results.heads import HeadCensus
from eyechart.results.ladder import PrecisionLadder
from eyechart.results.rank import RankCollapse
from eyechart.results.residual import MassiveActivation, ResidualNorms
from eyechart.results.rotary import RotaryUse
from eyechart.results.sequences import Sequences
from eyechart.results.sinks import SinkProfile
from eyechart.results.softmax import SyntheticCurve

__all__ = [
    "CHEAP",
    "KINDS",
    "LEADERS",
    "MEASURED",
    "PATTERN_TOKENS",
    "REPLACEMENTS",
    "STATISTICS",
    "TRUTHS",
    "AttentionPatterns",
    "AttentionStatistics",
    "CollapseCurve",
    "CollapseStudy",
    "Dispersion",
    "Exam",
    "HeadCensus",
    "HeadNames",
    "HeadPrice",
    "HeadSet",
    "HeadTrials",
    "InformationFlow",
    "Kept",
    "MassiveActivation",
    "PrecisionLadder",
    "Provenance",
    "RankCollapse",
    "ResidualNorms",
    "Result",
    "RotaryUse",
    "RowExtremes",
    "Sequences",
    "SinkProfile",
    "SyntheticCurve",
    "head_name",
    "open_result",
]
