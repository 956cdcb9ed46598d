"""What the README says runs, runs; what it points at is there."""

import re
from pathlib import Path

from typer.testing import CliRunner

from eyechart.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "exam" / "manifest.json").is_file()
    assert set(names["found"].backend) == {"fused"}  # type: ignore[attr-defined]
    assert len(names["norms"]) == 30  # type: ignore[arg-type]


def test_commands_and_options_exist():
    # Words only: Rich draws its boxes as wide as the terminal happens to be.
    for command, words in {
        "exam": ("--prompt", "--prompt-file", "--out", "--json", "--device", "--dtype"),
        "flow": ("--query", "--measures", "--probes", "--layer", "--out", "--json"),
        "heads": ("--budget", "--joint-budget", "--all", "--resume", "--out", "--json"),
        "collapse": ("--family", "--lengths", "--formats", "--out", "--json"),
        "models": ("--json",),
        "report": ("--out",),
    }.items():
        assert f"eyechart {command}" in README
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        assert all(word in shown for word in words), shown


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
