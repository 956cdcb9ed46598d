"""Sets of keys: what a query may be looking at, so that the mass on it can be measured.

``attention_statistics(model, text, targets=[targets.Window(16), targets.Delimiters()])`` gives one
``[batch layer head query]`` tensor a target, under ``result.masses[target.name]``. A key that the
query cannot see never counts, whatever the target says.
"""

import unicodedata
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from eyechart.errors import InputError, UsageError
from eyechart.results.sequences import Sequences
from eyechart.sequences import single_token

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Target(ABC):
    """A set of keys for every query, from tokens and positions alone."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Under which the mass is found in a result."""

    @abstractmethod
    def keys(self, tokens: Int[Tensor, "batch key"], begin: int, end: int) -> Tensor:
        """Whether queries ``begin`` to ``end`` count key j: Bool, broadcast to [batch query key].

        Args:
            tokens: The keys' tokens, at least ``end`` of them.
            begin: First query.
            end: After the last query.
        """

    def resolve(self, model: "TransformerBridge", sequences: Sequences) -> "Target":
        """The same target, with what only the tokenizer or the text can tell filled in."""
        return self


@dataclass(frozen=True)
class First(Target):
    """The first ``count`` tokens."""

    count: int

    def __post_init__(self) -> None:
        _positive("count", self.count)

    @property
    def name(self) -> str:
        """Such as "first 4"."""
        return f"first {self.count}"

    def keys(self, tokens: Int[Tensor, "batch key"], begin: int, end: int) -> Tensor:
        """Keys j < count."""
        return (_positions(tokens) < self.count)[None, None, :]


@dataclass(frozen=True)
class Window(Target):
    """The last ``width`` tokens up to and including the query itself."""

    width: int

    def __post_init__(self) -> None:
        _positive("width", self.width)

    @property
    def name(self) -> str:
        """Such as "window 16"."""
        return f"window {self.width}"

    def keys(self, tokens: Int[Tensor, "batch key"], begin: int, end: int) -> Tensor:
        """Keys with i - j < width."""
        keys = _positions(tokens)
        return (keys[begin:end, None] - keys[None, :] < self.width)[None]


@dataclass(frozen=True)
class Positions(Target):
    """Chosen positions, counted from 0."""

    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.positions or min(self.positions) < 0:
            raise UsageError(f"positions must be a few, none negative; got {self.positions}")

    @property
    def name(self) -> str:
        """Such as "positions 0, 5"."""
        return f"positions {', '.join(map(str, self.positions))}"

    def keys(self, tokens: Int[Tensor, "batch key"], begin: int, end: int) -> Tensor:
        """Keys at the chosen positions."""
        chosen = torch.tensor(self.positions, device=tokens.device)
        return torch.isin(_positions(tokens), chosen)[None, None, :]

    def resolve(self, model: "TransformerBridge", sequences: Sequences) -> Target:
        """Itself; refuses positions that the text does not have."""
        if max(self.positions) >= max(sequences.lengths):
            raise InputError(
                f"{self.name}: the longest sequence has {max(sequences.lengths)} tokens, "
                "and positions count from 0."
            )
        return self


@dataclass(frozen=True)
class Tokens(Target):
    """Every occurrence of the chosen tokens: ids, or strings of one token each."""

    chosen: tuple[int | str, ...]
    label: str = ""

    def __post_init__(self) -> None:
        if not self.chosen:
            raise UsageError("Tokens needs at least one token")

    @property
    def name(self) -> str:
        """The label, or such as "tokens ' the', 13"."""
        return self.label or f"tokens {', '.join(map(repr, self.chosen))}"

    def keys(self, tokens: Int[Tensor, "batch key"], begin: int, end: int) -> Tensor:
        """Keys that hold one of the tokens."""
        if not all(isinstance(token, int) for token in self.chosen):
            raise UsageError(f"{self.name}: strings become ids by resolve(model, sequences)")
        return torch.isin(tokens, torch.tensor(self.chosen, device=tokens.device))[:, None, :]

    def resolve(self, model: "TransformerBridge", sequences: Sequences) -> Target:
        """Strings as token ids; a string of several tokens is refused."""
        ids = tuple(t if isinstance(t, int) else single_token(model, t) for t in self.chosen)
        return Tokens(ids, self.name)


