"""The fused backend inside a TransformerBridge run: same numbers, everything else untouched."""

import gc
import warnings
from typing import Any

import pytest
import torch
from families import built
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

import eyechart
from eyechart import Probe, Record
from eyechart.attention import AttentionProbe
from eyechart.attention.statistics import AUTO_LENGTH
from eyechart.errors import FallbackWarning, NonFiniteError, UsageError
from eyechart.kernels import AttentionCall
from eyechart.models import CATALOGUE, facts_of
from eyechart.probes import capture, masks, plan, seam
from eyechart.residual import ResidualProbe
from eyechart.results import MEASURED, STATISTICS
from eyechart.sequences import BUILT_IN_PROMPT

IDS = torch.arange(3, 83).reshape(2, 40)
ROWS = (*STATISTICS, "received")


def both(model: Any, inputs: Any = IDS, **options: Any) -> tuple[Any, Any]:
    """The fused statistics and those of the pattern."""
    return (
        eyechart.attention_statistics(model, inputs, backend="fused", **options),
        eyechart.attention_statistics(model, inputs, backend="pattern", **options),
    )


def error(ours: Any, theirs: Any, name: str) -> float:
    left, right = getattr(ours, name), getattr(theirs, name)
    assert torch.equal(left.isnan(), right.isnan())
    return float((left - right).abs().nan_to_num().max())


def forget(model: Any) -> None:
    """Let the next run rehearse again."""
    plan.PLANS.known.pop(model, None)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss", "mistral", "deepseek_v3"])
def test_float64_equals_the_pattern_to_its_own_rounding(family):
    with built(family) as folder:
        model = eyechart.load(str(folder), device="cpu")
    if family in ("gpt_oss", "deepseek_v3"):  # transformers has no float64 for its experts
        fused, pattern = both(model)
        bound, loose = 1e-5, 1e-5
    else:
        with built(family) as folder:
            model = eyechart.load(str(folder), device="cpu", dtype="float64")
        fused, pattern = both(model, accumulate="float64")
        bound, loose = 1e-9, 1e-8
    assert set(fused.backend) == {"fused"} and set(pattern.backend) == {"pattern"}
    for name in ROWS:
        assert error(fused, pattern, name) < (loose if name in ("entropy", "distance") else bound)
    if family == "gpt_oss":
        assert error(fused, pattern, "virtual_sink") < bound


def test_the_default_model_at_length(default_model):
    text = "\n".join(f"{i}. {BUILT_IN_PROMPT}" for i in range(12))
    ids = eyechart.sequences.prepare(default_model, text).tokens[:, :2048]
    assert ids.shape[1] == 2048
    fused, pattern = both(default_model, ids)
    assert set(fused.backend) == {"fused"} and fused.provenance.attention == "fused"
    for name in ("first", "diagonal", "previous", "largest", "received"):
        assert error(fused, pattern, name) < 1e-4
    assert error(fused, pattern, "entropy") < 1e-3
    relative = (fused.distance - pattern.distance).abs() / pattern.distance.clamp(min=1)
    assert float(relative.max()) < 1e-4
    # ... and the model computed what it always computes.
    streams = capture(default_model, ids[:, :200], [ResidualProbe()])[0]
    both_at_once = capture(
        default_model,
        ids[:, :200],
        [AttentionProbe(facts_of(default_model).n_layers, fused=True), ResidualProbe()],
    )[1]
    torch.testing.assert_close(both_at_once.norm, streams.norm, rtol=1e-4, atol=1e-3)


