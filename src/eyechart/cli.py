"""The command line: arguments in, library call, print.

Results go to standard output, progress and messages to standard error. Exit status: 0 done, 1 the
model or the data failed, 2 wrong usage. Heavy imports wait until a command needs them.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import eyechart
from eyechart.errors import EyechartError, InputError, ResultError, UsageError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from eyechart.report import Shown
    from eyechart.results import Exam, HeadCensus

app = typer.Typer(
    name="eyechart",
    help="An eye exam for transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_SHOWN = "smollm2-135m-instruct"

_NAMED = 8
"""Heads of a kind that are printed by name."""

# What the commands that examine a model have in common.
Model = Annotated[
    str | None,
    typer.Argument(
        help="A name that `eyechart models` lists, a model folder, a .gguf file, or a name on "
        "the Hugging Face hub.",
        show_default=DEFAULT_SHOWN,
    ),
]
Stdin = Annotated[
    str | None, typer.Argument(metavar="[-]", help="'-' reads the prompt from standard input.")
]
Prompt = Annotated[str | None, typer.Option(help="Text to examine the model on.")]
PromptFile = Annotated[
    Path | None, typer.Option(help="UTF-8 file that holds the text; '-' is standard input.")
]
Out = Annotated[Path, typer.Option(help="Folder for report.html and the data.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos", help="Begin-of-sequence token in front; by default the model's way."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="Spread the model over devices, as in transformers.")
]
Seed = Annotated[
    int, typer.Option(help="Of random probes and replacement tokens of the information flow.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with it.")
]


@app.command()
def exam(
    model: Model = None,
    stdin: Stdin = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    out: Out = Path("exam"),
    json_out: Json = False,
    bos: Bos = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    seed: Seed = 0,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Examine a model on one prompt: print a summary, save the data, write report.html."""
    with _messages():
        model, text = _asked(model, stdin, prompt, prompt_file)
        from eyechart.examine import exam as run_exam
        from eyechart.results.files import ensure_writable

        ensure_writable(out)
        with _progress() as step:
            bridge = _open(
                step,
                model,
                device=device,
                dtype=dtype,
                device_map=device_map,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            result = run_exam(bridge, text, prepend_bos=bos, seed=seed, on_step=step)
            step("writing the report")
            folder = _keep(result, out)
        _print_exam(result, folder, json_out)
        if result.failures or folder != out:
            raise typer.Exit(1)


@app.command()
def flow(
    model: Model = None,
    stdin: Stdin = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    query: Annotated[
        int, typer.Option(help="Position whose representation is explained; -1 is the last.")
    ] = -1,
    layer: Annotated[
        int | None,
        typer.Option(
            help="Look at the stream out of this block.", show_default="the final norm's output"
        ),
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option(
            help="Pictures to take, such as rollout,alti,sensitivity.", show_default="all"
        ),
    ] = None,
    probes: Annotated[
        int,
        typer.Option(min=0, help="Random vectors behind the sensitivity; 0 for the exact one."),
    ] = 16,
    out: Out = Path("flow"),
    json_out: Json = False,
    bos: Bos = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    seed: Seed = 0,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show where one token's information comes from: print a summary, save, write report.html."""
    with _messages():
        model, text = _asked(model, stdin, prompt, prompt_file)
        from eyechart.flow import information_flow
        from eyechart.results import Exam
        from eyechart.results.files import ensure_writable
        from eyechart.sequences import prepare

        ensure_writable(out)
        with _progress() as step:
            bridge = _open(
                step,
                model,
                device=device,
                dtype=dtype,
                device_map=device_map,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            result = information_flow(
                bridge,
                prepare(bridge, text, prepend_bos=bos),
                query=query,
                layer=layer,
                measures=None
                if measures is None
                else [name.strip() for name in measures.split(",")],
                probes=probes or None,
                seed=seed,
                on_step=step,
            )
            step("writing the report")
            folder = _keep(result, out)
        _print_exam(Exam.of_flow(result), folder, json_out)
        if folder != out:
            raise typer.Exit(1)


@app.command()
def heads(
    model: Model = None,
    stdin: Stdin = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="KL in nats under which a replaced head is a no-op.", show_default="0.01"
        ),
    ] = None,
    joint_budget: Annotated[
        float | None,
        typer.Option(
            help="KL in nats that heads which go together may cost; 0 looks for none.",
            show_default="0.05",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Length of the texts on which heads are replaced.", show_default="48"),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens at which attention is priced.", show_default="2048, or the model's"
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Try every replacement on every head; several times as long."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            help="Keep finished layers in OUT/unfinished, so that an interrupted run goes on."
        ),
    ] = True,
    out: Out = Path("heads"),
    json_out: Json = False,
    bos: Bos = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    seed: Annotated[
        int, typer.Option(help="Of random tokens, resampling, random sets and bootstraps.")
    ] = 0,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Name every head, replace it to see what it is for, say which can go: print, save, report.

    Without a prompt it takes its own texts of several domains, which say more.
    """
    with _messages():
        model, text = _asked(model, stdin, prompt, prompt_file)
        from eyechart.heads import head_census
        from eyechart.results import Exam
        from eyechart.results.files import ensure_writable

        ensure_writable(out)
        unfinished = out / "unfinished"
        given = {"budget": budget, "tokens": tokens, "context": context}
        asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if joint_budget is not None:
            asked["joint_budget"] = joint_budget or None
        with _progress() as step:
            bridge = _open(
                step,
                model,
                device=device,
                dtype=dtype,
                device_map=device_map,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            try:
                result = head_census(
                    bridge,
                    text,
                    **asked,
                    screen=not everything,
                    prepend_bos=bos,
                    seed=seed,
                    resume=unfinished if resume else None,
                    on_step=step,
                )
            except KeyboardInterrupt:
                if resume and unfinished.exists():
                    _say(f"finished layers are kept in {str(unfinished)!r}; run it again to go on")
                raise
            finally:
                with contextlib.suppress(OSError):  # not there, or layers are kept in it
                    unfinished.rmdir()
            step("writing the report")
            folder = _keep(result, out)
        _print_exam(Exam.of_heads(result), folder, json_out)
        if folder != out:
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
    result: Annotated[Path, typer.Argument(help="Folder of a saved exam, flow or census.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write.", show_default="report.html beside the data"),
    ] = None,
) -> None:
    """Write report.html again from saved data; runs no model."""
    with _messages():
        from eyechart.report import Shown, write_report
        from eyechart.results import open_result

        target = out or (result if result.is_dir() else result.parent) / "report.html"
        found = open_result(result)
        if not isinstance(found, Shown):
            raise ResultError(
                f"{str(result)!r} holds a {type(found).__name__}; a report shows an Exam, an "
                "InformationFlow or a HeadCensus."
            )
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


def _asked(
    model: str | None, stdin: str | None, prompt: str | None, prompt_file: Path | None
) -> tuple[str | None, str | None]:
    """The model and the text that were asked for; None stands for those that come built in."""
    if model == "-":  # the prompt is piped in and the model left out
        model, stdin = None, "-"
    return model, _prompt(stdin, prompt, prompt_file)


def _open(step: Callable[[str], object], model: str | None, **options: Any) -> "TransformerBridge":
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
    if text is not None and not text.strip():
        raise InputError("the prompt is empty: give at least one visible character.")
    return text


def _keep(result: "Shown", out: Path) -> Path:
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
    lengths = said["tokens"]
    counted = ", ".join(map(str, lengths))
    if len(lengths) > 2 and len(set(lengths)) == 1:
        counted = f"{len(lengths)} × {lengths[0]}"
    table.add_row(
        "prompt",
        f"{escape(result.sequences.name)}, {counted} tokens"
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
    if result.flow is not None:
        for index, line in enumerate(result.flow.lines()):
            table.add_row("" if index else "information flow", escape(line))
    if result.heads is not None:
        for words, line in _said_of(result.heads):
            table.add_row(words, escape(line))
    for part, message in result.failures.items():
        table.add_row("FAILED", escape(f"{part}: {message}"), style="red")
    table.add_row("written to", escape(f"{folder / 'report.html'}"))
    _stdout().print(table)


def _said_of(census: "HeadCensus") -> Iterator[tuple[str, str]]:
    """A few heads of each kind by name, and what else the census says."""
    for kind, named in census.summary()["kinds"].items():
        more = f", and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        yield kind, f"{len(named)}: {' '.join(named[:_NAMED])}{more}"
    for index, line in enumerate(census.lines()[1:]):
        yield "" if index else "census", line


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
