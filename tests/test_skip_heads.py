"""Heads that are not computed: what takes their place, under a lens, and what that saves."""

import dataclasses
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import eyechart
from eyechart.errors import UnsupportedModelError, UsageError
from eyechart.heads.onward import Onward
from eyechart.heads.price import price
from eyechart.heads.together import exchanges_of
from eyechart.kernels import AttentionCall, Replacement, attend, differentiable, replacements
from eyechart.results.head_trials import REPLACEMENTS
from eyechart.sequences import from_ids

LENGTH, WIDTH = 14, 8


def call(heads=6, groups=2, batch=2, **others) -> AttentionCall:
    q = torch.randn(batch, heads, LENGTH, WIDTH)
    k, v = (torch.randn(batch, groups, LENGTH, WIDTH) for _ in "kv")
    return AttentionCall(q, k, v, scale=WIDTH**-0.5, **others)


def mixed_by_pattern(made: AttentionCall, patterns: dict[int, Tensor]) -> Tensor:
    """The definition: whole patterns, some of them given, times values of the head's own group."""
    shared = made.q.shape[1] // made.k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (made.k, made.v))
    scores = made.q @ k.transpose(-1, -2) * made.scale
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    rows = scores.masked_fill(hidden, -torch.inf)
    if made.sinks is not None:
        column = made.sinks[None, :, None, None].expand(*rows.shape[:3], 1)
        rows = torch.cat([rows, column], dim=-1)
    rows = rows.softmax(dim=-1)[..., :LENGTH]
    for head, pattern in patterns.items():
        rows[:, head] = pattern
    return rearrange(rows @ v, "b h q d -> b q h d")


FIRST = torch.zeros(LENGTH, LENGTH)
FIRST[:, 0] = 1
PATTERNS = {"zero": torch.zeros(LENGTH, LENGTH), "identity": torch.eye(LENGTH), "first": FIRST}


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.dictionaries(st.integers(0, 5), st.sampled_from(sorted(PATTERNS)), min_size=1),
    groups=st.sampled_from([1, 2, 3, 6]),
    sinks=st.booleans(),
    gradient=st.booleans(),
)
def test_replaced_heads_are_their_patterns_and_the_rest_is_untouched(
    kinds, groups, sinks, gradient
):
    made = call(groups=groups, sinks=torch.randn(6) if sinks else None)
    truth = mixed_by_pattern(made, {head: PATTERNS[kind] for head, kind in kinds.items()})
    made.replaced = {head: Replacement(kind) for head, kind in kinds.items()}
    if gradient:
        made.v.requires_grad_()
        found = differentiable(made)
    else:
        tokens = torch.zeros(2, LENGTH, dtype=torch.long)
        attend(made, tokens, torch.ones_like(tokens, dtype=torch.bool))
        found = made.output
    torch.testing.assert_close(found, truth, atol=2e-6, rtol=1e-4)


