"""Built-in texts: of one length, told apart by their names, each written once."""

import collections
import itertools
import re

import pytest

from eyechart.sequences import BUILT_IN_PROMPT, fragment
from eyechart.texts import DOMAINS, HELD_OUT, TEXTS, UNSEEN

WORDS = 6
"""Words in a row that two texts may not share."""

CHARACTERS = 40
"""Characters in a row that two texts may not share, spaces and punctuation among them."""

ALL = {**TEXTS, **HELD_OUT, **UNSEEN}
"""The texts of the three sets; that no name hides another is tested below."""

QUOTED, LABELLED, STAMPED = r'"', r"[A-Z]+: ", r"\[\d\d:\d\d\] \w+: "
"""How a line of a dialogue begins, in the layouts of TEXTS, HELD_OUT and UNSEEN."""


def phrases(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def stretches(text):
    return {text[i : i + CHARACTERS] for i in range(len(text) - CHARACTERS + 1)}


def domains(texts):
    return collections.Counter(DOMAINS[name] for name in texts)


@pytest.mark.parametrize("name", ALL)
def test_length_in_tokens(default_model, name):
    assert 105 <= len(fragment(default_model, ALL[name])) <= 135


def test_names_are_plain_and_every_text_has_a_domain():
    assert len(TEXTS) >= 10 and len(ALL) == len(TEXTS) + len(HELD_OUT) + len(UNSEEN)
    assert list(DOMAINS) == [*TEXTS, *HELD_OUT, *UNSEEN]
    assert all(re.fullmatch("[a-z]+", name) for name in ALL)
    assert {"prose", "code", "mathematics", "other language"} <= set(DOMAINS.values())


def test_sets_cover_the_same_domains():
    assert domains(HELD_OUT) == domains(TEXTS)
    assert domains(UNSEEN) == dict.fromkeys(domains(TEXTS), 1)


def test_no_text_repeats_another():
    found = {**ALL, "built in": BUILT_IN_PROMPT}
    assert len(set(found.values())) == len(found)
    for (left, one), (right, other) in itertools.combinations(found.items(), 2):
        assert not phrases(one) & phrases(other), (left, right)
        assert not stretches(one) & stretches(other), (left, right)


def test_texts_are_what_they_say_they_are():
    compile(TEXTS["python"], "python", "exec")
    for text in ALL.values():
        assert text.strip() and "\N{REPLACEMENT CHARACTER}" not in text
    for name in ("javascript", "c"):
        text = ALL[name]
        assert all(text.count(left) == text.count(right) for left, right in ("()", "{}", "[]"))
    assert HELD_OUT["shell"].startswith("#!/bin/sh\n")
    # Umlauts and accents: other languages must not be plain ASCII with foreign words.
    assert not any(ALL[name].isascii() for name in ALL if DOMAINS[name] == "other language")


@pytest.mark.parametrize(
    ("text", "own"),
    [
        (TEXTS["dialogue"], QUOTED),
        (HELD_OUT["interview"], LABELLED),
        (UNSEEN["chat"], STAMPED),
    ],
    ids=["quoted", "labelled", "stamped"],
)
def test_every_dialogue_has_a_layout_of_its_own(text, own):
    for line in filter(None, text.splitlines()):
        assert [way for way in (QUOTED, LABELLED, STAMPED) if re.match(way, line)] == [own]
