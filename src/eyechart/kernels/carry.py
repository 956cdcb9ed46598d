"""Row vectors times one layer's attention, with no pattern in between."""

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.kernels.attend import kernel_for
from eyechart.kernels.call import AttentionCall
from eyechart.kernels.streamed import blocks


def carry(
    call: AttentionCall,
    rows: Float[Tensor, "batch row query"],
    lse: Float[Tensor, "batch head query"] | None = None,
    accumulate: torch.dtype = torch.float32,
) -> Float[Tensor, "batch head row key"]:
    """``rows @ A`` for the attention matrix A of each head.

    A row of a product of attention matrices is one row vector carried through the layers from the
    last to the first, so that the product itself, n x n, is never there. All rows of interest go
    together: they share the scores, which are most of the price.

    Args:
        call: The layer's attention.
        rows: The row vectors.
        lse: Log-sum-exp of the scores, where :func:`eyechart.kernels.attend` has returned it;
            without it the softmax is taken again, in torch.
        accumulate: Number format of scores and sums.
    """
    kernel = kernel_for(call.q.device, accumulate, call.q.dtype)
    if kernel.carry is not None and lse is not None and call.rounded is None:
        return kernel.carry(call, lse, rows)
    kind = torch.promote_types(call.q.dtype, accumulate)
    rows = rows.to(kind)
    batch, heads, length, _ = call.q.shape
    carried = rows.new_zeros(batch, heads, rows.shape[1], length)
    for begin, _, block in blocks(call, kind):
        end = block.shape[-1]
        carried[..., :end] += rows[:, None, :, begin:end] @ block
    return carried
