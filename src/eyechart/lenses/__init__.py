"""Lenses: context managers that change how a model sees.

Under a lens every run of the model sees through it, a plain call as well as eyechart's own
measurements; on leaving, whatever happens, the model is as it was. Lenses compose.
"""

from eyechart.lenses.attention import evict, skip_heads
from eyechart.lenses.precision import precision

__all__ = ["evict", "precision", "skip_heads"]
