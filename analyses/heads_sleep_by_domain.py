"""Are there heads that sleep on one kind of text and work on another?

Every head's mean mass on the first token is taken on twelve texts of six domains, cut to one
length. A head whose mass differs between two domains by more than one half sleeps on some and works
on others: it is awake on the domains in the lower half of its range, dormant on those in the upper.
If that is more than a pattern, silencing it costs more where it is awake. That is tried on other
texts of the same domains. Domains differ in how easily they are upset at all, so the control is the
same ratio for the other heads of the layer, which do not change so much: what is left after
dividing by their median is the head's own. The plain way, zeros in the pattern in a TransformerLens
hook, is run for the head whose mass differs most, and its disagreement with ``head_census`` is part
of the verdict.

Limited: only the layers of these heads are tried, on eighteen texts of 48 tokens, twelve positions
each; some domains have but one text for the status and two for the trial, and the heads are few, so
no interval is claimed.
"""

import pandas as pd
import torch
from frame import Claim, Finding, dressed, kl_by_hooks, main
from plotly import graph_objects as go
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.heads.inputs import by_domain, of_one_length
from eyechart.results import head_name
from eyechart.sequences import prepare
from eyechart.texts import DOMAINS, HELD_OUT, TEXTS, UNSEEN

RANGE = 0.5
FRESH = by_domain(HELD_OUT | UNSEEN)
SETTLED = 1.0
"""A budget so large that zeroing settles every head: what else could replace it is not asked."""

CLAIM = Claim(
    statement=(
        "Some heads are dormant, resting on the first token, on one domain of text and active on "
        "another, and what they do there counts."
    ),
    source="Guo et al., arXiv 2410.13835, active and dormant heads",
    holds_if=(
        f"some head's mean mass on the first token differs between domains by more than {RANGE}; "
        "the median over such heads of the ratio of the KL of zeroing, awake over dormant domains, "
        "is above 1 on other texts; so is the median of that ratio over the one of the other heads "
        "of the layer; and head_census agrees with plain hooks"
    ),
)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Status on some texts, cost on others."""
    texts = of_one_length(prepare(model, list(TEXTS.values())))
    first = eyechart.attention_statistics(model, texts, statistics=("first",)).first.mean(dim=-1)
    domains = list(dict.fromkeys(DOMAINS.values()))
    of_text = [DOMAINS[name] for name in TEXTS]
    mass = torch.stack([first[[d == domain for d in of_text]].mean(dim=0) for domain in domains])
    reach = (mass.amax(dim=0) - mass.amin(dim=0)).nan_to_num(0)
    widest = divmod(int(reach.argmax()), reach.shape[1])
    # Where there is none, the nearest is shown, and the claim fails.
    changing = (reach > RANGE).nonzero().tolist() or [list(widest)]
    census = eyechart.head_census(
        model,
        by_domain(TEXTS),
        held_out=FRESH,
        budget=SETTLED,
        joint_budget=None,
        layers=sorted({layer for layer, _ in changing}),
        context=16,
        seed=seed,
    )
    trials, cost = census.trials, census.trials.by_domain("zero")
    nowhere = torch.zeros(trials.texts.tokens.shape[1], trials.texts.tokens.shape[1])
    plain = kl_by_hooks(model, trials.texts.tokens, *widest, {"zero": nowhere})["zero"]
    plain = plain[:, list(trials.positions)].mean(dim=-1)
    apart = float((trials.kl["zero"][:, *widest] / plain - 1).abs().max())
    changed = {(layer, head) for layer, head in changing}
    rows, ratios, gains = [], [], []
    for layer, head in changing:
        middle = (mass[:, layer, head].amax() + mass[:, layer, head].amin()) / 2
        awake = (mass[:, layer, head] < middle).tolist()
        kl = torch.stack([cost[domain][layer] for domain in domains])
        ratio = kl[awake].mean(dim=0) / kl[[not up for up in awake]].mean(dim=0)
        others = ratio[[(layer, other) not in changed for other in range(len(ratio))]]
        ratios.append(float(ratio[head]))
        gains.append(float(ratio[head] / others.median()))
        rows += [
            {
                "head": head_name(layer, head),
                "domain": domain,
                "mass on the first token": float(mass[index, layer, head]),
                "status": "awake" if awake[index] else "dormant",
                "kl_zero": float(kl[index, head]),
                "awake over dormant": ratios[-1],
                "over that of the other heads": gains[-1],
            }
            for index, domain in enumerate(domains)
        ]
    data = pd.DataFrame(rows)
    figure = go.Figure()
    for name in data["head"].unique():
        of = data.loc[data["head"] == name].sort_values("mass on the first token")
        figure.add_scatter(
            x=of["mass on the first token"],
            y=of["kl_zero"],
            text=of["domain"],
            name=name,
            mode="lines+markers+text",
            textposition="top center",
        )
    figure.update_yaxes(type="log")
    dressed(figure, "mean mass on the first token", "KL with the head zeroed")
    said = head_name(*widest)
    median, gain = (float(torch.tensor(x).quantile(0.5)) for x in (ratios, gains))
    return Finding(
        holds=float(reach[widest]) > RANGE and median > 1 and gain > 1 and apart < 0.01,
        numbers={
            f"heads whose mass differs by more than {RANGE}": float((reach > RANGE).sum()),
            f"largest difference, of {said}": float(reach[widest]),
            f"its lowest mass, on {domains[int(mass[:, *widest].argmin())]}": float(
                mass[:, *widest].min()
            ),
            f"its highest, on {domains[int(mass[:, *widest].argmax())]}": float(
                mass[:, *widest].max()
            ),
            "KL of zeroing, awake over dormant, median over heads": median,
            "the same over that of the other heads of the layer": gain,
            "share of these heads where the latter exceeds 1": float(
                (torch.tensor(gains) > 1).double().mean()
            ),
            "largest relative disagreement with plain hooks": apart,
        },
        data=data,
        figure=figure,
    )


if __name__ == "__main__":
    main(CLAIM, measure)
