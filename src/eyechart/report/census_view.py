"""What the section on the census of heads shows: figures, tables, and every head's attention."""

import base64
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from eyechart.report.attention_view import LOOK
from eyechart.results import KINDS, HeadCensus, head_name
from eyechart.results.figures import visible
from eyechart.results.head_figures import costs, domains, rotary_bands, together
from eyechart.results.head_names import MIXED
from eyechart.results.heads import STEPS

if TYPE_CHECKING:
    import plotly.graph_objects as go

PATTERN_BYTES = 1_000_000
"""Attention of all heads on the page; where it would take more, fewer tokens are shown."""

PARTS = {
    "rotary": "How heads use rotary frequencies",
    "together": "Heads that can go together",
    "price": "What attention costs",
    "patterns": "Attention of every head",
}


class CensusView(NamedTuple):
    """A census, ready to be shown.

    Attributes:
        verdicts: How many heads have each verdict.
        kinds: Each kind that there is, what its heads look at, and their names.
        clearest: Each kind but "mixed", how many heads it has, and the three clearest of them.
        rows: The table of heads, one a head.
        changing: Heads that sleep on one domain and work on another.
        facts: What is known of the set that can go and of the price, as ``(what, value)``.
        set_names: The heads of that set.
        shares: Its share of attention's operations, and of its time without it over with it.
        missing: Name of each part that is not there, and why.
        shown: Tokens of the attention that can be looked at.
        patterns: That attention, as the page's script reads it; None where there is none.
    """

    verdicts: dict[str, int]
    kinds: list[tuple[str, str, tuple[str, ...]]]
    clearest: list[tuple[str, int, list[dict[str, Any]]]]
    rows: list[dict[str, Any]]
    changing: list[dict[str, Any]]
    facts: list[tuple[str, str]]
    set_names: tuple[str, ...]
    shares: tuple[float, float] | None
    missing: list[tuple[str, str]]
    shown: int
    patterns: dict[str, Any] | None


def census_view(census: HeadCensus) -> CensusView:
    """Names and numbers of the section; the figures are :func:`census_figures`'s."""
    rows, summary = _rows(census), census.summary()
    patterns = _patterns(census, rows)
    price = summary.get("price")
    return CensusView(
        verdicts=summary["verdicts"],
        kinds=[
            (kind, _looks_at(census)[kind], tuple(names))
            for kind, names in summary["kinds"].items()
        ],
        clearest=_clearest(rows),
        rows=rows,
        changing=[
            row | {"name": head_name(row["layer"], row["head"])}
            for row in map(dict, census.changing().to_dict("records"))
        ],
        facts=_facts(census),
        set_names=tuple(summary["together"]["heads"]) if census.together else (),
        shares=(price["share"], price["time"]) if price else None,
        missing=[(PARTS.get(part, part), reason) for part, reason in census.unavailable.items()],
        shown=0 if patterns is None else patterns["size"],
        patterns=patterns,
    )


def census_figures(census: HeadCensus) -> "dict[str, go.Figure]":
    """The figures, by the name of their place on the page."""
    figures = {"kinds": census.plot(), "costs": costs(census)}
    if census.rotary is not None:
        figures["rotary"] = rotary_bands(census)
    if census.together is not None:
        figures["together"] = together(census)
    if len(census.changing()):
        figures["domains"] = domains(census)
    return figures


def _looks_at(census: HeadCensus) -> dict[str, str]:
    names = census.names
    repeats = "of random tokens said twice: "
    found = {
        "induction": repeats + "what followed the same token before",
        "duplicate": repeats + "the same token before",
        "diagonal": "the query's own token",
        "previous": "the token before the query",
        "sink": "the first token",
        "local": f"the {names.window} tokens up to the query",
        "uniform": "all tokens alike",
    }
    return {KINDS[name]: words for name, words in found.items()} | {
        MIXED: f"none of these has more than {names.share:g} of its evidence"
    }


