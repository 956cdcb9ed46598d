"""Figures. One colour scale per quantity, the same in notebook, report and docs.

All scales are perceptually uniform. Backgrounds are transparent and text is a grey that reads on
white and on black, so that a figure is legible wherever it is shown.
"""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import plotly.graph_objects as go

MASS, ENTROPY, NORM, DEPTH = "Viridis", "Cividis", "Magma", "Plasma"
GREY = "#7d8590"
_TITLES = {
    "first": ("mass on the first token", MASS),
    "diagonal": ("mass on itself", MASS),
    "previous": ("mass on the previous token", MASS),
    "entropy": ("entropy, nats", ENTROPY),
}


def _title(name: str) -> tuple[str, str]:
    """Title and colour scale; what has no title of its own is the mass on a named target."""
    return _TITLES.get(name, (f"mass on {name}", MASS))


def visible(token: str) -> str:
    """A token as a person can read it: white space shown, control characters escaped."""
    shown = token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def head_maps(maps: Mapping[str, Tensor]) -> "go.Figure":
    """One layer-by-head heatmap a statistic, side by side; masses share the range 0 to 1."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(
        cols=len(maps),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[_title(name)[0] for name in maps],
    )
    layers = max(scores.shape[0] for scores in maps.values())
    for column, (name, scores) in enumerate(maps.items(), start=1):
        title, scale = _title(name)
        mass = scale == MASS
        last_of_scale = not mass or not any(
            _title(later)[1] == MASS for later in list(maps)[column:]
        )
        figure.add_trace(
            go.Heatmap(
                z=rows(scores),
                zmin=0 if mass else None,
                zmax=1 if mass else None,
                colorscale=scale,
                showscale=last_of_scale,
                colorbar={
                    "title": "mass" if mass else "nats",
                    "thickness": 12,
                    "x": 1.01 + 0.07 * (not mass),
                },
                hovertemplate="L%{y}H%{x}: %{z:.3f}<extra>" + title + "</extra>",
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text="head", dtick=step(scores.shape[1]), row=1, col=column)
    figure.update_yaxes(title_text="layer", row=1, col=1)
    figure.update_yaxes(dtick=step(layers), constrain="domain")
    return dress(figure, height=160 + 13 * max(layers, 12))


def patterns(pattern: Tensor, names: Sequence[str], labels: Sequence[str]) -> "go.Figure":
    """Attention matrices of a few heads, query down, key across."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=len(names), shared_yaxes=True, subplot_titles=list(names))
    ticks = categories(labels)
    for column, matrix in enumerate(pattern, start=1):
        figure.add_trace(
            go.Heatmap(
                z=rows(matrix[: len(ticks), : len(ticks)]),
                x=ticks,
                y=ticks,
                zmin=0,
                zmax=1,
                colorscale=MASS,
                showscale=column == len(names),
                hovertemplate="from %{y} to %{x}: %{z:.3f}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_yaxes(autorange="reversed")
    return dress(figure, height=420)


def residual_map(norm: Tensor, labels: Sequence[str]) -> "go.Figure":
    """Length of the residual stream, layer by position; colour is its base-10 logarithm."""
    import plotly.graph_objects as go

    norm = norm[:, : len(labels)]
    figure = go.Figure(
        go.Heatmap(
            z=rows(norm.log10()),
            customdata=rows(norm),
            x=categories(labels),
            colorscale=NORM,
            colorbar={"title": "log10 norm", "thickness": 12},
            hovertemplate="layer %{y}, token %{x}: %{customdata:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title={"text": "position and token", "standoff": 12}, type="category")
    figure.update_yaxes(title_text="layer (0: embedding)", dtick=step(norm.shape[0]))
    return dress(figure, height=160 + 11 * max(norm.shape[0], 14))


def dress(figure: "go.Figure", height: int) -> "go.Figure":
    """What all figures have in common: transparent, grey, and as tall as their content needs."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 20, "t": 40, "b": 60},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 12},
        hoverlabel={"font_size": 13},
        legend={"font": {"size": 10}},
    )
    figure.update_xaxes(gridcolor="rgba(125,133,144,0.25)", zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor="rgba(125,133,144,0.25)", zeroline=False, automargin=True)
    return figure


def rows(matrix: Tensor, digits: int = 4) -> list[list[float | None]]:
    """Lists with None for NaN, which is how Plotly says 'no value'; four digits are plenty."""
    return [
        [None if value != value else float(f"{value:.{digits}g}") for value in row]
        for row in matrix.tolist()
    ]


def categories(labels: Sequence[str]) -> list[str]:
    """Positions with their tokens, as names of an axis; none occurs twice."""
    return [f"{index} {plain(visible(label))}" for index, label in enumerate(labels)]


def plain(text: str) -> str:
    """Text as Plotly shows it unchanged."""
    # Plotly reads a little HTML in labels, and shows entities for quotation marks as they are.
    return html.escape(text, quote=False)


def step(count: int) -> int:
    """Distance of ticks on an axis of whole numbers."""
    return max(1, count // 10)
