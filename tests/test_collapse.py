"""Collapse: one pass equals pair by pair; zero where theory says so; falling on a real model."""

import dataclasses

import pytest
import torch
from families import built
from hypothesis import given, settings
from hypothesis import strategies as st

import eyechart
from eyechart import families
from eyechart.collapse import distances
from eyechart.collapse.measures import of_next_tokens
from eyechart.errors import InputError, UsageError
from eyechart.models import facts_of
from eyechart.models.convert import build_tiny
from eyechart.probes import Record, why_not_branching
from eyechart.results.collapse import DISTANCES
from eyechart.sequences import from_ids, prefix

PROMPT = "Ones: "


def alone(model, ids):
    """The last token's streams, its heads in the last layer, and its next-token distribution."""
    made = from_ids(model, [ids])
    sites = [Record(name) for name in ("resid_pre", "resid_post", "final_norm", "z", "next_token")]
    # Whoever reads the pattern of a float64 model gets it in float64, and so do later layers.
    pre, post, final, z, logits, _ = eyechart.capture(model, made, [*sites, Record("pattern")])
    stream = torch.cat([pre[0], *post.values(), final[None]])[:, -1]
    return stream, z[max(z)][0, -1], logits[None][0].double().log_softmax(-1)


def pair_by_pair(model, family, lengths, prompt=PROMPT):
    """The definition: two prompts a length, each run alone, last tokens compared."""
    front, _ = prefix(model, prompt)
    build = family.bind(model)
    columns = {name: [] for name in (*DISTANCES, "control", "heads", "tv", "kl")}
    for n in lengths:
        sides = [
            ([] if family.bare and index == 1 else front) + ids
            for index, ids in enumerate(build(n))
        ]
        (a, a_heads, p), (b, b_heads, q), *more = (alone(model, ids) for ids in sides)
        columns["l1"].append((b - a).abs().sum(-1))
        columns["l2"].append((b - a).square().sum(-1).sqrt())
        columns["linf"].append((b - a).abs().amax(-1))
        columns["relative"].append((b - a).abs().sum(-1) / b.abs().sum(-1))
        columns["cosine"].append(1 - torch.nn.functional.cosine_similarity(a, b, dim=-1))
        columns["heads"].append((b_heads - a_heads).abs().amax(-1))
        columns["tv"].append((p.exp() - q.exp()).abs().sum())
        columns["kl"].append((p.exp() * (p - q)).sum())
        for c, _, _ in more:
            columns["control"].append((c - a).abs().sum(-1) / c.abs().sum(-1))
    return {name: torch.stack(column, -1) for name, column in columns.items() if column}


