"""Arguments and options that commands have in common."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_SHOWN = "smollm2-135m-instruct"

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
