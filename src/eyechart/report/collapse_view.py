"""What the sections on collapse show: figures, sentences, tables, and the prompts compared."""

from typing import TYPE_CHECKING, Any, NamedTuple

from eyechart.results import CollapseCurve, CollapseStudy
from eyechart.results.collapse_figures import curves, families, formats, ladder, layers
from eyechart.results.collapse_words import (
    conclusion,
    ladder_conclusion,
    predicted,
    rank_conclusion,
)
from eyechart.results.fits import PowerLaw

if TYPE_CHECKING:
    import plotly.graph_objects as go

POINTS = 48
"""Lengths in a figure at most; a curve can have thousands, and the page must stay small."""

PAIR_LENGTH = 10
"""The prompts are shown at this n or the first one after it: long enough to see groups in."""

SIDES = ("the shorter prompt", "the longer prompt", "the control")

PLACES = {
    "final": "the final representation, as it is read",
    "model": "the whole model, run in the format",
    "weights": "the weights",
    "attention": "attention probabilities",
    "stream": "the residual stream, after every block",
}


class FamilyView(NamedTuple):
    """One family, ready to be shown.

    Attributes:
        name: The family's name.
        about: What is compared with what.
        conclusion: What its curve comes to, in one sentence.
        ends: Relative distance at the first and the last length.
        onset: Where collapse sets in; None where it does not.
        slope: The power law through its curve; None where there is none.
        control: Name of its control, and the control's distance at both ends; None without one.
        pair: The n whose prompts are shown; None where they were not kept.
        prompts: What each prompt is, and its tokens.
        thinned: Whether figures show fewer lengths than were measured.
    """

    name: str
    about: str
    conclusion: str
    ends: tuple[float, float]
    onset: int | None
    slope: PowerLaw | None
    control: tuple[str, float, float] | None
    pair: int | None
    prompts: list[tuple[str, tuple[str, ...]]]
    thinned: bool


class HorizonRow(NamedTuple):
    """One format at one place: shares of equal coordinates, and the horizon seen and predicted."""

    place: str
    format: str
    first: float
    last: float
    expected: float
    horizon: int | None
    predicted: str


class CollapseView(NamedTuple):
    """A study of collapse, ready to be shown.

    Attributes:
        overview: Which families collapse, in one sentence.
        families: One a family.
        span: The shortest and the longest n.
        horizons: The table of formats.
        places: What each place of that table is.
        ladder: What the ladder comes to, in one sentence; None without one.
        rank: What the rank of a text comes to, in one sentence; None without it.
        missing: Families and rungs that failed, and why.
    """

    overview: str
    families: list[FamilyView]
    span: tuple[int, int]
    horizons: list[HorizonRow]
    places: list[tuple[str, str]]
    ladder: str | None
    rank: str | None
    missing: list[tuple[str, str]]


def collapse_view(study: CollapseStudy, summary: dict[str, Any]) -> CollapseView:
    """Names and numbers of the section, given the study's summary; figures are made below."""
    horizons = [
        HorizonRow(
            place=row["place"],
            format=row["format"],
            first=row["identical_first"],
            last=row["identical_last"],
            expected=row["expected_last"],
            horizon=row["horizon"],
            predicted=predicted(row["predicted_horizon"]),
        )
        for row in summary["horizons"]
    ]
    there = dict.fromkeys(row.place for row in horizons)
    failed = {
        part: why
        for part, why in study.failures.items()
        if part not in ("precision ladder", "rank")
    }
    return CollapseView(
        overview=summary["conclusion"],
        families=[family_view(curve) for curve in study.curves],
        span=(
            min(curve.lengths[0] for curve in study.curves),
            max(curve.lengths[-1] for curve in study.curves),
        ),
        horizons=horizons,
        places=[(place, PLACES.get(place, place)) for place in there],
        ladder=study.ladder and ladder_conclusion(study.ladder),
        rank=study.rank and rank_conclusion(study.rank),
        missing=[*failed.items(), *(study.ladder.failures.items() if study.ladder else ())],
    )


def family_view(curve: CollapseCurve) -> FamilyView:
    """What is said of one curve, and the prompts of one of its lengths."""
    pair = None
    if curve.ends is not None:
        pair = next((n for n in curve.lengths if n >= PAIR_LENGTH), curve.lengths[-1])
    return FamilyView(
        name=curve.family,
        about=curve.about,
        conclusion=conclusion(curve),
        ends=(float(curve.relative[-1, 0]), float(curve.relative[-1, -1])),
        onset=curve.onset(),
        slope=curve.fit(),
        control=None
        if curve.control is None
        else (curve.control_name, float(curve.control[-1, 0]), float(curve.control[-1, -1])),
        pair=pair,
        prompts=[] if pair is None else list(zip(SIDES, curve.tokens(pair), strict=False)),
        thinned=len(curve.lengths) > POINTS,
    )


def curve_figure(curve: CollapseCurve) -> "go.Figure":
    """The figure of a curve that stands alone on a page."""
    return curves(curve, POINTS)


def collapse_figures(study: CollapseStudy) -> "dict[str, go.Figure]":
    """The figures that stand alone, by the name of their place on the page."""
    found = {"families": families(study.curves, POINTS)}
    if study.ladder is not None:
        found["ladder"] = ladder(study.ladder.to_frame(), POINTS)
    if study.rank is not None:
        found["rank"] = study.rank.plot()
    return found


def family_figures(study: CollapseStudy) -> "dict[str, dict[str, go.Figure]]":
    """The figures of each family, which share their places, by the name of the place."""
    return {
        curve.family: {
            "family-curve": curves(curve, POINTS),
            "family-layers": layers(curve, POINTS),
            **(
                {"family-formats": formats(curve, POINTS)}
                if curve.identical is not None and curve.formats
                else {}
            ),
        }
        for curve in study.curves
    }
