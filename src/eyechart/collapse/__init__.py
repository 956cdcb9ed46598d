"""Representational collapse: what two prompts that differ by little still differ in."""

from eyechart.collapse.curve import DEFAULT_PROMPT, collapse_curve
from eyechart.collapse.heads import dispersion
from eyechart.collapse.ladder import precision_ladder
from eyechart.collapse.measures import distances
from eyechart.collapse.rank import rank_collapse
from eyechart.collapse.softmax import (
    alternating_total_variation,
    one_layer_collapse,
    total_variation_decay,
)
from eyechart.collapse.study import DEFAULT_FAMILIES, collapse_study

__all__ = [
    "DEFAULT_FAMILIES",
    "DEFAULT_PROMPT",
    "alternating_total_variation",
    "collapse_curve",
    "collapse_study",
    "dispersion",
    "distances",
    "one_layer_collapse",
    "precision_ladder",
    "rank_collapse",
    "total_variation_decay",
]
