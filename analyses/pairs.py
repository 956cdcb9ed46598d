"""What the analyses of collapse share: the plain way to a distance, prompts, and a figure.

The library gets all lengths from one forward pass in which prompts share their beginnings
(``eyechart.collapse_curve``). The plain way shares nothing: every prompt is run alone, and
TransformerLens hooks read its last token.
"""

from collections.abc import Collection, Sequence

import pandas as pd
import plotly.graph_objects as go
import torch
from frame import dressed
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eyechart.collapse import DEFAULT_PROMPT
from eyechart.errors import UnsupportedModelError
from eyechart.families import Family
from eyechart.models import facts_of
from eyechart.results import CollapseCurve
from eyechart.sequences import prefix

COUNT = DEFAULT_PROMPT
"""Asks for a count (Figure 5 a)."""

COPY = "What is the last digit of the following sequence? Sequence: "
"""Asks for a copy (Figure 5 c and d)."""

FINAL = "ln_final.hook_out"


def fitting(
    model: TransformerBridge, family: Family, lengths: Sequence[int], prompt: str, *, least: int
) -> list[int]:
    """The lengths whose prompts fit the model's context.

    Raises:
        UnsupportedModelError: the context ends before ``least``.
    """
    limit, build = facts_of(model).n_ctx, family.bind(model)
    front, _ = prefix(model, prompt)
    fit = [n for n in lengths if not limit or len(front) + max(map(len, build(n))) <= limit]
    if not fit or fit[-1] < least:
        raise UnsupportedModelError(
            f"the claim cannot be tested on this model: n = {least} does not fit its {limit} tokens"
        )
    return fit


def alone(
    model: TransformerBridge,
    family: Family,
    n: int,
    prompt: str,
    *,
    prepend_bos: bool | None = None,
    sites: Sequence[str] = (FINAL,),
) -> Float[Tensor, "side site d_model"]:
    """The last token at these hooks, of the shorter and of the longer prompt, each run alone."""
    front, _ = prefix(model, prompt, prepend_bos=prepend_bos)
    shorter, longer, *_ = family.bind(model)(n)
    ends: list[Tensor] = []

    def read(stream: Float[Tensor, "batch position d_model"], hook: object) -> None:
        ends.append(stream[0, -1].double().cpu())

    with torch.no_grad():
        for ids in (front + shorter, longer if family.bare else front + longer):
            model.run_with_hooks(
                torch.tensor([ids], device=model.cfg.device),
                fwd_hooks=[(site, read) for site in sites],
                return_type=None,
            )
    return torch.stack(ends).view(2, len(sites), -1)


def relative(ends: Float[Tensor, "side site d_model"]) -> float:
    """L1 distance over the longer prompt's L1 length, at the first site."""
    shorter, longer = ends[:, 0]
    return float((longer - shorter).abs().sum() / longer.abs().sum())


def disagreement(
    model: TransformerBridge,
    family: Family,
    curve: CollapseCurve,
    lengths: Collection[int],
    prompt: str,
) -> float:
    """Largest difference at these lengths between the final distances of a curve and the plain
    ones."""
    return max(
        abs(float(curve.relative[-1, at]) - relative(alone(model, family, n, prompt)))
        for at, n in enumerate(curve.lengths)
        if n in lengths
    )


def loglog(data: pd.DataFrame, by: str, y: str, *, bold: Collection[str] = ()) -> go.Figure:
    """One line for each name in the column ``by``, over n, both axes logarithmic."""
    figure = go.Figure()
    for name, rows in data.groupby(by, sort=False):
        width = 4 if name in bold else 1.5
        figure.add_scatter(x=rows["n"], y=rows[y], name=str(name), line_width=width)
    figure.update_traces(mode="lines+markers")
    figure.update_xaxes(type="log").update_yaxes(type="log")
    return dressed(figure, "n", y)
