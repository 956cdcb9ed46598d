"""Results as tables and JSON on standard output."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from eyechart.cli.running import stdout

if TYPE_CHECKING:
    from rich.table import Table

    from eyechart.results import CollapseStudy, Exam, HeadCensus, Provenance

_NAMED = 8
"""Heads of a kind that are printed by name."""


def print_exam(result: "Exam", folder: Path, as_json: bool) -> None:
    """What an exam found, on one screen, or its summary as JSON."""
    if as_json:
        _print_json(result.summary(), folder)
        return
    from rich.markup import escape

    from eyechart.results import LEADERS

    said = result.summary()
    table = _facts(result.provenance)
    lengths = said["tokens"]
    counted = ", ".join(map(str, lengths))
    if len(lengths) > 2 and len(set(lengths)) == 1:
        counted = f"{len(lengths)} × {lengths[0]}"
    table.add_row(
        "prompt",
        f"{escape(result.sequences.name)}, {counted} tokens"
        f"{', begin-of-sequence token in front' if result.sequences.prepend_bos else ''}",
    )
    if "sink_rate" in said:
        rate = said["sink_rate"]
        table.add_row(
            "sink rate",
            f"{rate['value']:.2f} of heads give the first token more than {rate['eps']} "
            f"(first {rate['length']} tokens)",
        )
        for _, key, words in LEADERS:
            heads = "   ".join(f"{item['head']} {item['mass']:.3f}" for item in said[key])
            table.add_row(words, heads)
    if result.residual is not None:
        stream = result.residual.lines()
        table.add_row("residual stream", escape(stream[0]))
        table.add_row("", escape(stream[1]))
    if result.collapse is not None:
        table.add_row("collapse", escape(result.collapse.about))
        table.add_row("", escape(said["collapse"]["conclusion"]))
    if result.flow is not None:
        for index, line in enumerate(result.flow.lines()):
            table.add_row("" if index else "information flow", escape(line))
    if result.heads is not None:
        for words, line in _said_of(result.heads):
            table.add_row(words, escape(line))
    _end(table, result.failures, folder)
    stdout().print(table)


def print_study(study: "CollapseStudy", folder: Path, as_json: bool) -> None:
    """What a study of collapse found: families, formats, and what each comes to."""
    if as_json:
        _print_json(study.summary(), folder)
        return
    from rich.markup import escape

    from eyechart.results.collapse_words import ladder_conclusion, rank_conclusion

    said, screen = study.summary(), stdout()
    facts = _facts(study.provenance)
    lengths = study.curves[0].lengths
    facts.add_row("lengths", f"{len(lengths)}, n = {lengths[0]} to {lengths[-1]}")
    screen.print(facts)
    screen.print()
    screen.print(_families(said["families"]))
    if said["horizons"]:
        screen.print(
            f"\nCoordinates of {escape(study.curves[0].family)} that coincide at "
            f"n = {lengths[-1]}, by what is rounded, and the n from which all do:\n"
        )
        screen.print(_formats(said["horizons"]))
    ends = _pairs()
    ends.add_row("collapse", escape(said["conclusion"]))
    if study.ladder is not None:
        ends.add_row("formats", escape(ladder_conclusion(study.ladder)))
    if study.rank is not None:
        ends.add_row("rank", escape(rank_conclusion(study.rank)))
    _end(ends, study.failures, folder)
    screen.print()
    screen.print(ends)


def _print_json(summary: dict[str, Any], folder: Path) -> None:
    typer.echo(json.dumps(summary | {"folder": str(folder)}, indent=1, allow_nan=False))


def _pairs() -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    return table


def _facts(source: "Provenance") -> "Table":
    from rich.markup import escape

    table = _pairs()
    table.add_row("model", f"{escape(source.model)}, {source.dtype} on {source.device}")
    return table


def _end(table: "Table", failures: dict[str, str], folder: Path) -> None:
    from rich.markup import escape

    for part, message in failures.items():
        table.add_row("FAILED", escape(f"{part}: {message}"), style="red")
    table.add_row("written to", escape(f"{folder / 'report.html'}"))


def _families(rows: Sequence[dict[str, Any]]) -> "Table":
    """One row a family: distances at both ends, onset, slope, control, floor."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("family", style="bold")
    for column in ("first", "last", "sets in", "slope", "control", "unrelated", "floor"):
        table.add_column(column, justify="right")
    for row in rows:
        slope = "-"
        if row["slope"] is not None:
            slope = escape(f"{row['slope']:.2f} [{row['slope_low']:.2f}, {row['slope_high']:.2f}]")
        table.add_row(
            escape(row["family"]),
            *(_short(row[name]) for name in ("relative_first", "relative_last")),
            "-" if row["onset"] is None else f"n = {row['onset']}",
            slope,
            *(_short(row[name]) for name in ("control_last", "unrelated")),
            f"{row['floor']:.1e}" if row["floor"] else "-",
        )
    return table


def _formats(rows: Sequence[dict[str, Any]]) -> "Table":
    """A row a format and a column a place: the share at the longest length, the horizon seen.

    The last column is the horizon that the power law of "final" extrapolates to.
    """
    from rich.markup import escape
    from rich.table import Table

    from eyechart.results.collapse_words import predicted

    places = list(dict.fromkeys(row["place"] for row in rows))
    found = {(row["format"], row["place"]): row for row in rows}
    table = Table(box=None, pad_edge=False)
    table.add_column("format", style="bold")
    for place in places:
        table.add_column(escape(place), justify="right")
    table.add_column("horizon extrapolated", justify="right")
    for name in dict.fromkeys(row["format"] for row in rows):
        shares = []
        for place in places:
            row = found.get((name, place))
            share = "-" if row is None else f"{row['identical_last']:.1%}"
            shares.append(f"{share} from {row['horizon']}" if row and row["horizon"] else share)
        final = found.get((name, "final"), {}).get("predicted_horizon")
        table.add_row(escape(name), *shares, predicted(final))
    return table


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _said_of(census: "HeadCensus") -> Iterator[tuple[str, str]]:
    """A few heads of each kind by name, and what else the census says."""
    for kind, named in census.summary()["kinds"].items():
        more = f", and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        yield kind, f"{len(named)}: {' '.join(named[:_NAMED])}{more}"
    for index, line in enumerate(census.lines()[1:]):
        yield "" if index else "census", line
