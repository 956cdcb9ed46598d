"""Can a head that looks at itself be replaced by a linear map of each token?

The head with the largest mean a_ii on twelve texts is given the identity for a pattern, after which
it is x_i W_V W_O and nothing else; and it is silenced. Both are compared, on prose that did not
choose it, by the divergence of the next-token distributions. The plain way exchanges the pattern in
a TransformerLens hook and runs the whole model; ``head_census`` exchanges what the head has mixed
and runs the layers from there, and their disagreement is part of the verdict. The control is every
other head of the layer: a head that is cheap to replace by the identity only because it is cheap to
replace by anything proves nothing.

Limited: five texts of 64 tokens, 16 positions each, spread from an eighth of the length on. Before
that the name does not fit the head: at the second token it can look at nothing but the first,
which draws it, and itself. What the identity costs there is among the numbers, not in the verdict.
That "several times" means three is a convention, and 0.02 nats is one: two per cent of perplexity.
"""

import pandas as pd
import torch
from frame import Claim, Finding, dressed, kl_by_hooks, main
from plotly import graph_objects as go
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.statistics import bootstrap_ci, derive_generator

import eyechart
from eyechart.results import head_name
from eyechart.texts import DOMAINS, HELD_OUT, TEXTS, UNSEEN

TOKENS, POSITIONS = 64, 16
CHEAP, SEVERAL = 0.02, 3.0
PROSE = {name: text for name, text in (HELD_OUT | UNSEEN).items() if DOMAINS[name] == "prose"}
NAMING = [text for name, text in TEXTS.items() if DOMAINS[name] == "prose"]

CLAIM = Claim(
    statement=(
        "The most diagonal head is close to a linear map of each token by itself: the identity "
        "takes its place for little, though the head is not idle."
    ),
    source="Barbero et al., arXiv 2410.06205, section 5 and Definition 5.1",
    holds_if=(
        f"on prose the identity costs under {CHEAP} nats of KL; zeroing costs at least "
        f"{SEVERAL:g} times as much in the geometric mean over texts, with a 95% bootstrap "
        "interval above 1; over the other heads of the layer the median of that ratio is below 1; "
        "and head_census agrees with plain hooks"
    ),
)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """The head by hooks, all heads of its layer through the library."""
    found = eyechart.attention_statistics(model, list(TEXTS.values()), statistics=("diagonal",))
    ((layer, head, mass),) = found.strongest("diagonal", 1)
    census = eyechart.head_census(
        model,
        {"prose": NAMING},
        held_out={"prose": list(PROSE.values())},
        layers=(layer,),
        tokens=TOKENS,
        positions=POSITIONS,
        screen=False,
        joint_budget=None,
        context=16,
        seed=seed,
    )
    trials = census.trials
    at, tokens = list(trials.positions), trials.texts.tokens
    length = tokens.shape[1]
    plain = kl_by_hooks(
        model,
        tokens,
        layer,
        head,
        {"identity": torch.eye(length), "zero": torch.zeros(length, length)},
    )
    costs = {
        name: torch.stack(
            [trials.kl[name][trials.units == row, layer].mean(dim=0) for row in range(len(PROSE))]
        )
        for name in ("identity", "zero")
    }
    apart = max(
        float((costs[name][:, head] / plain[name][:, at].mean(dim=-1) - 1).abs().max())
        for name in costs
    )
    identity, zero = (cost.mean(dim=0) for cost in costs.values())
    gain = (costs["zero"][:, head] / costs["identity"][:, head]).double().log()
    low, high = bootstrap_ci(gain, generator=derive_generator(seed, "texts"))
    others = torch.arange(len(zero)) != head
    ratios = (zero / identity)[others]
    diagonal = census.names.score("diagonal")[layer]
    data = pd.DataFrame(
        {
            "layer": layer,
            "head": number,
            "text": text,
            "diagonal": float(diagonal[number]),
            "kl_identity": float(costs["identity"][row, number]),
            "kl_zero": float(costs["zero"][row, number]),
        }
        for number in range(len(zero))
        for row, text in enumerate(PROSE)
    )
    figure = go.Figure()
    names = [head_name(layer, number) for number in range(len(zero))]
    figure.add_scatter(
        x=zero.tolist(), y=identity.tolist(), text=names, mode="markers+text", name="heads"
    )
    figure.update_traces(textposition="top center")
    ends = [float(torch.stack([zero, identity]).min()), float(torch.stack([zero, identity]).max())]
    figure.add_scatter(x=ends, y=ends, mode="lines", line_dash="dot", name="as much as zeroing")
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    dressed(figure, "KL with the head zeroed", "KL with the identity for a pattern")
    said = head_name(layer, head)
    cost, ratio = float(identity[head]), float(gain.mean().exp())
    return Finding(
        holds=(
            cost < CHEAP
            and ratio >= SEVERAL
            and float(low) > 0
            and float(ratios.median()) < 1
            and apart < 0.01
        ),
        numbers={
            f"mean a_ii of {said}": mass,
            "KL of the identity, mean over texts": cost,
            "KL of zeroing, mean over texts": float(zero[head]),
            "zeroing over identity, geometric mean over texts": ratio,
            "its lower 95% limit": float(low.exp()),
            "its upper 95% limit": float(high.exp()),
            "the same ratio of the other heads of the layer, median": float(ratios.median()),
            "the largest of them": float(ratios.max()),
            "mean KL of the identity at the second token": float(plain["identity"][:, 1].mean()),
            "largest relative disagreement with plain hooks": apart,
        },
        data=data,
        figure=figure,
    )


if __name__ == "__main__":
    main(CLAIM, measure)
