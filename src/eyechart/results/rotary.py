"""How heads use the frequencies of rotary position embeddings."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from eyechart.results.storage import storable


@storable
@dataclass(frozen=True, eq=False)
class RotaryUse:
    """Queries and keys by frequency band (Barbero et al., arXiv 2410.06205, section 4).

    A band is a pair of coordinates that is turned by the same angle a token, the fastest first.
    Coordinates that are not turned are bands of angle 0 at the end. Blocks without rotation are
    NaN.

    Attributes:
        angle: Radians a token, of every band.
        q_norm: Mean length of the queries' part in each band, over tokens.
        k_norm: The same of the keys, each key head's given to all query heads that use it.
        q_high: Share of the queries' energy (squared length) in the fastest quarter of the bands.
        k_high: The same of the keys.
    """

    angle: Float[Tensor, "layer band"]
    q_norm: Float[Tensor, "layer head band"]
    k_norm: Float[Tensor, "layer head band"]
    q_high: Float[Tensor, "layer head"]
    k_high: Float[Tensor, "layer head"]

    def agreement(self, score: Float[Tensor, "layer head"]) -> float:
        """Spearman correlation over heads of a score with the queries' high-frequency share."""
        import pandas as pd

        pair = pd.DataFrame({"score": score.flatten(), "high": self.q_high.flatten()})
        return float(pair.dropna().corr(method="spearman").iloc[0, 1])
