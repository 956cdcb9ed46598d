"""Does a repeated token become, to the first layers, the token all by itself?

A prefix of constant length loses its share of attention to the repetitions, so that the last of
them sees more and more of nothing but itself: where positions act on queries and keys only, its
representation goes to that of the lone token, the one that stands first. This is why repetitions
can become attention sinks. It is measured as the L2 distance over the L2 length of the lone token's
representation, behind a prefix of two words and behind one of a sentence.

The theorem is of a limit. A prefix token that draws e^s times the attention of a repetition is
outweighed only by more than e^s repetitions, and every layer waits for the one below. So the second
block is judged behind the short prefix only; behind the long one it has hardly begun to converge at
n = 500 on SmolLM2-135M-Instruct, where this rule was made after a stricter one (both blocks behind
the long prefix, every token by itself) had failed. The second block behind the long prefix and the
final norm, which converges behind neither, are printed. Learned positions, in a tiny random model,
are the control.

The plain way runs the repetitions and the lone token alone and reads both blocks with
TransformerLens hooks (``pairs.py``).
"""

import math

import pandas as pd
import torch
from frame import Claim, Finding, main
from jaxtyping import Float
from pairs import alone, fitting, loglog
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import eyechart
from eyechart.families import singleton
from eyechart.models import facts_of
from eyechart.results import CollapseCurve
from eyechart.results.fits import power_law

LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 300, 500)
TOKENS = (" the", " another", "1")
SHORT, LONG = "A note", "Here is a list of words: "
BLOCKS = (0, 1)
JUDGED = {SHORT: BLOCKS, LONG: BLOCKS[:1]}
ALONE = 100

LEARNED, ITS_TOKEN = "tiny-random-gpt2", "1"
FALL, STAYS = 10, 2

CLAIM = Claim(
    statement=(
        "After the first block, and behind a short prefix after the second, the last of n "
        "repetitions of a token goes to the token all by itself as n grows, unless positions are "
        "learned."
    ),
    source="Yona et al., arXiv 2503.08908, Theorem 4.1 and Figure 5",
    holds_if=(
        "after the first block behind both prefixes, and after the second behind the short one, "
        "the relative L2 distance to the lone token falls at least tenfold from the shortest to "
        f"the longest n in the geometric mean over {len(TOKENS)} tokens, and for each the slope on "
        "log-log axes has a 95% interval below 0 and the distance stays above the numeric floor; "
        f"on {LEARNED} (random weights, learned positions) it falls less than {STAYS}-fold; and "
        "collapse_curve agrees with prompts run alone"
    ),
)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Three tokens behind two prefixes on this model, one on the control."""
    lengths = fitting(model, singleton(TOKENS[0]), LENGTHS, LONG, least=ALONE)
    plain = [_plain(model, token) for token in TOKENS]
    sizes = torch.stack([size for _, size in plain])
    curves = {
        prompt: [
            _curve(model, token, lengths, prompt, floor=token == TOKENS[0]) for token in TOKENS
        ]
        for prompt in JUDGED
    }
    distances: dict[str, Float[Tensor, "token block length"]] = {
        prompt: torch.stack([_after(curve.l2) for curve in found]) / sizes[..., None]
        for prompt, found in curves.items()
    }
    apart = distances[SHORT][..., lengths.index(ALONE)] - torch.stack([far for far, _ in plain])
    floor = max(
        float((_after(found[0].null["l2"]).T / sizes[0]).max()) for found in curves.values()
    )
    tables: dict[str, Float[Tensor, "token length"]] = {
        f"after block {block} behind {prompt!r}": distances[prompt][:, block]
        for prompt, blocks in JUDGED.items()
        for block in blocks
    }
    falls = {name: _fall(table) for name, table in tables.items()}
    laws = [power_law(lengths, row, seed=seed) for table in tables.values() for row in table]
    bound = max(law.high if law else math.inf for law in laws)
    least = min(float(table.min()) for table in distances.values())

    control = eyechart.load(LEARNED, device=facts_of(model).device)
    fits = fitting(control, singleton(ITS_TOKEN), LENGTHS, LONG, least=ALONE)
    stays = _fall(_after(_curve(control, ITS_TOKEN, fits, LONG, floor=False).l2))

    data = pd.DataFrame(
        {
            "stream": f"{token!r} behind {prompt!r}, after block {block}",
            "n": n,
            "relative L2 distance": float(table[index, block, at]),
            "judged": block in JUDGED[prompt],
        }
        for prompt, table in distances.items()
        for index, token in enumerate(TOKENS)
        for block in BLOCKS
        for at, n in enumerate(lengths)
    )
    last, unjudged = f"at n = {lengths[-1]}", distances[LONG][:, -1]
    return Finding(
        holds=(
            min(falls.values()) >= FALL
            and bound < 0
            and least > floor
            and stays < STAYS
            and float(apart.abs().max()) < least / 100
        ),
        numbers={
            **{
                f"{name}: relative L2 distance {last}, mean over tokens": float(table[:, -1].mean())
                for name, table in tables.items()
            },
            **{f"{name}: times it fell": fall for name, fall in falls.items()},
            "upper 95% limit of the slopes, largest": bound,
            f"after block {BLOCKS[-1]} behind {LONG!r}, not judged: times it fell": _fall(unjudged),
            f"final norm, not judged: relative L1 distance {last}, least": min(
                float(curve.relative[-1, -1]) for found in curves.values() for curve in found
            ),
            f"{LEARNED} (random weights): times it fell": stays,
            "numeric floor": floor,
            "largest disagreement with prompts run alone": float(apart.abs().max()),
        },
        data=data,
        figure=loglog(data, "stream", "relative L2 distance", bold=data["stream"][:1].tolist()),
    )


def _curve(
    model: TransformerBridge, token: str, lengths: list[int], prompt: str, *, floor: bool
) -> CollapseCurve:
    return eyechart.collapse_curve(
        model,
        singleton(token),
        lengths,
        prompt=prompt,
        formats=(),
        heads=False,
        next_token=False,
        references=floor,
    )


def _after(by_layer: Float[Tensor, "layer length"]) -> Float[Tensor, "block length"]:
    """After the first blocks; the layer axis begins with the embedding."""
    return by_layer[[block + 1 for block in BLOCKS]].double()


def _fall(table: Float[Tensor, "row length"]) -> float:
    """First over last, the geometric mean over rows."""
    return float((table[:, 0] / table[:, -1]).log().mean().exp())


def _plain(
    model: TransformerBridge, token: str
) -> tuple[Float[Tensor, " block"], Float[Tensor, " block"]]:
    """Relative L2 distance after each block behind the short prefix, and the lone token's size."""
    sites = [f"blocks.{block}.hook_resid_post" for block in BLOCKS]
    repeated, lone = alone(model, singleton(token), ALONE, SHORT, sites=sites)
    size = lone.norm(dim=-1)
    return (repeated - lone).norm(dim=-1) / size, size


if __name__ == "__main__":
    main(CLAIM, measure)
