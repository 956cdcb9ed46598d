"""What the model looks at: text, repeated tokens, digit strings, pairs.

The one place that tokenises. Fragments are tokenised without special tokens, and the
beginning-of-sequence token is put in front explicitly or not at all, because half of what eyechart
measures (sinks, collapse of identical tokens, massive activations) flips with it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eyechart.errors import InputError, UsageError
from eyechart.results.sequences import Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Inputs = str | Sequence[str] | Tensor | Sequences

BUILT_IN_PROMPT = (
    "The old observatory stood on the hill above the harbour, and every clear evening its "
    "keeper climbed the ninety steps to the dome. She carried a lamp, a notebook and a flask of "
    "tea. Ships came and went below, but she rarely looked at them; her eyes were on the slow "
    "wheel of the stars, which she had drawn so often that she knew them as other people know "
    "the streets of their town. One night in October a light appeared where no light should "
    "have been. It was faint at first, a little west of the brightest star in the Swan, and it "
    "did not twinkle. She wrote down the hour and the position, waited, measured again, and "
    "found that it had moved. By morning she had filled four pages with figures. The harbour "
    "master laughed when she told him, but the next evening he climbed the ninety steps "
    "himself, and when he put his eye to the telescope he stopped laughing."
)


def prepare(
    model: "TransformerBridge",
    inputs: Inputs | None,
    *,
    prepend_bos: bool | None = None,
    name: str = "prompt",
) -> Sequences:
    """Tokens of whatever a user may hand in, checked against the model.

    Args:
        model: Whose tokenizer and limits apply.
        inputs: A string, several strings, token ids ``[batch position]`` (or ``[position]``), or
            Sequences made before; None takes a short original English text.
        prepend_bos: Put the beginning-of-sequence token in front; None does as TransformerLens
            resolves it for this model. A string that starts with that token already is left as it
            is. Token ids are taken as they are.
        name: What the sequences are, for titles.

    Raises:
        InputError: empty, longer than the context, or with ids outside the vocabulary.
    """
    if inputs is None:
        inputs, name = BUILT_IN_PROMPT, "built-in prompt"
    if isinstance(inputs, Sequences):
        made = inputs
    elif isinstance(inputs, Tensor):
        made = _from_ids(model, inputs, prepend_bos, name)
    else:
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError("inputs must be a string, strings, token ids or Sequences; got none")
        for index, text in enumerate(texts):
            if not text.strip():
                where = f" {index}" if len(texts) > 1 else ""
                raise InputError(f"prompt{where} is empty: give at least one visible character.")
        bos = _bos(model, prepend_bos)
        rows = []
        for text in texts:
            ids = fragment(model, text)
            rows.append(ids if ids[: len(bos)] == bos and bos else bos + ids)
        made = from_ids(model, rows, prepend_bos=bool(bos), name=name)
    check_fits(model, made)
    return made


def repeated(
    model: "TransformerBridge",
    token: str,
    count: int,
    *,
    prompt: str = "",
    prepend_bos: bool | None = None,
) -> Sequences:
    """``token`` repeated ``count`` times after an optional prompt, built token by token.

    Raises:
        InputError: ``token`` is not a single token here, or the sequence does not fit.
        UsageError: count is less than 1.
    """
    if count < 1:
        raise UsageError(f"count must be at least 1, got {count}")
    return _assembled(
        model,
        [[single_token(model, token)] * count],
        prompt=prompt,
        prepend_bos=prepend_bos,
        name=f"{token!r} × {count}",
    )


def digits(
    model: "TransformerBridge",
    text: str,
    *,
    prompt: str = "",
    prepend_bos: bool | None = None,
) -> Sequences:
    """A string of digits (or any characters) as one token each, never merged.

    Tokenisers merge "111" into one token; a count of tokens is then no count of digits.

    Raises:
        InputError: a character is not a single token here, or the sequence does not fit.
    """
    if not text:
        raise InputError("the digit string is empty")
    ids = {character: single_token(model, character) for character in set(text)}
    return _assembled(
        model,
        [[ids[character] for character in text]],
        prompt=prompt,
        prepend_bos=prepend_bos,
        name=f"{len(text)} digits",
    )


def pair(
    model: "TransformerBridge",
    first: str,
    second: str,
    *,
    prompt: str = "",
    prepend_bos: bool | None = None,
) -> Sequences:
    """Two character strings, one token a character, as one batch of two rows to be compared.

    Raises:
        InputError: as :func:`digits`.
    """
    if not first or not second:
        raise InputError("both strings of a pair must have at least one character")
    ids = {character: single_token(model, character) for character in {*first, *second}}
    return _assembled(
        model,
        [[ids[character] for character in text] for text in (first, second)],
        prompt=prompt,
        prepend_bos=prepend_bos,
        name="pair",
    )


def prefix(
    model: "TransformerBridge", prompt: str = "", *, prepend_bos: bool | None = None
) -> tuple[list[int], bool]:
    """Token ids that stand in front of what is built token by token, and whether they begin with
    the beginning-of-sequence token.

    Raises:
        UsageError: the token is asked for, and the tokeniser has none.
    """
    bos = _bos(model, prepend_bos)
    return bos + (fragment(model, prompt) if prompt else []), bool(bos)


def fragment(model: "TransformerBridge", text: str) -> list[int]:
    """Token ids of a piece of text, with no special token added at either end."""
    tokenizer = _tokenizer(model)
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    # Some tokenizers add BOS even so; what they add to nothing is not part of the text.
    added = list(tokenizer.encode("", add_special_tokens=False))
    return ids[len(added) :] if added and ids[: len(added)] == added else ids


def single_token(model: "TransformerBridge", text: str) -> int:
    """The id of a text that is one token inside running text.

    Raises:
        InputError: it is several tokens; says which.
    """
    ids = fragment(model, text)
    if len(ids) != 1:
        # SentencePiece puts a word boundary in front of a lone fragment; inside text there is none.
        anchor = fragment(model, "\n")
        after = fragment(model, "\n" + text)
        if after[: len(anchor)] == anchor and len(after) == len(anchor) + 1:
            return after[-1]
        pieces = ", ".join(repr(piece) for piece in readable(model, ids))
        raise InputError(
            f"{text!r} is {len(ids)} tokens in this tokenizer ({pieces}), but exactly one "
            "is needed here. Choose a shorter one, such as '1' or ' the'."
        )
    return ids[0]


def from_ids(
    model: "TransformerBridge",
    rows: Sequence[Sequence[int]],
    *,
    prepend_bos: bool | None = None,
    name: str = "prompt",
) -> Sequences:
    """Rows of token ids, right-padded to one length and labelled."""
    tokenizer = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    ids = [list(map(int, row)) for row in rows]
    if not ids or not all(ids):
        raise InputError("every sequence needs at least one token")
    labels = [readable(model, row) for row in ids]
    # The padding id is never seen by a real token; any id the embedding accepts will do.
    return Sequences.from_rows(ids, labels, pad=pad or 0, prepend_bos=prepend_bos, name=name)


def readable(model: "TransformerBridge", ids: Sequence[int]) -> list[str]:
    """Tokens as text; a token that is only part of a character keeps the tokenizer's own name."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [str(index) for index in ids]
    names = {}
    for index in set(ids):
        text = tokenizer.decode([index], clean_up_tokenization_spaces=False)
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            text = str(tokenizer.convert_ids_to_tokens(index) or index)
        names[index] = text
    return [names[index] for index in ids]


