"""Does running a model in bfloat16 hide the distances that collapse is about?

Two things happen when a curve of collapse is measured in half precision. The same prompt, run in
another arrangement of the pass (other neighbours, other shapes of the matrices), comes out
different: that is the numeric floor, and no distance near it means anything. And repetitions that
are exactly identical in truth (a token repeated with nothing in front) look apart when each prompt
is run alone. float32 has the same two floors thousands of times lower. Within one pass bfloat16
makes the same mistake at every repetition, which hides the second floor; so the identical prompts
are run alone, pair by pair, with a TransformerLens hook (``pairs.py``), and what one pass says is
printed beside it.

The model is run in bfloat16 as if it had been loaded so (``eyechart.lenses.precision`` at "model").
"""

from collections.abc import Sequence

import pandas as pd
import torch
from frame import Claim, Finding, main
from pairs import COUNT, alone, fitting, loglog, relative
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.statistics import bootstrap_ci, derive_generator

import eyechart
from eyechart import lenses
from eyechart.errors import UnsupportedModelError
from eyechart.families import repeat
from eyechart.models import facts_of
from eyechart.results import CollapseCurve

LATE = 200
LENGTHS = (1, 2, 5, 10, 20, 50, 100, *range(LATE, 513, 24))
ALONE = (10, 50, 100, 200)
FORMATS = ("float32", "bfloat16")
TIMES = 100

CLAIM = Claim(
    statement=(
        "Run in bfloat16 a model has a numeric floor that float32 goes below: at large n the same "
        "prompt, in another arrangement of the pass, differs more from itself than n and n + 1 "
        "repetitions differ in float32."
    ),
    source="Barbero et al., arXiv 2406.04267, section 4 (quantisation); the floor: eyechart",
    holds_if=(
        "after a question the median numeric floor of bfloat16 lies above float32's least distance "
        f"of n and n + 1 from n = {LATE} on, and float32's own floor {TIMES} times below that "
        "distance; there bfloat16's distance never vanishes and exceeds float32's in the geometric "
        "mean (95% bootstrap interval over n); and prompts that are identical in truth, each run "
        f"alone, are at every n more than {TIMES} times as far apart in bfloat16 as at most in "
        "float32"
    ),
)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """The curve, its floor and identical prompts, in both formats."""
    if facts_of(model).dtype != torch.float32:
        raise UnsupportedModelError("the claim compares with float32: open the model in it")
    family = repeat()
    lengths = fitting(model, family, LENGTHS, COUNT, least=LATE)
    curves: dict[str, CollapseCurve] = {}
    identical: dict[str, list[float]] = {}
    shared: dict[str, float] = {}
    for name in FORMATS:
        with lenses.precision(model, name, at="model"):
            curves[name] = _curve(model, lengths, COUNT)
            identical[name] = [
                relative(alone(model, family, n, "", prepend_bos=False)) for n in ALONE
            ]
            shared[name] = float(_curve(model, ALONE, "").relative[-1].max())
    wide, half = (curves[name].relative[-1].double() for name in FORMATS)
    floors = {name: curves[name].null["relative"][-1].double() for name in FORMATS}
    late = torch.tensor([n >= LATE for n in lengths])
    ratio = (half / wide)[late].log()
    low, _ = bootstrap_ci(ratio, generator=derive_generator(seed, "lengths"))
    middle = float(floors["bfloat16"].median())
    least = float(wide[late].min())
    exact, rounded = (identical[name] for name in FORMATS)
    data = pd.DataFrame(
        {"line": f"{what}, {name}", "n": n, "relative distance": float(value)}
        for name in FORMATS
        for what, at, values in (
            ("n and n + 1", lengths, curves[name].relative[-1]),
            ("the same prompt", curves[name].null_lengths, floors[name]),
            ("identical prompts, each alone", ALONE, identical[name]),
        )
        for n, value in zip(at, values, strict=True)
    )
    return Finding(
        holds=(
            middle > least > TIMES * curves["float32"].floor()
            and float(half[late].min()) > 0
            and float(low) > 0
            and min(rounded) > TIMES * max(exact)
        ),
        numbers={
            f"float32: relative distance at n = {lengths[-1]}": float(wide[-1]),
            f"... least from n = {LATE} on": least,
            f"bfloat16: relative distance at n = {lengths[-1]}": float(half[-1]),
            "bfloat16: numeric floor, median over n": middle,
            "... least over n": float(floors["bfloat16"].min()),
            "... largest over n": float(floors["bfloat16"].max()),
            "float32: numeric floor, largest": curves["float32"].floor(),
            f"bfloat16 over float32 from n = {LATE} on, geometric mean": float(ratio.mean().exp()),
            "... lower 95% limit": float(low.exp()),
            "identical prompts, each alone: bfloat16, least": min(rounded),
            "identical prompts, each alone: bfloat16, largest": max(rounded),
            "identical prompts, each alone: float32, largest": max(exact),
            "identical prompts in one pass: bfloat16, largest": shared["bfloat16"],
            "identical prompts in one pass: float32, largest": shared["float32"],
        },
        data=data,
        figure=loglog(data, "line", "relative distance", bold=[f"n and n + 1, {FORMATS[1]}"]),
    )


def _curve(model: TransformerBridge, lengths: Sequence[int], prompt: str) -> CollapseCurve:
    return eyechart.collapse_curve(
        model,
        lengths=lengths,
        prompt=prompt,
        prepend_bos=None if prompt else False,
        formats=(),
        heads=False,
        next_token=False,
        references=bool(prompt),
    )


if __name__ == "__main__":
    main(CLAIM, measure)