def assert_equal(curve, truth, **tolerance):
    for name in (*DISTANCES, "control", "tv", "kl"):
        if name in truth:
            found = getattr(curve, name)
            torch.testing.assert_close(
                found, truth[name].to(found.dtype), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
    torch.testing.assert_close(
        curve.heads["linf"], truth["heads"].to(curve.heads["linf"].dtype), **tolerance
    )


MADE = [
    families.repeat(),
    families.word(" a b"),
    families.digits(),
    families.bernoulli(0.3),
    families.alternating(("0", "1", "2")),
    families.separated(every=3),
    families.separated(every=2, anchor="right"),
    families.separated(every=2, trailing=True),
    families.text("the quick brown fox jumps over the lazy dog and runs on"),
    families.changed(at=0),
    families.inserted(at=-1),
    families.singleton("1"),
    families.pairs([([5, 6, 7], [5, 6, 8]), ([9, 6, 7, 8], [5, 6, 7, 8, 9])]),
]


@pytest.mark.parametrize("family", MADE, ids=lambda family: family.name)
def test_one_pass_equals_pair_by_pair(float64_llama, family):
    lengths = family.lengths or (1, 2, 3, 7, 12)
    curve = eyechart.collapse_curve(float64_llama, family, lengths, prompt=PROMPT)
    assert curve.forward_passes == 2 and curve.lengths == lengths
    assert_equal(curve, pair_by_pair(float64_llama, family, lengths), atol=1e-10, rtol=1e-10)


@pytest.fixture(scope="module")
def float64_llama():
    return eyechart.load("tiny-random-llama", device="cpu", dtype="float64")


@pytest.mark.parametrize(
    ("family", "dtype", "error"),
    # The experts of gpt-oss know no float64.
    [("gemma2", "float64", 1e-9), ("gpt2", "float64", 1e-9), ("gpt_oss", "float32", 1e-4)],
)
def test_windows_soft_caps_sinks_and_learned_positions_in_a_tree(family, dtype, error):
    with built(family, gain=4) as folder:
        model = eyechart.load(folder, device="cpu", dtype=dtype)
    # Longer than the windows of these models, so that a branch's window reaches into the trunk.
    lengths, drawn = (1, 9, 20), families.digits()
    assert why_not_branching(model, facts_of(model)) == ""
    curve = eyechart.collapse_curve(model, drawn, lengths, prompt=PROMPT)
    assert curve.forward_passes == 2
    assert_equal(curve, pair_by_pair(model, drawn, lengths), atol=error, rtol=error)


@pytest.mark.parametrize(("family", "why"), [("bloom", "code of its own"), ("lfm2", "otherwise")])
def test_models_that_cannot_share_tokens_are_run_pair_by_pair(family, why):
    with built(family, gain=4) as folder:
        model = eyechart.load(folder, device="cpu", dtype="float64")
    lengths, drawn = (1, 5, 12), families.digits()
    curve = eyechart.collapse_curve(model, drawn, lengths, prompt=PROMPT)
    assert any("pair by pair" in note and why in note for note in curve.provenance.notes)
    assert_equal(curve, pair_by_pair(model, drawn, lengths), atol=1e-9, rtol=1e-9)
    # What branches in nothing needs no sharing.
    straight = eyechart.collapse_curve(model, lengths=lengths, prompt=PROMPT, references=False)
    assert straight.forward_passes == 1
    truth = pair_by_pair(model, families.repeat(), lengths)
    assert_equal(straight, truth, atol=1e-9, rtol=1e-9)


def test_one_pass_equals_pair_by_pair_on_the_default_model(default_model):
    lengths = (1, 10, 100)
    for family in (families.repeat(), families.digits()):
        curve = eyechart.collapse_curve(default_model, family, lengths, prompt=PROMPT)
        truth = pair_by_pair(default_model, family, lengths)
        # 1e-5 of the relative distance; differences of a stream of thousands round to more.
        torch.testing.assert_close(curve.relative[-1], truth["relative"][-1], atol=1e-5, rtol=0)
        torch.testing.assert_close(curve.relative, truth["relative"], atol=3e-5, rtol=1e-3)
        assert curve.tv is not None and curve.kl is not None
        torch.testing.assert_close(curve.tv.double(), truth["tv"], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(curve.kl.double(), truth["kl"], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "collapsed"),
    [("tiny-random-llama", True), ("tiny-random-bloom", True), ("tiny-random-gpt2", False)],
)
def test_without_a_prefix_repetitions_are_identical_unless_positions_are_learned(name, collapsed):
    # Gu et al., arXiv 2410.10781, appendix C.1: nothing is left to tell repetitions apart.
    model = eyechart.load(name, device="cpu")
    curve = eyechart.collapse_curve(model, lengths=(1, 5, 50), prompt="", prepend_bos=False)
    assert (float(curve.relative[1:].max()) < 1e-4) is collapsed


def test_rounding_alone_has_no_onset(llama):
    curve = eyechart.collapse_curve(llama, lengths=(1, 5, 50), prompt="", prepend_bos=False)
    noise = torch.full_like(curve.relative, 1e-7)
    noise[:, -1] = 1e-9
    floor = {"relative": torch.full((len(noise), 1), 2e-7)}
    noisy = dataclasses.replace(curve, relative=noise, null=floor)
    assert noisy.onset() is None and noisy.fit() is None


def test_default_model_collapses(default_model):
    curve = eyechart.collapse_curve(default_model, lengths=(1, 10, 50, 100, 200, 500))
    final = curve.relative[-1]
    assert curve.layer_labels[-1] == "final norm" and curve.layer_labels[0] == "embedding"
    assert float(final[-1]) < 0.1 * float(final[0])
    onset = curve.onset()
    assert onset is not None and 20 < onset <= 200
    assert float(curve.relative[0].max()) == 0  # the same token embeds the same
    assert curve.forward_passes == 2
    # What arithmetic makes is far below what was measured, and unrelated prompts far above.
    assert 0 < curve.floor() < 1e-3 * float(final.min())
    assert float(curve.unrelated["relative"][-1]) > 2 * float(final[0])
    law = curve.fit()
    assert law is not None and -1 < law.low < law.slope < law.high < -0.2
    # More coordinates coincide in coarser formats and at greater lengths, as spacing predicts.
    assert curve.identical is not None and curve.expected is not None
    shares = {name: curve.identical[index] for index, name in enumerate(curve.formats)}
    for coarse, fine in (("float8_e5m2", "float8_e4m3"), ("float8_e4m3", "bfloat16")):
        assert bool((shares[coarse] > shares[fine]).all())
        assert float(shares[coarse][-1]) > 3 * float(shares[coarse][0])
    floating = [curve.formats.index(name) for name in ("bfloat16", "float8_e4m3", "float8_e5m2")]
    gap = (curve.identical[floating] - curve.expected[floating]).abs()
    assert float(gap.max()) < 0.06
    assert curve.tokens(1)[0] == (*curve.tokens(1)[1][:-1],)
    assert curve.tokens(10)[1][-11:] == ("1",) * 11


def test_the_null_is_what_another_arrangement_of_the_same_prompt_makes(float64_llama, llama):
    wide = eyechart.collapse_curve(float64_llama, "digits", (1, 5, 40), prompt=PROMPT)
    narrow = eyechart.collapse_curve(llama, "digits", (1, 5, 40), prompt=PROMPT)
    assert wide.floor() < 1e-13 and 1e-9 < narrow.floor() < 1e-5
    assert wide.null_lengths == (1, 5, 40)


def test_unrelated_prompts_are_the_median_pair(float64_llama):
    from eyechart.texts import TEXTS

    curve = eyechart.collapse_curve(float64_llama, lengths=(1, 2), prompt=PROMPT)
    rows = [prefix(float64_llama, text)[0][:32] for text in TEXTS.values()]
    ends = torch.stack([alone(float64_llama, row)[0] for row in rows])
    pairs = [
        (ends[j] - ends[i]).abs().sum(-1) / ends[j].abs().sum(-1)
        for i in range(len(ends))
        for j in range(i + 1, len(ends))
    ]
    truth = torch.stack(pairs).median(dim=0).values
    torch.testing.assert_close(curve.unrelated["relative"], truth, atol=1e-10, rtol=1e-10)


def test_onset_is_the_start_of_the_last_stretch_below(handmade):
    base = eyechart.collapse_curve(handmade, lengths=(1, 2, 3, 4), prompt="", prepend_bos=True)

    def with_curve(*values):
        return dataclasses.replace(base, relative=torch.tensor([values]).expand(4, 4), null={})

    assert with_curve(1.0, 0.05, 0.2, 0.05).onset() == 4  # what rises again has not collapsed
    assert with_curve(1.0, 0.09, 0.08, 0.07).onset() == 2
    assert with_curve(1.0, 0.5, 0.3, 0.1).onset() is None
    assert with_curve(1.0, 0.5, 0.3, 0.1).onset(fraction=0.4) == 3
    assert with_curve(0.0, 0.0, 0.0, 0.0).onset() is None
    with pytest.raises(UsageError):
        base.onset(fraction=0)


def test_horizons_seen_and_predicted(handmade):
    """A curve that falls as 1 / n, in one format."""
    base = eyechart.collapse_curve(handmade, lengths=(1, 2, 4), prompt="", prepend_bos=True)
    law = torch.tensor([1.0, 0.5, 0.25])
    made = dataclasses.replace(
        base,
        relative=law.expand(len(base.relative), 3),
        null={},
        formats=("grid",),
        identical=torch.tensor([[0.0, 0.75, 1.0]]),
        expected=torch.tensor([[0.0, 0.9, 1.0]]),
        steps=torch.full((1, 10), 1.0),  # at n = 4: 10 coordinates, one step apart each
    )
    fit = made.fit()
    assert fit is not None and fit.slope == pytest.approx(-1, abs=1e-6) and fit.points == 3
    assert fit.at(50) == pytest.approx(0.02) and fit.reaches(0.001) == pytest.approx(1000)
    # Half a coordinate of ten: steps of 1/20, at twenty times the length.
    assert made.predicted_horizon("grid") == pytest.approx(80, rel=1e-3)
    assert made.horizon("grid") == 4 and made.horizon("grid", share=0.75) == 2
    for wrong in (lambda: made.horizon("float32"), lambda: made.horizon("grid", share=0)):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(UsageError, match="was not measured"):
        made.tokens(7)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.1, 100))
