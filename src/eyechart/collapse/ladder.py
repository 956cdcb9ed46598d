"""``eyechart.precision_ladder``: a collapse curve in coarser and coarser number formats."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from eyechart.attempts import Attempts
from eyechart.collapse.curve import DEFAULT_PROMPT, collapse_curve
from eyechart.errors import UsageError
from eyechart.families import Family
from eyechart.lenses import precision
from eyechart.lenses.precision import PLACES
from eyechart.models import facts_of
from eyechart.models.load import DTYPES
from eyechart.precision import FORMATS, format_named
from eyechart.results import CollapseCurve, PrecisionLadder, Provenance

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def precision_ladder(
    model: "TransformerBridge",
    family: str | Family = "repeat",
    lengths: Sequence[int] | None = None,
    *,
    formats: Sequence[str] | None = None,
    places: Sequence[str] = PLACES,
    prompt: str = DEFAULT_PROMPT,
    prepend_bos: bool | None = None,
    on_step: Callable[[str], object] = lambda step: None,
) -> PrecisionLadder:
    """Measure a collapse curve under :func:`eyechart.lenses.precision`, rung by rung.

    Args:
        model: A TransformerBridge, best in float32 or float64: what it has lost is lost.
        family: See :func:`eyechart.collapse_curve`.
        lengths: See :func:`eyechart.collapse_curve`.
        formats: Names of :data:`eyechart.precision.FORMATS`; all by default.
        places: What is rounded (:data:`eyechart.lenses.precision.PLACES`); "final" costs nothing,
            every other place one forward pass a format. "model" runs in the formats that models are
            run in and leaves the others out.
        prompt: See :func:`eyechart.collapse_curve`.
        prepend_bos: See :func:`eyechart.collapse_curve`.
        on_step: Called with the name of each rung as its measurement begins.

    Raises:
        UsageError: unknown format or place; otherwise as :func:`eyechart.collapse_curve` for the
            model as it is. A rung that fails, such as float16 overflowing, is told in ``failures``.
    """
    names = [format_named(each).name for each in (FORMATS if formats is None else formats)]
    if not names or not places or set(places) - set(PLACES):
        raise UsageError(f"places must be some of {', '.join(PLACES)}, got {list(places)}")

    def measure(read_in: Sequence[str], references: bool) -> CollapseCurve:
        return collapse_curve(
            model,
            family,
            lengths,
            prompt=prompt,
            prepend_bos=prepend_bos,
            formats=read_in,
            heads=False,
            next_token=False,
            references=references,
        )

    def rung(name: str, place: str) -> CollapseCurve:
        with precision(model, name, at=place):
            return measure([name], references=False)

    own = facts_of(model).dtype
    finer = {name for name, dtype in DTYPES.items() if torch.promote_types(dtype, own) == dtype}
    on_step("as it is")
    base = measure(names, references=True)
    rungs: dict[str, dict[str, CollapseCurve]] = {}
    attempt = Attempts(on_step)
    for place in (place for place in places if place != "final"):
        for name in names:
            if place == "model" and name not in DTYPES:
                continue
            if DTYPES.get(name) == own if place == "model" else name in finer:
                rungs.setdefault(place, {})[name] = base  # which is what rounding would leave
                continue
            curve = attempt(f"{name} at {place}", partial(rung, name, place))
            if curve is not None:
                # One copy of the tokens for all.
                rungs.setdefault(place, {})[name] = replace(curve, sequences=base.sequences)
    parts = [base.provenance]
    for made in rungs.values():
        parts += [curve.provenance for curve in made.values() if curve is not base]
    whole = Provenance.together(parts, base.sequences.digest, base.provenance.seed)
    said = "rungs were seen through lenses.precision, which emulates all but 'model'"
    return PrecisionLadder(
        base.sequences,
        # What every rung says of itself it keeps.
        replace(whole, notes=(*base.provenance.notes, said) if rungs else base.provenance.notes),
        base,
        rungs,
        attempt.failures,
    )
