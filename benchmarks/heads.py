"""What a census of heads costs, beside one ablation a head from the embedding up.

    python benchmarks/heads.py [--sample 12] [--unscreened 3 11 18 25] [--contexts 512 2048]
                               [--layers L ...] [--repeats 3] [--write]

Measures, on the default model in float32:

- ``eyechart.head_census`` with its defaults, whole and part by part, and its peak memory;
- the same trials as a user would run them: for each, a TransformerLens hook on ``hook_z`` that
  exchanges the head's output, a pass of the whole model with all its logits, and the divergence at
  the same positions. Timed on a sample of heads, evenly spread, each zeroed; the time of all trials
  is the mean of the sample times their number. The sample's divergences are compared with the
  census's;
- what the screen loses: verdicts of a few layers with every replacement tried on every head;
- what ``lenses.skip_heads`` saves and costs, for the set that goes together and for all no-ops:
  seconds of attention and of the whole pass with these heads skipped, taking turns with eyechart's
  attention of all heads, and the loss under the lens on texts that chose nothing.

The aim: a census in under five minutes on two cores. ``--layers`` limits everything to a few, for a
trial run. ``--write`` keeps the result in ``benchmarks/results``.
"""

import argparse
import resource
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from common import bridge, environment, write

import eyechart
from eyechart.heads.price import price
from eyechart.kernels import replacements
from eyechart.results import HeadCensus, head_name
from eyechart.texts import UNSEEN

SEED = 0


def timed_census(model: Any, layers: Sequence[int] | None) -> tuple[HeadCensus, dict[str, float]]:
    """The census, and the seconds of each of its parts."""
    begun: list[tuple[str, float]] = []

    def step(name: str) -> None:
        begun.append((name.split(":")[0], time.perf_counter()))

    census = eyechart.head_census(model, layers=layers, seed=SEED, on_step=step)
    ends = [*(at for _, at in begun[1:]), time.perf_counter()]
    parts: dict[str, float] = {}
    for (name, at), end in zip(begun, ends, strict=True):
        parts[name] = parts.get(name, 0.0) + end - at
    return census, {**parts, "whole": ends[-1] - begun[0][1]}


