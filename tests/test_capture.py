"""Capture: every firing counted, hooks always removed, nothing n x n left behind."""

import gc
import weakref

import einops
import pytest
import torch
from conftest import TINY
from transformers import AutoModelForCausalLM

import eyechart
from eyechart import Probe, Record
from eyechart.errors import CaptureError, InputError, NonFiniteError, UsageError
from eyechart.models import CATALOGUE
from eyechart.probes import SITES, has_site
from eyechart.probes.capture import capture
from eyechart.residual import ResidualProbe

IDS = torch.arange(3, 19).reshape(2, 8)


def hooks_left(model):
    points = {id(point): point for point in model.hook_dict.values()}.values()
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in points)


def test_streams_chain_and_end_where_transformers_says(llama):
    pre, mid, post, final = capture(
        llama,
        IDS,
        [Record(site) for site in ("resid_pre", "resid_mid", "resid_post", "final_norm")],
    )
    attn, mlp = capture(llama, IDS, [Record("attn_out"), Record("mlp_out")])
    torch.testing.assert_close(post[0], pre[1], atol=0, rtol=0)
    for layer in range(2):
        torch.testing.assert_close(pre[layer] + attn[layer], mid[layer])
        torch.testing.assert_close(mid[layer] + mlp[layer], post[layer])
    plain = AutoModelForCausalLM.from_pretrained(
        CATALOGUE["tiny-random-llama"].folder(), attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        states = plain(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(pre[0], states[0])
    torch.testing.assert_close(final[None], states[-1])


def test_pattern_times_values_is_z_and_only_with_interleaved_groups(llama):
    pattern, v, z = capture(llama, IDS, [Record(site) for site in ("pattern", "v", "z")])
    for layer in range(2):
        groups = pattern[layer].shape[1] // v[layer].shape[2]
        assert groups == 2
        right = einops.repeat(v[layer], "b p h d -> b p (h g) d", g=groups)
        wrong = einops.repeat(v[layer], "b p h d -> b p (g h) d", g=groups)
        mix = "b h q k, b k h d -> b q h d"
        torch.testing.assert_close(einops.einsum(pattern[layer], right, mix), z[layer])
        assert (einops.einsum(pattern[layer], wrong, mix) - z[layer]).abs().max() > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_every_declared_site_fires_or_is_refused(name):
    model = eyechart.load(name, device="cpu")
    with pytest.raises(UsageError, match="hands over an AttentionCall"):
        capture(model, IDS, [Record("attention")])
    for site in SITES.keys() - {"attention"}:
        if not has_site(model, site) and "{layer}" in SITES[site].hook:
            with pytest.raises(CaptureError, match="has no site"):
                capture(model, IDS, [Record(site)])
            continue
        try:
            (found,) = capture(model, IDS, [Record(site)])
        except CaptureError as refusal:
            why = {"scores": "comes after the softmax"}.get(site, "did not fire")
            assert site in ("rotated_q", "rotated_k", "scores"), refusal
            assert why in str(refusal)
        else:
            assert found
            for value in found.values():
                assert value.shape[0] == 2 and value.ndim == len(SITES[site].axes.split())


def test_a_hook_that_never_fires_is_an_error_not_an_empty_result():
    # Phi-3 declares rotated queries but rotates them where no hook looks.
    model = eyechart.load("tiny-random-phi3", device="cpu")
    with pytest.raises(CaptureError, match=r"rotated_q of layer 0 0 times"):
        capture(model, IDS, [Record("rotated_q")])
    assert hooks_left(model) == 0


def test_hooks_are_removed_after_an_exception_and_the_users_stay(llama):
    seen = []
    llama.add_hook("hook_embed", lambda x, hook: seen.append(1))
    before = hooks_left(llama)

    def explode(activation):
        raise KeyError("mine")

    try:
        with pytest.raises(KeyError, match="mine"):
            capture(llama, IDS, [Record("pattern", explode)])
        assert hooks_left(llama) == before == 1
        capture(llama, IDS, [Record("resid_post")])
        assert len(seen) == 2  # fired in both passes, the failed one too
    finally:
        llama.reset_hooks()


def test_hooks_that_intervene_are_measured(llama):
    def silence(z, hook):
        return torch.zeros_like(z)

    with llama.hooks(fwd_hooks=[("blocks.1.attn.hook_z", silence)]):
        attn, z = capture(llama, IDS, [Record("attn_out"), Record("z")])
    assert float(attn[1].abs().max()) == 0 and float(attn[0].abs().max()) > 0
    assert float(z[1].abs().max()) == 0


class WatchesMemory(Probe[list[bool]]):
    """Notes whether earlier layers' patterns are still alive when the next one arrives."""

    def __init__(self):
        self.earlier, self.alive = [], []

    def sites(self, model):
        return ("pattern",)

    def observe(self, activation, look):
        gc.collect()
        self.alive += [reference() is not None for reference in self.earlier]
        self.earlier.append(weakref.ref(activation))
        return {"first": activation[..., 0].clone()}

    def result(self, observations, sequences, provenance):
        return self.alive


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_pattern_outlives_its_layer(dtype):
    model = eyechart.load("tiny-random-llama", device="cpu", dtype=dtype)
    (alive,) = capture(model, IDS, [WatchesMemory()])
    assert alive == [False]


def test_firings_are_counted_in_the_provenance(llama):
    (found,) = capture(llama, IDS, [ResidualProbe()])
    assert found.provenance.hooks == {"resid_pre": 2, "resid_post": 2, "final_norm": 1}
    assert found.provenance.forward_passes == 1
    (found,) = capture(llama, IDS, [ResidualProbe()], batch_size=1)
    assert found.provenance.hooks == {"resid_pre": 4, "resid_post": 4, "final_norm": 2}
    assert found.provenance.forward_passes == 2


@pytest.mark.parametrize(
    "refusal",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_halves_the_batch_and_says_so(llama, refusal):
    ids = torch.randint(3, 250, (5, 6))
    (whole,) = capture(llama, ids, [Record("resid_post")])

    def only_two_fit(activation, hook):
        if activation.shape[0] > 2:
            raise refusal

    with llama.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", only_two_fit)]):
        parts, norms = capture(llama, ids, [Record("resid_post"), ResidualProbe()])
    torch.testing.assert_close(parts[1], whole[1])
    assert norms.provenance.notes == (
        "out of memory: batch halved to 3 sequences",
        "out of memory: batch halved to 2 sequences",
    )
    assert norms.norm.shape[0] == 5

    def nothing_fits(activation, hook):
        raise torch.OutOfMemoryError("too big")

    with (
        llama.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", nothing_fits)]),
        pytest.raises(torch.OutOfMemoryError),
    ):
        capture(llama, ids, [Record("resid_post")])


def test_half_precision_patterns_are_taken_again_in_float32():
    truth = eyechart.load("tiny-random-llama", device="cpu", dtype="float64")
    half = eyechart.load("tiny-random-llama", device="cpu", dtype="bfloat16")
    rounded = {}

    def keep(pattern, hook):
        rounded[int(hook.name.split(".")[1])] = pattern.clone()

    with half.hooks(fwd_hooks=[(f"blocks.{l}.attn.hook_pattern", keep) for l in range(2)]):
        (found,) = capture(half, IDS, [Record("pattern")])
    (exact,) = capture(truth, IDS, [Record("pattern")])
    assert exact[0].dtype == torch.float64
    assert found[0].dtype == torch.float32 and rounded[0].dtype == torch.bfloat16
    ours = (found[0].sum(-1) - 1).abs().max()
    theirs = (rounded[0].float().sum(-1) - 1).abs().max()
    assert ours < 1e-6 < theirs
    assert (found[0] - exact[0]).abs().mean() < (rounded[0] - exact[0]).abs().mean()


def test_a_pattern_that_is_no_softmax_of_its_scores_is_refused():
    model = eyechart.load("tiny-random-llama", device="cpu", dtype="bfloat16")

    def meddle(pattern, hook):
        # Still rows that sum to one, but not the softmax of the scores.
        return torch.eye(pattern.shape[-1], dtype=pattern.dtype).expand_as(pattern)

    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", meddle)]),
        pytest.raises(CaptureError, match=r"layer 1: .* more than rounding explains"),
    ):
        capture(model, IDS, [Record("pattern")])


def test_attention_that_looks_ahead_is_refused(llama):
    def look_ahead(pattern, hook):
        return torch.full_like(pattern, 1 / pattern.shape[-1])

    with (
        llama.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", look_ahead)]),
        pytest.raises(CaptureError, match="layer 0: the first token attends to later ones"),
    ):
        capture(llama, IDS, [Record("pattern")])


def test_rows_that_miss_one_are_refused(llama):
    with (
        llama.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda p, hook: 0.9 * p)]),
        pytest.raises(CaptureError, match=r"layer 1: attention rows miss one by up to 0\.1"),
    ):
        capture(llama, IDS, [Record("pattern")])


