"""A census that no model made, with answers known by heart, for tests of what shows one.

Four layers of three heads, the third without attention:

    L0  uniform, active      local, depends        mixed, no-op (zero)
    L1  previous, active     diagonal, no-op       duplicate, depends: too dear on code
    L3  sink, no-op (first)  induction, active     sink, no-op (zero); its cheapest costs nothing
"""

import dataclasses
from typing import Any

import torch
from flows import PROVENANCE
from torch import Tensor

from eyechart.results import (
    KINDS,
    HeadCensus,
    HeadNames,
    HeadPrice,
    HeadSet,
    HeadTrials,
    RotaryUse,
    Sequences,
)
from eyechart.results.head_names import ON_REPEATS

NAN = float("nan")
NONE = [NAN] * 3
GRID = [
    ["uniform", "local", ""],
    ["previous", "diagonal", "duplicate"],
    [None, None, None],
    ["sink", "induction", "sink"],
]
LABELS = ("<s>", "The", " lamp", " burned", " low", " and", " slept", ".", " It", " was")
DOMAINS = ("prose", "prose", "code", "code")

COSTS = {
    "zero": [[0.2, 0.03, 0.004], [0.3, 0.05, 0.008], NONE, [0.02, 0.4, 0.001]],
    "first": [NONE, NONE, NONE, [0.002, NAN, 0.0]],
    "mean": [[NAN, 0.009, NAN], NONE, NONE, [NAN, 0.35, NAN]],
    "identity": [NONE, [NAN, 0.004, NAN], NONE, NONE],
    "resample": [[0.25, NAN, NAN], [0.5, NAN, NAN], NONE, [NAN, 0.6, NAN]],
}
VERDICTS = [
    ["active", "depends", "no-op"],
    ["active", "no-op", "depends"],
    ["", "", ""],
    ["no-op", "active", "no-op"],
]
CHANGING = (3, 0)
"""The head that sleeps on the first domain (0.9 on the first token) and works on the last (0.3)."""


def made_up_census(
    labels: tuple[str, ...] = LABELS,
    domains: tuple[str, ...] = DOMAINS,
    *,
    tiles: tuple[int, int] = (1, 1),
    model: str = "made-up",
    **changes: Any,
) -> HeadCensus:
    """Every part; ``changes`` replace fields.

    Args:
        labels: The tokens of every text.
        domains: Of each text.
        tiles: How often the four layers, and their three heads, are there.
        model: Its name.
        changes: Fields of the census.
    """

    def spread(base: Any) -> Tensor:
        return torch.tensor(base).repeat(*tiles)

    texts = Sequences.from_rows(
        [list(range(len(labels)))] * len(domains),
        [list(labels)] * len(domains),
        prepend_bos=True,
        name="made-up texts",
    )
    fields: dict[str, Any] = {
        "sequences": texts,
        "provenance": dataclasses.replace(PROVENANCE, model=model, attention="fused, pattern"),
        "names": _names(spread, len(labels), domains),
        "trials": _trials(spread, texts, domains),
        "budget": 0.01,
        "rotary": _rotary(spread, tiles),
        "together": HeadSet(
            budget=0.05,
            heads=((3, 2, "zero"), (3, 0, "first"), (0, 2, "zero")),
            path=((4, 0.09, False), (2, 0.01, True), (3, 0.03, True)),
            kl=torch.tensor([0.02, 0.02, 0.04, 0.04]),
            loss=torch.tensor([0.01, 0.01, 0.01, 0.01]),
            low=0.02,
            high=0.045,
            apart=0.007,
            random_kl=(0.5, 0.25),
            random_sizes=(1, 2),
            unseen=texts,
            unseen_kl=torch.full((len(domains),), 0.06),
            unseen_loss=torch.full((len(domains),), -0.02),
            unseen_base=torch.full((len(domains),), 3.0),
        ),
        "price": HeadPrice(
            context=128,
            flops=spread([[4e6] * 3, [4e6] * 3, NONE, [2e6] * 3]),
            kv_bytes=spread([[2.0**20] * 3, [2.0**20] * 3, NONE, [2.0**19] * 3]),
            set_flops=7.5e6 * tiles[0] * tiles[1],
            set_kv_bytes=2.0**20,
            seconds=0.5,
            seconds_without=0.4,
            pass_seconds=2.0,
            pass_seconds_without=1.9,
        ),
        "patterns": made_up_patterns(tiles, len(labels)),
    }
    return HeadCensus(**fields | changes)


