"""Attention in a tree: every token sees itself and its ancestors, and no other branch.

Prompts that begin alike share what they have in common, so that one pass serves all of them, as
tree attention does in speculative decoding. The trunk is ordinary causal attention; the branches go
through in blocks, over the keys that any token of the block sees.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
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
    lookup, depth = call.k.to(kind).transpose(-1, -2), tree.depth.to(call.q.device)
    for here, keys, hidden in tree.branches:
        keys, hidden = keys.to(call.q.device), hidden.to(call.q.device)[None]
        if call.start is not None:
            hidden = hidden | (depth[keys] < call.start[:, depth[here]][..., None])
        rows = softmax(call, queries[:, :, here], lookup[..., keys], hidden)
        yield mixed(rows, values[:, :, keys]).to(call.v.dtype)
