"""What every head looks at, and whether that is evidence enough for a name."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.results.storage import storable

KINDS: dict[str, str] = {
    "induction": "induction",
    "duplicate": "duplicate-token",
    "diagonal": "diagonal",
    "previous": "previous-token",
    "sink": "sink",
    "local": "local",
    "uniform": "uniform",
}
"""Scores and the kinds they name, the more telling first: where two scores would do, it names."""

MIXED = "mixed"

ON_REPEATS = ("duplicate", "induction")
"""Scores that are taken on random tokens said twice, where nothing else explains them."""


@storable
@dataclass(frozen=True, eq=False)
class HeadNames:
    """Scores of every head on several texts of one length, and what they are worth.

    A score is the mean over all queries of the attention on a set of keys; ``uniform`` is the
    number of keys attended to (exp of the entropy) over the number there are. Its *evidence* is
    what of it chance does not explain: (score - chance) / (ceiling - chance), 0 for a head that
    looks at all keys alike, 1 for one that looks nowhere else. A head is of a kind where the
    evidence exceeds ``share`` with 95% confidence over texts, and the score exceeds what shuffled
    keys would reach once in a thousand texts.

    Attributes:
        length: Tokens of each text.
        domains: Of each text.
        window: Width of "local", in tokens.
        share: Evidence from which a head is named.
        scores: By name; ``duplicate`` and ``induction`` on random tokens said twice (the first axis
            is then that of the random sequences), all others on the texts.
        in_text: ``duplicate`` and ``induction`` on the texts.
        chance: The mean score under uniform attention, which is also its mean under shuffled keys;
            for ``uniform`` that of a head that attends to one key at a time.
        ceiling: The highest score there can be: some queries have no such key.
        shuffled: What the score would exceed once in a thousand if each query's keys were shuffled,
            from above; NaN for ``uniform``, which shuffling leaves alone.
        low: Lower end of the 95% interval of the evidence, by bootstrap over texts.
        high: Its upper end.
        smallest_diagonal: Least a_ii over all queries and texts; 1 - eps in Definition 5.1 of
            Barbero et al., arXiv 2410.06205.
        smallest_previous: Least a_i,i-1 over all queries but the first.
    """

    length: int
    domains: tuple[str, ...]
    window: int
    share: float
    scores: dict[str, Tensor]
    in_text: dict[str, Tensor]
    chance: dict[str, float]
    ceiling: dict[str, float]
    shuffled: dict[str, Tensor]
    low: dict[str, Tensor]
    high: dict[str, Tensor]
    smallest_diagonal: Float[Tensor, "layer head"]
    smallest_previous: Float[Tensor, "layer head"]

    def score(self, name: str) -> Float[Tensor, "layer head"]:
        """Mean of a score over texts.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self.scores:
            raise UsageError(f"unknown score {name!r}; there are {', '.join(self.scores)}")
        return self.scores[name].mean(dim=0)

    def evidence(self, name: str) -> Float[Tensor, "layer head"]:
        """What of a score chance does not explain, averaged over texts."""
        return evidence(self.score(name), self.chance[name], self.ceiling[name])

    def kinds(self) -> list[list[str]]:
        """The kind of each head, by layer; "mixed" where nothing names it, "" without attention."""
        some = self.scores["sink"][0]
        found = [[MIXED if x == x else "" for x in row] for row in some.tolist()]
        for name, kind in reversed(KINDS.items()):
            beyond = self.score(name) > self.shuffled[name].nan_to_num(-torch.inf)
            for layer, head in ((self.low[name] > self.share) & beyond).nonzero().tolist():
                found[layer][head] = kind
        return found

    def diagonal_heads(self, eps: float) -> list[tuple[int, int]]:
        """Heads of Definition 5.1 (arXiv 2410.06205): a_ii > 1 - eps for every query.

        Raises:
            UsageError: eps is not between 0 and 1.
        """
        if not 0 < eps < 1:
            raise UsageError(f"eps must be between 0 and 1, got {eps}")
        found = (self.smallest_diagonal > 1 - eps).nonzero().tolist()
        return [(layer, head) for layer, head in found]

    def by_domain(self, name: str) -> dict[str, Float[Tensor, "layer head"]]:
        """Mean of a score over the texts of each domain."""
        if name in ON_REPEATS:
            raise UsageError(f"{name} is taken on random tokens, which have no domain")
        self.score(name)
        return {
            domain: self.scores[name][[d == domain for d in self.domains]].mean(dim=0)
            for domain in dict.fromkeys(self.domains)
        }


def evidence(score: Tensor, chance: float, ceiling: float) -> Tensor:
    """What of a score chance does not explain; NaN where a score can only be what chance makes."""
    room = ceiling - chance
    if room < 1e-6:
        return torch.full_like(score, torch.nan)
    return (score - chance) / room
