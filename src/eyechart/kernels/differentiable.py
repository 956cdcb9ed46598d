"""Attention that autograd can go back through, by the fastest exact way this machine has."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.kernels.attend import kernel_for
from eyechart.kernels.by_torch import by_torch
from eyechart.kernels.call import AttentionCall
from eyechart.kernels.trial import Kernel


def differentiable(call: AttentionCall) -> Float[Tensor, "batch query head d_value"]:
    """A layer's mixtures of values, with a way back that can be taken any number of times."""
    if call.replaced:
        return call.around_replaced(differentiable)
    kernel = kernel_for(call.q.device, torch.float32, call.q.dtype)
    learned = call.sinks is not None and call.sinks.requires_grad  # the kernel holds sinks fixed
    unfit = learned or call.rounded is not None or call.q.dtype != torch.float32
    if kernel.run is None or kernel.pull is None or unfit:
        return by_torch(call)
    return _Attention.apply(call.q, call.k, call.v, call, kernel)


class _Attention(torch.autograd.Function):
    """The compiled kernel's attention, there and back."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, kernel: Kernel
    ) -> Tensor:
        assert kernel.run is not None
        found = kernel.run(call, torch.full((q.shape[0],), q.shape[2]))
        assert call.output is not None
        ctx.save_for_backward(q, k, v, call.output, found["lse"])
        # Not the call: it holds the output, which holds this context.
        ctx.kernel = kernel
        ctx.rest = {n: getattr(call, n) for n in ("scale", "softcap", "start", "sinks")}
        return call.output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, output, lse = ctx.saved_tensors
        call = AttentionCall(q, k, v, output=output, **ctx.rest)
        return *ctx.kernel.pull(call, lse, *slopes), None, None
