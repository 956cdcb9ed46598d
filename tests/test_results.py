"""Results on disk: equal when opened again, whole or not at all."""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from censuses import made_up_census
from flows import made_up_flow
from hypothesis import given, settings
from hypothesis import strategies as st

import eyechart
from eyechart.attention import PatternProbe
from eyechart.errors import ResultError, UsageError
from eyechart.results import AttentionStatistics, CollapseCurve, Exam
from eyechart.results.figures import visible
from eyechart.results.files import ensure_writable, write_text_whole


@pytest.fixture(scope="module")
def results(llama):
    """One of each kind, on a padded batch with an awkward token."""
    texts = ["A line </script><b>of</b> text.", "Short."]
    (patterns,) = eyechart.capture(llama, texts, [PatternProbe([(1, 3), (0, 0)], ["a", "b"])])
    return {
        "attention": eyechart.attention_statistics(llama, texts),
        "residual": eyechart.residual_norms(llama, texts),
        "collapse": eyechart.collapse_curve(llama, lengths=(1, 4)),
        "patterns": patterns,
        "exam": eyechart.exam(llama, texts, lengths=(1, 4)),
        "flow": made_up_flow(unavailable={"alti": "</script>"}),
        "heads": made_up_census(domains=("</script>", "a", "a", "b")),
        "few heads": made_up_census(rotary=None, together=None, price=None, patterns=None),
    }


KINDS = ("attention", "residual", "collapse", "patterns", "exam", "flow", "heads", "few heads")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_result_opens_again_equal(results, kind, tmp_path):
    result = results[kind]
    assert result.save(tmp_path / "r") == tmp_path / "r"
    again = eyechart.open_result(tmp_path / "r")
    assert type(again) is type(result) and again == result
    assert eyechart.open_result(tmp_path / "r" / "manifest.json") == result
    assert type(result).open(tmp_path / "r") == result


def test_an_exam_of_before_there_was_a_flow_opens(results, tmp_path):
    results["exam"].save(tmp_path)
    manifest = tmp_path / "manifest.json"
    text = json.loads(manifest.read_text())
    del text["result"]["flow"]
    manifest.write_text(json.dumps(text))
    found = eyechart.open_result(tmp_path)
    assert found == dataclasses.replace(results["exam"], flow=None)
    assert "information_flow" not in found.summary()


def test_an_exam_of_before_there_was_a_census_opens(results, tmp_path):
    results["exam"].save(tmp_path)
    manifest = tmp_path / "manifest.json"
    text = json.loads(manifest.read_text())
    assert text["result"].pop("heads") is None
    manifest.write_text(json.dumps(text))
    found = eyechart.open_result(tmp_path)
    assert found == results["exam"] and "heads" not in found.summary()


def test_an_exam_carries_a_census(results, tmp_path):
    census = results["heads"]
    exam = Exam.of_heads(census)
    assert eyechart.open_result(exam.save(tmp_path)).heads == census
    assert exam.summary()["heads"] == census.summary() and exam.lines() == census.lines()


def test_the_census_s_summary_is_plain_json():
    census = made_up_census(unavailable={"rotary": "why"})
    assert census.together is not None
    never = dataclasses.replace(census.together, random_sizes=(0, 0), unseen_loss=None)
    summary = dataclasses.replace(census, together=never).summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["verdicts"] == {"no-op": 4, "active": 3, "depends": 2}
    assert summary["no_ops"][1] == {"head": "L1H1", "replacement": "identity"}
    assert summary["kinds"]["sink"] == ["L3H0", "L3H2"]
    assert list(summary["kinds"])[-1] == "mixed"
    assert summary["changing"] == [{"head": "L3H0", "dormant": "prose", "active": "code"}]
    # No random head fits, so that there is no factor.
    assert summary["together"]["factor"] is None and summary["together"]["unseen_loss"] is None
    assert summary["together"]["heads"] == ["L3H2", "L3H0", "L0H2"]
    assert summary["price"] == {"context": 128, "share": 0.25, "time": 0.8}
    assert summary["unavailable"] == {"rotary": "why"}
    few = made_up_census(together=None)  # a price of no set says nothing
    assert {"together", "price"}.isdisjoint(few.summary())
    assert not any("operations" in line for line in few.lines())


