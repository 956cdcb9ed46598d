"""Attention in a tree: every token sees itself and its ancestors, and no other branch.

Prompts that begin alike share what they have in common, so that one pass serves all of them, as
tree attention does in speculative decoding. The trunk is ordinary causal attention; the branches go
through in blocks, over the keys that any token of the block sees.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from eyechart.kernels.call import AttentionCall
from eyechart.kernels.streamed import mixed, softmax
from eyechart.kernels.tree import Tree


def trunk_of(call: AttentionCall, tree: Tree) -> AttentionCall:
    """The part of a layer's attention that is causal in the ordinary sense."""
    end = tree.trunk
    return replace(
        call,
        q=call.q[:, :, :end],
        k=call.k[:, :, :end],
        v=call.v[:, :, :end],
        start=None if call.start is None else call.start[:, :end],
        tree=None,
        found={},
    )


def attend_branches(
    call: AttentionCall, tree: Tree, accumulate: torch.dtype
) -> Iterator[Float[Tensor, "batch query head d_value"]]:
    """The mixtures of values of all tokens after the trunk, in order, some at a time.

    What a layer lets a query see is a matter of positions in a prompt: a window of w tokens is that
    of the last w ancestors.
    """
    kind = torch.promote_types(call.q.dtype, accumulate)
    queries, values = call.q.to(kind) * call.scale, call.v.to(kind)
    k, depth = call.k.to(kind), tree.depth.to(call.q.device)
    plain = call.softcap is None and call.sinks is None and call.rounded is None
    for here, keys, hidden in tree.branches:
        keys, hidden = keys.to(call.q.device), hidden.to(call.q.device)[None]
        if call.start is not None:
            hidden = hidden | (depth[keys] < call.start[:, depth[here]][..., None])
        if plain:
            out = _sdpa(queries[:, :, here], k[:, :, keys], values[:, :, keys], ~hidden)
        else:
            rows = softmax(call, queries[:, :, here], k[:, :, keys].transpose(-1, -2), hidden)
            out = mixed(rows, values[:, :, keys])
        yield out.to(call.v.dtype)


def _sdpa(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_value"],
    seen: Bool[Tensor, "#batch query key"],
) -> Float[Tensor, "batch query head d_value"]:
    """torch's own kernel, which makes no pattern; twice as fast."""
    # The heads of a group as more queries of one head, so that their keys need not be repeated.
    groups = k.shape[1]
    stacked = rearrange(q, "b (g r) q d -> b g (r q) d", g=groups)
    mask = repeat(seen, "b q k -> b 1 (r q) k", r=q.shape[1] // groups)
    out = torch.nn.functional.scaled_dot_product_attention(stacked, k, v, attn_mask=mask, scale=1.0)
    return rearrange(out, "b g (r q) d -> b q (g r) d", q=q.shape[2])
