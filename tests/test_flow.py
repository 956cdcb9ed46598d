"""Information flow against its definitions: whole matrices, whole vectors, whole Jacobians."""

import math
from typing import Any

import pytest
import torch
from families import built
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import eyechart
from eyechart.flow import sensitivity as derivatives
from eyechart.flow import topology
from eyechart.kernels import AttentionCall, attend, carry
from eyechart.results import InformationFlow

IDS = torch.arange(3, 51).reshape(2, 24)
PATHS = ("rollout", "path_bound", "topology")
VALUES = ("norm_rollout", "alti")


def flow(model: Any, *measures: str, inputs: Any = IDS, **options: Any) -> Any:
    found = eyechart.information_flow(model, inputs, measures=measures, **options)
    assert not found.unavailable
    return found


def opened(family: str, **options: Any) -> Any:
    with built(family) as folder:
        return eyechart.load(str(folder), device="cpu", **options)


def mean_patterns(model: Any, ids: Tensor = IDS) -> list[Tensor]:
    """Head-mean attention of every layer, as the bridge computes it by itself, in float64."""
    seen = eyechart.capture(model, ids, [eyechart.Record("pattern")])[0]
    return [seen[layer].double().mean(dim=1) for layer in sorted(seen)]


# Topology.


def test_path_counts_are_those_of_the_causal_graph():
    assert topology.path_counts(8, 4) == [120, 84, 56, 35, 20, 10, 4, 1]
    graph = torch.ones(12, 12, dtype=torch.float64).tril()
    for layers in (1, 3, 7):
        whole = torch.linalg.matrix_power(graph, layers)
        assert whole[-1].tolist() == topology.path_counts(12, layers)


def test_uniform_attention_drives_everything_to_the_first_token_at_its_rate():
    # Proposition B.8: [(U + I)/2]^L, n = 16.
    uniform = topology.uniform(16)
    shares = {l: float(topology.deep_limit(uniform, l)[-1, 0]) for l in (1, 4, 8, 16, 32)}
    published = {1: 0.03, 4: 0.23, 8: 0.56, 16: 0.92, 32: 0.9987}
    assert shares == pytest.approx(published, abs=0.006)
    rate = float(topology.second_eigenvalue(uniform.diagonal()))
    assert rate == 0.75
    missing = [1 - float(topology.deep_limit(uniform, l)[-1, 0]) for l in (80, 81)]
    assert missing[1] / missing[0] == pytest.approx(rate, abs=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**31))
def test_products_of_causal_attention_stay_causal_and_stochastic(length, layers, seed):
    draw = torch.Generator().manual_seed(seed)
    product = torch.eye(length, dtype=torch.float64)
    first = []
    for _ in range(layers):
        scores = torch.randn(length, length, generator=draw, dtype=torch.float64) * 3
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        # Down through the layers, as a row is carried; Lemma B.7.
        product = product @ topology.layer_matrix(pattern)
        first.append(float(product[-1, 0]))
        eigenvalues = torch.linalg.eigvals(topology.layer_matrix(pattern)).real.sort().values
        diagonal = topology.layer_matrix(pattern).diagonal().sort().values
        torch.testing.assert_close(eigenvalues, diagonal, atol=1e-6, rtol=0)
    assert product.triu(1).abs().max() == 0
    torch.testing.assert_close(product.sum(dim=-1), torch.ones(length, dtype=torch.float64))
    assert first == sorted(first)  # the first token never gives anything back


@pytest.mark.parametrize("step", [1, 3, 20])
def test_hitting_depth_is_the_absorbing_chains(step):
    scores = torch.randn(2, 20, 20, dtype=torch.float64)
    pattern = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).softmax(dim=-1)
    blocks = [(i, pattern[:, i : i + step, : i + step]) for i in range(0, 20, step)]
    found = topology.hitting_depth(iter(blocks), 20)
    chain = topology.layer_matrix(pattern)[:, 1:, 1:]
    inverse = torch.linalg.inv(torch.eye(19, dtype=torch.float64) - chain)
    torch.testing.assert_close(found[:, 1:], inverse.sum(dim=-1))
    assert (found[:, 0] == 0).all()


def test_a_token_that_sees_only_itself_never_gets_there():
    pattern = torch.eye(4, dtype=torch.float64)
    pattern[3] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    found = topology.hitting_depth(iter([(0, pattern[None])]), 4)[0]
    assert found.tolist() == [0, math.inf, math.inf, math.inf]


