"""What a whole collapse curve costs, beside plain forward passes and beside running every pair.

    python benchmarks/collapse.py [--length 2048] [--repeats 3] [--sampled 8] [--write]

Measures, on the default model in float32, with as many tokens as ``--length`` says in the longest
prompt:

- a plain forward pass of the same weights in transformers with its own SDPA attention, with the
  logits of every token, as a plain call makes them, and without;
- ``eyechart.collapse_curve`` at every length from 1 on, repeated ones: with everything (heads, next
  tokens, nine number formats, and the second pass that gives floor and unrelated prompts), and the
  distances alone;
- the same for sampled digits, where each length has an ending of its own: three tokens go through
  for every one of the longest prompt;
- every pair run by itself through TransformerLens hooks: at ``--sampled`` lengths, spread evenly,
  and from these, by the trapezoidal rule, what all of them would take.

Aim: 2.2 times the plain pass for the whole curve of repeated ones. Seconds are the best of the
repeats, contenders taking turns in one process; pairs are run once. Peak memory is that of a
process of its own for each, above what it holds with the model loaded. ``--write`` keeps the result
in ``benchmarks/results``.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import PLAIN, Run, bridge, environment, peak, seconds, table, transformers_sdpa, write

SEED = 0
BARE: dict[str, Any] = {
    "formats": (),
    "heads": False,
    "next_token": False,
    "references": False,
}


def curve(family: str, **options: Any) -> Run:
    import eyechart
    from eyechart.collapse import DEFAULT_PROMPT

    model = bridge()
    front = len(eyechart.sequences.prefix(model, DEFAULT_PROMPT)[0])

    def run(ids: torch.Tensor) -> Any:
        # n tokens in front of the last, and the prompt in front of them.
        lengths = range(1, ids.shape[1] - front)
        return eyechart.collapse_curve(model, family, lengths, **options)

    return run


LOGITS = "transformers, SDPA, logits of every token"
WHOLE, DISTANCES = "eyechart, repeated, everything", "eyechart, repeated, distances alone"
DIGITS, DIGITS_ALONE = "eyechart, digits, everything", "eyechart, digits, distances alone"
CONTENDERS: dict[str, Callable[[], Run]] = {
    LOGITS: partial(transformers_sdpa, logits=True),
    PLAIN: transformers_sdpa,
    WHOLE: partial(curve, "repeat"),
    DISTANCES: partial(curve, "repeat", **BARE),
    DIGITS: partial(curve, f"digits:seed={SEED}"),
    DIGITS_ALONE: partial(curve, f"digits:seed={SEED}", **BARE),
}


def pair_by_pair(length: int, sampled: int) -> tuple[float, dict[int, float], int]:
    """Seconds for every length, scaled from some; their relative distances; how many there are."""
    import eyechart
    from eyechart.collapse import DEFAULT_PROMPT

    model = bridge()
    most = length - len(eyechart.sequences.prefix(model, DEFAULT_PROMPT)[0]) - 1
    chosen = sorted({round(1 + (most - 1) * step / (sampled - 1)) for step in range(sampled)})

    def last(n: int) -> torch.Tensor:
        seen: dict[str, torch.Tensor] = {}

        def keep(normed: torch.Tensor, hook: Any) -> None:
            seen["last"] = normed[0, -1].double()

        made = eyechart.sequences.repeated(model, "1", n, prompt=DEFAULT_PROMPT)
        with torch.no_grad():
            model.run_with_hooks(
                made.tokens, return_type=None, fwd_hooks=[("ln_final.hook_out", keep)]
            )
        return seen["last"]

    last(1)  # rehearsal
    taken, relative = [], {}
    for n in chosen:
        start = time.perf_counter()
        shorter, longer = last(n), last(n + 1)
        taken.append(time.perf_counter() - start)
        relative[n] = float((longer - shorter).abs().sum() / longer.abs().sum())
        print(f"  pair at n={n}: {taken[-1]:.2f} s", flush=True)
    total = float(torch.trapezoid(torch.tensor(taken), torch.tensor(chosen)))
    return total, relative, most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sampled", type=int, default=8)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    said = environment(f"digits drawn from seed {SEED}")
    times = seconds(CONTENDERS, list(CONTENDERS), given.length, given.repeats)
    peaks = {name: peak("collapse", name, given.length) for name in CONTENDERS}
    total, relative, most = pair_by_pair(given.length, given.sampled)
    ours = dict(zip(range(1, most + 1), _final(given.length), strict=True))
    gap = max(abs(ours[n] - value) for n, value in relative.items())
    page = ["# Cost of a collapse curve", "", said, ""]
    page += table(given.length, times, peaks)
    page += [
        "### Beside running every pair",
        "",
        "| | |",
        "|---|---|",
        f"| lengths | {most:,} |",
        f"| seconds for all pairs, scaled from {len(relative)} of them | {total:,.0f} |",
        f"| times the curve with everything | {total / times[WHOLE]:,.0f} |",
        f"| largest difference of the relative distance | {gap:.2g} |",
        "",
    ]
    text = "\n".join(page)
    print(text)
    if given.write:
        data = {
            "environment": said,
            "seconds": times,
            "peaks": peaks,
            "pairs": {"seconds": total, "lengths": most, "largest difference": gap},
        }
        write("collapse", text, data)


def _final(length: int) -> list[float]:
    ids = torch.zeros(1, length, dtype=torch.long)
    return CONTENDERS[DISTANCES]()(ids).relative[-1].tolist()


if __name__ == "__main__":
    main()
