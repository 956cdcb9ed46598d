"""What commands do alike: find model and prompt, show progress, keep results, tell failures."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from eyechart.errors import EyechartError, InputError, UsageError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from eyechart.report import Shown


def model_and_text(
    model: str | None,
    stdin: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    *,
    may_be_empty: bool = False,
) -> tuple[str | None, str | None]:
    """The model and the text that were asked for; None stands for those that come built in."""
    if model == "-":  # the prompt is piped in and the model left out
        model, stdin = None, "-"
    text = _prompt(stdin, prompt, prompt_file)
    if text is not None and not text.strip() and not may_be_empty:
        raise InputError("the prompt is empty: give at least one visible character.")
    return model, text


def opened(step: Callable[[str], object], model: str | None, **options: Any) -> "TransformerBridge":
    """The model, the default one where None was asked for; ``options`` are those of ``load``."""
    from eyechart.models import DEFAULT_MODEL, load

    name = model or DEFAULT_MODEL
    step(f"opening {name} (fetched and converted the first time)")
    return load(name, **options)


def _prompt(stdin: str | None, prompt: str | None, prompt_file: Path | None) -> str | None:
    """The prompt from wherever it was given; None where it was given nowhere."""
    if stdin not in (None, "-"):
        raise UsageError(f"unexpected argument {stdin!r}; give the prompt with --prompt TEXT")
    if sum(given is not None for given in (stdin, prompt, prompt_file)) > 1:
        raise UsageError("give the prompt once: --prompt, --prompt-file or '-'")
    if stdin == "-" or prompt_file == Path("-"):
        text = sys.stdin.read()
    elif prompt_file is not None:
        try:
            text = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise UsageError(
                f"cannot read {str(prompt_file)!r} as UTF-8 text: {problem}"
            ) from problem
    else:
        text = prompt
    return text


def kept(result: "Shown", out: Path) -> Path:
    """Save data and report; if the folder fails after all, save elsewhere rather than lose them."""
    from eyechart.report import write_report

    def keep(folder: Path) -> Path:
        result.save(folder)
        write_report(result, folder / "report.html")
        return folder

    try:
        return keep(out)
    except OSError as problem:
        folder = Path(tempfile.mkdtemp(prefix="eyechart-"))
        say(f"could not save to {str(out)!r} ({problem}); saving to {str(folder)!r} instead")
        return keep(folder)


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """Turn eyechart's own errors into a line on standard error and an exit status."""
    try:
        yield
    except EyechartError as problem:
        say(f"error: {problem}")
        raise typer.Exit(problem.exit_status) from None
    except (MemoryError, RuntimeError) as problem:
        # torch has its own, which must not be imported here just to be named.
        if type(problem).__name__ not in ("MemoryError", "OutOfMemoryError"):
            raise
        say("error: out of memory. Shorten the prompt, or use --dtype bfloat16.")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    """The step and the time so far, on standard error; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: None
        return
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("starting", total=None)
        yield lambda step: shown.update(task, description=f"{step} ...")


def stdout() -> Any:
    """A console for results."""
    from rich.console import Console

    # Outside a terminal nothing says how wide the reader's screen is: leave lines whole.
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def say(message: str) -> None:
    """Tell the user something on standard error."""
    typer.echo(f"eyechart: {message}", err=True)
