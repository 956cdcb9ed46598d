"""The one place that knows CircuitsVis: its bundled script, and what its view of heads is given.

Its Python side is not used: that asks the network for a script and writes tokens into HTML as they
are. The bundle takes tokens as data and draws them on a canvas.
"""

from importlib import resources
from typing import Any, NamedTuple

from eyechart.results import PATTERN_TOKENS, AttentionPatterns, head_name
from eyechart.results.figures import visible

FULL_COLOUR = 0.5
"""Mass from which the colour is at its strongest; on a scale up to 1, broad heads look empty."""

STEPS = 10_000
"""Masses are embedded as whole numbers of this many steps: four decimals in a third of the size."""

LOOK = {"maxValue": FULL_COLOUR, "positiveColor": "#1b4f9c"}
"""Properties that all views of attention on the page have in common."""


class AttentionView(NamedTuple):
    """The patterns of the first sequence, ready to be drawn.

    Attributes:
        props: Properties of ``CircuitsVis.AttentionPattern`` that all heads share.
        heads: The pattern of each head, in :data:`STEPS`, only keys up to the query.
        shown: How many tokens they show.
        chosen: Name of each head, and why it was chosen.
    """

    props: dict[str, Any]
    heads: list[list[list[int]]]
    shown: int
    chosen: tuple[tuple[str, str], ...]


def scripts() -> tuple[str, str]:
    """What must run, in this order, before ``CircuitsVis`` can draw.

    A library inside the bundle tries WebAssembly and does without where there is none. The page's
    policy forbids it, and finding it absent is quieter than being refused.
    """
    bundle = resources.files("circuitsvis") / "dist/cdn/iife.js"
    return "delete globalThis.WebAssembly;", bundle.read_text(encoding="utf-8")


def attention_view(patterns: AttentionPatterns) -> AttentionView:
    """The first sequence's patterns, at most :data:`PATTERN_TOKENS` tokens, to four decimals."""
    labels = patterns.sequences.labels[0][:PATTERN_TOKENS]
    shown = len(labels)
    return AttentionView(
        props={"tokens": [visible(label) for label in labels], **LOOK},
        heads=[
            [
                [round(mass * STEPS) for mass in row[: query + 1]]
                for query, row in enumerate(head[:shown, :shown].tolist())
            ]
            for head in patterns.pattern[0]
        ],
        shown=shown,
        chosen=tuple(
            (head_name(*head), reason)
            for head, reason in zip(patterns.heads, patterns.reasons, strict=True)
        ),
    )
