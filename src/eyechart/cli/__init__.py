"""The command line: arguments in, library call, print; a file a command.

Results go to standard output, progress and messages to standard error. Exit status: 0 done, 1 the
model or the data failed, 2 wrong usage. Heavy imports wait until a command needs them.
"""

from typing import Annotated

import typer

import eyechart
from eyechart.cli import collapse, exam, flow, heads, models, report
from eyechart.cli.options import DEFAULT_SHOWN

__all__ = ["DEFAULT_SHOWN", "app", "main"]

app = typer.Typer(
    name="eyechart",
    help="An eye exam for transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    exam.exam,
    flow.flow,
    heads.heads,
    collapse.collapse,
    models.models,
    report.report,
):
    app.command()(command)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"eyechart {eyechart.__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """An eye exam for transformers."""


def main() -> None:
    """Entry point of the ``eyechart`` program."""
    app()
