"""Do heads that look at a fixed place use the fast rotary frequencies?

A rotary model turns its queries and keys pair by pair, each pair of coordinates by its own angle a
token. Only the fast pairs tell neighbours apart, so a head that looks at itself or at the token
before should put its energy there. Every head's larger one of mean a_ii and mean a_i,i-1 is ranked
against the share of its queries' energy (squared length) in the fastest quarter of the pairs.

The control is the values, which are not turned: their energy in the same coordinates. If it were
ranked alike, the coordinates would be in use for some other reason than rotation. Values are shared
by the query heads of a group, so the keys, shared alike, stand beside them. The plain way reads
rotated queries, keys and values in TransformerLens hooks; the disagreement with the library's
``RotaryUse`` is part of the verdict.
"""

import pandas as pd
import torch
from frame import Claim, Finding, dressed, main
from jaxtyping import Float
from plotly import graph_objects as go
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.errors import UnsupportedModelError
from eyechart.heads.inputs import of_one_length
from eyechart.heads.rotary import rotary_use, rotation
from eyechart.results import Sequences
from eyechart.sequences import from_ids, prepare
from eyechart.texts import TEXTS

LEAST, REPEATED = 0.3, 32
SITES = {"queries": "rotated_q", "keys": "rotated_k", "values": "v"}

CLAIM = Claim(
    statement=(
        "Heads that look at themselves or at the token before them do it with the fast rotary "
        "frequencies."
    ),
    source="Barbero et al., arXiv 2410.06205, sections 4 and 5",
    holds_if=(
        "over heads the Spearman correlation of the larger of mean a_ii and mean a_i,i-1 with the "
        "queries' share of energy in the fastest quarter of the frequencies exceeds "
        f"{LEAST}, that with the keys' share exceeds that with the values' in the same "
        f"coordinates, which is below {LEAST}, and the library's RotaryUse agrees with plain hooks"
    ),
)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Scores of all heads, and their energy by frequency."""
    texts = of_one_length(prepare(model, list(TEXTS.values())))
    use, why, _ = rotary_use(model, texts, None)
    if use is None:
        raise UnsupportedModelError(f"the claim cannot be tested on this model: {why}")
    shares = by_hooks(model, texts)
    found = eyechart.attention_statistics(model, texts, statistics=("diagonal", "previous"))
    diagonal, previous = found.by_head("diagonal"), found.by_head("previous")
    score = torch.maximum(diagonal, previous)
    fast = {name: share[..., 0] for name, share in shares.items()}
    apart = max(
        float((fast["queries"] - use.q_high).abs().max()),
        float((fast["keys"] - use.k_high).abs().max()),
    )
    ranked = {name: spearman(score, share) for name, share in fast.items()}
    layers = range(score.shape[0])
    within = [spearman(score[layer], fast["queries"][layer]) for layer in layers]
    data = pd.DataFrame(
        {
            "layer": layer,
            "head": head,
            "diagonal": float(diagonal[layer, head]),
            "previous": float(previous[layer, head]),
            **{f"{name}, fastest quarter": float(x[layer, head]) for name, x in fast.items()},
        }
        for layer in layers
        for head in range(score.shape[1])
    )
    figure = go.Figure()
    for name, share in fast.items():
        figure.add_scatter(
            x=score.flatten().tolist(), y=share.flatten().tolist(), name=name, mode="markers"
        )
    dressed(figure, "larger of mean a_ii and mean a_i,i-1", "share of energy, fastest quarter")
    numbers = {f"Spearman correlation with the {name}": rho for name, rho in ranked.items()}
    numbers["with the queries, within a layer, mean over layers"] = sum(within) / len(within)
    for index, quarter in enumerate(("fastest", "slowest")):
        for name, share in shares.items():
            numbers[f"energy of {name} in the {quarter} quarter, mean over heads"] = float(
                share[..., index].mean()
            )
    numbers["largest disagreement of RotaryUse with plain hooks"] = apart
    return Finding(
        holds=(
            ranked["queries"] > LEAST
            and ranked["keys"] > ranked["values"]
            and ranked["values"] < LEAST
            and apart < 1e-4
        ),
        numbers=numbers,
        data=data,
        figure=figure,
    )


def by_hooks(
    model: TransformerBridge, texts: Sequences
) -> dict[str, Float[Tensor, "layer head quarter"]]:
    """Shares of energy in the fastest and in the slowest quarter of the turned coordinates."""
    repeated = from_ids(model, [[int(texts.tokens[0, -1])] * REPEATED])
    (turned,) = eyechart.capture(model, repeated, [eyechart.Record(SITES["queries"])])
    read = eyechart.capture(model, texts, [eyechart.Record(site) for site in SITES.values()])
    heads = next(iter(turned.values())).shape[2]
    shares: dict[str, list[Tensor]] = {name: [] for name in SITES}
    for layer, queries in turned.items():
        found = rotation(queries[0].transpose(0, 1))
        if isinstance(found, str):
            raise UnsupportedModelError(f"layer {layer}: {found}")
        for name, of in zip(SITES, read, strict=True):
            x = of[layer].double()
            if x.shape[-1] <= max(*found.first, *found.second):
                raise UnsupportedModelError(f"{name} are narrower than what is turned")
            energy = x[..., found.first].square() + x[..., found.second].square()
            count = max(1, energy.shape[-1] // 4)
            ends = torch.stack([energy[..., :count], energy[..., -count:]], dim=-1).sum(dim=-2)
            share = ends.sum(dim=1) / energy.sum(dim=(1, 3))[..., None]
            shares[name].append(share.mean(dim=0).repeat_interleave(heads // x.shape[2], dim=0))
    return {name: torch.stack(of) for name, of in shares.items()}


def spearman(x: Tensor, y: Tensor) -> float:
    """Over all entries of both."""
    pair = pd.DataFrame({"x": x.flatten().tolist(), "y": y.flatten().tolist()})
    return float(pair.corr(method="spearman").iloc[0, 1])


if __name__ == "__main__":
    main(CLAIM, measure)
