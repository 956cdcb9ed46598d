"""What the statistics of every head cost, beside what a user would run instead.

    python benchmarks/attention_statistics.py [--lengths 2048 8192] [--repeats 3] [--write]

Measures, on the default model in float32 and on English text:

- a plain forward pass of the same weights in transformers with its own SDPA attention, no logits;
- ``eyechart.attention_statistics`` with ``backend="fused"``, all default statistics, the same with
  six targets on top, and on the streamed kernel, as on a machine without a C compiler;
- ``backend="pattern"``;
- the same statistics in TransformerLens hooks on ``hook_pattern``, and after ``run_with_cache`` of
  all patterns.

Seconds are the best of the repeats, contenders taking turns in one process. Peak memory is that of
a process of its own for each, above what it holds with the model loaded. ``--write`` keeps the
result in ``benchmarks/results``. ``attention_statistics_gpu.py`` does the same for a GPU.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

RESULTS = Path(__file__).parent / "results"

Run = Callable[[torch.Tensor], Any]


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


def reductions(pattern: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The default statistics as a user would write them, one line each."""
    n = pattern.shape[-1]
    position = torch.arange(n, dtype=pattern.dtype)
    return (
        pattern[..., 0].clone(),
        pattern.diagonal(dim1=-2, dim2=-1).clone(),
        pattern.diagonal(offset=-1, dim1=-2, dim2=-1).clone(),
        -(pattern * (pattern + 1e-9).log()).sum(-1),
        pattern.amax(-1),
        position - pattern @ position,
        pattern.sum(-2) / torch.arange(n, 0, -1),
    )


def transformers_sdpa() -> Run:
    from transformers import AutoModelForCausalLM

    from eyechart.models import CATALOGUE, DEFAULT_MODEL

    model = AutoModelForCausalLM.from_pretrained(
        CATALOGUE[DEFAULT_MODEL].folder(), attn_implementation="sdpa", dtype=torch.float32
    ).eval()

    def run(ids: torch.Tensor) -> None:
        with torch.no_grad():
            model.model(ids, use_cache=False)

    return run


def bridge() -> Any:
    import eyechart

    return eyechart.load(device="cpu")


def fused(**options: Any) -> Run:
    import eyechart

    model = bridge()
    return lambda ids: eyechart.attention_statistics(model, ids, backend="fused", **options)


def fused_with_targets() -> Run:
    from eyechart import targets

    return fused(
        targets=[
            targets.First(4),
            targets.Window(16),
            targets.Window(128),
            targets.Delimiters(),
            targets.EarlierCopies(),
            targets.AfterEarlierCopies(),
        ]
    )


def streamed() -> Run:
    from eyechart.kernels import native
    from eyechart.kernels.trial import Kernel

    run = fused()

    def without_compiler(ids: torch.Tensor) -> None:
        compiled = native.kernel
        native.kernel = lambda: Kernel(None, "switched off for the benchmark")
        try:
            run(ids)
        finally:
            native.kernel = compiled

    return without_compiler


def pattern() -> Run:
    import eyechart

    model = bridge()
    return lambda ids: eyechart.attention_statistics(model, ids, backend="pattern")


def hooks() -> Run:
    model = bridge()

    def run(ids: torch.Tensor) -> None:
        kept: list[Any] = []
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
        reduce = [(name, lambda p, hook: kept.append(reductions(p))) for name in names]
        with torch.no_grad():
            model.run_with_hooks(ids, return_type=None, fwd_hooks=reduce)

    return run


def cache() -> Run:
    model = bridge()

    def run(ids: torch.Tensor) -> None:
        with torch.no_grad():
            _, cached = model.run_with_cache(
                ids, return_type=None, names_filter=lambda name: name.endswith("hook_pattern")
            )
        _ = [reductions(cached["pattern", layer]) for layer in range(model.cfg.n_layers)]

    return run


PLAIN, FUSED = "transformers, SDPA, nothing measured", "eyechart, fused"
CONTENDERS: dict[str, Callable[[], Run]] = {
    PLAIN: transformers_sdpa,
    FUSED: fused,
    "eyechart, fused, six targets": fused_with_targets,
    "eyechart, fused, no compiler": streamed,
    "eyechart, pattern": pattern,
    "hooks on hook_pattern": hooks,
    "run_with_cache of the patterns": cache,
}
LINEAR = (PLAIN, FUSED)
"""What is measured at the lengths after the first as well."""


def seconds(names: Sequence[str], length: int, repeats: int) -> dict[str, float]:
    """Best time of each, taking turns."""
    ids = text_ids(bridge(), length)
    runs = {name: CONTENDERS[name]() for name in names}
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


