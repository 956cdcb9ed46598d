"""Turning a GGUF file, or nothing at all, into a folder that transformers opens."""

import os
from pathlib import Path
from typing import Any

from eyechart.errors import UsageError
from eyechart.models.quiet import quiet_transformers


def open_gguf(
    path: Path, dtype: Any, device_map: Any = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """The de-quantised model and the tokenizer in a GGUF file.

    Raises:
        UsageError: the file is not a GGUF that transformers can read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers wants the folder and the name apart, and an absolute folder is never a hub name.
    folder, name = os.fspath(path.resolve().parent), path.name
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file=name, trust_remote_code=trust_remote_code
            )
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=name,
                dtype=dtype,
                device_map=device_map,
                quantization_config=GgufConfig(dequantize=True),
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
            )
    except (ValueError, OSError, KeyError, NotImplementedError) as problem:
        raise UsageError(
            f"{str(path)!r} cannot be read as a GGUF model: {problem}. "
            "transformers must know its architecture; is the file complete?"
        ) from problem
    # The weights are plain tensors now; without this transformers refuses to save them.
    plain: Any = model.eval()
    plain.hf_quantizer = None
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    return plain, tokenizer


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in a GGUF file to ``folder`` as float32 safetensors with its tokenizer."""
    import torch

    model, tokenizer = open_gguf(path, torch.float32)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def build_tiny(model_type: str, overrides: dict[str, Any], folder: Path, seed: int = 0) -> None:
    """Write a tiny random model of one architecture to ``folder``, with a byte-level tokenizer.

    Two layers of four heads, 64 dimensions, 512 positions, one token a byte. Weights are the
    architecture's own initialisation, drawn from ``seed``.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    specials = ["<bos>", "<eos>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    config = AutoConfig.for_model(
        model_type,
        **{
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 512,
            "vocab_size": len(vocabulary),
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "tie_word_embeddings": False,
            **overrides,
        },
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
