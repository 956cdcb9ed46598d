"""Heads that are not computed: something cheap takes the place of their mixture of values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import UsageError

Cheap = Literal["zero", "first", "mean", "identity"]
"""What can take a head's place without a score being computed, the cheapest first."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """What a head writes instead of its mixture of values.

    Attributes:
        kind: "zero" nothing; "first" the first token's value, as if all attention were there;
            "mean" one constant, except at the first token, which can only look at itself;
            "identity" each token's own value, as if all attention were on the diagonal.
        constant: The constant of "mean".
    """

    kind: str
    constant: Float[Tensor, " d_value"] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Cheap):
            raise UsageError(
                f"unknown replacement {self.kind!r}; there are {', '.join(get_args(Cheap))}"
            )
        if (self.kind == "mean") != (self.constant is not None):
            raise ValueError("a constant belongs to the replacement 'mean', and to no other")

    def of(
        self, values: Float[Tensor, "batch position d_value"]
    ) -> Float[Tensor, "batch position d_value"]:
        """What the head writes where these are its values."""
        if self.kind == "zero":
            return torch.zeros_like(values)
        if self.kind == "first":
            return values[:, :1].expand_as(values)
        if self.constant is not None:
            constant = self.constant.to(values).expand_as(values[:, 1:])
            return torch.cat([values[:, :1], constant], dim=1)
        return values


def replacements(
    heads: Sequence[tuple[int, int, str]], means: Float[Tensor, "layer head d_value"]
) -> dict[int, dict[int, Replacement]]:
    """Replacements by layer and head.

    Args:
        heads: As ``(layer, head, kind)``.
        means: The constants of "mean".

    Raises:
        UsageError: a head is not there, or the kind of its replacement is unknown.
    """
    found: dict[int, dict[int, Replacement]] = {}
    layers, count = means.shape[:2]
    for layer, head, kind in heads:
        if not (0 <= layer < layers and 0 <= head < count):
            raise UsageError(
                f"there is no head {head} in layer {layer}: layers are 0 to {layers - 1}, heads 0 "
                f"to {count - 1}."
            )
        constant = means[layer, head] if kind == "mean" else None
        found.setdefault(layer, {})[head] = Replacement(kind, constant)
    return found