# Rows carried through attention.


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("length", [1, 47, 130])
def test_carried_rows_are_rows_times_the_pattern(softcap, window, sinks, length):
    q, k = torch.randn(2, 6, length, 20), torch.randn(2, 2, length, 20)
    at = torch.arange(length)
    start = None if window is None else (at - window + 1).clamp(min=0).expand(2, -1)
    extra = torch.randn(6) if sinks else None
    call = AttentionCall(q, k, k, 0.3, softcap, start, extra)
    scores = 0.3 * q.double() @ k.double().repeat_interleave(3, dim=1).transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = at > at[:, None]
    if window is not None:
        hidden = hidden | (at <= at[:, None] - window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if extra is not None:
        scores = torch.cat([scores, extra.double().reshape(1, 6, 1, 1).expand(2, 6, length, 1)], -1)
    pattern = scores.softmax(dim=-1)[..., :length]
    rows = torch.randn(2, 11, length)
    truth = rows.double()[:, None] @ pattern
    tokens = torch.zeros(2, length, dtype=torch.long)
    lse = attend(call, tokens, tokens == 0, statistics=("lse",))["lse"]
    for found in (carry(call, rows, lse), carry(call, rows), carry(call, rows, lse, torch.float64)):
        torch.testing.assert_close(found.double(), truth, atol=2e-5, rtol=1e-4)
    tiled = rows.double()[:, None] @ pattern[:, [0, 2, 4, 1, 3, 5]]
    assert length == 1 or not torch.allclose(truth, tiled, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss", "gpt_neo", "gpt_neox"])
@pytest.mark.parametrize("query", [-1, 13])
def test_rollout_is_a_row_of_the_whole_product(family, query):
    half = family == "gpt_oss"  # transformers has no float64 for its experts
    model = opened(family, dtype="float32" if half else "float64")
    found = flow(model, "rollout", "topology", query=query, accumulate="float64")
    patterns = mean_patterns(model)
    product = torch.eye(24, dtype=torch.float64).expand(2, 24, 24)
    last = []
    tolerance = {"atol": 1e-5 if half else 1e-9, "rtol": 0}
    for layer, pattern in enumerate(patterns):
        product = topology.layer_matrix(pattern) @ product
        last.append(topology.layer_matrix(pattern))
        row = product[:, query]
        row = row / row.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(found.rollout[:, layer].double(), row, **tolerance)
        torch.testing.assert_close(found.sink_share[:, layer].double(), row[:, 0], **tolerance)
        torch.testing.assert_close(
            found.attention[:, layer].double(), pattern[:, query], **tolerance
        )
        diagonal = topology.layer_matrix(pattern).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(found.eigenvalues[:, layer].double(), diagonal, **tolerance)
        depth = topology.hitting_depth(iter([(0, pattern)]), 24)[:, query]
        torch.testing.assert_close(found.hitting_depth[:, layer], depth, atol=1e-3, rtol=1e-5)
    row = torch.eye(24, dtype=torch.float64)[query].expand(2, 1, 24)
    for layer in reversed(range(len(patterns))):
        row = row @ last[layer]
        share = row[:, 0] / row[:, 0].sum(dim=-1, keepdim=True)
        torch.testing.assert_close(found.through[:, layer].double(), share, **tolerance)


def test_float32_through_the_kernel_agrees_with_float64(llama):
    fast, exact = (flow(llama, *PATHS, accumulate=kind) for kind in ("float32", "float64"))
    torch.testing.assert_close(fast.rollout, exact.rollout.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast.path_bound, exact.path_bound, rtol=1e-4, atol=0)


def test_receptive_size_and_centre_of_known_rows(llama):
    found = flow(llama, "rollout", inputs=IDS[:1])
    rows = torch.zeros(1, 2, 24)
    rows[0, 0, 3], rows[0, 1, :8] = 1, 1 / 8
    made: Any = InformationFlow(
        found.sequences, found.provenance, found.query, "final norm", rollout=rows
    )
    torch.testing.assert_close(made.receptive_size(), torch.tensor([[1.0, 8.0]]))
    torch.testing.assert_close(made.centre(), torch.tensor([[3.0, 3.5]]))
    counts = made.log_paths().exp()[0].round().tolist()
    assert counts == [float(n) for n in topology.path_counts(24, 2)]


# Contributions weighted by values.


def materialised(model: Any, layer: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T[batch query key d_model], y and x of one block, each head and pair written out."""
    attn = model.blocks[layer].attn
    names = ["resid_pre", "pattern", "v", "attn_out"]
    x, pattern, v, write = (
        seen[layer].double()
        for seen in eyechart.capture(model, ids, [eyechart.Record(name) for name in names])
    )
    heads, width = pattern.shape[1], v.shape[-1]
    plain = attn.o.original_component
    unit = torch.eye(heads * width, dtype=next(plain.parameters()).dtype)
    with torch.no_grad():
        matrix = (plain(unit) - plain(torch.zeros_like(unit))).double().unflatten(0, (heads, width))
    v = v.repeat_interleave(heads // v.shape[2], dim=2)
    t = torch.einsum("bhqk,bkhd,hdm->bqkm", pattern, v, matrix)
    raw = torch.einsum("bqkm->bqm", t) + plain(torch.zeros_like(unit[:1])).double().detach()
    if "ln1_post" in dict(model.blocks[layer].named_children()):
        t = t * (write / raw)[:, :, None]
    at = torch.arange(x.shape[1])
    t[:, at, at] += x
    return t, x + write, x


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "gpt_oss", "gpt_neo"])
def test_value_weighted_rollouts_are_their_definitions(family):
    model = opened(family)
    found = flow(model, *VALUES)
    products: dict[str, Tensor] = dict.fromkeys(
        VALUES, torch.eye(24, dtype=torch.float64).expand(2, 24, 24)
    )
    for layer in range(2):
        t, y, _ = materialised(model, layer, IDS)
        size = t.norm(dim=-1)
        left = (y[:, :, None] - t).abs().sum(dim=-1)
        alti = (y.abs().sum(dim=-1, keepdim=True) - left).clamp(min=0).tril()
        for name, shares in (("norm_rollout", size), ("alti", alti)):
            shares = shares / shares.sum(dim=-1, keepdim=True)
            products[name] = shares @ products[name]
            ours = getattr(found, name)[:, layer].double()
            torch.testing.assert_close(ours, products[name][:, -1], atol=1e-5, rtol=0)


def test_alti_of_grouped_heads_is_not_that_of_tiled_ones(llama):
    t, y, _ = materialised(llama, 1, IDS)
    shares = (y.abs().sum(-1, keepdim=True) - (y[:, :, None] - t).abs().sum(-1)).clamp(min=0)
    # The wrong layout, key head h % groups, must be far from what is found.
    pattern, v = (
        eyechart.capture(llama, IDS, [eyechart.Record(n)])[0][1] for n in ("pattern", "v")
    )
    heads = pattern.shape[1]
    tiled = v.repeat(1, 1, heads // v.shape[2], 1)
    right = v.repeat_interleave(heads // v.shape[2], dim=2)
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, right)
    wrong = torch.einsum("bhqk,bkhd->bqhd", pattern, tiled)
    z = eyechart.capture(llama, IDS, [eyechart.Record("z")])[0][1]
    torch.testing.assert_close(mixed.flatten(2), z.flatten(2), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(wrong.flatten(2), z.flatten(2), atol=1e-2)
    assert shares.sum() > 0


# The bound.


def jacobian(folder: Any, ids: Tensor, frozen: bool, target: int | None = None) -> Tensor:
    """[position d_out d_in] of the last token, with respect to every input, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float64
    ).eval()
    plain = torch.nn.functional.softmax
    if frozen:
        # The theorem's assumption: attention does not depend on the input.
        torch.nn.functional.softmax = lambda *a, **b: plain(*a, **b).detach()
    try:
        leaf = None

        def enter(module: Any, inputs: Any, options: Any) -> Any:
            nonlocal leaf
            stream = inputs[0] if inputs else options["hidden_states"]
            leaf = stream.detach().requires_grad_()
            if inputs:
                return (leaf, *inputs[1:]), options
            return inputs, {**options, "hidden_states": leaf}

        base: Any = model.base_model
        first = (base.layers if hasattr(base, "layers") else base.h)[0]
        handle = first.register_forward_pre_hook(enter, with_kwargs=True)
        out = base(ids[None], output_hidden_states=True)
        handle.remove()
        y = out.last_hidden_state[0, -1] if target is None else out.hidden_states[target + 1][0, -1]
        assert leaf is not None
        rows = [
            torch.autograd.grad(y, leaf, unit, retain_graph=True)[0][0]
            for unit in torch.eye(y.shape[0], dtype=torch.float64)
        ]
    finally:
        torch.nn.functional.softmax = plain
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "olmo2", "starcoder2"])
@pytest.mark.parametrize("target", [None, 0])
def test_the_bound_is_never_violated_with_attention_held_fixed(family, target):
    ids = IDS[0]
    with built(family) as folder:
        model = eyechart.load(str(folder), device="cpu", dtype="float64")
        exact = jacobian(folder, ids, frozen=True, target=target)
    norms = torch.linalg.matrix_norm(exact, ord=2)
    bound = flow(model, "path_bound", inputs=ids[None], layer=target).path_bound[0]
    assert (norms <= bound).all()
    assert (bound < 1e6 * norms.amax()).all()


