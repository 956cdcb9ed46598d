"""Lenses: what a model computes under one is what transformers computes behind the same mask."""

from typing import Any

import pytest
import torch
from families import additive_mask, beside_plain
from torch import Tensor

import eyechart
from eyechart import Record, lenses, targets
from eyechart.attention.probe import reduce_pattern
from eyechart.errors import EyechartError, UnsupportedModelError, UsageError
from eyechart.kernels import AttentionCall, seers
from eyechart.probes import seam

LENGTH = 21  # longer than the windows
KEYS, AFTER = 3, 6
IDS = torch.arange(3, 3 + 2 * LENGTH).reshape(2, LENGTH)
places = torch.arange(LENGTH)
FAMILIES = ["llama", "gpt2", "mistral", "gemma2", "gpt_oss"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: Any) -> Any:
    """A bridge, and transformers' own eager model of the same weights."""
    return beside_plain(request.param)


@pytest.fixture(scope="module")
def sharp() -> Any:
    """A Llama with grouped queries, and transformers' own."""
    return beside_plain("llama")


def evicted(keys: int = KEYS, after: int = AFTER) -> Tensor:
    """The first key that each query sees."""
    return torch.where(after <= places, keys, 0)


def masked(plain: Any, start: Tensor, **options: Any) -> Any:
    return plain(IDS, attention_mask=additive_mask(plain, start), **options)


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def state(model: Any) -> tuple[Any, ...]:
    """Everything a lens may touch."""
    modules = [block.attn for block in model.blocks]
    return (
        [(sorted(m.__dict__), id(m.__dict__.get("forward"))) for m in modules],
        [id(m.original_component.config) for m in modules],
        [m.original_component.config._attn_implementation for m in modules],
        model.original_model.config._attn_implementation,
        [m.original_component in seam._RUNNING for m in modules],
        seam.edits_of(model),
    )


# What is computed.


def test_logits_are_those_behind_the_same_mask(pair):
    model, plain = pair
    with torch.no_grad():
        truth, whole = masked(plain, evicted()).logits, plain(IDS).logits
        torch.testing.assert_close(masked(plain, torch.zeros_like(places)).logits, whole)
        torch.testing.assert_close(model(IDS), whole, atol=1e-5, rtol=1e-5)
        with lenses.evict(model, KEYS, AFTER):
            seen = model(IDS)
    with lenses.evict(model, KEYS, AFTER):
        with_graph = model(IDS)
    assert with_graph.requires_grad
    for ours in (seen, with_graph.detach()):
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-5)
    moved = (truth - whole).abs().amax(dim=(0, 2))
    assert float(moved[:AFTER].max()) < 1e-5 and float(moved[AFTER:].max()) > 0.1


def rows_of(call: AttentionCall) -> Tensor:
    """A layer's attention, worked out from what it is made of."""
    k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)
    scores = call.q.double() @ k.double().transpose(-1, -2) * call.scale
    if call.softcap:
        scores = call.softcap * (scores / call.softcap).tanh()
    assert call.start is not None
    unseen = (places < call.start[..., None]) | (places > places[:, None])
    weights = scores.exp().masked_fill(unseen[:, None], 0)
    rest = 0 if call.sinks is None else call.sinks.double().exp()[:, None, None]
    return weights / (weights.sum(dim=-1, keepdim=True) + rest)


