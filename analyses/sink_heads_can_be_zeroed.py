"""Does a head that parks on the first token do anything?

The head with the largest mean mass on the first token of twelve texts is silenced, and the
next-token distributions of other texts are compared with and without it. The plain way puts zeros
in its pattern in a TransformerLens hook and runs the whole model; ``head_census`` silences every
head of the layer from the layer on, and the disagreement of the two is part of the verdict. The
control is the head of the same layer that looks at the first token least: in a layer where no head
matters, a sink that does not matter is nothing to tell.

Limited: one layer, twelve texts of 48 tokens, twelve positions each. That under 0.005 nats (half a
per cent of perplexity) is nothing, and that the control must cost twice as much, are conventions.
"""

import pandas as pd
import torch
from frame import Claim, Finding, dressed, kl_by_hooks, main
from plotly import graph_objects as go
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.statistics import bootstrap_ci, derive_generator

import eyechart
from eyechart.results import head_name
from eyechart.texts import DOMAINS, HELD_OUT, TEXTS

MASS, CHEAP, TIMES = 0.99, 0.005, 2.0

CLAIM = Claim(
    statement=(
        "A head that gives nearly all its attention to the first token does nothing: it can be "
        "silenced at next to no cost."
    ),
    source="Guo et al., arXiv 2410.13835, and Gu et al., arXiv 2410.10781",
    holds_if=(
        f"some head's mean mass on the first token exceeds {MASS}; zeroing it costs under {CHEAP} "
        "nats of KL, at the upper end of a 95% bootstrap interval over texts; zeroing the head of "
        f"the same layer that looks there least costs at least {TIMES:g} times as much; and "
        "head_census agrees with plain hooks"
    ),
)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """The head by hooks, all heads of its layer through the library."""
    found = eyechart.attention_statistics(model, list(TEXTS.values()), statistics=("first",))
    ((layer, head, mass),) = found.strongest("first", 1)
    first = found.by_head("first")[layer]
    census = eyechart.head_census(
        model,
        list(TEXTS.values())[:2],
        held_out=list(HELD_OUT.values()),
        layers=(layer,),
        joint_budget=None,
        context=16,
        seed=seed,
    )
    trials = census.trials
    at, tokens = list(trials.positions), trials.texts.tokens
    nowhere = torch.zeros(tokens.shape[1], tokens.shape[1])
    elsewhere = nowhere.clone()
    elsewhere[:, 0] = 1
    patterns = {"zero": nowhere, "first": elsewhere}
    plain = {
        name: kl[:, at].mean(dim=-1)
        for name, kl in kl_by_hooks(model, tokens, layer, head, patterns).items()
    }
    zeroed = trials.kl["zero"][:, layer]
    apart = float((zeroed[:, head] / plain["zero"] - 1).abs().max())
    low, high = bootstrap_ci(plain["zero"], generator=derive_generator(seed, "texts"))
    least = int(first.nan_to_num(torch.inf).argmin())
    cost, control = zeroed.mean(dim=0)[[head, least]].tolist()
    data = pd.DataFrame(
        {
            "layer": layer,
            "head": number,
            "text": text,
            "domain": DOMAINS[text],
            "mass on the first token": float(first[number]),
            "kl_zero": float(zeroed[row, number]),
        }
        for number in range(zeroed.shape[1])
        for row, text in enumerate(HELD_OUT)
    )
    figure = go.Figure()
    for number in range(zeroed.shape[1]):
        figure.add_scatter(
            x=[float(first[number])] * len(HELD_OUT),
            y=zeroed[:, number].tolist(),
            text=list(HELD_OUT),
            name=head_name(layer, number),
            mode="markers",
        )
    figure.add_hline(y=CHEAP, line_dash="dot")
    figure.update_yaxes(type="log")
    dressed(figure, "mean mass on the first token", "KL with the head zeroed, a point a text")
    return Finding(
        holds=mass > MASS and float(high) < CHEAP and control >= TIMES * cost and apart < 0.01,
        numbers={
            f"mean mass on the first token of {head_name(layer, head)}": mass,
            "KL of zeroing it, mean over texts": cost,
            "its lower 95% limit": float(low),
            "its upper 95% limit": float(high),
            "KL of all its attention on the first token": float(plain["first"].mean()),
            f"mean mass on the first token of {head_name(layer, least)}": float(first[least]),
            "KL of zeroing that one": control,
            "times as much": control / cost,
            "largest relative disagreement with plain hooks": apart,
        },
        data=data,
        figure=figure,
    )


if __name__ == "__main__":
    main(CLAIM, measure)
