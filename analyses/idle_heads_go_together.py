"""Can the heads that do nothing go all at once?

Each of them costs next to nothing alone, but effects are not additive: a head may be idle only
while another does its work. ``head_census`` tries the heads one by one, then takes them together,
the cheapest first, and runs every set as a whole; beside it, heads in random order, each replaced
by what is cheapest for it, go until they cost as much. Both choose on the same texts, so the set
and random sets of its size are measured once more on texts that chose nothing. There the set costs
more than it was chosen for, which the numbers tell; the claim is about the difference from random
sets. The plain way does it with TransformerLens hooks, on patterns and, for a constant, on
``hook_z``; its disagreement with ``lenses.skip_heads`` is part of the verdict.

Limited: heads are tried on seven texts, one a domain and the beginning of one said twice, cut to 24
tokens, six positions each, where the census by default has fourteen texts of 48 tokens; the unseen
texts are whole. That the set must be three times as large as random ones is a convention.
"""

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from frame import Claim, Finding, divergence, dressed, main
from jaxtyping import Float
from plotly import graph_objects as go
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.errors import UnsupportedModelError
from eyechart.heads.inputs import TWICE, by_domain, of_one_length
from eyechart.results import HeadCensus
from eyechart.sequences import prepare
from eyechart.texts import HELD_OUT, TEXTS, UNSEEN

TOKENS, POSITIONS, WORDS = 24, 6, 9
BUDGET, TIMES, SETS = 0.05, 3.0, 5

CLAIM = Claim(
    statement=(
        "Of the heads that do nothing one at a time, many can go at once: several times as many as "
        "of heads at random, for the same cost."
    ),
    source="Barbero et al., arXiv 2410.06205, and Guo et al., arXiv 2410.13835",
    holds_if=(
        f"the set of heads found under a KL of {BUDGET} nats is at least {TIMES:g} times as large "
        "as sets in random order under the same budget, it costs less on unseen texts than each of "
        f"{SETS} random sets of its size, and lenses.skip_heads agrees with plain hooks"
    ),
)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """The set from the census, what it costs elsewhere by hooks."""
    one_each = {domain: texts[:1] for domain, texts in by_domain(HELD_OUT).items()}
    beginning = " ".join(HELD_OUT["travel"].split()[:WORDS])
    census = eyechart.head_census(
        model,
        by_domain(TEXTS),
        held_out={**one_each, TWICE: [" ".join([beginning] * 4)]},
        tokens=TOKENS,
        positions=POSITIONS,
        joint_budget=BUDGET,
        context=16,
        seed=seed,
    )
    found = census.together
    if found is None:
        why = census.unavailable.get("together")
        raise UnsupportedModelError(f"the claim cannot be tested on this model: {why}")
    texts = of_one_length(prepare(model, list(UNSEEN.values()))).tokens.to(model.cfg.device)
    with torch.no_grad():
        original = model(texts, return_type="logits")
        with eyechart.lenses.skip_heads(census, model):
            seen = divergence(original, model(texts, return_type="logits"))[:, 1:].mean(dim=1)
    sets = {"chosen": found.heads} | random_sets(census, len(found.heads), seed)
    unseen = {
        name: divergence(original, by_hooks(model, texts, heads, census.trials.means))[:, 1:]
        for name, heads in sets.items()
    }
    by_text = {name: kl.mean(dim=1) for name, kl in unseen.items()}
    apart = float((seen / by_text["chosen"] - 1).abs().max())
    cost = {name: float(kl.mean()) for name, kl in by_text.items()}
    randoms = [cost[name] for name in sets if name != "chosen"]
    data = pd.DataFrame(
        {"set": name, "heads": len(sets[name]), "text": text, "kl": float(kl[row])}
        for name, kl in by_text.items()
        for row, text in enumerate(UNSEEN)
    )
    figure = go.Figure()
    for name, kl in by_text.items():
        figure.add_scatter(x=list(UNSEEN), y=kl.tolist(), name=name, mode="markers")
    figure.update_yaxes(type="log")
    dressed(figure, "unseen text", f"KL with {len(found.heads)} heads replaced at once")
    sizes = torch.tensor(found.random_sizes).double()
    return Finding(
        holds=found.factor >= TIMES and cost["chosen"] < min(randoms) and apart < 0.01,
        numbers={
            "heads that cost little one at a time": len(census.no_ops()),
            f"heads that can go at once for {BUDGET} nats": len(found.heads),
            "their KL on the texts that chose them": float(found.kl.mean()),
            "sum of what they cost one at a time": found.apart,
            "heads in random order that can go, mean": float(sizes.mean()),
            "the most of them": float(sizes.max()),
            "times as many as at random": found.factor,
            "KL of the set on unseen texts": cost["chosen"],
            "KL of random sets of its size there, mean": sum(randoms) / len(randoms),
            "the least of them": min(randoms),
            "largest relative disagreement of skip_heads with plain hooks": apart,
        },
        data=data,
        figure=figure,
    )


def random_sets(
    census: HeadCensus, size: int, seed: int
) -> dict[str, tuple[tuple[int, int, str], ...]]:
    """Random heads, each replaced by what is cheapest for it."""
    names, _ = census.trials.cheapest()
    heads = [(l, h, name) for l, row in enumerate(names) for h, name in enumerate(row) if name]
    found = {}
    for index in range(SETS):
        draw = torch.Generator().manual_seed(seed + index)
        order = torch.randperm(len(heads), generator=draw)[:size].tolist()
        found[f"random {index + 1}"] = tuple(heads[i] for i in order)
    return found


def by_hooks(
    model: TransformerBridge,
    tokens: Tensor,
    heads: tuple[tuple[int, int, str], ...],
    means: Float[Tensor, "layer head d_value"],
) -> Float[Tensor, "text position vocabulary"]:
    """Logits with these heads replaced."""
    length = tokens.shape[1]
    patterns = {
        "zero": torch.zeros(length, length),
        "first": (torch.arange(length) == 0).float().expand(length, length),
        "identity": torch.eye(length),
    }

    def exchange(head: int, pattern: Tensor) -> Callable[..., Tensor]:
        def hook(found: Float[Tensor, "batch head query key"], hook: object) -> Tensor:
            found = found.clone()
            found[:, head] = pattern.to(found)
            return found

        return hook

    def constant(head: int, value: Tensor) -> Callable[..., Tensor]:
        def hook(z: Float[Tensor, "batch position head d_head"], hook: object) -> Tensor:
            z = z.clone()
            z[:, 1:, head] = value.to(z)  # the first token can only look at itself
            return z

        return hook

    hooks: list[Any] = [
        (f"blocks.{layer}.attn.hook_z", constant(head, means[layer, head]))
        if kind == "mean"
        else (f"blocks.{layer}.attn.hook_pattern", exchange(head, patterns[kind]))
        for layer, head, kind in heads
    ]
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")


if __name__ == "__main__":
    main(CLAIM, measure)
