"""What a curve of collapse, a ladder of formats or a text's rank comes to: one sentence each."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eyechart.results.collapse import CollapseCurve
    from eyechart.results.ladder import PrecisionLadder
    from eyechart.results.rank import RankCollapse

_FAR = 10**6
"""A predicted n beyond it is told as "more than": so far from what was measured it is no number."""


def conclusion(curve: "CollapseCurve") -> str:
    """Whether a family's prompts collapse, from which n, how fast, and compared with what.

    Of the last entry of the layer axis. Collapse is what :meth:`CollapseCurve.onset` says: less
    than a tenth of the first distance from some n on.
    """
    values, noise = curve.relative[-1].tolist(), curve.noise()
    first, last = (f"n = {curve.lengths[index]}" for index in (0, -1))
    onset = curve.onset()
    if same_throughout(curve):
        return (
            "Nothing to collapse: to this model the two are the same at every length, apart by no "
            f"more than arithmetic makes ({max(values):.1g})."
        )
    if len(values) == 1:
        said = f"One length shows no trend: at {last} the two prompts are {values[0]:.2g} apart"
    elif values[0] <= noise:
        said = (
            f"No collapse: from no more than arithmetic makes at {first} the distance grows to "
            f"{values[-1]:.2g} at {last}"
        )
    elif onset is None:
        said = f"No collapse up to {last}: {_trend(curve)} from {values[0]:.2g} to {values[-1]:.2g}"
    else:
        law = curve.fit()
        pace = "" if law is None else f" and fall about as n to the power {law}"
        end = (
            "no further apart than arithmetic alone makes them"
            if values[-1] <= noise
            else f"{values[-1]:.2g} apart"
        )
        said = (
            f"Collapse: from n = {onset} on the two prompts stay less than a tenth as far apart as "
            f"at {first}{pace}; at {last} they are {end}"
        )
    return said + _compared(curve) + _controlled(curve) + "."


def overview(curves: "Sequence[CollapseCurve]") -> str:
    """Which families collapse, and which do not."""
    parts, left = [], list(curves)

    def take(which: "list[CollapseCurve]", one: str, several: str) -> None:
        if which:
            names = [
                curve.family + (f" (from n = {at})" if (at := curve.onset()) else "")
                for curve in which
            ]
            parts.append(f"{_listed(names)} {one if len(which) == 1 else several}")
            left[:] = [curve for curve in left if curve not in which]

    take([c for c in left if same_throughout(c)], "has", "have")
    if parts:
        parts[0] += " nothing to collapse"
    take([c for c in left if c.onset() is not None], "collapses", "collapse")
    take(
        [c for c in left if keeps_only_the_place(c)],
        "keeps apart the place in its group, not the count",
        "keep apart the place in their group, not the count",
    )
    take(left[:], "does not collapse", "do not collapse")
    return f"Up to n = {max(curve.lengths[-1] for curve in curves)}, {'; '.join(parts)}."


def same_throughout(curve: "CollapseCurve") -> bool:
    """Whether nothing but arithmetic keeps the two prompts apart, at any length."""
    return float(curve.relative[-1].max()) <= curve.noise()


def keeps_only_the_place(curve: "CollapseCurve") -> bool:
    """Whether the control collapses although the pair itself does not."""
    return curve.onset() is None and _control_onset(curve) is not None


def ladder_conclusion(ladder: "PrecisionLadder") -> str:
    """In which formats, and rounded where, the two prompts have become one and the same."""
    last = ladder.lengths[-1]
    rungs = [row for row in ladder.to_frame().to_dict("records") if row["length"] == last]
    blind: dict[str, list[str]] = {}
    for row in rungs:
        if row["identical"] == 1:
            blind.setdefault(row["format"], []).append(row["place"])
    same = "the two prompts' final representations are the same, number for number,"
    if not rungs:
        return "No rung could be measured."
    if not blind:
        return f"At n = {last} some coordinate still differs in every format at every place."
    if sum(map(len, blind.values())) == len(rungs):
        return f"At n = {last} {same} in every format at every place."
    said = [f"{name} ({', '.join(places)})" for name, places in blind.items()]
    rest = "in all others some coordinate still differs"
    return f"At n = {last} {same} in {_listed(said)}; {rest}."


def rank_conclusion(rank: "RankCollapse") -> str:
    """Whether a text's tokens become alike, in the model as it is and without its parts."""
    said = []
    for variant in rank.variants:
        onset, end = rank.onset(variant), rank.blocks.stop - 1
        left = float(rank.of("residual", variant)[:, end].nanmean())
        name = "in the model as it is" if variant == "full" else f"with {variant}"
        said.append(
            f"{name} they stay apart (residual {left:.2g} after the last block)"
            if onset is None
            else f"{name} they become alike from {rank.layer_labels[onset]} on"
        )
    return f"Of a text's tokens: {'; '.join(said)}."


def predicted(n: float | None) -> str:
    """A predicted horizon as a person should read it; a dash where there is none."""
    if n is None or n != n:
        return "–"
    return f"{round(n):,}" if n <= _FAR else "> 10⁶"


def _trend(curve: "CollapseCurve") -> str:
    law = curve.fit()
    if law is None:
        return "the distance goes"
    if law.low <= 0 <= law.high:
        return f"the distance has no clear trend (n to the power {law}) and goes"
    if law.slope > 0:
        return f"the distance grows, about as n to the power {law},"
    return f"the distance falls, but slowly (about as n to the power {law}),"


def _compared(curve: "CollapseCurve") -> str:
    """What unrelated prompts and arithmetic alone make."""
    if not curve.unrelated:
        return ""
    unrelated = float(curve.unrelated["relative"][-1])
    return f" (unrelated prompts: {unrelated:.2g}; arithmetic alone: {curve.floor():.1g})"


def _controlled(curve: "CollapseCurve") -> str:
    if curve.control is None or len(curve.lengths) == 1:
        return ""
    onset = _control_onset(curve)
    if onset is None:
        return f"; the control, {curve.control_name}, does not collapse"
    if curve.onset() is not None:
        return f"; the control, {curve.control_name}, collapses too, from n = {onset} on"
    kept = (
        "the last token's place in its group"
        if curve.family.startswith("separated")
        else "something that the control leaves alike"
    )
    return (
        f"; but the control, {curve.control_name}, collapses from n = {onset} on, so that what is "
        f"kept apart is {kept}, not the count"
    )


def _control_onset(curve: "CollapseCurve") -> int | None:
    if curve.control is None:
        return None
    return replace(curve, relative=curve.control).onset()


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
