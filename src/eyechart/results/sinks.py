"""What makes the first token a sink: mass, values, keys, and the stream that carries it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from eyechart.results.storage import storable


@storable
@dataclass(frozen=True, eq=False)
class SinkProfile:
    """The first token against the others, layer by layer.

    Guo et al., arXiv 2410.13835: attention sink, value-state drain and residual-state peak come
    together; Gu et al., arXiv 2410.10781: the sink is driven by the angle between queries and its
    key, not by lengths. Ratios are over the median of the other tokens; blocks without attention
    are NaN.

    Attributes:
        prepend_bos: Whether a beginning-of-sequence token was in front; None where token ids were
            given.
        mass: Mean attention on the first token, over queries and heads.
        rate: Share of heads whose mean mass on the first token exceeds 0.3, by layer.
        value_norm: ``|v_0|`` over the others', by query head.
        output_norm: ``|W_O v_0|`` over the others', what the sink writes; None where a head's part
            of the output projection cannot be told apart.
        key_norm: ``|k_0|`` over the others'.
        cosine: Mean cosine of the queries with the first token's key.
        cosine_others: Mean cosine of the queries with the other keys they see.
        residual: ``|h_0|`` over the others', entry 0 the embedding.
    """

    prepend_bos: bool | None
    mass: Float[Tensor, "batch layer"]
    rate: Float[Tensor, " layer"]
    value_norm: Float[Tensor, "batch layer head"]
    output_norm: Float[Tensor, "batch layer head"] | None
    key_norm: Float[Tensor, "batch layer head"]
    cosine: Float[Tensor, "batch layer head"]
    cosine_others: Float[Tensor, "batch layer head"]
    residual: Float[Tensor, "batch stream"]

    @property
    def value_drain(self) -> float:
        """Median over layers and heads of ``|v_0|`` over the others': below 1 the sink is dry."""
        return float(self.value_norm.nanmedian())
