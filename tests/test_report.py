"""The report, looked at in a real browser: it draws, it is safe, it can be used without a mouse."""

import base64
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import HOSTILE, LEAST_CONTRAST, OpenReport, embedded
from censuses import CHANGING, VERDICTS, made_up_census
from flows import LABELS, made_up_flow
from playwright.sync_api import Page

import eyechart
from eyechart.report import render
from eyechart.report.security import json_text, script_text
from eyechart.results import (
    AttentionPatterns,
    Exam,
    ResidualNorms,
    Sequences,
    open_result,
)

TEXT = "The lamp burned low and the keeper of the lamp slept."
BIG = 10_000_000
FIGURES = {
    "attention": ("attention",),
    "residual": ("residual",),
    "collapse": ("collapse",),
    "flow": ("flow", "map", "spread", "sinks"),
    "heads": ("kinds", "costs", "together", "domains", "rotary"),
}

COLOURS = """(source) => {
  const pixels = window.__pixels(source);
  const found = new Set();
  for (let i = 0; i < pixels.length; i += 4) {
    if (pixels[i + 3]) found.add(pixels.slice(i, i + 3).join());
  }
  return found.size;
}"""


@pytest.fixture(scope="module")
def exam(llama: Any) -> Exam:
    return eyechart.exam(llama, TEXT, lengths=(1, 2, 5))


def relabelled(exam: Exam, tokens: tuple[str, ...]) -> Exam:
    """The exam with the first tokens of its text called something else, in every part."""

    def rename(part: Any) -> Any:
        if part is None:
            return None
        labels = part.sequences.labels[0]
        renamed = (*tokens, *labels[len(tokens) :])
        assert len(renamed) == len(labels)
        sequences = dataclasses.replace(part.sequences, labels=(renamed,))
        return dataclasses.replace(part, sequences=sequences)

    parts = {
        name: rename(getattr(exam, name)) for name in ("residual", "attention", "patterns", "flow")
    }
    return dataclasses.replace(rename(exam), **parts)


def long_exam(exam: Exam, tokens: int, heads: int, measured: int) -> Exam:
    """An exam whose patterns have many tokens: head 0 looks at the first token, others anywhere."""
    torch.manual_seed(0)
    sequences = Sequences.from_rows(
        [list(range(measured))], [[f"·word{i}" for i in range(measured)]], name="words"
    )
    pattern = torch.rand(1, heads, tokens, tokens).tril()
    pattern /= pattern.sum(-1, keepdim=True)
    pattern[:, 0] = 0
    pattern[:, 0, :, 0] = 1
    patterns = AttentionPatterns(
        sequences=sequences.first_tokens(tokens),
        provenance=exam.provenance,
        heads=tuple((0, head) for head in range(heads)),
        reasons=("a reason",) * heads,
        pattern=pattern,
    )
    # The other statistics are of other tokens, and have no place in this exam.
    return dataclasses.replace(exam, sequences=sequences, patterns=patterns, attention=None)


def test_opens_from_disk_and_draws_every_figure(exam: Exam, open_report: OpenReport) -> None:
    assert exam.attention is not None and exam.collapse is not None
    first = exam.attention.first
    cells = first.shape[1] * first.shape[2]
    ramp = torch.linspace(0, 1, cells).reshape(1, *first.shape[1:3], 1).expand_as(first)
    known = dataclasses.replace(exam.attention, first=ramp, diagonal=torch.zeros_like(first))
    report = open_report(dataclasses.replace(exam, attention=known))
    page = report.page
    images = page.locator("#figure-attention .heatmaplayer image").all()
    assert len(images) == 4
    # Every head its own colour in the first map, one and the same in the second.
    for image, wanted in ((images[0], cells), (images[1], 1)):
        colours = image.evaluate(
            f"""async (image) => {{
              const bitmap = new Image();
              bitmap.src = image.getAttribute("href") ?? image.getAttribute("xlink:href");
              await bitmap.decode();
              return ({COLOURS})(bitmap);
            }}"""
        )
        assert colours == wanted
    assert page.locator("#figure-residual .heatmaplayer image").count() == 1
    thin = page.locator('#figure-collapse .scatterlayer .js-line[style*="stroke-width: 1.2px"]')
    # Zero throughout, as the embedding is with rotary positions, has no place on these axes.
    assert thin.count() == int((exam.collapse.relative[:-1] > 0).any(dim=1).sum()) > 0
    report.is_clean()


def test_the_policy_is_strict_and_in_force(exam: Exam, open_report: OpenReport) -> None:
    report = open_report(exam)
    policy = report.page.get_attribute('meta[http-equiv="Content-Security-Policy"]', "content")
    assert policy is not None
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", s) for s in rules["script-src"].split())
    report.is_clean()
    # The counter-proof, which also shows that the tests would see a violation.
    report.page.evaluate(
        """() => {
          document.body.append(Object.assign(document.createElement("script"),
            { textContent: "window.__pwned = 5" }));
          document.body.insertAdjacentHTML("beforeend", "<img src=x onerror=window.__pwned=6>");
          fetch("https://example.org/").catch(() => 0);
        }"""
    )
    report.page.wait_for_function("window.__violations.length >= 3")
    assert report.page.evaluate("window.__pwned ?? null") is None


