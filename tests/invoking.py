"""The command line, called in this process."""

from typer.testing import CliRunner, Result

from eyechart.cli import app


def run(*arguments: object, stdin: str | None = None) -> Result:
    """Invoke a command; an exception that is no deliberate exit fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
