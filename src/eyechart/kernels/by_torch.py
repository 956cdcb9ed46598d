"""Attention in torch that autograd can go back through: on every device and in every format."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from eyechart.kernels.call import AttentionCall


def by_torch(call: AttentionCall) -> Float[Tensor, "batch query head d_value"]:
    """A layer's mixtures of values.

    Without soft cap, learned sinks and rounding no pattern is kept for the way back, only what
    torch's fused kernel keeps; with them the pattern is part of the graph.
    """
    if call.softcap is None and call.sinks is None and call.rounded is None:
        mixed = torch.nn.functional.scaled_dot_product_attention(
            call.q,
            call.k,
            call.v,
            attn_mask=None if call.start is None else _seen(call)[:, None],
            is_causal=call.start is None,
            scale=call.scale,
            enable_gqa=call.q.shape[1] != call.k.shape[1],
        )
        return rearrange(mixed, "b h q d -> b q h d")
    shared = call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (call.k, call.v))
    scores = (call.q @ k.transpose(-1, -2)).to(torch.promote_types(call.q.dtype, torch.float32))
    scores = scores * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    seen = _seen(call)[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    if call.sinks is not None:
        sink = call.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    pattern = scores.softmax(dim=-1)[..., : call.length]
    if call.rounded is not None:
        pattern = call.rounded(pattern, seen)
    return rearrange(pattern.to(v.dtype) @ v, "b h q d -> b q h d")


def _seen(call: AttentionCall) -> Tensor:
    """``[batch query key]``: what each query sees."""
    at = torch.arange(call.length, device=call.q.device)
    seen = (at[None, :] <= at[:, None])[None]
    return seen if call.start is None else seen & (at >= call.start[..., None])
