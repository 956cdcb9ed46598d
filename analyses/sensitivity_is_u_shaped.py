"""Does the last token hear the beginning and the end of a text better than its middle?

Sensitivity is the Frobenius norm of the derivative of the last token's final-normed representation
with respect to each input embedding. The plain way: TransformerLens hooks, one backward pass of
torch for every random vector u, and the length of the gradient of ``u . y`` at each position, whose
mean square over normal u is the squared norm. The library does the same for many texts at once
(``eyechart.information_flow``). On one text alone both draw the same vectors from the same seed;
their largest disagreement there is part of the verdict.
"""

import pandas as pd
import torch
from frame import EIGHT, Claim, Finding, line_a_text, main, require
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.statistics import bootstrap_ci, derive_generator

import eyechart
from eyechart.results import Sequences
from eyechart.sequences import prepare
from eyechart.texts import DOMAINS

PROBES = 12
FEW = 4
"""Random vectors for the comparison: the same ones, so that few are enough."""

CLAIM = Claim(
    statement=(
        "The last token's final representation is more sensitive to the first and to the last "
        "input token than to those between."
    ),
    source="Barbero et al., arXiv 2406.04267, section 5",
    holds_if=(
        "the geometric means over texts of first over median and of last over median have 95% "
        "bootstrap intervals above 1, both ratios exceed 1 in most texts, and information_flow "
        "agrees with plain autograd"
    ),
)


def by_autograd(
    model: TransformerBridge, prompt: Sequences, seed: int
) -> Float[Tensor, " position"]:
    """Sensitivity to every position of the only row."""
    seen: dict[str, Tensor] = {}

    def start(stream: Float[Tensor, "batch position d_model"], hook: object) -> Tensor:
        seen["embedding"] = stream.detach().requires_grad_()
        return seen["embedding"]

    def read(normed: Float[Tensor, "batch position d_model"], hook: object) -> None:
        seen["last"] = normed[0, prompt.lengths[0] - 1]

    with torch.enable_grad():
        model.run_with_hooks(
            prompt.tokens.to(model.cfg.device),
            fwd_hooks=[("blocks.0.hook_resid_pre", start), ("ln_final.hook_out", read)],
            return_type=None,
        )
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(prompt.lengths[0], dtype=torch.float64)
    for _ in range(FEW):
        u = torch.randn(1, len(seen["last"]), generator=generator)[0].to(seen["last"])
        (gradient,) = torch.autograd.grad(seen["last"] @ u, seen["embedding"], retain_graph=True)
        squares += gradient[0].double().square().sum(dim=-1).cpu()
    return (squares / FEW).sqrt()


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Every text through the library, the first one the plain way as well."""
    measures = ("sensitivity",)
    first, *_ = EIGHT.values()
    plain = by_autograd(model, prepare(model, first), seed)
    alone = eyechart.information_flow(model, first, measures=measures, probes=FEW, seed=seed)
    require(alone, "sensitivity")
    disagreement = float((alone.by_position("sensitivity")[0] / plain - 1).abs().max())

    flow = eyechart.information_flow(
        model, list(EIGHT.values()), measures=measures, probes=PROBES, seed=seed
    )
    norms, widths = flow.by_position("sensitivity"), flow.sensitivity_interval
    assert widths is not None
    ratios = torch.tensor(flow.u_shape(), dtype=torch.float64)
    low, _ = bootstrap_ci(ratios.log(), dim=0, generator=derive_generator(seed, "texts"))
    both = float((ratios > 1).all(dim=1).double().mean())
    data = pd.DataFrame(
        {
            "text": text,
            "domain": DOMAINS[text],
            "position": position,
            "relative position": position / last,
            "sensitivity": float(norms[row, position]),
            "half width": float(widths[row, position]),
            "sensitivity over the median": float(
                norms[row, position] / norms[row, : last + 1].median()
            ),
        }
        for row, (text, last) in enumerate(zip(EIGHT, flow.query.tolist(), strict=True))
        for position in range(last + 1)
    )
    figure = line_a_text(data, "relative position", "sensitivity over the median")
    figure.update_yaxes(type="log")
    figure.add_hline(y=1, line_dash="dot")
    means = ratios.log().mean(dim=0).exp()
    return Finding(
        holds=bool((low > 0).all()) and both > 0.5 and disagreement < 0.01,
        numbers={
            "first over median: geometric mean over texts": float(means[0]),
            "first over median: lower 95% limit": float(low[0].exp()),
            "last over median: geometric mean over texts": float(means[1]),
            "last over median: lower 95% limit": float(low[1].exp()),
            f"share of {len(EIGHT)} texts where both exceed 1": both,
            "largest disagreement with plain autograd": disagreement,
        },
        data=data,
        figure=figure,
    )


if __name__ == "__main__":
    main(CLAIM, measure)
