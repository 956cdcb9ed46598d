"""What every statistic is, on attention rows that are there to be read.

Both ways to a result end here: the pattern backend hands over slices of the model's own pattern,
the streamed one rows it has just computed. With a_ij the mass query i puts on key j:

==============  ===========================================================================
first           a_i0
diagonal        a_ii
previous        a_i,i-1; 0 for the first query
entropy         -sum_j a_ij log a_ij, in nats
largest         max_j a_ij
distance        sum_j a_ij (i - j), in tokens
virtual_sink    1 - sum_j a_ij: the mass on a learned sink, which is no key
received        of key j: sum of a_ij over the real queries i >= j, divided by their number
                (Gu et al., arXiv 2410.10781, section 3)
==============  ===========================================================================
"""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eyechart.targets import Target, mass_on


class Reducer:
    """Takes attention rows a block at a time and keeps their statistics.

    Args:
        statistics: Names of what to compute.
        targets: Sets of keys whose mass to compute.
        tokens: The keys' tokens.
        mask: True on real tokens; padded queries do not count in what a key received.
    """

    def __init__(
        self,
        statistics: Collection[str],
        targets: Sequence[Target],
        tokens: Int[Tensor, "batch position"],
        mask: Bool[Tensor, "batch position"],
    ) -> None:
        self.statistics, self.targets = frozenset(statistics), tuple(targets)
        self.tokens, self.mask = tokens, mask
        self._rows: list[dict[str, Tensor]] = []
        self._received: Tensor | None = None

    def add(self, begin: int, rows: Float[Tensor, "batch head query key"]) -> None:
        """Rows of the queries from ``begin`` on; keys after the last of them may be left out."""
        kept = {name: _ROWS[name](rows, begin) for name in self.statistics & _ROWS.keys()}
        tokens = self.tokens[:, : rows.shape[-1]]
        kept |= {target.name: mass_on(rows, target, tokens, begin) for target in self.targets}
        self._rows.append(kept)
        if "received" in self.statistics:
            if self._received is None:
                batch, heads = rows.shape[:2]
                self._received = rows.new_zeros(batch, heads, self.tokens.shape[1])
            real = self.mask[:, None, begin : begin + rows.shape[2], None]
            self._received[..., : rows.shape[-1]] += torch.where(real, rows, 0).sum(dim=-2)

    def finish(self) -> dict[str, Tensor]:
        """Everything asked for, ``[batch head position]``; received is a sum, not yet a mean."""
        found = {
            name: torch.cat([block[name] for block in self._rows], dim=-1) for name in self._rows[0]
        }
        return found if self._received is None else found | {"received": self._received}


def seers(mask: Bool[Tensor, "batch position"]) -> Int[Tensor, "batch position"]:
    """How many real queries come at a key or after it."""
    return mask.flip(-1).cumsum(-1).flip(-1)


def _diagonal(rows: Tensor, begin: int) -> Tensor:
    return rows.diagonal(offset=begin, dim1=-2, dim2=-1).clone()


def _previous(rows: Tensor, begin: int) -> Tensor:
    before = torch.zeros_like(rows[..., 0])
    skipped = 1 if begin == 0 else 0  # nothing comes before the first token
    before[..., skipped:] = rows[..., skipped:, :].diagonal(
        offset=begin + skipped - 1, dim1=-2, dim2=-1
    )
    return before


def _entropy(rows: Tensor, begin: int) -> Tensor:
    # Where the mass is 0 this is 0, as the limit is; much faster than xlogy.
    logs = rows.clamp(min=torch.finfo(rows.dtype).tiny).log_()
    return -logs.mul_(rows).sum(dim=-1)


def _distance(rows: Tensor, begin: int) -> Tensor:
    queries, keys = rows.shape[-2:]
    steps = torch.arange(keys, device=rows.device, dtype=rows.dtype)
    at = torch.arange(begin, begin + queries, device=rows.device, dtype=rows.dtype)
    return (rows * (at[:, None] - steps)).sum(dim=-1)


_ROWS = {
    "first": lambda rows, begin: rows[..., 0].clone(),
    "diagonal": _diagonal,
    "previous": _previous,
    "entropy": _entropy,
    "largest": lambda rows, begin: rows.amax(dim=-1),
    "distance": _distance,
    "virtual_sink": lambda rows, begin: 1 - rows.sum(dim=-1),
}