def test_distances_are_what_their_names_say(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 1, 1, 12, generator=generator)
    one, two = distances(a, b), distances(scale * a, scale * b)
    torch.testing.assert_close(
        one["l1"], torch.nn.functional.l1_loss(a, b, reduction="sum")[None, None]
    )
    torch.testing.assert_close(one["l2"], (a - b).pow(2).sum(-1).sqrt())
    torch.testing.assert_close(
        one["cosine"], 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1), atol=1e-6, rtol=1e-5
    )
    assert one["linf"] <= one["l2"] + 1e-6 <= one["l1"] + 2e-6
    for name in ("l1", "l2", "linf"):
        torch.testing.assert_close(two[name], scale * one[name], rtol=1e-5, atol=1e-6)
    for name in ("relative", "cosine"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
    for value in distances(a, a.clone()).values():
        assert float(value) == pytest.approx(0, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), size=st.sampled_from([1e-4, 0.1, 3.0]))
def test_next_token_distances_are_exact_even_where_they_are_small(seed, size):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    logits = torch.cat([base, base + size * torch.randn(3, 50, generator=generator).double()])
    first, second = torch.arange(3), torch.arange(3, 6)
    p, q = logits[:3].log_softmax(-1), logits[3:].log_softmax(-1)
    truth = (p.exp() - q.exp()).abs().sum(-1), (p.exp() * (p - q)).sum(-1)
    for kind, rtol in ((torch.float64, 1e-7), (torch.float32, 1e-2)):
        tv, kl, same = of_next_tokens(logits.to(kind), first, second)
        torch.testing.assert_close(tv.double(), truth[0], rtol=rtol, atol=0)
        torch.testing.assert_close(kl.double(), truth[1], rtol=rtol, atol=1e-14)
        assert same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


