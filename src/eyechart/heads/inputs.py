"""The texts of a census: by domain, of one length, and where in them to look."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from eyechart.errors import InputError
from eyechart.results import Sequences
from eyechart.sequences import Inputs, from_ids, prepare
from eyechart.texts import DOMAINS

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Texts = Inputs | Mapping[str, Sequence[str]]
"""What :func:`eyechart.sequences.prepare` takes, or texts by domain."""

SHORTEST = 8
"""Tokens below which positions can hardly be told apart, so that no head can be named."""

TWICE = "said twice"
"""Domain of texts whose second half repeats the first: some heads work only there."""


def prepared(
    model: "TransformerBridge", inputs: Texts | None, prepend_bos: bool | None, name: str
) -> tuple[Sequences, tuple[str, ...]]:
    """Tokens of one length, and the domain of each text.

    Raises:
        InputError: the inputs do not fit the model, or are too short.
    """
    if isinstance(inputs, Mapping):
        pairs = [(domain, text) for domain, texts in inputs.items() for text in texts]
        made = prepare(model, [text for _, text in pairs], prepend_bos=prepend_bos, name=name)
        return of_one_length(made), tuple(domain for domain, _ in pairs)
    made = of_one_length(prepare(model, inputs, prepend_bos=prepend_bos, name=name))
    return made, ("text",) * len(made.lengths)


def of_one_length(texts: Sequences) -> Sequences:
    """The texts cut to the shortest: masses, that on the first token above all, fall with length.

    Raises:
        InputError: the shortest is too short.
    """
    length = min(texts.lengths)
    if length < SHORTEST:
        raise InputError(
            f"text {texts.lengths.index(length)} has {length} tokens, and all texts are compared "
            f"at the length of the shortest: give at least {SHORTEST} tokens each."
        )
    return texts.first_tokens(length)


def by_domain(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """Built-in texts by their domain."""
    found: dict[str, list[str]] = {}
    for name, text in texts.items():
        found.setdefault(DOMAINS[name], []).append(text)
    return found


def with_repeats(
    model: "TransformerBridge", texts: Sequences, domains: tuple[str, ...], count: int = 2
) -> tuple[Sequences, tuple[str, ...]]:
    """The texts, and the beginnings of the first ``count`` of them said twice."""
    length, front = texts.tokens.shape[1], 1 if texts.prepend_bos else 0
    half = (length - front) // 2
    rows = texts.tokens.tolist()
    for row in rows[:count]:
        once = row[front : front + half]
        rows = [*rows, (row[:front] + once + once + once)[:length]]
    made = from_ids(model, rows, prepend_bos=texts.prepend_bos, name=texts.name)
    return made, (*domains, *[TWICE] * (len(rows) - len(domains)))


def measured_positions(length: int, count: int) -> tuple[int, ...]:
    """Evenly spread positions that have something before and after them, the last of both."""
    first, last = min(length // 8, length - 2), length - 2
    steps = torch.linspace(first, last, min(count, last - first + 1))
    return tuple(sorted(set(steps.round().long().tolist())))


def following(texts: Sequences, positions: Sequence[int]) -> Int[Tensor, "text position"]:
    """The token that in fact comes after each of these positions."""
    return texts.tokens[:, [position + 1 for position in positions]]
