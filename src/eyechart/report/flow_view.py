"""What the section on information flow shows: figures, the table of agreement, the summary."""

from typing import TYPE_CHECKING, Any, NamedTuple

from eyechart.results import CHEAP, TRUTHS, InformationFlow
from eyechart.results.flow_figures import (
    NAMES,
    by_position,
    rollout_map,
    sink_profile,
    spread_map,
    topology,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAP_CELLS = 11_000
"""Layers times positions of each map; there can be seven, and more would cost megabytes."""

MAPS = ("rollout", "norm_rollout", "alti", "attention", "through")

METHODS = {
    "attention": "mean over heads and layers of the chosen token's attention",
    "rollout": "attention averaged with the skip connection, multiplied through the layers",
    "path_bound": "upper bound on the derivative with attention held fixed, over all paths",
    "norm_rollout": "as the rollout, contributions weighted by the length of what they add",
    "alti": "as the rollout, contributions by how much of the block's output is lost without them",
}


class FlowView(NamedTuple):
    """The first sequence's flow, ready to be shown.

    Attributes:
        query: Position of the chosen token.
        token: Its label.
        shown: How many positions from each end the figures show; None where they show all.
        maps: Which maps there are to choose from, and what each is called.
        truths: What each truth that was measured is called; the columns of ``measures``.
        ends: The first and the chosen token over the median, in the first of the truths.
        share: Share of the rollout on the first token after all layers.
        best: The measure that agrees best with the first of the truths, and their correlation.
        measures: Name and method of each cheap picture, and its row of the table of agreement.
        missing: Name of each picture that is not available, and why.
    """

    query: int
    token: str
    shown: int | None
    maps: dict[str, str]
    truths: tuple[str, ...]
    ends: tuple[float, float] | None
    share: float | None
    best: tuple[str, float] | None
    measures: list[tuple[str, str, list[dict[str, Any] | None]]]
    missing: list[tuple[str, str]]


def flow_view(flow: InformationFlow) -> FlowView:
    """Names and numbers of the section; the figures are :func:`flow_figures`'s."""
    truths, measures = flow.have(*TRUTHS), flow.have(*CHEAP)
    found = {(row["measure"], row["truth"]): row for row in flow.agreement().to_dict("records")}
    first = [row for (_, truth), row in found.items() if truth == truths[0]]
    best = max(first, key=lambda row: row["spearman"], default=None)
    longest, query = _longest(flow), int(flow.query[0])
    return FlowView(
        query=query,
        token=flow.sequences.labels[0][query],
        shown=longest // 2 if len(flow.sequences.labels[0]) > longest else None,
        maps={name: NAMES[name] for name in flow.have(*MAPS)},
        truths=tuple(NAMES[truth] for truth in truths),
        ends=flow.u_shape(truths[0])[0] if truths else None,
        share=None if flow.rollout is None else float(flow.sink_share[0, -1]),
        best=None if best is None else (NAMES[best["measure"]], best["spearman"]),
        measures=[
            (NAMES[name], METHODS[name], [found.get((name, truth)) for truth in truths])
            for name in measures
        ],
        missing=[(NAMES.get(name, name), reason) for name, reason in flow.unavailable.items()],
    )


def flow_figures(flow: InformationFlow) -> "dict[str, go.Figure]":
    """The figures that stand alone, by the name of their place on the page."""
    longest, figures = _longest(flow), {}
    if flow.have(*CHEAP, *TRUTHS):
        figures["flow"] = by_position(flow, longest)
    if flow.eigenvalues is not None:
        figures["topology"] = topology(flow, longest)
    if flow.spread is not None:
        figures["spread"] = spread_map(flow, longest)
    if flow.sinks is not None:
        figures["sinks"] = sink_profile(flow)
    return figures


def flow_maps(flow: InformationFlow) -> "dict[str, dict[str, go.Figure]]":
    """The figures that share a place, "map", one at a time, by the name that chooses them."""
    longest = _longest(flow)
    return {name: {"map": rollout_map(flow, name, longest)} for name in flow.have(*MAPS)}


def _longest(flow: InformationFlow) -> int:
    layered = flow.have(*MAPS, "spread")
    return MAP_CELLS // max((getattr(flow, name).shape[1] for name in layered), default=1)
