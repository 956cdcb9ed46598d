"""``eyechart.exam``: everything one prompt allows; a failed step does not cost the rest."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from eyechart import sequences as sequencing
from eyechart.attention import AttentionProbe, PatternProbe, warn_of_fallback, wins
from eyechart.collapse import collapse_curve
from eyechart.errors import EyechartError
from eyechart.models import facts_of
from eyechart.probes import Probe, capture
from eyechart.residual import ResidualProbe
from eyechart.results import (
    PATTERN_TOKENS,
    AttentionPatterns,
    AttentionStatistics,
    Exam,
    Provenance,
    ResidualNorms,
    Sequences,
)
from eyechart.results.attention import Statistic
from eyechart.results.files import ensure_writable

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

T = TypeVar("T")


def exam(
    model: "TransformerBridge",
    inputs: sequencing.Inputs | None = None,
    *,
    prepend_bos: bool | None = None,
    lengths: Sequence[int] | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    out: str | os.PathLike[str] | None = None,
    on_step: Callable[[str], object] = lambda step: None,
) -> Exam:
    """Examine a model on one prompt: heads, residual stream, collapse.

    Args:
        model: A TransformerBridge.
        inputs: String, strings, token ids ``[batch position]`` or Sequences; None takes a short
            original English text.
        prepend_bos: See :func:`eyechart.sequences.prepare`.
        lengths: The n of the collapse curve; see :func:`eyechart.collapse_curve`.
        batch_size: Sequences a pass; all at once by default.
        seed: Recorded with the result; nothing in an exam is drawn at random.
        out: Folder to save to; checked before anything is computed.
        on_step: Called with the name of each part as its measurement begins.

    Returns:
        The exam. A part that failed is None in it, and ``failures`` says why.

    Raises:
        InputError: the inputs do not fit the model. Checked first, like everything below.
        UsageError: ``out`` cannot be written to.
        UnsupportedModelError, NonFiniteError: this model cannot be examined.
        EyechartError: every step failed, so that there is nothing to keep.
    """
    if out is not None:
        ensure_writable(out)
    # What cannot be examined is refused here, whole, rather than step by step.
    facts = facts_of(model)
    prepared = (
        sequencing.prepare(
            model, sequencing.BUILT_IN_PROMPT, prepend_bos=prepend_bos, name="built-in prompt"
        )
        if inputs is None
        else sequencing.prepare(model, inputs, prepend_bos=prepend_bos)
    )
    failures: dict[str, str] = {}

    def attempt(part: str, run: Callable[[], T]) -> T | None:
        on_step(part)
        try:
            return run()
        except (EyechartError, RuntimeError, MemoryError) as problem:
            failures[part] = str(problem) or type(problem).__name__
            return None

    def look(*probes: Probe[Any]) -> tuple[Any, ...]:
        return capture(model, prepared, probes, batch_size=batch_size, seed=seed)

    heads, stream = AttentionProbe(facts.n_layers, fused=wins(facts, prepared)), ResidualProbe()
    both = attempt("attention", lambda: look(heads, stream))
    if both is None:
        # One of the two may be what fails (patterns need far more memory): keep the other.
        failures.clear()
        both = (
            attempt("attention", lambda: look(heads)[0]),
            attempt("residual", lambda: look(stream)[0]),
        )
    attention: AttentionStatistics | None = both[0]
    residual: ResidualNorms | None = both[1]
    patterns: AttentionPatterns | None = None
    if attention is not None:
        warn_of_fallback(attention)
        chosen = striking_heads(attention)
        short = prepared.first_tokens(PATTERN_TOKENS)
        probe = PatternProbe(tuple(chosen), tuple(chosen.values()))
        patterns = attempt(
            "patterns",
            lambda: capture(model, short, [probe], batch_size=batch_size, seed=seed)[0],
        )
    collapse = attempt(
        "collapse", lambda: collapse_curve(model, lengths=lengths, prepend_bos=prepend_bos)
    )
    parts = (attention, residual, patterns, collapse)
    # Parts of one pass share its provenance, which must count once.
    sources = {id(part.provenance): part.provenance for part in parts if part is not None}
    if not sources:
        first = next(iter(failures.values()))
        raise EyechartError(f"every step of the exam failed; the first: {first}")
    result = Exam(
        sequences=prepared,
        provenance=_together(list(sources.values()), prepared, seed),
        residual=residual,
        attention=attention,
        patterns=patterns,
        collapse=collapse,
        failures=failures,
    )
    if out is not None:
        result.save(out)
    return result


def striking_heads(attention: AttentionStatistics) -> dict[tuple[int, int], str]:
    """Two heads that lead each statistic worth looking at, and why: at most eight, each once."""
    chosen: dict[tuple[int, int], str] = {}
    leaders: tuple[tuple[Statistic, str], ...] = (
        ("first", "mass {:.2f} on the first token"),
        ("diagonal", "mass {:.2f} on itself"),
        ("previous", "mass {:.2f} on the previous token"),
        ("entropy", "entropy {:.2f} nats, among the broadest"),
    )
    for statistic, words in leaders:
        for layer, head, value in attention.strongest(statistic, 2):
            chosen.setdefault((layer, head), words.format(value))
    return chosen


def _together(parts: Sequence[Provenance], sequences: Sequences, seed: int | None) -> Provenance:
    """Costs added up; the rest is the same for all parts, which come from one model."""
    ways = {way for part in parts for way in part.attention.split(", ")}
    hooks: Counter[str] = Counter()
    for part in parts:
        hooks.update(part.hooks)
    return dataclasses.replace(
        parts[0],
        attention=", ".join(sorted(ways)),
        tokens=sequences.digest,
        seed=seed,
        hooks=dict(hooks),
        forward_passes=sum(part.forward_passes for part in parts),
        wall_seconds=round(sum(part.wall_seconds for part in parts), 4),
        peak_bytes=max((part.peak_bytes for part in parts if part.peak_bytes), default=None),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )
