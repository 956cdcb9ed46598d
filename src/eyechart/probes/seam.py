"""The place where a layer's attention is computed, taken over for the length of a run.

In a TransformerBridge the module that an attention component wraps hands queries, keys and values,
after rotation and norms, to the attention function its configuration names. Inside
:func:`taken_over` the chosen layers run that module's own forward pass with eyechart's function
named, in place of the bridge's explicit softmax; everything around it, the residual stream and its
hooks included, is as before. All of it is bound to this model's modules and taken back on leaving,
whatever happens; what other models in the process do is untouched.
"""

import copy
import types
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.configuration_utils import PreTrainedConfig

from eyechart.errors import EyechartError
from eyechart.kernels import AttentionCall
from eyechart.probes.in_force import InForce
from eyechart.probes.masks import IrregularMaskError, Visible, starts_of, visible

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

NAME = "eyechart"

# Arguments of attention functions that change neither scores nor mask (the mask carries windows).
_HARMLESS = {
    "cache_position",
    "is_causal",
    "layer_idx",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}

Handler = Callable[[int, AttentionCall], Tensor]
Edit = Callable[[int, AttentionCall], None]


class UnfusableError(EyechartError):
    """A layer's attention is not of a kind that can be taken over.

    Attributes:
        layer: The layer, None where it concerns all.
        reason: Why, for the reader of a result.
    """

    def __init__(self, layer: int | None, reason: str) -> None:
        super().__init__(reason if layer is None else f"layer {layer}: {reason}")
        self.layer, self.reason = layer, reason


@contextmanager
def taken_over(
    model: "TransformerBridge", layers: Collection[int], everywhere: bool, handler: Handler
) -> Iterator[None]:
    """Run the attention of chosen layers through ``handler``.

    Args:
        model: A TransformerBridge.
        layers: The layers to take over.
        everywhere: Whether these are all the layers with attention, so that no n x n mask is needed
            by anyone.
        handler: Gets the layer and its call, returns the mixtures of values.

    Raises:
        UnfusableError: a layer's attention takes no attention function.
    """
    with ExitStack() as undo:
        for layer in layers:
            bridge = model.blocks[layer].attn
            _take_over(undo, layer, bridge, bridge.original_component, handler)
        if everywhere and layers:
            for config in _configs(model.original_model):
                undo.callback(_name_attention, config, config._attn_implementation)
                _name_attention(config, NAME)
        yield


def _take_over(
    undo: ExitStack, layer: int, bridge: nn.Module, module: nn.Module, handler: Handler
) -> None:
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    config = getattr(module, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise UnfusableError(
            layer, "its attention is code of its own, which takes no attention function"
        )
    # Entries of __dict__, because assignment to a component may reach into what it wraps. This is
    # the bridge's own plain forward: hook_in, the wrapped module, hook_out.
    set_entry(undo, bridge, "forward", types.MethodType(AttentionBridge.forward, bridge))
    own = copy.deepcopy(config)
    _name_attention(own, NAME)
    set_entry(undo, module, "config", own)
    before = _RUNNING.get(module)
    _RUNNING[module] = (layer, handler)
    if before is None:
        undo.callback(_RUNNING.pop, module)
    else:  # one run within another, such as a measurement under a lens
        undo.callback(_RUNNING.__setitem__, module, before)


def edited(model: "TransformerBridge", edit: Edit) -> AbstractContextManager[None]:
    """Change every call of a model's attention before it is computed, in all eyechart's passes."""
    return _EDITS.entered(model, edit)


def edits_of(model: "TransformerBridge") -> tuple[Edit, ...]:
    """The edits in force, in the order in which they were entered."""
    return _EDITS.on(model)


_EDITS: InForce[Edit] = InForce()
_RUNNING: "weakref.WeakKeyDictionary[nn.Module, tuple[int, Handler]]" = weakref.WeakKeyDictionary()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """The attention function, in the form transformers calls it."""
    if module not in _RUNNING:
        raise UnfusableError(
            None, f"{type(module).__name__} is not the module its layer is known by"
        )
    layer, handler = _RUNNING[module]
    unknown = [name for name, x in options.items() if x is not None and name not in _HARMLESS]
    if unknown:
        raise UnfusableError(layer, f"its attention takes {', '.join(sorted(unknown))}")
    if dropout:
        raise UnfusableError(layer, "its attention has dropout")
    if query.shape[2] != key.shape[2]:
        raise UnfusableError(layer, "its queries and keys are not equally many")
    if query.shape[1] % key.shape[1]:
        raise UnfusableError(layer, "its heads do not divide into groups")
    call = AttentionCall(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=softcap,
        start=_start(layer, attention_mask),
        sinks=s_aux,
    )
    return handler(layer, call), None


def _start(layer: int, mask: object) -> Tensor | None:
    try:
        return mask.start if isinstance(mask, Visible) else _start_of_written(layer, mask)
    except IrregularMaskError as problem:
        raise UnfusableError(layer, str(problem)) from problem


def _start_of_written(layer: int, mask: object) -> Tensor:
    """From a mask that the model writes out itself, or that other layers need written out."""
    if mask is None:
        # Could mean causal, or that nobody asked the mask interface and a window was lost.
        raise UnfusableError(layer, "its attention gets no mask to tell what a query sees")
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise UnfusableError(layer, f"its mask is a {type(mask).__name__}")
    seen = mask == 0 if mask.is_floating_point() else mask.bool()
    if mask.is_floating_point() and bool((mask[~seen] > -1e4).any()):
        raise UnfusableError(layer, "its mask adds a bias to the scores")
    if not bool((seen == seen[:, :1]).all()):
        raise UnfusableError(layer, "its mask differs between heads")
    return starts_of(seen[:, 0], 0)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, visible)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every configuration that the model's modules read, once."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


def _name_attention(config: PreTrainedConfig, name: str | None) -> None:
    config._attn_implementation = name


def set_entry(undo: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """Set an entry of a module's own ``__dict__``, and have it put back."""
    missing = object()
    before = module.__dict__.get(name, missing)

    def restore() -> None:
        if before is missing:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = before

    undo.callback(restore)
    module.__dict__[name] = value
