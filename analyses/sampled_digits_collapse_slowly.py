"""Do digits drawn at random keep the last token's place better than ones?

The paper's Figure 5 b: after a counting question come digits drawn uniformly and then a 1, once and
twice. What the extra token adds to a varied past is less alike it, so that the distance should fall
more slowly than after ones. Other digits are drawn for every curve; the interval is over draws. The
plain way, every prompt run alone (``pairs.py``), is compared with the first draw's curve. "Much
flatter" means less than half as steep, a convention.
"""

import math

import pandas as pd
import torch
from frame import Claim, Finding, main
from pairs import COUNT, disagreement, fitting, loglog
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.statistics import bootstrap_ci, derive_generator

import eyechart
from eyechart.families import Family, digits, repeat
from eyechart.results import CollapseCurve

LENGTHS = (1, 2, 5, 10, 20, 51, 101, 201, 301, 401, 512)
LATE = 51
ALONE = (1, 51, 101)
DRAWS = 6

CLAIM = Claim(
    statement=(
        "After a question, digits drawn at random collapse much more slowly than ones: one more "
        "final '1' moves the last token's representation more."
    ),
    source="Barbero et al., arXiv 2406.04267, Figure 5b",
    holds_if=(
        f"in every draw the distance exceeds that of ones at every n from {LATE} on, the slopes on "
        "log-log axes are less than half as steep as that of ones in the mean over draws, and "
        "less steep than the flat end of its own interval (95% bootstrap intervals), both curves "
        "stay above the numeric floor, and collapse_curve agrees with pair-by-pair runs"
    ),
)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Ones once, with references; digits in several draws."""
    lengths = fitting(model, repeat(), LENGTHS, COUNT, least=101)
    drawn = [digits(seed=seed * DRAWS + draw) for draw in range(DRAWS)]

    def curve(family: Family, references: bool) -> CollapseCurve:
        return eyechart.collapse_curve(
            model,
            family,
            lengths,
            prompt=COUNT,
            formats=(),
            heads=False,
            next_token=False,
            references=references,
        )

    ones = curve(repeat(), True)
    curves = [curve(family, index == 0) for index, family in enumerate(drawn)]
    apart = disagreement(model, drawn[0], curves[0], ALONE, COUNT)
    late = torch.tensor([n >= LATE for n in lengths])
    distances = torch.stack([each.relative[-1] for each in curves]).double()
    times = (distances / ones.relative[-1].double())[:, late]
    # None where a curve vanished into rounding: nothing to be judged, so that nothing holds.
    laws = [each.fit() for each in (ones, *curves)]
    slopes = torch.tensor([law.slope if law else math.nan for law in laws], dtype=torch.float64)
    flat = laws[0].high if laws[0] else math.nan
    low, high = bootstrap_ci(slopes[1:], generator=derive_generator(seed, "draws"))
    floor = max(ones.floor(), curves[0].floor())
    least = min(float(ones.relative[-1].min()), float(distances.min()))

    data = pd.DataFrame(
        {"sequence": name, "n": n, "relative distance": float(values[at])}
        for name, values in [
            ("ones", ones.relative[-1]),
            *((f"digits, draw {index}", row) for index, row in enumerate(distances)),
        ]
        for at, n in enumerate(lengths)
    )
    return Finding(
        holds=(
            float(times.min()) > 1
            and float(low) > max(flat, float(slopes[0]) / 2)
            and least > floor
            and apart < least / 100
        ),
        numbers={
            f"ones: relative distance at n = {lengths[-1]}": float(ones.relative[-1, -1]),
            f"digits: relative distance at n = {lengths[-1]}, geometric mean over draws": float(
                distances[:, -1].log().mean().exp()
            ),
            f"digits over ones from n = {LATE} on: least of {times.numel()}": float(times.min()),
            "... geometric mean": float(times.log().mean().exp()),
            "ones: slope": float(slopes[0]),
            "ones: flat end of its interval": flat,
            f"digits: slope, mean over {DRAWS} draws": float(slopes[1:].mean()),
            "... lower 95% limit": float(low),
            "... upper 95% limit": float(high),
            "unrelated prompts": float(ones.unrelated["relative"][-1]),
            "largest numeric floor": floor,
            "largest disagreement with pair-by-pair runs": apart,
        },
        data=data,
        figure=loglog(data, "sequence", "relative distance", bold=["ones"]),
    )


if __name__ == "__main__":
    main(CLAIM, measure)
