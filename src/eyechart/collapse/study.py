"""``eyechart.collapse_study``: several families, the ladder of formats, and rank, in one result."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from eyechart.attempts import Attempts
from eyechart.collapse.curve import DEFAULT_PROMPT, collapse_curve
from eyechart.collapse.ladder import precision_ladder
from eyechart.collapse.rank import rank_collapse
from eyechart.errors import EyechartError, UsageError
from eyechart.families import Family, family_named
from eyechart.models import facts_of
from eyechart.results import CollapseStudy, Provenance, Sequences
from eyechart.sequences import BUILT_IN_PROMPT, from_ids, prefix

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DEFAULT_FAMILIES = ("repeat", "digits", "separated", "separated:anchor=right", "text")


def collapse_study(
    model: "TransformerBridge",
    families: Sequence[str | Family] = DEFAULT_FAMILIES,
    lengths: Sequence[int] | None = None,
    *,
    ladder: bool = True,
    rank: bool = True,
    prompt: str = DEFAULT_PROMPT,
    prepend_bos: bool | None = None,
    formats: Sequence[str] | None = None,
    on_step: Callable[[str], object] = lambda step: None,
) -> CollapseStudy:
    """How a model's representations collapse: which sequences, which formats, which layers.

    Args:
        model: A TransformerBridge.
        families: See :func:`eyechart.collapse_curve`.
        lengths: See :func:`eyechart.collapse_curve`.
        ladder: Whether the first family is measured in coarser and coarser formats too
            (:func:`eyechart.precision_ladder`).
        rank: Whether the rank of a text's representations is (:func:`eyechart.rank_collapse`).
        prompt: See :func:`eyechart.collapse_curve`.
        prepend_bos: See :func:`eyechart.collapse_curve`.
        formats: See :func:`eyechart.collapse_curve`.
        on_step: Called with the name of each part as its measurement begins.

    Returns:
        The study. A part that failed is missing from it, and ``failures`` says why.

    Raises:
        UsageError: unknown family or format, or the same family twice.
        EyechartError: every family failed, so that there is nothing to keep.
    """
    chosen = [family_named(each) if isinstance(each, str) else each for each in families]
    names = [family.name for family in chosen]
    if not chosen or len(set(names)) < len(names):
        raise UsageError(f"families must be different ones, at least one; got {names}")
    facts_of(model)  # what cannot be examined is refused here, whole
    attempt = Attempts(on_step)

    curves = [
        attempt(
            family.name,
            lambda family=family: collapse_curve(
                model, family, lengths, prompt=prompt, prepend_bos=prepend_bos, formats=formats
            ),
        )
        for family in chosen
    ]
    kept = tuple(curve for curve in curves if curve is not None)
    if not kept:
        raise EyechartError(
            f"every family failed; the first: {next(iter(attempt.failures.values()))}"
        )
    rungs = ladder and attempt(
        "precision ladder",
        lambda: precision_ladder(
            model,
            chosen[0],
            lengths,
            prompt=prompt,
            prepend_bos=prepend_bos,
            formats=formats,
            on_step=lambda step: on_step(f"precision ladder: {step}"),
        ),
    )
    spread = rank and attempt("rank", lambda: rank_collapse(model, _text(model, prepend_bos)))
    parts = [part.provenance for part in (*kept, rungs, spread) if part]
    seed = next((part.seed for part in parts if part.seed is not None), None)
    return CollapseStudy(
        kept[0].sequences,
        Provenance.together(parts, kept[0].sequences.digest, seed),
        kept,
        rungs or None,
        spread or None,
        attempt.failures,
    )


def _text(model: "TransformerBridge", prepend_bos: bool | None) -> Sequences:
    """The built-in text, as far as the context goes."""
    ids, bos = prefix(model, BUILT_IN_PROMPT, prepend_bos=prepend_bos)
    return from_ids(model, [ids[: model.cfg.n_ctx]], prepend_bos=bos, name="built-in prompt")
