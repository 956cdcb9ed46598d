"""Statistics of attention, for every head."""

from eyechart.attention.pattern import AttentionProbe
from eyechart.attention.selected import PatternProbe
from eyechart.attention.statistics import attention_statistics

__all__ = ["AttentionProbe", "PatternProbe", "attention_statistics"]
