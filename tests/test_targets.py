"""Mass on chosen keys: known answers, the definitions one number at a time, both backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eyechart
from eyechart import targets
from eyechart.errors import InputError, UsageError
from eyechart.targets import (
    AfterEarlierCopies,
    Delimiters,
    EarlierCopies,
    First,
    Positions,
    Tokens,
    Window,
    mass_on,
)

IDS = torch.tensor([[5, 9, 5, 7, 9, 5, 5, 8, 9, 5, 7, 7]])

# What each target says of query i and key j, in words of Python.
RULES = {
    First(3): lambda t, i, j: j < 3,
    Window(4): lambda t, i, j: i - j < 4,
    Positions((0, 5)): lambda t, i, j: j in (0, 5),
    Tokens((5, 8)): lambda t, i, j: t[j] in (5, 8),
    EarlierCopies(): lambda t, i, j: j < i and t[j] == t[i],
    AfterEarlierCopies(): lambda t, i, j: j >= 1 and t[j - 1] == t[i],
}


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    begin=st.integers(0, 8),
    seed=st.integers(0, 2**20),
)
def test_every_target_is_its_rule(tokens, begin, seed):
    n, begin = len(tokens), min(begin, len(tokens) - 1)
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    rows = torch.randn(1, 2, n, n, generator=draw).masked_fill(hidden, -torch.inf).softmax(-1)
    ids = torch.tensor([tokens])
    for target, rule in RULES.items():
        found = mass_on(rows[:, :, begin:], target, ids, begin)
        for i in range(begin, n):
            keys = [j for j in range(i + 1) if rule(tokens, i, j)]
            torch.testing.assert_close(found[..., i - begin], rows[:, :, i, keys].sum(-1))


@pytest.mark.parametrize("family", ["tiny-random-llama", "tiny-random-gemma2", "tiny-random-gpt2"])
def test_both_backends_and_a_batch_agree(family):
    model = eyechart.load(family, device="cpu")
    ids = torch.cat([IDS, IDS.flip(1)])
    fused, pattern = (
        eyechart.attention_statistics(model, ids, backend=backend, targets=list(RULES))
        for backend in ("fused", "pattern")
    )
    assert "pattern" not in fused.backend
    assert list(fused.masses) == [target.name for target in RULES] == list(pattern.masses)
    for name, mass in fused.masses.items():
        torch.testing.assert_close(mass, pattern.masses[name], atol=1e-6, rtol=1e-5)
    alone = eyechart.attention_statistics(model, ids[1:], backend="fused", targets=list(RULES))
    for name, mass in alone.masses.items():
        torch.testing.assert_close(mass[0], fused.masses[name][1], atol=1e-6, rtol=1e-5)


def test_known_heads_put_their_mass_where_it_is_known(handmade, tmp_path):
    ids = torch.arange(4, 16)[None]
    found = eyechart.attention_statistics(
        handmade,
        ids,
        backend="fused",
        targets=[Window(1), Window(2), First(1), Positions((0, 3))],
    )
    assert set(found.backend) == {"fused"}
    diagonal, previous, sink = (0, 0), (0, 1), (1, 0)
    assert found.by_head("window 1")[diagonal] == 1
    assert found.by_head("window 1")[previous] == 0 and found.by_head("window 2")[previous] == 1
    assert found.by_head("first 1")[sink] == 1 and found.by_head("positions 0, 3")[sink] == 1
    assert found.strongest("window 2", 1)[0][2] == 1
    uniform = found.masses["positions 0, 3"][0, 1, 1]
    torch.testing.assert_close(uniform[3:], 2 / torch.arange(4.0, 13))
    assert "most on window 2: L0H" in repr(found)
    assert list(found.to_frame().columns[-2:]) == ["first 1", "positions 0, 3"]
    titles = {a.text for a in found.plot().layout.annotations}
    assert "mass on window 1" in titles
    assert eyechart.open_result(found.save(tmp_path)) == found


def test_masses_alone_are_a_result_too(llama):
    found = eyechart.attention_statistics(llama, IDS, statistics=(), targets=[Window(2)])
    assert found.computed == () and not found.masses["window 2"].isnan().any()
    with pytest.raises(UsageError, match="first was not computed"):
        found.sink_rate()


def test_delimiters_and_tokens_are_resolved_by_the_tokenizer(llama):
    text = "Stop. Go, then: wait!"
    tokens = [llama.tokenizer.decode([i]) for i in eyechart.sequences.fragment(llama, text)]
    found = eyechart.attention_statistics(
        llama,
        text,
        prepend_bos=False,
        targets=[
            Delimiters(),
            Tokens((".", ",", ":", "!"), "the same"),
            Positions(tuple(i for i, token in enumerate(tokens) if token in ".,:!")),
        ],
    )
    masses = list(found.masses.values())
    assert torch.equal(masses[0], masses[1]) and torch.equal(masses[0], masses[2])
    assert float(masses[0].max()) > 0
    nothing = eyechart.attention_statistics(llama, "plain words", targets=[Delimiters()])
    assert float(nothing.masses["delimiters"].max()) == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: First(0), "count must be at least 1"),
        (lambda: Window(-3), "width must be at least 1"),
        (lambda: Positions(()), "positions must be a few"),
        (lambda: Positions((-1,)), "none negative"),
        (lambda: Tokens(()), "at least one token"),
        (lambda: Tokens((" the",)).keys(IDS, 0, 1), "become ids by resolve"),
        (lambda: Delimiters().keys(IDS, 0, 1), "become token ids by resolve"),
    ],
)
def test_targets_that_say_nothing_are_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()


def test_targets_that_do_not_fit_the_text_are_refused(llama):
    with pytest.raises(InputError, match="longest sequence has 12 tokens"):
        eyechart.attention_statistics(llama, IDS, targets=[targets.Positions((12,))])
    with pytest.raises(InputError, match="but exactly one is needed here"):
        eyechart.attention_statistics(llama, IDS, targets=[targets.Tokens(("two words",))])
    with pytest.raises(UsageError, match="two targets have the same name"):
        eyechart.attention_statistics(llama, IDS, targets=[Window(2), Window(2)])