def test_nan_in_the_stream_names_the_layer(llama):
    def poison(stream, hook):
        stream = stream.clone()
        stream[1, 3, 7] = torch.nan
        return stream

    with (
        llama.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", poison)]),
        pytest.raises(NonFiniteError, match="after layer 1"),
    ):
        capture(llama, IDS, [Record("resid_pre")])


def test_nan_in_the_padding_is_nobodys_business(llama):
    def poison(stream, hook):
        stream = stream.clone()
        stream[1, -1] = torch.inf  # the last position of the short row is padding
        return stream

    with llama.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", poison)]):
        capture(llama, ["a long line", "short"], [Record("resid_pre")])


def test_training_mode_empty_probes_and_unknown_sites_are_refused(llama):
    llama.train()
    try:
        with pytest.raises(InputError, match=r"call model\.eval\(\)"):
            capture(llama, IDS, [Record("resid_pre")])
    finally:
        llama.eval()
    with pytest.raises(UsageError, match="at least one probe"):
        capture(llama, IDS, [])
    with pytest.raises(UsageError, match="unknown site 'residual'; there are embedding, resid_pre"):
        capture(llama, IDS, [Record("residual")])
    with pytest.raises(UsageError, match=r"in layers \[2, 9\]; it has it in \[0, 1\]"):
        capture(llama, IDS, [Record("pattern", layers=[1, 2, 9])])
    with pytest.raises(UsageError, match="batch_size"):
        capture(llama, IDS, [Record("resid_pre")], batch_size=0)


