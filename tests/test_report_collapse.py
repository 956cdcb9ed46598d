"""The sections on collapse, looked at in a real browser."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import HOSTILE, LEAST_CONTRAST, OpenReport, embedded
from collapses import FALLING, FLAT, LENGTHS, made_up_curve, made_up_ladder, made_up_study
from flows import PROVENANCE, made_up_flow
from playwright.sync_api import Page

from eyechart.report import render
from eyechart.report.collapse_view import POINTS
from eyechart.results import Exam, open_result
from eyechart.results.collapse import DISTANCES
from eyechart.results.collapse_words import (
    conclusion,
    ladder_conclusion,
    overview,
    rank_conclusion,
)


def cells(page: Page, table: str) -> list[list[str]]:
    rows = page.locator(f"{table} tbody tr").all()
    return [row.locator("th, td").all_inner_texts() for row in rows]


def conclusions(page: Page) -> list[str]:
    return page.locator("#study .conclusion:visible").all_inner_texts()


def chosen(page: Page) -> str:
    """The family whose curve is drawn, by what the page was given and what it shows."""
    lines = page.evaluate(
        """document.getElementById("figure-family-formats").data.map((trace) => trace.y.at(-1))"""
    )
    title = page.locator("#study .conclusion[data-choice]:visible b").inner_text()
    options = embedded(page.content())["choices"]["family"]
    drawn = [trace["y"][-1] for trace in options[title]["family-formats"]["data"]]
    assert lines == drawn
    return title


def test_a_study_is_a_report_of_its_own(open_report: OpenReport) -> None:
    study: Any = made_up_study()
    report = open_report(study)
    page = report.page
    headings = page.locator("main section > h2").all_inner_texts()
    assert headings == page.locator("nav a").all_inner_texts()
    assert headings[2:-1] == ["How representations collapse"]
    assert conclusions(page) == [
        overview(study.curves),
        f"repeat, {study.curves[0].about}. {conclusion(study.curves[0])}",
        ladder_conclusion(study.ladder),
        rank_conclusion(study.rank),
    ]
    for name in ("families", "family-curve", "family-layers", "family-formats", "ladder", "rank"):
        assert page.locator(f"#figure-{name} .main-svg").count() == 3, name
    families = cells(page, ".families")
    assert [row[0] for row in families] == [curve.family for curve in study.curves]
    assert families[0][2:6] == ["0.5", "0.01", "20", "-1.00 [-1.00, -1.00]"]
    assert families[2][4] == "–" and families[2][6] == "0.01 n and n + 3"
    horizons = {(row[0], row[1]): row[2:] for row in cells(page, ".horizons")}
    assert horizons["final", "int4"][:4] == ["0.0%", "100.0%", "90.0%", "n = 50"]
    assert horizons["final", "bfloat16"][1] == "50.0%"
    assert horizons["stream", "int4"][3] == "n = 1"
    assert horizons["stream", "float16"][3] == "not seen"
    assert "2 of 3" not in page.inner_text("#summary") and "1 of 3" in page.inner_text("#summary")
    # What failed is told above and in its place.
    assert "give a longer one" in page.inner_text("#summary .failed")
    missing = page.locator("#study .missing li").all_inner_texts()
    assert missing == [
        "text could not be measured: give a longer one",
        "bfloat16 at stream could not be measured: not finite at block 3",
    ]
    report.is_clean()


def test_families_are_chosen_from_the_keyboard(open_report: OpenReport) -> None:
    study: Any = made_up_study()
    curves = list(study.curves)
    curves[2] = dataclasses.replace(curves[2], formats=(), identical=None, expected=None)
    report = open_report(dataclasses.replace(study, curves=tuple(curves)))
    page = report.page
    assert chosen(page) == "repeat"
    page.get_by_label("repeat", exact=True).focus()
    page.keyboard.press("ArrowRight")
    assert chosen(page) == "digits"
    assert conclusion(study.curves[1]) in conclusions(page)[1]
    visible = page.locator("#study .tokens:visible").all_inner_texts()
    assert len(visible) == 2 and visible[0].split()[-10:] == ["7"] * 10
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel-family-formats").is_hidden()  # it was read in no format
    assert page.locator("#study .tokens:visible").count() == 3  # the control's too
    report.is_clean()


def test_the_prompts_shown_are_those_compared(open_report: OpenReport) -> None:
    curve = made_up_curve(FLAT, control=FALLING, family="separated left")
    page = open_report(made_up_study(curves=(curve,), ladder=None, rank=None)).page
    shown = [tokens.split() for tokens in page.locator("#study .tokens").all_inner_texts()]
    assert "n = 10" in page.inner_text("#study .note")
    assert [len(tokens) for tokens in shown] == [3 + 10, 3 + 11, 3 + 13]
    long = made_up_curve(lengths=(1, 2, 5, 200), final=(0.5, 0.4, 0.3, 0.2), identical=None)
    text = render(made_up_study(curves=(long,), ladder=None, rank=None))
    assert len(re.findall(r"<details><summary>the (?:short|long)er prompt", text)) == 2  # folded


def test_parts_that_failed_are_told_in_their_place(open_report: OpenReport) -> None:
    failures = {"precision ladder": "no room on the device", "rank": "a text of one token"}
    report = open_report(made_up_study(ladder=None, rank=None, failures=failures))
    page = report.page
    told = page.locator("#study .failed").all_inner_texts()
    assert ["no room on the device" in told[0], "a text of one token" in told[1]] == [True, True]
    # The formats in which the first family was read are there all the same.
    assert [row[0] for row in cells(page, ".horizons")] == ["final"] * 3
    assert page.locator("#figure-ladder, #figure-rank").count() == 0
    report.is_clean()


def test_parts_that_were_not_asked_for_are_left_out() -> None:
    bare = made_up_curve(formats=(), identical=None, expected=None, steps=None, ends=None)
    page = render(made_up_study(curves=(bare,), ladder=None, rank=None, failures={}))
    study = page[page.index('<section id="study"') : page.index('<section id="measured"')]
    for absent in ("failed", "missing", "tokens", "numbers horizons"):
        assert f'class="{absent}"' not in study
    assert "ladder-title" not in study and "rank-title" not in study
    assert "family-formats" not in embedded(page)["choices"]["family"]["repeat"]


def test_an_exam_shows_its_own_curve_beside_flow(open_report: OpenReport) -> None:
    flow, curve = made_up_flow(), made_up_curve()
    parts = (None, None, None, curve)
    report = open_report(Exam(flow.sequences, PROVENANCE, *parts, flow=flow))
    page = report.page
    assert page.inner_text("#collapse .conclusion") == conclusion(curve)
    assert page.locator("#figure-collapse .main-svg").count() == 3
    assert cells(page, "#collapse .numbers")[0][1:] == [str(n) for n in LENGTHS]
    assert page.locator("#figure-map .main-svg").count() == 3  # the other choice still works
    report.is_clean()


def test_hostile_names_and_tokens_stay_text(open_report: OpenReport) -> None:
    curve = made_up_curve(
        control=FALLING,
        family=HOSTILE[0],
        about=f"about {HOSTILE[3]}",
        token=HOSTILE[1],
        front=(HOSTILE[4], HOSTILE[5], HOSTILE[2]),
        control_name=HOSTILE[2],
        layer_labels=(HOSTILE[2], HOSTILE[0], HOSTILE[1]),
    )
    failures = {f"family {HOSTILE[4]}": HOSTILE[0]}
    report = open_report(
        made_up_study(curves=(curve,), ladder=made_up_ladder(curve), failures=failures)
    )
    page = report.page
    shown = [token.replace(" ", "·").replace("\u2028", "\\u2028") for token in HOSTILE]
    tokens = page.locator("#study .tokens").first.locator("span").all_inner_texts()
    assert tokens[:4] == [shown[4], shown[5], shown[2], shown[1]]
    assert page.locator("#study input").first.get_attribute("value") == HOSTILE[0]
    assert HOSTILE[0] in conclusions(page)[0] and HOSTILE[2] in conclusions(page)[1]
    assert HOSTILE[2] in page.locator("#figure-family-layers .ytick text").all_text_contents()
    assert page.locator("#study img, #study b b, #study a, .js-plotly-plot a").count() == 0
    report.is_clean()


def test_thousands_of_lengths_stay_small() -> None:
    many = tuple(range(1, 2049))
    deep = torch.tensor([1 / n for n in many]).expand(32, -1)
    curve = made_up_curve(
        lengths=many,
        final=deep[-1].tolist(),
        floor=None,
        layer_labels=("embedding", *(f"block {index}" for index in range(30)), "final norm"),
        **dict.fromkeys(DISTANCES, deep),
    )
    curves = tuple(dataclasses.replace(curve, family=f"family {index}") for index in range(2))
    page = render(made_up_study(curves=curves, ladder=None))
    assert len(page.encode()) < 5_500_000
    assert "a few dozen of the lengths" in page
    for figures in embedded(page)["choices"]["family"].values():
        assert len(figures["family-layers"]["data"][0]["x"]) <= POINTS


def test_the_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    study = made_up_study()
    page = render(study)
    study.save(tmp_path / "study")
    assert render(open_result(tmp_path / "study")) == page


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_the_study_is_legible(open_report: OpenReport, scheme: str, width: int) -> None:
    viewport = {"width": width, "height": 800}
    report = open_report(made_up_study(), color_scheme=scheme, viewport=viewport)
    least = report.page.evaluate(LEAST_CONTRAST)
    assert least["ratio"] >= 4.5, least
    assert report.page.evaluate("document.documentElement.scrollWidth") <= width
    report.is_clean()


def test_the_study_can_be_read_without_scripts(open_report: OpenReport) -> None:
    study = made_up_study()
    page = open_report(study, java_script_enabled=False).page
    text = page.inner_text("#study")
    for curve in study.curves:
        assert conclusion(curve) in text
    assert page.locator("#study .scripted:visible").count() == 0
    assert re.search(r"stream\s+int4\s+100.0%", text)
