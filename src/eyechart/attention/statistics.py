"""``eyechart.attention_statistics``: what every head looks at."""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from eyechart.attention.probe import AttentionProbe
from eyechart.errors import FallbackWarning, UsageError
from eyechart.models import facts_of
from eyechart.probes import capture
from eyechart.probes.seam import edits_of
from eyechart.results import MEASURED, AttentionStatistics, Sequences
from eyechart.sequences import Inputs, prepare
from eyechart.targets import Target

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Backend = Literal["auto", "pattern", "fused"]

AUTO_LENGTH = 128
"""Tokens from which ``backend="auto"`` leaves the pattern alone (benchmarks/attention_statistics.py
measures where that begins to pay)."""


def attention_statistics(
    model: "TransformerBridge",
    inputs: Inputs,
    *,
    backend: Backend = "auto",
    statistics: Sequence[str] = MEASURED,
    targets: Sequence[Target] = (),
    prepend_bos: bool | None = None,
    accumulate: Literal["float32", "float64"] = "float32",
    batch_size: int | None = None,
) -> AttentionStatistics:
    """Mass on the first token, on itself and on the previous one, entropy and more, for every head.

    Args:
        model: A TransformerBridge.
        inputs: String, strings, token ids ``[batch position]`` or Sequences.
        backend: ``"fused"`` takes the statistics from queries, keys and values while the attention
            itself is computed: no n x n pattern exists, memory is linear in length, and the pass
            costs about what the model's own fused attention costs. Where a layer cannot be read so,
            its pattern is, and the result says why. ``"pattern"`` reduces each layer's explicit
            pattern: the definition. ``"auto"`` takes ``"fused"`` for long inputs and, because there
            it is also closer to the truth, in half formats.
        statistics: What to compute; everything in ``eyechart.results.MEASURED`` by default. What is
            left out is NaN.
        targets: Sets of keys (:mod:`eyechart.targets`) whose mass to compute beside that. They need
            one more look at all scores.
        prepend_bos: See :func:`eyechart.sequences.prepare`.
        accumulate: Number format of softmax and sums.
        batch_size: Sequences a pass; all at once by default.

    Returns:
        Statistics ``[batch layer head query]``, padding NaN.

    Raises:
        UsageError: unknown backend, statistic or number format.
        InputError, CaptureError, NonFiniteError, UnsupportedModelError: as
            :func:`eyechart.capture`.

    Warns:
        FallbackWarning: layers that were to be fused were read by their pattern.
    """
    if backend not in ("auto", "pattern", "fused"):
        raise UsageError(f"unknown backend {backend!r}; choose auto, pattern or fused")
    if accumulate not in ("float32", "float64"):
        raise UsageError(f"accumulate must be 'float32' or 'float64', got {accumulate!r}")
    facts = facts_of(model)
    prepared = prepare(model, inputs, prepend_bos=prepend_bos)
    probe = AttentionProbe(
        facts.n_layers,
        getattr(torch, accumulate),
        statistics,
        [target.resolve(model, prepared) for target in targets],
        fused=backend == "fused" or (backend == "auto" and wins(model, prepared)),
    )
    (result,) = capture(model, prepared, [probe], batch_size=batch_size)
    warn_of_fallback(result)
    return result


def wins(model: "TransformerBridge", sequences: Sequences) -> bool:
    """Whether the fused backend is the better one.

    Because it is faster, free of a half format's rounding, or sees what a lens shows.
    """
    half = facts_of(model).dtype in (torch.float16, torch.bfloat16)
    return half or sequences.tokens.shape[1] >= AUTO_LENGTH or bool(edits_of(model))


def warn_of_fallback(found: AttentionStatistics) -> None:
    """One warning for all layers that could not be fused."""
    counted = Counter(reason for reason in found.reasons if reason)
    if counted:
        said = "; ".join(f"{count} because {reason}" for reason, count in counted.items())
        warnings.warn(
            f"{sum(counted.values())} of {len(found.reasons)} layers of {found.provenance.model} "
            f"were read by their attention pattern: {said}. The numbers are right; memory grows "
            "with the square of the length.",
            FallbackWarning,
            stacklevel=3,
        )
