"""How far next-token distributions moved, in nats, to more digits than their logarithms have."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ROWS = 64  # distributions at once: few enough to stay in the caches


class Reference:
    """Next-token distributions that others are compared with.

    Args:
        logits: Of the model as it is.
        following: The token that in fact follows at each of these positions.
    """

    def __init__(
        self,
        logits: Float[Tensor, "text position vocabulary"],
        following: Int[Tensor, "text position"],
    ) -> None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        self._logits = logits.flatten(0, 1).to(wide)
        self._shares = self._logits.softmax(dim=-1)
        self._shape = logits.shape[:2]
        self._following = following.flatten().to(logits.device)

    @property
    def loss(self) -> Float[Tensor, "text position"]:
        """Nats to the token that follows."""
        taken = self._shares.gather(-1, self._following[:, None])
        return -taken.log().view(self._shape).cpu()

    def moved(
        self, logits: Float[Tensor, "row position vocabulary"]
    ) -> tuple[Float[Tensor, "copy text position"], Float[Tensor, "copy text position"]]:
        """KL(reference || these) and the change of loss, of copies of the texts one by one.

        With d the difference of logits, less its mean under the reference p, the divergence is
        log(1 + sum p (e^d - 1)) - sum p d, which is exact to rounding relative to d itself; a
        difference of two entropies would be so only relative to them.
        """
        size, divergence, loss = len(self._logits), [], []
        flat = logits.flatten(0, 1)
        for begin in range(0, len(flat), size):
            for low in range(0, size, _ROWS):
                here = slice(low, min(low + _ROWS, size))
                shares, there = self._shares[here], self._following[here, None]
                new = flat[begin + here.start : begin + here.stop]
                d = new.to(shares.dtype) - self._logits[here]
                mean = (shares * d).sum(dim=-1, keepdim=True)
                d -= mean
                taken, rest = d.gather(-1, there), (shares * d).sum(dim=-1, keepdim=True)
                grown = d.expm1_().mul_(shares).sum(dim=-1, keepdim=True).log1p_()
                divergence.append((grown - rest)[:, 0].clamp(min=0))  # rounding may leave -1e-9
                loss.append((grown - taken)[:, 0])
        copies = (len(flat) // size, *self._shape)
        return tuple(torch.cat(x).view(copies).cpu() for x in (divergence, loss))  # pyright: ignore[reportReturnType]