def test_the_bound_is_exact_where_nothing_is_written(handmade):
    # Attention and MLP write nothing: only the last token's own path is left, and the final norm.
    found = flow(handmade, "path_bound", inputs=IDS[:1, :16] % 11)
    stream = eyechart.capture(handmade, IDS[:1, :16] % 11, [eyechart.Record("resid_post")])[0][1]
    weight = handmade.ln_final.original_component.weight.abs().max()
    expected = float(weight.detach() / stream[0, -1].std(correction=0))
    assert float(found.path_bound[0, -1]) == pytest.approx(expected, rel=1e-6)
    assert found.path_bound[0, :-1].abs().max() == 0


# Derivatives.


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "gpt_neo"])
@pytest.mark.parametrize("target", [None, 0])
def test_exact_sensitivity_is_the_norm_of_the_jacobian(family, target):
    ids = IDS[0]
    with built(family) as folder:
        model = eyechart.load(str(folder), device="cpu", dtype="float64")
        exact = jacobian(folder, ids, frozen=False, target=target).flatten(1).norm(dim=-1)
    found = flow(model, "sensitivity", inputs=ids[None], probes=None, layer=target)
    torch.testing.assert_close(found.sensitivity[0].double(), exact, rtol=1e-5, atol=1e-8)
    assert found.probes is None and found.sensitivity_interval.abs().max() == 0