def test_logits_are_whole_when_asked_for_and_only_then(llama):
    (logits,) = capture(llama, IDS, [Record("logits")])
    with torch.no_grad():
        torch.testing.assert_close(logits[None], llama(IDS))
    widths = []
    with llama.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: widths.append(x.shape[1]))]):
        capture(llama, IDS, [Record("resid_pre")])
    assert widths == [1]


def test_the_default_model_computes_what_transformers_does(default_model):
    from eyechart.sequences import BUILT_IN_PROMPT, prepare

    ids = prepare(default_model, BUILT_IN_PROMPT).tokens
    (logits,) = capture(default_model, ids, [Record("logits")])
    plain = AutoModelForCausalLM.from_pretrained(
        CATALOGUE["smollm2-135m-instruct"].folder(),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    with torch.no_grad():
        torch.testing.assert_close(logits[None], plain(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gpu_says_what_the_cpu_says(dtype):
    on = {
        device: eyechart.attention_statistics(
            eyechart.load("tiny-random-llama", device=device, dtype=dtype), IDS
        )
        for device in ("cpu", "cuda")
    }
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for name in ("first", "diagonal", "previous", "entropy", "received"):
        torch.testing.assert_close(
            getattr(on["cuda"], name), getattr(on["cpu"], name), atol=tolerance, rtol=tolerance
        )
    assert on["cuda"].provenance.device.startswith("cuda")
    assert on["cuda"].provenance.peak_bytes
