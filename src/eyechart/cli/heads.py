"""``eyechart heads``: what every head looks at and is for."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from eyechart.cli.options import (
    Bos,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Out,
    Prompt,
    PromptFile,
    Revision,
    Stdin,
    TrustRemoteCode,
)
from eyechart.cli.printing import print_exam
from eyechart.cli.running import kept, messages, model_and_text, opened, progress, say


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
    with messages():
        model, text = model_and_text(model, stdin, prompt, prompt_file)
        from eyechart.heads import head_census
        from eyechart.results import Exam
        from eyechart.results.files import ensure_writable

        ensure_writable(out)
        unfinished = out / "unfinished"
        given = {"budget": budget, "tokens": tokens, "context": context}
        asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if joint_budget is not None:
            asked["joint_budget"] = joint_budget or None
        with progress() as step:
            bridge = opened(
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
                    say(f"finished layers are kept in {str(unfinished)!r}; run it again to go on")
                raise
            finally:
                with contextlib.suppress(OSError):  # not there, or layers are kept in it
                    unfinished.rmdir()
            step("writing the report")
            folder = kept(result, out)
        print_exam(Exam.of_heads(result), folder, json_out)
        if folder != out:
            raise typer.Exit(1)