def test_the_census_s_table_has_one_row_a_head():
    frame = made_up_census().to_frame().set_index(["layer", "head"])
    assert len(frame) == 9 and 2 not in frame.index.get_level_values("layer")
    head = dict(frame.loc[(1, 1)])
    assert (head["kind"], head["verdict"], head["replacement"]) == ("diagonal", "no-op", "identity")
    costs = [head[name] for name in ("kl_identity", "kl_zero_high", "kl_first")]
    assert costs == pytest.approx([0.004, 0.06, math.nan], nan_ok=True)  # the last was not tried
    chosen = [at for at, row in frame.to_dict("index").items() if row["together"]]
    assert chosen == [(0, 2), (3, 0), (3, 2)]


def test_a_census_of_domains_that_nothing_tells_apart_finds_no_change():
    census = made_up_census(domains=("text",) * 4)
    assert len(census.changing()) == 0 and census.summary()["changing"] == []


def test_the_flow_s_summary_is_plain_json():
    kl = torch.zeros(1, 8)
    kl[0, 0] = 1.0  # the median is zero, and there is no ratio to it
    summary = made_up_flow(replacement_kl=kl, unavailable={"alti": "why"}).summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["u_shape"]["replacement_kl"] == [[None, None]]
    assert summary["unavailable"] == {"alti": "why"}


def test_equality_sees_every_number(results):
    result = results["attention"]
    changed = result.entropy.clone()
    changed[0, 0, 0, 3] += 1e-6
    assert dataclasses.replace(result, entropy=changed) != result
    assert dataclasses.replace(result, backend=("none", "none")) != result
    assert result != results["residual"]


def test_results_are_frozen(results):
    with pytest.raises(dataclasses.FrozenInstanceError):
        results["attention"].first = None


def test_saving_again_replaces_the_result_and_nothing_else(results, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    results["attention"].save(tmp_path)
    results["residual"].save(tmp_path)
    assert eyechart.open_result(tmp_path) == results["residual"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.glob("tensors-*.safetensors"))) == 1
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("stop_at", ["tensors", "manifest"])
def test_a_save_that_fails_midway_leaves_the_old_result(results, tmp_path, monkeypatch, stop_at):
    results["attention"].save(tmp_path)
    replace = Path.replace

    def refuse(self, target):
        if Path(target).name.startswith(stop_at):
            raise OSError("disk full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        results["exam"].save(tmp_path)
    monkeypatch.undo()
    assert eyechart.open_result(tmp_path) == results["attention"]


def _save_over_and_over(first, second, folder, ready):
    for turn in range(10_000):
        (first if turn % 2 else second).save(folder)
        ready.set()


def test_a_killed_save_leaves_one_of_the_two_results_whole(results, tmp_path):
    context = multiprocessing.get_context("fork")
    first, second = results["attention"], results["residual"]
    for pause in (0.0, 0.003, 0.007, 0.011):
        ready = context.Event()
        process = context.Process(target=_save_over_and_over, args=(first, second, tmp_path, ready))
        process.start()
        assert ready.wait(20)
        time.sleep(pause)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = eyechart.open_result(tmp_path)
        assert found in (first, second)


def test_what_is_damaged_or_foreign_is_refused_with_the_reason(results, tmp_path):
    with pytest.raises(ResultError, match="no saved result"):
        eyechart.open_result(tmp_path / "absent")
    results["attention"].save(tmp_path)
    with pytest.raises(ResultError, match="holds a AttentionStatistics, not a CollapseCurve"):
        CollapseCurve.open(tmp_path)
    (data,) = tmp_path.glob("tensors-*")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(ResultError, match="altered after it was saved"):
        eyechart.open_result(tmp_path)
    data.unlink()
    with pytest.raises(ResultError, match="cannot be read"):
        eyechart.open_result(tmp_path)
    manifest = tmp_path / "manifest.json"
    text = json.loads(manifest.read_text())
    for content, message in (
        ("{", "not an eyechart manifest"),
        ("[]", "not an eyechart manifest"),
        (json.dumps(text | {"format": 99}), "has format 99"),
    ):
        manifest.write_text(content)
        with pytest.raises(ResultError, match=message):
            eyechart.open_result(tmp_path)


def test_an_unknown_kind_names_the_known_ones(results, tmp_path):
    results["attention"].save(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("AttentionStatistics", "Horoscope"))
    with pytest.raises(ResultError, match=r"unknown kind of result 'Horoscope'.*CollapseCurve"):
        eyechart.open_result(tmp_path)


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(allow_nan=True, width=32), min_size=1, max_size=6))
def test_any_number_survives_the_disk(results, tmp_path_factory, values):
    base: AttentionStatistics = results["attention"]
    first = base.first.clone()
    first[0, 0, 0, : len(values)] = torch.tensor(values)
    result = dataclasses.replace(base, first=first)
    assert eyechart.open_result(result.save(tmp_path_factory.mktemp("r"))) == result