def peak(name: str, length: int) -> dict[str, int]:
    """Bytes above the loaded model, and of the whole process, at the peak of one run."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        f"import attention_statistics as b; b.measure_peak({name!r}, {length})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(name: str, length: int) -> None:
    ids = text_ids(bridge(), length)
    run = CONTENDERS[name]()
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


def equality(length: int) -> dict[str, float]:
    """Largest differences between the backends: float32 at that length, float64 at 256 tokens."""
    import eyechart
    from eyechart.results import MEASURED

    found: dict[str, float] = {}
    cases: list[tuple[Literal["float32", "float64"], int]] = [("float32", length), ("float64", 256)]
    for dtype, count in cases:
        model = eyechart.load(device="cpu", dtype=dtype)
        ids = text_ids(model, count)
        ours, theirs = (
            eyechart.attention_statistics(model, ids, backend=backend, accumulate=dtype)
            for backend in ("fused", "pattern")
        )
        masses = [n for n in MEASURED if n not in ("entropy", "distance")]
        for label, names in (("masses", masses), ("entropy", ["entropy"])):
            found[f"{label}, {dtype}, {count} tokens"] = max(
                float((getattr(ours, n) - getattr(theirs, n)).abs().max()) for n in names
            )
        relative = (ours.distance - theirs.distance).abs() / theirs.distance.clamp(min=1)
        found[f"distance, relative, {dtype}, {count} tokens"] = float(relative.max())
    return found


def half(count: int = 256) -> dict[str, float]:
    """Mean error of masses in bfloat16 against float64 of the very same weights, by backend."""
    import eyechart

    model = eyechart.load(device="cpu", dtype="bfloat16")
    truth = eyechart.load(device="cpu", dtype="float64")
    with torch.no_grad():
        pairs = zip(
            truth.original_model.parameters(), model.original_model.parameters(), strict=True
        )
        for wide, narrow in pairs:
            wide.copy_(narrow)
    ids = text_ids(model, count)
    exact = eyechart.attention_statistics(truth, ids, backend="pattern", accumulate="float64")
    seen: dict[int, torch.Tensor] = {}
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    keep: list[Any] = [(name, partial(_keep, seen, layer)) for layer, name in enumerate(names)]
    with torch.no_grad():
        model.run_with_hooks(ids, return_type=None, fwd_hooks=keep)
    rounded = torch.stack([seen[layer] for layer in sorted(seen)], dim=1).double()
    found = eyechart.attention_statistics(model, ids, backend="fused")
    errors: dict[str, float] = {}
    for name, raw in (
        ("first", rounded[..., 0]),
        ("diagonal", rounded.diagonal(dim1=-2, dim2=-1)),
        ("largest", rounded.amax(dim=-1)),
    ):
        true = getattr(exact, name)
        for where, layers in (("layer 0", slice(0, 1)), ("all layers", slice(None))):
            ours = (getattr(found, name)[:, layers].double() - true[:, layers]).abs().mean()
            theirs = (raw[:, layers] - true[:, layers]).abs().mean()
            errors[f"{name}, {where}: fused"] = float(ours)
            errors[f"{name}, {where}: hook_pattern"] = float(theirs)
    return errors


def _keep(seen: dict[int, torch.Tensor], layer: int, pattern: torch.Tensor, hook: Any) -> None:
    seen[layer] = pattern


def crossing(repeats: int = 5) -> dict[int, float]:
    """Time of the fused backend over that of the pattern, by length."""
    import eyechart

    model = bridge()
    found: dict[int, float] = {}
    for length in (16, 32, 64, 128, 256, 512):
        ids = text_ids(model, length)
        best = {}
        for _ in range(repeats):
            for backend in ("fused", "pattern"):
                start = time.perf_counter()
                eyechart.attention_statistics(model, ids, backend=backend)
                spent = time.perf_counter() - start
                best[backend] = min(best.get(backend, spent), spent)
        found[length] = best["fused"] / best["pattern"]
    return found


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
    return [
        *lines,
        "",
        f"Whole process of the fused run: {peaks[FUSED]['whole'] / 2**30:.2f} GiB.",
        "",
    ]


def environment() -> str:
    from eyechart.probes.provenance import versions

    said = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; {said}; "
        f"SmolLM2-135M-Instruct, float32, CPU, batch 1; nothing is drawn at random."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    page = ["# Cost of attention statistics", "", environment(), ""]
    data: dict[str, Any] = {"environment": environment()}
    for index, length in enumerate(given.lengths):
        names = list(CONTENDERS if index == 0 else LINEAR)
        times = seconds(names, length, given.repeats)
        peaks = {name: peak(name, length) for name in names}
        data[str(length)] = {"seconds": times, "peaks": peaks}
        page += table(length, times, peaks)
    data["equality"] = equality(given.lengths[0])
    data["half"] = half()
    data["fused over pattern"] = crossing()
    page += ["### Largest difference from the pattern backend", "", "| | |", "|---|---|"]
    page += [f"| {name} | {value:.1e} |" for name, value in data["equality"].items()]
    page += [
        "",
        "### bfloat16: mean error against float64, 256 tokens",
        "",
        "| | |",
        "|---|---|",
    ]
    page += [f"| {name} | {value:.1e} |" for name, value in data["half"].items()]
    page += ["", "### Time of fused over pattern, by length", "", "| tokens | |", "|---|---|"]
    page += [f"| {n} | {ratio:.2f} |" for n, ratio in data["fused over pattern"].items()]
    text = "\n".join([*page, ""])
    print(text)
    if given.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "attention_statistics.md").write_text(text, encoding="utf-8")
        (RESULTS / "attention_statistics.json").write_text(
            json.dumps(data, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
