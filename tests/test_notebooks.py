"""Notebooks: the pair in step, and every assertion inside met by a fresh kernel."""

from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_pair_is_in_step(source):
    left, right = (jupytext.read(source.with_suffix(suffix)) for suffix in (".py", ".ipynb"))
    cells = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (left, right)]
    assert cells[0] == cells[1], f"run: jupytext --sync {source}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_runs_and_asserts_its_numbers(source, tmp_path):
    book = jupytext.read(source)
    assert sum("assert " in cell.source for cell in book.cells) >= 3
    NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    figures = [
        output
        for cell in book.cells
        for output in cell.get("outputs", [])
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    assert figures
