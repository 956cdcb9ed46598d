"""Do n and n + 1 repetitions of a token become indistinguishable?

The paper's Figure 5 a and c: a question, then ones. The plain way runs every prompt alone, pair by
pair, and a TransformerLens hook reads the last token after the final norm (``pairs.py``). That is
the definition; the library gets the same numbers for all n from one forward pass
(``eyechart.collapse_curve``), and the largest disagreement of the two is part of the verdict. The
floor is what the model's arithmetic alone makes of the same prompt in another arrangement of the
pass: no smaller distance means anything.
"""

import pandas as pd
from frame import GREY, Claim, Finding, main
from pairs import COPY, COUNT, disagreement, fitting
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.families import repeat
from eyechart.results import collapse_figures

LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 300, 512)
ALONE = (1, 10, 100, 300)
PROMPTS = {"counting": COUNT, "copying": COPY}

CLAIM = Claim(
    statement=(
        "After a question, the last token's final representation hardly changes when one more '1' "
        "is appended, and the change vanishes as the sequence grows."
    ),
    source="Barbero et al., arXiv 2406.04267, Theorem 4.2 and Figure 5a and c",
    holds_if=(
        "after a counting and after a copying question the relative L1 distance between n and "
        "n + 1 falls at least tenfold from the shortest to the longest n, stays above the numeric "
        "floor, and collapse_curve agrees with the pair-by-pair runs within a hundredth of the "
        "smallest distance"
    ),
)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """After both questions, in one pass and pair by pair, against the floor."""
    family, curves = repeat(), {}
    numbers: dict[str, float] = {}
    held = []
    for name, prompt in PROMPTS.items():
        lengths = fitting(model, family, LENGTHS, prompt, least=100)
        curve = eyechart.collapse_curve(
            model, family, lengths, prompt=prompt, formats=(), next_token=False
        )
        last = curve.relative[-1]
        fall, least = float(last[0] / last[-1]), float(last.min())
        apart = disagreement(model, family, curve, ALONE, prompt)
        law = curve.fit()
        held.append(fall >= 10 and least > curve.floor() and apart < least / 100)
        curves[name] = curve
        numbers |= {
            f"{name}: relative distance at n = {lengths[0]}": float(last[0]),
            f"{name}: relative distance at n = {lengths[-1]}": float(last[-1]),
            f"{name}: times it fell": fall,
            f"{name}: slope on log-log axes": law.slope if law else float("nan"),
            f"{name}: largest numeric floor": curve.floor(),
            f"{name}: unrelated prompts": float(curve.unrelated["relative"][-1]),
            f"{name}: largest disagreement with pair-by-pair runs": apart,
        }
    figure = collapse_figures.curves(curves["counting"])
    figure.add_scatter(
        x=list(curves["copying"].lengths),
        y=curves["copying"].relative[-1].tolist(),
        name="after a copying question",
        line={"color": GREY, "width": 4, "dash": "dash"},
    )
    return Finding(
        holds=all(held),
        numbers=numbers,
        data=pd.concat([curve.to_frame().assign(question=name) for name, curve in curves.items()]),
        figure=figure,
    )


if __name__ == "__main__":
    main(CLAIM, measure)