def test_hostile_tokens_are_shown_and_never_run(exam: Exam, open_report: OpenReport) -> None:
    hostile = relabelled(exam, HOSTILE)
    name = f"model {HOSTILE[0]}"
    hostile = dataclasses.replace(
        hostile,
        provenance=dataclasses.replace(exam.provenance, model=name, notes=(HOSTILE[4],)),
        failures={f"step {HOSTILE[1]}": f"message {HOSTILE[0]}"},
    )
    report = open_report(hostile)
    page = report.page
    shown = [token.replace(" ", "·").replace("\u2028", "\\u2028") for token in HOSTILE]
    assert page.title() == f"Eye exam of {name}"
    assert page.inner_text("h1") == f"Eye exam of {name}"
    assert page.locator("#text .tokens span").all_inner_texts()[: len(shown)] == shown
    assert f"message {HOSTILE[0]}" in page.inner_text("#summary .failed")
    # Plotly reads pseudo-HTML: the labels must come out as the tokens' own characters, unstyled.
    ticks = page.locator("#figure-residual .xtick text")
    texts = ticks.all_text_contents()
    for index, token in enumerate(shown):
        assert f"{index} {token}" in texts
    assert page.locator("#figure-residual .xtick a, #figure-residual .xtick tspan").count() == 0
    # CircuitsVis draws on a canvas, where text is text; it leaves out labels that do not fit.
    assert f"{shown[0]} (0)" in page.evaluate("[...window.__drawn]")
    # Hover, click and read everything; still nothing has run.
    page.locator("#figure-residual .heatmaplayer image").scroll_into_view_if_needed()
    box = page.locator("#figure-residual .heatmaplayer image").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 3, box["y"] + box["height"] / 2)
    page.wait_for_selector("#figure-residual .hoverlayer .hovertext")
    assert shown[0] in (page.locator("#figure-residual .hovertext").first.text_content() or "")
    assert page.locator("main img, main a[href^=javascript], main b b").count() == 0
    report.is_clean()


def test_a_hostile_prompt_through_a_real_tokenizer(llama: Any, open_report: OpenReport) -> None:
    report = open_report(eyechart.exam(llama, "".join(HOSTILE[:4]), lengths=(1, 2)))
    spans = report.page.locator("#text .tokens span").all_inner_texts()
    assert "onerror=window.__pwned=1>" in "".join(spans)
    report.is_clean()


def test_table_sorts_and_filters_from_the_keyboard(exam: Exam, open_report: OpenReport) -> None:
    report = open_report(exam)
    page = report.page
    assert exam.attention is not None
    wanted = exam.attention.to_frame()
    first = sorted(wanted["first"])

    def column(index: int) -> list[str]:
        rows = page.locator("table.sortable tbody tr:visible")
        return [row.locator("th, td").nth(index).inner_text() for row in rows.all()]

    # From the filter, which its label leads to, one step past the scrolling box into the table.
    page.get_by_label("Show heads named like").focus()
    for name in ("head", "first"):
        while page.evaluate("document.activeElement.textContent") != name:
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.closest('#heads')") is not None
    header = page.locator("table.sortable thead th").nth(1)
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert column(1) == [f"{value:.3f}" for value in reversed(first)]
    page.keyboard.press("Space")
    assert header.get_attribute("aria-sort") == "ascending"
    assert column(1) == [f"{value:.3f}" for value in first]

    page.get_by_label("Show heads named like").focus()
    page.keyboard.type("l1")
    shown = column(0)
    assert sorted(shown) == [f"L1H{head}" for head in wanted[wanted.layer == 1]["head"]]
    assert page.inner_text("#head-count") == f"{len(shown)} of {len(wanted)} heads"
    page.keyboard.type("h0")
    assert column(0) == ["L1H0"]
    report.is_clean()


def test_missing_values_sort_last(exam: Exam, open_report: OpenReport) -> None:
    assert exam.attention is not None
    first = exam.attention.first.clone()
    first[:, 0] = torch.nan  # as in a layer without attention
    attention = dataclasses.replace(exam.attention, first=first)
    page = open_report(dataclasses.replace(exam, attention=attention)).page
    heads = first.shape[2]
    for order in ("descending", "ascending"):
        page.locator("table.sortable th button").nth(1).click()
        assert page.locator("table.sortable th").nth(1).get_attribute("aria-sort") == order
        values = page.locator("table.sortable tbody td:nth-child(2)").all_inner_texts()
        assert values[-heads:] == ["–"] * heads
        assert "–" not in values[:-heads]


def test_skip_link_and_contents(exam: Exam, open_report: OpenReport) -> None:
    page = open_report(exam).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#main"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    targets = page.eval_on_selector_all("nav a", "links => links.map(a => a.hash.slice(1))")
    sections = page.eval_on_selector_all("main section", "all => all.map(s => s.id)")
    assert targets == sections
    headings = page.locator("main section > h2").all_inner_texts()
    assert headings == page.locator("nav a").all_inner_texts()


