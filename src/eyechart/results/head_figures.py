"""Figures of the census of heads: kinds, costs, frequencies, the set that can go, domains."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.results.base import head_name
from eyechart.results.figures import GREY, MASS, NORM, dress, plain, rows, step, visible
from eyechart.results.head_names import KINDS, MIXED

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from eyechart.results.heads import HeadCensus

# Told apart by every common kind of colour vision, to which tests hold them; the symbols say the
# same without colour.
_STYLES = {
    "induction": ("#d55e00", "star"),
    "duplicate": ("#882255", "x"),
    "diagonal": ("#f0e442", "diamond"),
    "previous": ("#009e73", "triangle-left"),
    "sink": ("#0072b2", "triangle-down"),
    "local": ("#56b4e9", "square"),
    "uniform": ("#e69f00", "cross"),
}
COLOURS = {KINDS[name]: colour for name, (colour, _) in _STYLES.items()} | {MIXED: GREY}
SYMBOLS = {KINDS[name]: symbol for name, (_, symbol) in _STYLES.items()} | {MIXED: "circle"}

VERDICTS = {"no-op": "no-op", "active": "active", "depends": "it depends", "": "not tried"}
"""What the verdicts are called where a person points at a head."""

_INK, _PAPER = "#10141a", "#ffffff"
_MARKS = {"no-op": ("circle", _PAPER), "active": ("diamond-tall", _INK)}

_BELOW = 1000
"""Costs below the budget by this factor are drawn at the edge: how far below says nothing more."""

FOLLOWING = 40
"""Heads in the figure of domains at most: the widest awake."""


def census_map(kinds: Sequence[Sequence[str]], verdicts: Sequence[Sequence[str]]) -> "go.Figure":
    """Layer by head, coloured by kind; a white dot on no-ops, a black mark on active heads.

    Args:
        kinds: Of each head by layer; "" where there is no attention.
        verdicts: The same way.
    """
    import plotly.graph_objects as go

    figure, layers, heads = go.Figure(), len(kinds), max(map(len, kinds))
    for kind, colour in COLOURS.items():
        if not any(kind in row for row in kinds):
            continue
        # A trace of its own for each kind puts it into the legend, where a click hides it.
        figure.add_heatmap(
            z=[[0 if found == kind else None for found in row] for row in kinds],
            customdata=[
                [VERDICTS[v] if found == kind else None for found, v in zip(*both, strict=True)]
                for both in zip(kinds, verdicts, strict=True)
            ],
            name=kind,
            colorscale=[[0, colour], [1, colour]],
            showscale=False,
            showlegend=True,
            xgap=1,
            ygap=1,
            hovertemplate=f"L%{{y}}H%{{x}}: {kind}, %{{customdata}}<extra></extra>",
        )
    for verdict, (symbol, colour) in _MARKS.items():
        at = [
            (layer, head)
            for layer, row in enumerate(verdicts)
            for head, found in enumerate(row)
            if found == verdict
        ]
        figure.add_scatter(
            x=[head for _, head in at],
            y=[layer for layer, _ in at],
            name=VERDICTS[verdict],
            mode="markers",
            marker={
                "symbol": symbol,
                "size": 9 if heads <= 40 else 5,
                "color": colour,
                "line": {"color": _INK if colour == _PAPER else _PAPER, "width": 1},
            },
            hoverinfo="skip",  # the cell below says it
        )
    figure.update_xaxes(title_text="head", dtick=step(heads), range=[-0.5, heads - 0.5])
    figure.update_yaxes(title_text="layer", dtick=step(layers), range=[-0.5, layers - 0.5])
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    return _legend_on_top(dress(figure, height=200 + 13 * max(layers, 12)))


def costs(census: "HeadCensus") -> "go.Figure":
    """What zeroing a head costs against what its cheapest replacement costs; one dot a head.

    Logarithmic. On the diagonal nothing is cheaper than zeroing. A cost below the thousandth part
    of the budget, or below what rounding alone makes, is drawn there; pointing at it tells it.
    """
    import plotly.graph_objects as go

    trials, budget = census.trials, census.budget
    zero, (names, least) = trials.cost("zero"), trials.cheapest()
    floor = max(trials.floor, budget / _BELOW)
    figure, seen = go.Figure(), [budget]
    for kind, heads in _by_kind(census.names.kinds()).items():
        tried = [at for at in heads if names[at[0]][at[1]]]
        if not tried:
            continue
        drawn = [
            rows(torch.tensor([[float(of[at]) for at in tried]]).clamp(min=floor))[0]
            for of in (zero, least)
        ]
        seen += [x for x in drawn[0] if x is not None]
        ends = [
            (float(trials.low[names[l][h]][l, h]), float(trials.high[names[l][h]][l, h]))
            for l, h in tried
        ]
        figure.add_scatter(
            x=drawn[0],
            y=drawn[1],
            text=[head_name(*at) for at in tried],
            customdata=[
                [_short(zero[at]), _short(least[at]), names[at[0]][at[1]], *map(_short, end)]
                for at, end in zip(tried, ends, strict=True)
            ],
            hovertemplate="%{text}: zeroed %{customdata[0]}, by %{customdata[2]} %{customdata[1]} "
            f"(%{{customdata[3]}} to %{{customdata[4]}}) nats<extra>{kind}</extra>",
            **_dots(kind),
        )
    low, high = floor, max(seen) * 1.5
    left = min(seen) / 1.5
    cross = [left, high, None, budget, budget], [budget, budget, None, low, high]
    for name, (x, y), dash in (
        (f"budget, {budget:g} nats", cross, "dash"),
        ("zeroing is the cheapest", [[max(left, low), high]] * 2, "dot"),
    ):
        figure.add_scatter(
            x=x,
            y=y,
            name=name,
            mode="lines",
            line={"color": GREY, "width": 1.2, "dash": dash},
            hoverinfo="skip",
        )
    figure.update_xaxes(title_text="KL when zeroed, nats", range=_log_range(left, high))
    figure.update_yaxes(title_text="KL of its cheapest replacement", range=_log_range(low, high))
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(type="log", exponentformat="power", dtick=1)
    return _legend_on_top(dress(figure, height=480))


def rotary_bands(census: "HeadCensus") -> "go.Figure":
    """Length of queries and keys by frequency and layer, and whether positional heads are fast.

    The first two panels are Fig. 3 of Barbero et al., arXiv 2410.06205, as means over heads. The
    third has one dot a head: the share of its queries' energy in the fastest quarter of the bands,
    against the larger of its diagonal and previous-token scores.

    Raises:
        UsageError: the model has no rotary frequencies, or they could not be seen.
    """
    from plotly.subplots import make_subplots

    use = census.rotary
    if use is None:
        raise UsageError(_missing(census, "rotary"))
    positional = torch.maximum(census.names.score("diagonal"), census.names.score("previous"))
    figure = make_subplots(
        cols=3,
        column_widths=[0.33, 0.33, 0.34],
        horizontal_spacing=0.1,
        subplot_titles=[
            "queries, mean length",
            "keys, mean length",
            f"positional heads (Spearman {use.agreement(positional):.2f})",
        ],
    )
    panels = [norm.nanmean(dim=1).T for norm in (use.q_norm, use.k_norm)]
    longest = max(float(panel.nan_to_num().max()) for panel in panels)
    angles = rows(use.angle.T, digits=3)
    right = next(figure.select_xaxes(row=1, col=2)).domain[1]
    for column, panel in enumerate(panels, start=1):
        figure.add_heatmap(
            z=rows(panel, digits=3),
            customdata=angles,
            zmin=0,
            zmax=longest,
            colorscale=NORM,
            showscale=column == 2,
            colorbar={"thickness": 12, "x": right + 0.005},
            hovertemplate="layer %{x}, band %{y}, %{customdata} radians a token: %{z}"
            "<extra></extra>",
            row=1,
            col=column,
        )
    layers, bands = use.angle.shape
    for column in (1, 2):
        figure.update_xaxes(title_text="layer", dtick=step(layers), row=1, col=column)
        figure.update_yaxes(dtick=step(bands), autorange="reversed", row=1, col=column)
    figure.update_yaxes(title_text="band, the fastest on top", row=1, col=1)
    for kind, heads in _by_kind(census.names.kinds()).items():
        turned = [at for at in heads if not bool(use.q_high[at].isnan())]
        figure.add_scatter(
            x=[_rounded(positional[at]) for at in turned],
            y=[_rounded(use.q_high[at]) for at in turned],
            text=[head_name(*at) for at in turned],
            hovertemplate=f"%{{text}}: %{{x:.3f}}, %{{y:.3f}}<extra>{kind}</extra>",
            row=1,
            col=3,
            **_dots(kind),
        )
    figure.update_xaxes(title_text="diagonal or previous-token score", row=1, col=3)
    figure.update_yaxes(title_text="share of the fastest quarter", rangemode="tozero", row=1, col=3)
    figure.add_hline(y=0.25, line={"color": GREY, "width": 1.2, "dash": "dash"}, row=1, col=3)  # pyright: ignore[reportArgumentType]
    dress(figure, height=460)
    figure.update_layout(legend={"orientation": "h", "x": 1, "xanchor": "right", "y": -0.2})
    return figure


def together(census: "HeadCensus") -> "go.Figure":
    """Sets of heads replaced at once: their size against what they cost, beside random ones.

    Raises:
        UsageError: no set was looked for.
    """
    import plotly.graph_objects as go

    found = census.together
    if found is None:
        raise UsageError(_missing(census, "together"))
    size, kl = len(found.heads), float(found.kl.mean())
    floor = found.budget / _BELOW
    figure = go.Figure()
    sizes = [size, *found.random_sizes, *(tried for tried, *_ in found.path)]
    figure.add_scatter(
        x=[0, max(sizes) * 1.05],
        y=[found.budget] * 2,
        name=f"budget, {found.budget:g} nats",
        mode="lines",
        line={"color": GREY, "width": 1.2, "dash": "dash"},
        hoverinfo="skip",
    )
    tried = {kept: [at[:2] for at in found.path if at[2] == kept] for kept in (True, False)}
    for name, points, symbol, colour in (
        ("tried, too dear", tried[False], "circle-open", GREY),
        ("tried and kept", tried[True], "circle", COLOURS["sink"]),
        ("random, as many", [(size, kl) for kl in found.random_kl], "x", COLOURS["induction"]),
        (
            "random, as many as fit",
            [(n, found.budget) for n in found.random_sizes],
            "x-open",
            COLOURS["induction"],
        ),
        ("sum of its heads' costs", [(size, found.apart)], "diamond", COLOURS["uniform"]),
    ):
        figure.add_scatter(
            x=[n for n, _ in points],
            y=[_rounded(max(kl, floor)) for _, kl in points],
            name=name,
            mode="markers",
            marker={"symbol": symbol, "size": 9, "color": colour, "line": {"width": 1.5}},
            hovertemplate="%{x} heads: %{y:.3g} nats<extra>" + name + "</extra>",
        )
    figure.add_scatter(
        x=[size],
        y=[_rounded(max(kl, floor))],
        error_y={
            "array": [_rounded(max(found.high - kl, 0))],
            "arrayminus": [_rounded(max(kl - max(found.low, floor), 0))],
            "color": GREY,
        },
        name="the set",
        mode="markers",
        marker={
            "symbol": "star",
            "size": 15,
            "color": COLOURS["previous-token"],
            "line": {"color": GREY, "width": 1},
        },
        hovertemplate="%{x} heads: %{y:.3g} nats<extra>the set</extra>",
    )
    figure.update_xaxes(title_text="heads replaced at once", rangemode="tozero")
    figure.update_yaxes(title_text="KL, nats")
    shown = [m * 10.0**e for e in range(-7, 2) for m in (1, 2, 5)]
    figure.update_yaxes(type="log", tickvals=shown, ticktext=[f"{tick:g}" for tick in shown])
    return _legend_on_top(dress(figure, height=440))


def domains(census: "HeadCensus") -> "go.Figure":
    """Mass on the first token by domain, of the heads that sleep on one and work on another.

    The widest awake on top, at most :data:`FOLLOWING`.

    Raises:
        UsageError: no head changes so with the domain.
    """
    import plotly.graph_objects as go

    changing = census.changing()[:FOLLOWING]
    if not len(changing):
        raise UsageError("no head of this census sleeps on one domain and works on another")
    found = census.domains().set_index(["layer", "head", "domain"])
    order = list(dict.fromkeys(census.names.domains))
    heads = list(zip(changing["layer"].tolist(), changing["head"].tolist(), strict=True))
    cells: list[list[dict[str, Any]]] = [
        [{str(k): v for k, v in found.loc[(*at, domain)].items()} for domain in order]
        for at in heads
    ]
    figure = go.Figure(
        go.Heatmap(
            z=[[_rounded(cell["sink"]) for cell in row] for row in cells],
            x=[words(domain) for domain in order],
            y=[head_name(*at) for at in heads],
            text=[[f"{cell['sink']:.2f} {cell['status']}" for cell in row] for row in cells],
            customdata=[[_short(cell["kl_zero"]) for cell in row] for row in cells],
            texttemplate="%{text}",
            zmin=0,
            zmax=1,
            colorscale=MASS,
            colorbar={"title": "mass", "thickness": 12},
            xgap=1,
            ygap=1,
            hovertemplate="%{y}, %{x}: %{text}; zeroed there, KL %{customdata}<extra></extra>",
        )
    )
    figure.update_xaxes(type="category", side="top", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return dress(figure, height=110 + 21 * max(len(heads), 4))


def words(name: str) -> str:
    """What a person called something, as Plotly shows it unchanged; control characters escaped."""
    return plain(" ".join(visible(word) for word in name.split(" ")))


def _by_kind(kinds: Sequence[Sequence[str]]) -> dict[str, list[tuple[int, int]]]:
    """Heads of each kind that there is; the most frequent, which has no name, below the others."""
    found: dict[str, list[tuple[int, int]]] = {kind: [] for kind in (MIXED, *COLOURS)}
    for layer, row in enumerate(kinds):
        for head, kind in enumerate(row):
            if kind:
                found[kind].append((layer, head))
    return {kind: heads for kind, heads in found.items() if heads}


def _dots(kind: str) -> dict[str, Any]:
    """How the heads of a kind are drawn as dots; the outline is what stands out from any page."""
    return {
        "name": kind,
        "mode": "markers",
        "marker": {
            "symbol": SYMBOLS[kind],
            "size": 6 if kind == MIXED else 9,
            "color": COLOURS[kind],
            "line": {"color": GREY, "width": 1},
        },
    }


def _missing(census: "HeadCensus", part: str) -> str:
    return f"this census has no {part}: {census.unavailable.get(part, 'it was not asked for')}"


def _rounded(value: float | Tensor) -> float | None:
    """Four digits; None where there is no value."""
    return rows(torch.tensor([[float(value)]]))[0][0]


def _short(value: float | Float[Tensor, ""]) -> str:
    number = float(value)
    return "–" if math.isnan(number) else f"{number:.2g}"


def _log_range(low: float, high: float) -> list[float]:
    return [math.log10(low) - 0.05, math.log10(high)]


def _legend_on_top(figure: "go.Figure") -> "go.Figure":
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, margin={"t": 60}
    )
    return figure
