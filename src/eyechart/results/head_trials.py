"""What replacing a head's output costs: the evidence behind every verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.results.sequences import Sequences
from eyechart.results.storage import storable

Verdict = Literal["no-op", "active", "depends"]

REPLACEMENTS: dict[str, str] = {
    "zero": "it does nothing",
    "first": "it adds what the first token's value makes, the same everywhere",
    "mean": "it adds a constant",
    "identity": "it is a linear map of each token by itself",
}
"""What can take a head's place without a score being computed, the cheapest first, and what a head
is that can be replaced so."""


@storable
@dataclass(frozen=True, eq=False)
class HeadTrials:
    """Each head's output replaced, before the output projection, on texts that named no head.

    ``kl`` is KL(model as it is || with the head replaced) of the next-token distribution in nats,
    the mean over the measured positions; ``loss`` is the change of the loss on the token that in
    fact follows. NaN where a replacement was not tried. Replacements: see :data:`REPLACEMENTS`;
    "resample" puts the same head's output at a random other token in place.

    Attributes:
        texts: Held-out texts, of one length.
        domains: Of each text.
        positions: Where distributions were compared.
        units: Text of each unit over which the bootstrap draws: texts, or blocks of positions where
            texts are few.
        kl: By replacement, ``[unit layer head]``.
        loss: By replacement, ``[unit layer head]``.
        low: Lower end of the 95% interval of the mean KL, by replacement.
        high: Its upper end.
        loss_low: Lower end of the 95% interval of the mean change of loss.
        loss_high: Its upper end.
        missed: Share of the squared length of a head's output that a replacement misses, on the
            texts that named it; what the screen goes by.
        means: The constants of "mean", from the texts that named the heads.
        floor: KL of a run in which nothing was replaced: what rounding alone makes.
        passes: Passes through all layers that the trials amount to.
        shared: Whether each trial began at its layer; else all began at the embedding.
    """

    texts: Sequences
    domains: tuple[str, ...]
    positions: tuple[int, ...]
    units: Int[Tensor, " unit"]
    kl: dict[str, Tensor]
    loss: dict[str, Tensor]
    low: dict[str, Tensor]
    high: dict[str, Tensor]
    loss_low: dict[str, Tensor]
    loss_high: dict[str, Tensor]
    missed: dict[str, Tensor]
    means: Float[Tensor, "layer head d_value"]
    floor: float
    passes: float
    shared: bool

    def cost(self, replacement: str) -> Float[Tensor, "layer head"]:
        """Mean KL of a replacement.

        Raises:
            UsageError: there is none of that name.
        """
        return self._there(self.kl, replacement).mean(dim=0)

    def loss_change(self, replacement: str) -> Float[Tensor, "layer head"]:
        """Mean change of loss of a replacement."""
        return self._there(self.loss, replacement).mean(dim=0)

    def by_domain(self, replacement: str) -> dict[str, Float[Tensor, "layer head"]]:
        """Mean KL of a replacement on the texts of each domain."""
        kl, domains = self._there(self.kl, replacement), [self.domains[t] for t in self.units]
        return {
            domain: kl[[d == domain for d in domains]].mean(dim=0)
            for domain in dict.fromkeys(domains)
        }

    def cheapest(self) -> tuple[list[list[str]], Float[Tensor, "layer head"]]:
        """The replacement that costs least, by layer and head ("" where none was tried), and its
        mean KL."""
        costs = torch.stack([self.cost(name) for name in REPLACEMENTS])
        least, which = costs.nan_to_num(torch.inf).min(dim=0)
        names = list(REPLACEMENTS)
        return [
            [names[i] if cost < float("inf") else "" for i, cost in zip(row, of_row, strict=True)]
            for row, of_row in zip(which.tolist(), least.tolist(), strict=True)
        ], least

    def verdicts(self, budget: float) -> list[list[tuple[str, str]]]:
        """Verdict of each head, and for a no-op the first replacement that is cheap enough.

        "no-op": some replacement costs less than ``budget`` with 97.5% confidence, and on no domain
        more in the mean. "active": every one that was tried costs more, with the same confidence.
        "depends": neither; the domain decides, or the evidence does not. ("", "") where there is no
        attention.

        Raises:
            UsageError: the budget is not positive.
        """
        if not budget > 0:
            raise UsageError(f"budget must be positive, in nats of KL; got {budget}")
        domains = [self.domains[text] for text in self.units.tolist()]
        fits = {
            name: cheap_enough(self.kl[name], self.high[name], domains, budget)
            for name in REPLACEMENTS
        }
        below = torch.stack([self.low[name] <= budget for name in REPLACEMENTS]).any(dim=0)
        tried = torch.stack([self.low[name] == self.low[name] for name in REPLACEMENTS]).any(dim=0)
        found = [[("", "")] * row.shape[0] for row in tried]
        for layer, head in tried.nonzero().tolist():
            enough = [name for name, fit in fits.items() if fit[layer, head]]
            verdict = "no-op" if enough else "depends" if below[layer, head] else "active"
            found[layer][head] = (verdict, enough[0] if enough else "")
        return found

    def _there(self, of: dict[str, Tensor], replacement: str) -> Tensor:
        if replacement not in of:
            raise UsageError(f"unknown replacement {replacement!r}; there are {', '.join(of)}")
        return of[replacement]


def cheap_enough(
    kl: Float[Tensor, "unit layer head"],
    high: Float[Tensor, "layer head"],
    domains: Sequence[str],
    budget: float,
) -> Bool[Tensor, "layer head"]:
    """Whether replacing each head costs less than a budget, and on no domain more in the mean.

    Args:
        kl: Of one replacement; NaN where it was not tried, which is not enough.
        high: Upper end of its interval.
        domains: Of each unit.
        budget: In nats.
    """
    fits = high < budget
    for domain in dict.fromkeys(domains):
        fits &= kl[[d == domain for d in domains]].mean(dim=0) < budget
    return fits