def one_by_one(model: Any, census: HeadCensus, count: int) -> dict[str, float]:
    """A sample of heads zeroed by a hook, from the embedding up."""
    trials = census.trials
    tokens, at = trials.texts.tokens, list(trials.positions)
    tried = (~trials.cost("zero").isnan()).nonzero().tolist()
    sample = [tried[i] for i in torch.linspace(0, len(tried) - 1, count).round().long().tolist()]

    def logits(edit: Any = None) -> torch.Tensor:
        hooks = [] if edit is None else [edit]
        with torch.no_grad():
            found = model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
        return found[:, at].float().log_softmax(dim=-1)

    truth = logits()
    spent, apart = 0.0, 0.0
    for layer, head in sample:

        def zero(z: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
            z = z.clone()
            z[:, :, head] = 0
            return z

        start = time.perf_counter()
        other = logits((f"blocks.{layer}.attn.hook_z", zero))
        kl = float((truth.exp() * (truth - other)).sum(dim=-1).mean())
        spent += time.perf_counter() - start
        apart = max(apart, abs(kl - float(trials.cost("zero")[layer, head])))
        print(f"  {head_name(layer, head)}: {kl:.5f} nats", flush=True)
    number = sum(int((~x[0].isnan()).sum()) for x in trials.kl.values())
    return {
        "trials": number,
        "passes they amount to": trials.passes,
        "seconds of one ablation from the embedding": spent / len(sample),
        "seconds of as many ablations": number * spent / len(sample),
        "largest difference of the divergence, nats": apart,
    }


def lost_by_the_screen(model: Any, census: HeadCensus, layers: Sequence[int]) -> dict[str, float]:
    """No-ops of some layers, with the screen and without it."""
    everything = eyechart.head_census(
        model, layers=layers, seed=SEED, screen=False, joint_budget=None, context=16
    )
    screened = {head[:2] for head in census.no_ops() if head[0] in layers}
    found = {head[:2] for head in everything.no_ops()}
    tried = census.trials.kl.values()
    return {
        "heads": len(layers) * census.trials.means.shape[1],
        "no-ops when everything is tried": len(found),
        "of them found behind the screen": len(found & screened),
        "trials without the screen": sum(
            int((~x[0].isnan()).sum()) for x in everything.trials.kl.values()
        ),
        "trials behind it": sum(int((~x[0, list(layers)].isnan()).sum()) for x in tried),
    }


def skipped(
    model: Any, census: HeadCensus, contexts: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """What leaving heads out saves and costs."""
    assert census.together is not None
    sets = {"the set": census.together.heads, "all no-ops": census.no_ops()}
    rows = []
    for name, heads in sets.items():
        losses = []
        for text in UNSEEN.values():
            with torch.no_grad():
                before = float(model(text, return_type="loss"))
                with eyechart.lenses.skip_heads(census, model, heads=heads):
                    losses.append(float(model(text, return_type="loss")) - before)
        for context in contexts:
            found = price(model, replacements(heads, census.trials.means), context, repeats)
            rows.append(
                {
                    "set": name,
                    "heads": len(heads),
                    "tokens": context,
                    "operations": found.share,
                    "attention": found.time,
                    "pass": found.pass_seconds_without / found.pass_seconds,
                    "seconds of attention": found.seconds,
                    "seconds of the pass": found.pass_seconds,
                    "loss": sum(losses) / len(losses),
                }
            )
            print(f"  {name}, {context} tokens: {rows[-1]['attention']:.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=12)
    parser.add_argument("--unscreened", type=int, nargs="+", default=[3, 11, 18, 25])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    model = bridge()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    census, parts = timed_census(model, given.layers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ablations = one_by_one(model, census, given.sample)
    screen = lost_by_the_screen(model, census, given.layers or given.unscreened)
    lens = skipped(model, census, given.contexts, given.repeats)
    together = census.together
    assert together is not None and together.unseen_kl is not None
    said = environment(f"seed {SEED}")
    data = {
        "environment": said,
        "seconds": parts,
        "peak_bytes": {"model": before * 1024, "census": peak * 1024},
        "ablations": ablations,
        "screen": screen,
        "lens": lens,
        "census": census.summary(),
    }
    apart = ablations["seconds of as many ablations"]
    page = ["# Cost of the census of heads", "", said, "", "### A census of all heads", ""]
    page += [*map("* {}".format, census.lines()), "", "| | seconds |", "|---|---|"]
    page += [f"| {name} | {value:.0f} |" for name, value in parts.items()]
    page += [
        f"| {ablations['trials']} ablations from the embedding up, scaled from {given.sample} "
        f"| {apart:.0f} |",
        "",
        f"Its trials take {parts['trials']:.0f} s, 1/{apart / parts['trials']:.1f} of that. They "
        f"amount to {ablations['passes they amount to']:.0f} passes through all layers. "
        "Divergences differ by at most "
        f"{ablations['largest difference of the divergence, nats']:.1g} nats. "
        f"The process peaks at {peak / 2**20:.2f} GiB; it had reached {before / 2**20:.2f} with "
        "the model loaded.",
        "",
        "### What the screen loses",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in screen.items()),
        "",
        "### Heads skipped",
        "",
        "Times of attention in all layers and of the whole pass without logits, over those of "
        f"eyechart's attention of all heads, best of {given.repeats}; change of loss on "
        f"{len(UNSEEN)} texts that chose nothing.",
        "",
        "| | heads | tokens | operations left out | attention | whole pass | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    page += [
        f"| {row['set']} | {row['heads']} | {row['tokens']:,} | {row['operations']:.0%} | "
        f"{row['attention']:.2f} | {row['pass']:.2f} | {row['loss']:+.3f} |"
        for row in lens
    ]
    text = "\n".join([*page, ""])
    print(text)
    if given.write:
        write("heads", text, data)


if __name__ == "__main__":
    main()
