"""A kernel is tried against known answers before anything it says is believed."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eyechart.kernels.by_torch import by_torch
from eyechart.kernels.call import AttentionCall
from eyechart.kernels.definitions import Reducer
from eyechart.kernels.streamed import blocks, stream

Run = Callable[[AttentionCall, Tensor], dict[str, Tensor]]
Carry = Callable[[AttentionCall, Tensor, Tensor], Tensor]
Pull = Callable[[AttentionCall, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    """A kernel that passed its trial, or why there is none.

    Attributes:
        run: Takes a layer's attention and the number of real tokens of each sequence, sets the
            call's output and returns the statistics of rows and, as sums, of columns.
        reason: Why there is none, for the reader of a result.
        carry: Takes a layer's attention, the log-sum-exp of its scores and row vectors ``[batch row
            query]``, and returns their product with each head's rows ``[batch head row key]``; None
            where that is left to torch.
        pull: Takes the same and the derivative with respect to the output, and returns those with
            respect to queries, keys and values; None where that is left to torch.
    """

    run: Run | None
    reason: str = ""
    carry: Carry | None = None
    pull: Pull | None = None


def tried(
    run: Run,
    carry: Carry | None = None,
    pull: Pull | None = None,
    device: torch.device | str = "cpu",
) -> Kernel:
    """The kernel, if it equals the definitions on a small case that has everything."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 70, width, generator=draw).to(device)
        for heads, width in ((4, 24), (2, 24), (2, 10))
    )
    start = (torch.arange(70, device=device) - 30).clamp(min=0).expand(2, 70)
    sinks = torch.tensor([0.0, 1.0, -9.0, 3.0], device=device)
    lengths = torch.tensor([70, 41], device=device)
    call = AttentionCall(q, k, v, 0.5, 20.0, start, sinks)
    found = run(call, lengths)
    found["output"] = _output(call)
    mask = torch.arange(70, device=device) < lengths[:, None]
    reducer = Reducer(found.keys(), (), torch.zeros_like(mask, dtype=torch.long), mask)
    call.output = None
    stream(call, torch.float64, reducer)
    truth = reducer.finish() | {"output": _output(call)}
    for name, value in truth.items():
        if not torch.allclose(found[name].double(), value.double(), atol=1e-4):
            return Kernel(None, f"the kernel's {name} differs from its definition")
    if carry is not None:
        rows = torch.randn(2, 9, 70, generator=draw).to(device)
        whole = [rows for _, _, rows in blocks(call, torch.float64)]
        pattern = torch.cat([torch.nn.functional.pad(x, (0, 70 - x.shape[-1])) for x in whole], 2)
        truth = rows.double()[:, None] @ pattern
        if not torch.allclose(carry(call, found["lse"], rows).double(), truth, atol=1e-4):
            return Kernel(run, "the kernel's product with row vectors differs from its definition")
    if pull is not None:
        slope = torch.randn(2, 70, 4, 10, generator=draw).to(device)
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            mixed = by_torch(dataclasses.replace(call, q=leaves[0], k=leaves[1], v=leaves[2]))
            truth = torch.autograd.grad(mixed, leaves, slope.double())
        pulled = pull(call, found["lse"], slope)
        for ours, theirs in zip(pulled, truth, strict=True):
            if not torch.allclose(ours.double(), theirs, atol=1e-4):
                return Kernel(run, "the kernel's derivative differs from its definition", carry)
    return Kernel(run, carry=carry, pull=pull)


def _output(call: AttentionCall) -> Tensor:
    assert call.output is not None
    return call.output
