"""How far a change of one token spreads: every layer, every position, with and without the sink."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eyechart.errors import InputError
from eyechart.flow.replacement import other_token
from eyechart.probes import Look, Observations, StreamProbe, capture
from eyechart.results import Provenance, Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def changed_pairs(
    sequences: Sequences,
    query: Int[Tensor, " batch"],
    position: int | None,
    seed: int,
) -> tuple[Sequences, Int[Tensor, "batch two"]]:
    """Each sequence beside a copy in which one token is another, and which that is.

    Args:
        sequences: The tokens.
        query: The chosen position of each sequence.
        position: The one to change; None takes the middle of the text up to the chosen position.
        seed: Of the token it is changed to.
    """
    tokens = sequences.tokens.repeat_interleave(2, dim=0)
    change = []
    for b, last in enumerate(query.tolist()):
        at = last // 2 if position is None else position
        draw = torch.Generator().manual_seed(seed + b)
        length = sequences.lengths[b]
        tokens[2 * b + 1, at] = other_token(sequences.tokens[b, :length], at, draw)
        change.append((at, int(tokens[2 * b + 1, at])))
    labels = tuple(row for row in sequences.labels for _ in range(2))
    pairs = Sequences(
        tokens, sequences.mask.repeat_interleave(2, dim=0), labels, sequences.prepend_bos
    )
    return pairs, torch.tensor(change)


def spread(
    model: "TransformerBridge", pairs: Sequences, batch_size: int | None
) -> tuple[Float[Tensor, "batch stream position"], Provenance]:
    """Relative L2 distance between the two of each pair at every layer and position.

    Raises:
        InputError: memory is too small for the two of a pair at once.
    """
    size = None if batch_size is None else 2 * batch_size
    (found,) = capture(model, pairs, [PairProbe()], batch_size=size)
    return found


class PairProbe(StreamProbe[tuple[Tensor, Provenance]]):
    """Compares every other sequence with the one before it."""

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """The stream, and attention, so that no pattern is made."""
        return ("resid_pre", "resid_post", "attention")

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        """Distances of the stream."""
        return {} if look.site == "attention" else super().observe(activation, look)

    def reduce(self, stream: Tensor, look: Look) -> Mapping[str, Tensor]:
        """Relative distance, the same for both of a pair."""
        if stream.shape[0] % 2:
            raise InputError(
                "there is not memory enough for a text beside its changed copy; shorten the text"
            )
        plain, changed = stream[0::2].double(), stream[1::2].double()
        size = plain.norm(dim=-1).clamp(min=torch.finfo(torch.double).tiny)
        moved = ((changed - plain).norm(dim=-1) / size).float()
        moved = moved.masked_fill(~look.mask[0::2], torch.nan)
        return {"moved": moved.repeat_interleave(2, dim=0)}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> tuple[Tensor, Provenance]:
        """Embedding first, then every block; one entry a pair."""
        return self.by_depth(observations, "moved")[0::2].contiguous(), provenance
