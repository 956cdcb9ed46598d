"""One layer's attention as the model computes it: everything that shapes its rows."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from jaxtyping import Float, Int
from torch import Tensor

from eyechart.kernels.replaced import Replacement
from eyechart.kernels.tree import Tree


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
        replaced: Heads that are not to be computed, and what takes their place.
        tree: Where the tokens are several prompts that share their beginnings: a query sees its
            ancestors only, and ``start`` is by position in a prompt.
        rounded: What becomes of rows of probabilities before they meet the values: gets the rows
            and what each query sees of the keys. None leaves them as they are.
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
    replaced: dict[int, Replacement] = field(default_factory=dict)
    tree: Tree | None = None
    rounded: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def length(self) -> int:
        """Queries, which are as many as keys."""
        return self.q.shape[2]

    def around_replaced(
        self, mix: "Callable[[AttentionCall], Tensor]"
    ) -> Float[Tensor, "batch query head d_value"]:
        """The mixtures of values, ``mix`` computing those of the heads that are not replaced."""
        heads = self.q.shape[1]
        shared = heads // self.k.shape[1]
        kept = [head for head in range(heads) if head not in self.replaced]
        batch, _, length, width = self.v.shape
        mixed = self.v.new_empty(batch, length, heads, width)
        if kept:
            groups = Counter(head // shared for head in kept)
            # Heads go on sharing keys where as many are left of every group; else each has its own.
            even = len(set(groups.values())) == 1
            keys = sorted(groups) if even else [head // shared for head in kept]
            part = replace(
                self,
                q=self.q[:, kept],
                k=self.k[:, keys],
                v=self.v[:, keys],
                sinks=None if self.sinks is None else self.sinks[kept],
                replaced={},
            )
            mixed[:, :, kept] = mix(part)
        for head, replacement in self.replaced.items():
            mixed[:, :, head] = replacement.of(self.v[:, head // shared])
        return mixed