def test_tiled_key_heads_would_be_found_out():
    made = call(heads=6, groups=2)
    made.replaced = {1: Replacement("identity")}
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    attend(made, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert made.output is not None
    torch.testing.assert_close(made.output[:, :, 1], made.v[:, 0])  # 1 // 3
    assert not torch.allclose(made.output[:, :, 1], made.v[:, 1])  # not 1 % 2


def test_a_mean_leaves_the_first_token_what_it_has():
    values, constant = torch.randn(2, LENGTH, WIDTH), torch.randn(WIDTH)
    made = Replacement("mean", constant).of(values)
    assert torch.equal(made[:, 0], values[:, 0])
    assert torch.equal(made[:, 1:], constant.expand(2, LENGTH - 1, WIDTH))
    with pytest.raises(ValueError, match="a constant belongs"):
        Replacement("mean")
    with pytest.raises(UsageError, match="unknown replacement 'none'"):
        Replacement("none")


def test_skipped_heads_cost_no_scores():
    made, seen = call(), []
    made.replaced = {0: Replacement("zero"), 3: Replacement("identity"), 5: Replacement("first")}

    def mix(part: AttentionCall) -> Tensor:
        seen.append((part.q.shape[1], part.k.shape[1]))
        return part.q.new_zeros(2, LENGTH, part.q.shape[1], WIDTH)

    made.around_replaced(mix)
    assert seen == [(3, 3)]  # two heads of one group are left and one of the other: keys apart
    made.replaced = {0: Replacement("zero"), 3: Replacement("identity")}
    made.around_replaced(mix)
    assert seen[1] == (4, 2)
    made.replaced = {head: Replacement("zero") for head in range(6)}
    assert not made.around_replaced(mix).any() and len(seen) == 2


@pytest.fixture(scope="module")
def census(llama):
    torch.manual_seed(5)
    ids = torch.randint(3, 250, (4, 16))
    return eyechart.head_census(llama, ids, screen=False, budget=1.0, joint_budget=10.0)


EVERY_KIND = ((0, 0, "zero"), (0, 3, "identity"), (1, 1, "mean"), (1, 2, "first"))


def test_the_lens_does_what_the_trials_did(llama, census):
    ids = torch.randint(3, 250, (3, 12))
    onward = Onward(llama, from_ids(llama, ids.tolist()), range(12))
    replaced = replacements(EVERY_KIND, census.trials.means)
    truth = onward.logits(0, exchanges_of(replaced))
    with torch.no_grad():
        before = llama(ids)
        with eyechart.lenses.skip_heads(census, llama, heads=EVERY_KIND):
            under = llama(ids)
        after = llama(ids)
    torch.testing.assert_close(under, truth, atol=1e-5, rtol=1e-4)
    assert torch.equal(before, after) and float((under - before).abs().max()) > 1e-3


def test_the_set_of_the_census_is_skipped_by_default_on_the_open_model(tmp_path):
    from idle_heads import write_idle_heads

    write_idle_heads(tmp_path, True)
    model = eyechart.load(str(tmp_path), device="cpu")
    twin = eyechart.load(str(tmp_path), device="cpu")
    eyechart.models.facts_of(twin)
    once = torch.stack([torch.randperm(15)[:14] + 1 for _ in range(6)])
    ids = torch.cat([torch.zeros(6, 1, dtype=torch.long), once, once], dim=1)
    census = eyechart.head_census(model, ids)
    assert census.together is not None and len(census.together.heads) == 6
    with torch.no_grad():
        truth = model(ids)
        with eyechart.lenses.skip_heads(census):
            found = model(ids)
            assert not torch.equal(found, truth) and torch.equal(found, twin(ids))
        assert torch.equal(twin(ids), truth)
    torch.testing.assert_close(found, truth, atol=0.01, rtol=0)  # idle heads, all gone


def test_lenses_compose_and_measurements_see_through_them(llama, census):
    ids = torch.randint(3, 250, (2, 12))
    norms = eyechart.residual_norms(llama, ids).norm
    with eyechart.lenses.skip_heads(census, llama, heads=EVERY_KIND):
        skipped = eyechart.residual_norms(llama, ids).norm
        with eyechart.lenses.evict(llama, keys=1, after=4):
            both = eyechart.residual_norms(llama, ids).norm
    assert not torch.allclose(norms, skipped) and not torch.allclose(both, skipped)
    assert torch.allclose(both[:, :, :4], skipped[:, :, :4])  # nothing is hidden from these
    with torch.enable_grad(), eyechart.lenses.skip_heads(census, llama, heads=EVERY_KIND):
        llama(ids)[0, -1, 5].backward()


def test_attention_of_heads_that_have_none_is_refused(llama, census):
    ids = torch.randint(3, 250, (2, 12))
    with (
        eyechart.lenses.skip_heads(census, llama, heads=EVERY_KIND),
        pytest.raises(UsageError, match="no attention to measure"),
    ):
        eyechart.attention_statistics(llama, ids)


def test_a_census_of_another_model_is_refused(llama, gpt2, census):
    with (
        pytest.raises(UsageError, match="other weights"),
        eyechart.lenses.skip_heads(census, gpt2),
    ):
        pass
    with (
        pytest.raises(UsageError, match=r"skip_heads\(census, model\)"),
        eyechart.lenses.skip_heads(llama),
    ):
        pass
    source = dataclasses.replace(census.provenance, weights="0" * 64)
    other = dataclasses.replace(census, provenance=source)
    with pytest.raises(UsageError, match="no open model has"), eyechart.lenses.skip_heads(other):
        pass
    for heads, said in (
        ([(9, 0, "zero")], "no head 0 in layer 9"),
        ([(0, 99, "zero")], "no head 99"),
        ([(0, 0, "half")], "unknown replacement"),
    ):
        with (
            pytest.raises(UsageError, match=said),
            eyechart.lenses.skip_heads(census, llama, heads=heads),
        ):
            pass


def test_the_lens_is_taken_off_whatever_happens(llama, census):
    ids = torch.randint(3, 250, (1, 12))
    with torch.no_grad():
        before = llama(ids)
        with (
            pytest.raises(ZeroDivisionError),
            eyechart.lenses.skip_heads(census, llama, heads=EVERY_KIND),
        ):
            raise ZeroDivisionError
        assert torch.equal(llama(ids), before)


def test_the_price_is_that_of_the_shapes(llama):
    config = llama.original_model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    shared, n = heads // groups, 20
    # The whole first group of layer 0, and one head of the second, which needs its keys still.
    gone = {head: Replacement("zero") for head in range(shared)} | {shared: Replacement("zero")}
    found = price(llama, {0: gone}, n)
    one = 2 * 2 * width * n * (n + 1) / 2  # scores and mixture, multiplication and addition
    torch.testing.assert_close(found.flops, torch.full((config.num_hidden_layers, heads), one))
    assert found.set_flops == pytest.approx(one * (shared + 1))
    cache = 2 * n * width * 4  # keys and values of one key head in float32
    assert float(found.kv_bytes.sum()) == pytest.approx(cache * groups * config.num_hidden_layers)
    assert found.set_kv_bytes == pytest.approx(cache)
    assert 0 < found.seconds < found.pass_seconds
    assert 0 < found.seconds_without < found.pass_seconds_without


def test_windows_are_part_of_the_price():
    from families import built

    with built("mistral") as folder:
        model: Any = eyechart.load(str(folder), device="cpu")
    config = model.original_model.config
    window, n = config.sliding_window, 30
    assert window < n
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = sum(min(i + 1, window) for i in range(n))
    found = price(model, {}, n)
    assert float(found.flops[0, 0]) == pytest.approx(4 * width * pairs)
    per_group = config.num_attention_heads // config.num_key_value_heads
    assert float(found.kv_bytes[0, 0]) == pytest.approx(2 * window * width * 4 / per_group)


def test_what_cannot_be_left_out_has_no_price():
    from families import built

    with built("bloom") as folder:
        model = eyechart.load(str(folder), device="cpu")
    with pytest.raises(UnsupportedModelError, match="no head can be left out"):
        price(model, {}, 8)
    census = eyechart.head_census(model, torch.randint(3, 250, (3, 12)))
    assert census.price is None and "no head can be left out" in census.unavailable["price"]
    assert census.together is not None  # the trials went by hooks
    with (
        pytest.raises(UnsupportedModelError, match="cannot be seen through a lens"),
        eyechart.lenses.skip_heads(census, model),
    ):
        pass


def test_every_replacement_has_words():
    assert set(REPLACEMENTS) == {"zero", "first", "mean", "identity"}
    for kind in REPLACEMENTS:
        Replacement(kind, torch.zeros(WIDTH) if kind == "mean" else None)
