"""``eyechart.exam``: everything one prompt allows; a failed step does not cost the rest."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eyechart import sequences as sequencing
from eyechart.attempts import Attempts
from eyechart.attention import AttentionProbe, PatternProbe, warn_of_fallback, wins
from eyechart.collapse import collapse_curve
from eyechart.errors import EyechartError
from eyechart.flow import information_flow
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
)
from eyechart.results.attention import Statistic
from eyechart.results.files import ensure_writable

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def exam(
    model: "TransformerBridge",
    inputs: sequencing.Inputs | None = None,
    *,
    prepend_bos: bool | None = None,
    lengths: Sequence[int] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    on_step: Callable[[str], object] = lambda step: None,
) -> Exam:
    """Examine a model on one prompt: heads, residual stream, collapse, information flow.

    Args:
        model: A TransformerBridge.
        inputs: See :func:`eyechart.sequences.prepare`; by default its built-in text.
        prepend_bos: See :func:`eyechart.sequences.prepare`.
        lengths: The n of the collapse curve; see :func:`eyechart.collapse_curve`.
        batch_size: Sequences a pass; all at once by default.
        seed: Of the random probes and replacement tokens of the information flow; the rest of an
            exam draws nothing.
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
    prepared = sequencing.prepare(model, inputs, prepend_bos=prepend_bos)
    attempt = Attempts(on_step)

    def look(*probes: Probe[Any]) -> tuple[Any, ...]:
        return capture(model, prepared, probes, batch_size=batch_size)

    heads, stream = AttentionProbe(facts.n_layers, fused=wins(model, prepared)), ResidualProbe()
    both = attempt("attention", lambda: look(heads, stream))
    if both is None:
        # One of the two may be what fails (patterns need far more memory): keep the other.
        attempt.failures.clear()
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
            lambda: capture(model, short, [probe], batch_size=batch_size)[0],
        )
    collapse = attempt(
        "collapse", lambda: collapse_curve(model, lengths=lengths, prepend_bos=prepend_bos)
    )
    flow = attempt(
        "information flow",
        lambda: information_flow(
            model,
            prepared,
            batch_size=batch_size,
            seed=seed,
            on_step=lambda step: on_step(f"information flow: {step}"),
        ),
    )
    parts = (attention, residual, patterns, collapse, flow)
    # Parts of one pass share its provenance, which must count once.
    sources = {id(part.provenance): part.provenance for part in parts if part is not None}
    if not sources:
        first = next(iter(attempt.failures.values()))
        raise EyechartError(f"every step of the exam failed; the first: {first}")
    result = Exam(
        sequences=prepared,
        provenance=Provenance.together(list(sources.values()), prepared.digest, seed),
        residual=residual,
        attention=attention,
        patterns=patterns,
        collapse=collapse,
        failures=attempt.failures,
        flow=flow,
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