def test_heads_open_by_mouse_and_keyboard(exam: Exam, open_report: OpenReport) -> None:
    report = open_report(exam)
    page = report.page
    assert exam.patterns is not None
    names = page.locator("button[data-head] b").all_inner_texts()
    assert names == [f"L{layer}H{head}" for layer, head in exam.patterns.heads]
    for index in range(len(names)):
        assert page.locator(f"#thumb-{index} canvas").evaluate(COLOURS) > 2

    def large_is(index: int) -> None:
        page.wait_for_selector(f"#attention-{index} canvas", state="visible")
        assert page.locator("#attention-view > div:visible").count() == 1
        assert page.locator(f"#attention-{index} canvas").evaluate(COLOURS) > 2
        assert page.inner_text("#attention-name").startswith(names[index])
        pressed = page.locator('button[data-head][aria-pressed="true"]')
        assert pressed.locator("b").all_inner_texts() == [names[index]]

    large_is(0)
    page.locator("button[data-head]").nth(1).click()
    large_is(1)
    page.locator("button[data-head]").nth(2).focus()
    page.keyboard.press("Enter")
    large_is(2)
    page.locator("button[data-head]").nth(0).click()
    large_is(0)
    report.is_clean()


def test_patterns_of_256_tokens_fit_and_are_the_right_way_round(
    exam: Exam, open_report: OpenReport
) -> None:
    big = long_exam(exam, tokens=256, heads=6, measured=300)
    report = open_report(big)
    page = report.page
    assert report.path.stat().st_size < BIG
    assert "first 256 of 300 tokens" in page.inner_text("#striking .note")
    # Head 0 looks at the first token: the left edge is dark all the way down, the rest is not.
    blue = page.locator("#thumb-0 canvas").evaluate(
        """(canvas) => {
          const [w, h] = [canvas.width, canvas.height];
          const strip = (x, y, dx, dy) => {
            const pixels = window.__pixels(canvas, x, y, dx, dy);
            return pixels.reduce((n, v, i) => n + (i % 4 === 0 && v < 200 && pixels[i + 3] > 0), 0);
          };
          return { left: strip(0, 2, 1, h - 4) / (h - 4), bottom: strip(4, h - 2, w - 8, 1) };
        }"""
    )
    assert blue["left"] > 0.9
    assert blue["bottom"] == 0
    report.is_clean()


def test_patterns_are_cut_to_256_tokens(exam: Exam) -> None:
    big = long_exam(exam, tokens=260, heads=2, measured=260)
    patterns = embedded(render(big))["patterns"]
    assert len(patterns["props"]["tokens"]) == 256
    assert [len(row) for row in patterns["heads"][1]] == list(range(1, 257))


def test_a_long_text_in_a_large_model_stays_small(exam: Exam) -> None:
    big = long_exam(exam, tokens=256, heads=8, measured=4096)
    shape = (1, 65, 4096)
    residual = ResidualNorms(
        sequences=big.sequences,
        provenance=exam.provenance,
        norm=torch.rand(shape) * 1000,
        final_norm=None,
        largest=torch.rand(*shape, 3),
        largest_dimension=torch.zeros(*shape, 3, dtype=torch.long),
        median=torch.ones(shape[:2]),
    )
    flow = made_up_flow(big.sequences.labels[0], layers=64)
    page = render(dataclasses.replace(big, residual=residual, flow=flow))
    assert len(page.encode()) < BIG
    assert len(embedded(page)["figures"]["residual"]["data"][0]["x"]) == 2048
    assert "the first 2048 of 4096 tokens" in page
    assert len(embedded(page)["figures"]["spread"]["data"][0]["x"]) == 2 * 84 + 1
    assert "the first 84 and the last 84 positions" in page


def test_embedded_patterns_equal_the_result(exam: Exam) -> None:
    assert exam.patterns is not None
    patterns = embedded(render(exam))["patterns"]
    for head, rows in enumerate(patterns["heads"]):
        for query, row in enumerate(rows):
            wanted = exam.patterns.pattern[0, head, query, : query + 1]
            shown = torch.tensor(row) / patterns["steps"]
            torch.testing.assert_close(shown, wanted, atol=5.1e-5, rtol=0)


@pytest.mark.parametrize("part", ["attention", "patterns", "residual", "collapse", "flow", "heads"])
def test_a_failed_part_is_told_in_its_place(exam: Exam, open_report: OpenReport, part: str) -> None:
    section = {"attention": "heads", "patterns": "striking", "heads": "census"}.get(part, part)
    step = {"flow": "information flow", "heads": "head census"}.get(part, part)
    failures = {step: "out of memory: choose a smaller batch"}
    changes: dict[str, Any] = {"heads": made_up_census(), part: None, "failures": failures}
    report = open_report(dataclasses.replace(exam, **changes))
    page = report.page
    assert "smaller batch" in page.inner_text(f"#{section} .failed")
    assert "smaller batch" in page.inner_text("#summary .failed")
    assert page.locator("main .failed").count() == 2
    for shown, names in FIGURES.items():
        for name in names:
            assert page.locator(f"#figure-{name} .main-svg").count() == (0 if shown == part else 3)
    assert (page.locator("#attention-0 canvas").count() == 0) == (part == "patterns")
    report.is_clean()


def test_a_part_that_was_not_asked_for_is_left_out(exam: Exam, open_report: OpenReport) -> None:
    report = open_report(dataclasses.replace(exam, flow=None, collapse=None))
    page = report.page
    links = page.locator("nav a").all_inner_texts()
    assert links == page.locator("main section > h2").all_inner_texts()
    assert "Every head" in links and "Collapse" not in links
    assert "Where information comes from" not in links
    assert page.locator("main .failed").count() == 0
    assert "2005.00928" not in page.inner_text("#measured")
    report.is_clean()


def test_a_flow_alone_is_a_report_of_its_own(open_report: OpenReport) -> None:
    report = open_report(made_up_flow())
    page = report.page
    sections = page.eval_on_selector_all("main section", "all => all.map(s => s.id)")
    assert sections == ["summary", "text", "flow", "measured"]
    assert page.locator("nav a").count() == 4 and page.locator("main .failed").count() == 0
    for name in FIGURES["flow"]:
        assert page.locator(f"#figure-{name} .main-svg").count() == 3
    sources = page.inner_text("#measured ul")
    for number in ("2406.04267", "2005.00928", "2004.10102", "2203.04212", "2410.13835"):
        assert number in sources
    assert "2402.17762" not in sources  # massive activations were not looked for
    report.is_clean()


def test_the_section_on_flow_tells_the_result_s_numbers(open_report: OpenReport) -> None:
    flow = made_up_flow()
    page = open_report(flow).page
    tiles = page.locator("#summary .tile .big").all_inner_texts()
    first, last = flow.u_shape("sensitivity")[0]
    table = flow.agreement().pivot(index="measure", columns="truth", values="spearman")
    assert tiles[0] == f"{first:.1f} · {last:.1f}"
    assert tiles[1] == f"{float(flow.sink_share[0, -1]):.2f}"
    assert tiles[2] == "attention" == str(table["sensitivity"].idxmax())
    rows = page.locator(".agreement tbody tr").all()
    assert [row.locator("th").inner_text() for row in rows] == [
        *("attention", "rollout", "path bound", "norm-weighted rollout", "ALTI")
    ]
    for name, row in zip(("attention", "rollout", "path_bound"), rows, strict=False):
        assert row.locator("td").all_inner_texts()[:3] == [
            f"{table[truth][name]:.2f}"
            for truth in ("sensitivity", "replacement_kl", "replacement_change")
        ]
    said = page.inner_text("#flow")
    assert "token 7, “.”" in said and "from 16 random vectors" in said
    assert "operator norms of the blocks" in said
    exact = render(made_up_flow(probes=None))
    assert "by its embedding, exact)" in exact


def test_maps_are_chosen_from_the_keyboard(open_report: OpenReport) -> None:
    flow = made_up_flow()
    report = open_report(flow)
    page = report.page

    def shown() -> list[float]:
        return page.evaluate('document.getElementById("figure-map").data[0].customdata[2]')

    chosen = page.get_by_label("rollout", exact=True)
    assert chosen.is_checked()
    chosen.focus()
    for name in ("rollout", "norm_rollout", "alti", "attention", "through"):
        assert page.locator("input[name=map]:checked").get_attribute("value") == name
        assert shown() == pytest.approx(getattr(flow, name)[0, 2].tolist(), rel=1e-2)
        page.keyboard.press("ArrowDown")
    assert chosen.is_checked()
    report.is_clean()
    # A map that is drawn later is in the ink of the scheme of then.
    page.emulate_media(color_scheme="dark")
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(300)
    assert page.evaluate(
        """getComputedStyle(document.querySelector("#figure-map .xtick text")).fill
           === getComputedStyle(document.body).color"""
    )


def test_missing_pictures_are_named_with_their_reason(open_report: OpenReport) -> None:
    report = open_report(
        made_up_flow(
            alti=None,
            spread=None,
            spread_evicted=None,
            sinks=None,
            sinks_other_bos=None,
            unavailable={"alti": f"no place to look {HOSTILE[0]}", HOSTILE[1]: "unheard of"},
        )
    )
    page = report.page
    assert page.locator("#flow .missing li").all_inner_texts() == [
        f"ALTI: no place to look {HOSTILE[0]}",
        f"{HOSTILE[1]}: unheard of",
    ]
    assert page.locator("input[value=alti]").count() == 0
    assert page.locator("#figure-spread, #figure-sinks").count() == 0  # no empty panels
    assert page.locator("#figure-map .heatmaplayer image").count() == 1
    report.is_clean()


@pytest.mark.parametrize("kept", ["sensitivity", "path_bound", "spread", "sinks", "topology"])
def test_one_picture_is_enough_for_a_page(open_report: OpenReport, kept: str) -> None:
    names = (
        *("attention", "rollout", "through", "norm_rollout", "alti", "path_bound", "sensitivity"),
        *("sensitivity_interval", "replacement_kl", "replacement_change", "spread"),
        *("spread_evicted", "sinks", "sinks_other_bos", "eigenvalues", "hitting_depth"),
    )
    left = "eigenvalues" if kept == "topology" else kept
    gone: dict[str, Any] = {name: None for name in names if name != left}
    report = open_report(made_up_flow(**gone))
    drawn = report.page.eval_on_selector_all("#flow .js-plotly-plot", "all => all.map(p => p.id)")
    assert drawn == [f"figure-{kept if kept in ('spread', 'sinks', 'topology') else 'flow'}"]
    report.is_clean()


def test_hostile_tokens_in_the_flow(open_report: OpenReport) -> None:
    labels = (HOSTILE[0], HOSTILE[1], HOSTILE[2], *LABELS[3:7], HOSTILE[4])
    flow = made_up_flow(labels, bound_variant=HOSTILE[0])
    report = open_report(flow)
    page = report.page
    shown = [token.replace(" ", "·") for token in labels]
    for name in ("flow", "map", "spread"):
        ticks = page.locator(f"#figure-{name} .xtick text").all_text_contents()
        assert f"0 {shown[0]}" in ticks
        assert page.locator(f"#figure-{name} .xtick :is(a, tspan)").count() == 0
    assert f"token 2, “{shown[2]}”, changed to “<b>new</b>”" in (
        page.locator("#figure-spread .annotation-text").first.text_content() or ""
    )
    assert f"“{shown[7]}”" in page.inner_text("#flow .see >> nth=0")
    assert HOSTILE[0] in page.inner_text(".agreement")
    page.locator("#figure-map .heatmaplayer image").scroll_into_view_if_needed()
    box = page.locator("#figure-map .heatmaplayer image").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 3, box["y"] + box["height"] / 2)
    page.wait_for_selector("#figure-map .hoverlayer .hovertext")
    assert shown[0] in (page.locator("#figure-map .hovertext").first.text_content() or "")
    assert page.locator("main img, main a[href^=javascript]").count() == 0
    report.is_clean()


def test_a_census_alone_is_a_report_of_its_own(open_report: OpenReport) -> None:
    report = open_report(made_up_census())
    page = report.page
    sections = page.eval_on_selector_all("main section", "all => all.map(s => s.id)")
    assert sections == ["summary", "text", "census", "measured"]
    assert page.locator("main .failed").count() == 0
    for name in FIGURES["heads"]:
        assert page.locator(f"#figure-{name} .main-svg").count() == 3
    # One picture a kind, each in one colour.
    assert page.locator("#figure-kinds .heatmaplayer image").count() == 8
    assert page.locator("#figure-kinds .legendtext").all_text_contents()[:2] == [
        "induction",
        "duplicate-token",
    ]
    sources = page.inner_text("#measured ul")
    assert "2410.06205" in sources and "2410.13835" in sources and "2402.17762" not in sources
    report.is_clean()


def test_the_section_on_heads_tells_the_result_s_numbers(open_report: OpenReport) -> None:
    census = made_up_census()
    page = open_report(census).page
    tiles = page.locator("#summary .tile .big").all_inner_texts()
    assert [re.sub(r"\s+", " ", tile) for tile in tiles] == ["4 of 9", "3 heads", "25%", "1"]
    said = page.inner_text("#summary .tiles")
    assert "each for less than 0.01 nats; 3 are active, of 2 it cannot be said" in said
    assert "for 0.030 nats, 2.0 times as many" in said and "changes by -0.020" in said
    assert "at 128 tokens; without them it takes 0.80 of its time" in said
    clearest = page.locator(".clearest tbody tr").all_inner_texts()
    assert [row.split("\t")[:3] for row in clearest][4] == ["sink", "2", "L3H2 0.95"]
    kinds = {
        row.locator("th").inner_text(): row.locator("td").all_inner_texts()
        for row in page.locator(".kinds tbody tr").all()
    }
    assert {kind: cells[2].split() for kind, cells in kinds.items()} == census.summary()["kinds"]
    assert kinds["local"][1] == "the 2 tokens up to the query"
    facts = dict(row.split("\t") for row in page.locator("#census .facts tr").all_inner_texts())
    assert facts["KL of the set, held-out texts"] == "0.03 nats (0.02 to 0.045)"
    assert facts["KL of random sets of as many heads"] == "0.25, 0.5 nats"
    assert facts["change of loss there"] == "-0.020 of 3.000"
    assert facts["operations of attention at 128 tokens"] == "25.0% are the set's"
    assert facts["keys and values that nobody else reads"] == "1 of 7.5 MiB"
    assert facts["time of attention without the set"] == "0.4 s, 0.80 of 0.5 s"
    assert facts["the set, cheapest heads first"] == "L3H2 L3H0 L0H2"
    layer, head = CHANGING
    changing = page.locator(".changing tbody tr").all_inner_texts()
    assert [row.split("\t") for row in changing] == [
        [f"L{layer}H{head}", "prose", "code", "0.30", "0.90"]
    ]
    assert "prose, 10 tokens" in page.inner_text("#text")


def census_column(page: Page, index: int) -> list[str]:
    rows = page.locator("#census-table tbody tr:visible")
    return [row.locator("th, td").nth(index).inner_text() for row in rows.all()]


def test_the_table_of_the_census_holds_every_head(open_report: OpenReport) -> None:
    page = open_report(made_up_census()).page
    rows = [row.split("\t") for row in page.locator("#census-table tbody tr").all_inner_texts()]
    found = {row[0]: row[1:] for row in rows}
    assert list(found) == [f"L{layer}H{head}" for layer in (0, 1, 3) for head in range(3)]
    assert [row[1] for row in found.values()] == [v for line in VERDICTS for v in line if v]
    assert found["L1H1"] == [
        *("diagonal", "no-op", "0.050 0.040–0.060", "identity", "0.0040 0.0032–0.0048", ""),
        *("0.79", "0.10", "0.80", "0.10", "0.10"),
        *("it is a linear map of each token by itself", "4"),
    ]
    assert found["L0H2"][5:7] == ["yes", "–"]  # mixed heads have no evidence
    assert (
        page.locator("#census-table td")
        .nth(7)
        .evaluate("cell => getComputedStyle(cell).backgroundImage")
        .startswith("linear-gradient")
    )


