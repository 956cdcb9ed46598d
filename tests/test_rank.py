"""Rank collapse: measures with answers known by hand, and variants against an explicit forward."""

import dataclasses
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import FAMILIES, built
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import eyechart
from eyechart.collapse.rank import VARIANTS, measures, rank_collapse
from eyechart.errors import NonFiniteError, UsageError
from eyechart.models.convert import build_tiny
from eyechart.probes import Record
from eyechart.results.rank import MEASURES, RankCollapse

SHORT = ["The tide went out, and the boats lay in the mud.", "A short line."]


def named(states):
    return dict(zip(MEASURES, measures(states).tolist(), strict=True))


# Measures of a matrix


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_tokens_that_are_all_alike(kind):
    # Awkward numbers, so that the mean is not exactly the row.
    found = named(torch.randn(1, 16).to(kind).expand(7, 16) * math.pi)
    assert found["residual"] == pytest.approx(0, abs=1e-12)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-9)
    assert found["matrix_entropy"] == pytest.approx(0, abs=1e-9)
    assert found["mean_cosine"] == pytest.approx(1)
    # Nothing is left once the mean is gone, and rounding is no direction.
    assert math.isnan(found["matrix_entropy_normalised"])


def test_one_direction_in_many_lengths_is_rank_one_but_no_collapse():
    found = named(torch.tensor([1.0, 2.0, 5.0])[:, None] * torch.randn(16).double())
    assert found["effective_rank"] == pytest.approx(1, abs=1e-9)
    assert found["mean_cosine"] == pytest.approx(1)
    assert found["residual"] > 0.3


@pytest.mark.parametrize("tokens", [2, 5, 12])
def test_orthonormal_tokens(tokens):
    found = named(torch.eye(tokens, 12).double())
    assert found["effective_rank"] == pytest.approx(tokens)
    assert found["matrix_entropy"] == pytest.approx(math.log(tokens))
    assert found["mean_cosine"] == pytest.approx(0, abs=1e-12)
    # A row and a column less the mean: 1 - 1/N and N - 1 times 1/N.
    assert found["residual"] == pytest.approx(2 * (tokens - 1) / tokens)
    # A regular simplex: N - 1 equal directions.
    flat = math.log(tokens - 1) / math.log(tokens)
    assert found["matrix_entropy_normalised"] == pytest.approx(flat, abs=1e-9)


def test_two_tokens_by_hand():
    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    found = named(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    assert found["effective_rank"] == pytest.approx(math.exp(entropy(3 / 4)))
    assert found["matrix_entropy"] == pytest.approx(entropy(9 / 10))
    # Less the mean (1.5, 0.5): columns sum to 3 and 1, rows to 2; before, to 3 and 3.
    assert found["residual"] == pytest.approx(math.sqrt(3 * 2) / 3)
    assert found["matrix_entropy_normalised"] == pytest.approx(0, abs=1e-9)
    leaning = named(torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0]]))
    assert leaning["mean_cosine"] == pytest.approx(math.sqrt(0.5))  # zero has no direction


def test_what_is_not_defined_is_nan():
    assert measures(torch.zeros(3, 4)).isnan().all()
    assert measures(torch.zeros(0, 4)).isnan().all()
    single = named(torch.tensor([[3.0, 4.0]]))
    assert (single["residual"], single["effective_rank"]) == (0, pytest.approx(1))
    assert math.isnan(single["mean_cosine"]) and math.isnan(single["matrix_entropy_normalised"])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**20),
    st.integers(2, 20),
    st.integers(2, 20),
    st.floats(-8, 8),
    st.floats(0, 3),
)
def test_invariances_and_bounds(seed, tokens, width, logarithm, shift):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=draw).double() + shift
    found = measures(x)
    turn = torch.linalg.qr(torch.randn(width, width, generator=draw).double()).Q
    order = torch.randperm(tokens, generator=draw)
    for same in (x * 10**logarithm, -x, x[order]):
        torch.testing.assert_close(measures(same), found, rtol=1e-8, atol=1e-9, equal_nan=True)
    # The composite norm is one of coordinates; all else is of lengths and angles.
    turned = measures(x @ turn)[1:]
    torch.testing.assert_close(turned, found[1:], rtol=1e-8, atol=1e-9, equal_nan=True)
    residual, rank, entropy, normalised, cosine = found.tolist()
    assert 0 <= residual < 2
    assert 1 <= rank <= min(tokens, width) + 1e-9
    # Squares are further from even than what is squared.
    assert -1e-12 <= entropy <= math.log(rank) + 1e-9
    assert -1e-12 <= normalised <= 1
    assert -1 / (tokens - 1) - 1e-9 <= cosine <= 1 + 1e-9


