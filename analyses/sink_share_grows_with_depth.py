"""Does everything flow to the first token as the model gets deeper?

The plain way: hooks read every layer's pattern, the whole matrices (A + I)/2 of the head mean are
multiplied layer by layer, and the last row's first entry is the share. ``information_flow`` carries
one row instead, and the largest disagreement of the two is part of the verdict. That the share
grows is first of all the causal mask's doing: Proposition 5.2 holds for any attention that does not
change from layer to layer. So the figure shows beside the model what uniform attention of the same
depth gives, the first entry of the last row of [(U + I)/2]^L. That "near-monotone" means a rank
correlation with depth of at least 0.95 is a convention.
"""

import pandas as pd
import torch
from frame import Claim, Finding, line_a_text, main, require
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.results import Sequences
from eyechart.sequences import prepare
from eyechart.texts import DOMAINS, TEXTS

MONOTONE = 0.95

CLAIM = Claim(
    statement=(
        "With depth, the last token's share of attention rollout on the first token grows towards "
        "one."
    ),
    source="Barbero et al., arXiv 2406.04267, Proposition 5.2",
    holds_if=(
        "in every text the share is larger after the last layer than after the first, the mean "
        f"over texts has a Spearman correlation with depth of {MONOTONE} or more, and "
        "information_flow agrees with the product of whole matrices"
    ),
)


def by_whole_matrices(
    model: TransformerBridge, prompt: Sequences
) -> Float[Tensor, "layer position"]:
    """The last row of the product of (A + I)/2 of layers 0 to l, of one text."""
    means: dict[str, Tensor] = {}

    def keep(pattern: Float[Tensor, "batch head query key"], hook: object) -> None:
        means[hook.name] = pattern[0].double().mean(dim=0).cpu()  # type: ignore[attr-defined]

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        model.run_with_hooks(
            prompt.tokens.to(model.cfg.device),
            fwd_hooks=[(name, keep) for name in names],
            return_type=None,
        )
    product = identity = torch.eye(prompt.lengths[0], dtype=torch.float64)
    rows = []
    for name in names:
        product = (means[name] + identity) / 2 @ product
        # Learned sinks take part of every row; the share is of what is left.
        rows.append(product[-1] / product[-1].sum())
    return torch.stack(rows)


def uniform(length: int, depth: int) -> Float[Tensor, " layer"]:
    """The share where every token attends to all before it alike, after each layer."""
    count = torch.arange(1, length + 1, dtype=torch.float64)
    step = (torch.ones(length, length).tril().double() / count[:, None] + torch.eye(length)) / 2
    return torch.stack(
        [torch.linalg.matrix_power(step, layer + 1)[-1, 0] for layer in range(depth)]
    )


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Every text through the library, the first one through whole matrices as well."""
    flow = eyechart.information_flow(model, list(TEXTS.values()), measures=("rollout",), seed=seed)
    require(flow, "rollout")
    share = flow.sink_share.double()
    first, *_ = TEXTS
    plain = by_whole_matrices(model, prepare(model, TEXTS[first]))
    disagreement = float((flow.by_layer("rollout")[0, :, : plain.shape[1]] - plain).abs().max())
    depth = share.shape[1]
    reference = torch.stack([uniform(last + 1, depth) for last in flow.query.tolist()])
    data = pd.DataFrame(
        {
            "text": text,
            "domain": DOMAINS[text],
            "layer": layer,
            "share on the first token": float(share[row, layer]),
            "uniform attention": float(reference[row, layer]),
        }
        for row, text in enumerate(TEXTS)
        for layer in range(depth)
    )
    means = share.mean(dim=0)
    rank = float(pd.Series(means.tolist()).rank().corr(pd.Series(range(depth))))
    thick = {"mean over texts": means.tolist(), "uniform": reference.mean(dim=0).tolist()}
    figure = line_a_text(data, "layer", "share on the first token", thick)
    grew = share[:, -1] > share[:, 0]
    return Finding(
        holds=bool(grew.all()) and rank >= MONOTONE and disagreement < 1e-4,
        numbers={
            "mean share after the first layer": float(share[:, 0].mean()),
            "mean share after the last layer": float(share[:, -1].mean()),
            "the same with uniform attention": float(reference[:, -1].mean()),
            f"share of {len(TEXTS)} texts where it grew": float(grew.double().mean()),
            "layers after which it passes one half": _depth_of_half(share),
            "layers with uniform attention": _depth_of_half(reference),
            "Spearman correlation of the mean with depth": rank,
            "largest disagreement with whole matrices": disagreement,
        },
        data=data,
        figure=figure,
    )


def _depth_of_half(share: Float[Tensor, "batch layer"]) -> float:
    past = (share.mean(dim=0) > 0.5).nonzero()
    return float(past[0]) + 1 if len(past) else float("inf")


if __name__ == "__main__":
    main(CLAIM, measure)