def test_the_census_sorts_by_any_column_from_the_keyboard(open_report: OpenReport) -> None:
    report = open_report(made_up_census())
    page = report.page
    headers = page.locator("#census-table thead th")
    names = [name.split()[0] for name in headers.all_inner_texts()]
    page.get_by_role("button", name="zeroed").focus()
    page.keyboard.press("Enter")
    at = names.index("zeroed")
    assert headers.nth(at).get_attribute("aria-sort") == "descending"
    order = ["L3H1", "L1H0", "L0H0", "L1H1", "L0H1", "L3H0", "L1H2", "L0H2", "L3H2"]
    assert census_column(page, 0) == order
    page.keyboard.press("Space")
    assert headers.nth(at).get_attribute("aria-sort") == "ascending"
    assert census_column(page, 0) == order[::-1]
    # Words go by the alphabet, missing values to the end, whichever way round.
    kinds = sorted(census_column(page, 1))
    headers.nth(1).locator("button").click()
    assert census_column(page, 1) == kinds
    assert headers.nth(at).get_attribute("aria-sort") == "none"
    headers.nth(1).locator("button").click()
    assert census_column(page, 1) == kinds[::-1]
    for _ in range(2):
        page.get_by_role("button", name="evidence").click()
        assert census_column(page, 0)[-1] == "L0H2"
    assert census_column(page, 0)[-2] == "L3H2"  # now ascending
    for _ in range(2):
        page.get_by_role("button", name="what it is then").click()
        words = census_column(page, 12)
        assert words[:4] != [""] * 4 and words[4:] == [""] * 5
    headers.first.locator("button").click()
    assert census_column(page, 0) == sorted(order)
    report.is_clean()


def test_the_census_filters_by_name_kind_and_verdict(open_report: OpenReport) -> None:
    report = open_report(made_up_census())
    page = report.page
    kind, verdict = page.get_by_label("of kind"), page.get_by_label("with verdict")
    name = page.locator("#census-controls input")
    output = page.locator("#census-controls output")
    verdict.select_option("no-op")
    assert census_column(page, 0) == ["L0H2", "L1H1", "L3H0", "L3H2"]
    assert output.inner_text() == "4 of 9 heads"
    kind.focus()
    page.keyboard.type("sink")
    assert census_column(page, 0) == ["L3H0", "L3H2"]
    name.fill(" l3h2 ")
    assert census_column(page, 0) == ["L3H2"]
    kind.select_option("local")
    assert census_column(page, 0) == [] and output.inner_text() == "0 of 9 heads"
    for control in (kind, verdict):
        control.select_option("")
    name.fill("L1")
    assert census_column(page, 0) == ["L1H0", "L1H1", "L1H2"]
    name.fill("")
    assert output.inner_text() == "9 of 9 heads"
    report.is_clean()


def opened_head(page: Page) -> str:
    """The head whose attention is drawn, and only that; empty columns of its picture fail."""
    name = page.inner_text("#census-name").split(":")[0]
    shown = page.locator("#census-view > div:visible")
    assert shown.count() == 1
    page.wait_for_function(
        f"""() => {{
          const canvas = document.querySelector("#census-view > div:not([hidden]) canvas");
          return canvas && ({COLOURS})(canvas) > 2;
        }}"""
    )
    pressed = page.locator('#census-table button[aria-pressed="true"]')
    assert pressed.all_inner_texts() == [name]
    return name


def test_a_head_opens_by_mouse_keyboard_and_map(open_report: OpenReport) -> None:
    report = open_report(made_up_census())
    page = report.page
    assert opened_head(page) == "L3H1"  # the clearest of the most telling kind
    page.get_by_role("button", name="L0H1", exact=True).click()
    assert opened_head(page) == "L0H1"
    assert page.inner_text("#census-name") == "L0H1: local, depends"
    # One stop of the tab key for all rows; arrows go on from there, past what is hidden.
    page.get_by_label("with verdict").select_option("no-op")
    page.get_by_role("button", name="operations").focus()
    page.keyboard.press("Tab")
    active = "document.activeElement.textContent"
    assert page.evaluate(active) == "L0H2"  # the stop it had, L0H0, is hidden
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(active) == "L3H0"
    page.keyboard.press("Enter")
    assert opened_head(page) == "L3H0"
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")  # there is none after the last
    assert page.evaluate(active) == "L3H2"
    page.keyboard.press("Space")
    assert opened_head(page) == "L3H2"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(active) == "operations"
    box = page.locator("#figure-kinds .heatmaplayer image").first.bounding_box()
    page.locator("#figure-kinds").scroll_into_view_if_needed()
    box = page.locator("#figure-kinds .nsewdrag").bounding_box()
    assert box is not None
    # Row 1 of 4 from below, column 0 of 3; beside the mark in its middle.
    page.mouse.click(box["x"] + box["width"] / 12, box["y"] + box["height"] * 5 / 8)
    assert opened_head(page) == "L1H0"
    page.wait_for_function(
        """() => {
          const view = document.getElementById("census-view").getBoundingClientRect();
          return view.top < innerHeight - 100;
        }"""
    )
    report.is_clean()


