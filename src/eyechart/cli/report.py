"""``eyechart report``: the page of a saved result, once more."""

from pathlib import Path
from typing import Annotated

import typer

from eyechart.cli.running import messages
from eyechart.errors import ResultError, UsageError


def report(
    result: Annotated[Path, typer.Argument(help="Folder of a saved exam, flow, census or study.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write.", show_default="report.html beside the data"),
    ] = None,
) -> None:
    """Write report.html again from saved data; runs no model."""
    with messages():
        from eyechart.report import Shown, write_report
        from eyechart.results import open_result

        target = out or (result if result.is_dir() else result.parent) / "report.html"
        found = open_result(result)
        if not isinstance(found, Shown):
            raise ResultError(
                f"{str(result)!r} holds a {type(found).__name__}; a report shows an Exam, an "
                "InformationFlow, a HeadCensus or a CollapseStudy."
            )
        try:
            typer.echo(write_report(found, target))
        except OSError as problem:
            raise UsageError(f"cannot write {str(target)!r}: {problem}") from problem
