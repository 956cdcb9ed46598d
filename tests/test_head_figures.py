"""Figures of a census: what is drawn is the result's numbers, and anybody can tell it apart."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from censuses import GRID, VERDICTS, made_up_census

from eyechart.errors import UsageError
from eyechart.results import KINDS, head_figures
from eyechart.results.figures import GREY
from eyechart.results.head_figures import COLOURS, SYMBOLS

# Plotly's types do not know what its figures hold.
costs: Any = head_figures.costs
rotary_bands: Any = head_figures.rotary_bands
together: Any = head_figures.together
domains: Any = head_figures.domains

HOSTILE = "<b onclick=x>%{x}"
WHITE, DARK = "#ffffff", "#181e26"

# Linear RGB as people with each kind of colour blindness see it (Machado et al. 2009).
SIGHT = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    t = TO_XYZ @ rgb / TO_XYZ.sum(axis=1)
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def named(figure, name):
    (found,) = (trace for trace in figure.data if trace.name == name)
    return found


def cells(trace):
    return {
        (layer, head)
        for layer, row in enumerate(trace.z)
        for head, z in enumerate(row)
        if z is not None
    }


def dot(figure, head) -> Any:
    """The one mark of a head, as (x, y, customdata, kind)."""
    (found,) = (
        (trace.x[i], trace.y[i], trace.customdata[i] if trace.customdata else None, trace.name)
        for trace in figure.data
        for i, text in enumerate(trace.text or ())
        if text == head
    )
    return found


def test_the_map_colours_every_head_by_its_kind_and_marks_what_does_nothing():
    figure: Any = made_up_census().plot()
    wanted: dict[str, set] = {}
    for layer, row in enumerate(GRID):
        for head, name in enumerate(row):
            if name is not None:
                wanted.setdefault(KINDS.get(name, "mixed"), set()).add((layer, head))
    drawn = {trace.name: trace for trace in figure.data if trace.type == "heatmap"}
    assert {kind: cells(trace) for kind, trace in drawn.items()} == wanted
    for kind, trace in drawn.items():
        assert {colour for _, colour in trace.colorscale} == {COLOURS[kind]} and trace.showlegend
        for layer, head in cells(trace):
            said = trace.customdata[layer][head]
            assert said.removeprefix("it ") == VERDICTS[layer][head]
    for verdict in ("no-op", "active"):
        marks = named(figure, verdict)
        assert set(zip(marks.y, marks.x, strict=True)) == {
            (layer, head)
            for layer, row in enumerate(VERDICTS)
            for head, found in enumerate(row)
            if found == verdict
        }
    assert named(figure, "no-op").marker.symbol != named(figure, "active").marker.symbol
    assert tuple(figure.layout.yaxis.range) == (-0.5, 3.5)  # the layer without attention has a row


@pytest.mark.parametrize("sight", SIGHT)
def test_kinds_are_told_apart_by_every_eye(sight):
    seen = {
        kind: lab((np.array(SIGHT[sight]) @ linear(colour)).clip(0, 1))
        for kind, colour in COLOURS.items()
    }
    for (one, a), (other, b) in itertools.combinations(seen.items(), 2):
        assert np.linalg.norm(a - b) > 15, (one, other)
    assert len(set(SYMBOLS.values())) == len(SYMBOLS) == len(KINDS) + 1


@pytest.mark.parametrize("page", [WHITE, DARK])
def test_the_outline_of_a_mark_stands_out_from_either_page(page):
    light = [float(TO_XYZ[1] @ linear(colour)) for colour in (page, GREY)]
    assert (max(light) + 0.05) / (min(light) + 0.05) >= 3
    for trace in costs(made_up_census()).data:
        if trace.mode == "markers":
            assert trace.marker.line.color == GREY and trace.marker.line.width >= 1


def test_costs_are_those_of_zeroing_and_of_the_cheapest():
    figure = costs(made_up_census())
    x, y, said, kind = dot(figure, "L1H1")
    assert (x, y) == pytest.approx((0.05, 0.004)) and kind == "diagonal"
    assert list(said) == ["0.05", "0.004", "identity", "0.0032", "0.0048"]
    x, y, said, _ = dot(figure, "L1H0")
    assert x == y == pytest.approx(0.3) and said[2] == "zero"
    names = {text for trace in figure.data for text in trace.text or ()}
    assert len(names) == 9 and not any(name.startswith("L2") for name in names)
    line = named(figure, "budget, 0.01 nats")
    assert line.y[:2] == (0.01, 0.01) and line.x[3:] == (0.01, 0.01)
    diagonal = named(figure, "zeroing is the cheapest")
    assert diagonal.x == diagonal.y
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")


def test_what_costs_nothing_is_drawn_at_the_edge_and_told_as_it_is():
    x, y, said, _ = dot(costs(made_up_census()), "L3H2")
    assert (x, y) == pytest.approx((1e-3, 1e-5)) and said[1:3] == ["0", "first"]
    census = made_up_census()
    rough = dataclasses.replace(census, trials=dataclasses.replace(census.trials, floor=2e-3))
    x, y, said, _ = dot(costs(rough), "L3H2")  # not below what rounding makes
    assert (x, y) == pytest.approx((2e-3, 2e-3)) and said[:2] == ["0.001", "0"]
    low, high = costs(rough).layout.yaxis.range
    assert 10**low < 2e-3 and 10**high > 0.4


def test_heads_that_were_not_tried_have_no_place_among_the_costs():
    census = made_up_census()
    trials = census.trials
    parts = {
        name: {key: value.clone() for key, value in getattr(trials, name).items()}
        for name in ("kl", "low", "high", "loss")
    }
    for values in parts.values():
        for value in values.values():
            value[..., 3, :] = torch.nan
    figure = costs(dataclasses.replace(census, trials=dataclasses.replace(trials, **parts)))
    names = {text for trace in figure.data for text in trace.text or ()}
    assert names == {"L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"}
    assert {"sink", "induction"}.isdisjoint(trace.name for trace in figure.data)


def test_bands_are_means_over_heads_with_the_fastest_on_top():
    census = made_up_census()
    assert census.rotary is not None
    figure = rotary_bands(census)
    queries, keys = (trace for trace in figure.data if trace.type == "heatmap")
    for trace, norm in ((queries, census.rotary.q_norm), (keys, census.rotary.k_norm)):
        for band in range(4):
            for layer in (0, 1, 3):
                wanted = float(norm[layer, :, band].mean())
                assert trace.z[band][layer] == pytest.approx(wanted, rel=1e-2)
            assert trace.z[band][2] is None
    assert queries.colorscale == keys.colorscale
    assert (queries.zmin, queries.zmax) == (keys.zmin, keys.zmax)
    assert keys.zmax == pytest.approx(float(census.rotary.k_norm.nanmean(dim=1).nan_to_num().max()))
    assert figure.layout.yaxis.autorange == figure.layout.yaxis2.autorange == "reversed"
    assert queries.customdata[1][0] == 0.1  # radians a token


def test_positional_heads_are_compared_with_the_bands_they_use():
    census = made_up_census()
    assert census.rotary is not None
    figure = rotary_bands(census)
    assert dot(figure, "L1H0")[:2] == pytest.approx((0.8, 0.7))  # its previous-token score
    assert dot(figure, "L1H1")[:2] == pytest.approx((0.8, 0.6))  # its diagonal score
    assert dot(figure, "L3H2")[:2] == pytest.approx((0.1, 0.01))
    pairs = [(0.8, 0.7), (0.8, 0.6), *((0.1, x) for x in (0.1, 0.2, 0.05, 0.15, 0.02, 0.03, 0.01))]
    one, other = torch.tensor(pairs).T
    titles = [note.text for note in figure.layout.annotations]
    assert f"positional heads (Spearman {spearman(one, other):.2f})" in titles
    with pytest.raises(UsageError, match="has no rotary: positions are learned"):
        rotary_bands(made_up_census(rotary=None, unavailable={"rotary": "positions are learned"}))


def spearman(one, other):
    """By hand: the correlation of ranks, equal values sharing theirs."""

    def ranks(values):
        below = (values[None] < values[:, None]).sum(dim=1)
        same = (values[None] == values[:, None]).sum(dim=1)
        return below + (same + 1) / 2

    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1])


def test_sets_are_shown_by_size_and_cost_beside_random_ones():
    figure = together(made_up_census())

    def points(name):
        trace = named(figure, name)
        return list(zip(trace.x, trace.y, strict=True))

    assert points("tried and kept") == [(2, 0.01), (3, 0.03)]
    assert points("tried, too dear") == [(4, 0.09)]
    assert points("random, as many") == [(3, 0.5), (3, 0.25)]
    assert points("random, as many as fit") == [(1, 0.05), (2, 0.05)]
    assert points("sum of its heads' costs") == [(3, 0.007)]
    (chosen,) = points("the set")
    assert chosen == (3, pytest.approx(0.03))
    error = named(figure, "the set").error_y
    assert (error.array[0], error.arrayminus[0]) == pytest.approx((0.015, 0.01))
    assert named(figure, "budget, 0.05 nats").y == (0.05, 0.05)
    with pytest.raises(UsageError, match="has no together: it was not asked for"):
        together(made_up_census(together=None))


def test_a_set_that_costs_nothing_has_a_place_on_the_logarithmic_axis():
    census = made_up_census()
    assert census.together is not None
    empty = dataclasses.replace(
        census.together, heads=(), path=((0, 0.0, True),), kl=torch.zeros(4), low=0.0, high=0.0
    )
    figure = together(dataclasses.replace(census, together=empty))
    assert all(y > 0 for trace in figure.data for y in trace.y)


def test_heads_that_change_are_shown_by_domain():
    figure = domains(made_up_census())
    (trace,) = figure.data
    assert trace.y == ("L3H0",) and trace.x == ("prose", "code")
    assert trace.z[0] == pytest.approx((0.9, 0.3))
    assert list(trace.text[0]) == ["0.90 dormant", "0.30 active"]
    assert list(trace.customdata[0]) == ["0.02", "0.02"] and (trace.zmin, trace.zmax) == (0, 1)
    with pytest.raises(UsageError, match="no head of this census"):
        domains(made_up_census(domains=("text",) * 4))


def test_only_the_widest_awake_are_shown_where_many_change():
    census = made_up_census(tiles=(1, 50))
    sink = census.names.scores["sink"]
    sink[2:, 3, 0::3] = torch.linspace(0.4, 0.1, 50)
    (trace,) = domains(census).data
    assert len(trace.y) == head_figures.FOLLOWING < 50
    assert trace.y[0] == "L3H147" and trace.y[1] == "L3H144"


def test_domains_are_text_and_not_markup():
    figure = domains(made_up_census(domains=(HOSTILE, HOSTILE, "other language", "x\x00y")))
    assert figure.data[0].x == ("&lt;b onclick=x&gt;%{x}", "other language", "x\\x00y")
    assert "<b" not in figure.to_json()


def test_a_domain_may_have_one_text():
    census = made_up_census(domains=("a", "b", "c", "d"))
    assert domains(census).data[0].x == ("a", "b", "c", "d")
