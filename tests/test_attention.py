"""Statistics of attention against known answers, definitions and the real model."""

import math

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import eyechart
from eyechart.attention.probe import reduce_pattern
from eyechart.errors import UsageError
from eyechart.kernels import seers
from eyechart.models import CATALOGUE
from eyechart.results import STATISTICS
from eyechart.sequences import BUILT_IN_PROMPT

IDS = torch.arange(4, 16)[
    None
]  # twelve tokens; what they are does not matter to the handmade model


def test_handmade_heads_are_read_exactly(handmade):
    found = eyechart.attention_statistics(handmade, IDS)
    queries = torch.arange(12.0)
    ones, zeros = torch.ones(12), torch.zeros(12)

    diagonal = {name: getattr(found, name)[0, 0, 0] for name in STATISTICS}
    assert torch.equal(diagonal["diagonal"], ones)
    assert torch.equal(diagonal["first"], (queries == 0).float())
    torch.testing.assert_close(diagonal["entropy"], zeros, atol=1e-6, rtol=0)
    assert torch.equal(diagonal["distance"], zeros)

    previous = {name: getattr(found, name)[0, 0, 1] for name in STATISTICS}
    assert torch.equal(previous["previous"][1:], ones[1:])
    assert float(previous["previous"][0]) == 0  # nothing comes before the first
    assert torch.equal(previous["diagonal"][1:], zeros[1:])
    assert torch.equal(previous["distance"][1:], ones[1:])

    sink = {name: getattr(found, name)[0, 1, 0] for name in STATISTICS}
    assert torch.equal(sink["first"], ones)
    assert torch.equal(sink["distance"], queries)
    assert torch.equal(found.received[0, 1, 0], (queries == 0).float())

    uniform = {name: getattr(found, name)[0, 1, 1] for name in STATISTICS}
    share = 1 / (queries + 1)
    for name in ("first", "diagonal", "largest"):
        torch.testing.assert_close(uniform[name], share, atol=1e-6, rtol=0)
    torch.testing.assert_close(uniform["entropy"], (queries + 1).log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(uniform["distance"], queries / 2, atol=1e-5, rtol=0)
    harmonic = share.flip(0).cumsum(0).flip(0) / (12 - queries)
    torch.testing.assert_close(found.received[0, 1, 1], harmonic, atol=1e-6, rtol=0)

    # The leaders are found where they were put, and the sink rate counts one head of four.
    assert found.strongest("diagonal", 1)[0][:2] == (0, 0)
    assert found.strongest("previous", 1)[0][:2] == (0, 1)
    assert found.strongest("first", 1)[0][:2] == (1, 0)
    assert found.strongest("entropy", 1)[0][:2] == (1, 1)
    assert found.sink_rate(eps=0.3) == 0.25


def naive(pattern: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """The statistics as their definitions read, one number at a time."""
    batch, heads, length, _ = pattern.shape
    out = {name: torch.full((batch, heads, length), math.nan).double() for name in STATISTICS}
    received = torch.full((batch, heads, length), math.nan).double()
    for b in range(batch):
        for h in range(heads):
            for i in range(lengths[b]):
                row = pattern[b, h, i, : i + 1].tolist()
                out["first"][b, h, i] = row[0]
                out["diagonal"][b, h, i] = row[i]
                out["previous"][b, h, i] = row[i - 1] if i else 0.0
                out["entropy"][b, h, i] = -sum(a * math.log(a) for a in row if a > 0)
                out["largest"][b, h, i] = max(row)
                out["distance"][b, h, i] = sum(a * (i - j) for j, a in enumerate(row))
            for j in range(lengths[b]):
                column = [float(pattern[b, h, i, j]) for i in range(j, lengths[b])]
                received[b, h, j] = sum(column) / len(column)
    return out | {"received": received}


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 9), cut=st.integers(1, 9), seed=st.integers(0, 2**20))
def test_statistics_equal_their_definitions(length, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 4 * torch.randn(2, 3, length, length, generator=generator, dtype=torch.float64)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    lengths = [length, min(cut, length)]
    mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    found = reduce_pattern(pattern, torch.zeros_like(mask, dtype=torch.long), mask)
    found["received"] = found["received"] / seers(mask)[:, None]
    for name, value in naive(pattern, lengths).items():
        real = mask[:, None].expand_as(value)
        torch.testing.assert_close(found[name][real], value[real], atol=1e-12, rtol=0)


def test_averages_leave_out_the_trivial_first_query(handmade):
    found = eyechart.attention_statistics(handmade, IDS)
    # The previous-token head looks at itself at query 0 only; that must not count as diagonal.
    assert float(found.by_head("diagonal")[0, 1]) == 0
    assert float(found.by_head("previous")[0, 1]) == 1
    # The published sink metric includes it.
    assert float(found.by_head("first")[0, 1]) == pytest.approx(2 / 12)


def test_sink_rate_at_a_length_equals_a_run_of_that_length(llama):
    ids = torch.randint(3, 250, (2, 40))
    long, short = (eyechart.attention_statistics(llama, ids[:, :n]) for n in (40, 16))
    for eps in (0.05, 0.1, 0.2, 0.3):
        assert long.sink_rate(eps, length=16) == pytest.approx(short.sink_rate(eps))
    with pytest.raises(UsageError, match="shortest sequence has 40"):
        long.sink_rate(length=41)
    with pytest.raises(UsageError, match="between 0 and 1"):
        long.sink_rate(eps=1.5)


@pytest.mark.parametrize("name", TINY)
def test_padded_batch_equals_its_rows_alone(name):
    model = eyechart.load(name, device="cpu")
    texts = ["The quick brown fox jumps over the dog.", "Short.", "A middle-sized line."]
    together = eyechart.attention_statistics(model, texts)
    for row, text in enumerate(texts):
        alone = eyechart.attention_statistics(model, text)
        n = alone.first.shape[-1]
        for name in (*STATISTICS, "received"):
            ours, theirs = getattr(together, name)[row], getattr(alone, name)[0]
            # NaN in both where a hybrid has no attention.
            torch.testing.assert_close(ours[..., :n], theirs, atol=2e-6, rtol=1e-5, equal_nan=True)
            assert ours[..., n:].isnan().all()


def test_learned_sink_is_its_own_statistic():
    model = eyechart.load("tiny-random-gpt-oss", device="cpu")
    sinks = model.blocks[0].attn.original_component.sinks
    with torch.no_grad():
        sinks.copy_(torch.tensor([0.0, 1.0, 2.0, -30.0]))
    found = eyechart.attention_statistics(model, torch.randint(3, 250, (1, 10)))
    assert found.virtual_sink is not None
    # At the first query one key stands against the sink: softmax of the two.
    values = found.virtual_sink[0, 0, :, 0]
    torch.testing.assert_close(values + found.first[0, 0, :, 0], torch.ones(4))
    assert (values[:3].diff() > 0).all() and float(values[3]) < 1e-6


def test_hybrid_says_which_layers_have_no_attention():
    model = eyechart.load("tiny-random-lfm2", device="cpu")
    found = eyechart.attention_statistics(model, torch.randint(3, 250, (1, 10)))
    assert found.backend == ("none", "pattern")
    assert found.first[:, 0].isnan().all() and not found.first[:, 1].isnan().any()
    assert {layer for layer, _, _ in found.strongest("first", 8)} == {1}
    assert 0 <= found.sink_rate(0.1) <= 1


@pytest.mark.parametrize("name", TINY)
def test_every_catalogued_architecture_is_read_as_transformers_computes_it(name):
    model = eyechart.load(name, device="cpu")
    ids = torch.randint(3, 250, (2, 11))
    found = eyechart.attention_statistics(model, ids)
    plain = AutoModelForCausalLM.from_pretrained(
        CATALOGUE[name].folder(), attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        truth = plain(ids, output_attentions=True).attentions
    layers = [l for l, how in enumerate(found.backend) if how == "pattern"]
    truth = [pattern for pattern in truth if pattern is not None]
    assert len(truth) == len(layers)
    for layer, pattern in zip(layers, truth, strict=True):
        torch.testing.assert_close(found.first[:, layer], pattern[..., 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            found.diagonal[:, layer], pattern.diagonal(dim1=-2, dim2=-1), atol=1e-5, rtol=0
        )


def test_default_model_has_the_heads_it_is_known_for(default_model):
    found = eyechart.attention_statistics(default_model, BUILT_IN_PROMPT)
    ((layer, head, mass),) = found.strongest("diagonal", 1)
    assert (layer, head) == (11, 6) and 0.6 < mass < 0.85
    ((layer, _, mass),) = found.strongest("first", 1)
    assert layer == 18 and mass > 0.99
    ((_, _, mass),) = found.strongest("previous", 1)
    assert 0.65 < mass < 0.95
    assert 0.4 < found.sink_rate(length=64) < 0.8


def test_float64_accumulation_and_bad_arguments(llama):
    wide = eyechart.attention_statistics(llama, "hello", accumulate="float64")
    assert wide.entropy.dtype == torch.float64
    with pytest.raises(UsageError, match="unknown backend 'flash'"):
        eyechart.attention_statistics(llama, "hello", backend="flash")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="float16"):
        eyechart.attention_statistics(llama, "hello", accumulate="float16")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown statistic 'sink'"):
        wide.by_head("sink")