def test_a_ladder_reads_coarser_and_coarser(llama):
    ladder = eyechart.precision_ladder(
        llama,
        lengths=(1, 5, 20),
        formats=("float32", "bfloat16", "float8_e5m2"),
        places=("model", "stream", "final"),
        prompt=PROMPT,
    )
    assert ladder.curve("stream", "float32") is ladder.base  # rounding to its own format is nothing
    assert set(ladder.rungs["model"]) == {"float32", "bfloat16"} and not ladder.failures
    with eyechart.lenses.precision(llama, "bfloat16", at="stream"):
        direct = eyechart.collapse_curve(llama, lengths=(1, 5, 20), prompt=PROMPT)
    assert torch.equal(direct.relative, ladder.curve("stream", "bfloat16").relative)
    longest = ladder.to_frame().query("length == 20").to_dict("records")
    shares = {(row["place"], row["format"]): row["identical"] for row in longest}
    for place in ("stream", "final"):
        assert shares[place, "float8_e5m2"] > shares[place, "bfloat16"]
    with pytest.raises(UsageError, match="was not measured"):
        ladder.curve("weights", "bfloat16")
    with pytest.raises(UsageError, match="places must be some of"):
        eyechart.precision_ladder(llama, places=("wings",))


def test_a_study_keeps_what_did_not_fail(llama, tmp_path):
    long = families.text("too short")
    made = eyechart.collapse_study(
        llama, ["repeat", long], (1, 30), ladder=False, formats=("bfloat16",), prompt=PROMPT
    )
    assert [curve.family for curve in made.curves] == ["repeat"] and "text" in made.failures
    assert "n can be at most 9" in made.failures["text"] and made.rank is not None
    assert eyechart.open_result(made.save(tmp_path)) == made
    assert made.curve("repeat").lengths == (1, 30)
    with pytest.raises(UsageError, match="different ones"):
        eyechart.collapse_study(llama, ["repeat", "repeat:token=0"])
    with pytest.raises(eyechart.EyechartError, match="every family failed"):
        eyechart.collapse_study(llama, [long], (30,), ladder=False, rank=False)