def test_bf16_is_closer_to_the_truth_than_the_rounded_pattern():
    """Layer 0 of the same bf16 weights, against float64: nothing differs but the attention."""
    name = "tiny-random-llama"
    half, wide = (eyechart.load(name, device="cpu", dtype=d) for d in ("bfloat16", "float64"))
    with torch.no_grad():
        for ours, theirs in zip(
            wide.original_model.parameters(), half.original_model.parameters(), strict=True
        ):
            theirs.mul_(8 if theirs.ndim > 1 else 1)  # patterns worth reading
            ours.copy_(theirs)
    truth = eyechart.attention_statistics(wide, IDS, backend="pattern", accumulate="float64")
    fused = eyechart.attention_statistics(half, IDS, backend="fused")
    seen = []
    with half.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda p, hook: seen.append(p))]):
        half(IDS)
    rounded = seen[0].double()
    for name, value in (
        ("first", rounded[..., 0]),
        ("diagonal", rounded.diagonal(dim1=-2, dim2=-1)),
        ("largest", rounded.amax(dim=-1)),
    ):
        exact = getattr(truth, name)[:, 0]
        ours = (getattr(fused, name)[:, 0].double() - exact).abs().mean()
        assert float(ours) < float((value - exact).abs().mean())


class Peeks(Probe[list[Any]]):
    """Runs a function in the middle of a fused pass."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def sites(self, model: Any) -> tuple[str, ...]:
        return ("attention",)

    def observe(self, activation: Any, look: Any) -> dict[str, torch.Tensor]:
        return {"seen": torch.tensor([self.look(activation)])}

    def result(self, observations: Any, sequences: Any, provenance: Any) -> list[Any]:
        return [x.item() for x in observations.layers("attention", "seen").values()]


def state(model: Any) -> tuple[Any, ...]:
    """Everything the seam may touch."""
    modules = [model.blocks[l].attn for l in range(2)]
    return (
        [sorted(m.__dict__) for m in modules],
        [id(m.original_component.config) for m in modules],
        [m.original_component.config._attn_implementation for m in modules],
        model.original_model.config._attn_implementation,
        len(seam._RUNNING),
        model(IDS).clone(),
    )


def test_all_is_put_back_even_after_an_exception(llama):
    before = state(llama)

    def explode(call: Any) -> float:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        capture(llama, IDS, [Peeks(explode)])
    after = state(llama)
    assert before[:-1] == after[:-1] and torch.equal(before[-1], after[-1])
    capture(llama, IDS, [AttentionProbe(2, fused=True)])
    after = state(llama)
    assert before[:-1] == after[:-1] and torch.equal(before[-1], after[-1])


def test_other_models_of_the_process_are_left_alone(llama):
    other = eyechart.load("tiny-random-mistral", device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(
        CATALOGUE["tiny-random-llama"].folder(), attn_implementation="sdpa"
    )
    with torch.no_grad():
        truth, theirs = plain(IDS).logits, other(IDS)

    def run_the_others(call: Any) -> float:
        with torch.no_grad():
            same = torch.equal(plain(IDS).logits, truth) and torch.equal(other(IDS), theirs)
        return float(same and isinstance(call, AttentionCall))

    assert capture(llama, IDS, [Peeks(run_the_others)])[0] == [1.0, 1.0]


def test_hooks_around_attention_still_fire_and_change_what_is_measured(llama):
    def silence(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(z)

    def push(stream: torch.Tensor, hook: Any) -> torch.Tensor:
        return stream.flip(1)

    changes = [("blocks.0.attn.hook_z", silence), ("blocks.0.hook_resid_post", push)]
    with llama.hooks(fwd_hooks=changes):
        fused, pattern = both(llama)
        attn, again = capture(
            llama, IDS, [Record("attn_out", layers=[0]), AttentionProbe(2, fused=True)]
        )
    assert set(fused.backend) == {"fused"}
    assert error(fused, pattern, "first") < 1e-5
    assert float(attn[0].abs().max()) == 0 and torch.equal(again.first, fused.first)
    unchanged = eyechart.attention_statistics(llama, IDS, backend="fused")
    assert error(fused, unchanged, "first") > 1e-4


def test_a_hook_on_the_pattern_makes_that_layer_read_it(llama):
    def first_only(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        pattern = torch.zeros_like(pattern)
        pattern[..., 0] = 1
        return pattern

    with (
        llama.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", first_only)]),
        pytest.warns(FallbackWarning, match=r"1 of 2 layers .*attn\.hook_pattern has a hook"),
    ):
        fused, pattern = both(llama)
    assert fused.backend == ("pattern", "fused") and fused.reasons[1] == ""
    assert fused.provenance.attention == "fused, pattern"
    assert fused.provenance.notes[0].startswith("layers 0 read by their pattern: blocks.0.attn")
    for name in ROWS:
        assert error(fused, pattern, name) < 1e-4
    assert float(fused.first[:, 0].min()) == 1


def test_a_probe_that_wants_patterns_gets_them_beside_the_statistics(llama):
    patterns, found = capture(
        llama, IDS, [Record("pattern", layers=[1]), AttentionProbe(2, fused=True)]
    )
    assert set(found.backend) == {"pattern"}
    torch.testing.assert_close(found.first[:, 1], patterns[1][..., 0])


def test_rehearsals_are_once_a_model_and_nothing_of_the_users(llama):
    forget(llama)
    fired = []
    llama.add_hook("hook_embed", lambda x, hook: fired.append(x.shape[1]))
    try:
        eyechart.attention_statistics(llama, IDS, backend="fused")
        known = plan.PLANS.known[llama]
        eyechart.attention_statistics(llama, IDS, backend="fused")
        assert plan.PLANS.known[llama] is known
        assert fired == [40, 40]
        with torch.no_grad():
            llama.original_model.get_input_embeddings().weight.mul_(1.0)
        eyechart.attention_statistics(llama, IDS, backend="fused")
        assert plan.PLANS.known[llama] is not known  # the weights may have changed
    finally:
        llama.reset_hooks()


def test_a_dropped_window_fails_the_rehearsal(monkeypatch):
    with built("mistral") as folder:
        model = eyechart.load(str(folder), device="cpu")
    assert set(both(model)[0].backend) == {"fused"}
    forget(model)
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping, seam.NAME, lambda **options: masks.Visible(None)
    )
    with pytest.warns(FallbackWarning, match="differs from the pattern's"):
        fused, pattern = both(model)
    assert set(fused.backend) == {"pattern"} and error(fused, pattern, "first") == 0


def test_a_missing_mask_registration_fails_the_rehearsal(monkeypatch, llama):
    forget(llama)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, seam.NAME)
    with pytest.warns(FallbackWarning, match="no mask to tell what a query sees"):
        fused, pattern = both(llama)
    forget(llama)
    assert "pattern" in fused.backend and error(fused, pattern, "first") < 1e-5


@pytest.mark.parametrize("dropped", ["softcap", "s_aux", "scaling", "groups"])
def test_whatever_shapes_the_scores_fails_the_rehearsal_when_dropped(monkeypatch, dropped):
    family = "gpt_oss" if dropped == "s_aux" else "gemma2"
    with built(family) as folder:
        model = eyechart.load(str(folder), device="cpu")
    for layer in range(2):
        component = model.blocks[layer].attn.original_component
        if dropped == "softcap":
            component.attn_logit_softcapping = 0.1  # low enough to matter to small weights
        with torch.no_grad():
            component.q_proj.weight.mul_(20)
            component.k_proj.weight.mul_(20)

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        if dropped == "groups":
            tiled = torch.arange(q.shape[1]) % k.shape[1]
            k, v = k[:, tiled], v[:, tiled]
        return seam._attention(module, q, k, v, mask, **{**options, dropped: None})

    fused, pattern = both(model)
    assert set(fused.backend) == {"fused"}
    assert max(error(fused, pattern, name) for name in ("first", "largest")) < 1e-5
    forget(model)
    monkeypatch.setitem(AttentionInterface._global_mapping, seam.NAME, attention)
    with pytest.warns(FallbackWarning, match="differs from the pattern's"):
        fused, _ = both(model)
    assert "pattern" in fused.backend


def test_an_argument_nobody_knows_is_refused_by_name(monkeypatch, llama):
    forget(llama)

    def attention(*args: Any, **options: Any) -> Any:
        return seam._attention(*args, **options, phase_of_the_moon=torch.ones(1))

    monkeypatch.setitem(AttentionInterface._global_mapping, seam.NAME, attention)
    with pytest.warns(FallbackWarning, match="takes phase_of_the_moon"):
        fused, pattern = both(llama)
    forget(llama)
    assert error(fused, pattern, "first") == 0


def test_what_only_shows_at_length_is_read_by_the_pattern_too(monkeypatch, llama):
    """A mask that is regular in the rehearsal and is not in the run."""

    def later_irregular(*args: Any, **options: Any) -> masks.Visible:
        long = options["q_length"] > 24
        return masks.Visible(None, "what a query sees has holes" if long else "")

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, seam.NAME, later_irregular)
    with pytest.warns(FallbackWarning, match="has holes"):
        fused, pattern = both(llama, batch_size=1)
    # The first layer; once its mask has to be written out, the second can read that.
    assert fused.backend == ("pattern", "fused") and error(fused, pattern, "entropy") < 1e-5
    assert fused.provenance.forward_passes == 2


def test_masks_in_one_number_a_query():
    from transformers.masking_utils import and_masks, causal_mask_function, or_masks

    def window(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return query - key < 5

    def ahead(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key == query + 1

    made = masks.visible(2, 9, 9, mask_function=and_masks(causal_mask_function, window))
    assert made.start is not None
    assert made.start.tolist() == [[max(0, i - 4) for i in range(9)]] * 2
    assert masks.visible(2, 9, 9).start is None
    bad = masks.visible(1, 9, 9, mask_function=or_masks(causal_mask_function, ahead))
    with pytest.raises(masks.IrregularMaskError, match="not one run"):
        _ = bad.start
    continued = masks.visible(1, 9, 12, q_offset=3, mask_function=window)
    with pytest.raises(masks.IrregularMaskError, match="continued"):
        _ = continued.start


def test_long_masks_are_made_a_block_at_a_time(monkeypatch):
    from transformers.masking_utils import sliding_window_causal_mask_function

    whole = masks.visible(1, 100, 100, mask_function=sliding_window_causal_mask_function(7))
    monkeypatch.setattr(masks, "_BLOCK", 300)
    blocks = masks.visible(1, 100, 100, mask_function=sliding_window_causal_mask_function(7))
    assert whole.start is not None and blocks.start is not None
    assert torch.equal(whole.start, blocks.start)


def test_auto_takes_the_pattern_for_short_and_fused_for_long_or_half(llama):
    short, long = (
        eyechart.attention_statistics(llama, torch.randint(3, 250, (1, n)))
        for n in (AUTO_LENGTH - 1, AUTO_LENGTH)
    )
    assert set(short.backend) == {"pattern"} and set(long.backend) == {"fused"}
    half = eyechart.load("tiny-random-llama", device="cpu", dtype="bfloat16")
    assert set(eyechart.attention_statistics(half, IDS).backend) == {"fused"}


def test_what_is_computed_can_be_chosen(llama, tmp_path):
    for backend in ("fused", "pattern"):
        found = eyechart.attention_statistics(
            llama, IDS, backend=backend, statistics=["first", "entropy"]
        )
        assert found.computed == ("first", "entropy")
        assert found.diagonal.isnan().all() and found.received.isnan().all()
        assert found.diagonal.shape == found.first.shape
        assert list(found.to_frame().columns) == ["layer", "head", "first", "entropy"]
        assert found.sink_rate(0.1) >= 0 and "diagonal" not in repr(found)
        with pytest.raises(UsageError, match="diagonal was not computed; ask for it"):
            found.strongest("diagonal")
        assert eyechart.open_result(found.save(tmp_path / backend)) == found
    everything = eyechart.attention_statistics(llama, IDS, backend="fused")
    assert everything.computed == MEASURED
    with pytest.raises(UsageError, match="unknown statistics 'sink'"):
        eyechart.attention_statistics(llama, IDS, statistics=["sink"])
    with pytest.raises(UsageError, match="nothing to compute"):
        eyechart.attention_statistics(llama, IDS, statistics=[])


def test_normalised_entropy_is_one_for_a_head_that_looks_everywhere(handmade):
    ids = torch.arange(4, 16)[None]
    found = eyechart.attention_statistics(handmade, ids, backend="fused")
    assert set(found.backend) == {"fused"}
    uniform, sink = found.normalised_entropy[0, 1, 1], found.normalised_entropy[0, 1, 0]
    torch.testing.assert_close(uniform[1:], torch.ones(11))
    torch.testing.assert_close(sink[1:], torch.zeros(11), atol=1e-6, rtol=0)
    assert found.normalised_entropy[..., 0].isnan().all()
    assert found.by_head("normalised_entropy")[1, 1] == pytest.approx(1)


def test_padding_changes_nothing(llama):
    texts = ["The quick brown fox jumps over the dog.", "Short."]
    together = eyechart.attention_statistics(llama, texts, backend="fused")
    alone = eyechart.attention_statistics(llama, texts[1], backend="fused")
    n = alone.first.shape[-1]
    for name in ROWS:
        ours, theirs = getattr(together, name)[1], getattr(alone, name)[0]
        torch.testing.assert_close(ours[..., :n], theirs, atol=2e-6, rtol=1e-5)
        assert ours[..., n:].isnan().all()


def test_bad_numbers_name_the_layer(llama):
    def poison(k: torch.Tensor, hook: Any) -> torch.Tensor:
        k = k.clone()
        k[0, 2] = torch.nan
        return k

    with (
        llama.hooks(fwd_hooks=[("blocks.1.attn.hook_k", poison)]),
        pytest.raises(NonFiniteError, match=r"layer 1 of .*queries or keys"),
    ):
        eyechart.attention_statistics(llama, IDS, backend="fused")


def test_hybrids_say_which_layers_have_no_attention():
    model = eyechart.load("tiny-random-lfm2", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        found = eyechart.attention_statistics(model, IDS, backend="fused")
    assert found.backend == ("none", "fused") and found.reasons == ("", "")
    assert found.first[:, 0].isnan().all() and not found.first[:, 1].isnan().any()


def test_an_exam_of_a_long_text_is_fused_and_the_same(llama):
    ids = torch.randint(3, 250, (1, AUTO_LENGTH))
    found = eyechart.exam(llama, ids, lengths=[1, 2])
    assert found.attention is not None and set(found.attention.backend) == {"fused"}
    assert not found.failures and found.patterns is not None and found.residual is not None
    assert found.provenance.attention == "autograd, fused, pattern"
    assert found.residual.provenance.attention == "fused"
    pattern = eyechart.attention_statistics(llama, ids, backend="pattern")
    assert found.attention.sink_rate(0.1, 64) == pattern.sink_rate(0.1, 64)


def test_nothing_of_a_call_outlives_its_layer(llama):
    """Memory must not grow with the depth: queries, keys and values are gone with their layer."""
    import weakref

    alive: list[Any] = []

    def watch(call: Any) -> float:
        gc.collect()
        left = sum(reference() is not None for reference in alive)
        alive.append(weakref.ref(call))
        return float(left)

    assert capture(llama, IDS, [Peeks(watch)])[0] == [0.0, 0.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gpu_says_what_the_cpu_says(dtype):
    there, here = (
        eyechart.load("tiny-random-gemma2", device=device, dtype=dtype)
        for device in ("cuda", "cpu")
    )
    ours, theirs = (eyechart.attention_statistics(m, IDS, backend="fused") for m in (there, here))
    assert set(ours.backend) == {"fused"}
    for name in ROWS:
        assert error(ours, theirs, name) < (1e-4 if dtype == "float32" else 5e-2) * 10
