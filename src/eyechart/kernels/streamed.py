"""Attention in blocks of queries, in plain torch: exact on every device and in every format.

A block's rows exist, are reduced and are gone; memory is linear in length. Slower than a kernel
written for the purpose, and what such kernels are tested against.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Float
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
    heads, groups = call.q.shape[1], call.k.shape[1]
    values = call.v.to(kind)
    mixed: list[Tensor] = []
    for begin, low, rows in blocks(call, kind):
        if call.output is None:
            seen = rearrange(rows[..., low:], "b (g r) q k -> b g (r q) k", g=groups)
            out = seen @ values[:, :, low : rows.shape[-1]]
            mixed.append(rearrange(out, "b g (r q) d -> b q (g r) d", r=heads // groups))
        if reducer is not None:
            reducer.add(begin, rows)
    if call.output is None:
        call.output = torch.cat(mixed, dim=1).to(call.v.dtype)


def blocks(
    call: AttentionCall, kind: torch.dtype
) -> Iterator[tuple[int, int, Float[Tensor, "batch head query key"]]]:
    """Blocks of attention rows: first query, first key that any of them sees, and the rows.

    Keys after a block's last query are left out.
    """
    batch, heads, length, _ = call.q.shape
    groups = call.k.shape[1]
    queries, keys = call.q.to(kind) * call.scale, call.k.to(kind).transpose(-1, -2)
    allowed = _SCORES.get(call.q.device.type, _SCORES["cuda"])
    step = min(length, max(16, allowed // (batch * heads * length)))
    at = torch.arange(length, device=call.q.device)
    for begin in range(0, length, step):
        end = min(begin + step, length)
        start = None if call.start is None else call.start[:, begin:end]
        low = 0 if start is None else int(start.min())
        # Query head h reads key head h // r: heads of one group are neighbours.
        block = rearrange(queries[:, :, begin:end], "b (g r) q d -> b g (r q) d", g=groups)
        scores = block @ keys[..., low:end]
        scores = rearrange(scores, "b g (r q) k -> b (g r) q k", q=end - begin)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        hidden = (at[None, low:end] > at[begin:end, None])[None]
        if start is not None:
            hidden = hidden | (at[low:end] < start[..., None])
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
        if call.sinks is not None:
            sink = call.sinks.to(kind)[None, :, None, None].expand(*scores.shape[:3], 1)
            rows = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            rows = scores.softmax(dim=-1)
        # Keys before the window are part of the row: their mass is zero.
        yield begin, low, torch.nn.functional.pad(rows, (low, 0)) if low else rows