def test_the_head_that_opens_is_drawn_from_its_own_pattern(open_report: OpenReport) -> None:
    """Head i of a layer looks at the token i back: the dark squares are on that diagonal."""
    page = open_report(made_up_census()).page
    for back in range(3):
        page.get_by_role("button", name=f"L1H{back}", exact=True).click()
        opened_head(page)
        view = page.locator("#census-view > div:visible canvas")
        dark = view.evaluate(
            """(canvas) => {
              const pixels = window.__pixels(canvas);
              const dark = (x, y) => {
                const at = 4 * (Math.round(y) * canvas.width + Math.round(x));
                return pixels[at + 3] > 0 && pixels[at] < 60 && pixels[at + 2] > 120;
              };
              let [left, right, top, bottom] = [canvas.width, 0, canvas.height, 0];
              for (let y = 0; y < canvas.height; y += 1) {
                for (let x = 0; x < canvas.width; x += 1) {
                  if (!dark(x, y)) continue;
                  [left, right] = [Math.min(left, x), Math.max(right, x)];
                  [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
                }
              }
              return (right - left) / (bottom - top);
            }"""
        )
        # From the first column to the one `back` before the last, over all ten rows.
        assert dark == pytest.approx((10 - back) / 10, abs=0.03)


def test_embedded_triangles_equal_the_result() -> None:
    census = made_up_census()
    assert census.patterns is not None
    found = embedded(render(census))["census"]
    size, packed = found["size"], base64.b64decode(found["packed"])
    each = size * (size + 1) // 2
    heads = [(layer, head) for layer in (0, 1, 3) for head in range(3)]
    assert len(packed) == len(heads) * each and found["steps"] == 255 and size == 10
    for index, at in enumerate(heads):
        triangle = list(packed[index * each : (index + 1) * each])
        wanted = census.patterns[at]
        assert triangle == [int(wanted[q, k]) for q in range(size) for k in range(q + 1)]


def test_heads_whose_pattern_is_cut_off_cannot_be_opened(open_report: OpenReport) -> None:
    page = render(made_up_census())
    packed = embedded(page)["census"]["packed"]
    # Not even two heads of the nine are whole; and the one to open first is not among them.
    cut = page.replace(packed, base64.b64encode(base64.b64decode(packed)[:100]).decode())
    report = open_report(cut)
    assert report.page.locator("#census-table tbody button").all_inner_texts() == ["L0H0"]
    report.page.locator("#census-table tbody button").click()
    assert opened_head(report.page) == "L0H0"
    report.is_clean()


def test_thousands_of_heads_stay_small_and_usable(open_report: OpenReport) -> None:
    labels = tuple(f" word{index}" for index in range(64))
    census = made_up_census(labels, tiles=(16, 21))
    report = open_report(census)
    page = report.page
    assert report.path.stat().st_size < BIG
    patterns = embedded(report.path.read_text(encoding="utf-8"))["census"]
    assert 16 <= patterns["size"] < 64 and len(patterns["props"]["tokens"]) == patterns["size"]
    assert f"The first {patterns['size']} of 64 tokens" in page.inner_text("#census .paper")
    assert page.locator("#census-controls output").inner_text() == "3024 of 3024 heads"
    page.locator("#census-controls input").fill("L63H62")
    assert census_column(page, 0) == ["L63H62"]
    page.get_by_role("button", name="L63H62").click()
    assert opened_head(page) == "L63H62"
    page.get_by_role("button", name="zeroed").click()
    assert page.locator("#census-table tbody tr").first.inner_text().startswith("L3H1")
    assert page.locator(".kinds details").count() == 8  # names by the hundred are folded
    assert page.locator("#census-table tbody button[tabindex='0']").count() == 1
    report.is_clean()


def test_hostile_names_in_the_census(open_report: OpenReport) -> None:
    labels = (*HOSTILE, "a", "b", "c", "d")
    domains = (HOSTILE[0], HOSTILE[2], HOSTILE[3], HOSTILE[4])
    census = made_up_census(
        labels,
        domains,
        model=f"model {HOSTILE[0]}",
        unavailable={"rotary": HOSTILE[1], HOSTILE[3]: HOSTILE[5]},
        rotary=None,
    )
    report = open_report(census)
    page = report.page
    assert page.title() == f"Eye exam of model {HOSTILE[0]}"
    shown = [
        item.replace("\u2028", " ")
        for item in page.locator("#census .missing li").all_inner_texts()
    ]
    assert shown[0] == f"How heads use rotary frequencies: {HOSTILE[1]}"
    assert shown[1].startswith(f"{HOSTILE[3]}: &lt;i&gt;")
    changing = page.locator(".changing tbody tr td").all_inner_texts()
    assert changing[0] == HOSTILE[0] and changing[1] == ", ".join(domains[1:])
    ticks = page.locator("#figure-domains .xaxislayer-above text").all_text_contents()
    assert ticks == [*domains]
    assert (
        page.locator("#figure-domains :is(.xaxislayer-above a, .xaxislayer-above tspan)").count()
        == 0
    )
    page.locator("#figure-domains .heatmaplayer image").scroll_into_view_if_needed()
    box = page.locator("#figure-domains .nsewdrag").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 20, box["y"] + box["height"] / 2)
    page.wait_for_selector("#figure-domains .hoverlayer .hovertext")
    assert HOSTILE[0] in (page.locator("#figure-domains .hovertext").first.text_content() or "")
    page.get_by_role("button", name="L0H0", exact=True).click()
    assert opened_head(page) == "L0H0"
    assert f"{HOSTILE[2]} (2)" in page.evaluate("[...window.__drawn]")
    assert page.locator("main img, main a[href^=javascript], main b b").count() == 0
    report.is_clean()


