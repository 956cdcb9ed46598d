"""The lens on precision: what is computed under it is what rounding by hand gives."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from families import beside_plain, built
from torch import Tensor, nn

import eyechart
from eyechart import Record, lenses
from eyechart.errors import UnsupportedModelError, UsageError
from eyechart.kernels import AttentionCall, attend, carry, differentiable
from eyechart.lenses.weights import rounded
from eyechart.models import facts_of
from eyechart.precision import FORMATS, share_expected, share_identical
from eyechart.probes.notes import notes_of
from eyechart.sequences import repeated

LENGTH = 21
IDS = torch.arange(3, 3 + 2 * LENGTH).reshape(2, LENGTH)
PLACES = ("model", "weights", "attention", "stream", "final")
HALF = torch.bfloat16


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox", "phi3"])
def pair(request: Any) -> Any:
    """A bridge, and transformers' own: grouped queries; Conv1D; parallel blocks; joint matrices."""
    return beside_plain(request.param)


@pytest.fixture(scope="module")
def sharp() -> Any:
    return beside_plain("llama")[0]


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def state(model: Any) -> list[Tensor]:
    tensors = [*model.original_model.parameters(), *model.original_model.buffers()]
    return [each.detach().clone() for each in tensors]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def blocks_of(model: Any) -> tuple[list[nn.Module], nn.Module]:
    """transformers' own blocks and final norm, in a bridge as well as in a plain model."""
    body = getattr(model, model.base_model_prefix)
    blocks = body.h if hasattr(body, "h") else body.layers
    names = ("norm", "ln_f", "final_layer_norm")
    return list(blocks), next(getattr(body, name) for name in names if hasattr(body, name))


# What is computed.


@contextmanager
def stream_rounded(model: Any, name: str) -> Iterator[None]:
    """By hand: what goes into every block and the final norm, in hooks on transformers' modules."""

    def enter(module: nn.Module, args: Any, options: Any) -> Any:
        if args:
            return (FORMATS[name].round(args[0]), *args[1:]), options
        return args, {**options, "hidden_states": FORMATS[name].round(options["hidden_states"])}

    blocks, norm = blocks_of(model.original_model)
    with ExitStack() as undo:
        for module in (*blocks, norm):
            undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_the_stream_is_what_rounding_it_by_hand_gives(pair, name):
    model, _ = pair
    plain = run(model)
    with stream_rounded(model, name):
        truth = run(model)
    with lenses.precision(model, name):
        seen = run(model)
        pre, post = eyechart.capture(model, IDS, [Record("resid_pre"), Record("resid_post")])
    assert torch.equal(seen, truth) and not torch.equal(seen, plain)
    for stream in (*pre.values(), *post.values()):
        torch.testing.assert_close(FORMATS[name].round(stream), stream, rtol=1e-6, atol=0)
        scale = FORMATS[name].scale(stream)
        assert scale is not None or torch.equal(FORMATS[name].round(stream), stream)


def test_the_final_norm_is_rounded_alone(pair):
    model, _ = pair
    sites = [Record("resid_post"), Record("final_norm")]
    before, norm = eyechart.capture(model, IDS, sites)
    with lenses.precision(model, "e4m3", "final"):
        after, coarse = eyechart.capture(model, IDS, sites)
        logits = run(model)
    assert all(torch.equal(before[layer], after[layer]) for layer in before)
    assert torch.equal(coarse[None], FORMATS["float8_e4m3"].round(norm[None]))
    truth = coarse[None] @ model.W_U + model.b_U
    torch.testing.assert_close(logits, truth, atol=1e-5, rtol=1e-5)


def quantised(weight: Tensor, name: str) -> Tensor:
    """BitNet b1.58's formulas; the outputs are the rows."""
    if name == "ternary":
        scale = 1 / weight.abs().mean().clamp(min=1e-5)
        return (weight * scale).round().clamp(-1, 1) / scale
    high = 127 if name == "int8" else 7
    scale = high / weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-5)
    return (weight * scale).round().clamp(-high - 1, high) / scale


