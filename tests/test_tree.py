"""Attention in a tree against the mask written out, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eyechart.errors import UsageError
from eyechart.kernels import AttentionCall, Replacement, Tree, attend


def random_parents(seed, length):
    """Long runs, forks anywhere, and a new root now and then."""
    draw = torch.Generator().manual_seed(seed)
    parents = [-1]
    for node in range(1, length):
        kind = float(torch.rand(1, generator=draw))
        anywhere = int(torch.randint(node, (1,), generator=draw))
        parents.append(-1 if kind < 0.03 else anywhere if kind < 0.2 else node - 1)
    return torch.tensor(parents)


def ancestors(parents):
    """True where a query (row) sees a key, and every token's position."""
    length = len(parents)
    seen = torch.zeros(length, length, dtype=torch.bool)
    depth = torch.zeros(length, dtype=torch.long)
    for node in range(length):
        above = int(parents[node])
        if above >= 0:
            seen[node] = seen[above]
            depth[node] = depth[above] + 1
        seen[node, node] = True
    return seen, depth


def written_out(call, seen):
    """The definition: every query's row over all keys, those it does not see left out."""
    shared = call.q.shape[1] // call.k.shape[1]
    k, v = (x.double().repeat_interleave(shared, dim=1) for x in (call.k, call.v))
    scores = call.q.double() @ k.transpose(-1, -2) * call.scale
    if call.softcap:
        scores = call.softcap * (scores / call.softcap).tanh()
    scores = scores.masked_fill(~seen, -torch.inf)
    if call.sinks is not None:
        column = call.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        rows = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        rows = scores.softmax(dim=-1)
    return (rows @ v).transpose(1, 2)


def some_call(seed, length, kind=torch.float64, **more):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, heads, length, 8, generator=draw, dtype=torch.float64).to(kind)
        for heads in (4, 2, 2)
    )
    return AttentionCall(q, k, v, scale=0.7, **more)


def run(call):
    tokens = torch.zeros(1, call.length, dtype=torch.long)
    attend(call, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert call.output is not None
    return call.output


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), length=st.integers(1, 300), trunk=st.integers(0, 200))
def test_a_token_sees_its_ancestors_only(seed, length, trunk):
    parents = random_parents(seed, length)
    trunk = min(trunk, length)
    parents[:trunk] = torch.arange(trunk) - 1
    seen, depth = ancestors(parents)
    tree = Tree(parents)
    assert torch.equal(tree.depth, depth) and tree.trunk >= trunk
    call = some_call(seed, length, tree=tree)
    torch.testing.assert_close(run(call), written_out(call, seen), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_windows_go_by_position_in_the_prompt(kind):
    """A window of 5 reaches 4 ancestors back, wherever they stand in the row."""
    parents = random_parents(7, 200)
    parents[:60] = torch.arange(60) - 1
    seen, depth = ancestors(parents)
    start = (torch.arange(200) - 4).clamp(min=0)[None]
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=kind)
    call = some_call(1, 200, kind, start=start, softcap=1.5, sinks=sinks, tree=Tree(parents))
    near = depth[:, None] - depth[None, :] < 5
    error = 1e-12 if kind == torch.float64 else 1e-5
    found, truth = run(call), written_out(call, seen & near)
    torch.testing.assert_close(found.double(), truth, atol=error, rtol=error)
    # A window by place in the row would be another thing.
    by_row = torch.arange(200)[:, None] - torch.arange(200)[None] < 5
    assert float((written_out(call, seen & by_row) - truth).abs().max()) > 0.1


def test_replaced_heads_stay_replaced_in_a_tree():
    parents = torch.tensor([-1, 0, 1, 0, 3])
    call = some_call(3, 5, tree=Tree(parents))
    plain = run(some_call(3, 5, tree=Tree(parents)))
    call.replaced = {1: Replacement("zero", None)}
    found = run(call)
    assert float(found[:, :, 1].abs().max()) == 0
    kept = [0, 2, 3]
    torch.testing.assert_close(found[:, :, kept], plain[:, :, kept], atol=1e-12, rtol=0)


def test_a_tree_has_no_statistics_and_parents_come_first():
    call = some_call(0, 4, tree=Tree(torch.tensor([-1, 0, 0, 1])))
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(UsageError, match="of no one prompt"):
        attend(call, tokens, tokens == 0, statistics=("first",))
    for wrong in ([0], [-1, 1], [-1, 2, 0], [-2], []):
        with pytest.raises(ValueError, match="must come before"):
            Tree(torch.tensor(wrong, dtype=torch.long))
