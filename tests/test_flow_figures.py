"""Figures of an information flow: the numbers in them are the result's, the labels its tokens."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from flows import LABELS, made_up_flow

from eyechart.errors import UsageError
from eyechart.results import CHEAP, TRUTHS, flow_figures
from eyechart.results.flow_figures import COLOURS, NAMES

# Plotly's types do not know what its figures hold.
by_position: Any = flow_figures.by_position
rollout_map: Any = flow_figures.rollout_map
spread_map: Any = flow_figures.spread_map
topology: Any = flow_figures.topology
sink_profile: Any = flow_figures.sink_profile

HOSTILE = "<b onclick=x>"


def named(figure, name):
    (found,) = (trace for trace in figure.data if trace.name == name)
    return found


def panel(figure, column, dash="solid"):
    """Traces of one of the panels that stand side by side."""
    axis = "x" if column == 1 else f"x{column}"
    return {
        trace.name: trace
        for trace in figure.data
        if (trace.xaxis or "x") == axis and trace.line.dash == dash
    }


@pytest.mark.parametrize("name", [*CHEAP, *TRUTHS])
def test_curves_are_shares_of_their_sum_up_to_the_chosen_token(name):
    flow = made_up_flow(query=torch.tensor([5]))
    values = flow.by_position(name)[0, :6]
    curve = named(by_position(flow), NAMES[name])
    assert list(curve.y) == pytest.approx((values / values.sum()).tolist(), rel=1e-3)
    assert [tick.split(" ", 1)[0] for tick in curve.x] == [str(i) for i in range(6)]
    assert (curve.line.width > 2) == (name in TRUTHS)


def test_zero_is_a_gap_and_a_token_that_was_not_replaced_is_passed_over():
    kl = torch.tensor([[0.5, torch.nan, 0.0, 0.3, torch.nan, 0.1, -1e-9, 0.3]])
    figure = by_position(made_up_flow(replacement_kl=kl))
    curve = named(figure, NAMES["replacement_kl"])
    assert [tick.split(" ", 1)[0] for tick in curve.x] == ["0", "2", "3", "5", "6", "7"]
    assert [y is None for y in curve.y] == [False, True, False, False, True, False]
    assert curve.y[0] == pytest.approx(0.5 / 1.2, rel=1e-3)
    assert "markers" in curve.mode  # the last one alone would have no line
    # The axis is in the order of the text all the same.
    assert [tick.split(" ", 1)[0] for tick in figure.layout.xaxis.categoryarray] == list("01234567")


def test_the_axis_ends_two_decades_below_the_truths():
    deep = torch.logspace(-30, 0, 8)[None]
    truths = torch.full((1, 8), 1.0)
    flow = made_up_flow(
        path_bound=deep,
        sensitivity=truths,
        sensitivity_interval=0 * truths,
        replacement_kl=truths,
        replacement_change=truths,
    )
    low, high = by_position(flow).layout.yaxis.range
    assert low == pytest.approx(math.log10(1 / 8) - 2.1, abs=0.01) and high >= 0
    only = made_up_flow(
        path_bound=deep, sensitivity=None, replacement_kl=None, replacement_change=None
    )
    assert by_position(only).layout.yaxis.range[0] < -30


def test_the_band_is_the_interval_and_exact_values_have_none():
    value = torch.tensor([[4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0]])
    half = torch.tensor([[1.0, 0.5, 3.0, 0.1, 0.1, 0.1, 0.1, 1.0]])
    figure = by_position(made_up_flow(sensitivity=value, sensitivity_interval=half))
    below, above = (trace for trace in figure.data if trace.hoverinfo == "skip")
    assert above.fill == "tonexty" and not below.fill
    assert list(above.y) == pytest.approx(((value + half) / 16)[0].tolist(), rel=1e-3)
    assert below.y[0] == pytest.approx(3 / 16, rel=1e-3)
    assert below.y[2] == pytest.approx(1 / 16, rel=1e-3)  # not below zero, which has no logarithm
    exact = by_position(made_up_flow(sensitivity_interval=torch.zeros(1, 8)))
    assert not any(trace.hoverinfo == "skip" for trace in exact.data)


def test_pictures_that_are_missing_leave_the_others():
    flow = made_up_flow(alti=None, replacement_kl=None, sensitivity=None, sensitivity_interval=None)
    names = [trace.name for trace in by_position(flow).data]
    assert names == [
        NAMES[name]
        for name in ("replacement_change", "attention", "rollout", "path_bound", "norm_rollout")
    ]


@pytest.mark.parametrize("measure", ["rollout", "norm_rollout", "alti", "attention", "through"])
def test_maps_colour_the_logarithm_and_tell_the_share(measure):
    flow = made_up_flow(query=torch.tensor([5]))
    values = getattr(flow, measure).clone()
    values[0, 1, 2] = 0
    (trace,) = rollout_map(dataclasses.replace(flow, **{measure: values}), measure).data
    assert trace.customdata[2] == pytest.approx(values[0, 2, :6].tolist(), rel=1e-2)
    assert trace.z[2] == pytest.approx(values[0, 2, :6].log10().tolist(), rel=1e-2)
    assert trace.z[1][2] is None and trace.customdata[1][2] is None
    assert len(trace.z) == 3 and len(trace.x) == 6


def test_perturbation_maps_share_their_scale_and_name_the_change():
    flow = made_up_flow()
    assert flow.spread is not None
    figure = spread_map(flow)
    left, right = figure.data
    finite = flow.spread[flow.spread > 0].log10()
    low, high = float(finite.min()) - math.log10(2), float(finite.max())
    for trace in (left, right):
        assert (trace.zmin, trace.zmax) == pytest.approx((low, high), rel=1e-2)
        assert trace.z[2][0] is None  # before the changed token nothing moves
    assert right.customdata[3][6] == pytest.approx(float(flow.spread[0, 3, 6]) / 2, rel=1e-2)
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [
        "token 2, “·lamp”, changed to “&lt;b&gt;new&lt;/b&gt;”",
        "the same, the first 1 hidden from token 3 on",
    ]
    assert len(spread_map(made_up_flow(spread_evicted=None, evicted=None)).data) == 1


def test_sink_panels_hold_the_profile():
    flow = made_up_flow()
    assert flow.sinks is not None and flow.rollout is not None and flow.sinks_other_bos is not None
    figure = sink_profile(flow)
    for column, dash, name, values in (
        (1, "solid", "rollout", flow.rollout[0, :, 0]),
        (1, "solid", "mean attention", flow.sinks.mass[0]),
        (1, "dash", "sink rate", flow.sinks_other_bos.rate),
        (2, "solid", "value", flow.sinks.value_norm[0].median(-1).values),
        (2, "dash", "residual stream", flow.sinks_other_bos.residual[0]),
        (3, "solid", "queries and other keys", flow.sinks.cosine_others[0].median(-1).values),
    ):
        curve = panel(figure, column, dash)[name]
        assert list(curve.y) == pytest.approx(values.tolist(), rel=1e-3)
        assert curve.showlegend == (dash == "solid")
    assert figure.layout.yaxis2.type == "log"
    alone = dataclasses.replace(flow.sinks, output_norm=None)
    figure = sink_profile(made_up_flow(sinks=alone, sinks_other_bos=None, rollout=None))
    assert [trace.name for trace in figure.data] == [
        *("mean attention", "sink rate", "value", "key", "residual stream"),
        *("queries and its key", "queries and other keys"),
    ]


def test_blocks_without_attention_are_gaps_in_the_sink_panels():
    flow = made_up_flow()
    assert flow.sinks is not None
    value = flow.sinks.value_norm.clone()
    value[:, 1] = torch.nan
    sinks = dataclasses.replace(flow.sinks, value_norm=value)
    curve = panel(sink_profile(made_up_flow(sinks=sinks)), 2)["value"]
    assert [y is None for y in curve.y] == [False, True, False]


def test_long_texts_lose_their_middle():
    flow = made_up_flow(tuple(f" w{i}" for i in range(40)))
    assert flow.rollout is not None and flow.spread is not None
    kept = [0, 1, 2, 37, 38, 39]
    for figure in (by_position(flow, 6), rollout_map(flow, "rollout", 6), spread_map(flow, 6)):
        ticks = list(figure.data[0].x)
        assert ticks == [*(f"{i} ·w{i}" for i in kept[:3]), "…", *(f"{i} ·w{i}" for i in kept[3:])]
    (trace,) = rollout_map(flow, "rollout", 6).data
    row = [trace.customdata[1][i] for i in (0, 1, 2, 4, 5, 6)]
    assert row == pytest.approx(flow.rollout[0, 1, kept].tolist(), rel=1e-2)
    assert trace.z[1][3] is None
    # A share stays a share of the whole, also of what is not shown.
    curve = named(by_position(flow, 6), NAMES["path_bound"])
    bound = flow.by_position("path_bound")[0]
    assert curve.y[0] == pytest.approx(float(bound[0] / bound.sum()), rel=1e-3)
    assert curve.y[3] is None


def test_labels_are_text_and_not_markup():
    flow = made_up_flow((*LABELS[:2], HOSTILE, *LABELS[3:]))
    shown = "&lt;b·onclick=x&gt;"
    for figure in (by_position(flow), rollout_map(flow), spread_map(flow)):
        assert f"2 {shown}" in figure.data[0].x
        assert "<b" not in figure.to_json()
    assert shown in spread_map(flow).layout.annotations[0].text


def test_the_result_s_own_plot_is_the_curves():
    flow = made_up_flow()
    assert flow.plot() == by_position(flow)


def test_a_missing_picture_is_an_error_with_its_reason():
    flow = made_up_flow(
        alti=None, through=None, spread=None, sinks=None, unavailable={"alti": "no such block"}
    )
    with pytest.raises(UsageError, match="no such block"):
        rollout_map(flow, "alti")
    with pytest.raises(UsageError, match="comes with the rollout"):
        rollout_map(flow, "through")
    with pytest.raises(UsageError, match="no perturbation"):
        spread_map(flow)
    with pytest.raises(UsageError, match="no sink profile"):
        sink_profile(flow)
    nothing: dict[str, Any] = dict.fromkeys((*CHEAP, *TRUTHS))
    with pytest.raises(UsageError, match="nothing by position"):
        by_position(made_up_flow(**nothing))


@pytest.mark.parametrize("page", ["#ffffff", "#181e26"])
def test_lines_stand_out_from_a_white_and_from_a_dark_page(page):
    def light(colour):
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name, colour in COLOURS.items():
        dark, bright = sorted((light(page), light(colour)))
        assert (bright + 0.05) / (dark + 0.05) >= 3, name


def test_topology_shows_paths_spectrum_and_depth():
    flow: Any = made_up_flow(query=torch.tensor([5]))
    paths, second, depth = topology(flow).data
    layers = flow.layers
    counted = [math.log10(math.comb(5 - i + layers - 1, layers - 1)) for i in range(6)]
    assert list(paths.y) == pytest.approx(counted, rel=1e-3, abs=1e-9)
    assert list(second.y) == pytest.approx(
        flow.eigenvalues[0, :, 1:6].amax(dim=-1).tolist(), rel=1e-3
    )
    assert list(depth.y) == pytest.approx(flow.hitting_depth[0].tolist(), rel=1e-3)
    with pytest.raises(UsageError, match="no topology"):
        topology(made_up_flow(eigenvalues=None))
