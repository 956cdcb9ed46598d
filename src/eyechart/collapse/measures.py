"""How far apart two representations, and two next-token distributions, are."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_ROWS = 8  # pairs of distributions at once: few enough to stay in the caches


def distances(
    shorter: Float[Tensor, "*batch d"], longer: Float[Tensor, "*batch d"]
) -> dict[str, Float[Tensor, "*batch"]]:
    """L1, L2, L-infinity, relative (L1 over the longer prompt's L1 length) and cosine distance.

    In the format of the representations, float32 at least.
    """
    kind = torch.promote_types(shorter.dtype, torch.float32)
    shorter, longer = shorter.to(kind), longer.to(kind)
    difference = longer - shorter
    size = difference.abs()
    l1 = size.sum(dim=-1)
    tiny = torch.finfo(kind).tiny
    # Half the squared distance of the unit vectors: 1 - cos has no digits left for small angles.
    units = torch.nn.functional.normalize(shorter, dim=-1, eps=tiny)
    units = torch.nn.functional.normalize(longer, dim=-1, eps=tiny) - units
    return {
        "l1": l1,
        "l2": difference.norm(dim=-1),
        "linf": size.amax(dim=-1),
        # Two zero vectors are no distance apart.
        "relative": l1 / longer.abs().sum(dim=-1).clamp(min=tiny),
        "cosine": units.square().sum(dim=-1) / 2,
    }


def of_next_tokens(
    logits: Float[Tensor, "row vocabulary"], shorter: Tensor, longer: Tensor
) -> tuple[Float[Tensor, " length"], Float[Tensor, " length"], Bool[Tensor, " length"]]:
    """Total variation, KL(shorter || longer) in nats, and whether the likeliest token is the same.

    Total variation is the paper's: the sum of absolute differences, from 0 to 2, without the half
    that makes it a probability. With p the shorter prompt's distribution and d the difference of
    logits less its mean under p, the divergence is log(1 + sum p (e^d - 1)), exact to rounding
    relative to d, where a difference of two logarithms would not be.

    Args:
        logits: Of all prompts.
        shorter: Rows of the shorter prompts.
        longer: Rows of the longer ones.
    """
    kind = torch.promote_types(logits.dtype, torch.float32)
    likeliest = logits.argmax(dim=-1)
    variation, divergence = [], []
    for low in range(0, len(shorter), _ROWS):
        before = logits[shorter[low : low + _ROWS]].to(kind)
        d = logits[longer[low : low + _ROWS]].to(kind).sub_(before)
        p = before.softmax(dim=-1)
        d -= torch.linalg.vecdot(p, d)[:, None]
        grown = d.expm1_().mul_(p)  # p (e^d - 1), whose sum is what normalises the other by
        total = grown.sum(dim=-1, keepdim=True)
        divergence.append(total.log1p()[:, 0].clamp(min=0))  # rounding may leave -1e-9
        # q - p = (p e^d - p (1 + total)) / (1 + total)
        moved = torch.linalg.vector_norm(grown.sub_(p.mul_(total)), ord=1, dim=-1)
        variation.append(moved / (1 + total[:, 0]))
    return torch.cat(variation), torch.cat(divergence), likeliest[shorter] == likeliest[longer]