def test_estimates_lie_within_their_interval(llama):
    exact = flow(llama, "sensitivity", probes=None).sensitivity
    inside = []
    for seed in range(25):
        found = flow(llama, "sensitivity", probes=16, seed=seed)
        inside.append((found.sensitivity - exact).abs() <= found.sensitivity_interval)
        assert (found.sensitivity_interval < found.sensitivity).all()
    # 99% asked for; the 24 positions of a sequence share their random vectors.
    assert torch.stack(inside).float().mean() > 0.97


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_the_interval_covers_jacobians_of_any_rank(rank):
    draw = torch.Generator().manual_seed(rank)
    values = torch.rand(rank, generator=draw, dtype=torch.float64) + 0.1
    gauss = torch.randn(16, 2000, 1, rank, generator=draw, dtype=torch.float64)
    squares = (gauss * values).square().sum(dim=-1)
    root, half = derivatives.interval(squares)
    truth = float(values.norm())
    assert ((root - truth).abs() <= half).float().mean() > 0.975


def test_a_padded_batch_is_its_texts_one_by_one(llama):
    texts = ["A longer line of text, with a few words more.", "Short one."]
    names = ("rollout", "path_bound", "topology", *VALUES, "sensitivity")
    together = flow(llama, *names, inputs=texts, probes=None)
    for row, text in enumerate(texts):
        alone = flow(llama, *names, inputs=text, probes=None)
        count = alone.sequences.lengths[0]
        for name in ("attention", "rollout", "through", "path_bound", *VALUES, "sensitivity"):
            ours, theirs = getattr(together, name)[row], getattr(alone, name)[0]
            assert ours[..., count:].isnan().all()
            torch.testing.assert_close(ours[..., :count], theirs, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(
            together.hitting_depth[row], alone.hitting_depth[0], rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "granite"])
def test_half_formats_see_the_same_flow(family):
    names = ("rollout", "path_bound", *VALUES, "sensitivity")
    half, full = (
        flow(opened(family, dtype=kind), *names, inputs=IDS[:1]) for kind in ("bfloat16", "float32")
    )
    for name in ("rollout", *VALUES, "path_bound", "sensitivity"):
        ours, theirs = half.by_position(name), full.by_position(name)
        assert float((ours / theirs - 1).abs().nanmedian()) < 0.05, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_the_same():
    names = (*PATHS, *VALUES, "sensitivity", "replacement", "spread", "sinks")
    with built("llama") as folder:
        here, there = (eyechart.load(str(folder), device=kind) for kind in ("cpu", "cuda"))
    cpu, gpu = (flow(model, *names, probes=None) for model in (here, there))
    for name in ("rollout", *VALUES, "path_bound", "sensitivity", "replacement_kl"):
        ours, theirs = gpu.by_position(name), cpu.by_position(name)
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-5)


# The real model.


def test_the_default_models_flow(default_model):
    text = eyechart.sequences.BUILT_IN_PROMPT[:420]
    found: Any = eyechart.information_flow(
        default_model, text, measures=("rollout", "path_bound", *VALUES, "sensitivity", "sinks")
    )
    assert not found.unavailable
    (ends,) = found.u_shape()
    assert min(ends) > 1
    share = found.sink_share[0]
    assert share[-1] > 0.98 and share[0] < 0.05
    rho = {name: found.correlations(name, "sensitivity")[0] for name in ("alti", "rollout")}
    assert rho["alti"] > 0.4 and rho["alti"] > rho["rollout"] + 0.2
    assert found.sinks.value_drain < 0.5
    assert found.sinks.residual[0].max() > 50
