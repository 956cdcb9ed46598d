"""What a distance is to be compared with: unrelated prompts above it, arithmetic below it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.collapse.ends import StreamsProbe
from eyechart.collapse.measures import distances
from eyechart.prefixes import merged
from eyechart.probes import capture
from eyechart.results import Provenance
from eyechart.sequences import fragment, from_ids
from eyechart.texts import TEXTS

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_TOKENS = 32
"""Tokens of each unrelated prompt: enough to be about something, few enough to cost little."""


@dataclass(frozen=True, eq=False)
class References:
    """Distances that give a curve its scale.

    Attributes:
        unrelated: Median over pairs of unrelated prompts, by distance; empty for a model without
            tokeniser.
        null: Between the same prompt in two arrangements of the same pass, by distance.
        provenances: Of the runs it took.
    """

    unrelated: Mapping[str, Float[Tensor, " layer"]]
    null: Mapping[str, Float[Tensor, "layer length"]]
    provenances: tuple[Provenance, ...]


def references_of(
    model: "TransformerBridge",
    prompt: Sequence[int],
    at: Sequence[int],
    streams: Float[Tensor, "layer length d_model"] | None,
    *,
    bos: Sequence[int] = (),
    shared: bool,
) -> References:
    """Run a prompt once more, together with prompts that have nothing to do with it.

    Args:
        model: A TransformerBridge.
        prompt: Token ids, the longest of the curve.
        at: Positions whose streams are compared with those of the first run.
        streams: Those of the first run; None has it made here, of the prompt alone.
        bos: What stands in front of the unrelated prompts.
        shared: Whether this model takes prompts that share tokens as one row.
    """
    provenances: list[Provenance] = []

    def run(
        rows: Sequence[Sequence[int]], at: Sequence[int]
    ) -> Float[Tensor, "layer token d_model"]:
        """The first row at these positions, then the others at their ends."""
        if shared and len(rows) > 1:
            # The first last, as a branch: its attention is summed in another order than a trunk's.
            whole = merged(model, [*rows[1:], rows[0]], name="references", longest_first=False)
            path = whole.sequences.path(whole.ends[-1])
            places = [(0, path[n]) for n in at] + [(0, end) for end in whole.ends[:-1]]
            inputs = whole.sequences
        else:
            ends = [(index, len(row) - 1) for index, row in enumerate(rows)]
            places = [(0, n) for n in at] + ends[1:]
            inputs = from_ids(model, rows, name="references")
        ((found, provenance),) = capture(model, inputs, [StreamsProbe(places)])
        provenances.append(provenance)
        return found

    if streams is None:
        streams = run([prompt], at)
    texts = _unrelated(model, bos)
    if shared:
        again = run([prompt, *texts], at)
        others = again[:, len(at) :]
    else:
        # A long row beside many short ones would be mostly padding.
        again = run([prompt, prompt[:1]], at)
        others = run(texts, [len(texts[0]) - 1]) if texts else again[:, :0]
    unrelated: dict[str, Tensor] = {}
    if texts:
        first, second = torch.tensor(list(combinations(range(len(texts)), 2))).T
        found = distances(others[:, first], others[:, second])
        unrelated = {name: value.median(dim=-1).values for name, value in found.items()}
    return References(unrelated, distances(streams, again[:, : len(at)]), tuple(provenances))


def _unrelated(model: "TransformerBridge", bos: Sequence[int]) -> list[list[int]]:
    if getattr(model, "tokenizer", None) is None:
        return []
    limit = min(_TOKENS, model.cfg.n_ctx or _TOKENS)
    return [[*bos, *fragment(model, text)][:limit] for text in TEXTS.values()]
