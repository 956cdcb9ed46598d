"""Are repetitions of a token with nothing in front of them one and the same to the model?

Where positions act on attention scores only (rotary, ALiBi, none), attention over identical tokens
mixes identical values whatever its weights, so that every repetition has the same representation,
exactly: the distance of n and n + 1 is zero from the start. Then nothing collapses, and a curve of
collapse must begin with a prompt or a beginning-of-sequence token. Learned positions are added to
the embedding and keep repetitions apart.

The weights do not matter to the argument, so that tiny random models serve as further examples:
rotary, ALiBi, and, as the control, learned positions. The plain way runs one long prompt and
compares all its tokens with the first at the final norm.
"""

from dataclasses import dataclass

import pandas as pd
import torch
from frame import Claim, Finding, main
from pairs import COUNT, FINAL, fitting, loglog
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.families import repeat
from eyechart.models import facts_of
from eyechart.results import CollapseCurve
from eyechart.sequences import repeated

LENGTHS = (1, 2, 5, 20, 100, 400)
ALIKE = ("tiny-random-llama", "tiny-random-bloom")
LEARNED = "tiny-random-gpt2"
ROUNDING = 1e-4

CLAIM = Claim(
    statement=(
        "Without a prompt or a beginning-of-sequence token all repetitions of a token have the "
        "same representation, unless positions are learned and added to the embedding."
    ),
    source="Gu et al., arXiv 2410.10781, appendix C.1",
    holds_if=(
        "without a prefix the relative distance of n and n + 1 is at every n and every layer at "
        f"most {ROUNDING:g} (a convention for rounding in float32; the numeric floor is printed) "
        f"on this model, {ALIKE[0]} and {ALIKE[1]}, and on {LEARNED} above it at every n; "
        "with a prompt in front it is above it at every n on this model; and the tokens of one "
        "long run differ from its first by no more on this model"
    ),
)


@dataclass(frozen=True)
class Case:
    """A model with or without something in front."""

    name: str
    alike: bool
    """Whether its repetitions are said to be identical."""
    curve: CollapseCurve

    @property
    def largest(self) -> Tensor:
        """Relative distance of n and n + 1 in the layer where it is largest."""
        return self.curve.relative.amax(dim=0)

    @property
    def as_said(self) -> bool:
        """Identical, or never identical in the end."""
        if self.alike:
            return float(self.largest.max()) <= ROUNDING
        return float(self.curve.relative[-1].min()) > ROUNDING


def measure(model: TransformerBridge, seed: int) -> Finding:
    """The model without and with a prompt, and the tiny ones without."""
    mine = facts_of(model).name
    cases = [
        Case(mine, True, _curve(model, "")),
        Case(f"{mine}, prompt in front", False, _curve(model, COUNT)),
    ]
    for name in (*ALIKE, LEARNED):
        tiny = eyechart.load(name, device=facts_of(model).device)
        cases.append(Case(f"{name} (random weights)", name != LEARNED, _curve(tiny, "")))
    spread = _spread(model)
    data = pd.DataFrame(
        {
            "model": case.name,
            "n": n,
            "largest of all layers": float(case.largest[at]),
            "final norm": float(case.curve.relative[-1, at]),
            "numeric floor": case.curve.floor(),
        }
        for case in cases
        for at, n in enumerate(case.curve.lengths)
    )
    # A logarithmic axis has no zero; what is exactly zero is drawn at the least float32 step.
    drawn = data.assign(**{"largest of all layers": data["largest of all layers"].clip(lower=1e-8)})
    figure = loglog(drawn, "model", "largest of all layers", bold=[mine])
    figure.add_hline(y=ROUNDING, line_dash="dot")
    return Finding(
        holds=all(case.as_said for case in cases) and spread <= ROUNDING,
        numbers={
            **{
                f"{case.name}: largest distance, any n and layer"
                if case.alike
                else f"{case.name}: least distance after the final norm": float(
                    case.largest.max() if case.alike else case.curve.relative[-1].min()
                )
                for case in cases
            },
            f"{mine}: numeric floor": cases[0].curve.floor(),
            f"{mine}: largest distance of a token of {LENGTHS[-1]} from the first": spread,
        },
        data=data,
        figure=figure,
    )


def _curve(model: TransformerBridge, prompt: str) -> CollapseCurve:
    lengths = fitting(model, repeat(), LENGTHS, prompt, least=100)
    return eyechart.collapse_curve(
        model,
        lengths=lengths,
        prompt=prompt,
        prepend_bos=False if not prompt else None,
        formats=(),
        heads=False,
        next_token=False,
    )


def _spread(model: TransformerBridge) -> float:
    """The plain way: largest relative distance between the first and any token of one run."""
    run, seen = repeated(model, "1", LENGTHS[-1], prepend_bos=False), []

    def read(stream: Tensor, hook: object) -> None:
        seen.append(stream[0].double())

    with torch.no_grad():
        model.run_with_hooks(
            run.tokens.to(model.cfg.device), fwd_hooks=[(FINAL, read)], return_type=None
        )
    (ends,) = seen
    return float(((ends - ends[0]).abs().sum(dim=-1) / ends.abs().sum(dim=-1)).max())


if __name__ == "__main__":
    main(CLAIM, measure)
