"""Every decoder-only family the tests read: its smallest interesting configuration.

``python tests/families.py`` examines them all and writes ``docs/architectures.md``.
"""

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import eyechart
from eyechart.errors import FallbackWarning
from eyechart.models import facts_of
from eyechart.models.convert import build_tiny
from eyechart.probes import why_not_branching

TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"

# Grouped queries, head sizes, experts and windows shorter than the text, wherever there are any.
_GROUPED = {"num_key_value_heads": 2}
_SIZED = {**_GROUPED, "head_dim": 16}
_WINDOW = {"sliding_window": 8}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_DENSE_FIRST = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_LATENT = {
    **_EXPERTS,
    **_DENSE_FIRST,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "topk_method": "greedy",
    "n_shared_experts": 1,
}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_SHARED = {"shared_expert_intermediate_size": 32}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {**_SIZED, **_EXPERTS},
    "apertus": _SIZED,
    "arcee": _SIZED,
    "bamba": {**_GROUPED, **_SSM, "attn_layer_indices": [1]},
    "bitnet": _GROUPED,
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": _GROUPED,
    "cohere2": {**_GROUPED, **_WINDOW},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "ernie4_5": _SIZED,
    "ernie4_5_moe": {**_GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone4": {**_GROUPED, **_WINDOW},
    "falcon": {},
    "falcon_h1": {**_GROUPED, **_SSM, "mamba_d_ssm": 128},
    "flex_olmo": {**_GROUPED, **_EXPERTS},
    "gemma": _SIZED,
    "gemma2": {**_SIZED, **_WINDOW},
    "gemma3_text": {**_SIZED, **_WINDOW},
    "glm": _SIZED,
    "glm4": _SIZED,
    "glm4_moe": {**_SIZED, **_EXPERTS, **_DENSE_FIRST},
    "glm4_moe_lite": _LATENT,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": {**_SIZED, **_EXPERTS, **_WINDOW},
    "gptj": {"rotary_dim": 8},
    "granite": _GROUPED,
    "granitemoe": {**_GROUPED, **_EXPERTS},
    "hunyuan_v1_dense": _SIZED,
    "jais2": _SIZED,
    "jamba": {
        **_GROUPED,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "jetmoe": {},
    "laguna": {**_SIZED, **_EXPERTS},
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {
        **_GROUPED,
        **_EXPERTS,
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "llama": _SIZED,
    "llama4_text": {**_SIZED, **_EXPERTS, "intermediate_size_mlp": 128},
    "minimax_m2": {**_SIZED, **_EXPERTS},
    "ministral3": _SIZED,
    "mistral": {**_SIZED, **_WINDOW},
    "mixtral": {**_SIZED, **_EXPERTS},
    "modernbert-decoder": {},
    "mpt": {},
    "nanochat": _SIZED,
    "nemotron": _SIZED,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "olmo3": {**_GROUPED, **_WINDOW},
    "olmo_hybrid": _GROUPED,
    "olmoe": {**_GROUPED, **_EXPERTS},
    "openai-gpt": {},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128},
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "qwen2": _GROUPED,
    "qwen2_moe": {**_GROUPED, **_EXPERTS, **_SHARED},
    "qwen3": _SIZED,
    "qwen3_5_text": {**_SIZED, "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": {**_SIZED, **_EXPERTS},
    "qwen3_next": {
        **_SIZED,
        **_EXPERTS,
        **_SHARED,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "seed_oss": _SIZED,
    "smollm3": _GROUPED,
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
    "vaultgemma": {**_SIZED, **_WINDOW},
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128},
    "youtu": _LATENT,
}

# Read for their heads, but not for their stream: where it is hooked is not one place in the model.
NO_STREAM = {
    "nanochat": "the final norm's module is used twice a pass",
    "openai-gpt": "blocks end in a norm that no hook of the stream passes through",
}

# Their pattern is read in float32 only. Of some, TransformerBridge shows it only after it was
# rounded; others it cannot run in a half format, because its rotation returns float32.
ROUNDED = {
    "afmoe",
    "gpt_neo",
    "gptj",
    "jamba",
    "jetmoe",
    "laguna",
    "llama4_text",
    "modernbert-decoder",
    "nanochat",
    "olmo_hybrid",
    "opt",
    "xglm",
}
NO_HALF_RUN = {"flex_olmo", "olmo", "olmo2", "olmo3"}

# What information_flow does not give of a family, and which of the reasons it gives: how the result
# says it, and how the page does.
REASONS = {
    "hybrid": (
        "blocks [0-9, ]+ have no attention; what passes between tokens there is in no product",
        "blocks without attention move information between tokens as well, so that no product of "
        "attention matrices says where it goes",
    ),
    "gated": (
        "what its heads move through W_O is not what attention writes .* something acts in between",
        "a gate or a norm acts between the heads and the output projection",
    ),
    "mixed": (
        "what attention wrote is not what the stream gained",
        "another mixer writes beside attention, in the same block",
    ),
    "values": (
        "the values come from no projection of their own",
        "values are not one matrix times the stream (latent attention, or experts)",
    ),
    "output": (
        "attention has no output projection that can be told",
        "the output projection is not one matrix (experts)",
    ),
    "mlp": (
        "MLP cannot be tried by itself|the MLP's part of the stream could not be reproduced",
        "the MLP is no module that can be tried by itself",
    ),
    "own code": (
        "cannot be seen through a lens: layer 0: its attention is code of its own",
        "the backend is pattern, so that no key can be hidden; of `sinks` it has mass and stream "
        "only",
    ),
    "stream": (
        "so what they carry cannot be tied to one place|has no site 'final_norm'",
        "the residual stream is not hooked in one place",
    ),
}
_BEYOND_ROLLOUT = ("path_bound", "norm_rollout", "alti")
_HYBRID = {"hybrid": ("rollout", "topology", *_BEYOND_ROLLOUT)}
_GATED = {"gated": _BEYOND_ROLLOUT}
_LATENT_VALUES = {"values": ("path_bound",)}
_OWN_CODE = {"own code": ("spread_evicted",)}
_ODD_MLP = {"mlp": ("path_bound",)}
FLOW_WITHOUT: dict[str, Mapping[str, tuple[str, ...]]] = {
    "afmoe": _GATED,
    "bamba": _HYBRID,
    "bitnet": _GATED,
    "bloom": {**_ODD_MLP, **_OWN_CODE},
    "codegen": _OWN_CODE,
    "deepseek_v2": _LATENT_VALUES,
    "deepseek_v3": _LATENT_VALUES,
    "falcon": _OWN_CODE,
    "falcon_h1": {"mixed": _BEYOND_ROLLOUT},
    "glm4_moe_lite": _LATENT_VALUES,
    "gpt_neo": _OWN_CODE,
    "gptj": _OWN_CODE,
    "jamba": _HYBRID,
    "jetmoe": {**_LATENT_VALUES, "output": ("norm_rollout", "alti")},
    "laguna": _GATED,
    "lfm2": _HYBRID,
    "lfm2_moe": _HYBRID,
    "mpt": {**_ODD_MLP, **_OWN_CODE},
    "nanochat": {"stream": ("replacement",)},
    "olmo_hybrid": _HYBRID,
    "openai-gpt": {"stream": (*_BEYOND_ROLLOUT, "sensitivity", "replacement", "spread", "sinks")},
    "opt": _ODD_MLP,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "xglm": {**_ODD_MLP, **_OWN_CODE},
    "youtu": _LATENT_VALUES,
}

# Their attention is code of their own, so that only its explicit pattern can be read.
UNFUSED = {"bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "openai-gpt", "xglm"}


@contextmanager
def built(family: str, gain: float = 1) -> Iterator[Path]:
    """A folder with the tiny random model of a family, its matrices multiplied by ``gain``."""
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(family, FAMILIES[family], Path(folder))
        if gain != 1:
            file = Path(folder, "model.safetensors")
            weights = {k: w * gain if w.ndim > 1 else w for k, w in load_file(file).items()}
            save_file(weights, file, metadata={"format": "pt"})
        yield Path(folder)


def beside_plain(family: str, gain: float = 4) -> tuple[Any, Any]:
    """The bridge of a tiny model whose heads have preferences, and transformers' own of it."""
    with built(family, gain) as folder:
        plain = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        return eyechart.load(str(folder), device="cpu"), plain.eval()


def additive_mask(plain: Any, start: Tensor) -> Any:
    """The 4D mask that hides from each query the keys before ``start``, in transformers' form.

    Causal masks and windows included, so that it stands for the one that the model makes itself.
    """
    config, at = plain.config, torch.arange(len(start))

    def written(first: Tensor) -> Tensor:
        hidden = (at[None] > at[:, None]) | (at[None] < first[:, None])
        lowest = torch.finfo(torch.float32).min
        return torch.zeros(hidden.shape).masked_fill(hidden, lowest)[None, None]

    window = getattr(config, "sliding_window", None)
    if window is None:
        return written(start)
    sliding = written(torch.maximum(start, at - window + 1))
    if getattr(config, "layer_types", None) is None:
        return sliding
    return {"full_attention": written(start), "sliding_attention": sliding}


def table() -> str:
    """The page of architectures, from what each family turns out to be when it is examined."""
    lines = [
        "# Architectures",
        "",
        "Decoder-only families whose heads the tests read from a tiny random model, and find equal",
        "to the attention that transformers itself computes, alone and in a padded batch, by the",
        "explicit pattern and, where the table says fused, without it. Written by",
        "`python tests/families.py`; a test keeps it true.",
        "",
        f"{len(FAMILIES) - len(UNFUSED)} of the {len(FAMILIES)} take the fused path. The others "
        "keep their attention in code of",
        'their own: `backend="fused"` reads their pattern, and says so in the result and in one',
        "warning.",
        "",
        f"`head_census` names and tries the heads of all {len(FAMILIES)}. Trials begin at their "
        "layer, in *openai-gpt* at the",
        "embedding. Rotary use, price and `lenses.skip_heads` need the fused path.",
        "",
        f"Of {len(FAMILIES) - len(FLOW_WITHOUT)} families `information_flow` gives every picture. "
        "The last column says what is",
        "missing of the others and why:",
        "",
        *(f"* *{name}*: {said}" for name, (_, said) in REASONS.items()),
        "",
        "*Prompts share* says whether prompts that begin alike can go through as one row, so that",
        "one pass serves a collapse curve whose prompts branch; found by running some both ways.",
        "Where they cannot, such curves are run pair by pair.",
        "",
        "| family | class | attention | backend | half formats | residual stream "
        "| prompts share | information flow |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        with built(family) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            model = eyechart.load(str(folder), device="cpu")
            found = eyechart.attention_statistics(model, "Some text.", backend="fused")
            facts = facts_of(model)
            share = "no" if why_not_branching(model, facts) else "yes"
        said = "every block" if len(facts.attention_layers) == facts.n_layers else "hybrid"
        if found.virtual_sink is not None:
            said += ", learned sinks"
        backend = ", ".join(sorted(set(found.backend) - {"none"}))
        stream = f"refused: {NO_STREAM[family]}" if family in NO_STREAM else "yes"
        pattern_only_full = family in ROUNDED | NO_HALF_RUN
        half = "yes"
        if pattern_only_full:
            half = "float32 only" if family in UNFUSED else "fused only"
        missing = FLOW_WITHOUT.get(family, {}).items()
        flow = "; ".join(f"no {', '.join(names)}: {why}" for why, names in missing) or "all"
        lines.append(
            f"| {family} | {facts.architecture} | {said} | {backend} | {half} | {stream} | {share} "
            f"| {flow} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
