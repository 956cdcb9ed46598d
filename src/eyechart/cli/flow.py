"""``eyechart flow``: where one token's information comes from."""

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
    Prompt,
    PromptFile,
    Revision,
    Seed,
    Stdin,
    TrustRemoteCode,
)
from eyechart.cli.printing import print_exam
from eyechart.cli.running import kept, messages, model_and_text, opened, progress


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
    with messages():
        model, text = model_and_text(model, stdin, prompt, prompt_file)
        from eyechart.flow import information_flow
        from eyechart.results import Exam
        from eyechart.results.files import ensure_writable
        from eyechart.sequences import prepare

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
            folder = kept(result, out)
        print_exam(Exam.of_flow(result), folder, json_out)
        if folder != out:
            raise typer.Exit(1)
