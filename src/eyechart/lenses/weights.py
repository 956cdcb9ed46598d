"""Other weights for a while: rounded to a number format, or cast to one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eyechart.errors import UnsupportedModelError, UsageError
from eyechart.models.load import DTYPES
from eyechart.precision import Format, Scaled, holds

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Exchange = list[tuple[Tensor, Tensor]]
"""Parameters and buffers, and what takes the place of their numbers."""


@contextmanager
def with_weights(model: "TransformerBridge", exchange: Exchange) -> Iterator[None]:
    """Run the model with other numbers in its parameters.

    The numbers themselves are set aside and put back, so that nothing is ever converted back.
    """
    own, before = model.cfg.dtype, [(weight, weight.data) for weight, _ in exchange]
    try:
        _put(exchange)
        model.cfg.dtype = next(model.parameters()).dtype
        yield
    finally:
        _put(before)
        model.cfg.dtype = own


def _put(exchange: Exchange) -> None:
    for weight, numbers in exchange:
        weight.data = numbers
        # What is known of weights is known by address and version; an address may be used again.
        torch.autograd.graph.increment_version(weight)


def recast(model: "TransformerBridge", format: Format) -> Exchange:
    """All parameters and buffers but rotary frequencies, in a format that models are run in.

    What comes of it is what opening the model in that format gives.

    Raises:
        UsageError: no model is run in this format, or not on this device.
        UnsupportedModelError: parameters that are no floating numbers, or not in memory.
    """
    dtype = DTYPES.get(format.name)
    if dtype is None:
        raise UsageError(
            f"no model is run in {format.name} itself; at='model' takes {', '.join(DTYPES)}. Round "
            "its parts: at='weights', 'stream', 'attention' or 'final'."
        )
    buffers = [
        buffer
        for name, buffer in model.original_model.named_buffers()
        if buffer.is_floating_point() and not name.endswith("inv_freq")
    ]
    exchange: Exchange = []
    for numbers in [*_weights(model), *buffers]:
        if not holds(numbers.device, dtype):
            raise UsageError(
                f"{numbers.device.type} has no {format.name}: open the model on the CPU for it"
            )
        exchange.append((numbers, numbers.detach().to(dtype)))
    return exchange


def rounded(model: "TransformerBridge", format: Format) -> Exchange:
    """Parameters rounded to a format.

    Every parameter in a floating format. In a format with a scale the matrices of linear layers
    inside the blocks, one scale an output, or where the scale is a mean one a matrix. Where the
    bridge holds parts of a joint projection beside the whole (queries, keys and values), the scale
    is that of the whole.

    Raises:
        UnsupportedModelError: parameters that are no floating numbers, or not in memory; or experts
            stacked in one tensor, where the format has a scale.
    """
    weights = _weights(model)
    if not isinstance(format, Scaled):
        return [
            (weight, format.round(weight.detach().reshape(1, -1)).reshape(weight.shape))
            for weight in weights
        ]
    exchange: Exchange = []
    for index, block in enumerate(model.blocks):
        matrices = _matrices(block, f"block {index} of {model.cfg.model_name}")
        whole = _wholes(block, [weight for weight, _ in matrices])
        for weight, inputs_last in matrices:
            rows = weight.detach() if inputs_last else weight.detach().T
            scale = format.scale(whole[id(weight)].detach().reshape(1, -1)) if format.mean else None
            there = format.round(rows, scale)
            exchange.append((weight, there if inputs_last else there.T.contiguous()))
    return exchange


def _weights(model: "TransformerBridge") -> list[nn.Parameter]:
    """Every parameter once, tied ones too."""
    found = list(model.original_model.named_parameters())
    for name, weight in found:
        if weight.device.type == "meta" or not weight.is_floating_point():
            why = "not in memory" if weight.device.type == "meta" else f"stored as {weight.dtype}"
            raise UnsupportedModelError(
                f"the weights of {model.cfg.model_name} cannot be rounded: {name} is {why}. Open "
                "the model whole and in a floating format."
            )
    return [weight for _, weight in found]


def _matrices(block: nn.Module, where: str) -> list[tuple[Tensor, bool]]:
    """Weights of linear layers, and whether the inputs are the last axis."""
    from transformers.pytorch_utils import Conv1D

    found: dict[int, tuple[Tensor, bool]] = {}
    for module in block.modules():
        if isinstance(module, nn.Linear | Conv1D):
            # GPT-2's "Conv1D" is a linear layer with its matrix the other way round.
            found[id(module.weight)] = (module.weight, isinstance(module, nn.Linear))
        elif not isinstance(module, nn.Conv1d):
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim > 2:
                    raise UnsupportedModelError(
                        f"{where} keeps its experts in one tensor ({name}), which is no matrix "
                        "with a scale. Take a floating format."
                    )
    return list(found.values())


def _wholes(block: nn.Module, weights: Sequence[Tensor]) -> dict[int, Tensor]:
    """For each matrix the one it is a part of, mostly itself, by id."""
    ends = [(w.data_ptr(), w.data_ptr() + _extent(w)) for w in weights]
    whole: dict[int, Tensor] = {}
    for weight, (begin, end) in zip(weights, ends, strict=True):
        around = [
            other
            for other, (first, last) in zip(weights, ends, strict=True)
            if first <= begin and end <= last
        ]
        whole[id(weight)] = max(around, key=lambda w: w.numel())
    for module in block.modules():  # parts that are copies, not views
        joint = getattr(module, "qkv", None)
        if joint is not None:
            whole |= {id(getattr(module, part).weight): joint.weight for part in "qkv"}
    return whole


def _extent(x: Tensor) -> int:
    """Bytes from the first number to behind the last."""
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (steps + 1) * x.element_size()
