"""Families of sequences that grow: what the two prompts of a pair are at every length.

A collapse curve compares two prompts that differ by little, at many lengths n. A family says which.
Everything is built token by token, never by tokenising the joined string: tokenisers merge "111"
into one token, and a count of tokens is then no count of digits.
"""

import inspect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from eyechart.errors import InputError, UsageError
from eyechart.sequences import check_vocabulary, fragment, single_token
from eyechart.texts import TEXTS

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Ids = list[int]
Build = Callable[[int], tuple[Ids, ...]]
"""From n to the shorter sequence, the longer one and, where there is one, the control."""


@dataclass(frozen=True)
class Family:
    """Pairs of token sequences that differ by little, one pair a length.

    Attributes:
        name: For titles, tables and file names.
        about: One line: what is compared with what at length n.
        bind: Takes a model, whose tokeniser decides what a token is, and returns the function from
            n to the sequences. It raises InputError where a text is not the tokens it should be.
        control: What the control, a second sequence compared with the shorter one, is; empty where
            there is none.
        lengths: The n there are, None where every n from 1 on is there.
        bare: Whether the longer sequence stands alone, without the prompt and the
            beginning-of-sequence token in front of the shorter one.
        entropy: Nats of a token, where tokens are drawn independently; None elsewhere.
        seed: Of what was drawn, None where nothing was.
    """

    name: str
    about: str
    bind: "Callable[[TransformerBridge], Build]"
    control: str = ""
    lengths: tuple[int, ...] | None = None
    bare: bool = False
    entropy: float | None = None
    seed: int | None = None


def repeat(token: str = "1") -> Family:
    """One token repeated (Barbero et al., arXiv 2406.04267, Figure 5 a and c).

    Args:
        token: One token of the model's.
    """

    def bind(model: "TransformerBridge") -> Build:
        one = single_token(model, token)
        return lambda n: ([one] * n, [one] * (n + 1))

    return Family("repeat", f"{token!r} n times and n + 1 times", bind)


def word(text: str = " poem") -> Family:
    """A word repeated; it may be several tokens (Nasr et al., arXiv 2311.17035, repeat words).

    Args:
        text: The word, with the space in front of it that running text has.
    """

    def bind(model: "TransformerBridge") -> Build:
        unit = fragment(model, text)
        if not unit:
            raise InputError("the repeated word is empty")
        return lambda n: (unit * n, unit * (n + 1))

    return Family("word", f"{text!r} n times and n + 1 times", bind)


def digits(last: str = "1", *, seed: int = 0) -> Family:
    """Digits drawn uniformly, then a last token once and twice (Figure 5 b).

    Args:
        last: The last token; the same at every length, so that lengths can be compared.
        seed: Of the digits; those of a length are the beginning of those of a greater one.
    """
    return _drawn("digits", [str(digit) for digit in range(10)], [1.0] * 10, last, seed)


def bernoulli(p: float = 0.7, tokens: tuple[str, str] = ("0", "1"), *, seed: int = 0) -> Family:
    """Two tokens drawn independently: the entropy of the sequence as a dial.

    p = 1 is one token repeated, p = 0.5 a fair coin. The paper counts ones in p = 0.7 (section 3.2,
    task iii). The sequence ends in the second token once and twice.

    Args:
        p: Probability of the second token.
        tokens: The two.
        seed: As in :func:`digits`.

    Raises:
        UsageError: p is no probability.
    """
    if not 0 <= p <= 1:
        raise UsageError(f"p must be between 0 and 1, got {p}")
    return _drawn(f"bernoulli {p:g}", list(tokens), [1 - p, p], tokens[1], seed)