def test_measurements_see_what_the_model_sees(pair):
    model, plain = pair
    with torch.no_grad():
        truth = masked(plain, evicted(), output_attentions=True).attentions
    first, rest = targets.First(KEYS), targets.Positions(tuple(range(KEYS, LENGTH)))
    with lenses.evict(model, KEYS, AFTER):
        found = eyechart.attention_statistics(model, IDS, targets=[first, rest], backend="fused")
        (patterns,) = eyechart.capture(model, IDS, [Record("attention", rows_of)])
        (last,) = eyechart.capture(model, IDS, [Record("next_token")])
        logits = run(model)
    torch.testing.assert_close(last[None], logits[:, -1], atol=1e-5, rtol=1e-5)
    hidden, seen = found.masses[first.name], found.masses[rest.name]
    assert float(hidden[..., AFTER:].abs().max()) == 0 < float(hidden[..., :AFTER].min())
    if found.virtual_sink is None:
        torch.testing.assert_close(hidden + seen, torch.ones_like(seen))
    else:
        torch.testing.assert_close(hidden + seen, 1 - found.virtual_sink)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    for layer, pattern in enumerate(truth):
        assert float(pattern[:, :, AFTER:, :KEYS].abs().max()) == 0
        torch.testing.assert_close(patterns[layer].float(), pattern, atol=1e-5, rtol=1e-4)
        expected = reduce_pattern(pattern, IDS, mask)
        expected["received"] /= seers(mask)[:, None]
        for name, value in expected.items():
            ours = getattr(found, name)[:, layer]
            torch.testing.assert_close(ours, value, atol=2e-5, rtol=1e-4)


def test_a_short_text_is_measured_without_being_told_how(sharp):
    model, plain = sharp
    with torch.no_grad():
        truth = masked(plain, evicted(), output_attentions=True).attentions
    with lenses.evict(model, KEYS, AFTER):
        found = eyechart.attention_statistics(model, IDS)
    torch.testing.assert_close(found.largest[:, 1], truth[1].amax(dim=-1))


def test_a_padded_text_is_the_text_alone(sharp):
    model, _ = sharp
    texts = ["A longer line of text.", "Short, but not so short."[:14]]
    with lenses.evict(model, KEYS, AFTER):
        together, alone = (
            eyechart.attention_statistics(model, t, backend="fused") for t in (texts, texts[1])
        )
    count = alone.first.shape[-1]
    assert AFTER < count < together.first.shape[-1]
    torch.testing.assert_close(together.entropy[1, ..., :count], alone.entropy[0])


def test_information_flow_follows_what_is_seen(sharp):
    model, plain = sharp
    with torch.no_grad():
        truth = masked(plain, evicted(), output_attentions=True).attentions
    measures = ("rollout", "sensitivity", "spread")
    plainly = eyechart.information_flow(model, IDS, measures=measures, evict=KEYS)
    with lenses.evict(model, KEYS, 2 * KEYS):
        found = eyechart.information_flow(model, IDS, measures=measures, evict=KEYS)
    product = torch.eye(LENGTH)
    for pattern in truth:
        product = (pattern.mean(dim=1) + torch.eye(LENGTH)) / 2 @ product
    assert found.rollout is not None and plainly.sensitivity is not None
    torch.testing.assert_close(found.rollout[:, -1], product[:, -1])
    # The last query still hears the first tokens: by way of those that see them.
    assert float(found.rollout[:, -1, 0].min()) > 0
    assert found.sensitivity is not None and found.spread is not None
    assert float((found.sensitivity / plainly.sensitivity - 1).abs().max()) > 0.1
    assert plainly.spread_evicted is not None and found.spread_evicted is not None
    torch.testing.assert_close(found.spread, plainly.spread_evicted)
    torch.testing.assert_close(found.spread_evicted, plainly.spread_evicted)
    assert plainly.spread is not None
    assert float((found.spread - plainly.spread).abs().max()) > 1e-3


