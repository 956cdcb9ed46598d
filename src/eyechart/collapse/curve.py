"""``eyechart.collapse_curve``: how far apart prompts are that differ by little, at every length.

Under a causal mask the representation of a token depends on the tokens before it and on no other.
Prompts that begin alike therefore share what they have in common: a token repeated n times is a
prefix of the same token repeated n + 1 times, and where the endings differ they are branches of one
tree. One forward pass serves every length; a second one tells what its numbers are worth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eyechart.collapse.ends import HEADS, EndsProbe, Found, StreamsProbe
from eyechart.collapse.references import References, references_of
from eyechart.errors import InputError, UsageError
from eyechart.families import Family, family_named
from eyechart.models import ModelFacts, facts_of
from eyechart.precision import FORMATS, Format, format_named
from eyechart.prefixes import merged
from eyechart.probes import capture, why_not_branching
from eyechart.results import CollapseCurve, Provenance
from eyechart.results.collapse import DISTANCES
from eyechart.sequences import fragment, from_ids, prefix

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DEFAULT_PROMPT = "How many times does the digit 1 appear in the following sequence? Sequence: "
DEFAULT_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500)

_TOKENS = 4096
"""Tokens that go through together where prompts cannot share their beginnings."""

_FLOORS = 32
"""Lengths at which the numeric floor is measured, at most: it hardly changes with length."""

_FLOOR_TOKENS = 1024
"""Tokens up to which it is measured, unless the shortest prompt has more."""

_SHOWN = 64
"""Tokens of a sequence that are written as text to see what the tokeniser makes of it."""


def collapse_curve(
    model: "TransformerBridge",
    family: str | Family = "repeat",
    lengths: Sequence[int] | None = None,
    *,
    prompt: str = DEFAULT_PROMPT,
    prepend_bos: bool | None = None,
    formats: Sequence[str] | None = None,
    heads: bool = True,
    next_token: bool = True,
    references: bool = True,
) -> CollapseCurve:
    """Distance between the last token's representations of two prompts, by layer and length.

    Barbero et al., arXiv 2406.04267, Theorem 4.2 and Figure 5: append the last token once more, and
    the last representation hardly moves. A prompt (or a beginning-of-sequence token) in front is
    what makes the question non-trivial: without either, models with rotary or no positions give
    every repetition of a token the same representation (Gu et al., arXiv 2410.10781, appendix C.1),
    and the distance is zero from the start.

    All lengths come from one forward pass, in which prompts share their beginnings; a second one
    gives the references. Where a model cannot take shared beginnings (attention in code of its own,
    a convolution or state beside it), families whose prompts branch are run pair by pair, and the
    provenance says so.

    Args:
        model: A TransformerBridge.
        family: What the two prompts of a pair are: a name of :data:`eyechart.families.FAMILIES` or
            a :class:`~eyechart.families.Family`.
        lengths: The n to measure; by default 1 to 500 on a logarithmic grid, as far as they fit.
        prompt: Text in front, such as a question; may be empty.
        prepend_bos: See :func:`eyechart.sequences.prepare`.
        formats: Number formats (:data:`eyechart.precision.FORMATS`) in which the final
            representations are compared; all by default.
        heads: Whether the last layer's heads are compared, each by itself.
        next_token: Whether next-token distributions are compared, which takes as many numbers as
            there are ends times the vocabulary.
        references: Whether the second pass is made: the distance of unrelated prompts, and that of
            the same prompts in another arrangement, which is the numeric floor.

    Returns:
        Distances ``[layer length]``: embedding, every block, and the final norm's output.

    Raises:
        UsageError: unknown family or format, or lengths that are not positive or that the family
            does not have.
        InputError: a length does not fit the context, or what should be one token of this
            tokeniser is several.
        CaptureError, NonFiniteError, UnsupportedModelError: as :func:`eyechart.capture`.
    """
    chosen_family = family_named(family) if isinstance(family, str) else family
    in_formats = [format_named(name) for name in (FORMATS if formats is None else formats)]
    facts = facts_of(model)
    front, bos = prefix(model, prompt, prepend_bos=prepend_bos)
    chosen, prompts = _prompts(model, chosen_family, front, lengths)
    flat = [row for rows in prompts for row in rows]
    title = f"{chosen_family.name}, n = {chosen[0]} to {chosen[-1]}"
    whole = merged(model, flat, prepend_bos=bos, name=title)
    sides = len(prompts[0])
    ends = [whole.ends[at : at + sides] for at in range(0, len(flat), sides)]
    reason = why_not_branching(model, facts)
    floor = _floors([len(rows[0]) for rows in prompts])
    at = [len(prompts[index][0]) - 1 for index in floor]
    longest = max(flat, key=len)
    streams: Tensor | None = None
    notes = [*_notes(model, chosen_family, prompts, len(front)), *_emulated(in_formats, facts)]
    if reason and whole.sequences.parents is not None:
        notes.append(f"prompts were run pair by pair: {reason}")
        found = _pair_by_pair(model, prompts, in_formats, heads, next_token)
    else:
        places = [[(0, end) for end in row] for row in ends]
        probe = EndsProbe(model, places, in_formats, heads, next_token)
        path = whole.sequences.path(whole.ends[flat.index(longest)])
        again = StreamsProbe([(0, path[n]) for n in at])
        (one, (streams, _)) = capture(model, whole.sequences, [probe, again])
        found = [one]
    compared: References | None = None
    if references:
        compared = references_of(
            model, longest[: max(at) + 1], at, streams, bos=front[: int(bos)], shared=not reason
        )
    sources = [one.provenance for one in found]
    if compared is not None:
        sources += compared.provenances
    provenance = Provenance.together(sources, whole.sequences.digest, chosen_family.seed)
    tensors = {
        name: torch.cat([one.tensors[name] for one in found], dim=-1) for name in found[0].tensors
    }
    empty = torch.empty(0, len(chosen))
    return CollapseCurve(
        sequences=whole.sequences,
        provenance=replace(provenance, notes=(*provenance.notes, *notes)),
        family=chosen_family.name,
        about=chosen_family.about,
        lengths=chosen,
        layer_labels=found[0].layer_labels,
        **{name: tensors[name] for name in DISTANCES},
        control_name=chosen_family.control,
        control=tensors.get("control"),
        heads={name: tensors[HEADS + name] for name in DISTANCES if HEADS + name in tensors},
        tv=tensors.get("tv"),
        kl=tensors.get("kl"),
        same_argmax=tensors.get("same_argmax"),
        formats=tuple(each.name for each in in_formats),
        identical=tensors.get("identical", empty),
        expected=tensors.get("expected", empty),
        steps=found[-1].steps,
        unrelated=dict(compared.unrelated) if compared else {},
        null_lengths=tuple(chosen[index] for index in floor) if compared else (),
        null=dict(compared.null) if compared else {},
        ends=torch.tensor(ends),
        entropy=chosen_family.entropy,
    )


def _prompts(
    model: "TransformerBridge", family: Family, front: list[int], lengths: Sequence[int] | None
) -> tuple[tuple[int, ...], list[tuple[list[int], ...]]]:
    """The lengths, checked against the context before anything is run, and their prompts."""
    if lengths is not None and (not len(lengths) or min(lengths) < 1):
        raise UsageError(f"lengths must be positive, got {list(lengths)}")
    there = family.lengths
    if there is not None and lengths is not None and set(lengths) - set(there):
        raise UsageError(f"this family has the lengths {list(there)}, not {list(lengths)}")
    build, (limit, why) = family.bind(model), _limit(model)

    def rows(n: int) -> tuple[list[int], ...]:
        shorter, *others = build(n)
        bare = [] if family.bare else front
        return (front + shorter, *(bare + other for other in others))

    def problem(n: int) -> InputError | None:
        try:
            needed = max(map(len, rows(n)))
        except InputError as problem:
            return problem
        if limit is None or needed <= limit:
            return None
        return InputError(
            f"n={n} needs {needed} tokens ({len(front)} of them in front), but "
            f"{model.cfg.model_name} sees at most {limit}{why}"
        )

    chosen = sorted(set(lengths or there or DEFAULT_LENGTHS))
    if lengths is None and there is None:
        chosen = [n for n in chosen if problem(n) is None] or chosen[:1]
    refused = problem(chosen[-1])
    if refused is not None:
        most = _largest(chosen[-1], lambda n: there is None and problem(n) is None)
        more = f"; n can be at most {most}." if most else "."
        raise InputError(str(refused).rstrip(".") + more) from refused
    if (refused := problem(chosen[0])) is not None:
        raise refused
    return tuple(chosen), [rows(n) for n in chosen]


def _limit(model: "TransformerBridge") -> tuple[int | None, str]:
    """Tokens up to which a prompt is the same inside a longer one, and why no more if fewer than
    the context."""
    limit, why = model.cfg.n_ctx, ""
    rope = getattr(getattr(model.original_model, "config", None), "rope_parameters", None) or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        original = kind.get("original_max_position_embeddings")
        if kind.get("rope_type") == "longrope" and original and (not limit or original < limit):
            limit = int(original)
            why = " before its rotary frequencies change, with those of all tokens before"
    return limit, why


def _largest(below: int, fits: Callable[[int], bool]) -> int:
    """The largest n below a bound that fits; 0 where none does. What fits at n fits below n."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _floors(sizes: Sequence[int]) -> list[int]:
    """Which of the prompts the floor is measured on: evenly over the logarithm of their number."""
    short = [index for index, size in enumerate(sizes) if size <= _FLOOR_TOKENS]
    short = short or [sizes.index(min(sizes))]
    if len(short) <= _FLOORS:
        return short
    steps = torch.logspace(0, math.log10(len(short)), _FLOORS, dtype=torch.float64)
    return sorted({short[min(len(short), round(float(step))) - 1] for step in steps})