def test_uniform_causal_attention_collapses_at_the_rate_of_its_second_eigenvalue():
    # Its eigenvalues are 1, 1/2, 1/3, ...: what is not alike halves with every layer.
    tokens = 12
    uniform = torch.ones(tokens, tokens).tril().double()
    uniform /= uniform.sum(dim=1, keepdim=True)
    x, residuals = torch.randn(tokens, 6).double() + 2, []
    for _ in range(40):
        residuals.append(named(x)["residual"])
        x = uniform @ x
    late = torch.tensor(residuals[30:])
    torch.testing.assert_close(late[1:] / late[:-1], torch.full((9,), 0.5), rtol=1e-3, atol=0)
    assert named(x)["effective_rank"] == pytest.approx(1, abs=1e-6)


# The pass


def test_the_full_model_is_measured_as_its_stream_is_and_padding_is_not(llama):
    found = rank_collapse(llama, SHORT, variants=())
    pre, post, final = eyechart.capture(
        llama, SHORT, [Record("resid_pre"), Record("resid_post"), Record("final_norm")]
    )
    stream = [pre[0], *post.values(), final[None]]
    assert found.layer_labels == ("embedding", "block 0", "block 1", "final norm")
    assert found.variants == ("full",) and found.provenance.forward_passes == 1
    assert len(set(found.sequences.lengths)) == 2
    for text, length in enumerate(found.sequences.lengths):
        for layer, states in enumerate(stream):
            for begin, suffix in ((0, ""), (1, "_without_first")):
                truth = named(states[text, begin:length])
                for name in MEASURES:
                    value = float(getattr(found, name + suffix)[0, text, layer])
                    assert value == pytest.approx(truth[name], rel=1e-9), (name, layer)


def test_texts_do_not_depend_on_their_company(llama):
    together = rank_collapse(llama, SHORT)
    for batch in (rank_collapse(llama, SHORT, batch_size=1), rank_collapse(llama, SHORT[1])):
        row = len(batch.sequences.lengths) - 1
        for name in MEASURES:
            alone = getattr(batch, name)[:, row]
            torch.testing.assert_close(alone, getattr(together, name)[:, 1], rtol=1e-4, atol=1e-5)


def before(norm, attention="self_attn", mlp_norm="post_attention_layernorm"):
    """Blocks that read through a norm: attention first, then the MLP."""
    return (
        lambda b, x, named: getattr(b, attention)(getattr(b, norm)(x), **named)[0],
        lambda b, x: b.mlp(getattr(b, mlp_norm)(x)),
    )


def scaled(attend, feed):
    """Blocks that multiply what they write."""
    return (
        lambda b, x, named: attend(b, x, named) * b.residual_multiplier,
        lambda b, x: feed(b, x) * b.residual_multiplier,
    )


BLOCKS = {
    "llama": before("input_layernorm"),
    "gpt2": before("ln_1", "attn", "ln_2"),
    "phi": before("input_layernorm", mlp_norm="input_layernorm"),
    "granite": scaled(*before("input_layernorm")),
    "olmo2": (
        lambda b, x, named: b.post_attention_layernorm(b.self_attn(x, **named)[0]),
        lambda b, x: b.post_feedforward_layernorm(b.mlp(x)),
    ),
}
PARALLEL = {"phi"}


@contextmanager
def folder_of(family, tmp_path):
    """Random weights large enough that heads have preferences."""
    if family == "granite":
        build_tiny(family, {**FAMILIES[family], "residual_multiplier": 0.22}, tmp_path)
        yield tmp_path
    else:
        with built(family, gain=4) as folder:
            yield folder


