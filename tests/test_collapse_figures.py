"""Figures and sentences of collapse say what the result says."""

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from collapses import (
    FALLING,
    FLAT,
    FLOOR,
    LENGTHS,
    RISING,
    made_up_curve,
    made_up_rank,
    made_up_study,
)
from hypothesis import given
from hypothesis import strategies as st

from eyechart.errors import UsageError
from eyechart.precision import FORMATS
from eyechart.results import collapse_figures
from eyechart.results.collapse_figures import FAMILY_COLOURS, FORMAT_COLOURS, shown
from eyechart.results.collapse_words import (
    conclusion,
    ladder_conclusion,
    overview,
    predicted,
    rank_conclusion,
)

# Plotly's types do not know what its figures hold.
curves: Any = collapse_figures.curves
families: Any = collapse_figures.families
layers: Any = collapse_figures.layers
formats: Any = collapse_figures.formats
ladder: Any = collapse_figures.ladder


def named(figure, name):
    (found,) = (trace for trace in figure.data if trace.name == name)
    return found


def test_one_family_has_layers_heads_control_and_references():
    curve = made_up_curve(FLAT, control=FALLING)
    figure = curves(curve)
    for index, label in enumerate(curve.layer_labels):
        line = named(figure, label)
        assert list(line.x) == list(LENGTHS)
        values = curve.relative[index].tolist()
        if any(values):
            assert list(line.y) == pytest.approx(values, rel=1e-3)
        else:
            assert list(line.y) == [None] * 6  # zero has no logarithm
        assert (line.line.width == 4) == (label == "final norm")
    band = named(figure, "heads of the last layer, least to most")
    half = len(LENGTHS)
    heads = curve.heads["relative"]
    assert list(band.y[:half]) == pytest.approx(heads.amax(dim=0).tolist(), rel=1e-3)
    assert list(band.y[half:]) == pytest.approx(heads.amin(dim=0).flip(0).tolist(), rel=1e-3)
    control = named(figure, "control, n and n + 3")
    assert control.line.dash == "dot" and list(control.y) == pytest.approx(FALLING, rel=1e-3)
    assert named(figure, "unrelated prompts").y == (1.25, 1.25)
    assert named(figure, "bfloat16 eps, 2<sup>-7</sup>").y == (2**-7, 2**-7)
    assert named(figure, "float16 eps, 2<sup>-10</sup>").y == (2**-10, 2**-10)
    low, high = figure.layout.yaxis.range
    assert 10**low < 2**-10 and 10**high > heads.max()
    # Three decades further down: told, but not at the cost of what there is to see.
    floor = named(figure, "numeric floor, 1.0e-06, below the picture")
    assert floor.y[0] == pytest.approx(FLOOR) and 10**low > FLOOR


def test_a_curve_at_the_floor_is_seen_beside_it():
    figure = curves(made_up_curve([FLOOR / 2] * 6))
    assert 10 ** figure.layout.yaxis.range[0] < FLOOR / 2
    assert named(figure, "numeric floor, 1.0e-06").y[0] == pytest.approx(FLOOR)


def test_what_was_not_measured_is_not_drawn():
    bare = made_up_curve([0.0] * 6, floor=None, heads={}, formats=(), identical=None, steps=None)
    assert {trace.name for trace in curves(bare).data} == {
        *bare.layer_labels,
        "bfloat16 eps, 2<sup>-7</sup>",
        "float16 eps, 2<sup>-10</sup>",
    }
    with pytest.raises(UsageError, match="no family"):
        families([])
    with pytest.raises(UsageError, match="not read in any number format"):
        formats(bare)


def test_families_share_axes_and_references():
    study = made_up_study()
    figure: Any = study.plot()
    for curve in study.curves:
        line = next(t for t in figure.data if t.name == curve.family and t.fill != "toself")
        assert list(line.y) == pytest.approx(curve.relative[-1].tolist(), rel=1e-3)
        bands = [t for t in figure.data if t.name == curve.family and t.fill == "toself"]
        assert len(bands) == 1 and max(bands[0].y) == pytest.approx(float(curve.heads["l1"].max()))
    control = named(figure, "separated left, control n and n + 3")
    assert list(control.y) == pytest.approx(FALLING, rel=1e-3)
    assert sum(trace.name == "unrelated prompts" for trace in figure.data) == 1


