"""Curves and studies of collapse that no model made, for tests of what shows them."""

from collections.abc import Sequence
from typing import Any

import torch
from flows import PROVENANCE

from eyechart.results import CollapseCurve, CollapseStudy, PrecisionLadder, RankCollapse, Sequences
from eyechart.results.collapse import DISTANCES
from eyechart.results.rank import MEASURES

LENGTHS = (1, 2, 5, 10, 20, 50)
LAYERS = ("embedding", "block 0", "final norm")
FORMATS = ("float16", "bfloat16", "int4")
FRONT = ("<s>", "Ones:", " ")
FALLING = tuple(0.5 / n for n in LENGTHS)  # a power law of slope -1, below a tenth from n = 20
FLAT = (0.5, 0.4, 0.6, 0.5, 0.4, 0.5)
RISING = tuple(0.01 * n for n in LENGTHS)
FLOOR = 1e-6


def made_up_curve(
    final: Sequence[float] = FALLING,
    *,
    control: Sequence[float] | None = None,
    lengths: tuple[int, ...] = LENGTHS,
    token: str = "1",
    front: tuple[str, ...] = FRONT,
    floor: float | None = FLOOR,
    **changes: Any,
) -> CollapseCurve:
    """A curve whose last entry is ``final``; the block is twice as far, the embedding nowhere."""
    relative = torch.tensor(final, dtype=torch.float64) * torch.tensor([[0.0], [2.0], [1.0]])
    labels = (*front, *[token] * (lengths[-1] + 4))
    ends = [[len(front) + n + more - 1 for more in (0, 1, 3)] for n in lengths]
    steps = torch.full((len(changes.get("formats", FORMATS)), 4), 8.0)
    shares = torch.linspace(0, 1, len(lengths)).expand(len(FORMATS), -1).clone()
    shares[:2] /= 2
    fields: dict[str, Any] = {
        "sequences": Sequences.from_rows(
            [list(range(len(labels)))], [list(labels)], prepend_bos=True, name="made-up"
        ),
        "provenance": PROVENANCE,
        "family": "repeat",
        "lengths": lengths,
        "layer_labels": LAYERS,
        **dict.fromkeys(DISTANCES, relative),
        "about": f"{token!r} n times and n + 1 times",
        "control": None if control is None else relative * 0 + torch.tensor(control),
        "control_name": "" if control is None else "n and n + 3",
        "heads": {name: relative[1:] * torch.tensor([[0.25], [4.0]]) for name in DISTANCES},
        "formats": FORMATS,
        "identical": shares,
        "expected": shares * 0.9,
        "steps": steps,
        "ends": torch.tensor(ends if control is not None else [row[:2] for row in ends]),
    }
    if floor is not None:
        fields["unrelated"] = {name: torch.tensor([0.0, 1.1, 1.25]) for name in DISTANCES}
        fields["null"] = {
            name: torch.full((3, 2), floor, dtype=torch.float64) for name in DISTANCES
        }
    return CollapseCurve(**fields | changes)


def made_up_ladder(base: CollapseCurve) -> PrecisionLadder:
    """The stream in two formats: one like the base, one in which all is the same at once."""
    blind = made_up_curve(formats=("int4",), identical=torch.ones(1, 6), expected=torch.ones(1, 6))
    seen = made_up_curve(
        formats=("float16",), identical=torch.zeros(1, 6), expected=torch.zeros(1, 6)
    )
    rungs = {"stream": {"float16": seen, "int4": blind}}
    failures = {"bfloat16 at stream": "not finite at block 3"}
    return PrecisionLadder(base.sequences, PROVENANCE, base, rungs, failures)


def made_up_rank() -> RankCollapse:
    """The full stream stays apart, without skip connections it is alike after the block."""
    apart, alike = [[1.0, 0.8]], [[1.0, 0.05]]
    values = torch.tensor([apart, alike])
    names = (f"{name}{end}" for name in MEASURES for end in ("", "_without_first"))
    fields: dict[str, Any] = dict.fromkeys(names, values)
    return RankCollapse(
        Sequences.from_rows([[1, 2]], [["a", "b"]], name="a text"),
        PROVENANCE,
        variants=("full", "no skip"),
        layer_labels=("embedding", "block 0"),
        unavailable={},
        **fields,
    )


def made_up_study(**changes: Any) -> CollapseStudy:
    """One family that collapses, one that does not, and one that keeps only the place."""
    base = made_up_curve()
    fields: dict[str, Any] = {
        "sequences": base.sequences,
        "provenance": PROVENANCE,
        "curves": (
            base,
            made_up_curve(FLAT, family="digits", about="digits", token="7"),
            made_up_curve(FLAT, control=FALLING, family="separated left", about="in groups"),
        ),
        "ladder": made_up_ladder(base),
        "rank": made_up_rank(),
        "failures": {"text": "give a longer one"},
    }
    return CollapseStudy(**fields | changes)
