"""Which cheap picture of the flow agrees with the derivative it stands for?

Attention rollout and the path bound follow attention weights alone, and a weight says nothing of
what it carries: a sink gets most of the attention and adds next to nothing. ALTI weighs each edge
by how much of the block's output goes missing without it. The judge is the Frobenius norm of the
derivative of the last token's final representation with respect to each embedding; each measure is
ranked against it over the positions of a text.
"""

import pandas as pd
import torch
from frame import EIGHT, Claim, Finding, dressed, main, require
from plotly import graph_objects as go
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.statistics import (
    bootstrap_ci,
    derive_generator,
    sign_flip_permutation_pvalue,
)

import eyechart
from eyechart.texts import DOMAINS

RIVALS = ("rollout", "path_bound")
PROBES = 12
LEVEL = 0.05

CLAIM = Claim(
    statement=(
        "Over the positions of a text, the ALTI rollout ranks tokens more like the sensitivity of "
        "the last token does than attention rollout or the path bound."
    ),
    source="Ferrando et al., arXiv 2203.04212",
    holds_if=(
        "the mean over texts of ALTI's Spearman correlation with the sensitivity is higher than "
        f"that of each of the two, with p < {LEVEL} in a one-sided sign-flip test over texts"
    ),
)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Rank correlations of three measures with the sensitivity, text by text."""
    flow = eyechart.information_flow(
        model,
        list(EIGHT.values()),
        measures=("rollout", "path_bound", "alti", "sensitivity"),
        probes=PROBES,
        seed=seed,
    )
    require(flow, "alti", *RIVALS)
    found = {
        name: torch.tensor(flow.correlations(name, "sensitivity"), dtype=torch.float64)
        for name in ("alti", *RIVALS)
    }
    numbers, holds = {}, True
    for name, rho in found.items():
        low, high = bootstrap_ci(rho, generator=derive_generator(seed, name))
        numbers |= {
            f"mean Spearman of {name} with the sensitivity": float(rho.mean()),
            f"{name}: lower 95% limit": float(low),
            f"{name}: upper 95% limit": float(high),
        }
    for rival in RIVALS:
        gain = found["alti"] - found[rival]
        chance = sign_flip_permutation_pvalue(
            gain, alternative="greater", generator=derive_generator(seed, "flips", rival)
        )
        numbers[f"p that alti is no better than {rival}"] = float(chance)
        holds = holds and float(gain.mean()) > 0 and float(chance) < LEVEL
    data = pd.DataFrame(
        {"text": text, "domain": DOMAINS[text], "measure": name, "spearman": float(rho[row])}
        for name, rho in found.items()
        for row, text in enumerate(EIGHT)
    )
    figure = go.Figure()
    for name, rho in found.items():
        figure.add_scatter(x=list(EIGHT), y=rho.tolist(), name=name, mode="markers")
    figure.add_hline(y=0, line_dash="dot")
    dressed(figure, "text", "Spearman correlation with the sensitivity")
    return Finding(holds=holds, numbers=numbers, data=data, figure=figure)


if __name__ == "__main__":
    main(CLAIM, measure)
