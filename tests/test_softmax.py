"""Softmax disperses: on random numbers as published, and in real heads within its bounds."""

import math
from typing import Any

import pytest
import torch
from families import built
from handmade import write_handmade
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize, scaled_dot_product_attention

import eyechart
from eyechart.collapse.heads import dispersion, row_extremes
from eyechart.collapse.softmax import (
    POSITIONS,
    alternating_total_variation,
    one_layer_collapse,
    total_variation_decay,
)
from eyechart.errors import ResultError, UsageError
from eyechart.kernels import Replacement
from eyechart.probes import Record
from eyechart.probes.seam import edited
from eyechart.results.dispersion import RowExtremes
from eyechart.results.softmax import SyntheticCurve
from eyechart.texts import TEXTS

# Read off the figures of Barbero et al., arXiv 2406.04267.
FIGURE_9 = {
    500: 0.0265,
    750: 0.020,
    1000: 0.017,
    1500: 0.012,
    2000: 0.0093,
    2500: 0.0077,
    3000: 0.0067,
    4000: 0.005,
    5000: 0.004,
    10_000: 0.002,
}
FIGURE_10 = {5: 0.95, 10: 0.55, 100: 0.065, 500: 0.013, 1000: 0.007, 5000: 0.0014}


def near(curve, published):
    return dict(zip(curve.lengths, curve.mean.tolist(), strict=True)) == pytest.approx(
        published, rel=0.1
    )


def test_total_variation_falls_as_published():
    assert near(total_variation_decay(), FIGURE_9)
    curve = total_variation_decay(seeds=40)
    assert near(curve, FIGURE_9) and curve.predicted is not None
    torch.testing.assert_close(curve.mean, curve.predicted, rtol=0.02, atol=0)
    # bfloat16 has spacing 2^-7 just above one.
    below = dict(zip(curve.lengths, (curve.mean < 2**-7).tolist(), strict=True))
    assert below[2500] and not below[2000]


def test_the_predicted_total_variation_is_the_limit():
    # The changes on an even grid, and scores that are all alike: no chance is left.
    for share, amount in ((0.01, 0.1), (0.5, 0.1), (1.0, 0.1), (0.3, 3.0)):
        n = 200_000
        changed = round(share * n)
        x = torch.zeros(n, dtype=torch.double)
        x[:changed] = amount * (torch.arange(changed) + 0.5) / changed
        truth = float((x.softmax(0) - 1 / n).abs().sum())
        found = total_variation_decay((n,), changed, amount, seeds=1).predicted
        assert found is not None and float(found) == pytest.approx(truth, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 60), data=st.data(), amount=st.floats(1e-3, 20), seed=st.integers(0, 99))
def test_total_variation_is_bounded_by_the_change(n, data, amount, seed):
    changed = data.draw(st.integers(1, n))
    curve = total_variation_decay((n,), changed, amount, seeds=3, seed=seed)
    # Each weight changes by a factor between e^-amount and e^amount.
    assert bool((curve.values <= min(2, math.expm1(amount))).all())


def test_small_shares_follow_the_leading_term():
    for amount in (0.1, 1.0):
        curve = total_variation_decay((200_000,), 200, amount, seeds=1)
        mu = math.expm1(amount) / amount - 1
        assert curve.predicted is not None
        assert float(curve.predicted) == pytest.approx(2 * 1e-3 * (1 - 1e-3) * mu, rel=2e-3)


def test_alternating_scores_stay_apart():
    e = math.e
    curve = alternating_total_variation((1, 2, 3, 10, 10_000, 10_001))
    limit = 2 * (e - 1) / (e + 1)
    assert limit == pytest.approx(0.92423, abs=5e-6)
    value = dict(zip(curve.lengths, curve.values[0].tolist(), strict=True))
    for n in (2, 10, 10_000):
        assert value[n] == pytest.approx(limit, rel=1e-12)
    by_hand = 2 * abs(e / (2 * e + 1) - 1 / (2 + e)) + abs(1 / (2 * e + 1) - e / (2 + e))
    assert value[1] == 0 and value[3] == pytest.approx(by_hand, rel=1e-12)
    assert value[10_001] == pytest.approx(limit, rel=1e-4)
    far = alternating_total_variation((2,), high=-3.0, low=7.0)
    assert far.predicted is not None and float(far.predicted) == pytest.approx(float(far.values))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("normalised", [True, False])
