"""Collapse: one pass equals pair by pair; zero where theory says so; falling on a real model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eyechart
from eyechart import sequences
from eyechart.collapse import distances
from eyechart.errors import InputError, UsageError
from eyechart.probes import Record


def pair_by_pair(model, lengths, prompt):
    """The definition: two prompts a length, each run alone, last tokens compared."""
    columns = []
    for n in lengths:
        ends = []
        for count in (n, n + 1):
            made = sequences.repeated(model, "1", count, prompt=prompt)
            pre, post, final = eyechart.capture(
                model, made, [Record("resid_pre"), Record("resid_post"), Record("final_norm")]
            )
            stream = torch.cat([pre[0], *post.values(), final[None]])
            ends.append(stream[:, -1])
        shorter, longer = ends
        columns.append((longer - shorter).abs().sum(-1) / longer.abs().sum(-1))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("name", ["tiny-random-llama", "tiny-random-gpt2", "tiny-random-bloom"])
def test_one_pass_equals_pair_by_pair(name):
    model = eyechart.load(name, device="cpu", dtype="float64")
    lengths = (1, 2, 3, 7, 20)
    curve = eyechart.collapse_curve(model, lengths=lengths, prompt="Ones: ")
    assert curve.forward_passes == 1 and curve.lengths == lengths
    torch.testing.assert_close(
        curve.relative.double(), pair_by_pair(model, lengths, "Ones: "), atol=1e-7, rtol=1e-6
    )


def test_one_pass_equals_pair_by_pair_on_the_default_model(default_model):
    lengths = (1, 10, 100)
    curve = eyechart.collapse_curve(default_model, lengths=lengths, prompt="Ones: ")
    naive = pair_by_pair(default_model, lengths, "Ones: ")
    torch.testing.assert_close(curve.relative, naive, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "collapsed"),
    [("tiny-random-llama", True), ("tiny-random-bloom", True), ("tiny-random-gpt2", False)],
)
def test_without_a_prefix_repetitions_are_identical_unless_positions_are_learned(name, collapsed):
    # Gu et al., arXiv 2410.10781, appendix C.1: nothing is left to tell repetitions apart.
    model = eyechart.load(name, device="cpu")
    curve = eyechart.collapse_curve(model, lengths=(1, 5, 50), prompt="", prepend_bos=False)
    assert (float(curve.relative[1:].max()) < 1e-4) is collapsed


def test_default_model_collapses(default_model):
    curve = eyechart.collapse_curve(default_model, lengths=(1, 10, 50, 100, 200, 500))
    final = curve.relative[-1]
    assert curve.layer_labels[-1] == "final norm" and curve.layer_labels[0] == "embedding"
    assert float(final[-1]) < 0.1 * float(final[0])
    onset = curve.onset()
    assert onset is not None and 20 < onset <= 200
    assert float(curve.relative[0].max()) == 0  # the same token embeds the same


def test_onset_is_the_start_of_the_last_stretch_below(handmade):
    import dataclasses

    base = eyechart.collapse_curve(handmade, lengths=(1, 2, 3, 4), prompt="", prepend_bos=True)

    def with_curve(*values):
        return dataclasses.replace(base, relative=torch.tensor([values]).expand(4, 4))

    assert with_curve(1.0, 0.05, 0.2, 0.05).onset() == 4  # what rises again has not collapsed
    assert with_curve(1.0, 0.09, 0.08, 0.07).onset() == 2
    assert with_curve(1.0, 0.5, 0.3, 0.1).onset() is None
    assert with_curve(1.0, 0.5, 0.3, 0.1).onset(fraction=0.4) == 3
    assert with_curve(0.0, 0.0, 0.0, 0.0).onset() is None
    with pytest.raises(UsageError):
        base.onset(fraction=0)


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
    assert one["linf"] <= one["l2"] + 1e-6 <= one["l1"] + 2e-6
    for name in ("l1", "l2", "linf"):
        torch.testing.assert_close(two[name], scale * one[name], rtol=1e-5, atol=1e-6)
    for name in ("relative", "cosine"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
    for value in distances(a, a.clone()).values():
        assert float(value) == pytest.approx(0, abs=1e-12)


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
        eyechart.collapse_curve(llama, "alternating")  # type: ignore[arg-type]
