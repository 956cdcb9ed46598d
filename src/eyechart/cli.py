"""The command line: arguments in, library call, print.

Results go to standard output, progress and messages to standard error. Exit status: 0 done, 1 the
model or the data failed, 2 wrong usage. Heavy imports wait until a command needs them.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import eyechart
from eyechart.errors import EyechartError, InputError, UsageError

if TYPE_CHECKING:
    from eyechart.results import Exam

app = typer.Typer(
    name="eyechart",
    help="An eye exam for transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_SHOWN = "smollm2-135m-instruct"

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def exam(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A name that `eyechart models` lists, a model folder, a .gguf file, or a name on "
            "the Hugging Face hub.",
            show_default=DEFAULT_SHOWN,
        ),
    ] = None,
    stdin: Annotated[
        str | None, typer.Argument(metavar="[-]", help="'-' reads the prompt from standard input.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to examine the model on.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file that holds the text; '-' is standard input.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and the data.")] = Path("exam"),
    json_out: Json = False,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Begin-of-sequence token in front; by default the model's way."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model over devices, as in transformers.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Recorded; nothing in an exam is drawn at random.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with it.")
    ] = False,
) -> None:
    """Examine a model on one prompt: print a summary, save the data, write report.html."""
    with _messages():
        if model == "-":  # the prompt is piped in and the model left out
            model, stdin = None, "-"
        text = _prompt(stdin, prompt, prompt_file)
        from eyechart.examine import exam as run_exam
        from eyechart.models import DEFAULT_MODEL, load
        from eyechart.results.files import ensure_writable

        ensure_writable(out)
        with _progress() as step:
            name = model or DEFAULT_MODEL
            step(f"opening {name} (fetched and converted the first time)")
            bridge = load(
                name,
                device=device,
                dtype=dtype,
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                revision=revision,
            )
            result = run_exam(bridge, text, prepend_bos=bos, seed=seed, on_step=step)
            step("writing the report")
            folder = _keep(result, out)
        _print_exam(result, folder, json_out)
        if result.failures or folder != out:
            raise typer.Exit(1)


@app.command()
def models(json_out: Json = False) -> None:
    """List the models that can be opened without a hub, and those already in the caches."""
    with _messages():
        from eyechart.models import listing
        from eyechart.models.hub import cached_on_hub

        rows, hub = listing(), cached_on_hub()
        if json_out:
            typer.echo(json.dumps({"catalogue": rows, "hub_cache": hub}, indent=1))
            return
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in ("model", "cached", "what it is"):
            table.add_column(column)
        for row in rows:
            table.add_row(row["name"], "yes" if row["cached"] else "-", row["about"])
        for name in hub:
            table.add_row(name, "yes", "in the Hugging Face cache; opens if it is causal")
        _stdout().print(table)
        _stdout().print(
            "\nAlso any folder in Hugging Face format, .gguf file, or name on the hub.", style="dim"
        )


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="Folder of a saved exam.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write.", show_default="report.html beside the data"),
    ] = None,
) -> None:
    """Write report.html again from a saved exam; runs no model."""
    with _messages():
        from eyechart.report import write_report
        from eyechart.results import Exam

        target = out or (result if result.is_dir() else result.parent) / "report.html"
        found = Exam.open(result)
        try:
            typer.echo(write_report(found, target))
        except OSError as problem:
            raise UsageError(f"cannot write {str(target)!r}: {problem}") from problem


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
    if text is not None and not text.strip():
        raise InputError("the prompt is empty: give at least one visible character.")
    return text


def _keep(result: "Exam", out: Path) -> Path:
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
        _say(f"could not save to {str(out)!r} ({problem}); saving to {str(folder)!r} instead")
        return keep(folder)


def _print_exam(result: "Exam", folder: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.summary() | {"folder": str(folder)}, indent=1))
        return
    from rich.markup import escape
    from rich.table import Table

    from eyechart.results import LEADERS

    said = result.summary()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    source = result.provenance
    table.add_row("model", f"{escape(said['model'])}, {source.dtype} on {source.device}")
    table.add_row(
        "prompt",
        f"{escape(result.sequences.name)}, {', '.join(map(str, said['tokens']))} tokens"
        f"{', begin-of-sequence token in front' if result.sequences.prepend_bos else ''}",
    )
    if "sink_rate" in said:
        rate = said["sink_rate"]
        table.add_row(
            "sink rate",
            f"{rate['value']:.2f} of heads give the first token more than {rate['eps']} "
            f"(first {rate['length']} tokens)",
        )
        for _, key, words in LEADERS:
            heads = "   ".join(f"{item['head']} {item['mass']:.3f}" for item in said[key])
            table.add_row(words, heads)
    if result.residual is not None:
        stream = result.residual.lines()
        table.add_row("residual stream", escape(stream[0]))
        table.add_row("", escape(stream[1]))
    if result.collapse is not None:
        for words, line in zip(("collapse", ""), result.collapse.lines(), strict=True):
            table.add_row(words, escape(line))
    for part, message in result.failures.items():
        table.add_row("FAILED", escape(f"{part}: {message}"), style="red")
    table.add_row("written to", escape(f"{folder / 'report.html'}"))
    _stdout().print(table)


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Turn eyechart's own errors into a line on standard error and an exit status."""
    try:
        yield
    except EyechartError as problem:
        _say(f"error: {problem}")
        raise typer.Exit(problem.exit_status) from None
    except (MemoryError, RuntimeError) as problem:
        # torch has its own, which must not be imported here just to be named.
        if type(problem).__name__ not in ("MemoryError", "OutOfMemoryError"):
            raise
        _say("error: out of memory. Shorten the prompt, or use --dtype bfloat16.")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A spinner that names the step, on standard error; nothing where that is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: None
        return
    with console.status("starting") as status:
        yield lambda step: status.update(f"{step} ...")


def _stdout() -> Any:
    from rich.console import Console

    # Outside a terminal nothing says how wide the reader's screen is: leave lines whole.
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _say(message: str) -> None:
    typer.echo(f"eyechart: {message}", err=True)
