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
    """A right-padded batch of token sequences.

    Attributes:
        tokens: Token ids; padding holds an arbitrary valid id.
        mask: True on real tokens. Every row is real tokens first, padding after.
        labels: The tokens of each row as readable text, real tokens only.
        prepend_bos: Whether a beginning-of-sequence token was put in front; None where the caller
            gave token ids.
        name: What the sequences are, for titles ("built-in prompt", "1 × n").
    """

    tokens: Int[Tensor, "batch position"]
    mask: Bool[Tensor, "batch position"]
    labels: tuple[tuple[str, ...], ...]
    prepend_bos: bool | None = None
    name: str = "prompt"

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

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens in each row."""
        return tuple(self.mask.sum(dim=1).tolist())

    @property
    def digest(self) -> str:
        """SHA-256 of the real tokens, row by row."""
        digest = hashlib.sha256()
        for row, length in zip(self.tokens.tolist(), self.lengths, strict=True):
            digest.update(repr(row[:length]).encode())
        return digest.hexdigest()

    def rows(self, start: int, stop: int) -> "Sequences":
        """The rows ``start`` to ``stop``, padding kept."""
        return Sequences(
            self.tokens[start:stop],
            self.mask[start:stop],
            self.labels[start:stop],
            self.prepend_bos,
            self.name,
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