def test_lengths_that_do_not_fit_are_refused_with_the_limit(llama):
    with pytest.raises(InputError, match=r"sees at most 512; n can be at most 507"):
        eyechart.collapse_curve(llama, lengths=(10, 600), prompt="abc")
    assert eyechart.collapse_curve(llama, lengths=(507,), prompt="abc").lengths == (507,)
    # By default what fits is measured.
    assert eyechart.collapse_curve(llama).lengths[-1] == 200
    for lengths in ((), (0, 1)):
        with pytest.raises(UsageError, match="positive"):
            eyechart.collapse_curve(llama, lengths=lengths)
    with pytest.raises(UsageError, match="unknown family"):
        eyechart.collapse_curve(llama, "telescope")
    with pytest.raises(UsageError, match="unknown number format"):
        eyechart.collapse_curve(llama, formats=("float7",))
    with pytest.raises(UsageError, match="this family has the lengths"):
        eyechart.collapse_curve(llama, families.pairs([([5, 6], [5, 7])]), lengths=(1, 2))


def test_tokens_that_merge_are_refused_or_told(default_model):
    with pytest.raises(InputError, match="exactly one"):
        eyechart.collapse_curve(default_model, families.repeat("poem poem"), (1,))
    # SmolLM2 writes every digit as a token of its own, but not every letter.
    plain = eyechart.collapse_curve(default_model, lengths=(2, 9), references=False)
    merging = eyechart.collapse_curve(
        default_model, families.repeat("a"), lengths=(2, 9), references=False
    )
    told = [any("merged" in note for note in c.provenance.notes) for c in (plain, merging)]
    assert told == [False, True]


def test_frequencies_that_change_with_length_end_the_curve(tmp_path):
    # Past 64 tokens the rotary frequencies of all tokens are others: no prefix is what it was.
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 64}
    build_tiny("phi3", {"num_key_value_heads": 2, **changes}, tmp_path)
    model = eyechart.load(tmp_path, device="cpu")
    with pytest.raises(InputError, match=r"at most 64 before its rotary frequencies.*most 56"):
        eyechart.collapse_curve(model, lengths=(1, 100), prompt=PROMPT)
    assert eyechart.collapse_curve(model, prompt=PROMPT).lengths[-1] == 50


def test_a_model_in_training_mode_is_refused_and_nothing_is_remembered_of_it(tmp_path):
    build_tiny("gpt2", {}, tmp_path)
    model = eyechart.load(tmp_path, device="cpu")
    model.train()
    with pytest.raises(InputError, match="training mode"):
        eyechart.collapse_curve(model, "digits", (1, 5), prompt=PROMPT)
    model.eval()
    assert eyechart.collapse_curve(model, "digits", (1, 5), prompt=PROMPT).forward_passes == 2
