"""Attention in blocks of queries, in plain torch: exact on every device and in every format.

A block's rows exist, are reduced and are gone; memory is linear in length. Slower than a kernel
written for the purpose, and what such kernels are tested against.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from eyechart.kernels.call import AttentionCall
from eyechart.kernels.definitions import Reducer

# Scores that exist at once: few enough for the caches of a CPU, enough to fill a GPU.
_SCORES = {"cpu": 2**20, "cuda": 2**27}


def stream(call: AttentionCall, accumulate: torch.dtype, reducer: Reducer | None = None) -> None:
    """Compute the layer's output (unless it is there), and hand every row to ``reducer``.

    Args:
        call: The layer's attention; its ``output`` is set.
        accumulate: Number format of scores, softmax and sums.
        reducer: Takes the rows; None computes the output only.
    """
    kind = torch.promote_types(call.q.dtype, accumulate)
    values = call.v.to(kind)
    output: list[Tensor] = []
    for begin, low, rows in blocks(call, kind):
        if call.output is None:
            output.append(mixed(rows[..., low:], values[:, :, low : rows.shape[-1]]))
        if reducer is not None:
            reducer.add(begin, rows)
    if call.output is None:
        call.output = torch.cat(output, dim=1).to(call.v.dtype)


def blocks(
    call: AttentionCall, kind: torch.dtype
) -> Iterator[tuple[int, int, Float[Tensor, "batch head query key"]]]:
    """Blocks of attention rows: first query, first key that any of them sees, and the rows.

    Keys after a block's last query are left out.
    """
    batch, heads, length, _ = call.q.shape
    queries, keys = call.q.to(kind) * call.scale, call.k.to(kind).transpose(-1, -2)
    allowed = _SCORES.get(call.q.device.type, _SCORES["cuda"])
    step = min(length, max(16, allowed // (batch * heads * length)))
    at = torch.arange(length, device=call.q.device)
    for begin in range(0, length, step):
        end = min(begin + step, length)
        start = None if call.start is None else call.start[:, begin:end]
        low = 0 if start is None else int(start.min())
        hidden = (at[None, low:end] > at[begin:end, None])[None]
        if start is not None:
            hidden = hidden | (at[low:end] < start[..., None])
        rows = softmax(call, queries[:, :, begin:end], keys[..., low:end], hidden)
        # Keys before the window are part of the row: their mass is zero.
        yield begin, low, torch.nn.functional.pad(rows, (low, 0)) if low else rows


def softmax(
    call: AttentionCall,
    queries: Float[Tensor, "batch head query d_head"],
    keys: Float[Tensor, "batch kv_head d_head key"],
    hidden: Bool[Tensor, "#batch query key"],
) -> Float[Tensor, "batch head query key"]:
    """Attention rows of some queries over some keys.

    Args:
        call: Whose soft cap, learned sinks and rounding apply.
        queries: Scaled, in the format of the sums.
        keys: In the same format.
        hidden: True where a query does not see a key.
    """
    # Query head h reads key head h // r: heads of one group are neighbours.
    block = rearrange(queries, "b (g r) q d -> b g (r q) d", g=keys.shape[1])
    scores = rearrange(block @ keys, "b g (r q) k -> b (g r) q k", q=queries.shape[2])
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    if call.sinks is None:
        rows = scores.softmax(dim=-1)
    else:
        sink = call.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        rows = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return rows if call.rounded is None else call.rounded(rows, ~hidden[:, None])


def mixed(
    rows: Float[Tensor, "batch head query key"], values: Float[Tensor, "batch kv_head key d_value"]
) -> Float[Tensor, "batch query head d_value"]:
    """Values mixed by attention rows; heads of one group share theirs."""
    seen = rearrange(rows, "b (g r) q k -> b g (r q) k", g=values.shape[1])
    return rearrange(seen @ values, "b g (r q) d -> b q (g r) d", q=rows.shape[2])
