"""The command line: what a user sees, and the exit status a script sees."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from censuses import made_up_census
from invoking import run

import eyechart
from eyechart.attention import AttentionProbe
from eyechart.heads.partial import Partial
from eyechart.models import CATALOGUE, DEFAULT_MODEL
from eyechart.results import Exam, HeadCensus, InformationFlow
from eyechart.results.storage import same

TINY = "tiny-random-llama"
TEXT = "Some text to look at, and to look at again."
HOSTILE = "</script><img src=x onerror=alert(1)>[red]markup[/red]"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "exam"


def test_exam_prints_saves_and_reports(out):
    done = run("exam", TINY, "--prompt", "Some text to look at.", "--out", out, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    for words in (
        "sink rate",
        "strongest sinks",
        "diagonal heads",
        "previous-token heads",
        "collapse",
        "information flow",
    ):
        assert words in done.stdout
    assert re.search(r"L\dH\d 0\.\d{3}", done.stdout)
    assert len(done.stdout.splitlines()) < 25  # one screen
    assert done.stderr == ""  # no progress where there is no terminal
    found = eyechart.open_result(out)
    assert isinstance(found, Exam) and not found.failures
    assert "".join(found.sequences.labels[0][1:]) == "Some text to look at."
    assert (out / "report.html").stat().st_size < 10_000_000


def test_prompts_come_from_standard_input_or_a_file(out, tmp_path):
    (tmp_path / "text.txt").write_text("From a file: é", encoding="utf-8")
    for arguments, stdin, text in (
        (["-"], "From a pipe", "From a pipe"),
        (["--prompt-file", "-"], "Also from a pipe", "Also from a pipe"),
        (["--prompt-file", tmp_path / "text.txt"], None, "From a file: "),
    ):
        done = run("exam", TINY, *arguments, "--out", out, "--no-bos", stdin=stdin)
        assert done.exit_code == 0, done.stderr
        labels = eyechart.open_result(out).sequences.labels[0]
        assert "".join(labels).startswith(text)


def test_a_lone_dash_is_the_prompt_not_a_model(out, monkeypatch):
    monkeypatch.setattr("eyechart.models.DEFAULT_MODEL", TINY)
    assert run("exam", "-", "--out", out, "--no-bos", stdin="From a pipe").exit_code == 0
    found = eyechart.open_result(out)
    assert found.provenance.model == TINY and "".join(found.sequences.labels[0]) == "From a pipe"


def test_json_is_the_summary(out):
    done = run("exam", TINY, "--prompt", "abc", "--out", out, "--json", "--seed", 7)
    said = json.loads(done.stdout)
    assert said["model"] == TINY and said["tokens"] == [4] and said["failures"] == {}
    assert len(said["sinks"]) == 3 and said["folder"] == str(out)
    assert [row["truth"] for row in said["information_flow"]["agreement"]]
    found = eyechart.open_result(out)
    assert found.provenance.seed == found.flow.provenance.seed == 7


def test_flow_prints_saves_and_reports(out, monkeypatch):
    arguments = ["--query", -2, "--probes", 0, "--out", out, "--device", "cpu"]
    done = run("flow", TINY, "--prompt", "Some text to look at.", *arguments)
    assert done.exit_code == 0, done.stderr
    for words in ("rollout: ", "sensitivity: first token", "agreement with sensitivity", "written"):
        assert words in done.stdout
    assert len(done.stdout.splitlines()) < 25 and done.stderr == ""
    found = eyechart.open_result(out)
    assert isinstance(found, InformationFlow)
    assert "".join(found.sequences.labels[0][1:]) == "Some text to look at."
    assert found.query.tolist() == [found.sequences.lengths[0] - 2]
    assert found.probes is None and found.sensitivity is not None and found.target == "final norm"
    page = (out / "report.html").read_bytes()
    assert b"Where information comes from</h2>" in page and b"Every head</h2>" not in page
    monkeypatch.setattr("eyechart.models.load", lambda *_, **__: pytest.fail("opened a model"))
    (out / "report.html").unlink()
    assert run("report", out).exit_code == 0
    assert (out / "report.html").read_bytes() == page


def test_flow_measures_what_is_asked_for(out):
    asked = ["--measures", "rollout, sensitivity", "--layer", 0, "--probes", 3, "--seed", 7]
    done = run("flow", TINY, "-", *asked, "--no-bos", "--json", "--out", out, stdin="Piped in")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["tokens"] == [8] and said["folder"] == str(out)
    flow = said["information_flow"]
    assert flow["target"] == "layer 0" and flow["query"] == [7] and flow["unavailable"] == {}
    pairs = [(row["measure"], row["truth"]) for row in flow["agreement"]]
    assert pairs == [("attention", "sensitivity"), ("rollout", "sensitivity")]
    found = eyechart.open_result(out)
    assert found.probes == 3 and found.provenance.seed == 7
    assert found.alti is found.spread is found.sinks is found.replacement_kl is None


def test_flow_takes_the_built_in_text_and_the_default_model(out, monkeypatch):
    monkeypatch.setattr("eyechart.models.DEFAULT_MODEL", "handmade")
    monkeypatch.setattr("eyechart.sequences.BUILT_IN_PROMPT", "Hello.")
    load = eyechart.models.load
    opened = []

    def tiny(name, **options):
        opened.append(name)
        return load(TINY, **options)

    monkeypatch.setattr("eyechart.models.load", tiny)
    assert run("flow", "--measures", "rollout", "--out", out).exit_code == 0
    found = eyechart.open_result(out)
    assert opened == ["handmade"] and found.sequences.name == "built-in prompt"


def test_heads_prints_saves_and_reports(out, monkeypatch):
    done = run("heads", TINY, "--prompt", TEXT, "--out", out, "--device", "cpu", "--seed", 3)
    assert done.exit_code == 0, done.stderr
    found = eyechart.open_result(out)
    assert isinstance(found, HeadCensus) and found.provenance.seed == 3
    assert "".join(found.sequences.labels[0][1:]) == TEXT
    assert found.trials.texts.tokens.shape[1] == found.sequences.lengths[0]  # shorter than 48
    for words in (
        *(line[:40] for line in found.lines()[1:]),
        *found.summary()["kinds"],
        "8 heads are no-ops",
        "written to",
    ):
        assert words in done.stdout
    assert len(done.stdout.splitlines()) < 25 and done.stderr == ""
    assert sorted(p.suffix for p in out.iterdir()) == [".html", ".json", ".safetensors"]
    page = (out / "report.html").read_bytes()
    assert b"What every head is for</h2>" in page and b"Every head</h2>" not in page
    monkeypatch.setattr("eyechart.models.load", lambda *_, **__: pytest.fail("opened a model"))
    (out / "report.html").unlink()
    assert run("report", out).exit_code == 0
    assert (out / "report.html").read_bytes() == page


@pytest.fixture
def asked(monkeypatch):
    """What the command asks of a census, which is then one that no model made."""
    found: dict = {}

    def census(model, inputs, **options):
        found.update(options, inputs=inputs, model=model.cfg.model_name)
        options["on_step"]("names")
        return made_up_census()

    monkeypatch.setattr("eyechart.heads.head_census", census)
    return found


def test_heads_leaves_to_the_library_what_was_not_asked_for(out, asked):
    assert run("heads", TINY, "--out", out).exit_code == 0
    assert asked["inputs"] is None  # its own texts, not the built-in prompt
    assert asked["screen"] and asked["resume"] == out / "unfinished" and asked["seed"] == 0
    assert {"budget", "joint_budget", "tokens", "context"}.isdisjoint(asked)


def test_heads_passes_on_what_was_asked_for(out, asked):
    numbers = ["--budget", 0.02, "--joint-budget", 0.1, "--tokens", 32, "--context", 64]
    flags = ["--all", "--no-resume", "--no-bos", "--seed", 7]
    done = run("heads", TINY, "-", *numbers, *flags, "--out", out, stdin="Piped in")
    assert done.exit_code == 0, done.stderr
    assert callable(asked.pop("on_step")) and asked.pop("model")
    assert asked == {
        "inputs": "Piped in",
        "budget": 0.02,
        "joint_budget": 0.1,
        "tokens": 32,
        "context": 64,
        "screen": False,
        "prepend_bos": False,
        "seed": 7,
        "resume": None,
    }


def test_heads_need_not_look_for_a_set(out, asked):
    assert run("heads", TINY, "--joint-budget", 0, "--out", out).exit_code == 0
    assert asked["joint_budget"] is None


def test_heads_tells_kinds_set_and_price(out, asked):
    lines = run("heads", TINY, "--out", out).stdout.splitlines()
    said = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines[:11])
    assert said["prompt"].startswith("made-up texts, 4 × 10 tokens")
    assert said["sink"] == "2: L3H0 L3H2" and said["induction"] == "1: L3H1"
    assert said["census"].startswith("4 of 9 heads are no-ops")
    rest = "\n".join(lines[11:])
    for words in (
        "3 heads can go at once for 0.030 nats (2.0 times as many as at random)",
        "at 128 tokens they are 25% of the operations of attention",
        "heads sleep on one domain and work on another",
    ):
        assert words in rest


def test_heads_in_json_are_the_summary(out, asked):
    said = json.loads(run("heads", TINY, "--out", out, "--json").stdout)
    assert said["model"] == "made-up" and said["folder"] == str(out)
    assert said["heads"] == made_up_census().summary()


def test_an_interrupted_census_goes_on_where_it_was(out, tmp_path, monkeypatch):
    arguments = ["heads", TINY, "--prompt", TEXT, "--device", "cpu", "--out"]
    assert run(*arguments, tmp_path / "whole", "--no-resume").exit_code == 0
    whole = eyechart.open_result(tmp_path / "whole")
    keep = Partial.keep

    def interrupted(self, layer, found):
        keep(self, layer, found)
        raise KeyboardInterrupt

    monkeypatch.setattr(Partial, "keep", interrupted)
    done = run(*arguments, out)
    assert done.exit_code == 130 and "run it again to go on" in done.stderr
    assert len(list((out / "unfinished").iterdir())) == 1 and not (out / "report.html").exists()
    layers = []

    def counted(self, layer, found):
        layers.append(layer)
        keep(self, layer, found)

    monkeypatch.setattr(Partial, "keep", counted)
    assert run(*arguments, out).exit_code == 0
    assert len(layers) == 1  # of two
    assert not (out / "unfinished").exists()
    resumed = dataclasses.replace(eyechart.open_result(out).trials, passes=whole.trials.passes)
    assert same(resumed, whole.trials)


def test_report_is_made_again_from_the_data_alone(out, tmp_path, monkeypatch):
    assert run("exam", TINY, "--prompt", "abc", "--out", out).exit_code == 0
    first = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    monkeypatch.setattr("eyechart.models.load", lambda *_, **__: pytest.fail("opened a model"))
    assert run("report", out).exit_code == 0
    assert (out / "report.html").read_bytes() == first
    assert run("report", out, "--out", tmp_path / "other.html").exit_code == 0
    assert (tmp_path / "other.html").read_bytes() == first


def test_report_of_something_else(out, llama, tmp_path):
    eyechart.residual_norms(llama, "abc").save(out)
    done = run("report", out)
    assert done.exit_code == 1 and "holds a ResidualNorms; a report shows" in done.stderr
    done = run("report", tmp_path / "absent")
    assert done.exit_code == 1 and "no saved result" in done.stderr


def test_models_lists_the_catalogue():
    done = run("models")
    assert done.exit_code == 0 and DEFAULT_MODEL in done.stdout and TINY in done.stdout
    said = json.loads(run("models", "--json").stdout)
    assert {row["name"] for row in said["catalogue"]} == set(CATALOGUE)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["exam", TINY, "--prompt", ""], 1, "the prompt is empty"),
        (["exam", TINY, "--prompt", "x" * 600], 1, "sees at most 512"),
        (["exam", "smollm2-135m-instrct"], 2, "Did you mean smollm2-135m-instruct"),
        (["exam", "somebody/some-model"], 1, "hub cannot be reached"),
        (["exam", TINY, "--device", "cuda:99"], 2, "CUDA devices here"),
        (["exam", TINY, "--dtype", "int3"], 2, "unknown dtype 'int3'"),
        (["exam", TINY, "--prompt", "a", "-"], 2, "give the prompt once"),
        (["exam", TINY, "text"], 2, "unexpected argument 'text'"),
        (["exam", TINY, "--prompt-file", "absent.txt"], 2, "cannot read 'absent.txt'"),
        (["exam", TINY, "--wrong"], 2, "No such option"),
        (["flow", TINY, "--prompt", "abc", "--measures", "rolout"], 2, "unknown measures 'rolout'"),
        (["flow", TINY, "--prompt", "abc", "--query", "9"], 2, "a sequence has 4 tokens"),
        (["flow", TINY, "--prompt", "abc", "--layer", "9"], 2, "layers 0 to 1"),
        (["flow", TINY, "--probes", "-1"], 2, "greater than or equal to 0"),
        (["flow", TINY, "--prompt", ""], 1, "the prompt is empty"),
        (["heads", TINY, "--prompt", ""], 1, "the prompt is empty"),
        (["heads", TINY, "--prompt", "abc"], 1, "give at least 8 tokens"),
        (["heads", TINY, "--prompt", TEXT, "--budget", "0"], 2, "budget must be positive"),
        (["heads", TINY, "--prompt", TEXT, "--tokens", "7"], 2, "tokens must be at least 8"),
        (["look"], 2, "No such command"),
    ],
)
def test_wrong_calls_end_with_a_message_and_a_status(arguments, status, message, out):
    if arguments[0] in ("exam", "flow", "heads"):
        arguments = [*arguments, "--out", out]
    done = run(*arguments, stdin="piped")
    assert done.exit_code == status, done.output
    assert message in re.sub(r"\s+", " ", done.stderr.replace("│", ""))
    assert "Traceback" not in done.output and done.stdout == ""


def test_an_unwritable_output_is_noticed_before_the_model_is_opened(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("eyechart.models.load", lambda *_, **__: pytest.fail("opened a model"))
    done = run("exam", TINY, "--prompt", "abc", "--out", tmp_path / "file" / "inside")
    assert done.exit_code == 2 and "cannot write to" in done.stderr


def test_a_folder_that_fails_at_the_end_loses_nothing(out, monkeypatch):
    save = Exam.save

    def full(self, path):
        if Path(path) == out:
            raise OSError("No space left on device")
        return save(self, path)

    monkeypatch.setattr(Exam, "save", full)
    done = run("exam", TINY, "--prompt", "abc", "--out", out)
    assert done.exit_code == 1 and "No space left on device" in done.stderr
    elsewhere = re.search(r"written to\s+(\S+)report\.html", done.stdout)
    assert elsewhere is not None
    assert isinstance(eyechart.open_result(elsewhere[1]), Exam)


@pytest.mark.parametrize(
    ("function", "step", "part"),
    [("collapse_curve", "collapse", "collapse"), ("information_flow", "information flow", "flow")],
)
def test_a_failed_step_is_told_and_the_rest_is_kept(out, monkeypatch, function, step, part):
    def fail(*_, **__):
        raise eyechart.EyechartError("this step failed on purpose")

    monkeypatch.setattr(f"eyechart.examine.{function}", fail)
    done = run("exam", TINY, "--prompt", "abc", "--out", out)
    assert done.exit_code == 1
    assert f"{step}: this step failed on purpose" in done.stdout
    found = eyechart.open_result(out)
    assert getattr(found, part) is None and found.attention is not None
    assert "this step failed on purpose" in (out / "report.html").read_text(encoding="utf-8")


def test_when_heads_fail_the_stream_is_kept(llama):
    def no_memory(pattern, hook):
        raise RuntimeError("not enough memory for n x n")

    with (
        llama.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", no_memory)]),
        pytest.raises(eyechart.EyechartError, match="every step of the exam failed"),
    ):
        eyechart.exam(llama, "abc")

    def unable(self, activation, look):
        raise RuntimeError("not enough memory for n x n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionProbe, "observe", unable)
        found = eyechart.exam(llama, "abc")
    assert found.attention is None and found.residual is not None and found.collapse is not None
    assert list(found.failures) == ["attention"]
    assert found.residual.provenance.forward_passes == 1 and found.collapse.forward_passes == 2
    assert found.flow is not None


def test_hostile_prompts_are_printed_as_text(out):
    done = run("exam", TINY, "--prompt", HOSTILE, "--out", out)
    assert done.exit_code == 0
    assert eyechart.open_result(out).sequences.labels[0][1] == "<"


def test_nan_weights_are_told_without_a_traceback(tmp_path, out):
    from safetensors.torch import load_file, save_file

    source = CATALOGUE[TINY].folder()
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = run("exam", tmp_path, "--prompt", "abc", "--out", out)
    assert done.exit_code == 1 and "model.layers.0.self_attn.q_proj.weight" in done.stderr


def test_the_program_itself(tmp_path):
    """As a user's shell runs it: a process of its own, the default model, the built-in prompt."""
    done = subprocess.run(
        [sys.executable, "-m", "eyechart", "exam", "--out", "here", "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "L11H6" in done.stdout and "built-in prompt, 185 tokens" in done.stdout
    assert "Traceback" not in done.stderr
    assert sorted(p.suffix for p in (tmp_path / "here").iterdir()) == [
        ".html",
        ".json",
        ".safetensors",
    ]
    version = subprocess.run(
        [sys.executable, "-m", "eyechart", "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout.strip() == f"eyechart {eyechart.__version__}"
