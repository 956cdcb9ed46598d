"""A probe of the whole residual stream: embedding, every block's output, final norm."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eyechart.probes.kept import Observations
from eyechart.probes.probe import Look, Probe, R
from eyechart.probes.sites import has_site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def depth_labels(n_layers: int, entries: int) -> tuple[str, ...]:
    """Names of the entries of :meth:`StreamProbe.at_every_depth`."""
    labels = ("embedding", *(f"block {layer}" for layer in range(n_layers)))
    return (*labels, "final norm") if entries > len(labels) else labels


class StreamProbe(Probe[R]):
    """Sees the stream once at every depth, in float32 at least.

    Entry 0 is the stream into the first block (the embedding, with positions where they are added
    to it), entry l the stream out of block l - 1; the final norm's output is kept apart, because it
    is another quantity.
    """

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """The stream into the first block, out of every block, and the final norm's output."""
        final = ("final_norm",) if has_site(model, "final_norm") else ()
        return ("resid_pre", "resid_post", *final)

    def observe(self, activation: Tensor, look: Look) -> Mapping[str, Tensor]:
        """What :meth:`reduce` makes of the stream."""
        if look.site == "resid_pre" and look.layer != 0:
            return {}  # the input of a later block is the output of the one before
        return self.reduce(
            activation.to(torch.promote_types(activation.dtype, torch.float32)), look
        )

    @abstractmethod
    def reduce(self, stream: Tensor, look: Look) -> Mapping[str, Tensor]:
        """What to keep of the stream ``[batch position d_model]``: tensors by name, batch first."""

    @staticmethod
    def by_depth(observations: Observations, name: str) -> Tensor:
        """One quantity ``[batch layer ...]``, the embedding first."""
        embedding = observations.one("resid_pre", name)
        return torch.cat([embedding[:, None], observations.stack("resid_post", name)], dim=1)

    @classmethod
    def at_every_depth(cls, observations: Observations, name: str) -> Tensor:
        """One quantity ``[batch layer ...]``, the final norm's output last if there is one."""
        layers, final = cls.by_depth(observations, name), cls.after_final_norm(observations, name)
        return layers if final is None else torch.cat([layers, final[:, None]], dim=1)

    @staticmethod
    def after_final_norm(observations: Observations, name: str) -> Tensor | None:
        """One quantity of the final norm's output, None where the model has none."""
        return observations.layers("final_norm", name).get(None)