def explicit(plain, family, variant, tokens):
    """The stream of transformers' own model whose blocks are written out anew."""
    attend, feed = BLOCKS[family]
    skip, mlp = VARIANTS[variant].skip, VARIANTS[variant].mlp
    stream = []

    def rewritten(block):
        def forward(x, *positional, **named):
            if positional:  # GPT-2 hands over cache, mask and encoder by position
                named["attention_mask"] = positional[1]
            if not stream:
                stream.append(x)
            wrote = attend(block, x, named)
            middle = x + wrote if skip else wrote
            if not mlp:
                after = middle
            elif family in PARALLEL:
                after = middle + feed(block, x)
            else:
                after = feed(block, middle) + (middle if skip else 0)
            stream.append(after)
            return after

        return forward

    body = plain.base_model
    for block in body.h if family == "gpt2" else body.layers:
        block.forward = rewritten(block)
    with torch.no_grad():
        stream.append(body(tokens, use_cache=False).last_hidden_state)
    return torch.cat(stream)


@pytest.mark.parametrize("family", list(BLOCKS))
def test_variants_are_those_of_a_forward_pass_written_out(family, tmp_path):
    with folder_of(family, tmp_path) as folder:
        model = eyechart.load(str(folder), device="cpu", dtype="float64")
        found = rank_collapse(model, SHORT[0])
        assert found.variants == tuple(VARIANTS) and not found.unavailable
        assert found.provenance.forward_passes == 4
        plain = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float64
        ).eval()
    seen = []
    for variant in VARIANTS:
        stream = explicit(plain, family, variant, found.sequences.tokens)
        truth = torch.stack([measures(states) for states in stream])
        ours = torch.stack([found.of(name, variant)[0] for name in MEASURES], dim=1)
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
        seen.append(ours[2, 0])
    assert len({f"{float(x):.6f}" for x in seen}) == 4  # each variant is another


# What cannot be had


def test_writes_that_do_not_add_up_leave_only_the_full_model(llama):
    with llama.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: 1.01 * x)]):
        found = rank_collapse(llama, SHORT)
    assert found.variants == ("full",) and found.provenance.forward_passes == 1
    assert set(found.unavailable) == set(VARIANTS) - {"full"}
    assert "layer 1: what attention and MLP write is not" in found.unavailable["no skip"]
    assert "no 'no MLP', no 'no skip', no 'attention only': layer 1" in repr(found)
    with pytest.raises(UsageError, match="no variant 'no skip' here: layer 1"):
        found.of("residual", "no skip")


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("blocks.1.hook_resid_pre", "layer 1: the block before handed on something else"),
        ("blocks.0.hook_resid_mid", "layer 0: what attention writes is not"),
    ],
)
def test_a_stream_changed_on_the_way_is_noticed(llama, hook, said):
    with llama.hooks(fwd_hooks=[(hook, lambda x, hook: x + 0.01 * x.flip(-1))]):
        found = rank_collapse(llama, SHORT)
    assert said in found.unavailable["attention only"]


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("bamba", "blocks 0 have no attention"),
        ("falcon_h1", "layer 0: what attention writes is not what the stream gains"),
    ],
)
def test_blocks_that_write_by_other_means_have_no_variants(family, said):
    with built(family) as folder:
        found = rank_collapse(eyechart.load(str(folder), device="cpu"), SHORT[0])
    assert found.variants == ("full",) and said in found.unavailable["attention only"]
    assert not found.residual.isnan().any()


def test_a_stream_that_vanishes_is_nan(llama):
    silent = [(f"blocks.{layer}.hook_attn_out", lambda x, hook: 0 * x) for layer in range(2)]
    with llama.hooks(fwd_hooks=silent):
        found = rank_collapse(llama, SHORT)
    for name in MEASURES:
        gone = found.of(name, "attention only")[:, found.blocks]
        assert not gone[:, 0].isnan().any() and gone[:, 1:].isnan().all()
    # Attention that writes nothing leaves the stream to the skip.
    assert torch.equal(found.of("residual", "no MLP")[:, 2], found.of("residual")[:, 0])
    assert "attention only nan" in repr(found) and found.plot() and len(found.to_frame())


def test_a_variant_that_overflows_is_left_out(llama):
    passes = []

    def overflow(x, hook):
        passes.append(hook)
        return x if len(passes) == 1 else x * torch.inf

    with llama.hooks(fwd_hooks=[("blocks.0.hook_attn_out", overflow)]):
        found = rank_collapse(llama, SHORT, variants=("no MLP",))
    assert found.variants == ("full",) and "NaN or infinity" in found.unavailable["no MLP"]
    passes.append(None)
    with (
        llama.hooks(fwd_hooks=[("blocks.0.hook_attn_out", overflow)]),
        pytest.raises(NonFiniteError),
    ):
        rank_collapse(llama, SHORT)