def test_one_layer_is_what_whole_causal_attention_gives(positions, normalised):
    n, width, slope, scale = 9, 6, 0.25, 0.8
    curve = one_layer_collapse(
        (n,), positions, width=width, normalised=normalised, scale=scale, slope=slope, seeds=1
    )
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, n, width, generator=draw, dtype=torch.double)
    if not normalised:
        q, k, v = (x / math.sqrt(width) for x in (q, k, v))
    outputs = []
    for count in (n, n + 1):
        q, k, v = (torch.cat([x, x[-1:]])[:count] for x in (q, k, v))
        at = torch.arange(count, dtype=torch.double)
        turn = torch.outer(at, 10_000 ** (-torch.arange(0, width, 2).double() / width))
        bias = torch.zeros(count, count, dtype=torch.double)
        queries, keys, values = q, k, v
        if positions == "sinusoidal":
            wave = torch.cat([turn.sin(), turn.cos()], dim=1)
            queries, keys = q + wave, k + wave
        if normalised:
            queries, keys, values = (normalize(x, dim=1) for x in (queries, keys, v))
        if positions == "rotary":
            queries, keys = (
                torch.view_as_real(
                    torch.complex(*x.chunk(2, dim=1)) * torch.polar(torch.ones_like(turn), turn)
                ).flatten(1)
                for x in (queries, keys)
            )
        if positions == "alibi":
            bias = scale * slope * (at[None] - at[:, None])
        mask = bias.masked_fill(at[None] > at[:, None], -torch.inf)
        outputs.append(
            scaled_dot_product_attention(
                queries[None], keys[None], values[None], attn_mask=mask[None], scale=scale
            )[0, -1]
        )
    assert float(curve.values) == pytest.approx(float((outputs[1] - outputs[0]).abs().sum()))


def test_uniform_attention_is_the_prediction():
    for positions in POSITIONS:
        curve = one_layer_collapse((1, 7, 300), positions, scale=0.0, seeds=2)
        assert curve.predicted is not None
        torch.testing.assert_close(curve.mean, curve.predicted, rtol=1e-9, atol=1e-15)
    # A head that sees itself only is told nothing by the copy.
    steep = one_layer_collapse((1, 7, 300), "alibi", slope=1e6, seeds=2)
    assert float(steep.values.max()) < 1e-12


def test_one_layer_collapses_as_published():
    none = one_layer_collapse(seeds=64)
    assert near(none, FIGURE_10) and none.predicted is not None
    torch.testing.assert_close(none.mean, none.predicted, rtol=0.01, atol=0)
    some = tuple(n for n in FIGURE_10 if n <= 1000)
    published = {n: FIGURE_10[n] for n in some}
    assert near(one_layer_collapse(some, "rotary", seeds=64), published)
    assert near(one_layer_collapse(some, "sinusoidal", seeds=64), published)
    last = {p: float(one_layer_collapse((5000,), p, seeds=8).mean) for p in POSITIONS}
    assert last["alibi"] == pytest.approx(0.0037, rel=0.1)
    # The order is the figure's, for rotary positions the size is not.
    assert last["none"] < last["rotary"] < last["alibi"]
    sharper = one_layer_collapse((5000,), "rotary", scale=0.5, seeds=8)
    assert float(sharper.mean) == pytest.approx(0.0020, rel=0.1)


def test_a_decoder_layer_collapses_steadily():
    lengths = (5, 10, 100, 500, 1000, 5000, 10_000)
    curve = one_layer_collapse(lengths, "sinusoidal", normalised=False, decoder=True, seeds=12)
    assert curve.predicted is None and bool((curve.mean.diff() < 0).all())
    # Figure 8 passes bfloat16's spacing, 2^-7, about n = 500; so does this a coordinate.
    mean = dict(zip(lengths, (curve.mean / 64).tolist(), strict=True))
    assert mean[100] > 2**-7 > mean[1000]


def test_a_curve_is_kept_and_opened_again(tmp_path):
    curve = one_layer_collapse((5, 10), seeds=3, width=8)
    opened = SyntheticCurve.open(curve.save(tmp_path))
    assert opened == curve and opened.seed == 0 and opened.versions["torch"] == torch.__version__
    assert opened != one_layer_collapse((5, 10), seeds=3, width=8, seed=1)
    table = curve.to_frame()
    columns = {name: table[name].tolist() for name in table}
    assert columns["length"] == [5, 10] and columns["mean"] == curve.mean.tolist()
    for i in range(2):
        assert columns["lowest"][i] < columns["mean"][i] < columns["highest"][i]
    figure: Any = curve.plot()
    low, high, mean, predicted = (list(drawn.y) for drawn in figure.data)
    assert (low, high, mean) == (columns["lowest"], columns["highest"], columns["mean"])
    assert predicted == columns["predicted"]
    assert "Figure 10" in repr(curve) and "n=10" in curve._repr_html_()
    exact = alternating_total_variation((2,))
    exact.save(tmp_path)
    with pytest.raises(ResultError, match="no saved result"):
        SyntheticCurve.open(tmp_path / "elsewhere")
    assert SyntheticCurve.open(tmp_path) == exact


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: total_variation_decay((100, 300)), "shortest length"),
        (lambda: total_variation_decay((0,)), "positive"),
        (lambda: total_variation_decay(amount=0.0), "amount"),
        (lambda: total_variation_decay(seeds=0), "seeds"),
        (lambda: alternating_total_variation(()), "positive"),
        (lambda: one_layer_collapse(positions="learned"), "unknown positions"),  # type: ignore
        (lambda: one_layer_collapse((5,), "rotary", width=7), "even for rotary"),
    ],
)
def test_experiments_refuse_what_makes_no_sense(call, said):
    with pytest.raises(UsageError, match=said):
        call()


