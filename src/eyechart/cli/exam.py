"""``eyechart exam``: all that one prompt allows."""

from pathlib import Path

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
    with messages():
        model, text = model_and_text(model, stdin, prompt, prompt_file)
        from eyechart.examine import exam as run_exam
        from eyechart.results.files import ensure_writable

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
            result = run_exam(bridge, text, prepend_bos=bos, seed=seed, on_step=step)
            step("writing the report")
            folder = kept(result, out)
        print_exam(result, folder, json_out)
        if result.failures or folder != out:
            raise typer.Exit(1)
