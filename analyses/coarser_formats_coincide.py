"""How many coordinates of two collapsing representations become the same number in a format?

The representations of n and n + 1 ones are taken from the model as it runs and rounded to number
formats: float16, bfloat16 and the two of eight bits, from fine to coarse. The share of coordinates
that are stored alike should grow with n, because the two come closer, and with the coarseness. How
large it is follows from the format's spacing: two numbers a distance d apart fall into one cell of
a grid of spacing s with chance 1 - d / s, if the grid lies at random. int8, int4 and ternary are
measured too, but not judged: their one scale a vector is set by the largest coordinates. The
control is a pair of representations that have nothing to do with one another, at the same length.

At short lengths the fine formats tie at zero, and between neighbouring n a share is a count of a
few coordinates: hence the ends are compared, and not every step. The plain way, prompts run alone
(``pairs.py``) and numbers cast by torch, is compared at one length.
"""

import math

import pandas as pd
import torch
from frame import Claim, Finding, main
from pairs import COUNT, alone, fitting
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.errors import UnsupportedModelError
from eyechart.families import pairs, repeat
from eyechart.models import facts_of
from eyechart.precision import share_identical
from eyechart.results import collapse_figures
from eyechart.sequences import prefix
from eyechart.texts import TEXTS

LENGTHS = (1, 10, 100, 512)
ALONE = 100
TOKENS = 32
JUDGED = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
REPORTED = ("int8", "int4", "ternary")
ERRORS = 4

CLAIM = Claim(
    statement=(
        "The share of coordinates in which n and n + 1 ones are stored alike grows with n and with "
        "the coarseness of the floating format, as the format's spacing predicts."
    ),
    source="Barbero et al., arXiv 2406.04267, section 4 (quantisation)",
    holds_if=(
        "in float16, bfloat16, e4m3 and e5m2 the share is larger at the longest n than at the "
        "shortest and than that of unrelated texts; at the longest n it grows strictly with "
        "coarseness, and at no n does it fall with it; no share is farther from the predicted one "
        f"than {ERRORS} standard errors of a share of so many coordinates (at most half, over the "
        "root of their number); and collapse_curve agrees with numbers cast by torch"
    ),
)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """One curve in all formats, a pair of unrelated texts, and one length the plain way."""
    if facts_of(model).dtype not in (torch.float32, torch.float64):
        raise UnsupportedModelError("the formats are compared from float32: open the model in it")
    lengths = fitting(model, repeat(), LENGTHS, COUNT, least=ALONE)
    names = (*JUDGED, *REPORTED)
    curve = eyechart.collapse_curve(
        model, lengths=lengths, prompt=COUNT, formats=names, heads=False, next_token=False
    )
    assert curve.identical is not None and curve.expected is not None
    seen, predicted = curve.identical.double(), curve.expected.double()
    floating = slice(0, len(JUDGED))
    gap = (seen - predicted)[floating].abs()
    coordinates = model.cfg.d_model
    allowed = ERRORS * 0.5 / math.sqrt(coordinates)

    texts = [prefix(model, text)[0][:TOKENS] for text in list(TEXTS.values())[:2]]
    one, other = alone(model, pairs([(texts[0], texts[1])]), TOKENS, "", prepend_bos=False)[:, 0]
    unrelated = {name: float(share_identical(one, other, name)) for name in JUDGED}

    short, long = alone(model, repeat(), ALONE, COUNT)[:, 0].float()
    by_torch = [(short.to(kind) == long.to(kind)).double().mean() for kind in JUDGED.values()]
    apart = float((torch.stack(by_torch) - seen[floating, lengths.index(ALONE)]).abs().max())

    grows = seen[floating, -1] > seen[floating, 0]
    related = seen[floating, -1] > torch.tensor(list(unrelated.values()), dtype=torch.float64)
    steps = seen[floating].diff(dim=0)
    data = pd.DataFrame(
        {
            "format": name,
            "n": n,
            "identical": float(seen[row, at]),
            "predicted": float(predicted[row, at]),
            "judged": name in JUDGED,
        }
        for row, name in enumerate(names)
        for at, n in enumerate(lengths)
    )
    return Finding(
        holds=(
            bool(grows.all())
            and bool(related.all())
            and bool((steps >= 0).all())
            and bool((steps[:, -1] > 0).all())
            and float(gap.max()) <= allowed
            # A coordinate beside the edge of a cell may fall to either side.
            and apart <= 2 / coordinates
        ),
        numbers={
            **{
                f"{name}: share identical at n = {n}": float(seen[row, at])
                for row, name in enumerate(names)
                for at, n in enumerate(lengths)
                if at in (0, len(lengths) - 1)
            },
            **{f"{name}: share identical, unrelated texts": x for name, x in unrelated.items()},
            "largest gap between seen and predicted": float(gap.max()),
            "... allowed": allowed,
            "largest gap with a scale a vector (not judged)": float(
                (seen - predicted)[len(JUDGED) :].abs().max()
            ),
            f"largest disagreement with torch's own casts at n = {ALONE}": apart,
        },
        data=data,
        figure=collapse_figures.formats(curve),
    )


if __name__ == "__main__":
    main(CLAIM, measure)
