"""What a loaded model is, checked once: causal, with attention, finite weights; and its hash."""

import hashlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eyechart.errors import InputError, NonFiniteError, UnsupportedModelError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class ModelFacts:
    """What capture and provenance need to know of a model.

    Attributes:
        name: As it was loaded.
        architecture: Class name of the wrapped model.
        n_layers: Blocks.
        n_ctx: Positions it can see, None where nothing limits them.
        vocabulary: Token ids it accepts.
        attention_layers: Blocks that have attention.
        weights: SHA-256 of all parameters.
        dtype: Number format of the parameters.
        device: Where the embedding lives.
    """

    name: str
    architecture: str
    n_layers: int
    n_ctx: int | None
    vocabulary: int
    attention_layers: tuple[int, ...]
    weights: str
    dtype: torch.dtype
    device: str


_KNOWN: "weakref.WeakKeyDictionary[Any, tuple[object, ModelFacts]]" = weakref.WeakKeyDictionary()


def facts_of(model: "TransformerBridge") -> ModelFacts:
    """The facts of a bridge; checked and hashed anew only when its weights have changed.

    Raises:
        UnsupportedModelError: not a TransformerBridge, not causal, or no block has attention.
        NonFiniteError: NaN or infinity in the weights; names the layer.
    """
    check_structure(model)
    # A tensor's version counts in-place edits, its address replacement: together, "unchanged".
    state = tuple((name, p.data_ptr(), p._version) for name, p in _weights(model))
    known = _KNOWN.get(model)
    if known is not None and known[0] == state:
        return known[1]
    check_finite(model)
    config = model.cfg
    facts = ModelFacts(
        name=str(config.model_name),
        architecture=str(config.architecture),
        n_layers=int(config.n_layers),
        n_ctx=int(config.n_ctx) if config.n_ctx else None,
        vocabulary=int(config.d_vocab),
        attention_layers=attention_layers(model),
        weights=_hash(model),
        dtype=next(p.dtype for _, p in _weights(model) if p.is_floating_point()),
        device=str(config.device),
    )
    _KNOWN[model] = (state, facts)
    return facts


def opened_with(weights: str) -> list["TransformerBridge"]:
    """Models in this process whose facts were asked for and that have these weights, by hash."""
    known = [model for model, (_, facts) in _KNOWN.items() if facts.weights == weights]
    return [model for model in known if facts_of(model).weights == weights]


def attention_layers(model: "TransformerBridge") -> tuple[int, ...]:
    """Blocks whose attention pattern can be hooked."""
    hooks = model.hook_dict
    return tuple(
        layer
        for layer in range(int(model.cfg.n_layers))
        if f"blocks.{layer}.attn.hook_pattern" in hooks
    )


def check_structure(model: "TransformerBridge") -> None:
    """Refuse what eyechart cannot examine, with the reason. Costs nothing."""
    if not hasattr(model, "hook_dict") or not hasattr(model, "original_model"):
        raise UnsupportedModelError(
            f"expected a TransformerBridge, got {type(model).__name__}: "
            "open the model with eyechart.load(name) or TransformerBridge.boot_transformers(name)."
        )
    name = model.cfg.model_name
    causal = getattr(model.cfg, "attention_dir", "causal") == "causal"
    if not causal or not getattr(model.adapter, "supports_causal_loss", True):
        raise UnsupportedModelError(
            f"{name} ({model.cfg.architecture}) is not causal: its tokens see what comes after "
            "them, so nothing flows toward the start. eyechart examines decoder-only language "
            "models."
        )
    if not attention_layers(model):
        raise UnsupportedModelError(
            f"{name} ({model.cfg.architecture}) has no attention to look at: none of its "
            f"{model.cfg.n_layers} blocks computes an attention pattern. eyechart examines "
            "models with softmax attention, hybrids included."
        )


def check_evaluating(model: "TransformerBridge") -> None:
    """Refuse a model in training mode.

    Raises:
        InputError: dropout would make every number random.
    """
    if model.training:
        raise InputError(
            "the model is in training mode, where dropout makes every number random; "
            "call model.eval() first."
        )


def check_finite(model: "TransformerBridge") -> None:
    """Refuse NaN or infinity in the weights, naming the parameter and with it the layer."""
    for name, weight in _weights(model):
        if weight.is_floating_point() and (bad := int((~weight.isfinite()).sum())):
            raise NonFiniteError(
                f"{name} of {model.cfg.model_name} holds {bad} NaN or infinite values of "
                f"{weight.numel()}: the weights are damaged. Load them again from their source."
            )


def _weights(model: "TransformerBridge") -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, under the name it has in the wrapped model."""
    seen: set[int] = set()
    for name, weight in model.original_model.named_parameters():
        if weight.device.type != "meta" and id(weight) not in seen:
            seen.add(id(weight))
            yield (
                name.replace("_original_component.", "").replace(".original_component", ""),
                weight,
            )


def _hash(model: "TransformerBridge") -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(_weights(model), key=lambda item: item[0]):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        content = weight.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
        digest.update(content.numpy().data)
    return digest.hexdigest()