def test_the_map_is_the_logarithm():
    curve = made_up_curve()
    (trace,) = layers(curve).data
    assert list(trace.y) == list(curve.layer_labels) and list(trace.x) == [str(n) for n in LENGTHS]
    assert list(trace.z[0]) == [None] * 6  # exactly zero
    assert list(trace.z[-1]) == pytest.approx([math.log10(v) for v in FALLING], abs=1e-3)
    assert list(trace.customdata[-1]) == pytest.approx(FALLING, rel=1e-3)


def test_formats_show_what_was_seen_and_what_was_predicted():
    curve: Any = made_up_curve()
    figure = formats(curve)
    for index, name in enumerate(curve.formats):
        seen, guess = named(figure, name), named(figure, f"{name}, predicted")
        assert list(seen.y) == pytest.approx(curve.identical[index].tolist(), rel=1e-3)
        assert list(guess.y) == pytest.approx(curve.expected[index].tolist(), rel=1e-3)
        assert seen.line.color == guess.line.color == FORMAT_COLOURS[name]
        assert (seen.line.dash, guess.line.dash) == ("solid", "dot")


def test_the_ladder_has_a_panel_a_place():
    made: Any = made_up_study().ladder
    figure = made.plot()
    assert [note.text for note in figure.layout.annotations] == ["final", "stream"]
    table = made.to_frame()
    for place, axis in (("final", "x"), ("stream", "x2")):
        there = {trace.name: trace for trace in figure.data if trace.xaxis == axis}
        for name, part in table[table["place"] == place].groupby("format"):
            assert list(there.pop(name).y) == pytest.approx(part["identical"].tolist(), rel=1e-3)
        assert not there
    assert len([trace for trace in figure.data if trace.showlegend]) == 3  # a format once
    for trace in figure.data:
        assert trace.line.color == FORMAT_COLOURS[trace.name]


@given(st.integers(2, 3000), st.integers(2, 60))
def test_thinned_lengths_are_few_in_order_and_keep_both_ends(count, most):
    at = shown(range(1, count + 1), most)
    assert at[0] == 0 and at[-1] == count - 1
    assert at == sorted(set(at)) and len(at) <= (most if count > most else count)


def test_a_page_of_thousands_of_lengths_is_thinned():
    many = tuple(range(1, 2001))
    curve = made_up_curve([1 / n for n in many], lengths=many)
    line = named(curves(curve, 48), "final norm")
    assert len(line.x) <= 48 and line.x[0] == 1 and line.x[-1] == 2000
    assert [n * y for n, y in zip(line.x, line.y, strict=True)] == pytest.approx(
        [1] * len(line.x), rel=1e-3
    )


def test_every_format_has_a_colour_of_its_own():
    assert set(FORMAT_COLOURS) == set(FORMATS)
    assert len(set(FORMAT_COLOURS.values())) == len(FORMAT_COLOURS)


