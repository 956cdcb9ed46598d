"""``eyechart.head_census``: every head named, tried and priced."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import eyechart
from eyechart.errors import EyechartError, UsageError
from eyechart.heads.divergence import Reference
from eyechart.heads.inputs import (
    Texts,
    by_domain,
    following,
    measured_positions,
    prepared,
    with_repeats,
)
from eyechart.heads.names import named
from eyechart.heads.onward import Onward, OutputsProbe
from eyechart.heads.partial import Partial
from eyechart.heads.price import check_context, price
from eyechart.heads.rotary import rotary_use
from eyechart.heads.together import largest_set
from eyechart.heads.trials import trials
from eyechart.kernels import replacements
from eyechart.models import facts_of
from eyechart.probes import Record, capture
from eyechart.probes.notes import notes_of
from eyechart.probes.plan import fusable
from eyechart.probes.provenance import Meter
from eyechart.results import HeadCensus, Provenance, Sequences
from eyechart.results.files import ensure_writable
from eyechart.results.heads import STEPS
from eyechart.texts import HELD_OUT, TEXTS, UNSEEN

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BUDGET = 0.01
JOINT_BUDGET = 0.05
SHARE = 0.5
TOKENS = 48
POSITIONS = 12

_PATTERN_BYTES = 2**21
_PATTERN_TOKENS = 64


def head_census(
    model: "TransformerBridge",
    inputs: Texts | None = None,
    *,
    held_out: Texts | None = None,
    unseen: Texts | None = None,
    budget: float = BUDGET,
    joint_budget: float | None = JOINT_BUDGET,
    share: float = SHARE,
    tokens: int = TOKENS,
    positions: int = POSITIONS,
    screen: bool = True,
    layers: Sequence[int] | None = None,
    context: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    on_step: Callable[[str], object] = lambda step: None,
) -> HeadCensus:
    """Name every head, replace it to see what it is for, and say what it costs.

    Args:
        model: A TransformerBridge.
        inputs: Texts on which heads are named, cut to the length of the shortest: anything that
            :func:`eyechart.sequences.prepare` takes, or texts by domain,
            ``{"prose": [...], "code": [...]}``. By default twelve short texts of six domains.
        held_out: Texts on which heads are replaced. By default, where ``inputs`` is left out too,
            twelve others and the beginnings of two of them said twice; else the same as ``inputs``,
            which the provenance notes.
        unseen: Texts on which the set of heads that can go together is measured once more. By
            default six others where ``inputs`` is left out, else none.
        budget: KL in nats of the next-token distribution under which a replaced head is a no-op;
            0.01 is one per cent of perplexity.
        joint_budget: KL that the heads which go together may cost; None leaves out the search for
            them.
        share: Evidence from which a head is named; see :class:`eyechart.results.HeadNames`.
        tokens: Held-out texts are cut to so many tokens.
        positions: In each of them distributions are compared at so many positions, evenly spread.
        screen: Try only replacements that can be expected to come near the budget; False tries all
            on every head.
        layers: Blocks whose heads are replaced; all by default. All heads are named in any case.
        context: Tokens of the text on which attention is priced; by default 2,048, or what the
            model sees if that is less.
        prepend_bos: See :func:`eyechart.sequences.prepare`.
        batch_size: Sequences a pass where texts are only read.
        seed: Of random tokens, resampling, random sets and bootstraps.
        resume: Folder for the trials of each finished layer. A census that was interrupted and is
            asked for again with the same folder, model and arguments goes on where it was.
        on_step: Called with the name of each step as it begins.

    Returns:
        The census. A part that this model does not allow is None, and ``unavailable`` says why.

    Raises:
        UsageError: an argument is out of range, or ``resume`` cannot be written to.
        InputError: the inputs do not fit the model, or are too short.
        CaptureError, NonFiniteError, UnsupportedModelError: as :func:`eyechart.capture`.
    """
    _check_numbers(budget, joint_budget, share, tokens, positions)
    facts = facts_of(model)
    if resume is not None and notes_of(model):
        raise UsageError("under a lens nothing can be resumed: leave resume= out")
    folder = None if resume is None else ensure_writable(resume)
    built_in = inputs is None and held_out is None
    if inputs is None:
        inputs, name = by_domain(TEXTS), "built-in texts"
        held_out = by_domain(HELD_OUT) if held_out is None else held_out
        unseen = by_domain(UNSEEN) if unseen is None else unseen
    else:
        name = "prompt"
    same = held_out is None
    if context is not None:
        check_context(facts, context)
    if layers is not None and (absent := set(layers) - set(facts.attention_layers)):
        raise UsageError(
            f"layers {sorted(absent)} have no attention in {facts.name}; there are "
            f"{list(facts.attention_layers)}"
        )
    texts, domains = prepared(model, inputs, prepend_bos, name)
    tried, tried_domains = prepared(
        model, inputs if same else held_out, prepend_bos, "held-out texts"
    )
    tried = tried.first_tokens(tokens)
    if built_in:
        tried, tried_domains = with_repeats(model, tried, tried_domains)
    last = None
    if unseen is not None:
        last = prepared(model, unseen, prepend_bos, "unseen texts")[0].first_tokens(tokens)
    at = _at(tried, positions)
    partial = Partial(
        folder,
        {
            "eyechart": eyechart.__version__,
            "weights": facts.weights,
            "texts": texts.digest,
            "held out": tried.digest,
            "positions": at,
            "budget": budget if screen else None,
            "share": share,
            "seed": seed,
            "dtype": str(facts.dtype),
        },
    )
    unavailable: dict[str, str] = {}
    meter = Meter(facts.device)
    with meter:
        on_step("names")
        names, sources = named(model, texts, domains, share, batch_size, seed)
        on_step("rotary frequencies")
        rotary, read = None, ()
        try:
            rotary, why, read = rotary_use(model, texts, batch_size)
        except EyechartError as problem:
            why = str(problem)
        if why:
            unavailable["rotary"] = why
        unfused = fusable(model, facts, ())[1]
        (known,) = capture(model, texts, [OutputsProbe(sorted(unfused))], batch_size=batch_size)
        onward = Onward(model, tried, at, batch_size)
        reference = Reference(onward.reference, following(tried, at))
        found = trials(
            onward,
            reference,
            names,
            known,
            tried_domains,
            budget,
            screen,
            layers,
            partial,
            seed,
            on_step,
        )
        together = priced = patterns = None
        # What is found so far is not lost if the rest fails.
        try:
            if joint_budget is not None:
                elsewhere = last and Onward(model, last, _at(last, positions), batch_size)
                together = largest_set(
                    onward, reference, found, elsewhere, budget, joint_budget, seed, on_step
                )
        except (EyechartError, RuntimeError, MemoryError) as problem:
            unavailable["together"] = str(problem) or type(problem).__name__
        on_step("price")
        length = min(2048, facts.n_ctx or 2048) if context is None else context
        try:
            chosen = () if together is None else together.heads
            priced = price(model, replacements(chosen, found.means), length)
        except (EyechartError, RuntimeError, MemoryError) as problem:
            unavailable["price"] = str(problem) or type(problem).__name__
        try:
            patterns = _patterns(model, texts)
        except (EyechartError, RuntimeError, MemoryError) as problem:
            unavailable["patterns"] = str(problem) or type(problem).__name__
    partial.clear()
    sources = (*sources, *read, known.provenance, onward.outputs.provenance)
    source = Provenance.together(sources, texts.digest, seed)
    notes = [*source.notes]
    if same:
        notes.append("heads were tried on the texts that named them; held_out= gives others")
    if not onward.shares:
        notes.append("every trial began at the embedding: blocks hand on more than the stream")
    source = dataclasses.replace(
        source,
        wall_seconds=round(meter.seconds, 4),
        peak_bytes=meter.peak_bytes,
        forward_passes=source.forward_passes + onward.runs,
        notes=tuple(notes),
    )
    return HeadCensus(
        sequences=texts,
        provenance=source,
        names=names,
        trials=found,
        budget=budget,
        rotary=rotary,
        together=together,
        price=priced,
        patterns=patterns,
        unavailable=unavailable,
    )


def _at(texts: Sequences, count: int) -> tuple[int, ...]:
    return measured_positions(texts.tokens.shape[1], count)


def _check_numbers(
    budget: float, joint_budget: float | None, share: float, tokens: int, positions: int
) -> None:
    for name, value in (("budget", budget), ("joint_budget", joint_budget)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{name} must be positive, in nats of KL; got {value}")
    if not 0 < share < 1:
        raise UsageError(f"share must be between 0 and 1, got {share}")
    if tokens < 8 or positions < 1:
        raise UsageError(f"tokens must be at least 8, positions 1; got {tokens} and {positions}")


def _patterns(model: "TransformerBridge", texts: Sequences) -> Tensor:
    """Attention of every head on the first text, coarsely: for looking at."""
    facts = facts_of(model)

    def coarse(pattern: Tensor) -> Tensor:
        return (pattern * STEPS).round().to(torch.uint8)

    one = texts.rows(0, 1).first_tokens(_PATTERN_TOKENS)
    (found,) = capture(model, one, [Record("pattern", coarse)])
    some = next(iter(found.values()))
    heads = facts.n_layers * max(pattern.shape[1] for pattern in found.values())
    shown = min(some.shape[-1], max(8, math.isqrt(_PATTERN_BYTES // heads)))
    blank = torch.zeros_like(some[0, :, :shown, :shown])
    return torch.stack(
        [
            found[layer][0, :, :shown, :shown] if layer in found else blank
            for layer in range(facts.n_layers)
        ]
    )
