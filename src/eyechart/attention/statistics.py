"""``eyechart.attention_statistics``: what every head looks at."""

from typing import TYPE_CHECKING, Literal

import torch

from eyechart.attention.pattern import AttentionProbe
from eyechart.errors import UsageError
from eyechart.models import facts_of
from eyechart.probes import capture
from eyechart.results import AttentionStatistics
from eyechart.sequences import Inputs

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def attention_statistics(
    model: "TransformerBridge",
    inputs: Inputs,
    *,
    backend: Literal["auto", "pattern"] = "auto",
    prepend_bos: bool | None = None,
    accumulate: Literal["float32", "float64"] = "float32",
    batch_size: int | None = None,
) -> AttentionStatistics:
    """Mass on the first token, on itself and on the previous one, entropy and more, for every head.

    Args:
        model: A TransformerBridge.
        inputs: String, strings, token ids ``[batch position]`` or Sequences.
        backend: ``"pattern"`` reduces each layer's explicit pattern while the layer runs; memory
            peaks at one layer's n x n. ``"auto"`` chooses.
        prepend_bos: See :func:`eyechart.sequences.prepare`.
        accumulate: Number format of the sums.
        batch_size: Sequences a pass; all at once by default.

    Returns:
        Statistics ``[batch layer head query]``, padding NaN.

    Raises:
        UsageError: unknown backend or number format.
        InputError, CaptureError, NonFiniteError, UnsupportedModelError: as
            :func:`eyechart.capture`.
    """
    if backend not in ("auto", "pattern"):
        raise UsageError(f"unknown backend {backend!r}; choose auto or pattern")
    if accumulate not in ("float32", "float64"):
        raise UsageError(f"accumulate must be 'float32' or 'float64', got {accumulate!r}")
    probe = AttentionProbe(facts_of(model).n_layers, getattr(torch, accumulate))
    (result,) = capture(model, inputs, [probe], prepend_bos=prepend_bos, batch_size=batch_size)
    return result
