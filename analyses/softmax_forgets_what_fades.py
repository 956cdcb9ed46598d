"""Do softmax and one layer of attention forget what published experiments say they forget?

Random numbers, no language model. Each experiment is held against the values read off its published
figure and against theory. The plain way for Figure 9: two calls of torch.softmax; the library's
prediction for it is an integral worked out by hand.

Figure 10 leaves open how its positions are scaled. Where that matters (the last length, with
rotary positions) the published value is told beside ours and not judged.
"""

import math

import pandas as pd
import plotly.graph_objects as go
import torch
from frame import Claim, Finding, dressed, main_without_model

from eyechart.collapse.softmax import (
    alternating_total_variation,
    one_layer_collapse,
    total_variation_decay,
)
from eyechart.results.figures import GREY
from eyechart.results.softmax import SyntheticCurve

TOLERANCE = 0.1  # what can be read off the figures
SEEDS = 64

DECAY = {
    500: 0.0265,
    750: 0.020,
    1000: 0.017,
    1500: 0.012,
    2000: 0.0093,
    2500: 0.0077,
    3000: 0.0067,
    4000: 0.005,
    5000: 0.004,
    10_000: 0.002,
}
ONE_LAYER = {5: 0.95, 10: 0.55, 100: 0.065, 500: 0.013, 1000: 0.007}
AT_5000 = {"none": 0.0014, "rotary": 0.0020}
LIMIT = 2 * (math.e - 1) / (math.e + 1)

CLAIM = Claim(
    statement=(
        "Scores that become alike give softmaxes that become alike; so a copied last token changes "
        "one layer's output by about |v|_1 / n. Scores that alternate never do."
    ),
    source="Barbero et al., arXiv 2406.04267, Lemma B.2, Proposition B.4, Figures 8 to 10",
    holds_if=(
        "Figure 9, and Figure 10 without and with rotary positions up to n = 1000 and without them "
        "at 5000, are met within 10%; the mean of Figure 8 falls with every n; alternating scores "
        "of every even n are 2(e-1)/(e+1) apart; and torch.softmax agrees with the library"
    ),
)


def off(curve: SyntheticCurve, published: dict[int, float]) -> float:
    """Largest relative difference from the published values."""
    measured = dict(zip(curve.lengths, curve.mean.tolist(), strict=True))
    return max(abs(measured[n] / value - 1) for n, value in published.items())


def by_torch(seed: int) -> float:
    """Relative difference of Figure 9's mean at one n, by the definition, from the prediction."""
    n, changed, amount = 1000, 200, 0.1
    generator = torch.Generator().manual_seed(seed + 1)
    distances = []
    for _ in range(400):
        x = torch.rand(n, generator=generator, dtype=torch.double)
        other = x.clone()
        other[:changed] += amount * torch.rand(changed, generator=generator, dtype=torch.double)
        distances.append((x.softmax(0) - other.softmax(0)).abs().sum())
    predicted = total_variation_decay((n,), changed, amount, seeds=1).predicted
    assert predicted is not None
    return abs(float(torch.stack(distances).mean() / predicted) - 1)


def measure(seed: int) -> Finding:
    """Every experiment beside its figure."""
    lengths = (*ONE_LAYER, 5000)
    curves = {
        "Figure 9": total_variation_decay(tuple(DECAY), seeds=SEEDS, seed=seed),
        "Proposition B.4": alternating_total_variation(),
        "Figure 10, no positions": one_layer_collapse(lengths, "none", seeds=SEEDS, seed=seed),
        "Figure 10, rotary": one_layer_collapse(lengths, "rotary", seeds=SEEDS, seed=seed),
        "Figure 8": one_layer_collapse(
            (*lengths, 10_000), "sinusoidal", normalised=False, decoder=True, seed=seed
        ),
    }
    none, rotary = curves["Figure 10, no positions"], curves["Figure 10, rotary"]
    alternating = curves["Proposition B.4"]
    even = [v for n, v in zip(alternating.lengths, alternating.mean, strict=True) if n % 2 == 0]
    judged = {
        "Figure 9: largest relative difference": off(curves["Figure 9"], DECAY),
        "Figure 10, no positions: largest relative difference": off(
            none, {**ONE_LAYER, 5000: AT_5000["none"]}
        ),
        "Figure 10, rotary, to n = 1000: largest relative difference": off(rotary, ONE_LAYER),
        "torch.softmax against the library's limit": by_torch(seed),
    }
    apart = max(abs(float(value) - LIMIT) for value in even)
    falls = bool((curves["Figure 8"].mean.diff() < 0).all())
    data = pd.concat([curve.to_frame().assign(experiment=name) for name, curve in curves.items()])
    return Finding(
        holds=max(judged.values()) < TOLERANCE and apart < 1e-9 and falls,
        numbers={
            **judged,
            "Figure 10, rotary, n = 5000": float(rotary.mean[-1]),
            "... as published": AT_5000["rotary"],
            "Figure 8, mean a coordinate at n = 500 (2^-7 is 0.0078)": float(
                curves["Figure 8"].mean[lengths.index(500)] / 64
            ),
            "alternating scores: distance at n = 10000": float(even[-1]),
        },
        # Where theory says nothing there is no column to fill.
        data=data.drop(columns="predicted"),
        figure=drawn(curves),
    )


def drawn(curves: dict[str, SyntheticCurve]) -> go.Figure:
    """Every mean by length; dots are the published values."""
    figure = go.Figure()
    for name, curve in curves.items():
        figure.add_scatter(x=curve.lengths, y=curve.mean.tolist(), name=name, mode="lines")
    dots = {"color": GREY, "size": 6}
    for name, points in (("Figure 9", DECAY), ("Figure 10", ONE_LAYER)):
        figure.add_scatter(
            x=list(points),
            y=list(points.values()),
            name=f"{name}, published",
            mode="markers",
            marker=dots,
        )
    figure.update_xaxes(type="log").update_yaxes(type="log")
    return dressed(figure, "n", "L1 distance")


if __name__ == "__main__":
    main_without_model(CLAIM, measure)
