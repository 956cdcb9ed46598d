"""The token sequences a result was measured on, kept as part of it."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from eyechart.results.storage import storable


@storable
@dataclass(frozen=True, eq=False)
class Sequences:
    """A right-padded batch of token sequences, or one row in which several share their beginnings.

    Attributes:
        tokens: Token ids; padding holds an arbitrary valid id.
        mask: True on real tokens. Every row is real tokens first, padding after.
        labels: The tokens of each row as readable text, real tokens only.
        prepend_bos: Whether a beginning-of-sequence token was put in front; None where the caller
            gave token ids.
        name: What the sequences are, for titles ("built-in prompt", "1 × n").
        parents: None in an ordinary batch. In a row that is a tree, the index of the token that
            comes before each token in its prompt, -1 where a prompt begins; parents come first.
    """

    tokens: Int[Tensor, "batch position"]
    mask: Bool[Tensor, "batch position"]
    labels: tuple[tuple[str, ...], ...]
    prepend_bos: bool | None = None
    name: str = "prompt"
    parents: Int[Tensor, "batch position"] | None = None

    def __post_init__(self) -> None:
        if self.tokens.shape != self.mask.shape or self.tokens.ndim != 2:
            raise ValueError(
                "tokens and mask must both be [batch position], got "
                f"{tuple(self.tokens.shape)} and {tuple(self.mask.shape)}"
            )
        if not bool(self.mask[:, 0].all()) or bool((self.mask[:, 1:] > self.mask[:, :-1]).any()):
            raise ValueError("mask must be True on a non-empty prefix of every row (right padding)")
        if tuple(len(row) for row in self.labels) != self.lengths:
            raise ValueError("labels must name exactly the real tokens of every row")
        if self.parents is not None and (len(self.tokens) > 1 or not bool(self.mask.all())):
            raise ValueError("a tree is one row without padding")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens in each row."""
        return tuple(self.mask.sum(dim=1).tolist())

    @property
    def longest(self) -> int:
        """Positions that the longest prompt takes."""
        if self.parents is None:
            return max(self.lengths)
        depth: list[int] = []
        for parent in self.parents[0].tolist():
            depth.append(1 if parent < 0 else depth[parent] + 1)
        return max(depth)

    def path(self, end: int) -> list[int]:
        """Indices in the first row of the tokens of the prompt that ends at ``end``."""
        if self.parents is None:
            return list(range(end + 1))
        above, path = self.parents[0].tolist(), []
        while end >= 0:
            path.append(end)
            end = above[end]
        return path[::-1]

    @property
    def digest(self) -> str:
        """SHA-256 of the real tokens, row by row."""
        digest = hashlib.sha256()
        for row, length in zip(self.tokens.tolist(), self.lengths, strict=True):
            digest.update(repr(row[:length]).encode())
        if self.parents is not None:
            digest.update(repr(self.parents.tolist()).encode())
        return digest.hexdigest()

    def rows(self, start: int, stop: int) -> "Sequences":
        """The rows ``start`` to ``stop``, padding kept."""
        return Sequences(
            self.tokens[start:stop],
            self.mask[start:stop],
            self.labels[start:stop],
            self.prepend_bos,
            self.name,
            self.parents,
        )

    def first_tokens(self, count: int) -> "Sequences":
        """The first ``count`` positions of every row."""
        if count >= self.tokens.shape[1]:
            return self
        return Sequences(
            self.tokens[:, :count],
            self.mask[:, :count],
            tuple(row[:count] for row in self.labels),
            self.prepend_bos,
            self.name,
            None if self.parents is None else self.parents[:, :count],
        )

    @classmethod
    def from_rows(
        cls,
        rows: list[list[int]],
        labels: list[list[str]],
        *,
        pad: int = 0,
        prepend_bos: bool | None = None,
        name: str = "prompt",
    ) -> "Sequences":
        """Pad ``rows`` on the right to one length."""
        width = max(len(row) for row in rows)
        tokens = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[index, : len(row)] = True
        return cls(tokens, mask, tuple(tuple(row) for row in labels), prepend_bos, name)
