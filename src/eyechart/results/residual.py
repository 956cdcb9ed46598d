"""The size of the residual stream, and the few coordinates that dwarf all others."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eyechart.results import figures
from eyechart.results.base import Result
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class MassiveActivation(NamedTuple):
    """A coordinate of the residual stream that meets the rule of :meth:`ResidualNorms.massive`."""

    batch: int
    layer: int
    position: int
    dimension: int
    value: float
    ratio: float


@storable
@dataclass(frozen=True, eq=False, repr=False)
class ResidualNorms(Result):
    """Length of the residual stream at every layer and position, with its largest coordinates.

    The layer axis has one entry more than the model has blocks: entry 0 is the embedding, entry l
    the stream after block l - 1. Padding is NaN.

    Attributes:
        norm: Euclidean length of the residual stream.
        final_norm: Euclidean length of the final norm's output, None where the model has none.
        largest: The three largest coordinates by magnitude, signed, largest first.
        largest_dimension: Which coordinates those are; -1 on padding.
        median: Median magnitude of all coordinates of one sequence at one layer.
    """

    norm: Float[Tensor, "batch layer position"]
    final_norm: Float[Tensor, "batch position"] | None
    largest: Float[Tensor, "batch layer position rank"]
    largest_dimension: Int[Tensor, "batch layer position rank"]
    median: Float[Tensor, "batch layer"]

    def massive(
        self, threshold: float = 100.0, ratio: float = 1000.0
    ) -> tuple[MassiveActivation, ...]:
        """Massive activations: ``|x| > threshold`` and ``|x| > ratio`` times the layer's median.

        The rule of Sun et al., arXiv 2402.17762, section 2, on the three largest coordinates of
        every position; largest first. Small models can miss the second clause in early layers:
        look at ``ratio`` of what is found rather than at whether anything is.
        """
        size = self.largest.abs()
        relative = size / self.median[:, :, None, None]
        found = (size > threshold) & (relative > ratio)
        return tuple(
            sorted(
                (
                    MassiveActivation(
                        b,
                        l,
                        p,
                        int(self.largest_dimension[b, l, p, r]),
                        float(self.largest[b, l, p, r]),
                        float(relative[b, l, p, r]),
                    )
                    for b, l, p, r in found.nonzero().tolist()
                ),
                key=lambda item: -abs(item.value),
            )
        )

    def to_frame(self) -> "pd.DataFrame":
        """One row a (sequence, layer, position), padding left out."""
        import pandas as pd

        batch, layer, position = (~self.norm.isnan()).nonzero(as_tuple=True)
        return pd.DataFrame(
            {
                "batch": batch.numpy(),
                "layer": layer.numpy(),
                "position": position.numpy(),
                "norm": self.norm[batch, layer, position].numpy(),
                "largest": self.largest[batch, layer, position, 0].numpy(),
                "largest_dimension": self.largest_dimension[batch, layer, position, 0].numpy(),
                "median": self.median[batch, layer].numpy(),
            }
        )

    def plot(self) -> "go.Figure":
        """Layer-by-position map of the first sequence, on a logarithmic scale."""
        return figures.residual_map(self.norm[0], list(self.sequences.labels[0]))

    def lines(self) -> tuple[str, ...]:
        """The peak of the stream, and how far it stands out."""
        flat = int(self.norm.nan_to_num(-1).argmax())
        b, l, p = (int(i) for i in torch.unravel_index(torch.tensor(flat), self.norm.shape))
        rest = float(self.norm[b, l].nanmedian())
        said = [
            f"largest norm {float(self.norm[b, l, p]):.4g} at layer {l}, position {p} "
            f"({self.sequences.labels[b][p]!r}): {float(self.norm[b, l, p]) / rest:.3g} times the "
            "median of its layer"
        ]
        massive = self.massive()
        if massive:
            top = massive[0]
            said.append(
                f"{len(massive)} massive activations in dimensions "
                f"{', '.join(map(str, sorted({item.dimension for item in massive})))}; largest "
                f"{top.value:.4g} at layer {top.layer}, position {top.position}"
            )
        else:
            said.append("no massive activation (|x| > 100 and > 1000 times the layer's median)")
        return tuple(said)
