"""How many heads can go at once: effects are not additive, so every set is run as a whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.heads.divergence import Reference
from eyechart.heads.inputs import following
from eyechart.heads.names import interval
from eyechart.heads.onward import Exchange, Onward, own_values
from eyechart.heads.trials import in_units
from eyechart.kernels import Replacement, replacements
from eyechart.results import HeadSet, HeadTrials

Choice = tuple[int, int, str]
"""A head, as layer and number, and what takes its place."""

RANDOM_SETS = 5

REFUSALS = 8
"""Single heads in a row that do not fit before the search ends."""


def largest_set(
    onward: Onward,
    reference: Reference,
    found: HeadTrials,
    unseen: Onward | None,
    budget: float,
    joint_budget: float,
    seed: int,
    step: Callable[[str], object],
) -> HeadSet:
    """The largest set of no-ops under the joint budget, beside random sets.

    Args:
        onward: The model on the held-out texts.
        reference: What it says when nothing is replaced.
        found: What each head costs by itself.
        unseen: The model on texts that choose nothing, if there are any.
        budget: KL in nats of a no-op.
        joint_budget: KL that the set may cost.
        seed: Of the random sets and the bootstrap.
        step: Told of every set.
    """
    names, costs = found.cheapest()
    verdicts = found.verdicts(budget)
    everyone = sorted(
        (float(costs[layer, head]), layer, head, name)
        for layer, row in enumerate(names)
        for head, name in enumerate(row)
        if name
    )
    order = [(layer, head, name) for _, layer, head, name in everyone]
    no_ops = [head for head in order if verdicts[head[0]][head[1]][0] == "no-op"]
    sets = Sets(onward, reference, found.means)
    chosen = sets.largest(no_ops, joint_budget, step)
    kl, loss = sets.run(chosen)
    units = len(found.units)
    low, high = interval(in_units(kl[None], units)[0][:, None, None], seed)
    random_kl, random_sizes = [], []
    for index in range(RANDOM_SETS):
        step(f"random sets: {index + 1} of {RANDOM_SETS}")
        mixed = shuffled(order, seed + index)
        random_kl.append(float(sets.run(mixed[: len(chosen)])[0].mean()))
        random_sizes.append(sets.fitting(mixed, joint_budget))
    fresh: dict[str, Tensor | None] = dict.fromkeys(("unseen_kl", "unseen_loss", "unseen_base"))
    if unseen is not None:
        at = unseen.positions
        elsewhere = Reference(unseen.reference, following(unseen.texts, at))
        moved = Sets(unseen, elsewhere, found.means).run(chosen)
        fresh = {
            "unseen_kl": moved[0].mean(dim=-1),
            "unseen_loss": moved[1].mean(dim=-1),
            "unseen_base": elsewhere.loss.mean(dim=-1),
        }
    return HeadSet(
        budget=joint_budget,
        heads=tuple(chosen),
        path=tuple(sets.path),
        kl=in_units(kl[None], units)[0],
        loss=in_units(loss[None], units)[0],
        low=float(low),
        high=float(high),
        apart=sum(float(costs[layer, head]) for layer, head, _ in chosen),
        random_kl=tuple(random_kl),
        random_sizes=tuple(random_sizes),
        unseen=None if unseen is None else unseen.texts,
        **fresh,
    )


@dataclass
class Sets:
    """Runs sets of heads as a whole.

    Attributes:
        onward: The model on the texts.
        reference: What it says when nothing is replaced.
        means: The constants of "mean".
        path: Every set that was run: its size, its KL, and whether it was kept.
    """

    onward: Onward
    reference: Reference
    means: Float[Tensor, "layer head d_value"]
    path: list[tuple[int, float, bool]] = field(default_factory=list)

    def run(
        self, chosen: Sequence[Choice]
    ) -> tuple[Float[Tensor, "text position"], Float[Tensor, "text position"]]:
        """KL and change of loss with all of these heads replaced."""
        exchanges = exchanges_of(replacements(chosen, self.means))
        logits = self.onward.logits(min(exchanges, default=0), exchanges)
        kl, loss = self.reference.moved(logits)
        return kl[0], loss[0]

    def largest(
        self, order: Sequence[Choice], budget: float, step: Callable[[str], object]
    ) -> list[Choice]:
        """The largest set under a budget that a greedy search finds.

        Heads are taken in the given order, as many at a time as fit: half of what is left, and half
        of that where they do not. A head that does not fit by itself is passed over.
        """
        chosen: list[Choice] = []
        left, size, refused = list(order), max(1, len(order) // 2), 0
        while left and refused < REFUSALS:
            batch = left[:size]
            kl = float(self.run([*chosen, *batch])[0].mean())
            fits = kl <= budget
            self.path.append((len(chosen) + len(batch), kl, fits))
            step(f"sets: {len(chosen) + len(batch)} heads cost {kl:.3g} nats")
            if fits:
                chosen += batch
                left, refused = left[size:], 0
            elif len(batch) > 1:
                size = len(batch) // 2
            else:
                left, refused = left[1:], refused + 1
        return chosen

    def fitting(self, order: Sequence[Choice], budget: float) -> int:
        """How many heads of an order can go: more of them cost more.

        Doubled until they do not fit, then by bisection; what fits at random is few.
        """
        low, high = 0, 1
        while high <= len(order) and self._fits(order[:high], budget):
            low, high = high, 2 * high
        high = min(high, len(order) + 1)  # the first known, or taken, not to fit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(order[:middle], budget) else (low, middle)
        return low

    def _fits(self, chosen: Sequence[Choice], budget: float) -> bool:
        return float(self.run(chosen)[0].mean()) <= budget


def exchanges_of(replaced: Mapping[int, Mapping[int, Replacement]]) -> dict[int, Exchange]:
    """What puts replacements in place of what the heads have computed."""

    def exchange(of_layer: Mapping[int, Replacement]) -> Exchange:
        def put(mixed: Tensor, values: Tensor | None) -> None:
            for head, replacement in of_layer.items():
                mixed[:, :, head] = replacement.of(own_values(mixed, values, head))

        return put

    return {layer: exchange(of_layer) for layer, of_layer in replaced.items()}


def shuffled(order: Sequence[Choice], seed: int) -> list[Choice]:
    """The same heads in random order."""
    draw = torch.Generator().manual_seed(seed)
    return [order[i] for i in torch.randperm(len(order), generator=draw).tolist()]