def other_bos(model: "TransformerBridge", sequences: Sequences) -> Sequences | None:
    """The same text with the beginning-of-sequence token taken away, or put in front.

    None where there is nothing to compare with: token ids were given, the model has no such token,
    a text consists of nothing else, or the longer text does not fit the context.
    """
    if sequences.prepend_bos is None or getattr(model, "tokenizer", None) is None:
        return None
    bos = getattr(_tokenizer(model), "bos_token_id", None)
    rows = [
        row[:length]
        for row, length in zip(sequences.tokens.tolist(), sequences.lengths, strict=True)
    ]
    if bos is None or (sequences.prepend_bos and min(sequences.lengths) < 2):
        return None
    limit = model.cfg.n_ctx
    if not sequences.prepend_bos and limit and max(sequences.lengths) >= limit:
        return None
    rows = [row[1:] if sequences.prepend_bos else [int(bos), *row] for row in rows]
    return from_ids(model, rows, prepend_bos=not sequences.prepend_bos, name=sequences.name)


def check_fits(model: "TransformerBridge", sequences: Sequences) -> None:
    """Refuse what the model cannot take, before a forward pass is paid for.

    Raises:
        InputError: longer than the context, or ids outside the vocabulary.
    """
    longest, limit = sequences.longest, model.cfg.n_ctx
    if limit and longest > limit:
        raise InputError(
            f"the prompt has {longest} tokens, but {model.cfg.model_name} sees at most {limit}. "
            f"Shorten it by {longest - limit} tokens or choose a model with a longer context."
        )
    check_vocabulary(model, sequences.tokens)


def check_vocabulary(model: "TransformerBridge", ids: Tensor | Sequence[int]) -> None:
    """Refuse token ids that the embedding does not have.

    Raises:
        InputError: says which, and what there is.
    """
    low, high = (int(torch.as_tensor(ids).aminmax()[which]) for which in (0, 1))
    if low < 0 or high >= model.cfg.d_vocab:
        raise InputError(
            f"token id {low if low < 0 else high} is outside the vocabulary of "
            f"{model.cfg.model_name} (0 to {model.cfg.d_vocab - 1})."
        )


def _assembled(
    model: "TransformerBridge",
    bodies: list[list[int]],
    *,
    prompt: str,
    prepend_bos: bool | None,
    name: str,
) -> Sequences:
    head, bos = prefix(model, prompt, prepend_bos=prepend_bos)
    made = from_ids(model, [head + body for body in bodies], prepend_bos=bos, name=name)
    check_fits(model, made)
    return made


def _from_ids(
    model: "TransformerBridge", ids: Tensor, prepend_bos: bool | None, name: str
) -> Sequences:
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim not in (1, 2):
        raise InputError(
            "token ids must be an integer tensor [batch position], "
            f"got {ids.dtype} {tuple(ids.shape)}"
        )
    if prepend_bos is not None:
        raise UsageError("prepend_bos applies to text; put the token in front of the ids yourself")
    if ids.numel() == 0:
        raise InputError("the token tensor is empty: give at least one token")
    check_vocabulary(model, ids)  # before labels are made: decoding a wild id may crash
    return from_ids(model, ids.reshape(-1, ids.shape[-1]).tolist(), name=name)


def _bos(model: "TransformerBridge", prepend_bos: bool | None) -> list[int]:
    wanted = getattr(model.cfg, "default_prepend_bos", True) if prepend_bos is None else prepend_bos
    if not wanted:
        return []
    bos = getattr(_tokenizer(model), "bos_token_id", None)
    if bos is None:
        if prepend_bos:
            raise UsageError(
                f"prepend_bos=True, but the tokenizer of {model.cfg.model_name} has no such token"
            )
        return []
    return [int(bos)]


def _tokenizer(model: "TransformerBridge") -> Any:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError(
            f"{model.cfg.model_name} has no tokenizer: give token ids [batch position] instead."
        )
    return tokenizer
