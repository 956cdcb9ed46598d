"""Figures of an information flow: by position, by layer and position, and of the sink.

They show the first sequence. A text longer than asked for loses its middle, because what a token
hears best is at the beginning and just before it; a gap marks the place.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.results.figures import (
    GREY,
    MASS,
    NORM,
    categories,
    dress,
    plain,
    rows,
    step,
    visible,
)
from eyechart.results.flow import CHEAP, TRUTHS, InformationFlow
from eyechart.results.sinks import SinkProfile

if TYPE_CHECKING:
    import plotly.graph_objects as go

NAMES = {
    "attention": "attention",
    "rollout": "rollout",
    "path_bound": "path bound",
    "norm_rollout": "norm-weighted rollout",
    "alti": "ALTI",
    "through": "flow through a position",
    "sensitivity": "sensitivity",
    "replacement": "replacement",
    "replacement_kl": "replacement (KL)",
    "replacement_change": "replacement (distance)",
    "spread": "perturbation",
    "spread_evicted": "perturbation without the sink",
    "sinks": "sink",
    "sinks_other_bos": "sink, other beginning",
    "topology": "spectrum of attention",
    "hitting_depth": "hitting depth",
}
"""What the pictures are called where a person reads it."""

# Dark enough for a white page and light enough for a dark one; tests hold them to it.
COLOURS = {
    "sensitivity": "#d1495b",
    "replacement_kl": "#2a8fa0",
    "replacement_change": "#b07d12",
    "attention": GREY,
    "rollout": "#3d8b40",
    "path_bound": "#4f7fd0",
    "norm_rollout": "#9467bd",
    "alti": "#c2529b",
}


def by_position(flow: InformationFlow, longest: int | None = None) -> "go.Figure":
    """Every measure (thin) and truth (bold) over its own sum up to the chosen token; log axis.

    The axis begins two decades below the lowest truth: some measures fall far deeper, and would
    press all others flat. A double click shows them whole.

    Args:
        flow: What to show.
        longest: Positions shown at most; all by default.

    Raises:
        UsageError: this result has none of them.
    """
    import plotly.graph_objects as go

    if not flow.have(*TRUTHS, *CHEAP):
        raise UsageError("this result has nothing by position; it was not asked for")
    last = int(flow.query[0])
    places = shown_places(last + 1, longest)
    ticks = _ticks(flow, places)
    figure, found = go.Figure(), dict[str, Tensor]()
    for name in flow.have(*TRUTHS, *CHEAP):  # thin lines over bold ones
        values = flow.by_position(name)[0, : last + 1].double()
        truth, total = name in TRUTHS, values.nansum()
        found[name] = shares = _cut(values / total, places)
        if name == "sensitivity" and flow.sensitivity_interval is not None:
            half = _cut(flow.sensitivity_interval[0].double() / total, places)
            _add_band(figure, ticks, shares, half)
        # From one replaced token to the next: those between were not asked for.
        at = [i for i, place in enumerate(places) if place < 0 or not values[place].isnan()]
        figure.add_scatter(
            x=[ticks[i] for i in at],
            y=_positive(shares[at]),
            name=NAMES[name],
            legendgroup=name,
            mode="lines+markers" if truth else "lines",
            marker={"size": 4},
            line={"color": COLOURS[name], "width": 2.5 if truth else 1.2},
            hovertemplate=f"{NAMES[name]}, %{{x}}: %{{y:.3g}}<extra></extra>",
        )
    figure.update_xaxes(
        title={"text": "position and token", "standoff": 12},
        type="category",
        categoryorder="array",
        categoryarray=ticks,
        range=[-0.5, len(places) - 0.5],
    )
    low, high = _decades(found)
    figure.update_yaxes(
        title_text="share of its own sum",
        type="log",
        exponentformat="power",
        range=[low, high],
        dtick=max(1, round((high - low) / 8)),
    )
    dress(figure, height=480)
    figure.update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, margin={"t": 60}
    )
    return figure


def rollout_map(
    flow: InformationFlow, measure: str = "rollout", longest: int | None = None
) -> "go.Figure":
    """Share of the chosen token's row on every position, layer by layer; colour is its log10.

    Args:
        flow: What to show.
        measure: "rollout", "norm_rollout", "alti", "attention", or "through" for what goes by a
            position on its way into each layer.
        longest: Positions shown at most; all by default.

    Raises:
        UsageError: there is none of that name, or this result does not have it.
    """
    import plotly.graph_objects as go

    shares = flow.through if measure == "through" else flow.by_layer(measure)
    if shares is None:
        raise UsageError("this result has no flow through positions; it comes with the rollout")
    places = shown_places(int(flow.query[0]) + 1, longest)
    figure = go.Figure(
        go.Heatmap(
            **_logarithmic(_cut(shares[0], places)),
            x=_ticks(flow, places),
            colorscale=MASS,
            zmax=0,
            colorbar={"title": "log10 share", "thickness": 12},
            hovertemplate="layer %{y}, token %{x}: %{customdata:.3g}<extra></extra>",
        )
    )
    layers = shares.shape[1]
    figure.update_xaxes(title={"text": "position and token", "standoff": 12}, type="category")
    figure.update_yaxes(
        title_text="into layer" if measure == "through" else "after layer", dtick=step(layers)
    )
    return dress(figure, height=160 + 11 * max(layers, 14))


def topology(flow: InformationFlow, longest: int | None = None) -> "go.Figure":
    """What the shape of attention alone says: paths by position, spectrum and depth by layer.

    Args:
        flow: What to show.
        longest: Positions shown at most; all by default.

    Raises:
        UsageError: this result does not have it.
    """
    from plotly.subplots import make_subplots

    if flow.eigenvalues is None:
        raise UsageError("this result has no topology; it was not asked for")
    last = int(flow.query[0])
    places = shown_places(last + 1, longest)
    panels = {
        "log10 of the number of causal paths": (
            _ticks(flow, places),
            _cut(flow.log_paths()[0, : last + 1] / math.log(10), places),
        ),
        "second eigenvalue": (None, flow.eigenvalues[0, :, 1 : last + 1].double()),
        "hitting depth, layers": (None, flow.hitting_depth),
    }
    figure = make_subplots(cols=3, horizontal_spacing=0.07, subplot_titles=list(panels))
    for column, (name, (ticks, values)) in enumerate(panels.items(), start=1):
        if values is None or not values.numel():
            continue
        if name == "second eigenvalue":
            values = values.amax(dim=-1)
        values = values[0] if name.startswith("hitting") else values
        values = values.where(values.isfinite(), torch.nan)
        figure.add_scatter(
            x=ticks or list(range(len(values))),
            y=rows(values[None])[0],
            mode="lines",
            line={"color": COLOURS["rollout"], "width": 2},
            showlegend=False,
            hovertemplate="%{x}: %{y:.4g}<extra>" + name + "</extra>",
            row=1,
            col=column,
        )
    figure.update_xaxes(title={"text": "position and token", "standoff": 12}, row=1, col=1)
    for column in (2, 3):
        layers = flow.eigenvalues.shape[1]
        figure.update_xaxes(title_text="layer", dtick=step(layers), row=1, col=column)
    figure.update_yaxes(type="log", row=1, col=3)
    return dress(figure, height=380)


def spread_map(flow: InformationFlow, longest: int | None = None) -> "go.Figure":
    """How far one changed token moves every layer and position; without the sink beside it.

    Args:
        flow: What to show.
        longest: Positions shown at most; all by default.

    Raises:
        UsageError: this result does not have it.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if flow.spread is None or flow.spread_change is None or flow.spread_labels is None:
        raise UsageError("this result has no perturbation; it was not asked for")
    labels = flow.sequences.labels[0]
    position = int(flow.spread_change[0, 0])
    before, after = (plain(visible(x)) for x in (labels[position], flow.spread_labels[0]))
    panels = {f"token {position}, “{before}”, changed to “{after}”": flow.spread}
    if flow.spread_evicted is not None and flow.evicted is not None:
        count, since = flow.evicted
        panels[f"the same, the first {count} hidden from token {since} on"] = flow.spread_evicted
    places = shown_places(len(labels), longest)
    found = [_logarithmic(_cut(values[0], places)) for values in panels.values()]
    colours = [z for panel in found for row in panel["z"] for z in row if z is not None]
    figure = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=list(panels),
    )
    for column, panel in enumerate(found, start=1):
        figure.add_trace(
            go.Heatmap(
                **panel,
                x=_ticks(flow, places),
                zmin=min(colours, default=None),
                zmax=max(colours, default=None),
                colorscale=NORM,
                showscale=column == len(found),
                colorbar={"title": "log10 distance", "thickness": 12},
                hovertemplate="layer %{y}, token %{x}: %{customdata:.3g}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    layers = flow.spread.shape[1]
    figure.update_xaxes(title={"text": "position and token", "standoff": 12}, type="category")
    figure.update_yaxes(title_text="layer (0: embedding)", row=1, col=1)
    figure.update_yaxes(dtick=step(layers))
    # A gap is what did not move: nothing should be seen there.
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    return dress(figure, height=180 + 11 * max(layers, 14))


def sink_profile(flow: InformationFlow) -> "go.Figure":
    """The first token by layer: its mass, its lengths over the others', and its angle to queries.

    Dashed: the text with the beginning-of-sequence token that the main one lacks, or without it.

    Raises:
        UsageError: this result does not have it.
    """
    from plotly.subplots import make_subplots

    if flow.sinks is None:
        raise UsageError("this result has no sink profile; it was not asked for")
    figure = make_subplots(
        cols=3,
        horizontal_spacing=0.07,
        subplot_titles=["mass on the first token", "its length over the others'", "cosine"],
    )
    for profile, dash in ((flow.sinks, "solid"), (flow.sinks_other_bos, "dash")):
        if profile is None:
            continue
        share = flow.rollout[0, :, 0] if dash == "solid" and flow.rollout is not None else None
        for column, lines in enumerate(_sink_lines(profile, share), start=1):
            for (name, values), colour in zip(lines.items(), COLOURS.values(), strict=False):
                if values is None:
                    continue
                figure.add_scatter(
                    y=rows(values[None])[0],
                    name=name,
                    mode="lines",
                    line={"color": colour, "width": 2, "dash": dash},
                    legend=f"legend{column}" if column > 1 else "legend",
                    showlegend=dash == "solid",
                    hovertemplate=f"{name}, layer %{{x}}: %{{y:.3g}}<extra>{dash}</extra>",
                    row=1,
                    col=column,
                )
    figure.update_xaxes(title_text="layer", dtick=step(flow.sinks.mass.shape[1]))
    figure.update_yaxes(range=[0, 1.02], row=1, col=1)
    figure.update_yaxes(type="log", row=1, col=2)
    dress(figure, height=420)
    for axis, legend in (("xaxis", "legend"), ("xaxis2", "legend2"), ("xaxis3", "legend3")):
        figure.layout[legend] = {
            "font": {"size": 10},
            "x": figure.layout[axis].domain[0],
            "y": -0.25,
            "yanchor": "top",
        }
    return figure


def shown_places(length: int, longest: int | None) -> list[int]:
    """Positions to show: all, or as many from both ends, with -1 for the gap between."""
    if longest is None or length <= longest:
        return list(range(length))
    half = longest // 2
    return [*range(half), -1, *range(length - half, length)]


def _sink_lines(
    profile: SinkProfile, share: Float[Tensor, " layer"] | None
) -> tuple[dict[str, Tensor | None], ...]:
    """What the three panels show; medians over heads, first sequence."""

    def median(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[0].nanmedian(dim=-1).values

    return (
        {"rollout": share, "mean attention": profile.mass[0], "sink rate": profile.rate},
        {
            "value": median(profile.value_norm),
            "value written": median(profile.output_norm),
            "key": median(profile.key_norm),
            "residual stream": profile.residual[0],
        },
        {
            "queries and its key": median(profile.cosine),
            "queries and other keys": median(profile.cosine_others),
        },
    )


def _cut(
    values: Float[Tensor, "*layer position"], places: list[int]
) -> Float[Tensor, "*layer place"]:
    return values[..., places].double().masked_fill(torch.tensor(places) < 0, torch.nan)


def _ticks(flow: InformationFlow, places: list[int]) -> list[str]:
    names = categories(flow.sequences.labels[0])
    return [names[place] if place >= 0 else "…" for place in places]


def _positive(values: Float[Tensor, " place"]) -> list[float | None]:
    """Values for a logarithmic axis, which has no place for zero: a gap instead."""
    return rows(values.where(values > 0, torch.nan)[None])[0]


def _logarithmic(values: Float[Tensor, "layer place"]) -> dict[str, Any]:
    """Colours and hover text of a heatmap; exact zeros are gaps."""
    values = values.where(values > 0, torch.nan)
    return {"z": rows(values.log10(), digits=3), "customdata": rows(values, digits=3)}


def _decades(found: dict[str, Tensor]) -> tuple[float, float]:
    """Ends of the logarithmic axis of all curves, in powers of ten."""
    curves = {name: values[values > 0].log10() for name, values in found.items()}
    every = torch.cat(list(curves.values()))
    truths = torch.cat([every[:0], *(curves[name] for name in curves if name in TRUTHS)])
    if not len(every):
        return -1.0, 0.0
    low = max(every.min(), truths.min() - 2) if len(truths) else every.min()
    return float(low) - 0.1, float(every.max()) + 0.1


def _add_band(
    figure: "go.Figure",
    ticks: list[str],
    shares: Float[Tensor, " place"],
    half: Float[Tensor, " place"],
) -> None:
    """The interval of the sensitivity, where it is not exact."""
    if not bool(((half > 0) & (shares > 0)).any()):
        return
    # A logarithmic axis has no place for what reaches zero: the band ends at the curve's lowest.
    lowest = float(shares[shares > 0].min())
    colour = COLOURS["sensitivity"]
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    for bound, fill in (((shares - half).clamp(min=lowest), None), (shares + half, "tonexty")):
        figure.add_scatter(
            x=ticks,
            y=_positive(bound),
            legendgroup="sensitivity",
            mode="lines",
            line={"width": 0},
            fill=fill,
            fillcolor=f"rgba({red},{green},{blue},0.25)",
            showlegend=False,
            hoverinfo="skip",
        )