@contextmanager
def weights_rounded(plain: Any, name: str) -> Iterator[None]:
    """By hand, on transformers' own model."""
    kept = {key: value.clone() for key, value in plain.state_dict().items()}
    with torch.no_grad():
        if name in ("int8", "int4", "ternary"):
            for block in blocks_of(plain)[0]:
                for module in block.modules():
                    if isinstance(module, nn.Linear):
                        module.weight.copy_(quantised(module.weight, name))
                    elif type(module).__name__ == "Conv1D":
                        assert isinstance(module.weight, Tensor)
                        module.weight.copy_(quantised(module.weight.T, name).T)
        else:
            for weight in plain.parameters():
                cast = weight.to(torch.float8_e4m3fn if name == "float8_e4m3" else HALF)
                weight.copy_(cast.float())
    yield
    plain.load_state_dict(kept)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3", "int8", "int4", "ternary"])
def test_weights_are_what_rounding_them_by_hand_gives(pair, name):
    model, plain = pair
    whole = run(model)
    with weights_rounded(plain, name), torch.no_grad():
        truth = plain(IDS, output_attentions=True)
    with lenses.precision(model, name, "weights"):
        # As the bridge computes by itself, from queries, keys and values split apart, and fused,
        # from the joint matrix.
        torch.testing.assert_close(run(model), truth.logits, atol=1e-4, rtol=1e-4)
        for backend in ("pattern", "fused"):
            found = eyechart.attention_statistics(model, IDS, backend=backend)
            for layer, pattern in enumerate(truth.attentions):
                torch.testing.assert_close(
                    found.first[:, layer], pattern[..., 0], atol=1e-4, rtol=1e-4
                )
    assert float((truth.logits - whole).abs().max()) > 0.01


def test_every_matrix_takes_the_scale_of_the_whole_it_is_a_part_of(pair):
    model, _ = pair
    for weight, there in rounded(model, FORMATS["ternary"]):
        assert len(there.unique()) == 3 and there.shape == weight.shape
    block = model.blocks[0]
    if hasattr(block.attn, "qkv"):
        ternary = {id(weight): there for weight, there in rounded(model, FORMATS["ternary"])}
        parts = [ternary[id(getattr(block.attn, part).weight)] for part in "qkv"]
        assert len({float(part.max()) for part in parts}) == 1


def rows_of(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """A layer's attention in full, and what each query sees."""
    k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)
    scores = call.q @ k.transpose(-1, -2) * call.scale
    if call.softcap:
        scores = call.softcap * (scores / call.softcap).tanh()
    at = torch.arange(call.length)
    seen = (at <= at[:, None]).expand(len(call.q), -1, -1)
    if call.start is not None:
        seen = seen & (at >= call.start[..., None])
    weights = scores.exp().masked_fill(~seen[:, None], 0)
    rest = 0 if call.sinks is None else call.sinks.exp()[:, None, None]
    return weights / (weights.sum(dim=-1, keepdim=True) + rest), seen[:, None]


def rows_rounded(rows: Tensor, seen: Tensor, name: str) -> Tensor:
    if name == "ternary":
        mean = (rows * seen).sum(dim=-1, keepdim=True) / seen.sum(dim=-1, keepdim=True)
        return (rows / mean.clamp(min=1e-5)).round().clamp(max=1) * mean.clamp(min=1e-5)
    if name == "int8":
        largest = rows.amax(dim=-1, keepdim=True)
        return (rows * (127 / largest)).round() / (127 / largest)
    return rows.to(HALF).to(rows.dtype)


def made(**others: Any) -> AttentionCall:
    q = torch.randn(2, 4, LENGTH, 8).double()
    k, v = (torch.randn(2, 2, LENGTH, 8).double() for _ in "kv")
    start = (torch.arange(LENGTH) - 6).clamp(min=0).expand(2, -1)
    return AttentionCall(q, k, v, scale=0.5, start=start, **others)


