"""Prompts that begin alike as one tree of tokens: who sees whom, found once for all layers."""

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

_QUERIES = 128  # of branches that go through together: as many as share most of their ancestors


class Tree:
    """A row of tokens, each with its parent before it.

    Args:
        parents: Index of each token's parent, -1 for a token that begins a prompt.

    Attributes:
        trunk: Tokens at the start that follow one another.
        depth: How many ancestors each token has, which is its position in its prompt.
    """

    def __init__(self, parents: Int[Tensor, " position"]) -> None:
        above = parents.cpu().numpy()
        index = np.arange(len(above))
        if len(above) == 0 or bool((above >= index).any()) or bool((above < -1).any()):
            raise ValueError("every token's parent must come before it, or be -1")
        follows = above == index - 1
        self.trunk = int(len(above) if follows.all() else follows.argmin())
        self._above = above
        # Start of the run of consecutive tokens, each the parent of the next, that a token is in.
        self._begins = np.maximum.accumulate(np.where(follows, 0, index))
        depth = np.zeros(len(above), dtype=np.int64)
        for start, count in zip(*np.unique(self._begins, return_counts=True), strict=True):
            base = 0 if above[start] < 0 else depth[above[start]] + 1
            depth[start : start + count] = base + np.arange(count)
        self.depth: Int[Tensor, " position"] = torch.from_numpy(depth)

    @cached_property
    def branches(
        self,
    ) -> list[tuple[slice, Int[Tensor, " key"], Bool[Tensor, "query key"]]]:
        """Blocks of the queries after the trunk, the keys any of a block sees, and what each
        does not see of them."""
        blocks = []
        for begin in range(self.trunk, len(self._above), _QUERIES):
            end = min(begin + _QUERIES, len(self._above))
            seen = np.zeros((end - begin, end), dtype=bool)
            for query in range(begin, end):
                at = query
                while at >= 0:
                    first = self._begins[at]
                    seen[query - begin, first : at + 1] = True
                    at = self._above[first]
            keys = np.flatnonzero(seen.any(axis=0))
            blocks.append(
                (slice(begin, end), torch.from_numpy(keys), torch.from_numpy(~seen[:, keys]))
            )
        return blocks