def test_shared_tokens_are_stored_once(results, tmp_path):
    from safetensors.torch import load_file

    results["exam"].save(tmp_path)
    (data,) = tmp_path.glob("tensors-*")
    names = list(load_file(data))
    assert sum(name.endswith("sequences/tokens") for name in names) == 2  # the text, the ones


def test_frames_hold_every_real_cell(results):
    frame = results["attention"].to_frame()
    assert len(frame) == 8 and set(frame.columns) >= {"layer", "head", "first", "entropy"}
    row = frame[(frame["layer"] == 1) & (frame["head"] == 2)].iloc[0]
    assert row["diagonal"] == pytest.approx(float(results["attention"].by_head("diagonal")[1, 2]))
    residual = results["residual"].to_frame()
    assert len(residual) == 3 * sum(results["residual"].sequences.lengths)
    assert not residual.isna().any().any()
    curve = results["collapse"].to_frame()
    assert len(curve) == 4 * 2 and list(curve["layer"].unique())[-1] == "final norm"
    patterns = results["patterns"].to_frame()
    totals = patterns.groupby(["batch", "layer", "head", "query"])["attention"].sum()
    assert totals.to_numpy() == pytest.approx(1, abs=1e-5)


def test_printing_is_readable_and_escaped(results):
    assert "sink rate" in repr(results["exam"])
    shown = dataclasses.replace(
        results["exam"], failures={"<img src=x onerror=1>": "why"}
    )._repr_html_()
    assert "<img" not in shown and "&lt;img" in shown


def test_figures_hold_the_numbers_and_no_markup(results):
    maps = results["attention"].plot()
    assert [list(map(len, trace.z)) for trace in maps.data] == [[4, 4]] * 4
    assert maps.data[0].z[1][2] == pytest.approx(
        float(results["attention"].by_head("first")[1, 2]), rel=1e-3
    )
    assert (maps.data[0].zmin, maps.data[0].zmax) == (0, 1)
    for kind in ("residual", "patterns"):
        assert "</script>" not in results[kind].plot().to_json()
        assert not any("<b>" in str(label) for label in results[kind].plot().data[0].x)
    (bold,) = (trace for trace in results["collapse"].plot().data if trace.name == "final norm")
    assert list(bold.x) == [1, 4]
    assert list(bold.y) == pytest.approx(results["collapse"].relative[-1].tolist(), rel=1e-3)


def test_a_failed_exam_has_no_table_but_says_why(results):
    broken = dataclasses.replace(
        results["exam"], attention=None, failures={"attention": "too long"}
    )
    assert "attention failed: too long" in repr(broken)
    assert broken.summary()["failures"] == {"attention": "too long"}
    assert "sinks" not in broken.summary()
    for method in (broken.to_frame, broken.plot):
        with pytest.raises(ResultError, match="see failures"):
            method()


def test_visible_shows_white_space_and_control_characters():
    assert visible(" a\n\tb\x00\u202e") == "·a⏎⇥b\\x00\\u202e"


def test_unwritable_folders_are_noticed(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot write to"):
        ensure_writable(tmp_path / "file" / "inside")
    written = write_text_whole(tmp_path / "deep" / "page.html", "é")
    assert written.read_text(encoding="utf-8") == "é"
    assert written.stat().st_mode & 0o044  # readable by others, as files usually are
