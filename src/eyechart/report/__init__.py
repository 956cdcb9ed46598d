"""The report: one HTML file of an exam or an information flow; it never runs a model."""

from pathlib import Path

from eyechart.report.page import render
from eyechart.results import Exam, InformationFlow
from eyechart.results.files import write_text_whole

__all__ = ["render", "write_report"]


def write_report(result: Exam | InformationFlow, path: Path) -> Path:
    """Write :func:`render`'s page to ``path``, whole or not at all; returns the path."""
    return write_text_whole(path, render(result))