@pytest.mark.parametrize("page", ["#ffffff", "#181e26"])
def test_colours_are_legible_on_white_and_on_dark(page):
    def light(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (*FORMAT_COLOURS.values(), *FAMILY_COLOURS):
        dark, bright = sorted((light(page), light(colour)))
        assert (bright + 0.05) / (dark + 0.05) >= 3, colour


def test_names_cannot_style_a_figure():
    curve = made_up_curve(family="<b onclick=x>", layer_labels=("<i>", "a", "b"))
    for figure in (curves(curve), families([curve]), layers(curve)):
        assert "<b onclick" not in figure.to_json() and "<i>" not in figure.to_json()


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        (
            made_up_curve(),
            "Collapse: from n = 20 on the two prompts stay less than a tenth as far apart as at "
            "n = 1 and fall about as n to the power -1.00 [-1.00, -1.00]; at n = 50 they are 0.01 "
            "apart (unrelated prompts: 1.2; arithmetic alone: 1e-06).",
        ),
        (
            made_up_curve([0.5, 0.1, 0.03, 1e-7, 1e-7, 1e-7]),
            "at n = 50 they are no further apart than arithmetic alone makes them",
        ),
        (made_up_curve(FLAT), "No collapse up to n = 50: the distance has no clear trend"),
        (made_up_curve([0.9 / n**0.3 for n in LENGTHS]), "the distance falls, but slowly"),
        (made_up_curve(RISING), "No collapse up to n = 50: the distance grows, about as n to the"),
        (
            made_up_curve([FLOOR, *RISING[1:]]),
            "No collapse: from no more than arithmetic makes at n = 1 the distance grows to 0.5",
        ),
        (
            made_up_curve([FLOOR / 3] * 6),
            "Nothing to collapse: to this model the two are the same at every length, apart by no "
            "more than arithmetic makes (3e-07).",
        ),
        # The floor is one draw of a noise; without a floor it is the format that tells.
        (made_up_curve([FLOOR * 2] * 6), "Nothing to collapse"),
        (made_up_curve([FLOOR * 5] * 6), "No collapse up to n = 50"),
        (made_up_curve([1e-7] * 6, floor=None), "Nothing to collapse"),
        (made_up_curve([2e-7] * 6, floor=None), "No collapse up to n = 50"),
        (made_up_curve([0.25], lengths=(7,)), "One length shows no trend: at n = 7 the two"),
        (
            made_up_curve(FLAT, control=FALLING, family="separated left"),
            "; but the control, n and n + 3, collapses from n = 20 on, so that what is kept apart "
            "is the last token's place in its group, not the count.",
        ),
        (
            made_up_curve(FLAT, control=FALLING, family="mine"),
            "what is kept apart is something that the control leaves alike, not the count.",
        ),
        (made_up_curve(FALLING, control=FALLING), "the control, n and n + 3, collapses too, from"),
        (made_up_curve(FALLING, control=FLAT), "; the control, n and n + 3, does not collapse."),
    ],
)
def test_the_conclusion_is_what_the_numbers_say(curve, said):
    found = conclusion(curve)
    assert said in found
    # One sentence: it ends once, and says collapse exactly where there is an onset.
    assert len(re.findall(r"\.(?!\d)", found)) == 1 and found.endswith(".")
    assert found.startswith("Collapse:") == (curve.onset() is not None)


def test_the_overview_puts_every_family_in_one_place():
    study = made_up_study()
    same = made_up_curve([FLOOR] * 6, family="word")
    assert overview([*study.curves, same]) == (
        "Up to n = 50, word has nothing to collapse; repeat (from n = 20) collapses; separated "
        "left keeps apart the place in its group, not the count; digits does not collapse."
    )
    assert overview([same, dataclasses.replace(same, family="other")]) == (
        "Up to n = 50, word and other have nothing to collapse."
    )


def test_the_ladder_says_where_nothing_is_left():
    some: Any = made_up_study().ladder
    assert ladder_conclusion(some) == (
        "At n = 50 the two prompts' final representations are the same, number for number, in "
        "int4 (final, stream); in all others some coordinate still differs."
    )
    seen = made_up_curve(identical=torch.zeros(3, 6))
    none = dataclasses.replace(some, base=seen, rungs={})
    assert "some coordinate still differs in every format" in ladder_conclusion(none)
    blind = dataclasses.replace(none, base=made_up_curve(identical=torch.ones(3, 6)))
    assert "number for number, in every format at every place" in ladder_conclusion(blind)


def test_rank_tells_each_variant():
    assert rank_conclusion(made_up_rank()) == (
        "Of a text's tokens: in the model as it is they stay apart (residual 0.8 after the last "
        "block); with no skip they become alike from block 0 on."
    )


def test_what_is_extrapolated_far_is_told_as_far():
    assert predicted(8e32) == "> 10⁶" and predicted(2009.09) == "2,009"
    assert predicted(None) == predicted(math.nan) == "–"


def test_the_summary_is_json_and_whole():
    import json

    study = made_up_study()
    curve = dataclasses.replace(study.curves[0], relative=torch.full((3, 6), torch.nan))
    study = dataclasses.replace(study, curves=(curve, *study.curves[1:]))
    said = json.loads(json.dumps(study.summary(), allow_nan=False))
    assert said["families"][0]["relative_first"] is None
    assert said["families"][2]["onset"] is None and said["families"][2]["control"] == "n and n + 3"
    rows = {(row["place"], row["format"]): row for row in said["horizons"]}
    assert rows["final", "int4"]["horizon"] == 50 and rows["stream", "int4"]["horizon"] == 1
    assert rows["stream", "float16"]["horizon"] is None
    alone = dataclasses.replace(study, ladder=None).summary()["horizons"]
    assert [row["place"] for row in alone] == ["final"] * 3