@pytest.mark.parametrize("name", ["int8", "ternary"])
@pytest.mark.parametrize("special", [{}, {"softcap": 2.0}, {"sinks": torch.randn(4).double()}])
def test_kernels_round_their_rows(name, special):
    format = FORMATS[name]

    def round_rows(rows: Tensor, seen: Tensor) -> Tensor:
        return format.round(rows, format.scale(rows, seen))

    call = made(rounded=round_rows, **special)
    rows, seen = rows_of(call)
    truth = rows_rounded(rows, seen, name)
    output = torch.einsum("bhqk,bhkd->bqhd", truth, call.v.repeat_interleave(2, dim=1))
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    found = attend(
        call,
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        statistics=("first", "diagonal", "largest", "received"),
        accumulate=torch.float64,
    )
    assert call.output is not None
    torch.testing.assert_close(call.output, output)
    torch.testing.assert_close(found["first"], truth[..., 0])
    torch.testing.assert_close(found["diagonal"], truth.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(found["largest"], truth.amax(dim=-1))
    torch.testing.assert_close(found["received"], truth.sum(dim=-2))
    assert float((truth.sum(dim=-1) - 1).abs().max()) > 1e-3  # not made to sum to one again
    call.output = None
    torch.testing.assert_close(differentiable(call), output)
    vector = torch.randn(2, 1, LENGTH).double()
    lse = torch.zeros(2, 4, LENGTH)
    torch.testing.assert_close(
        carry(call, vector, lse, torch.float64), vector[:, None] @ truth, atol=1e-9, rtol=1e-9
    )


def test_compiled_kernels_give_way():
    call = made(rounded=lambda rows, seen: torch.zeros_like(rows))
    call.q, call.k, call.v = call.q.float(), call.k.float(), call.v.float()
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    found = attend(call, tokens, torch.ones_like(tokens, dtype=torch.bool), statistics=("largest",))
    assert float(found["largest"].max()) == 0
    assert call.output is not None and float(call.output.abs().max()) == 0
    assert float(differentiable(call).abs().max()) == 0


@pytest.mark.parametrize("name", ["bfloat16", "int8", "ternary"])
def test_attention_of_a_model_is_rounded(sharp, name):
    model, outputs = sharp, []

    def whole(call: AttentionCall) -> Tensor:
        rows, seen = rows_of(call)
        rows = rows_rounded(rows, seen, name)
        outputs.append(torch.einsum("bhqk,bhkd->bqhd", rows, call.v.repeat_interleave(2, dim=1)))
        attend(call, IDS, torch.ones_like(IDS, dtype=torch.bool))
        assert call.output is not None
        return call.output

    plain = run(model)
    with lenses.precision(model, name, "attention"):
        mixed, last = eyechart.capture(
            model, IDS, [Record("attention", whole), Record("next_token")]
        )
        logits, with_graph = run(model), model(IDS)
    for layer, by_hand in enumerate(outputs):
        torch.testing.assert_close(mixed[layer], by_hand, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last[None], logits[:, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_graph.detach(), logits, atol=1e-5, rtol=1e-5)
    assert with_graph.requires_grad and not torch.allclose(logits, plain, atol=1e-3)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("kind", ["tiny-random-llama", "tiny-random-gpt2"])
def test_a_recast_model_is_the_model_opened_so(kind, name):
    loaded = eyechart.load(kind, device="cpu", dtype=name)
    model = eyechart.load(kind, device="cpu")
    with lenses.precision(model, name, "model"):
        assert torch.equal(run(model), run(loaded)) and run(model).dtype == run(loaded).dtype
        assert facts_of(model).weights == facts_of(loaded).weights
        assert same(state(model), state(loaded)) and model.cfg.dtype == loaded.cfg.dtype
        ours, theirs = (eyechart.attention_statistics(m, IDS) for m in (model, loaded))
        assert ours.provenance.dtype == name and torch.equal(ours.first, theirs.first)
    assert model.cfg.dtype == torch.float32


@pytest.mark.parametrize("at", ["stream", "weights", "attention", "final"])
def test_a_finer_format_moves_the_output_less(sharp, at):
    whole = run(sharp).log_softmax(dim=-1)

    def moved(name: str) -> float:
        with lenses.precision(sharp, name, at):
            seen = run(sharp).log_softmax(dim=-1)
        return float((whole.exp() * (whole - seen)).sum(dim=-1).mean())

    for ladder in (("float16", "bfloat16", "float8_e4m3", "float8_e5m2"), ("int8", "int4")):
        costs = [moved(name) for name in ladder]
        assert costs == sorted(costs) and costs[0] < costs[-1] / 4
    assert moved("float32") < 1e-8


def test_shares_of_the_real_model_rise_with_n_and_with_coarser_formats(default_model):
    """A reading of representational collapse: arXiv 2406.04267, section 4."""
    prompt = "How many times does the digit 1 appear in the following sequence? Sequence: "
    sequence = repeated(default_model, "1", 302, prompt=prompt)
    (norm,) = eyechart.capture(default_model, sequence, [Record("final_norm")])
    last = norm[None][0, sequence.lengths[0] - 302 :]
    n = torch.tensor([1, 10, 100, 300])
    a, b = last[n - 1], last[n]
    formats = ("float16", "bfloat16", "float8_e4m3", "float8_e5m2")
    found = torch.stack([share_identical(a, b, name) for name in formats])
    assert bool((found.diff(dim=0) > 0)[:, 1:].all())  # coarser
    assert bool((found.diff(dim=1) > 0)[1:].all())  # longer
    expected = torch.stack([share_expected(a, b, name) for name in formats])
    error = (0.25 / a.shape[-1]) ** 0.5
    assert float((found - expected).abs().max()) < 5 * error


# Putting it back, together and within one another.


@pytest.mark.parametrize("at", PLACES)
def test_on_leaving_all_is_as_it_was(pair, at):
    model, _ = pair
    logits, before, own = run(model), state(model), facts_of(model).weights
    pointers = [weight.data_ptr() for weight in model.original_model.parameters()]
    with lenses.precision(model, "bf16", at):
        assert not torch.equal(run(model), logits)
        assert (facts_of(model).weights != own) == (at in ("weights", "model"))
    for fails in (False, True):
        if fails:
            with pytest.raises(KeyError, match="mine"), lenses.precision(model, "bf16", at):
                raise KeyError("mine")
        assert same(before, state(model)) and torch.equal(run(model), logits)
        assert [weight.data_ptr() for weight in model.original_model.parameters()] == pointers
        assert facts_of(model).weights == own and notes_of(model) == ()


def test_several_places_at_once_are_lenses_within_one_another(sharp):
    model, before = sharp, state(sharp)
    with lenses.precision(model, "e4m3", PLACES[1:]):
        together = run(model)
    with ExitStack() as stack:
        for at in PLACES[1:]:
            stack.enter_context(lenses.precision(model, "e4m3", at))
        assert torch.equal(run(model), together)
    with ExitStack() as stack:
        for at in reversed(PLACES[1:]):  # whichever is entered first
            stack.enter_context(lenses.precision(model, "e4m3", at))
        assert torch.equal(run(model), together)
        (last,) = eyechart.capture(model, IDS, [Record("next_token")])
        torch.testing.assert_close(last[None], together[:, -1], atol=1e-5, rtol=1e-5)
    assert same(before, state(model))


def test_finer_within_coarser_changes_nothing_and_coarser_within_finer_is_the_coarser(sharp):
    for at in ("weights", "attention", "stream"):
        with lenses.precision(sharp, "e5m2", at):
            coarse = run(sharp)
            with lenses.precision(sharp, "fp16", at):
                assert torch.equal(run(sharp), coarse)
        with lenses.precision(sharp, "fp16", at), lenses.precision(sharp, "e5m2", at):
            moved = float((run(sharp) - coarse).abs().max())
        assert moved < 0.3  # rounded twice: a tie of the coarse format may fall either way


def test_with_a_hidden_sink(sharp):
    model = sharp
    with lenses.evict(model, 3, 6):
        without = run(model)
        with lenses.precision(model, "ternary", "attention"):
            inner = run(model)
            found = eyechart.attention_statistics(model, IDS, backend="fused")
            assert float(found.first[..., 6:].max()) == 0
    with lenses.precision(model, "ternary", "attention"), lenses.evict(model, 3, 6):
        assert torch.equal(run(model), inner) and not torch.equal(inner, without)
    with lenses.evict(model, 3, 6), lenses.precision(model, "bf16", "weights"):
        (last,) = eyechart.capture(model, IDS, [Record("next_token")])
        torch.testing.assert_close(last[None], run(model)[:, -1], atol=1e-5, rtol=1e-5)


def test_weights_are_known_by_their_numbers_one_lens_after_another(sharp):
    own = facts_of(sharp).weights
    hashes = []
    for name in ("bf16", "fp16", "e4m3", "bf16"):  # memory that is freed is used again
        with lenses.precision(sharp, name, "weights"):
            hashes.append(facts_of(sharp).weights)
    assert hashes[0] == hashes[3] and len({own, *hashes}) == 4


def test_tied_parameters_stay_tied(default_model):
    original = default_model.original_model
    own = original.get_input_embeddings().weight.detach().clone()
    assert original.get_input_embeddings().weight is original.get_output_embeddings().weight
    with lenses.precision(default_model, "e4m3", "weights"):
        table = original.get_input_embeddings().weight
        assert table is original.get_output_embeddings().weight
        assert torch.equal(table, own.to(torch.float8_e4m3fn).float())
    assert torch.equal(table, own)


def test_hooks_are_left_alone(sharp):
    seen = []
    hook = ("blocks.1.hook_resid_pre", lambda stream, hook: seen.append(stream.clone()))
    with lenses.precision(sharp, "int4"):
        truth = run(sharp)
        sharp.reset_hooks()
        with sharp.hooks(fwd_hooks=[hook]):
            assert torch.equal(run(sharp), truth)
    assert len(seen) == 1 and torch.equal(
        FORMATS["int4"].codes(seen[0]).abs().amax(-1), torch.full((2, LENGTH), 7.0)
    )


# What is said and what is refused.


def test_a_result_says_through_what_it_was_seen(sharp):
    with lenses.precision(sharp, "bf16", ("stream", "final")), lenses.evict(sharp, 3, 6):
        notes = eyechart.residual_norms(sharp, IDS).provenance.notes
    assert notes == (
        "seen through precision: bfloat16 at stream, final "
        "(emulated: rounded, computed in float32)",
        "seen through evict: 3 keys hidden from query 6 on",
    )
    with lenses.precision(sharp, "float64", "model"):
        notes = eyechart.residual_norms(sharp, IDS).provenance.notes
    assert notes == ("seen through precision: float64 at model",)
    assert eyechart.residual_norms(sharp, IDS).provenance.notes == ()


def test_what_is_no_format_or_place(sharp):
    before = state(sharp)
    for arguments, said in {
        ("float4",): "unknown number format 'float4'",
        ("bf16", "logits"): r"at must be one or several of model, .*, got 'logits'",
        ("bf16", ()): "at must be one or several of",
        ("int8", ("stream", "model")): r"no model is run in int8 itself; at='model' takes float64",
        ("e4m3", "model"): "no model is run in float8_e4m3 itself",
    }.items():
        with pytest.raises(UsageError, match=said), lenses.precision(sharp, *arguments):
            pytest.fail("the body must not run")
    assert same(before, state(sharp)) and notes_of(sharp) == ()


@pytest.mark.parametrize(
    ("family", "name", "at", "said"),
    [
        ("bloom", "int8", "attention", "its attention is code of its own"),
        ("gpt_oss", "int8", "weights", "block 0 .* keeps its experts in one tensor"),
        ("openai-gpt", "bf16", "stream", "cannot be rounded: .* hooks did not fire exactly once"),
        ("openai-gpt", "bf16", "final", "cannot be rounded: .* no site 'final_norm'"),
        ("nanochat", "bf16", "final", r"cannot be rounded: .* \(final_norm 2 times\)"),
    ],
)
def test_models_that_keep_it_elsewhere(family, name, at, said):
    with built(family) as folder:
        model = eyechart.load(str(folder), device="cpu")
    logits = run(model)
    with (
        pytest.raises(UnsupportedModelError, match=said),
        lenses.precision(model, name, ("weights", at) if at != "weights" else at),
    ):
        pytest.fail("the body must not run")
    assert torch.equal(run(model), logits)
