"""Do real heads lose sharpness as there is more to attend to, within the bounds on softmax?

The lemma bounds every weight by the number of keys and the spread of their scores. The first token
is taken out and the rest made to sum to one, because a sink makes a head look sharp that looks at
nothing. The plain way: a TransformerLens hook on the scores of one text, from which spread and
largest weight follow by torch; the largest disagreement of the library with it is part of the
verdict. Under a causal mask the last query of a text's first T tokens is the same in the whole
text, so that one pass serves all T.
"""

from collections.abc import Callable

import pandas as pd
import torch
from frame import Claim, Finding, line_a_text, main
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.statistics import bootstrap_ci, derive_generator

from eyechart.collapse.heads import dispersion
from eyechart.errors import UnsupportedModelError
from eyechart.models import facts_of
from eyechart.results import Sequences
from eyechart.results.dispersion import Dispersion
from eyechart.sequences import fragment, from_ids, prefix
from eyechart.texts import HELD_OUT, TEXTS, UNSEEN

LENGTHS = (32, 64, 128, 256, 512)
TOGETHER = 5  # texts of about 120 tokens that make one long enough
COMPARED = 64

SHARP = "largest weight without the first token"
QUANTITIES: dict[str, Callable[[Dispersion], Tensor]] = {
    SHARP: lambda found: found.without_first.largest,
    "largest weight": lambda found: found.rows.largest,
    "spread without the first token, nats": lambda found: found.without_first.spread,
}

CLAIM = Claim(
    statement=(
        "No attention weight leaves the bounds that the spread of its scores sets, and with the "
        "first token taken out the largest weight falls as the sequence grows."
    ),
    source="Velickovic et al., arXiv 2410.01104, Lemma 2.1 and Theorem 2.2",
    holds_if=(
        "no row of any head violates the bounds; the mean over heads of the largest weight, over "
        "the last quarter of T tokens, is smaller at the largest T than at the smallest with a 95% "
        "bootstrap interval over texts below one; and the library agrees with plain scores"
    ),
)


def by_scores(
    model: TransformerBridge, prompt: Sequences
) -> tuple[Float[Tensor, "layer head query"], Float[Tensor, "layer head query"]]:
    """Spread and largest weight, the first key taken out, from every layer's own scores."""
    spreads, weights = [], []

    def read(scores: Float[Tensor, "batch head query key"], hook: object) -> None:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        rest = scores[0].double()[:, 1:, 1:]
        hidden = hidden[1:, 1:]
        low = rest.masked_fill(hidden, torch.inf).amin(dim=-1)
        spreads.append((rest.masked_fill(hidden, -torch.inf).amax(dim=-1) - low).cpu())
        rows = rest.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        weights.append(rows.amax(dim=-1).cpu())

    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in facts_of(model).attention_layers]
    with torch.no_grad():
        model.run_with_hooks(
            prompt.tokens.to(model.cfg.device),
            fwd_hooks=[(name, read) for name in names],
            return_type=None,
        )
    return torch.stack(spreads), torch.stack(weights)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Long texts made of short ones, cut to the longest T."""
    lengths, prompts = long_prompts(model)
    measured = {name: torch.empty(len(prompts), len(lengths)) for name in QUANTITIES}
    violations, checked = 0, 0
    for row, prompt in enumerate(prompts):
        found = dispersion(model, prompt)
        violations += int(found.violated.sum())
        checked += int((~found.rows.spread.isnan()).sum())
        for column, length in enumerate(lengths):
            late = slice(3 * length // 4, length)
            for name, quantity in QUANTITIES.items():
                measured[name][row, column] = quantity(found)[..., late].nanmean()
    short = prompts[0].first_tokens(COMPARED)
    spread, weight = by_scores(model, short)
    ours = dispersion(model, short).without_first
    layers = list(facts_of(model).attention_layers)
    disagreement = max(
        float((ours.spread[0, layers, :, 1:] - spread).abs().max()),
        float((ours.largest[0, layers, :, 1:] - weight).abs().max()),
    )

    ratio = (measured[SHARP][:, -1] / measured[SHARP][:, 0]).double().log()
    low, high = bootstrap_ci(ratio, dim=0, generator=derive_generator(seed, "texts"))
    data = pd.DataFrame(
        {"text": f"texts {row * TOGETHER + 1} to {(row + 1) * TOGETHER}", "T": length}
        | {name: float(values[row, column]) for name, values in measured.items()}
        for row in range(len(prompts))
        for column, length in enumerate(lengths)
    )
    figure = line_a_text(data, "T", SHARP)
    means = {name: values.mean(dim=0).tolist() for name, values in measured.items()}
    figure.add_scatter(x=lengths, y=means[SHARP], name="mean", line_width=4)
    figure.update_xaxes(type="log", tickvals=lengths)
    return Finding(
        holds=violations == 0 and float(high) < 0 and disagreement < 1e-2,
        numbers={
            f"violations in {checked} rows": float(violations),
            f"{SHARP}, T = {lengths[-1]} over T = {lengths[0]}": float(ratio.mean().exp()),
            "... lower 95% limit": float(low.exp()),
            "... upper 95% limit": float(high.exp()),
            **{
                f"{name}, T = {length}": value
                for name, values in means.items()
                for length, value in zip(lengths, values, strict=True)
            },
            "largest disagreement with plain scores": disagreement,
        },
        data=data,
        figure=figure,
    )


def long_prompts(model: TransformerBridge) -> tuple[list[int], list[Sequences]]:
    """The T that the model allows, and prompts of the longest of them."""
    limit = facts_of(model).n_ctx or LENGTHS[-1]
    lengths = [length for length in LENGTHS if limit >= length]
    if len(lengths) < 2:
        raise UnsupportedModelError(f"the model sees {limit} tokens; the claim needs {LENGTHS[1]}")
    every = list({**TEXTS, **HELD_OUT, **UNSEEN}.values())
    bos, _ = prefix(model)
    rows = [
        bos + fragment(model, "\n\n".join(every[i : i + TOGETHER]))
        for i in range(0, len(every), TOGETHER)
    ]
    shortest = min(len(row) for row in rows)
    lengths = [length for length in lengths if length <= shortest]
    return lengths, [from_ids(model, [row[: lengths[-1]]]) for row in rows]


if __name__ == "__main__":
    main(CLAIM, measure)