def _rows(census: HeadCensus) -> list[dict[str, Any]]:
    """One row a head, of what is worth a column on the page."""
    cheapest, _ = census.trials.cheapest()
    rows = []
    for found in map(dict, census.to_frame().to_dict("records")):
        best = cheapest[found["layer"]][found["head"]]
        costs = {
            end: found[f"kl_{best}{end}"] if best else math.nan for end in ("", "_low", "_high")
        }
        rows.append(
            found
            | {f"kl_best{end}": cost for end, cost in costs.items()}
            | {
                "name": head_name(found["layer"], found["head"]),
                "best": best,
            }
        )
    return rows


def _clearest(rows: Sequence[dict[str, Any]]) -> list[tuple[str, int, list[dict[str, Any]]]]:
    found = []
    for kind in KINDS.values():
        of_kind = sorted(
            (row for row in rows if row["kind"] == kind), key=lambda row: -row["evidence"]
        )
        if of_kind:
            found.append((kind, len(of_kind), of_kind[:3]))
    return found


def _facts(census: HeadCensus) -> list[tuple[str, str]]:
    """The set that can go and its price, in words and numbers."""
    found, price, facts = census.together, census.price, []
    if found is not None:
        random = ", ".join(f"{kl:.2g}" for kl in sorted(found.random_kl))
        sizes = ", ".join(map(str, sorted(found.random_sizes)))
        facts += [
            ("heads in the set", str(len(found.heads))),
            (
                "KL of the set, held-out texts",
                f"{float(found.kl.mean()):.3g} nats ({found.low:.2g} to {found.high:.2g})",
            ),
            ("sum of what its heads cost one by one", f"{found.apart:.3g} nats"),
            ("KL of random sets of as many heads", f"{random or '–'} nats"),
            ("random heads that fit the budget", sizes or "–"),
            ("change of loss, held-out texts", f"{float(found.loss.mean()):+.3f}"),
        ]
        if found.unseen_kl is not None and found.unseen_loss is not None:
            base = "" if found.unseen_base is None else f" of {float(found.unseen_base.mean()):.3f}"
            facts += [
                ("KL on texts that chose nothing", f"{float(found.unseen_kl.mean()):.3g} nats"),
                ("change of loss there", f"{float(found.unseen_loss.mean()):+.3f}{base}"),
            ]
    if price is not None and found is None:
        facts += [
            (
                f"operations of attention at {price.context} tokens",
                f"{float(price.flops.nansum()):.3g}",
            ),
            ("keys and values", f"{float(price.kv_bytes.nansum()) / 2**20:.3g} MiB"),
            ("time of attention", f"{price.seconds:.3g} s"),
            ("time of the whole pass", f"{price.pass_seconds:.3g} s"),
        ]
    if price is not None and found is not None:
        cache = float(price.kv_bytes.nansum())
        passes = price.pass_seconds_without
        facts += [
            (
                f"operations of attention at {price.context} tokens",
                f"{price.share:.1%} are the set's",
            ),
            (
                "keys and values that nobody else reads",
                f"{price.set_kv_bytes / 2**20:.3g} of {cache / 2**20:.3g} MiB",
            ),
            (
                "time of attention without the set",
                f"{price.seconds_without:.3g} s, {price.time:.2f} of {price.seconds:.3g} s",
            ),
            (
                "time of the whole pass without it",
                f"{passes:.3g} s, {passes / price.pass_seconds:.2f} of {price.pass_seconds:.3g} s",
            ),
        ]
    return facts


def _patterns(census: HeadCensus, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Attention of every head in the order of the table: lower triangles, one byte a mass."""
    if census.patterns is None:
        return None
    labels = census.sequences.labels[0]
    room = (math.isqrt(1 + 8 * (PATTERN_BYTES // len(rows))) - 1) // 2
    size = min(census.patterns.shape[-1], len(labels), room)
    query, key = torch.tril_indices(size, size)
    at = torch.tensor([(row["layer"], row["head"]) for row in rows])
    packed = census.patterns[at[:, 0], at[:, 1]][:, query, key]
    return {
        "props": {"tokens": [visible(label) for label in labels[:size]], **LOOK},
        "size": size,
        "steps": STEPS,
        "first": rows.index(clearest[0][2][0]) if (clearest := _clearest(rows)) else 0,
        "packed": base64.b64encode(packed.contiguous().numpy().tobytes()).decode(),
    }
