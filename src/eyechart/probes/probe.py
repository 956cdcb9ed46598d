"""What a probe is, and a ready-made one that records any site."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from jaxtyping import Bool, Int
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.models.facts import ModelFacts
from eyechart.probes.kept import Observations
from eyechart.probes.sites import hook_names
from eyechart.results.base import Provenance
from eyechart.results.sequences import Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

R = TypeVar("R")


@dataclass(frozen=True)
class Look:
    """One activation's place in the pass.

    Attributes:
        site: Name of the site.
        layer: Block, None outside the blocks.
        mask: True on real tokens, on the activation's device.
        tokens: Token ids, likewise.
        sinks: The layer's learned sink logits, where it has them and the activation is a pattern.
    """

    site: str
    layer: int | None
    mask: Bool[Tensor, "batch position"]
    tokens: Int[Tensor, "batch position"]
    sinks: Tensor | None = None


class Probe(ABC, Generic[R]):
    """Looks at sites during one forward pass and turns what it kept into a result.

    A probe reduces: :meth:`observe` gets an activation, returns what is worth keeping, and the
    activation is gone when its layer is. It holds no state, so one pass can serve many probes and
    a batch can be run in parts.

    Attributes:
        next_token_at: Positions whose logits the site "next_token" hands over, as ``[batch position
            vocabulary]``; None for the last position's alone, ``[batch vocabulary]``.
    """

    next_token_at: tuple[int, ...] | None = None

    @abstractmethod
    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """Names of the sites to look at (``eyechart.probes.SITES``)."""

    @abstractmethod
    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        """What to keep of an activation: tensors by name, batch first.

        The activation is a tensor, except at the site "attention": there it is an
        :class:`eyechart.kernels.AttentionCall` whose output the probe may set (by way of
        :func:`eyechart.kernels.attend`), or the pattern where the layer cannot do without.
        """

    @abstractmethod
    def result(self, observations: Observations, sequences: Sequences, provenance: Provenance) -> R:
        """The result, from everything kept."""

    def notes(self, facts: ModelFacts) -> Sequence[str]:
        """What a reader of the result should know of how this probe works on this model."""
        return ()


class Record(Probe[dict[int | None, Tensor]]):
    """Keeps a site as it is, or what a function makes of it.

    Args:
        site: Name of the site.
        reduce: Applied to each activation; must keep the batch axis first. Without it everything
            is kept, which for a pattern is n x n a head.
        layers: Blocks to keep; all by default.

    The result maps each layer (None outside the blocks) to its tensor, on the CPU.
    """

    def __init__(
        self,
        site: str,
        reduce: Callable[[Any], Tensor] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.site, self.reduce = site, reduce
        self.chosen = None if layers is None else frozenset(layers)

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """The one site; refuses layers that do not have it."""
        if self.site == "attention" and self.reduce is None:
            raise UsageError(
                "the site 'attention' hands over an AttentionCall, which is no tensor to keep: "
                "give a function that makes one of it, or record 'pattern', 'q', 'k' or 'v'."
            )
        there = hook_names(model, self.site)
        absent = sorted((self.chosen or set()) - there.keys())
        if absent:
            raise UsageError(
                f"{model.cfg.model_name} has no site {self.site!r} in layers {absent}; "
                f"it has it in {sorted(layer for layer in there if layer is not None)}."
            )
        return (self.site,)

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        """The activation or its reduction, if the layer was chosen."""
        if self.chosen is not None and look.layer not in self.chosen:
            return {}
        # A copy: a later in-place operation of the model must not reach into what was recorded.
        return {"value": self.reduce(activation) if self.reduce else activation.clone()}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> dict[int | None, Tensor]:
        """Layer to tensor."""
        kept = observations.layers(self.site, "value")
        return {layer: value.contiguous() for layer, value in kept.items()}
