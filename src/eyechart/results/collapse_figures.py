"""Figures of collapse: distance by length and layer, and what number formats can still tell apart.

Lengths may be in their thousands (one pass serves them all); where a page asks for fewer points,
those shown are spread evenly over the logarithm of n.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.results.figures import DEPTH, GREY, NORM, dress, plain, rows, step

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from eyechart.results.collapse import CollapseCurve

# Dark enough for a white page and light enough for a dark one; tests hold them to it.
FORMAT_COLOURS = {
    "float64": GREY,
    "float32": "#4f7fd0",
    "float16": "#2a8fa0",
    "bfloat16": "#3d8b40",
    "float8_e4m3": "#7b8a1f",
    "float8_e5m2": "#b07d12",
    "int8": "#c8691c",
    "int4": "#d1495b",
    "ternary": "#c2529b",
}
"""One colour a number format, wherever formats are shown: from blue (fine) to red (coarse)."""

FAMILY_COLOURS = ("#4f7fd0", "#c8691c", "#3d8b40", "#c2529b", "#2a8fa0", "#d1495b", "#9467bd")

_EPS = ("bfloat16", "float16")
"""Formats whose relative spacing is drawn, as Figure 5 of arXiv 2406.04267 does for bfloat16."""

_FAINT = 0.16
"""Opacity of bands: several lie on top of each other."""

_UNRELATED, _FLOOR, _CONTROL = "#9467bd", "#b07d12", "#d1495b"


def curves(curve: "CollapseCurve", most: int | None = None) -> "go.Figure":
    """Relative distance of one family by length, log-log, with what it has to be compared with.

    A thin line a layer, the last entry bold, and the range over the last layer's heads behind it;
    dotted, the family's control; dashed, unrelated prompts, the numeric floor, and the eps of
    half-precision formats, the spacing of their numbers relative to a number just above one.

    Args:
        curve: What to show.
        most: Lengths shown at most; all by default.
    """
    import plotly.graph_objects as go

    at = shown(curve.lengths, most)
    lengths = [curve.lengths[i] for i in at]
    figure = go.Figure()
    heads = curve.heads.get("relative")
    if heads is not None and len(heads):
        low, high = (getattr(heads[:, at], end)(dim=0) for end in ("amin", "amax"))
        _band(figure, lengths, low, high, GREY, "heads of the last layer, least to most")
    for label, colour, values in zip(
        curve.layer_labels, _depths(len(curve.layer_labels)), curve.relative[:, at], strict=True
    ):
        last = label == curve.layer_labels[-1]
        _line(
            figure,
            lengths,
            values,
            plain(label),
            {"color": GREY if last else colour, "width": 4 if last else 1.2},
            markers=last and len(at) <= 40,
            showlegend=last,
        )
    if curve.control is not None:
        dotted = {"color": _CONTROL, "width": 2.5, "dash": "dot"}
        _line(figure, lengths, curve.control[-1, at], f"control, {curve.control_name}", dotted)
    return _against_references(figure, lengths, [curve])


def families(found: "Sequence[CollapseCurve]", most: int | None = None) -> "go.Figure":
    """Relative distance of every family by length, log-log, against the same references.

    Bold is the last entry of the layer axis, the band its last layer's heads.

    Args:
        found: One curve a family.
        most: Lengths shown at most; all by default.

    Raises:
        UsageError: there are none.
    """
    import plotly.graph_objects as go

    if not found:
        raise UsageError("no family was measured")
    figure, longest = go.Figure(), max(found, key=lambda curve: len(curve.lengths))
    for index, curve in enumerate(found):
        colour = FAMILY_COLOURS[index % len(FAMILY_COLOURS)]
        at = shown(curve.lengths, most)
        lengths = [curve.lengths[i] for i in at]
        name = plain(curve.family)
        heads = curve.heads.get("relative")
        if heads is not None and len(heads):
            low, high = (getattr(heads[:, at], end)(dim=0) for end in ("amin", "amax"))
            _band(figure, lengths, low, high, colour, name, hidden=True)
        line = {"color": colour, "width": 3}
        _line(figure, lengths, curve.relative[-1, at], name, line, markers=len(at) <= 40)
        if curve.control is not None:
            dotted = {"color": colour, "width": 1.8, "dash": "dot"}
            words = f"{name}, control {plain(curve.control_name)}"
            _line(figure, lengths, curve.control[-1, at], words, dotted, group=name)
    lengths = [longest.lengths[i] for i in shown(longest.lengths, most)]
    return _against_references(figure, lengths, found)


def layers(curve: "CollapseCurve", most: int | None = None) -> "go.Figure":
    """Relative distance by layer and length; colour is its base-10 logarithm, blank exactly zero.

    Args:
        curve: What to show.
        most: Lengths shown at most; all by default.
    """
    import plotly.graph_objects as go

    at = shown(curve.lengths, most)
    values = curve.relative[:, at].double()
    count = len(curve.layer_labels)
    figure = go.Figure(
        go.Heatmap(
            z=rows(values.where(values > 0, torch.nan).log10()),
            customdata=rows(values),
            x=[str(curve.lengths[i]) for i in at],
            y=[plain(label) for label in curve.layer_labels],
            colorscale=NORM,
            colorbar={"title": "log10 distance", "thickness": 12},
            hovertemplate="%{y}, n=%{x}: %{customdata:.3g}<extra></extra>",
        )
    )
    figure.update_xaxes(title={"text": "n", "standoff": 8}, type="category", nticks=20)
    # The last entry is named whatever the step, because it need not be one of the blocks.
    named = [*range(0, count - step(count), step(count)), count - 1]
    figure.update_yaxes(tickvals=[plain(curve.layer_labels[i]) for i in named])
    return dress(figure, height=160 + 11 * max(count, 14))


def formats(curve: "CollapseCurve", most: int | None = None) -> "go.Figure":
    """Share of the final coordinates that are the same number in a format, by length.

    Solid is what was seen, dotted what the format's spacing predicts from the distance.

    Args:
        curve: What to show.
        most: Lengths shown at most; all by default.

    Raises:
        UsageError: this curve was read in no format.
    """
    import plotly.graph_objects as go

    if curve.identical is None or curve.expected is None or not curve.formats:
        raise UsageError("this curve was not read in any number format")
    at = shown(curve.lengths, most)
    lengths, figure = [curve.lengths[i] for i in at], go.Figure()
    for name, seen, predicted in zip(curve.formats, curve.identical, curve.expected, strict=True):
        label = plain(name)
        for values, dash, words in (
            (seen, "solid", label),
            (predicted, "dot", f"{label}, predicted"),
        ):
            line = {"color": FORMAT_COLOURS.get(name, GREY), "width": 2, "dash": dash}
            solid = dash == "solid"
            _line(
                figure,
                lengths,
                values[at],
                words,
                line,
                markers=solid and len(at) <= 40,
                group=label,
                showlegend=solid,
                logarithmic=False,
            )
    _ticks(figure, lengths)
    figure.update_xaxes(title={"text": "n", "standoff": 8})
    figure.update_yaxes(
        title_text="coordinates that coincide", tickformat=".0%", range=[-0.03, 1.03]
    )
    return dress(figure, height=420)


def ladder(frame: "pd.DataFrame", most: int | None = None) -> "go.Figure":
    """Share of coordinates that coincide, by length: a panel a place, a line a format.

    Args:
        frame: The table of a :class:`~eyechart.results.PrecisionLadder`.
        most: Lengths shown at most; all by default.
    """
    from plotly.subplots import make_subplots

    places = list(dict.fromkeys(frame["place"]))
    figure = make_subplots(
        cols=max(len(places), 1),
        shared_yaxes=True,
        horizontal_spacing=0.025,
        subplot_titles=[plain(place) for place in places],
    )
    named: set[str] = set()
    lengths: list[int] = []
    for name, place in dict.fromkeys(zip(frame["format"], frame["place"], strict=True)):
        part = frame[(frame["format"] == name) & (frame["place"] == place)]
        part = part.iloc[shown(part["length"].tolist(), most)]
        lengths = part["length"].tolist()
        label = plain(name)
        _line(
            figure,
            lengths,
            torch.tensor(part["identical"].tolist(), dtype=torch.float64),
            label,
            {"color": FORMAT_COLOURS.get(name, GREY), "width": 2},
            group=label,
            showlegend=label not in named,
            logarithmic=False,
            place={"row": 1, "col": places.index(place) + 1},
        )
        named.add(label)
    _ticks(figure, lengths, fit=5)
    figure.update_xaxes(title={"text": "n", "standoff": 8})
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03])
    figure.update_yaxes(title_text="coordinates that coincide", row=1, col=1)
    return dress(figure, height=400)


def shown(lengths: Sequence[int], most: int | None = None) -> list[int]:
    """Indices of the lengths that are drawn: all, or so many evenly over log n, ends included."""
    count = len(lengths)
    if most is None or count <= most:
        return list(range(count))
    wanted = torch.logspace(
        math.log10(lengths[0]), math.log10(lengths[-1]), most, dtype=torch.float64
    )
    nearest = torch.bucketize(wanted, torch.tensor(lengths, dtype=torch.float64))
    return sorted({0, count - 1, *(min(index, count - 1) for index in nearest.tolist())})


def _line(
    figure: "go.Figure",
    lengths: Sequence[int],
    values: Float[Tensor, " length"],
    name: str,
    line: dict[str, Any],
    *,
    markers: bool = False,
    group: str | None = None,
    showlegend: bool = True,
    logarithmic: bool = True,
    place: dict[str, int] | None = None,
) -> None:
    # Exactly zero has no place on a logarithmic axis: leave a gap.
    values = values.double()
    kept = values.where(values > 0, torch.nan) if logarithmic else values
    figure.add_scatter(
        x=list(lengths),
        y=rows(kept[None])[0],
        name=name,
        legendgroup=group or name,
        showlegend=showlegend,
        mode="lines+markers" if markers else "lines",
        marker={"size": 5},
        line=line,
        hovertemplate=f"{name}, n=%{{x}}: %{{y:.3g}}<extra></extra>",
        **(place or {}),
    )


def _band(
    figure: "go.Figure",
    lengths: Sequence[int],
    low: Float[Tensor, " length"],
    high: Float[Tensor, " length"],
    colour: str,
    name: str,
    *,
    hidden: bool = False,
) -> None:
    """The range between two curves, faint; where the lower is zero it ends."""
    both = [
        (n, a, b)
        for n, a, b in zip(lengths, *rows(torch.stack([low, high]).double()), strict=True)
        if a and b and a > 0
    ]
    if not both:
        return
    along, below, above = zip(*both, strict=True)
    channels = ",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    figure.add_scatter(
        x=[*along, *along[::-1]],
        y=[*above, *below[::-1]],
        fill="toself",
        fillcolor=f"rgba({channels},{_FAINT if not hidden else _FAINT / 2})",
        line={"width": 0},
        mode="lines",
        name=name,
        legendgroup=name,
        showlegend=not hidden,
        hoverinfo="skip",
    )


def _against_references(
    figure: "go.Figure", lengths: Sequence[int], found: "Sequence[CollapseCurve]"
) -> "go.Figure":
    """Add what curves are compared with, and lay the figure out so that they are legible.

    The axis begins below the lowest curve and half precision. A floor decades further down would
    press all others flat: then its line needs a double click, and the legend has its value.
    """
    traces: Any = figure.data
    drawn = [value for trace in traces for value in trace.y if value]
    across = []
    unrelated = [float(curve.unrelated["relative"][-1]) for curve in found if curve.unrelated]
    if unrelated:
        across.append(("unrelated prompts", max(unrelated), _UNRELATED, "dash"))
    for name in _EPS:
        eps = torch.finfo(getattr(torch, name)).eps
        words = f"{name} eps, 2<sup>{round(math.log2(eps))}</sup>"
        across.append((words, eps, FORMAT_COLOURS[name], "longdashdot"))
    lowest = math.log10(min([*drawn, *(value for _, value, _, _ in across)])) - 0.25
    highest = math.log10(max([*drawn, *(value for _, value, _, _ in across)])) + 0.15
    floor = max(curve.floor() for curve in found)
    if floor > 0:
        below = ", below the picture" if math.log10(floor) < lowest else ""
        across.append((f"numeric floor, {floor:.1e}{below}", floor, _FLOOR, "dash"))
    ends = [lengths[0], lengths[-1]]
    for name, value, colour, dash in across:
        figure.add_scatter(
            x=ends,
            y=[value, value],
            name=name,
            # One length is a point, and a point has no dashes.
            mode="lines" if ends[0] < ends[1] else "markers",
            marker={"color": colour},
            line={"color": colour, "width": 1.6, "dash": dash},
            hovertemplate=f"{name}: %{{y:.3g}}<extra></extra>",
        )
    _ticks(figure, lengths)
    figure.update_xaxes(title={"text": "n", "standoff": 8})
    figure.update_yaxes(
        title_text="relative L1 distance",
        type="log",
        exponentformat="power",
        dtick=1,
        range=[lowest, highest],
    )
    dress(figure, height=520)
    figure.update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, margin={"t": 60}
    )
    return figure


def _ticks(figure: "go.Figure", lengths: Sequence[int], fit: int = 12) -> None:
    """The measured lengths are the natural ticks of a logarithmic axis, as long as they fit."""
    few = list(lengths) if len(lengths) <= fit else None
    figure.update_xaxes(type="log", tickvals=few, dtick=None if few else 1)


def _depths(count: int) -> list[str]:
    """A colour a layer; only the middle of the scale: its ends vanish on a dark or white page."""
    from plotly.colors import sample_colorscale

    places = [0.3 + 0.55 * i / max(count - 1, 1) for i in range(count)]
    return list(map(str, sample_colorscale(DEPTH, places)))
