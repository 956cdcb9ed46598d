"""Tokens: one place, BOS explicit, fragments untouched, padding right."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

import eyechart
from eyechart import sequences
from eyechart.errors import InputError, UsageError
from eyechart.results import Sequences


def test_bos_is_explicit_and_never_doubled(llama):
    with_bos = sequences.prepare(llama, "ab", prepend_bos=True)
    without = sequences.prepare(llama, "ab", prepend_bos=False)
    bos = llama.tokenizer.bos_token_id
    assert with_bos.tokens.tolist() == [[bos, *without.tokens[0].tolist()]]
    assert (with_bos.prepend_bos, without.prepend_bos) == (True, False)
    assert bos not in without.tokens
    typed = sequences.prepare(llama, llama.tokenizer.bos_token + "ab", prepend_bos=True)
    assert torch.equal(typed.tokens, with_bos.tokens)


def test_default_follows_transformer_lens(llama, default_model):
    for model in (llama, default_model):
        ours = sequences.prepare(model, "The quick brown fox").tokens
        assert torch.equal(ours, model.to_tokens("The quick brown fox"))


def test_fragments_of_a_tokenizer_that_insists_on_bos(llama):
    tokenizer = llama.tokenizer
    stubborn = SimpleNamespace(
        encode=lambda text, add_special_tokens=True: [0, *tokenizer.encode(text)[1:]],
        decode=tokenizer.decode,
        bos_token_id=0,
    )
    model = SimpleNamespace(tokenizer=stubborn, cfg=llama.cfg)
    plain = tokenizer.encode("ab", add_special_tokens=False)
    assert sequences.fragment(model, "ab") == plain  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1).filter(str.strip))
def test_every_text_comes_back_from_its_tokens(llama, text):
    if any(special in text for special in ("<bos>", "<eos>", "<pad>")):
        return
    made = sequences.prepare(llama, text, prepend_bos=False)
    # One token a byte: nothing lost, nothing added, order kept.
    assert made.tokens.shape[1] == len(text.encode("utf-8", errors="strict"))
    assert llama.tokenizer.decode(made.tokens[0]) == text


def test_repeated_tokens_and_digits_are_never_merged(default_model):
    ones = sequences.repeated(default_model, "1", 7, prepend_bos=False)
    assert ones.labels == (("1",) * 7,)
    words = sequences.repeated(default_model, " the", 3, prompt="Say: ", prepend_bos=True)
    assert words.labels[0][-3:] == (" the",) * 3
    assert words.tokens[0, 0] == default_model.tokenizer.bos_token_id
    digits = sequences.digits(default_model, "110100111", prepend_bos=False)
    assert digits.labels == (tuple("110100111"),)


def test_a_unit_of_several_tokens_is_refused_with_its_pieces(default_model):
    with pytest.raises(InputError, match=r"' observatories' is \d tokens .*\(' observ"):
        sequences.repeated(default_model, " observatories", 3)
    with pytest.raises(InputError, match="is 3 tokens"):
        sequences.digits(eyechart.load("tiny-random-llama", device="cpu"), "1世")


def test_a_pair_is_a_padded_batch(llama):
    made = sequences.pair(llama, "111", "1111", prompt="n: ")
    assert made.lengths == (7, 8)
    assert made.mask.tolist() == [[True] * 7 + [False], [True] * 8]
    assert made.labels[0] == ("<bos>", "n", ":", " ", "1", "1", "1")
    with pytest.raises(InputError):
        sequences.pair(llama, "", "1")


def test_partial_characters_keep_a_readable_name(llama):
    made = sequences.prepare(llama, "é", prepend_bos=False)
    assert len(made.labels[0]) == 2
    assert not any("\ufffd" in label for label in made.labels[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ([], "none"),
        (["fine", ""], "prompt 1 is empty"),
        (torch.zeros(1, 0, dtype=torch.long), "empty"),
        (torch.zeros(1, 3), "integer tensor"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "integer tensor"),
        (torch.tensor([[1, 259]]), "token id 259 is outside"),
        (torch.tensor([[1, -1]]), "token id -1 is outside"),
        ("x" * 512, "has 513 tokens, but tiny-random-llama sees at most 512. Shorten it by 1 "),
    ],
)
def test_what_does_not_fit_is_refused_before_a_pass(llama, inputs, message):
    def no_pass(*args, **kwargs):
        raise AssertionError("a forward pass was paid for")

    with (
        llama.hooks(fwd_hooks=[("hook_embed", no_pass)]),
        pytest.raises(InputError, match=message),
    ):
        eyechart.attention_statistics(llama, inputs)


def test_the_longest_text_that_fits_is_taken(llama):
    assert sequences.prepare(llama, "x" * 511, prepend_bos=True).lengths == (512,)


def test_wrong_usage(llama):
    with pytest.raises(UsageError, match="applies to text"):
        sequences.prepare(llama, torch.tensor([[3]]), prepend_bos=True)
    with pytest.raises(UsageError, match="at least 1"):
        sequences.repeated(llama, "1", 0)


def test_sequences_keep_their_invariants():
    tokens, mask = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[True, True, False]])
    made = Sequences(tokens, mask, (("a", "b"),))
    assert made.lengths == (2,)
    assert made.first_tokens(1).labels == (("a",),)
    with pytest.raises(ValueError, match="right padding"):
        Sequences(tokens, mask.flip(1), (("a", "b"),))
    with pytest.raises(ValueError, match="exactly the real tokens"):
        Sequences(tokens, mask, (("a",),))


def test_digest_depends_on_real_tokens_only():
    def made(pad, last):
        return Sequences.from_rows([[5, last], [5]], [["a", "b"], ["a"]], pad=pad).digest

    assert made(0, 6) == made(9, 6) != made(0, 7)


def test_tokenizer_with_a_template_is_not_asked_to_use_it(llama):
    """A post-processor that frames every text must not reach the middle of a sequence."""
    tokenizer = llama.tokenizer
    core = tokenizer.backend_tokenizer
    before = core.post_processor
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    try:
        made = sequences.prepare(llama, "ab", prepend_bos=True)
    finally:
        core.post_processor = before
    assert made.labels == (("<bos>", "a", "b"),)
