"""Probes of the last tokens of prompts: distances of pairs, and the streams themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.collapse.measures import distances, of_next_tokens
from eyechart.kernels import AttentionCall, attend
from eyechart.models import facts_of
from eyechart.precision import Format, share_expected, share_identical
from eyechart.probes import Look, Observations, StreamProbe, depth_labels, has_site
from eyechart.probes.plan import fusable
from eyechart.results import Provenance, Sequences
from eyechart.results.collapse import DISTANCES

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Place = tuple[int, int]
"""Row and position of a token."""

HEADS = "head "
"""In front of the name of a distance that is one of every head."""


@dataclass(frozen=True, eq=False)
class Found:
    """What one run tells of some lengths.

    Attributes:
        tensors: By name, the length last; distances have the layer first.
        layer_labels: Names of the entries of the layer axis.
        steps: Between the final representations of the last pair, in units of each format's
            spacing.
        provenance: Of the run.
    """

    tensors: dict[str, Tensor]
    layer_labels: tuple[str, ...]
    steps: Float[Tensor, "format d_model"]
    provenance: Provenance


class EndsProbe(StreamProbe[Found]):
    """Reduces the stream to the distances of pairs of tokens, layer by layer as they come.

    Args:
        model: Whose last layer with attention tells of the heads.
        pairs: For every length the last tokens of the shorter prompt, the longer one and, where
            the family has one, the control.
        formats: Number formats to hold the final representations in.
        heads: Whether the last layer's heads are compared.
        next_token: Whether next-token distributions are.
    """

    def __init__(
        self,
        model: "TransformerBridge",
        pairs: Sequence[Sequence[Place]],
        formats: Sequence[Format],
        heads: bool,
        next_token: bool,
    ) -> None:
        sides = list(zip(*pairs, strict=True))
        self.places = [(torch.tensor(side)[:, 0], torch.tensor(side)[:, 1]) for side in sides]
        self.formats, facts = tuple(formats), facts_of(model)
        self.n_layers = facts.n_layers
        self.last = ("final_norm", None)
        if not has_site(model, "final_norm"):
            self.last = ("resid_post", self.n_layers - 1)
        self.head_layer = facts.attention_layers[-1] if heads else None
        # Where attention is taken over, its output is at hand; a hook might undo the taking over.
        by_pattern = self.head_layer in fusable(model, facts, ())[1]
        self.hooked = by_pattern and has_site(model, "z")
        if next_token:
            ends = sorted({position for side in sides[:2] for _, position in side})
            self.next_token_at = tuple(ends)

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """The stream; the heads' mixtures and the next token where they are compared. Attention,
        of which nothing is kept, so that no pattern need be made."""
        more = ["attention"]
        if self.hooked:
            more.append("z")
        if self.next_token_at is not None:
            more.append("next_token")
        return (*super().sites(model), *more)

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        """Distances at once, so that no stream is kept."""
        if look.site in ("attention", "z"):
            return self._heads(activation, look) if look.layer == self.head_layer else {}
        if look.site == "next_token":
            return self._next_tokens(activation)
        return super().observe(activation, look)

    def reduce(self, stream: Tensor, look: Look) -> Mapping[str, Tensor]:
        """Every distance of every pair, and what formats make of the final representation."""
        ends = self._ends(stream)
        found = distances(ends[0], ends[1])
        if len(ends) > 2:
            found["control"] = distances(ends[0], ends[2])["relative"]
        if (look.site, look.layer) == self.last:
            a, b = ends[:2]
            shares = [
                (share_identical(a, b, each), share_expected(a, b, each), each.steps(a[-1], b[-1]))
                for each in self.formats
            ]
            columns = zip(
                ("identical", "expected", "steps"), zip(*shares, strict=True), strict=False
            )
            found |= {name: torch.stack(column).to(a.dtype) for name, column in columns}
        return {name: value[None] for name, value in found.items()}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> Found:
        """Layers stacked, the final norm's output last."""
        names = (*DISTANCES, "control") if len(self.places) > 2 else DISTANCES
        found = {name: self.at_every_depth(observations, name)[0] for name in names}
        labels = depth_labels(self.n_layers, len(found["l1"]))
        elsewhere = (
            *((self.last[0], name) for name in ("identical", "expected", "steps")),
            *((site, HEADS + name) for site in ("attention", "z") for name in DISTANCES),
            *(("next_token", name) for name in ("tv", "kl", "same_argmax")),
        )
        for site, name in elsewhere:
            for value in observations.layers(site, name).values():
                found[name] = value[0]
        steps = found.pop("steps", torch.empty(0, 0))
        return Found(found, labels, steps, provenance)

    def _ends(self, activation: Tensor) -> list[Tensor]:
        return [
            activation[rows.to(activation.device), at.to(activation.device)]
            for rows, at in self.places
        ]

    def _heads(self, mixed: Any, look: Look) -> Mapping[str, Tensor]:
        if isinstance(mixed, AttentionCall):
            attend(mixed, look.tokens, look.mask)
            mixed = mixed.output
        elif look.site == "attention" or mixed.ndim != 4:
            return {}  # a pattern, or an architecture that shows all heads as one vector
        shorter, longer = self._ends(mixed)[:2]
        found = distances(shorter, longer)
        return {HEADS + name: value.T[None] for name, value in found.items()}

    def _next_tokens(self, logits: Tensor) -> Mapping[str, Tensor]:
        assert self.next_token_at is not None
        column = {position: index for index, position in enumerate(self.next_token_at)}
        rows = [
            row * len(column) + torch.tensor([column[int(position)] for position in at])
            for row, at in self.places[:2]
        ]
        shorter, longer = (row.to(logits.device) for row in rows)
        found = of_next_tokens(logits.flatten(0, 1), shorter, longer)
        return {
            name: value[None]
            for name, value in zip(("tv", "kl", "same_argmax"), found, strict=True)
        }


class StreamsProbe(StreamProbe[tuple[Tensor, Provenance]]):
    """Keeps the stream at chosen tokens, at every depth.

    Args:
        places: Which tokens.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.rows, self.at = (torch.tensor(axis) for axis in zip(*places, strict=True))

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """The stream; and attention, of which nothing is kept, so that no pattern need be made."""
        return (*super().sites(model), "attention")

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        """The stream only."""
        return {} if look.site == "attention" else super().observe(activation, look)

    def reduce(self, stream: Tensor, look: Look) -> Mapping[str, Tensor]:
        """The chosen tokens."""
        return {"chosen": stream[self.rows.to(stream.device), self.at.to(stream.device)][None]}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> tuple[Float[Tensor, "layer token d_model"], Provenance]:
        """Layers stacked, the final norm's output last."""
        return self.at_every_depth(observations, "chosen")[0], provenance
