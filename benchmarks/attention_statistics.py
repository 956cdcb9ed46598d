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
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from common import (
    PLAIN,
    Run,
    bridge,
    environment,
    peak,
    seconds,
    table,
    text_ids,
    transformers_sdpa,
    write,
)


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


FUSED = "eyechart, fused"
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
        times = seconds(CONTENDERS, names, length, given.repeats)
        peaks = {name: peak("attention_statistics", name, length) for name in names}
        data[str(length)] = {"seconds": times, "peaks": peaks}
        whole = peaks[FUSED]["whole"] / 2**30
        page += [*table(length, times, peaks), f"Whole process of the fused run: {whole:.2f} GiB."]
        page.append("")
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
        write("attention_statistics", text, data)


if __name__ == "__main__":
    main()
