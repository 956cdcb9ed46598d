"""What the flow of information costs, beside what a user would run instead.

    python benchmarks/flow.py [--lengths 2048 8192] [--probe-length 512] [--repeats 3] [--write]

Measures, on the default model in float32 and on English text:

- a plain forward pass of the same weights in transformers with its own SDPA attention, no logits
  (beside the sensitivity also with the logits of every token, as a plain call makes them);
- ``eyechart.information_flow`` with rollout and path bound; at the first length beside it the
  rollout alone, and the same from the head means of all patterns, kept in TransformerLens hooks
  and multiplied as whole matrices;
- at ``--probe-length`` tokens, the sensitivity from 16 random vectors, beside a backward pass of
  torch through TransformerBridge for each of them.

Aims: 2 times the plain pass for the first at 8,192 tokens, 20 times for the sensitivity. Seconds
are the best of the repeats, contenders taking turns in one process. Peak memory is that of a
process of its own for each, above what it holds with the model loaded. ``--write`` keeps the
result in ``benchmarks/results``.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

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

PROBES, SEED = 16, 0


def rollout(*others: str) -> Run:
    import eyechart

    model = bridge()
    return lambda ids: eyechart.information_flow(model, ids, measures=("rollout", *others))


def whole_matrices() -> Run:
    model = bridge()
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]

    def run(ids: torch.Tensor) -> torch.Tensor:
        kept: dict[str, torch.Tensor] = {}

        def keep(pattern: torch.Tensor, hook: Any) -> None:
            kept[hook.name] = pattern[0].mean(dim=0)

        with torch.no_grad():
            model.run_with_hooks(ids, return_type=None, fwd_hooks=[(n, keep) for n in names])
            product = identity = torch.eye(ids.shape[1])
            for name in names:
                product = (kept[name] + identity) / 2 @ product
        return product[-1]

    return run


def sensitivity() -> Run:
    import eyechart

    model = bridge()
    return lambda ids: eyechart.information_flow(
        model, ids, measures=("sensitivity",), probes=PROBES, seed=SEED
    )


def autograd() -> Run:
    model = bridge()

    def run(ids: torch.Tensor) -> torch.Tensor:
        seen: dict[str, torch.Tensor] = {}

        def start(stream: torch.Tensor, hook: Any) -> torch.Tensor:
            seen["embedding"] = stream.detach().requires_grad_()
            return seen["embedding"]

        def read(normed: torch.Tensor, hook: Any) -> None:
            seen["last"] = normed[0, -1]

        model.run_with_hooks(
            ids,
            return_type=None,
            fwd_hooks=[("blocks.0.hook_resid_pre", start), ("ln_final.hook_out", read)],
        )
        generator = torch.Generator().manual_seed(SEED)
        squares = torch.zeros(ids.shape[1])
        for _ in range(PROBES):
            u = torch.randn(seen["last"].shape, generator=generator)
            (gradient,) = torch.autograd.grad(
                seen["last"] @ u, seen["embedding"], retain_graph=True
            )
            squares += gradient[0].square().sum(dim=-1)
        return (squares / PROBES).sqrt()

    return run


LOGITS = "transformers, SDPA, logits of every token as well"
BOTH, ROLLOUT = "eyechart, rollout and path bound", "eyechart, rollout alone"
MATRICES = "whole head-mean matrices, multiplied"
SENSITIVITY, AUTOGRAD = f"eyechart, {PROBES} probes", f"{PROBES} backward passes of the bridge"
CONTENDERS: dict[str, Callable[[], Run]] = {
    PLAIN: transformers_sdpa,
    LOGITS: partial(transformers_sdpa, logits=True),
    BOTH: partial(rollout, "path_bound"),
    ROLLOUT: rollout,
    MATRICES: whole_matrices,
    SENSITIVITY: sensitivity,
    AUTOGRAD: autograd,
}


def agreement(length: int, probe_length: int) -> dict[str, float]:
    """That the contenders computed the same thing, for the rollout to rounding."""
    model = bridge()
    ids = text_ids(model, length)
    ours, theirs = CONTENDERS[ROLLOUT]()(ids), CONTENDERS[MATRICES]()(ids)
    found = {
        f"largest difference of the rollout, {length} tokens": float(
            (ours.by_position("rollout")[0] - theirs).abs().max()
        )
    }
    ids = text_ids(model, probe_length)
    norms, plain = CONTENDERS[SENSITIVITY]()(ids), CONTENDERS[AUTOGRAD]()(ids)
    # From the same seed both draw the same vectors.
    ratio = norms.by_position("sensitivity")[0] / plain
    found[f"largest relative difference of the sensitivity, {probe_length} tokens"] = float(
        (ratio - 1).abs().max()
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--probe-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    said = environment(f"{PROBES} Gaussian vectors from seed {SEED}")
    page = ["# Cost of information flow", "", said, ""]
    data: dict[str, Any] = {"environment": said}
    cases = [
        (length, [PLAIN, BOTH, ROLLOUT, MATRICES] if index == 0 else [PLAIN, BOTH])
        for index, length in enumerate(given.lengths)
    ]
    for kind, length, names in [
        *(("rollout", *case) for case in cases),
        ("sensitivity", given.probe_length, [PLAIN, LOGITS, SENSITIVITY, AUTOGRAD]),
    ]:
        times = seconds(CONTENDERS, names, length, given.repeats)
        peaks = {name: peak("flow", name, length) for name in names}
        data[f"{kind}, {length}"] = {"seconds": times, "peaks": peaks}
        page += table(length, times, peaks)
    data["agreement"] = agreement(given.lengths[0], given.probe_length)
    page += ["### Do they agree?", "", "| | |", "|---|---|"]
    page += [f"| {name} | {value:.2g} |" for name, value in data["agreement"].items()]
    text = "\n".join([*page, ""])
    print(text)
    if given.write:
        write("flow", text, data)


if __name__ == "__main__":
    main()