def made_up_patterns(tiles: tuple[int, int], tokens: int) -> Tensor:
    """Head i of a layer looks at the token i back, or at the first where there is none."""
    heads = []
    for back in range(3):
        pattern = torch.zeros(tokens, tokens, dtype=torch.uint8)
        queries = torch.arange(tokens)
        pattern[queries, (queries - back).clamp(min=0)] = 255
        heads.append(pattern)
    return torch.stack(heads).repeat(4 * tiles[0], tiles[1], 1, 1)


def _names(spread: Any, length: int, domains: tuple[str, ...]) -> HeadNames:
    def values(name: str, yes: float, no: float) -> Tensor:
        known = [[NAN if k is None else yes if k == name else no for k in row] for row in GRID]
        return spread(known)

    scores = {
        name: torch.stack([values(name, 0.8, 0.1)] * (8 if name in ON_REPEATS else len(domains)))
        for name in KINDS
    }
    # The second sink is the clearer one.
    scores["sink"][:, 3, 2] = 0.95
    for text, domain in enumerate(domains):
        scores["sink"][text, *CHANGING] = 0.9 if domain == domains[0] else 0.3
    return HeadNames(
        length=length,
        domains=domains,
        window=2,
        share=0.5,
        scores=scores,
        in_text=dict.fromkeys(ON_REPEATS, scores["sink"] * 0),
        chance=dict.fromkeys(KINDS, 0.05),
        ceiling=dict.fromkeys(KINDS, 1.0),
        shuffled={
            name: values(name, 0.2, 0.2) * (NAN if name == "uniform" else 1) for name in KINDS
        },
        low={name: values(name, 0.55, 0.0) for name in KINDS},
        high={name: values(name, 0.95, 0.2) for name in KINDS},
        smallest_diagonal=values("diagonal", 0.6, 0.0),
        smallest_previous=values("previous", 0.6, 0.0),
    )


def _trials(spread: Any, texts: Sequences, domains: tuple[str, ...]) -> HeadTrials:
    mean = {name: spread(costs) for name, costs in COSTS.items()}
    # The duplicate-token head is dear on the last domain, and cheap on the others.
    code = torch.tensor([domain == domains[-1] for domain in domains])
    tilt = torch.where(code, 1.5, 0.5)[:, None, None]
    uneven = spread([[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]).bool()
    kl = {
        name: torch.where(uneven, costs * tilt, costs.expand(len(domains), -1, -1))
        for name, costs in mean.items()
    }
    shape = (*mean["zero"].shape, 4)
    return HeadTrials(
        texts=Sequences(
            texts.tokens.flip(1), texts.mask, texts.labels, texts.prepend_bos, "held-out texts"
        ),
        domains=domains,
        positions=(2, 5, 8),
        units=torch.arange(len(domains)),
        kl=kl,
        loss={name: costs / 2 for name, costs in kl.items()},
        low={name: costs * 0.8 for name, costs in mean.items()},
        high={name: costs * 1.2 for name, costs in mean.items()},
        loss_low={name: costs * 0.4 for name, costs in mean.items()},
        loss_high={name: costs * 0.6 for name, costs in mean.items()},
        missed={name: costs * 0 for name, costs in mean.items()},
        means=torch.zeros(shape),
        floor=0.0,
        passes=12.5,
        shared=True,
    )


def _rotary(spread: Any, tiles: tuple[int, int]) -> RotaryUse:
    fast = [[0.1, 0.2, 0.05], [0.7, 0.6, 0.15], NONE, [0.02, 0.03, 0.01]]
    energy = spread(fast)
    bands = torch.stack([energy, energy / 2, energy / 4, 1 - energy], dim=-1)
    angle = torch.tensor([1.0, 0.1, 0.01, 0.001]).expand(4 * tiles[0], -1).clone()
    angle[2::4] = NAN
    return RotaryUse(angle=angle, q_norm=bands, k_norm=bands * 2, q_high=energy, k_high=energy)