def test_gradients_are_those_behind_the_mask(pair):
    model, plain = pair
    direction = torch.randn(*IDS.shape, plain.config.vocab_size)
    with lenses.evict(model, KEYS, AFTER):
        loss = (model(IDS) * direction).sum()
    # The way back is taken outside, where the lens is gone.
    names, weights = zip(*model.original_model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    ours = {
        name.replace("_original_component.", ""): gradient
        for name, gradient in zip(names, found, strict=True)
        if gradient is not None
    }
    theirs = dict(plain.named_parameters())
    truth = torch.autograd.grad(
        (masked(plain, evicted()).logits * direction).sum(), list(theirs.values())
    )
    whole = torch.autograd.grad((plain(IDS).logits * direction).sum(), list(theirs.values()))
    # The bridge has its own names for what GPT-2 packs together.
    apart = {name for name in theirs if ".attn.c_" in name}
    assert theirs.keys() - ours.keys() == apart and bool(apart) == hasattr(plain, "transformer")
    changed = 0.0
    for name, right, other in zip(theirs, truth, whole, strict=True):
        if name not in ours:
            continue
        size = float(right.abs().max())
        torch.testing.assert_close(ours[name], right, atol=1e-4 * size, rtol=1e-4)
        changed = max(changed, float((right - other).abs().max()) / size)
    assert changed > 0.1


def test_greedy_tokens_are_those_behind_the_mask(sharp):
    model, plain = sharp
    ids = IDS[:1, :8]
    with torch.no_grad():
        for _ in range(4):
            start = evicted()[: ids.shape[1]]
            logits = plain(ids, attention_mask=additive_mask(plain, start)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with lenses.evict(model, KEYS, AFTER):
        assert torch.equal(model.generate(IDS[:1, :8], use_past_kv_cache=False, **options), ids)
        with pytest.raises(EyechartError, match="queries and keys are not equally many"):
            model.generate(IDS[:1, :8], **options)


# Putting it back.


def test_on_leaving_all_is_as_it_was(pair):
    model, _ = pair
    logits, before = run(model), state(model)
    with lenses.evict(model, KEYS, AFTER):
        assert state(model) != before and not torch.equal(run(model), logits)
    assert state(model) == before and torch.equal(run(model), logits)
    with pytest.raises(KeyError, match="mine"), lenses.evict(model, KEYS, AFTER):
        raise KeyError("mine")
    assert state(model) == before and torch.equal(run(model), logits)


def test_a_pass_that_fails_under_a_lens_leaves_it_in_place(sharp):
    model, _ = sharp
    logits, before = run(model), state(model)

    def explode(stream: Tensor, hook: Any) -> None:
        raise KeyError("mine")

    with lenses.evict(model, KEYS, AFTER):
        seen, within = run(model), state(model)
        with (
            pytest.raises(KeyError, match="mine"),
            model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", explode)]),
        ):
            eyechart.residual_norms(model, IDS)
        assert state(model) == within and torch.equal(run(model), seen)
    assert state(model) == before and torch.equal(run(model), logits)


def test_a_generator_that_is_dropped_takes_its_lens_with_it(sharp):
    model, _ = sharp
    logits = run(model)

    def under() -> Any:
        with lenses.evict(model, KEYS, AFTER):
            yield run(model)

    running = under()
    assert not torch.equal(next(running), logits)
    running.close()
    assert torch.equal(run(model), logits)


# Several.


def test_two_evictions_are_the_larger(sharp):
    model, plain = sharp
    logits, before = run(model), state(model)
    seen = {}
    for keys in (2, 5):
        with lenses.evict(model, keys, 8):
            seen[keys] = run(model)
    assert not torch.allclose(seen[2], seen[5], atol=1e-3)
    for outer, inner in ((2, 5), (5, 2)):
        with lenses.evict(model, outer, 8):
            with lenses.evict(model, inner, 8):
                assert torch.equal(run(model), seen[5])
                found = eyechart.attention_statistics(
                    model, IDS, targets=[targets.First(5)], backend="fused"
                )
                assert float(found.masses["first 5"][..., 8:].max()) == 0
            assert torch.equal(run(model), seen[outer])
    assert state(model) == before and torch.equal(run(model), logits)
    # Few from early on and many from late on: each hides its own.
    with torch.no_grad():
        truth = masked(plain, torch.maximum(evicted(2, 4), evicted(7, 12))).logits
    with lenses.evict(model, 7, 12), lenses.evict(model, 2, 4):
        torch.testing.assert_close(run(model), truth, atol=1e-5, rtol=1e-5)


def test_models_do_not_influence_one_another(sharp):
    model, plain = sharp
    other, other_plain = beside_plain("mistral")
    twin = beside_plain("llama")[0]  # of the same classes
    logits = {m: run(m) for m in (model, other, twin)}
    with torch.no_grad():
        alone = [m(IDS).logits for m in (plain, other_plain)]
        behind = masked(other_plain, evicted(5, 10)).logits
    with lenses.evict(model, KEYS, AFTER):
        seen = run(model)
        assert not torch.equal(seen, logits[model])
        assert torch.equal(run(twin), logits[twin]) and torch.equal(run(other), logits[other])
        with torch.no_grad():
            assert all(
                torch.equal(m(IDS).logits, x)
                for m, x in zip((plain, other_plain), alone, strict=True)
            )
        statistics = eyechart.attention_statistics(twin, IDS, backend="fused")
        assert float(statistics.first[..., AFTER:].min()) > 0
        with lenses.evict(other, 5, 10):
            torch.testing.assert_close(run(other), behind, atol=1e-5, rtol=1e-5)
            assert torch.equal(run(model), seen) and torch.equal(run(twin), logits[twin])
        assert torch.equal(run(other), logits[other]) and torch.equal(run(model), seen)
    assert all(torch.equal(run(m), x) for m, x in logits.items())


# What is refused.


def test_every_query_must_keep_itself(sharp):
    model, _ = sharp
    before = state(model)
    for keys, after in ((4, 3), (1, 0), (0, 8), (-1, 8)):
        with (
            pytest.raises(UsageError, match=f"between 1 and after, got keys={keys}, after={after}"),
            lenses.evict(model, keys, after),
        ):
            pytest.fail("the body must not run")
    assert state(model) == before
    with lenses.evict(model, 1, 1):  # the least that can be asked for
        found = eyechart.attention_statistics(model, IDS, backend="fused")
    assert float(found.diagonal[..., 0].min()) == 1 and float(found.first[..., 1:].max()) == 0
    # The second token is the first that anyone sees: it sees nothing else.
    assert float((found.diagonal[..., 1] - 1).abs().max()) < 1e-6


def test_attention_of_its_own_making_is_refused_and_left_alone():
    model, _ = beside_plain("gpt_neo")
    logits, before = run(model), state(model)
    with (
        pytest.raises(UnsupportedModelError, match=r"layer 0: its attention is code of its own"),
        lenses.evict(model, KEYS, AFTER),
    ):
        pytest.fail("the body must not run")
    assert state(model) == before and torch.equal(run(model), logits)


def test_a_hook_on_the_pattern_stands_in_the_way(sharp):
    model, _ = sharp
    logits, before = run(model), state(model)
    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda p, hook: p)]),
        pytest.raises(UnsupportedModelError, match=r"layer 1: blocks\.1\.attn\.hook_pattern has a"),
        lenses.evict(model, KEYS, AFTER),
    ):
        pytest.fail("the body must not run")
    assert state(model) == before and torch.equal(run(model), logits)


