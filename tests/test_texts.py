"""Built-in texts: of one length, told apart by their names, each written once."""

import itertools
import re

import pytest

from eyechart.sequences import BUILT_IN_PROMPT, fragment
from eyechart.texts import DOMAINS, TEXTS

WORDS = 6
"""Words in a row that two texts may not share."""


def phrases(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


@pytest.mark.parametrize("name", TEXTS)
def test_length_in_tokens(default_model, name):
    assert 90 <= len(fragment(default_model, TEXTS[name])) <= 160


def test_names_are_plain_and_every_text_has_a_domain():
    assert len(TEXTS) >= 10 and list(DOMAINS) == list(TEXTS)
    assert all(re.fullmatch("[a-z]+", name) for name in TEXTS)
    assert {"prose", "code", "mathematics", "other language"} <= set(DOMAINS.values())


def test_no_text_repeats_another():
    found = {**TEXTS, "built in": BUILT_IN_PROMPT}
    for (_, left), (_, right) in itertools.combinations(found.items(), 2):
        assert not phrases(left) & phrases(right)


def test_texts_are_what_they_say_they_are():
    compile(TEXTS["python"], "python", "exec")
    for text in TEXTS.values():
        assert text.strip() and "\N{REPLACEMENT CHARACTER}" not in text
    # Umlauts and accents: other languages must not be plain ASCII with foreign words.
    assert not TEXTS["german"].isascii() and not TEXTS["french"].isascii()