def alternating(tokens: Sequence[str] = ("0", "1")) -> Family:
    """Tokens in turn, and the last one once more (section 3.1, interleaved; Proposition B.4).

    Args:
        tokens: Two or more.
    """
    if len(tokens) < 2:
        raise UsageError("alternating needs at least two tokens; one is 'repeat'")

    def bind(model: "TransformerBridge") -> Build:
        turn = [single_token(model, token) for token in tokens]

        def build(n: int) -> tuple[Ids, ...]:
            row = (turn * (n // len(turn) + 1))[:n]
            return row, [*row, row[-1]]

        return build

    shown = ", ".join(map(repr, tokens))
    return Family("alternating", f"{shown} in turn, n tokens, and the last one once more", bind)


def separated(
    token: str = "1",
    separator: str = ",",
    every: int = 3,
    *,
    anchor: Literal["left", "right"] = "left",
    trailing: bool = False,
) -> Family:
    """A token repeated with a separator every so many (Figure 5 d), and its negative control.

    Counted from the left (111,111,1) the last token has another place in its group at n + 1, which
    keeps n and n + 1 apart; at n plus a whole group it has the same place, and that is the control:
    what separators preserve is the count modulo the size of a group, not the count. Counted from
    the right (1,111,111), as thousands are written, every place changes at n + 1.

    Args:
        token: What is repeated.
        separator: What stands between groups; it does not count in n.
        every: Tokens in a group.
        anchor: Where counting begins. The paper does not say.
        trailing: Whether a full last group is followed by a separator, which makes the last tokens
            of n and n + 1 different ones and the comparison trivial.

    Raises:
        UsageError: ``every`` is less than 1, ``anchor`` is unknown, or a trailing separator is
            asked for from the right.
    """
    if every < 1:
        raise UsageError(f"every must be at least 1, got {every}")
    if anchor not in ("left", "right"):
        raise UsageError(f"anchor must be 'left' or 'right', got {anchor!r}")
    if trailing and anchor == "right":
        raise UsageError("counted from the right the last group is always full: no trailing=True")

    def bind(model: "TransformerBridge") -> Build:
        one, between = single_token(model, token), single_token(model, separator)

        def row(n: int) -> Ids:
            first = n % every if anchor == "right" else 0
            found = [one] * first
            for start in range(first, n, every):
                found += ([between] if start else []) + [one] * min(every, n - start)
            return [*found, between] if trailing and n % every == 0 else found

        return lambda n: (row(n), row(n + 1), row(n + every))

    return Family(
        f"separated {anchor}",
        f"{token!r} n times and n + 1 times, {separator!r} after every {every} from the {anchor}",
        bind,
        control=f"n and n + {every}",
    )


def text(passage: str | None = None) -> Family:
    """Natural text of n tokens, and its last token once more.

    Args:
        passage: The text; by default the built-in ones, one after the other.
    """

    def bind(model: "TransformerBridge") -> Build:
        whole = fragment(model, "\n\n".join(TEXTS.values()) if passage is None else passage)

        def build(n: int) -> tuple[Ids, ...]:
            if n > len(whole):
                raise InputError(f"n={n}, but the text has {len(whole)} tokens")
            return whole[:n], [*whole[:n], whole[n - 1]]

        return build

    return Family("text", "n tokens of natural text, and the last one once more", bind)


def changed(token: str = "1", other: str = "0", at: int = -1) -> Family:
    """A token repeated, and the same with one of them replaced (the copying tasks, section 3.1).

    Args:
        token: What is repeated.
        other: What takes one's place.
        at: Which: 0 is the first, -1 the last. With the last one the last tokens differ, and the
            residual connection alone keeps the two apart.
    """

    def edit(row: Ids, new: int) -> Ids:
        return [*row[:at], new, *row[at:][1:]]

    return _edited("changed", token, other, at, "replaced by", edit)


def inserted(token: str = "1", other: str = "0", at: int = 0) -> Family:
    """A token repeated, and the same with another one put in.

    Args:
        token: What is repeated.
        other: What is put in.
        at: Before which token: 0 is in front of the first, -1 in front of the last.
    """

    def edit(row: Ids, new: int) -> Ids:
        return [*row[:at], new, *row[at:]]

    return _edited("inserted", token, other, at, "preceded by", edit)


def singleton(token: str = " the") -> Family:
    """A token repeated after a prefix, and the token all by itself.

    Theorem 4.1 of Yona et al., arXiv 2503.08908: where positions act on queries and keys only, the
    last repetition's representation goes to that of the lone token as n grows.

    Args:
        token: What is repeated.
    """

    def bind(model: "TransformerBridge") -> Build:
        one = single_token(model, token)
        return lambda n: ([one] * n, [one])

    return Family("singleton", f"{token!r} n times after a prefix, and once alone", bind, bare=True)


def pairs(given: Sequence[tuple[str | Sequence[int], str | Sequence[int]]]) -> Family:
    """Pairs of your own, each at the length of its first sequence.

    Args:
        given: Pairs of texts or of sequences of token ids, every first one of another length.

    Raises:
        UsageError: there are none, or two have the same length. Lengths of texts depend on the
            tokeniser, so these are numbered 1, 2, 3, ... instead.
    """
    if not given:
        raise UsageError("pairs needs at least one pair")
    texts = any(isinstance(side, str) for each in given for side in each)
    lengths = [index if texts else len(each[0]) for index, each in enumerate(given, start=1)]
    if len(set(lengths)) < len(lengths) or 0 in lengths:
        raise UsageError("the first sequences of pairs must have one length each, at least 1")
    by_length = dict(zip(lengths, given, strict=True))

    def bind(model: "TransformerBridge") -> Build:
        def ids(side: str | Sequence[int]) -> Ids:
            found = fragment(model, side) if isinstance(side, str) else [int(x) for x in side]
            if not found:
                raise InputError("a sequence of a pair is empty: give at least one token")
            check_vocabulary(model, found)
            return found

        return lambda n: tuple(ids(side) for side in by_length[n])

    return Family("pairs", "pairs of your own", bind, lengths=tuple(sorted(lengths)))


FAMILIES: dict[str, Callable[..., Family]] = {
    "repeat": repeat,
    "digits": digits,
    "alternating": alternating,
    "bernoulli": bernoulli,
    "word": word,
    "separated": separated,
    "text": text,
    "changed": changed,
    "inserted": inserted,
    "singleton": singleton,
}
"""The families that need nothing but their defaults, by name."""


def family_named(name: str, **defaults: str | float) -> Family:
    """A family by name, with options where the defaults will not do.

    ``"bernoulli:p=0.9,seed=1"`` is ``bernoulli(p=0.9, seed=1)``.

    Args:
        name: Name and options.
        defaults: Options for families that have them and were given none of that name.

    Raises:
        UsageError: there is none of that name, or it has no such option; says which there are.
    """
    base, _, written = name.partition(":")
    if base not in FAMILIES:
        raise UsageError(f"unknown family {base!r}; there are {', '.join(FAMILIES)}")
    make = FAMILIES[base]
    there = {
        option.name: option.default
        for option in inspect.signature(make).parameters.values()
        if isinstance(option.default, str | int | float)
    }
    options: dict[str, Any] = {key: defaults[key] for key in defaults if key in there}
    for option in filter(None, written.split(",")):
        key, equals, value = option.partition("=")
        if key not in there or not equals:
            known = ", ".join(f"{key}={default!r}" for key, default in there.items()) or "none"
            raise UsageError(f"{base} has no option {option!r}; its options are {known}")
        kind = type(there[key])
        try:
            options[key] = value.lower() in ("1", "true", "yes") if kind is bool else kind(value)
        except ValueError as problem:
            raise UsageError(f"{key} of {base} is a {kind.__name__}, not {value!r}") from problem
    return make(**options)


def _drawn(name: str, tokens: Sequence[str], weights: list[float], last: str, seed: int) -> Family:
    # Drawn on demand, so that the n first do not depend on how many are asked for.
    draw, drawn = random.Random(seed), []

    def choices(n: int) -> list[str]:
        while len(drawn) < n:
            drawn.append(draw.choices(tokens, weights)[0])
        return drawn[:n]

    def bind(model: "TransformerBridge") -> Build:
        ids = {token: single_token(model, token) for token in {*tokens, last}}

        def build(n: int) -> tuple[Ids, ...]:
            row = [*(ids[token] for token in choices(n - 1)), ids[last]]
            return row, [*row, ids[last]]

        return build

    total = sum(weights)
    shares = [weight / total for weight in weights if weight]
    return Family(
        name,
        f"n - 1 tokens drawn from {', '.join(map(repr, tokens))}, then {last!r} once and twice",
        bind,
        entropy=-sum(share * math.log(share) for share in shares),
        seed=seed,
    )


def _edited(
    name: str, token: str, other: str, at: int, words: str, edit: Callable[[Ids, int], Ids]
) -> Family:
    def bind(model: "TransformerBridge") -> Build:
        one, new = single_token(model, token), single_token(model, other)

        def build(n: int) -> tuple[Ids, ...]:
            if not -n <= at < n:
                raise InputError(f"n={n} tokens have no token {at}; begin with n={_least(at)}")
            row = [one] * n
            return row, edit(row, new)

        return build

    where = {0: "first", -1: "last"}.get(at, str(at))
    about = f"{token!r} n times, and the same with the {where} one {words} {other!r}"
    return Family(f"{name} {where}", about, bind)


def _least(at: int) -> int:
    return at + 1 if at >= 0 else -at