@dataclass(frozen=True)
class Delimiters(Target):
    """Tokens that hold nothing but punctuation and line ends.

    Where sinks are found besides the first token (Sun et al., arXiv 2402.17762, section 2.2).
    """

    @property
    def name(self) -> str:
        """Always "delimiters"."""
        return "delimiters"

    def keys(self, tokens: Int[Tensor, "batch key"], begin: int, end: int) -> Tensor:
        """Not before the tokenizer has told which tokens they are."""
        raise UsageError("delimiters become token ids by resolve(model, sequences)")

    def resolve(self, model: "TransformerBridge", sequences: Sequences) -> Target:
        """The delimiters that occur in the sequences, as token ids."""
        used = sequences.tokens[sequences.mask].unique().tolist()
        found = tuple(i for i in used if _is_delimiter(model.tokenizer.decode([i])))
        # An id that no vocabulary has, where a text has none: the mass is then zero.
        return Tokens(found or (-1,), self.name)


@dataclass(frozen=True)
class EarlierCopies(Target):
    """Earlier occurrences of the query's own token (what a duplicate-token head looks at)."""

    @property
    def name(self) -> str:
        """Always "earlier copies"."""
        return "earlier copies"

    def keys(self, tokens: Int[Tensor, "batch key"], begin: int, end: int) -> Tensor:
        """Keys j < i with the token of i."""
        same = tokens[:, begin:end, None] == tokens[:, None, :]
        keys = _positions(tokens)
        return same & (keys[None, :] < keys[begin:end, None])


@dataclass(frozen=True)
class AfterEarlierCopies(Target):
    """Tokens that follow an earlier occurrence of the query's token (an induction head's target).

    Olsson et al., arXiv 2209.11895. The query itself is one where its token repeats the one before.
    """

    @property
    def name(self) -> str:
        """Always "after earlier copies"."""
        return "after earlier copies"

    def keys(self, tokens: Int[Tensor, "batch key"], begin: int, end: int) -> Tensor:
        """Keys j <= i whose token j - 1 is the token of i."""
        follows = torch.zeros_like(tokens[:, begin:end, None] == tokens[:, None, :])
        follows[:, :, 1:] = tokens[:, begin:end, None] == tokens[:, None, :-1]
        keys = _positions(tokens)
        return follows & (keys[None, :] <= keys[begin:end, None])


def mass_on(rows: Tensor, target: Target, tokens: Int[Tensor, "batch key"], begin: int) -> Tensor:
    """Mass of attention rows ``[batch head query key]`` on a target: ``[batch head query]``."""
    chosen: Bool[Tensor, "..."] = target.keys(tokens, begin, begin + rows.shape[2])
    # A window's keys, or the few positions of a set, are not worth a look at all the others.
    used = chosen.flatten(0, 1).any(dim=0).nonzero()
    if not len(used):
        return torch.zeros_like(rows[..., 0])
    low, high = int(used[0]), int(used[-1]) + 1
    rows, chosen = rows[..., low:high], chosen[..., low:high]
    if chosen.shape[1] == 1:
        return (rows @ chosen[:, 0, :, None].to(rows.dtype)[:, None])[..., 0]
    return torch.where(chosen[:, None], rows, 0).sum(dim=-1)


def _positions(tokens: Int[Tensor, "batch key"]) -> Int[Tensor, " key"]:
    return torch.arange(tokens.shape[1], device=tokens.device)


def _positive(what: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{what} must be at least 1, got {value}")


def _is_delimiter(text: str) -> bool:
    visible = text.strip(" ")
    return bool(visible) and all(
        unicodedata.category(character)[0] == "P" or character in "\r\n" for character in visible
    )
