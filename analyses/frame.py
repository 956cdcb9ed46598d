"""The frame every analysis follows: a claim, its source, a number, a verdict, a figure and data.

An analysis is a script that tests one published claim on any model. It gives :func:`main` a
:class:`Claim` and a function that measures; the frame does the rest:

    python analyses/NAME.py [MODEL] [--device D] [--dtype T] [--out DIR] [--seed N]

prints the claim, the number and the verdict, writes ``verdict.json``, ``data.csv`` and
``figure.html`` to ``analyses/out/NAME``, and exits with 0 if the claim holds, 1 if it does not or
could not be tested, 2 if it was called wrongly. What is measured on random numbers takes no model
(:func:`main_without_model`).
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.errors import UnsupportedModelError
from eyechart.models import DEFAULT_MODEL, facts_of
from eyechart.probes.provenance import versions
from eyechart.results import InformationFlow
from eyechart.results.figures import GREY
from eyechart.results.files import ensure_writable, write_text_whole
from eyechart.texts import TEXTS

EIGHT = {
    name: TEXTS[name]
    for name in (
        "narrative",
        "news",
        "letter",
        "python",
        "proof",
        "recipe",
        "dialogue",
        "german",
    )
}
"""Texts of every domain, for what costs many passes."""


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


def require(flow: InformationFlow, *names: str) -> None:
    """Refuse a model that does not allow a picture the claim is about.

    Raises:
        UnsupportedModelError: says which and why.
    """
    if missing := [name for name in names if getattr(flow, name) is None]:
        reasons = "; ".join(f"{name}: {flow.unavailable.get(name)}" for name in missing)
        raise UnsupportedModelError(f"the claim cannot be tested on this model: {reasons}")


def kl_by_hooks(
    model: TransformerBridge,
    tokens: Int[Tensor, "text position"],
    layer: int,
    head: int,
    patterns: Mapping[str, Float[Tensor, "query key"]],
) -> dict[str, Float[Tensor, "text position"]]:
    """The plain way: KL at every position, in nats, of the model from itself with one head's
    pattern exchanged in a TransformerLens hook. The whole model runs once for each pattern."""
    site = f"blocks.{layer}.attn.hook_pattern"

    def logits(pattern: Tensor | None) -> Tensor:
        def exchange(found: Float[Tensor, "batch head query key"], hook: object) -> Tensor:
            assert pattern is not None
            found = found.clone()
            found[:, head] = pattern.to(found)
            return found

        hooks: list[Any] = [] if pattern is None else [(site, exchange)]
        with torch.no_grad():
            return model.run_with_hooks(
                tokens.to(model.cfg.device), fwd_hooks=hooks, return_type="logits"
            )

    original = logits(None)
    return {name: divergence(original, logits(pattern)) for name, pattern in patterns.items()}


def divergence(
    original: Float[Tensor, "text position vocabulary"],
    changed: Float[Tensor, "text position vocabulary"],
) -> Float[Tensor, "text position"]:
    """KL(original || changed) of the next-token distributions, in nats."""
    rows = []
    for before, after in zip(original, changed, strict=True):
        truth = before.double().log_softmax(dim=-1)
        rows.append((truth.exp() * (truth - after.double().log_softmax(dim=-1))).sum(dim=-1).cpu())
    return torch.stack(rows)


def line_a_text(
    data: pd.DataFrame, x: str, y: str, thick: Mapping[str, Sequence[float]] | None = None
) -> go.Figure:
    """A thin line a text, and thick ones over 0, 1, 2, ... for what is true of all of them."""
    figure = go.Figure()
    for text in data["text"].unique():
        rows = data[data["text"] == text]
        figure.add_scatter(x=rows[x], y=rows[y], name=text, line_width=1, opacity=0.6)
    for (name, values), dash in zip((thick or {}).items(), ("solid", "dot"), strict=False):
        line = {"width": 4, "color": GREY, "dash": dash}
        figure.add_scatter(x=list(range(len(values))), y=list(values), name=name, line=line)
    figure.update_traces(mode="lines")
    return dressed(figure, x, y)


def dressed(figure: go.Figure, x: str, y: str) -> go.Figure:
    """Axes named, legible on white and on black."""
    return figure.update_layout(
        template="none",
        font_color=GREY,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis_title=x,
        yaxis_title=y,
    )


def main(claim: Claim, measure: Callable[[TransformerBridge, int], Finding]) -> NoReturn:
    """Run one analysis from the command line; ``measure`` gets the model and the seed."""
    parser = _parser(claim)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    def on_model() -> tuple[Finding, dict[str, str]]:
        model = eyechart.load(options.model, device=options.device, dtype=options.dtype)
        finding = measure(model, options.seed)
        facts = facts_of(model)
        return finding, {
            "model": facts.name,
            "weights": facts.weights,
            "dtype": options.dtype,
            "device": facts.device,
        }

    _judge(claim, options, on_model)


def main_without_model(claim: Claim, measure: Callable[[int], Finding]) -> NoReturn:
    """Run an analysis of random numbers from the command line; ``measure`` gets the seed."""
    options = _parser(claim).parse_args()
    _judge(claim, options, lambda: (measure(options.seed), {}))


def _parser(claim: Claim) -> argparse.ArgumentParser:
    script = Path(sys.argv[0])
    parser = argparse.ArgumentParser(
        description=claim.statement, epilog=f"Source: {claim.source}. Holds if {claim.holds_if}."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=script.parent / "out" / script.stem)
    return parser


def _judge(
    claim: Claim,
    options: argparse.Namespace,
    measured: Callable[[], tuple[Finding, dict[str, str]]],
) -> NoReturn:
    """Write and print what was found, and on what."""
    name = Path(sys.argv[0]).stem
    try:
        ensure_writable(options.out)
        finding, subject = measured()
    except eyechart.EyechartError as problem:
        print(f"{name}: {problem}", file=sys.stderr)
        sys.exit(problem.exit_status)
    verdict = {
        "claim": asdict(claim),
        "holds": finding.holds,
        "numbers": finding.numbers,
        **subject,
        "seed": options.seed,
        "versions": versions(),
    }
    write_text_whole(options.out / "data.csv", finding.data.to_csv(index=False))
    write_text_whole(options.out / "figure.html", finding.figure.to_html(include_plotlyjs=True))
    write_text_whole(options.out / "verdict.json", json.dumps(verdict, indent=1))
    print(f"claim    {claim.statement}")
    print(f"source   {claim.source}")
    print(f"holds if {claim.holds_if}")
    if subject:
        print(f"model    {subject['model']}, {subject['dtype']} on {subject['device']}")
    for what, value in finding.numbers.items():
        print(f"{value:>8.4g} {what}")
    print(f"verdict  {'holds' if finding.holds else 'DOES NOT HOLD'}; written to {options.out}")
    sys.exit(0 if finding.holds else 1)
