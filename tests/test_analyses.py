"""Analyses: claim, number, verdict, data and figure; exit status tells whether the claim held.

Scripts are run in this process, on the model that all tests share: opening it anew for each takes
longer than half of them. That a script runs by itself, too, is shown by two.
"""

import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import eyechart
from eyechart.models import DEFAULT_MODEL, facts_of

FOLDER = Path(__file__).parent.parent / "analyses"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if "__main__" in path.read_text())
WITHOUT_MODEL = {"softmax_forgets_what_fades"}
ON_MODEL = [path for path in SCRIPTS if path.stem not in WITHOUT_MODEL]


@pytest.fixture
def run(default_model, monkeypatch, capsys):
    """Run a script as ``python script ...`` does; gives exit status, output and errors."""
    load = eyechart.load

    def opened(name, **options):
        if name == DEFAULT_MODEL:
            assert options == {"device": "cpu", "dtype": "float32"}  # as it was opened for all
            return default_model
        return load(name, **options)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(script), run_name="__main__")
        return left.value.code, *capsys.readouterr()

    monkeypatch.setattr(eyechart, "load", opened)
    monkeypatch.syspath_prepend(FOLDER)
    return run


def run_by_itself(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def state(model):
    """What an analysis must leave as it was: weights, mode, hooks, and what the model computes."""
    # A first pass comes first: the model hangs hooks of its own on itself when it is first run.
    with torch.no_grad():
        logits = model(torch.arange(2, 10)[None], return_type="logits")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    points = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values())
    return {
        "weights": facts_of(model).weights,
        "gradients wanted": sum(weight.requires_grad for weight in model.parameters()),
        "training": model.training,
        "hooks": hooks,
        "hook points in use": points,
        "logits": hashlib.sha256(logits.cpu().numpy().tobytes()).hexdigest(),
    }


def check(said, out, folder):
    """What every analysis writes, and that it holds."""
    assert said["holds"] is True and "verdict  holds" in out
    assert re.search(r"arXiv \d{4}\.\d{5}", said["claim"]["source"])
    assert said["versions"]["torch"]
    assert not pd.read_csv(folder / "data.csv").isna().any().any()
    assert "Plotly.newPlot" in (folder / "figure.html").read_text()


@pytest.mark.parametrize("script", ON_MODEL, ids=lambda path: path.stem)
def test_claim_holds_on_the_default_model(script, run, default_model, tmp_path):
    before = state(default_model)
    status, out, err = run(script, "--out", tmp_path, "--device", "cpu")
    assert status == 0, out + err
    said = json.loads((tmp_path / "verdict.json").read_text())
    check(said, out, tmp_path)
    assert said["model"] == facts_of(default_model).name and len(said["weights"]) == 64
    assert state(default_model) == before


@pytest.mark.parametrize("name", sorted(WITHOUT_MODEL))
def test_claim_about_no_model_holds(name, tmp_path):
    status, out, err = run_by_itself(FOLDER / f"{name}.py", "--out", tmp_path)
    assert status == 0, out + err
    said = json.loads((tmp_path / "verdict.json").read_text())
    check(said, out, tmp_path)
    assert "weights" not in said


def test_a_claim_that_fails_exits_with_one(tmp_path):
    script = FOLDER / "collapse_of_repeated_tokens.py"
    # Learned positions and random weights: repetitions stay as far apart as they were.
    status, out, err = run_by_itself(
        script, "tiny-random-gpt2", "--out", tmp_path, "--device", "cpu"
    )
    assert status == 1, out + err
    assert "DOES NOT HOLD" in out
    assert json.loads((tmp_path / "verdict.json").read_text())["holds"] is False


def test_what_cannot_be_tested_is_told_without_a_traceback(run, tmp_path):
    script = FOLDER / "collapse_of_repeated_tokens.py"
    status, out, err = run(script, "tiny-random-lama", "--out", tmp_path)
    assert status == 2 and "Did you mean" in err
    assert "Traceback" not in out + err and not list(tmp_path.iterdir())
