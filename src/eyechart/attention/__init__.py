"""Statistics of attention, for every head."""

from eyechart.attention.probe import AttentionProbe
from eyechart.attention.selected import PatternProbe
from eyechart.attention.statistics import attention_statistics, warn_of_fallback, wins

__all__ = ["AttentionProbe", "PatternProbe", "attention_statistics", "warn_of_fallback", "wins"]