@pytest.mark.parametrize("site", ["pattern", "scores"])
def test_the_pattern_is_not_to_be_had_under_a_lens(sharp, site):
    model, _ = sharp
    ran: list[int] = []
    with lenses.evict(model, KEYS, AFTER):
        seen = run(model)
        with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: ran.append(1))]):
            with pytest.raises(UsageError, match=r"a lens .* a probe reads the pattern"):
                eyechart.capture(model, IDS, [Record(site)])
            with pytest.raises(UsageError, match=r"a lens .* a probe reads the pattern"):
                eyechart.attention_statistics(model, IDS, backend="pattern")
        assert not ran and torch.equal(run(model), seen)
    assert len(eyechart.capture(model, IDS, [Record(site)])[0]) == 2


def test_weights_changed_under_a_lens_are_seen_through_it():
    model, plain = beside_plain("llama")
    with lenses.evict(model, KEYS, AFTER):
        with torch.no_grad():
            for m in (model.original_model, plain):
                m.get_input_embeddings().weight.mul_(-1)
                m.get_output_embeddings().weight.mul_(0.5)
            truth = masked(plain, evicted(), output_attentions=True)
        found = eyechart.attention_statistics(model, IDS, backend="fused")
        torch.testing.assert_close(run(model), truth.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.first[:, 0], truth.attentions[0][..., 0])
    found = eyechart.attention_statistics(model, IDS, backend="fused")
    assert set(found.backend) == {"fused"}
    with torch.no_grad():
        whole = plain(IDS, output_attentions=True).attentions
    torch.testing.assert_close(found.first[:, 1], whole[1][..., 0])