def fields(rows):
    return {name: values[None] for name, values in row_extremes(rows)["rows"].items()}


def extremes(scores):
    return RowExtremes(**fields(scores.softmax(dim=-1)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(1, 300),
    low=st.floats(-30, 30),
    spread=st.floats(0, 200),
)
def test_bounds_hold_for_any_scores(seed, n, low, spread):
    draw = torch.Generator().manual_seed(seed)
    scores = low + spread * torch.rand(1, 1, 4, n, generator=draw, dtype=torch.double)
    weights, found = scores.softmax(dim=-1), extremes(scores)
    assert not bool(found.violated.any()) and bool((found.keys == n).all())
    torch.testing.assert_close(found.spread[0], scores.amax(-1) - scores.amin(-1))
    # The lemma with the bounds of the draw, which are further apart than the scores.
    assert bool((weights >= math.exp(-spread) / n * (1 - 1e-9)).all())
    assert bool((weights <= math.exp(spread) / n * (1 + 1e-9)).all())
    # One high, all others low: the bound is reached.
    scores[..., 0], scores[..., 1:] = low + spread, low
    extreme = extremes(scores)
    torch.testing.assert_close(extreme.largest, extreme.reachable, rtol=1e-9, atol=0)
    assert not bool(extreme.violated.any())


def test_weights_out_of_bounds_are_seen():
    rows = torch.tensor([0.6, 0.2, 0.1, 0.1], dtype=torch.double)[None, None, None]
    right = fields(rows)
    assert not bool(RowExtremes(**right).violated)
    for name, factor in (("largest", 2.0), ("smallest", 0.2), ("keys", 2.0)):
        assert bool(RowExtremes(**{**right, name: right[name] * factor}).violated), name


def test_known_heads_disperse_as_they_were_made(tmp_path, monkeypatch):
    monkeypatch.setattr("handmade.GAIN", 2.0)  # so that float64 holds every weight
    write_handmade(tmp_path)
    model = eyechart.load(str(tmp_path), device="cpu")
    found = dispersion(model, torch.arange(3, 15)[None])
    n = torch.arange(1, 13, dtype=torch.double)
    assert bool((found.rows.keys == n).all()) and not bool(found.violated.any())
    rows, others = found.rows, found.without_first
    # Layer 1, head 1 is uniform: no spread, and weights as small as they can be.
    assert float(rows.spread[0, 1, 1].abs().max()) < 1e-9
    for uniform in (rows.largest, rows.smallest, rows.reachable):
        torch.testing.assert_close(uniform[0, 1, 1], 1 / n)
    # Head 0 is a sink, as sharp as its spread allows; with it gone the others are alike.
    assert float(rows.largest[0, 1, 0].min()) > 0.99
    torch.testing.assert_close(rows.largest[0, 1, 0], rows.reachable[0, 1, 0])
    torch.testing.assert_close(others.largest[0, 1, 0, 1:], 1 / (n[1:] - 1))
    # Layer 0, head 0 looks at itself; the first query has nothing else to look at.
    assert float(others.largest[0, 0, 0, 1:].min()) > 0.99
    assert bool(others.largest[..., 0].isnan().all())
    table = found.to_frame()
    assert table["violations"].tolist() == [0, 0, 0, 0]
    sharp = table["largest_without_first"].tolist()[2]
    assert sharp == pytest.approx(float((1 / (n[9:] - 1)).mean()))


def test_weights_that_no_number_can_hold_do_not_count(handmade):
    found = dispersion(handmade, torch.arange(3, 15)[None])
    # The sink's score is more than 745 nats above the others.
    assert bool((found.rows.keys[0, 1, 0] == 1).all()) and not bool(found.violated.any())
    assert bool((found.rows.largest[0, 1, 0] == 1).all())
    assert bool(found.without_first.largest[0, 1, 0].isnan().all())


def by_scores(model, inputs):
    """Spread and weights from the model's own scores: the definition."""
    scores, pattern = eyechart.capture(model, inputs, [Record("scores"), Record("pattern")])
    layers = []
    for layer in scores:
        s, p = scores[layer].double(), pattern[layer].double()
        seen = s > torch.finfo(scores[layer].dtype).min / 2
        spread = s.where(seen, -torch.inf).amax(-1) - s.where(seen, torch.inf).amin(-1)
        p = p / p.sum(dim=-1, keepdim=True)
        rest = p[..., 1:].amax(-1) / p[..., 1:].sum(-1)
        layers.append(torch.stack([seen.sum(-1), spread, p.amax(-1), rest]))
    return torch.stack(layers, dim=2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_dispersion_equals_its_definition(family):
    texts = ["A line of text that is rather longer than the other one.", "A short one."]
    half = family == "gpt_oss"  # transformers has no float64 for its experts
    with built(family, gain=4) as folder:
        model = eyechart.load(str(folder), device="cpu", dtype="float32" if half else "float64")
    found = dispersion(model, texts)
    truth = by_scores(model, texts)
    mask = found.sequences.mask[:, None, None].expand(found.possible.shape)
    assert found.provenance.attention == "fused" and not bool(found.violated.any())
    measured = (found.rows.keys, found.rows.spread, found.rows.largest, found.without_first.largest)
    rtol, atol = (1e-3, 1e-4) if half else (1e-7, 1e-9)
    for ours, theirs in zip(measured, truth, strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=rtol, atol=atol, equal_nan=True)
        assert bool(ours[~mask].isnan().all())

    # A hook that only the explicit pattern passes: the other way to the same numbers.
    def leave(pattern, hook):
        return pattern

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_attn_scores", leave)]):
        read = dispersion(model, texts)
    assert read.provenance.attention == "fused, pattern"
    assert bool(read.possible[:, 0].isnan().all()) and not bool(read.violated.any())
    for name in ("keys", "spread", "largest", "smallest"):
        for part in ("rows", "without_first"):
            ours, theirs = (getattr(getattr(x, part), name) for x in (found, read))
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6, equal_nan=True)


def test_the_possible_spread_is_twice_the_product_of_lengths(llama):
    found = dispersion(llama, "Some text to look at.")
    # Before rotation, which keeps lengths.
    q, k = (
        torch.stack(list(x.values()), dim=1).double().norm(dim=-1).transpose(-1, -2)
        for x in eyechart.capture(llama, found.sequences, [Record("q"), Record("k")])
    )
    longest = torch.stack([k[..., : i + 1].amax(-1) for i in range(k.shape[-1])], dim=-1)
    longest = longest.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scale = llama.cfg.d_head**-0.5
    torch.testing.assert_close(found.possible, 2 * scale * q * longest, rtol=1e-5, atol=0)
    # Proposition 3.1 is no tautology here: the spread comes from the weights.
    assert bool((found.rows.spread <= found.possible).all())
    assert float((found.rows.spread / found.possible)[..., 1:].max()) > 0.2


def test_skipped_heads_have_no_rows(llama):
    def skip(layer, call):
        call.replaced[1] = Replacement("zero")

    with edited(llama, skip), pytest.raises(UsageError, match="heads are skipped"):
        dispersion(llama, "Some text.")


def test_hidden_keys_are_not_counted(llama):
    tokens = torch.arange(5, 35)[None]
    with eyechart.lenses.evict(llama, keys=4, after=8):
        found = dispersion(llama, tokens)
    n = torch.arange(1, 31)
    assert bool((found.rows.keys == torch.where(n > 8, n - 4, n)).all())
    torch.testing.assert_close(
        found.without_first.largest[..., 8:], found.rows.largest[..., 8:], rtol=1e-9, atol=0
    )


def test_real_heads_lose_sharpness_with_length(default_model, tmp_path):
    text = "\n\n".join(list(TEXTS.values())[:2])
    found = dispersion(default_model, text)
    assert not bool(found.violated.any()) and found.sequences.lengths[0] > 200
    sharp = found.without_first.largest[0]
    early, late = (float(sharp[..., part].mean()) for part in (slice(24, 32), slice(-64, None)))
    assert late < 0.9 * early
    half = dispersion(default_model, text, accumulate="float32")
    torch.testing.assert_close(half.rows.spread.double(), found.rows.spread, rtol=1e-4, atol=1e-3)
    assert not bool(half.violated.any())
    assert type(found).open(found.save(tmp_path)) == found
    assert "violated in 0 of" in repr(found)
    figure: Any = found.plot()
    _, _, middle, allowed, uniform = (drawn.y for drawn in figure.data)
    assert uniform[-1] < middle[-1] < min(middle[24], allowed[-1])


def test_an_unknown_number_format_is_refused(llama):
    with pytest.raises(UsageError, match="float64"):
        dispersion(llama, "Some text.", accumulate="float16")  # type: ignore[arg-type]