def test_wrong_arguments_are_refused_before_a_pass(llama):
    with pytest.raises(UsageError, match="unknown variant 'SAN'; there are full, no MLP"):
        rank_collapse(llama, SHORT, variants=("SAN",))
    found = rank_collapse(llama, SHORT, variants=("no skip",))
    assert found.variants == ("full", "no skip") and found.provenance.forward_passes == 2
    with pytest.raises(UsageError, match="unknown measure 'rank'"):
        found.of("rank")
    with pytest.raises(UsageError, match="measured were full, no skip"):
        found.of("residual", "no MLP")


# The result


def with_curves(found: RankCollapse, **curves: list[float]) -> RankCollapse:
    """The same result with other numbers: one text, the full model, no final norm."""
    (depth,) = {len(curve) for curve in curves.values()}
    blank = torch.full((1, 1, depth), torch.nan, dtype=torch.float64)
    both = {f"{name}{suffix}": blank for name in MEASURES for suffix in ("", "_without_first")}
    labels = ("embedding", *(f"block {layer}" for layer in range(depth - 1)))
    numbers = {name: torch.tensor(c)[None, None].double() for name, c in curves.items()}
    return dataclasses.replace(found, layer_labels=labels, **both | numbers)


def test_onset_and_dips_of_known_curves(llama):
    found = rank_collapse(llama, SHORT[1], variants=())
    made = with_curves(
        found,
        residual=[1.0, 0.05, 0.3, 0.09, 0.01],
        effective_rank=[8.0, 10.0, 2.0, 4.0, 5.0],
        effective_rank_without_first=[1.0, 2.0, 3.0, 4.0, 5.0],
    )
    assert made.onset("full") == 3 and made.onset("full", below=0.5) == 1
    assert made.onset("full", below=0.001) is None and made.onset("full", below=2) == 0
    dips = made.dips()[0].tolist()
    assert dips == pytest.approx([0, 0, 1 - 2 / 5, 1 - 4 / 5, 0])
    assert made.dips(without_first=True)[0].tolist() == [0] * 5
    said = repr(made)
    assert "dips most at block 1: 2, 60% below both sides; without the first token 3, 0%" in said
    assert "full: from block 2 on" in said


def test_a_result_survives_saving_and_tells_the_same_as_a_table_and_a_figure(llama, tmp_path: Path):
    found = rank_collapse(llama, SHORT)
    assert eyechart.open_result(found.save(tmp_path / "rank")) == found
    frame = found.to_frame()
    row = frame[
        (frame.variant == "no skip")
        & (frame.text == 1)
        & (frame.layer == "block 1")
        & (frame.tokens == "without the first")
    ]
    (value,) = row["mean_cosine"]
    assert value == float(found.mean_cosine_without_first[2, 1, 2])
    assert len(frame) == 4 * 2 * 4 * 2
    drawn = {trace["name"]: trace for trace in found.plot().to_dict()["data"]}
    assert set(drawn) == {*VARIANTS, "all tokens", "without the first"}
    mean = found.of("residual", "attention only").mean(dim=0)
    assert drawn["attention only"]["y"] == pytest.approx(mean.tolist(), rel=1e-3)


def test_default_model_attention_alone_collapses_and_the_model_does_not(default_model):
    found = rank_collapse(default_model)
    assert found.sequences.name == "built-in prompt" and found.variants == tuple(VARIANTS)
    alone, full = (found.of("residual", v)[0, found.blocks] for v in ("attention only", "full"))
    assert float(alone[10:].max()) < 0.05 and float(alone[-1]) < 1e-5
    assert float(full.min()) > 0.3
    # MLPs slow collapse, but only the skip stops it.
    early, late, never = (found.onset(v) for v in ("attention only", "no skip", "full"))
    assert early is not None and late is not None and early < late and never is None
    dips, rest = found.dips()[0], found.dips(without_first=True)[0]
    bottom = int(dips.argmax())
    assert 10 < bottom < 15 and float(dips[bottom]) > 0.8 and float(rest[bottom]) < 0.1
