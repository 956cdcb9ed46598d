"""The frame every analysis follows: a claim, its source, a number, a verdict, a figure and data.

An analysis is a script that tests one published claim on any model. It gives :func:`main` a
:class:`Claim` and a function that measures; the frame does the rest:

    python analyses/NAME.py [MODEL] [--device D] [--dtype T] [--out DIR] [--seed N]

prints the claim, the number and the verdict, writes ``verdict.json``, ``data.csv`` and
``figure.html`` to ``analyses/out/NAME``, and exits with 0 if the claim holds, 1 if it does not or
could not be tested, 2 if it was called wrongly.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import pandas as pd
import plotly.graph_objects as go
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.models import DEFAULT_MODEL, facts_of
from eyechart.probes.provenance import versions
from eyechart.results.files import ensure_writable, write_text_whole


@dataclass(frozen=True)
class Claim:
    """What is tested.

    Attributes:
        statement: The claim, in one sentence.
        source: Paper and place.
        holds_if: The rule that turns the number into a verdict.
    """

    statement: str
    source: str
    holds_if: str


@dataclass(frozen=True)
class Finding:
    """What a measurement found.

    Attributes:
        holds: Whether the rule of the claim is met.
        numbers: The numbers the verdict rests on, by name.
        data: Everything measured, one row a cell.
        figure: The data drawn.
    """

    holds: bool
    numbers: dict[str, float]
    data: pd.DataFrame
    figure: go.Figure


def main(claim: Claim, measure: Callable[[TransformerBridge, int], Finding]) -> NoReturn:
    """Run one analysis from the command line; ``measure`` gets the model and the seed."""
    script = Path(sys.argv[0])
    parser = argparse.ArgumentParser(
        description=claim.statement, epilog=f"Source: {claim.source}. Holds if {claim.holds_if}."
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=script.parent / "out" / script.stem)
    options = parser.parse_args()
    try:
        ensure_writable(options.out)
        model = eyechart.load(options.model, device=options.device, dtype=options.dtype)
        finding = measure(model, options.seed)
    except eyechart.EyechartError as problem:
        print(f"{script.stem}: {problem}", file=sys.stderr)
        sys.exit(problem.exit_status)
    facts = facts_of(model)
    verdict = {
        "claim": asdict(claim),
        "holds": finding.holds,
        "numbers": finding.numbers,
        "model": facts.name,
        "weights": facts.weights,
        "dtype": options.dtype,
        "device": facts.device,
        "seed": options.seed,
        "versions": versions(),
    }
    write_text_whole(options.out / "data.csv", finding.data.to_csv(index=False))
    write_text_whole(options.out / "figure.html", finding.figure.to_html(include_plotlyjs=True))
    write_text_whole(options.out / "verdict.json", json.dumps(verdict, indent=1))
    print(f"claim    {claim.statement}")
    print(f"source   {claim.source}")
    print(f"holds if {claim.holds_if}")
    print(f"model    {facts.name}, {options.dtype} on {facts.device}")
    for name, value in finding.numbers.items():
        print(f"{value:>8.4g} {name}")
    print(f"verdict  {'holds' if finding.holds else 'DOES NOT HOLD'}; written to {options.out}")
    sys.exit(0 if finding.holds else 1)
