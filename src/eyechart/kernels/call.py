"""One layer's attention as the model computes it: everything that shapes its rows."""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(eq=False)
class AttentionCall:
    """Queries, keys and values after rotation and norms, and what becomes of their scores.

    score_ij = scale q_i . k_j, then softcap tanh(score / softcap) where there is a soft cap, over
    the keys start_i <= j <= i; softmax over them and, where there is one, the learned sink.

    Attributes:
        q: Queries.
        k: Keys; query head h uses key head h // (heads / kv_heads).
        v: Values, by the same rule.
        scale: Factor of the scores.
        softcap: Bound of the scores (Gemma 2), None where there is none.
        start: First key each query sees, None where that is key 0; it sees all from there on.
        sinks: Logits of a learned sink that is no token (gpt-oss), None where there is none.
        output: The layer's mixtures of values, in the model's format; set by whoever computes them.
        found: Row statistics that came with the output, so that the next who asks need not pay.
    """

    q: Float[Tensor, "batch head query d_head"]
    k: Float[Tensor, "batch kv_head key d_head"]
    v: Float[Tensor, "batch kv_head key d_value"]
    scale: float
    softcap: float | None = None
    start: Int[Tensor, "batch query"] | None = None
    sinks: Float[Tensor, " head"] | None = None
    output: Float[Tensor, "batch query head d_value"] | None = None
    found: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Queries, which are as many as keys."""
        return self.q.shape[2]
