"""``eyechart collapse``: what a user sees, and the exit status a script sees."""

import json
import re

import pytest
from collapses import made_up_study
from invoking import run

import eyechart
from eyechart.results import CollapseStudy
from eyechart.results.collapse_words import overview

TINY = "tiny-random-llama"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "collapse"


@pytest.fixture
def asked(monkeypatch):
    """What the command asks of a study, which is then one that no model made."""
    found: dict = {}

    def study(model, families, lengths, **options):
        found.update(options, families=families, lengths=lengths, model=model.cfg.model_name)
        options["on_step"]("repeat")
        return made_up_study(failures={})

    monkeypatch.setattr("eyechart.collapse.collapse_study", study)
    return found


def test_collapse_prints_saves_and_reports(out, monkeypatch):
    chosen = ["--lengths", "1,2,5-6", "--family", "repeat", "--family", "separated:every=2"]
    chosen += ["--formats", "bf16,int4"]
    done = run("collapse", TINY, *chosen, "--prompt", "Ones: ", "--out", out, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    found = eyechart.open_result(out)
    assert isinstance(found, CollapseStudy)
    assert [curve.family for curve in found.curves] == ["repeat", "separated left"]
    assert found.curves[0].lengths == (1, 2, 5, 6)
    assert found.ladder is not None and found.rank is not None
    assert "".join(found.curves[0].tokens(2)[0][1:]) == "Ones: 11"
    lines = done.stdout.splitlines()
    assert len(lines) < 25 and done.stderr == ""
    for curve in found.curves:
        (row,) = (line for line in lines if line.startswith(curve.family + " "))
        assert f"{float(curve.relative[-1, 0]):.3g}" in row
        assert f"{float(curve.relative[-1, -1]):.3g}" in row
    (row,) = (line for line in lines if line.startswith("bfloat16"))
    shares = [float(share) for share in re.findall(r"([\d.]+)%", row)]
    table = found.horizons().set_index(["format", "place"])["identical_last"]["bfloat16"]
    assert shares == pytest.approx([100 * share for share in table], abs=0.05)
    said = " ".join(done.stdout.split())
    assert overview(found.curves) in said and f"written to {out}/report.html" in said
    page = (out / "report.html").read_bytes()
    assert b"How representations collapse</h2>" in page and b"Every head</h2>" not in page
    monkeypatch.setattr("eyechart.models.load", lambda *_, **__: pytest.fail("opened a model"))
    (out / "report.html").unlink()
    assert run("report", out).exit_code == 0
    assert (out / "report.html").read_bytes() == page


def test_json_is_the_summary_whatever_is_not_a_number(out):
    # Without anything in front every repetition is the same: no onset, no slope, no horizon.
    chosen = ["--no-prompt", "--no-bos", "--no-ladder", "--no-rank", "--family", "repeat"]
    done = run("collapse", TINY, *chosen, "--lengths", "1-4", "--json", "--out", out)
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert said["model"] == TINY and said["folder"] == str(out) and said["failures"] == {}
    assert "nothing to collapse" in said["conclusion"]
    (family,) = said["families"]
    assert family["onset"] is family["control_last"] is None
    assert family["relative_last"] < 1e-6
    assert {row["place"] for row in said["horizons"]} == {"final"}
    found = eyechart.open_result(out)
    assert found.ladder is found.rank is None and found.curves[0].lengths == (1, 2, 3, 4)
    assert found.curves[0].tokens(2)[0] == ("1", "1")


def test_collapse_leaves_to_the_library_what_was_not_asked_for(out, asked):
    from eyechart.collapse import DEFAULT_FAMILIES, DEFAULT_PROMPT

    assert run("collapse", TINY, "--out", out).exit_code == 0
    assert len(asked["families"]) == len(DEFAULT_FAMILIES)
    assert asked["lengths"] is asked["formats"] is asked["prepend_bos"] is None
    assert asked["prompt"] == DEFAULT_PROMPT and asked["ladder"] and asked["rank"]


def test_collapse_passes_on_what_was_asked_for(out, asked):
    families = ["--family", "digits", "--family", "bernoulli:p=0.9,seed=1", "--seed", 7]
    flags = [
        "--no-ladder",
        "--no-rank",
        "--no-bos",
        "--lengths",
        "9,2-4",
        "--formats",
        "int8, bf16",
    ]
    done = run("collapse", TINY, "-", *families, *flags, "--out", out, stdin="Piped in")
    assert done.exit_code == 0, done.stderr
    # The seed is for those that have none of their own.
    assert [(each.name, each.seed) for each in asked["families"]] == [
        ("digits", 7),
        ("bernoulli 0.9", 1),
    ]
    assert asked["lengths"] == [2, 3, 4, 9] and asked["formats"] == ["int8", "bf16"]
    assert asked["prompt"] == "Piped in" and asked["prepend_bos"] is False
    assert not asked["ladder"] and not asked["rank"]


@pytest.mark.parametrize("arguments", [["--no-prompt"], ["--prompt", ""]])
def test_the_prompt_may_be_nothing(out, asked, arguments):
    assert run("collapse", TINY, *arguments, "--out", out).exit_code == 0
    assert asked["prompt"] == ""


def test_a_part_that_failed_is_told_and_the_rest_is_kept(out, monkeypatch):
    monkeypatch.setattr("eyechart.collapse.collapse_study", lambda *_, **__: made_up_study())
    done = run("collapse", TINY, "--out", out)
    assert done.exit_code == 1
    assert re.search(r"FAILED +text: give a longer one", done.stdout)
    assert isinstance(eyechart.open_result(out), CollapseStudy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "digit"], "unknown family 'digit'; there are repeat, digits, alternating"),
        (["--family", "digits:last"], "its options are last='1', seed=0"),
        (["--family", "bernoulli:p=2"], "p must be between 0 and 1"),
        (["--formats", "int3"], "unknown number format 'int3'; there are float64, float32"),
        (["--lengths", "1,two"], "such as 1,2,5,10 or 1-2048, got '1,two'"),
        (["--lengths", "5-2"], "lengths are positive"),
        (["--lengths", "0"], "lengths are positive"),
        (["--lengths", ""], "lengths are positive"),
        (["--prompt", "a", "--no-prompt"], "give a prompt or --no-prompt, not both"),
        (["--prompt", "a", "-"], "give the prompt once"),
    ],
)
def test_wrong_usage_is_told_before_the_model_is_opened(arguments, message, out, monkeypatch):
    monkeypatch.setattr("eyechart.models.load", lambda *_, **__: pytest.fail("opened a model"))
    done = run("collapse", TINY, *arguments, "--out", out, stdin="piped")
    assert done.exit_code == 2, done.output
    assert message in re.sub(r"\s+", " ", done.stderr)
    assert "Traceback" not in done.output and done.stdout == "" and not out.exists()


def test_what_does_not_fit_is_the_data_s_fault(out):
    done = run("collapse", TINY, "--family", "repeat", "--lengths", "9000", "--out", out)
    assert done.exit_code == 1 and "n can be at most" in done.stderr
