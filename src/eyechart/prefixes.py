"""Prompts that begin alike, merged: what they share is one run of tokens, not one a prompt.

A causal model's representation of a token depends on the tokens before it only, so a prompt that is
the beginning of another has its last representation inside it, and two prompts that part ways share
everything up to there. All prompts of a collapse curve together are a tree with few branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from eyechart.errors import InputError
from eyechart.results.sequences import Sequences
from eyechart.sequences import check_fits, readable

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# Paths that long are compared with as a whole; what is left of a prompt is walked token by token.
_LONG = 32


@dataclass(frozen=True, eq=False)
class Merged:
    """Prompts as one row.

    Attributes:
        sequences: The row; an ordinary one where every prompt is the beginning of the longest.
        ends: Index of each prompt's last token, in the order in which the prompts were given.
    """

    sequences: Sequences
    ends: tuple[int, ...]


def merged(
    model: "TransformerBridge",
    prompts: Sequence[Sequence[int]],
    *,
    prepend_bos: bool | None = None,
    name: str = "prompts",
    longest_first: bool = True,
) -> Merged:
    """Merge prompts, given as token ids, by what they begin with.

    Args:
        model: Whose tokens they are.
        prompts: Token ids of each.
        prepend_bos: Whether they begin with that token, for the record.
        name: What they are, for titles.
        longest_first: Make the longest prompt the trunk, which is computed fastest; otherwise the
            first one given is.

    Raises:
        InputError: a prompt is empty, does not fit the context or has ids outside the vocabulary.
    """
    rows = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    if not rows or not all(map(len, rows)):
        raise InputError("every prompt needs at least one token")
    tree = _Trie()
    ends = [0] * len(rows)
    # Of prompts that begin alike the longest first, so that the others find the branch whole.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]) * longest_first)
    for index in order:
        ends[index] = tree.insert(rows[index])
    parents = torch.tensor(tree.parents)
    chain = bool((parents == torch.arange(len(parents)) - 1).all())
    sequences = Sequences(
        tokens=torch.tensor([tree.tokens]),
        mask=torch.ones(1, len(parents), dtype=torch.bool),
        labels=(tuple(readable(model, tree.tokens)),),
        prepend_bos=prepend_bos,
        name=name,
        parents=None if chain else parents[None],
    )
    check_fits(model, sequences)
    return Merged(sequences, tuple(ends))


class _Trie:
    """Tokens, each with its parent, and a way to find a prompt's beginning among them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._child: dict[tuple[int, int], int] = {}
        self._paths: list[tuple[np.ndarray, np.ndarray]] = []

    def insert(self, prompt: np.ndarray) -> int:
        """Add what is not there yet; returns the index of the prompt's last token."""
        shared, path = 0, None
        for known, nodes in self._paths:
            width = min(len(known), len(prompt))
            differs = known[:width] != prompt[:width]
            length = int(differs.argmax()) if differs.any() else width
            if length > shared:
                shared, path = length, nodes
        at = -1 if path is None else int(path[shared - 1])
        walked = [] if path is None else [path[:shared]]
        for token in prompt[shared:].tolist():
            child = self._child.get((at, token))
            if child is None:
                child = len(self.tokens)
                self._child[at, token] = child
                self.tokens.append(token)
                self.parents.append(at)
            walked.append(np.array([child]))
            at = child
        if len(prompt) - shared >= _LONG:
            self._paths.append((prompt, np.concatenate(walked)))
        return at
