"""Is the mid-depth valley of effective rank the first token's doing?

Autoregressive models are reported to compress a text in their middle layers: the entropy of the
spectrum of its token states falls and rises again. One massive activation is enough to make such a
valley, because a single long row makes all other directions small beside it. So the effective rank
is measured of all tokens and of all but the first, and the two are compared at the layer where the
valley of all tokens is deepest. The plain way: TransformerLens hooks read the stream, numpy takes
its singular values; the largest disagreement with ``eyechart.rank_collapse`` on the first text is
part of the verdict. That a valley is half the rank on both sides, and none a tenth, is a
convention. Dips elsewhere (a small one at the second or third block is the same with and without
the first token) are among the numbers and in the data.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from frame import Claim, Finding, line_a_text, main
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.statistics import bootstrap_ci, derive_generator

from eyechart.collapse.rank import rank_collapse
from eyechart.results import Sequences
from eyechart.sequences import prepare
from eyechart.texts import DOMAINS, TEXTS

VALLEY, NONE = 0.5, 0.1

CLAIM = Claim(
    statement=(
        "The valley of effective rank in the middle layers is made by the first token alone: "
        "without its state there is none."
    ),
    source="The valley: Skean et al., arXiv 2502.02013; that the first token makes it: eyechart",
    holds_if=(
        "at the layer where the effective rank of all tokens dips most in the mean over texts, it "
        f"dips by more than {VALLEY:.0%} of its height on both sides, without the first token by "
        f"less than {NONE:.0%} (95% bootstrap intervals over texts), the layer is neither of the "
        "first nor of the last three, and the library agrees with plain hooks"
    ),
)


def by_hooks(model: TransformerBridge, prompt: Sequences) -> Float[Tensor, "layer part"]:
    """Effective rank after every block, of all tokens of one text and of all but the first."""
    ranks: list[list[float]] = []

    def read(stream: Float[Tensor, "batch position d_model"], hook: object) -> None:
        states = stream[0].double().cpu().numpy()
        both = []
        for x in (states, states[1:]):
            share = np.linalg.svd(x, compute_uv=False)
            share = share / share.sum()
            both.append(float(np.exp(-(share * np.log(share)).sum())))
        ranks.append(both)

    hooks: list[Any] = [
        (f"blocks.{layer}.hook_resid_post", read) for layer in range(model.cfg.n_layers)
    ]
    with torch.no_grad():
        model.run_with_hooks(prompt.tokens.to(model.cfg.device), fwd_hooks=hooks, return_type=None)
    return torch.tensor(ranks, dtype=torch.float64)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Every text through the library, the first one the plain way as well."""
    found = rank_collapse(model, list(TEXTS.values()), variants=("full",))
    first, *_ = TEXTS.values()
    whole, rest = (
        found.of("effective_rank", without_first=without)[:, found.blocks]
        for without in (False, True)
    )
    plain = by_hooks(model, prepare(model, first))
    ours = torch.stack([whole[0, 1:], rest[0, 1:]], dim=1)
    disagreement = float((ours / plain - 1).abs().max())
    dips, rest_dips = (found.dips(without_first=without) for without in (False, True))
    at = int(dips.mean(dim=0).argmax())
    generator = derive_generator(seed, "texts")
    low, _ = bootstrap_ci(dips[:, at], dim=0, generator=generator)
    _, high = bootstrap_ci(rest_dips[:, at], dim=0, generator=generator)
    data = pd.DataFrame(
        {
            "text": text,
            "domain": DOMAINS[text],
            "layer": layer,
            "effective rank": float(whole[row, layer]),
            "effective rank without the first token": float(rest[row, layer]),
            "dip": float(dips[row, layer]),
            "dip without the first token": float(rest_dips[row, layer]),
        }
        for row, text in enumerate(TEXTS)
        for layer in range(whole.shape[1])
    )
    thick = {
        "mean, all tokens": whole.mean(dim=0).tolist(),
        "mean, without the first": rest.mean(dim=0).tolist(),
    }
    normalised = (
        found.dips("matrix_entropy_normalised", without_first=without).mean(dim=0)[at]
        for without in (False, True)
    )
    return Finding(
        holds=(
            float(low) > VALLEY
            and float(high) < NONE
            and 3 < at < whole.shape[1] - 3
            and disagreement < 0.01
        ),
        numbers={
            "layer of the deepest mean dip": float(at),
            "dip there, all tokens": float(dips[:, at].mean()),
            "lower 95% limit": float(low),
            "dip there, without the first token": float(rest_dips[:, at].mean()),
            "upper 95% limit": float(high),
            "largest mean dip anywhere, without the first token": float(
                rest_dips.mean(dim=0).max()
            ),
            "largest dip of a text there, without the first token": float(rest_dips[:, at].max()),
            "dip of the normalised matrix entropy there, all tokens": float(next(normalised)),
            "the same, without the first token": float(next(normalised)),
            "largest relative disagreement with plain hooks": disagreement,
        },
        data=data,
        figure=line_a_text(data, "layer", "effective rank", thick),
    )


if __name__ == "__main__":
    main(CLAIM, measure)
