"""Do separators keep n and n + 1 repetitions apart, and what is that worth?

The paper's Figure 5 d: with a comma after every third digit the distance of n and n + 1 does not
fall. Counted from the left, one more digit takes another place in its group. So the distance is
measured where it tells a count from a place: at n = 1 modulo 3, where both sequences end in the
digit; and, as the control, between n and n + 3, where one whole group is added and the place stays.
Counted from the right, as thousands are written, the last group is full at every n. A
plain string with one and with three more digits is what they are held against. The plain way, every
prompt run alone (``pairs.py``), is compared at two lengths.
"""

import pandas as pd
import torch
from frame import Claim, Finding, main
from jaxtyping import Float
from pairs import COPY, disagreement, fitting, loglog
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.families import Build, Family, separated
from eyechart.results import CollapseCurve
from eyechart.sequences import single_token

EVERY = 3
LENGTHS = (1, 4, 10, 19, 49, 100, 199, 301, 400, 511)
LATE = 100
ALONE = (1, 100)
APART, LIKE, FALL = 5, 3, 10

LEFT, RIGHT, PLAIN = "from the left", "from the right", "none"

CLAIM = Claim(
    statement=(
        "A separator after every third digit, counted from the left, keeps n and n + 1 digits "
        "apart by the last digit's place in its group and not by the count: n and n + 3, and "
        "separators counted from the right, collapse like a plain string."
    ),
    source=(
        "Barbero et al., arXiv 2406.04267, Figure 5d; that it is the place and not the count: "
        "eyechart"
    ),
    holds_if=(
        f"from the left n and n + 1 are at least {APART} times as far apart as in the plain "
        f"string at every n from {LATE} on (n = 1 modulo 3); n and n + 3 from the left, and n and "
        f"n + 1 from the right, fall at least tenfold from the shortest to the longest n and are "
        f"in the geometric mean from {LATE} on at most {LIKE} times as far apart as the plain "
        "string's n and n + 1; all stay above the numeric floor, and collapse_curve agrees with "
        "pair-by-pair runs"
    ),
)


def plain(token: str = "1") -> Family:
    """No separators: n and n + 1, and the control n and n + 3."""

    def bind(model: TransformerBridge) -> Build:
        one = single_token(model, token)
        return lambda n: ([one] * n, [one] * (n + 1), [one] * (n + EVERY))

    return Family("plain", f"{token!r} n and n + 1 times", bind, control=f"n and n + {EVERY}")


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Three ways to write the digits, each with one more and with a whole group more."""
    families = {
        PLAIN: plain(),
        LEFT: separated(every=EVERY),
        RIGHT: separated(every=EVERY, anchor="right"),
    }
    lengths = fitting(model, families[LEFT], LENGTHS, COPY, least=LATE)
    curves = {
        name: eyechart.collapse_curve(
            model,
            family,
            lengths,
            prompt=COPY,
            formats=(),
            heads=False,
            next_token=False,
            references=name == LEFT,
        )
        for name, family in families.items()
    }
    apart = max(
        disagreement(model, family, curves[name], ALONE, COPY) for name, family in families.items()
    )
    one = {name: curve.relative[-1].double() for name, curve in curves.items()}
    group = {name: _control(curve) for name, curve in curves.items()}
    late = torch.tensor([n >= LATE for n in lengths])
    kept = (one[LEFT] / one[PLAIN])[late]
    collapsing = {
        "n and n + 3 from the left": group[LEFT],
        "n and n + 1 from the right": one[RIGHT],
    }
    like = {
        name: float((values / one[PLAIN])[late].log().mean().exp())
        for name, values in collapsing.items()
    }
    falls = {name: float(values[0] / values[-1]) for name, values in collapsing.items()}
    floor = curves[LEFT].floor()
    least = min(float(values.min()) for values in [*one.values(), *group.values()])

    data = pd.DataFrame(
        {
            "pair": f"{pair}, separators {name}",
            "n": n,
            "relative distance": float(values[name][at]),
        }
        for pair, values in (("n and n + 1", one), (f"n and n + {EVERY}", group))
        for name in families
        for at, n in enumerate(lengths)
    )
    last = f"n = {lengths[-1]}"
    return Finding(
        holds=(
            float(kept.min()) >= APART
            and max(like.values()) <= LIKE
            and min(falls.values()) >= FALL
            and least > floor
            and apart < least / 100
        ),
        numbers={
            f"plain, n and n + 1: relative distance at {last}": float(one[PLAIN][-1]),
            f"from the left, n and n + 1: relative distance at {last}": float(one[LEFT][-1]),
            f"... over plain, least from n = {LATE} on": float(kept.min()),
            **{f"{name}: times it fell": value for name, value in falls.items()},
            **{f"{name}: over plain, geometric mean": value for name, value in like.items()},
            "n and n + 3 from the left: over the plain n and n + 3, geometric mean": float(
                (group[LEFT] / group[PLAIN])[late].log().mean().exp()
            ),
            "largest numeric floor": floor,
            "largest disagreement with pair-by-pair runs": apart,
        },
        data=data,
        figure=loglog(data, "pair", "relative distance", bold=[f"n and n + 1, separators {LEFT}"]),
    )


def _control(curve: CollapseCurve) -> Float[Tensor, " length"]:
    assert curve.control is not None  # every family here has one
    return curve.control[-1].double()


if __name__ == "__main__":
    main(CLAIM, measure)
