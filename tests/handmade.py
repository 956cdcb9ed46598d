"""A two-layer model whose attention is known by construction.

A GPT-2 whose token embedding is zero and whose position embedding is one-hot, so that queries and
keys see positions only; attention and MLP write nothing, so that both blocks see the same stream.

    layer 0: head 0 diagonal, head 1 previous token
    layer 1: head 0 sink, head 1 uniform
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from eyechart.models import CATALOGUE

POSITIONS = 16
GAIN = 40.0


def write_handmade(folder: Path) -> None:
    """Write the model to ``folder`` with the byte-level tokenizer of the tiny models."""
    tokenizer = AutoTokenizer.from_pretrained(CATALOGUE["tiny-random-gpt2"].folder())
    width = 2 * POSITIONS  # two heads, each as wide as there are positions
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    state = model.state_dict()
    for name, weight in state.items():
        weight.zero_()
        if "ln_" in name and name.endswith("weight"):
            weight.fill_(1.0)
    state["transformer.wpe.weight"][:, :POSITIONS] = torch.eye(POSITIONS)
    same = torch.eye(POSITIONS)
    shift = torch.eye(POSITIONS).roll(1, dims=1)  # position i becomes one-hot at i + 1
    # c_attn maps the stream to [q of both heads, k of both heads, v of both heads].
    first, second = (state[f"transformer.h.{layer}.attn.c_attn.weight"] for layer in range(2))
    head = [slice(0, POSITIONS), slice(POSITIONS, width)]
    q, k = head, [slice(width + s.start, width + s.stop) for s in head]
    first[:POSITIONS, q[0]], first[:POSITIONS, k[0]] = GAIN * same, same
    # The query of i meets the key of j where i == j + 1.
    first[:POSITIONS, q[1]], first[:POSITIONS, k[1]] = GAIN * same, shift
    bias = state["transformer.h.1.attn.c_attn.bias"]
    bias[q[0]] = GAIN  # every query asks the same of every key ...
    second[0, k[0]] = 1.0  # ... and position 0 has the most of it
    # Head 1 of layer 1 stays zero: all scores equal.
    assert second[:, q[1]].abs().sum() == 0
    model.load_state_dict(state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
