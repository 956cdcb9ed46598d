"""What the statistics of every head cost on a GPU, over the model's own fused forward pass.

    python benchmarks/attention_statistics_gpu.py [--length 32768] [--repeats 5] [--write]

A random model of the shape of Llama 3 8B in bfloat16: its forward pass in transformers with SDPA
(flash attention), no logits, against ``eyechart.attention_statistics`` with ``backend="fused"`` and
all default statistics. Seconds are the best of the repeats. ``--write`` keeps the result in
``benchmarks/results``. Without a CUDA device it says so and exits with 1.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SEED = 0
RESULT = Path(__file__).parent / "results" / "attention_statistics_gpu.json"


LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def measure(shape: dict[str, Any], length: int, repeats: int) -> dict[str, Any]:
    """A random Llama of some shape, bfloat16: fused statistics over its own forward pass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import eyechart
    from eyechart.probes.provenance import versions

    torch.manual_seed(SEED)
    config = LlamaConfig(**shape, max_position_embeddings=length)
    with torch.device("cuda"):
        plain = LlamaForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    ids = torch.randint(0, config.vocab_size, (1, length), device="cuda")
    with torch.no_grad():
        alone, alone_peak = timed(lambda: plain.model(ids, use_cache=False), repeats)
    model = bridge_around(plain)
    both, both_peak = timed(
        lambda: eyechart.attention_statistics(model, ids, backend="fused"), repeats
    )
    return {
        "versions": versions(),
        "seed": SEED,
        "dtype": "bfloat16",
        "device": torch.cuda.get_device_name(),
        "length": length,
        "plain seconds": alone,
        "fused seconds": both,
        "ratio": both / alone,
        "plain peak bytes": alone_peak,
        "fused peak bytes": both_peak,
    }


def bridge_around(plain: Any) -> Any:
    """A bridge that wraps these very weights. Random weights have no tokenizer: any will do."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    from eyechart.models import CATALOGUE

    with tempfile.TemporaryDirectory() as folder:
        plain.config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(CATALOGUE["tiny-random-llama"].folder()).save_pretrained(
            folder
        )
        return TransformerBridge.boot_transformers(
            folder, hf_model=plain, dtype=torch.bfloat16, device="cuda"
        )


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, int]:
    """Best seconds and the peak of the allocator, after one run for nothing."""
    run()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was measured")
    found = json.dumps(measure(LLAMA_3_8B, given.length, given.repeats), indent=1)
    print(found)
    if given.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
