"""The truth by intervention: what becomes of the target when one token is replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eyechart.probes import Look, Observations, Probe, capture
from eyechart.results import Provenance, Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

POSITIONS = 64
"""Positions replaced by default, spread over the text."""

_TOKENS = 2**14  # in one forward pass


@dataclass(frozen=True, eq=False)
class Replaced:
    """What replacing tokens did; see :class:`eyechart.results.InformationFlow`."""

    kl: Float[Tensor, "batch position"]
    change: Float[Tensor, "batch position"]
    token: Int[Tensor, "batch position"]
    provenance: tuple[Provenance, ...]


def chosen_positions(last: int, count: int = POSITIONS) -> list[int]:
    """Positions up to ``last`` to replace: all, or ``count`` evenly spread with both ends."""
    if last < count:
        return list(range(last + 1))
    return sorted(set(torch.linspace(0, last, count).round().long().tolist()))


def other_token(tokens: Int[Tensor, " position"], at: int, draw: torch.Generator) -> int:
    """Another token of the same text, drawn at random, so that it is of the text's own kind.

    In a text of one token only: the neighbouring id.
    """
    there = int(tokens[at])
    others = sorted(set(tokens.tolist()) - {there})
    if not others:
        return there + 1 if there == 0 else there - 1
    return others[int(torch.randint(len(others), (1,), generator=draw))]


def replace(
    model: "TransformerBridge",
    sequences: Sequences,
    query: Int[Tensor, " batch"],
    target: int | None,
    positions: Sequence[int] | None,
    batch_size: int | None,
    seed: int,
) -> Replaced:
    """Replace one token at a time and look at the chosen position.

    Texts are cut after the chosen position, which nothing behind it can reach.

    Args:
        model: A TransformerBridge.
        sequences: The tokens.
        query: The chosen position of each sequence.
        target: Block out of which the representation is read; None for the final norm.
        positions: Which tokens to replace; None spreads :data:`POSITIONS` over each text.
        batch_size: Sequences a pass.
        seed: Of the replacement tokens.
    """
    shape = sequences.tokens.shape
    kl, change = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    token = torch.full(shape, -1, dtype=torch.long)
    sources = []
    for b, last in enumerate(query.tolist()):
        draw = torch.Generator().manual_seed(seed + b)
        own = sequences.tokens[b, : last + 1]
        wanted = chosen_positions(last) if positions is None else positions
        at = [p for p in dict.fromkeys(wanted) if p <= last]
        rows = own.repeat(len(at) + 1, 1)
        for row, position in enumerate(at, start=1):
            rows[row, position] = other_token(own, position, draw)
        labels = (sequences.labels[b][: last + 1],) * len(rows)
        changed = Sequences(
            rows, torch.ones_like(rows, dtype=torch.bool), labels, sequences.prepend_bos
        )
        size = batch_size or max(1, _TOKENS // (last + 1))
        ((stream, logits, source),) = capture(
            model, changed, [EndProbe(target)], batch_size=size, seed=seed
        )
        sources.append(source)
        logs = logits.double().log_softmax(dim=-1)
        kl[b, at] = (logs[0].exp() * (logs[0] - logs[1:])).sum(dim=-1).clamp(min=0).float()
        moved = (stream[1:] - stream[0]).norm(dim=-1) / stream[0].norm()
        change[b, at] = moved.float()
        token[b, at] = rows[torch.arange(1, len(rows)), at]
    return Replaced(kl, change, token, tuple(sources))


class EndProbe(Probe[tuple[Tensor, Tensor, Provenance]]):
    """Keeps the target and the next-token logits at the last position of equally long sequences.

    Args:
        target: Block out of which to read; None for the final norm.
    """

    def __init__(self, target: int | None) -> None:
        self.target = target

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """The target, the model's output, and attention, so that no pattern is made."""
        return ("final_norm" if self.target is None else "resid_post", "next_token", "attention")

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        """The last position."""
        if look.site == "next_token":
            return {"logits": activation}
        if look.site == "attention" or look.layer != self.target:
            return {}
        return {"stream": activation[:, -1].clone()}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> tuple[Tensor, Tensor, Provenance]:
        """Target ``[batch d_model]``, logits ``[batch vocabulary]``."""
        site = "final_norm" if self.target is None else "resid_post"
        stream = observations.one(site, "stream")
        return stream.double(), observations.one("next_token", "logits"), provenance
