"""Information flow toward the start of the sequence."""

from eyechart.flow.information import MEASURES, information_flow

__all__ = ["MEASURES", "information_flow"]
