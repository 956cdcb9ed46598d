"""Heads that can go together, and what they cost while they stay."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from eyechart.results.sequences import Sequences
from eyechart.results.storage import storable


@storable
@dataclass(frozen=True, eq=False)
class HeadSet:
    """A set of heads replaced all at once, the largest that was found under a budget.

    Chosen on the held-out texts of the trials, then measured once more on texts that chose nothing.

    Attributes:
        budget: KL in nats that the whole set may cost on the held-out texts.
        heads: The set as ``(layer, head, replacement)``.
        path: Every set that was tried on the way: its size, its KL and whether it was kept.
        kl: Of the whole set on the held-out texts, by unit of the trials.
        loss: Change of loss there.
        low: Lower end of the 95% interval of the mean KL.
        high: Its upper end.
        apart: Sum of what the heads cost one by one; effects are not additive.
        random_kl: KL of random sets of the same size, each head replaced by what is cheapest for
            it, on the held-out texts.
        random_sizes: How many heads of a random order can go under the same budget.
        unseen: Texts that chose nothing; None where none were given.
        unseen_kl: KL of the whole set there, by text.
        unseen_loss: Change of loss there, by text.
        unseen_base: Loss of the model as it is there, by text.
    """

    budget: float
    heads: tuple[tuple[int, int, str], ...]
    path: tuple[tuple[int, float, bool], ...]
    kl: Float[Tensor, " unit"]
    loss: Float[Tensor, " unit"]
    low: float
    high: float
    apart: float
    random_kl: tuple[float, ...]
    random_sizes: tuple[int, ...]
    unseen: Sequences | None = None
    unseen_kl: Float[Tensor, " text"] | None = None
    unseen_loss: Float[Tensor, " text"] | None = None
    unseen_base: Float[Tensor, " text"] | None = None

    @property
    def factor(self) -> float:
        """Its size over the mean size of random sets under the same budget."""
        mean = sum(self.random_sizes) / max(len(self.random_sizes), 1)
        return len(self.heads) / mean if mean else float("inf")


@storable
@dataclass(frozen=True, eq=False)
class HeadPrice:
    """What attention costs at one length, and what of it a set of heads is to blame for.

    Of one text of ``context`` tokens. A multiplication with its addition counts as two operations;
    softmax and projections are not counted. A key head's cache can go when all query heads that
    read it are in the set.

    Attributes:
        context: Tokens.
        flops: Operations for scores and mixtures, of every head.
        kv_bytes: Bytes that each head's keys and values take in the cache, its share where heads
            read the same ones.
        set_flops: Of the set.
        set_kv_bytes: Of the caches nobody else reads.
        seconds: Attention of all layers, all heads computed.
        seconds_without: The same with the set replaced.
        pass_seconds: The whole forward pass without logits, all heads computed.
        pass_seconds_without: The same with the set replaced.
    """

    context: int
    flops: Float[Tensor, "layer head"]
    kv_bytes: Float[Tensor, "layer head"]
    set_flops: float
    set_kv_bytes: float
    seconds: float
    seconds_without: float
    pass_seconds: float
    pass_seconds_without: float

    @property
    def share(self) -> float:
        """The set's share of the operations."""
        return self.set_flops / float(self.flops.nansum())

    @property
    def time(self) -> float:
        """Seconds of attention without the set over those with all heads."""
        return self.seconds_without / self.seconds
