"""A two-layer model of which it is known what every head does, and what it is for.

A Llama with one-hot tokens. Attention by position comes from constant queries and keys that the
rotation alone tells apart (Theorem 5.3 of arXiv 2410.06205); attention by content uses coordinates
that hardly turn. The stream has room for the token, the token before, and what to predict.

    layer 0, head 0: diagonal, predicts what its token is followed by     replaced by the identity
             head 1: diagonal, writes nothing                             by nothing
             head 2: previous token, hands its name on                    cannot be replaced
             head 3: uniform, writes nothing                              by nothing
    layer 1, head 0: sink; reads of the values what the first one lacks   by nothing
             head 1: sink; reads what the first one has                   by the first token's value
             head 2: induction, predicts what it finds                    cannot be replaced
             head 3: induction, writes nothing                            by nothing

Heads 0 and 1 share keys and values, and so do 2 and 3.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eyechart.models import CATALOGUE

VOCABULARY = 16
HEADS, GROUPS, WIDTH = 4, 2, 40
TOKEN, BEFORE, NEXT = 0, VOCABULARY, 2 * VOCABULARY  # where each name begins in the stream
STREAM = 3 * VOCABULARY

KINDS = [
    ["diagonal", "diagonal", "previous-token", "uniform"],
    ["sink", "sink", "induction", "induction"],
]
VERDICTS = [
    [("no-op", "identity"), ("no-op", "zero"), ("active", ""), ("no-op", "zero")],
    [("no-op", "zero"), ("no-op", "first"), ("active", ""), ("no-op", "zero")],
]

_PAIRS = WIDTH // 2
_BASE = 1e12  # pair k turns by 10^(-0.6 k) a token
_FAST = 4  # pairs that tell positions apart
_STILL = 8  # first pair that hardly turns
_SHARP = 100.0


def write_idle_heads(folder: Path, shared: bool) -> None:
    """Write the model; ``shared`` keys and values as above, else each head has its own copy."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=STREAM,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS if shared else HEADS,
        head_dim=WIDTH,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": _BASE},
        attention_bias=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    state = model.state_dict()
    for name, weight in state.items():
        weight.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    names = torch.eye(VOCABULARY)
    state["model.embed_tokens.weight"][:, TOKEN:BEFORE] = names
    state["lm_head.weight"][:, NEXT:] = names
    for layer, build in enumerate((_first_layer, _second_layer)):
        parts = {
            part: torch.zeros(heads, WIDTH, STREAM)
            for part, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS), ("o", HEADS))
        }
        biases = {"q": torch.zeros(HEADS, WIDTH), "k": torch.zeros(GROUPS, WIDTH)}
        build(parts, biases)
        for part in ("k", "v"):
            if not shared:
                parts[part] = parts[part].repeat_interleave(HEADS // GROUPS, dim=0)
        if not shared:
            biases["k"] = biases["k"].repeat_interleave(HEADS // GROUPS, dim=0)
        for part, matrix in parts.items():
            flat = matrix.flatten(0, 1)
            at = f"model.layers.{layer}.self_attn.{part}_proj"
            state[f"{at}.weight"].copy_(flat.T if part == "o" else flat)
            if part in biases:
                state[f"{at}.bias"].copy_(biases[part].flatten())
    model.load_state_dict(state)
    model.save_pretrained(folder)
    # Only so that there is one: the model is given token ids.
    AutoTokenizer.from_pretrained(CATALOGUE["tiny-random-gpt2"].folder()).save_pretrained(folder)


def _first_layer(parts: dict[str, Tensor], biases: dict[str, Tensor]) -> None:
    q, k = biases["q"], biases["k"]
    for pair in range(_FAST):
        q[0, pair] = q[1, pair] = _SHARP
        k[:, pair] = 1.0
        # Turned back by one token's angle, so that the best key is one token earlier.
        angle = torch.tensor(_BASE ** (-2 * pair / WIDTH))
        q[2, pair], q[2, pair + _PAIRS] = _SHARP * angle.cos(), -_SHARP * angle.sin()
    names = torch.eye(VOCABULARY)
    parts["v"][:, :VOCABULARY, TOKEN:BEFORE] = names
    # What follows a token is the one with the next higher number.
    parts["o"][0, :VOCABULARY, NEXT:] = 0.3 * names.roll(1, dims=1)
    parts["o"][2, :VOCABULARY, BEFORE:NEXT] = 0.3 * names


def _second_layer(parts: dict[str, Tensor], biases: dict[str, Tensor]) -> None:
    names, still = torch.eye(VOCABULARY), _content(VOCABULARY)
    first = 0  # the token that stands in front
    # Sinks: a constant query meets keys that only the first token has.
    biases["q"][:2, _STILL] = _SHARP
    parts["k"][0, _STILL, TOKEN + first] = 1.0
    # Values: coordinate t is token t's; of the first token only its own is there.
    parts["v"][:, :VOCABULARY, TOKEN:BEFORE] = names
    parts["o"][0, 1:VOCABULARY, NEXT + 1 :] = 0.5 * names[1:, 1:]
    parts["o"][1, first, NEXT + 3] = 0.6
    # Induction: the token's name meets the name before; at rest, the first token.
    for head in (2, 3):
        parts["q"][head][still, torch.arange(VOCABULARY)] = _SHARP
        biases["q"][head, _STILL] = _SHARP
    parts["k"][1][still, BEFORE + torch.arange(VOCABULARY)] = 1.0
    parts["k"][1, _STILL, TOKEN + first] = 1.0
    parts["o"][2, 1:VOCABULARY, NEXT + 1 :] = 1.5 * names[1:, 1:]


def _content(count: int) -> Tensor:
    """Coordinates that hardly turn, besides the first of them: pair k is (k, k + half)."""
    pairs = range(_STILL + 1, _PAIRS)
    return torch.tensor([c for pair in pairs for c in (pair, pair + _PAIRS)][:count])
