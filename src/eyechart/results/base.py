"""What every result has: where it came from, and how to keep, print and draw it."""

import dataclasses
import html
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from eyechart.errors import ResultError
from eyechart.results.sequences import Sequences
from eyechart.results.storage import open_tree, same, save_tree, storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@storable
@dataclass(frozen=True)
class Provenance:
    """How a result came to be; enough to make it again.

    Attributes:
        versions: eyechart, python, torch, transformers and transformer-lens.
        model: Name the model was loaded by.
        weights: SHA-256 over the names, shapes, types and bytes of all parameters.
        dtype: Number format of the parameters.
        device: Where the embedding lives.
        attention: How attention was computed: "pattern" by TransformerBridge's explicit softmax,
            "fused" without a pattern, "autograd" by torch with a graph for derivatives; several of
            them where layers or parts differ.
        tokens: SHA-256 of the real tokens.
        seed: Seed of whatever was random, None where nothing was.
        hooks: Times each kind of hook fired, over all forward passes.
        forward_passes: Forward passes paid for.
        wall_seconds: Wall time of those passes, and of what was computed from them where that is a
            measurement of its own.
        peak_bytes: On CUDA the peak allocated during the passes; otherwise the peak resident size
            of the process so far. None where the system does not tell.
        created: UTC, ISO 8601.
        notes: What a reader should know, such as a batch that was halved to fit the memory.
    """

    versions: dict[str, str]
    model: str
    weights: str
    dtype: str
    device: str
    attention: str
    tokens: str
    seed: int | None
    hooks: dict[str, int]
    forward_passes: int
    wall_seconds: float
    peak_bytes: int | None
    created: str
    notes: tuple[str, ...] = ()

    @classmethod
    def together(cls, parts: "Sequence[Provenance]", tokens: str, seed: int | None) -> "Provenance":
        """Of a result made from several: costs added up, what all share kept."""
        ways = {way for part in parts for way in part.attention.split(", ")}
        hooks: Counter[str] = Counter()
        for part in parts:
            hooks.update(part.hooks)
        return dataclasses.replace(
            parts[0],
            attention=", ".join(sorted(ways)),
            tokens=tokens,
            seed=seed,
            hooks=dict(hooks),
            forward_passes=sum(part.forward_passes for part in parts),
            wall_seconds=round(sum(part.wall_seconds for part in parts), 4),
            peak_bytes=max((part.peak_bytes for part in parts if part.peak_bytes), default=None),
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        )


@dataclass(frozen=True, eq=False)
class Kept(ABC):
    """Base of everything that is measured: frozen, comparable, saved whole or not at all."""

    @abstractmethod
    def to_frame(self) -> "pd.DataFrame":
        """A tidy table, one row a cell."""

    @abstractmethod
    def plot(self) -> "go.Figure":
        """A Plotly figure."""

    @abstractmethod
    def lines(self) -> tuple[str, ...]:
        """What the result says, in a few lines."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to the folder ``path``, whole or not at all; returns the folder.

        An eyechart result that is already there is replaced; other files are left alone.
        """
        folder = Path(path)
        save_tree(self, folder)
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a result of this kind.

        Raises:
            ResultError: nothing is there, it is damaged, or it is of another kind.
        """
        result = open_result(path)
        if not isinstance(result, cls):
            raise ResultError(
                f"{str(path)!r} holds a {type(result).__name__}, not a {cls.__name__}. "
                "eyechart.open_result opens any kind."
            )
        return result

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    def __repr__(self) -> str:
        return "\n  ".join((self._title(), *self.lines()))

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in self.lines())
        return f"<p><b>{html.escape(self._title())}</b></p><ul>{items}</ul>"

    @abstractmethod
    def _title(self) -> str:
        """What it is, in one line."""


@dataclass(frozen=True, eq=False, repr=False)
class Result(Kept):
    """Base of what is measured on a model.

    Attributes:
        sequences: The tokens that were measured.
        provenance: How the result came to be.
    """

    sequences: Sequences
    provenance: Provenance

    def _title(self) -> str:
        batch, lengths = len(self.sequences.lengths), self.sequences.lengths
        span = (
            f"{min(lengths)}" if min(lengths) == max(lengths) else f"{min(lengths)}-{max(lengths)}"
        )
        return (
            f"{type(self).__name__} of {self.provenance.model}: "
            f"{batch} sequence{'s' if batch != 1 else ''} of {span} tokens"
        )


def open_result(path: str | os.PathLike[str]) -> Any:
    """Open any saved result by its manifest.

    Args:
        path: The folder a result was saved to, or its ``manifest.json``.

    Returns:
        The result, equal to the one saved.

    Raises:
        ResultError: nothing is there, a file is missing or altered, or the kind is unknown.
    """
    result = open_tree(Path(path))
    if not isinstance(result, Kept):
        raise ResultError(f"{str(path)!r} does not hold a result")
    return result


def head_name(layer: int, head: int) -> str:
    """The field's short name of a head, such as ``L11H6``."""
    return f"L{layer}H{head}"