def _pair_by_pair(
    model: "TransformerBridge",
    prompts: list[tuple[list[int], ...]],
    formats: Sequence[Format],
    heads: bool,
    next_token: bool,
) -> list[Found]:
    """Every prompt by itself, as many lengths at a time as a few thousand tokens allow."""
    found: list[Found] = []
    waiting: list[tuple[list[int], ...]] = []
    for index, rows in enumerate(prompts):
        waiting.append(rows)
        count = sum(map(len, waiting)) + len(rows)
        following = prompts[index + 1] if index + 1 < len(prompts) else None
        if following and count * max(map(len, following)) <= _TOKENS:
            continue
        flat = [row for each in waiting for row in each]
        places = [(row, len(ids) - 1) for row, ids in enumerate(flat)]
        sides = len(rows)
        pairs = [places[begin : begin + sides] for begin in range(0, len(flat), sides)]
        probe = EndsProbe(model, pairs, formats, heads, next_token)
        found += capture(model, from_ids(model, flat, name="pairs"), [probe])
        waiting = []
    return found


def _notes(
    model: "TransformerBridge", family: Family, prompts: list[tuple[list[int], ...]], front: int
) -> list[str]:
    """Whether the tokeniser itself would have written the sequence so."""
    tokenizer = getattr(model, "tokenizer", None)
    body = prompts[-1][0][front:][:_SHOWN]
    if tokenizer is None or family.bare:
        return []
    if fragment(model, tokenizer.decode(body)) == body:
        return []
    return [
        "this tokeniser would write the sequence with other tokens, merged; it was built token by "
        "token"
    ]


def _emulated(formats: Sequence[Format], facts: ModelFacts) -> list[str]:
    names = [each.name for each in formats if each.emulated(facts.device)]
    said = "; their numbers are rounded to the format and held as floating ones"
    return [f"emulated on {facts.device}: {', '.join(names)}{said}"] if names else []
