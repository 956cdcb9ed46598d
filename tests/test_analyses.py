"""Analyses: claim, number, verdict, data and figure; exit status tells whether the claim held."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

FOLDER = Path(__file__).parent.parent / "analyses"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name != "frame.py")


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_claim_holds_on_the_default_model(script, tmp_path):
    done = run(script, "--out", tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict  holds" in done.stdout
    said = json.loads((tmp_path / "verdict.json").read_text())
    assert said["holds"] is True and re.search(r"arXiv \d{4}\.\d{5}", said["claim"]["source"])
    assert said["versions"]["torch"] and len(said["weights"]) == 64
    assert not pd.read_csv(tmp_path / "data.csv").isna().any().any()
    assert "http-equiv" in (tmp_path / "figure.html").read_text() or (
        "Plotly.newPlot" in (tmp_path / "figure.html").read_text()
    )


def test_a_claim_that_fails_exits_with_one(tmp_path):
    script = FOLDER / "collapse_of_repeated_tokens.py"
    # Learned positions and random weights: repetitions stay as far apart as they were.
    done = run(script, "tiny-random-gpt2", "--out", tmp_path, "--device", "cpu")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DOES NOT HOLD" in done.stdout
    assert json.loads((tmp_path / "verdict.json").read_text())["holds"] is False


def test_what_cannot_be_tested_is_told_without_a_traceback(tmp_path):
    script = FOLDER / "collapse_of_repeated_tokens.py"
    done = run(script, "tiny-random-lama", "--out", tmp_path)
    assert done.returncode == 2 and "Did you mean" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
