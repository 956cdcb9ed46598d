"""Does attention alone make all tokens alike, and what stops it?

The same weights are run four times: as they are, without MLPs, without residual connections, and
without either. What is left of the states when their mean over tokens is taken off, relative to the
states in the composite norm, says how far tokens are from being one and the same. The plain way:
two TransformerLens hooks a block replace the stream by what attention wrote, and the ratio is taken
from its definition; the library does it for all variants (``eyechart.rank_collapse``), and the
largest disagreement on the first text is part of the verdict. That "collapsed" means a ratio below
0.05 is a convention; so is 0.3 for a model that has not.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from frame import EIGHT, Claim, Finding, main
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eyechart.collapse.rank import VARIANTS, rank_collapse
from eyechart.errors import UnsupportedModelError
from eyechart.results import Sequences
from eyechart.sequences import prepare
from eyechart.texts import DOMAINS

COLLAPSED, APART = 0.05, 0.3
BLOCKS = 10

CLAIM = Claim(
    statement=(
        "Attention alone makes all tokens alike within some ten layers; residual connections stop "
        "it, MLPs only slow it."
    ),
    source="Dong et al., arXiv 2103.03404, introduction",
    holds_if=(
        f"in the mean over texts the residual ratio of pure attention stays below {COLLAPSED} from "
        f"block {BLOCKS} on, that of the whole model never falls below {APART}, with residual "
        "connections and no MLP it stays above the one, with MLPs and no residual connections it "
        "falls below it later than pure attention's, and the library agrees with plain hooks"
    ),
)


def by_hooks(model: TransformerBridge, prompt: Sequences) -> Float[Tensor, " layer"]:
    """The ratio of pure attention after every block, of one text."""
    ratios: list[float] = []
    wrote: list[Tensor] = []

    def keep(write: Float[Tensor, "batch position d_model"], hook: object) -> None:
        wrote.append(write)

    def replace(
        stream: Float[Tensor, "batch position d_model"], hook: object
    ) -> Float[Tensor, "batch position d_model"]:
        x = wrote[-1][0].double().cpu().numpy()
        sizes = [
            np.sqrt(np.linalg.norm(y, 1) * np.linalg.norm(y, np.inf))
            for y in (x - x.mean(axis=0), x)
        ]
        ratios.append(sizes[0] / sizes[1])
        return wrote[-1]

    hooks: list[Any] = [
        hook
        for layer in range(model.cfg.n_layers)
        for hook in (
            (f"blocks.{layer}.hook_attn_out", keep),
            (f"blocks.{layer}.hook_resid_post", replace),
        )
    ]
    with torch.no_grad():
        model.run_with_hooks(prompt.tokens.to(model.cfg.device), fwd_hooks=hooks, return_type=None)
    return torch.tensor(ratios, dtype=torch.float64)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Every text in every variant through the library, the first one the plain way as well."""
    found = rank_collapse(model, list(EIGHT.values()))
    if found.unavailable:
        reason = next(iter(found.unavailable.values()))
        raise UnsupportedModelError(f"the claim cannot be tested on this model: {reason}")
    first, *_ = EIGHT.values()
    plain = by_hooks(model, prepare(model, first))
    curves = {variant: found.of("residual", variant)[:, found.blocks] for variant in VARIANTS}
    disagreement = float((curves["attention only"][0, 1:] - plain).abs().max())
    means = {variant: curve.mean(dim=0) for variant, curve in curves.items()}
    onsets = {variant: found.onset(variant, COLLAPSED) for variant in VARIANTS}
    after = min(BLOCKS, len(means["full"]) - 1)
    alone = float(means["attention only"][after:].max())
    pure, slowed = onsets["attention only"], onsets["no skip"]
    data = pd.DataFrame(
        {
            "text": text,
            "domain": DOMAINS[text],
            "variant": variant,
            "layer": layer,
            "residual": float(curve[row, layer]),
            "residual without the first token": float(
                found.of("residual", variant, without_first=True)[row, layer]
            ),
        }
        for variant, curve in curves.items()
        for row, text in enumerate(EIGHT)
        for layer in range(curve.shape[1])
    )
    return Finding(
        holds=(
            alone < COLLAPSED
            and float(means["full"].min()) > APART
            and float(means["no MLP"].min()) > COLLAPSED
            and pure is not None
            and slowed is not None
            and slowed > pure
            and disagreement < 1e-4
        ),
        numbers={
            f"pure attention: largest ratio from block {after} on": alone,
            "pure attention: ratio after the last block": float(means["attention only"][-1]),
            "whole model: least ratio": float(means["full"].min()),
            "residual connections, no MLP: least ratio": float(means["no MLP"].min()),
            "MLPs, no residual connections: ratio after the last block": float(
                means["no skip"][-1]
            ),
            f"pure attention: blocks until below {COLLAPSED}": _blocks(pure),
            f"MLPs, no residual connections: blocks until below {COLLAPSED}": _blocks(slowed),
            "largest disagreement with plain hooks": disagreement,
        },
        data=data,
        figure=found.plot(),
    )


def _blocks(onset: int | None) -> float:
    return float("inf") if onset is None else float(onset)


if __name__ == "__main__":
    main(CLAIM, measure)
