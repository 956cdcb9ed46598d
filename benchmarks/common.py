"""What the benchmarks on the default model share: text, the plain pass, time, peak memory, table.

A contender is a function without arguments that loads what it needs and returns a run; a run takes
token ids. A module keeps its contenders by name in ``CONTENDERS``.
"""

import ctypes
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PLAIN = "transformers, SDPA, nothing measured"

Run = Callable[[torch.Tensor], Any]
Contenders = Mapping[str, Callable[[], Run]]


def text_ids(model: Any, length: int) -> torch.Tensor:
    """English text of exactly that many tokens: the built-in prompt, its paragraphs numbered."""
    import eyechart

    paragraphs = "\n\n".join(f"{i}. {eyechart.sequences.BUILT_IN_PROMPT}" for i in range(1, 60))
    ids = eyechart.sequences.prepare(
        model,
        eyechart.sequences.from_ids(
            model, [eyechart.sequences.fragment(model, paragraphs)[:length]]
        ),
    ).tokens
    if ids.shape[1] != length:
        raise SystemExit(f"the text has only {ids.shape[1]} tokens")
    return ids


def transformers_sdpa(logits: bool = False) -> Run:
    from transformers import AutoModelForCausalLM

    from eyechart.models import CATALOGUE, DEFAULT_MODEL

    model = AutoModelForCausalLM.from_pretrained(
        CATALOGUE[DEFAULT_MODEL].folder(), attn_implementation="sdpa", dtype=torch.float32
    ).eval()

    def run(ids: torch.Tensor) -> None:
        with torch.no_grad():
            (model if logits else model.model)(ids, use_cache=False)

    return run


def bridge() -> Any:
    import eyechart

    return eyechart.load(device="cpu")


def seconds(
    contenders: Contenders, names: Sequence[str], length: int, repeats: int
) -> dict[str, float]:
    """Best time of each, taking turns."""
    ids = text_ids(bridge(), length)
    runs = {name: contenders[name]() for name in names}
    best = dict.fromkeys(names, float("inf"))
    for run in runs.values():
        run(ids[:, :64])  # rehearsal, compilation, allocator
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            start = time.perf_counter()
            run(ids)
            best[name] = min(best[name], time.perf_counter() - start)
            print(f"  {name}: {best[name]:.2f} s", file=sys.stderr, flush=True)
    return best


def peak(module: str, name: str, length: int) -> dict[str, int]:
    """Bytes above the loaded model, and of the whole process, at the peak of one run."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        f"import common; common.measure_peak({module!r}, {name!r}, {length})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(module: str, name: str, length: int) -> None:
    ids = text_ids(bridge(), length)
    run = importlib.import_module(module).CONTENDERS[name]()
    run(ids[:, :64])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that "above" is above something
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    run(ids)
    whole = _status("VmHWM")
    print(json.dumps({"above": whole - before, "whole": whole}))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("peak memory is measured on Linux only")


def table(length: int, times: dict[str, float], peaks: dict[str, dict[str, int]]) -> list[str]:
    """One length as Markdown."""
    lines = [
        f"### {length:,} tokens",
        "",
        "| | seconds | times the plain pass | peak above the model | times the plain pass |",
        "|---|---|---|---|---|",
    ]
    for name in times:
        above = peaks[name]["above"]
        lines.append(
            f"| {name} | {times[name]:.2f} | {times[name] / times[PLAIN]:.2f} | "
            f"{above / 2**20:,.0f} MiB | {above / peaks[PLAIN]['above']:.1f} |"
        )
    return [*lines, ""]


def environment(drawn: str = "nothing is drawn at random") -> str:
    from eyechart.probes.provenance import versions

    said = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; {said}; "
        f"SmolLM2-135M-Instruct, float32, CPU, batch 1; {drawn}."
    )


def write(name: str, text: str, data: dict[str, Any]) -> None:
    """Keep a page and its numbers in ``benchmarks/results``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
