"""``eyechart collapse``: which sequences, in which formats, become one and the same to a model."""

from pathlib import Path
from typing import Annotated

import typer

from eyechart.cli.options import (
    Bos,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Out,
    PromptFile,
    Revision,
    Stdin,
    TrustRemoteCode,
)
from eyechart.cli.printing import print_study
from eyechart.cli.running import kept, messages, model_and_text, opened, progress
from eyechart.errors import UsageError


def collapse(
    model: Model = None,
    stdin: Stdin = None,
    family: Annotated[
        list[str] | None,
        typer.Option(
            help="Which pairs of prompts, such as digits or bernoulli:p=0.9,seed=1; again for "
            "more. The ladder of formats takes the first.",
            show_default="repeat, digits, separated, separated:anchor=right, text",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="The n to measure, such as 1,2,5,10 or 1-2048.",
            show_default="1 to 500, as far as they fit",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Text in front of the sequences, such as a question.",
            show_default="asks how many ones there are",
        ),
    ] = None,
    prompt_file: PromptFile = None,
    no_prompt: Annotated[
        bool, typer.Option("--no-prompt", help="Nothing in front of the sequences.")
    ] = False,
    formats: Annotated[
        str | None,
        typer.Option(help="Number formats, such as bfloat16,int8.", show_default="all"),
    ] = None,
    ladder: Annotated[
        bool, typer.Option(help="Round parts of the model to coarser and coarser formats.")
    ] = True,
    rank: Annotated[
        bool, typer.Option(help="Measure how the tokens of a text become alike.")
    ] = True,
    out: Out = Path("collapse"),
    json_out: Json = False,
    bos: Bos = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    seed: Annotated[
        int, typer.Option(help="Of families that are drawn and were given no seed of their own.")
    ] = 0,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which prompts become the same to a model, and in which formats: print, save, report.

    Of each family two prompts that differ by little are compared at growing lengths n.
    """
    with messages():
        if no_prompt and (prompt or prompt_file or stdin):
            raise UsageError("give a prompt or --no-prompt, not both")
        model, text = model_and_text(model, stdin, prompt, prompt_file, may_be_empty=True)
        # Whatever can be wrong in what was typed is found out before the model is opened.
        wanted = None if lengths is None else _lengths(lengths)
        named = None if formats is None else [name.strip() for name in formats.split(",")]
        from eyechart.collapse import DEFAULT_FAMILIES, DEFAULT_PROMPT, collapse_study
        from eyechart.families import family_named
        from eyechart.precision import format_named
        from eyechart.results.files import ensure_writable

        families = [family_named(name, seed=seed) for name in family or DEFAULT_FAMILIES]
        for name in named or ():
            format_named(name)
        ensure_writable(out)
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
            result = collapse_study(
                bridge,
                families,
                wanted,
                ladder=ladder,
                rank=rank,
                prompt="" if no_prompt else DEFAULT_PROMPT if text is None else text,
                prepend_bos=bos,
                formats=named,
                on_step=step,
            )
            step("writing the report")
            folder = kept(result, out)
        print_study(result, folder, json_out)
        if result.failures or folder != out:
            raise typer.Exit(1)


def _lengths(written: str) -> list[int]:
    """``1,2,5-8`` as whole numbers, each once, in order."""
    found: set[int] = set()
    for part in written.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low = int(first)
            found |= set(range(low, (int(last) if dash else low) + 1)) or {0}
        except ValueError:
            found.add(0)
    if min(found) < 1:
        raise UsageError(f"lengths are positive, such as 1,2,5,10 or 1-2048, got {written!r}")
    return sorted(found)
