"""The report: one HTML file of an exam, a flow, a census or a study; it never runs a model."""

from pathlib import Path

from eyechart.report.page import Shown, render
from eyechart.results.files import write_text_whole

__all__ = ["Shown", "render", "write_report"]


def write_report(result: Shown, path: Path) -> Path:
    """Write :func:`render`'s page to ``path``, whole or not at all; returns the path."""
    return write_text_whole(path, render(result))
