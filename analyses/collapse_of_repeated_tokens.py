"""Do n and n + 1 repetitions of a token become indistinguishable?

The paper's Figure 5a, measured the plain way: every prompt is run alone, pair by pair, and a
TransformerLens hook reads the last token after the final norm. That is the definition; the library
gets the same numbers for all n from one forward pass (``eyechart.collapse_curve``), and the largest
disagreement of the two is part of the verdict. The floor is what the model's arithmetic alone makes
of the same prompt run in another batch: no smaller distance means anything.
"""

import pandas as pd
import torch
from frame import Claim, Finding, main
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.collapse import DEFAULT_PROMPT
from eyechart.results import Sequences
from eyechart.sequences import repeated

LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 480)
FILLER = 7

CLAIM = Claim(
    statement=(
        "After a question, the last token's final representation hardly changes when one more '1' "
        "is appended, and the change vanishes as the sequence grows."
    ),
    source="Barbero et al., arXiv 2406.04267, Theorem 4.2 and Figure 5a",
    holds_if=(
        "the relative L1 distance between n and n + 1 falls at least tenfold from the shortest to "
        "the longest n, stays above the numeric floor, and collapse_curve agrees with the "
        "pair-by-pair runs"
    ),
)


def last_token(model: TransformerBridge, prompt: Sequences) -> Float[Tensor, " d_model"]:
    """The final-normed representation of the last real token of the first row."""
    seen: list[Tensor] = []

    def read(normed: Float[Tensor, "batch position d_model"], hook: object) -> None:
        seen.append(normed[0, prompt.lengths[0] - 1].double().cpu())

    with torch.no_grad():
        model.run_with_hooks(
            prompt.tokens.to(model.cfg.device),
            fwd_hooks=[("ln_final.hook_out", read)],
            return_type=None,
        )
    (only,) = seen
    return only


def relative(shorter: Tensor, longer: Tensor) -> float:
    """L1 distance over the longer prompt's L1 length."""
    return float((longer - shorter).abs().sum() / longer.abs().sum())


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Pair by pair, against the floor and against the library."""
    limit = model.cfg.n_ctx or max(LENGTHS) + 100
    before = repeated(model, "1", 1, prompt=DEFAULT_PROMPT).lengths[0] - 1
    lengths = [n for n in LENGTHS if before + n + FILLER <= limit]
    pairs, floors = [], []
    for n in lengths:
        short, long = (repeated(model, "1", m, prompt=DEFAULT_PROMPT) for m in (n, n + 1))
        alone = last_token(model, short)
        pairs.append(relative(alone, last_token(model, long)))
        # The same prompt, padded beside a longer one: other shapes and summation order, same truth.
        ids, labels = short.tokens[0].tolist(), list(short.labels[0])
        beside = Sequences.from_rows(
            [ids, ids + ids[-1:] * FILLER], [labels, labels + ["1"] * FILLER]
        )
        floors.append(relative(alone, last_token(model, beside)))
    curve = eyechart.collapse_curve(model, lengths=lengths)
    one_pass = curve.relative[-1].tolist()
    fall, floor = pairs[0] / pairs[-1], max(floors)
    disagreement = max(abs(pair - one) for pair, one in zip(pairs, one_pass, strict=True))
    figure = curve.plot()
    figure.add_scatter(
        x=lengths, y=[floor] * len(lengths), name="numeric floor", mode="lines", line_dash="dot"
    )
    return Finding(
        holds=fall >= 10 and min(pairs) > floor and disagreement < 1e-3,
        numbers={
            f"relative distance at n = {lengths[0]}": pairs[0],
            f"relative distance at n = {lengths[-1]}": pairs[-1],
            "times it fell": fall,
            "largest numeric floor": floor,
            "largest disagreement with collapse_curve": disagreement,
        },
        data=pd.DataFrame({"n": lengths, "relative": pairs, "floor": floors, "one_pass": one_pass}),
        figure=figure,
    )


if __name__ == "__main__":
    main(CLAIM, measure)
