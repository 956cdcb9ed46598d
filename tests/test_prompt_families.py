"""Families of sequences: what the two prompts of a pair are, token by token."""

import math
from collections import Counter

import pytest

from eyechart import families
from eyechart.errors import InputError, UsageError
from eyechart.families import FAMILIES, family_named
from eyechart.prefixes import merged
from eyechart.sequences import readable


def shown(model, family, n):
    """The sequences of length n as text."""
    return tuple("".join(readable(model, ids)) for ids in family.bind(model)(n))


@pytest.mark.parametrize(
    ("family", "n", "expected"),
    [
        (families.repeat("7"), 3, ("777", "7777")),
        (families.word(" ab"), 2, (" ab ab", " ab ab ab")),
        (families.alternating(("0", "1")), 4, ("0101", "01011")),
        (families.alternating(("0", "1", "2")), 5, ("01201", "012011")),
        (families.separated(), 3, ("111", "111,1", "111,111")),
        (families.separated(), 4, ("111,1", "111,11", "111,111,1")),
        (families.separated(every=2, separator=";"), 1, ("1", "11", "11;1")),
        (families.separated(anchor="right"), 4, ("1,111", "11,111", "1,111,111")),
        (families.separated(anchor="right"), 3, ("111", "1,111", "111,111")),
        (families.separated(trailing=True), 3, ("111,", "111,1", "111,111,")),
        (families.changed(at=0), 3, ("111", "011")),
        (families.changed(), 3, ("111", "110")),
        (families.changed(at=-2), 3, ("111", "101")),
        (families.inserted(), 3, ("111", "0111")),
        (families.inserted(at=-1), 3, ("111", "1101")),
        (families.text("hello"), 4, ("hell", "helll")),
        (families.singleton("1"), 3, ("111", "1")),
        (families.pairs([("ab", "abc"), ("xy", "yx")]), 2, ("xy", "yx")),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_pairs_are_what_they_are_said_to_be(llama, family, n, expected):
    assert shown(llama, family, n) == expected
    assert bool(family.control) is (len(expected) == 3)


def test_drawn_sequences_grow_and_follow_their_seed(llama):
    drawn = families.digits(seed=3)
    short, longer = shown(llama, drawn, 40)
    assert longer == short + "1" and short[-1] == "1" and len(short) == 40
    # The tokens of a length are the beginning of those of a greater one, in whatever order asked.
    fresh = families.digits(seed=3)
    assert shown(llama, fresh, 7)[0][:-1] == short[:6]
    assert shown(llama, fresh, 40) == (short, longer)
    assert shown(llama, families.digits(seed=4), 40)[0] != short
    assert drawn.seed == 3 and drawn.entropy == pytest.approx(math.log(10))


def test_the_dial_of_entropy(llama):
    assert shown(llama, families.bernoulli(1.0), 9)[0] == "1" * 9
    assert families.bernoulli(1.0).entropy == 0
    assert families.bernoulli(0.5).entropy == pytest.approx(math.log(2))
    ones = Counter(shown(llama, families.bernoulli(0.7, seed=1), 2001)[0])
    assert 0.67 < ones["1"] / 2001 < 0.73  # three standard deviations
    with pytest.raises(UsageError, match="between 0 and 1"):
        families.bernoulli(1.2)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_pairs_at_every_length(llama, name):
    family = family_named(name)
    if name in ("word", "singleton"):  # this tokeniser writes single characters
        family = family_named(f"{name}:{'text' if name == 'word' else 'token'}=a")
    build = family.bind(llama)
    for n in range(1, 12):
        sides = build(n)
        assert (all(sides) and sides[0] != sides[1]) or (name == "singleton" and n == 1)
        assert len(sides) == (3 if family.control else 2)


def test_options_by_name():
    assert family_named("separated:every=4,anchor=right").control == "n and n + 4"
    assert family_named("bernoulli:p=0.25").name == "bernoulli 0.25"
    assert family_named("separated:trailing=yes").bind is not None
    for wrong, said in [
        ("telescope", "unknown family 'telescope'; there are repeat, digits"),
        ("repeat:size=3", "repeat has no option 'size=3'; its options are token='1'"),
        ("repeat:token", "no option 'token'"),
        ("bernoulli:p=often", "p of bernoulli is a float, not 'often'"),
        ("separated:anchor=top", "anchor must be"),
        ("separated:every=0", "at least 1"),
        ("separated:anchor=right,trailing=yes", "always full"),
    ]:
        with pytest.raises(UsageError, match=said):
            family_named(wrong)
    with pytest.raises(UsageError, match="at least two"):
        families.alternating(("1",))


def test_what_cannot_be_built_is_refused(llama, default_model):
    with pytest.raises(InputError, match="no token -3; begin with n=3"):
        families.changed(at=-3).bind(llama)(2)
    with pytest.raises(InputError, match="has 5 tokens"):
        families.text("hello").bind(llama)(6)
    with pytest.raises(InputError, match="empty"):
        families.word("").bind(llama)
    with pytest.raises(InputError, match="outside the vocabulary"):
        families.pairs([([10**6], [1])]).bind(llama)(1)
    with pytest.raises(InputError, match="' poem poem' is 2 tokens"):
        families.repeat(" poem poem").bind(default_model)
    for given in ([], [([1], [2]), ([3], [4])], [([], [1])]):
        with pytest.raises(UsageError):
            families.pairs(given)


def test_prompts_share_what_they_begin_with(llama):
    prompts = [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 9, 9], [1, 2, 9, 8], [7], [1, 2, 3]]
    whole = merged(llama, prompts)
    row = whole.sequences
    tokens = row.tokens[0].tolist()
    assert [[tokens[node] for node in row.path(end)] for end in whole.ends] == prompts
    # 5 of the longest, two endings of two that share one, and one that begins anew.
    assert len(tokens) == 5 + 3 + 1 and row.longest == 5
    assert row.parents is not None and row.parents[0, :5].tolist() == [-1, 0, 1, 2, 3]
    # What is all the beginning of one prompt is an ordinary row.
    chain = merged(llama, [[1, 2], [1, 2, 3], [1]])
    assert chain.sequences.parents is None and chain.ends == (1, 2, 0)
    first = merged(llama, [[7], [1, 2, 3]], longest_first=False)
    assert first.sequences.tokens[0].tolist() == [7, 1, 2, 3]


def test_long_prompts_share_too(llama):
    """Longer than what is compared token by token."""
    trunk = [3 + i % 7 for i in range(200)]
    fork = [*trunk[:120], *([11] * 60)]
    prompts = [trunk, fork, [*trunk[:77], 12], [*fork[:150], 12], trunk[:40], fork[:140]]
    whole = merged(llama, prompts)
    tokens = whole.sequences.tokens[0].tolist()
    found = [[tokens[node] for node in whole.sequences.path(end)] for end in whole.ends]
    assert found == prompts and len(tokens) == 200 + 60 + 1 + 1


def test_prompts_that_do_not_fit_are_refused(llama):
    with pytest.raises(InputError, match="has 600 tokens"):
        merged(llama, [[1] * 600, [2]])
    # A thousand tokens in all, but no prompt of more than 400.
    assert merged(llama, [[1] * 400, [2] * 400]).sequences.longest == 400
    with pytest.raises(InputError, match="at least one token"):
        merged(llama, [[1], []])