def test_parts_of_a_census_that_are_not_there(open_report: OpenReport) -> None:
    census = made_up_census(
        domains=("text",) * 4,
        rotary=None,
        together=None,
        price=None,
        patterns=None,
        unavailable={"patterns": "too long", "price": "code of its own"},
    )
    report = open_report(census)
    page = report.page
    drawn = page.eval_on_selector_all("#census .js-plotly-plot", "all => all.map(p => p.id)")
    assert drawn == ["figure-kinds", "figure-costs"]
    assert page.locator("#census .missing li").all_inner_texts() == [
        "Attention of every head: too long",
        "What attention costs: code of its own",
    ]
    assert page.locator("#summary .tile .big").count() == 1
    assert page.locator("#census-table tbody button, #census-view").count() == 0
    assert "Texts of one domain cannot show it" in page.inner_text("#census")
    assert "opens" not in page.inner_text("#census")
    scripts = page.eval_on_selector_all("script:not([type])", "all => all.map(s => s.text.length)")
    assert len(scripts) == 2  # Plotly's and the page's own; nothing is there to draw attention
    page.get_by_role("button", name="zeroed").click()  # sorting does not need the attention
    assert census_column(page, 0)[0] == "L3H1"
    report.is_clean()


def test_a_price_without_a_set(open_report: OpenReport) -> None:
    page = open_report(made_up_census(together=None)).page
    assert page.locator("#census .facts tr").all_inner_texts() == [
        "operations of attention at 128 tokens\t3e+07",
        "keys and values\t7.5 MiB",
        "time of attention\t0.5 s",
        "time of the whole pass\t2 s",
    ]
    assert "Heads that can go together" not in page.locator("#census h3").all_inner_texts()
    assert page.locator("#summary .tile .big").all_inner_texts()[1:] == ["1"]  # no part of a set


def test_the_census_can_be_read_without_scripts(open_report: OpenReport) -> None:
    report = open_report(made_up_census(), java_script_enabled=False)
    page = report.page
    assert "switched off here" in page.inner_text("noscript >> nth=0")
    assert census_column(page, 0) == [f"L{layer}H{h}" for layer in (0, 1, 3) for h in range(3)]
    assert census_column(page, 2) == [verdict for row in VERDICTS for verdict in row if verdict]
    assert page.locator(".scripted:visible").count() == 0  # nothing that would do nothing


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_census_is_legible(open_report: OpenReport, scheme: str, width: int) -> None:
    viewport = {"width": width, "height": 800}
    report = open_report(made_up_census(), color_scheme=scheme, viewport=viewport)
    least = report.page.evaluate(LEAST_CONTRAST)
    assert least["ratio"] >= 4.5, least
    assert report.page.evaluate("document.documentElement.scrollWidth") <= width
    report.is_clean()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_legible_in_both_schemes(exam: Exam, open_report: OpenReport, scheme: str) -> None:
    report = open_report(exam, color_scheme=scheme)
    page = report.page
    least = page.evaluate(LEAST_CONTRAST)
    assert least["ratio"] >= 4.5, least
    page_is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != (
        "rgb(246, 247, 249)"
    )
    assert page_is_dark == (scheme == "dark")

    def figure_ink_is_page_ink() -> bool:
        return page.evaluate(
            """getComputedStyle(document.querySelector("#figure-residual .xtick text")).fill
               === getComputedStyle(document.body).color"""
        )

    assert figure_ink_is_page_ink()
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    page.wait_for_timeout(300)
    assert figure_ink_is_page_ink()
    report.is_clean()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_never_scrolls_sideways(exam: Exam, open_report: OpenReport, width: int) -> None:
    hostile = relabelled(exam, ("x" * 300,))
    page = open_report(hostile, viewport={"width": width, "height": 800}).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_two_sequences(llama: Any, open_report: OpenReport) -> None:
    report = open_report(eyechart.exam(llama, [TEXT, "Short."], lengths=(1, 2)))
    assert report.page.locator("#text .tokens").count() == 2
    assert "first of 2 sequences" in report.page.inner_text("#striking .note")
    report.is_clean()


@pytest.mark.parametrize("kind", ["exam", "flow", "heads"])
def test_the_same_result_gives_the_same_bytes(exam: Exam, tmp_path: Path, kind: str) -> None:
    whole = dataclasses.replace(exam, heads=made_up_census())
    result = {"exam": whole, "flow": made_up_flow(), "heads": made_up_census()}[kind]
    page = render(result)
    assert render(result) == page
    result.save(tmp_path / "result")
    assert render(open_result(tmp_path / "result")) == page


def test_the_summary_is_the_exam_s(exam: Exam, open_report: OpenReport) -> None:
    summary = exam.summary()
    text = open_report(exam).page.inner_text("#summary")
    assert f"{summary['sink_rate']['value']:.2f}" in text
    for key in ("sinks", "diagonal_heads", "previous_token_heads"):
        for head in summary[key]:
            assert head["head"] in text
            assert f"{head['mass']:.3f}" in text


def test_embedded_text_cannot_end_its_block() -> None:
    hostile = ["</script>", "<!--", "]]>", "&amp;", "\u2028\u2029", "\\", '"']
    text = json_text(hostile)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == hostile
    assert (
        script_text('a = "<SCRIPT></SCRIPT><!--";\r\n') == 'a = "<SCRIPT>\\x3C/SCRIPT>\\x3C!--";\n'
    )
