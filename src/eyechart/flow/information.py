"""``eyechart.information_flow``: one question, several answers that check each other."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from eyechart import sequences as sequencing
from eyechart.errors import CaptureError, UsageError
from eyechart.flow.contributions import KINDS
from eyechart.flow.parts import Parts
from eyechart.flow.sensitivity import check_differentiable
from eyechart.models import ModelFacts, facts_of
from eyechart.probes.provenance import Meter
from eyechart.results import InformationFlow, Provenance, Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

MEASURES = (
    "rollout",
    "path_bound",
    "norm_rollout",
    "alti",
    "topology",
    "sensitivity",
    "replacement",
    "spread",
    "sinks",
)
COSTLY_TOKENS = 1024
"""Beyond this length what costs many passes is measured only if it is asked for by name."""

_COSTLY = {"norm_rollout", "alti", "sensitivity", "replacement"}


def information_flow(
    model: "TransformerBridge",
    inputs: sequencing.Inputs,
    *,
    query: int = -1,
    layer: int | None = None,
    measures: Sequence[str] | None = None,
    probes: int | None = 16,
    replacements: Sequence[int] | None = None,
    changed: int | None = None,
    evict: int = 4,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
    accumulate: Literal["float32", "float64"] = "float32",
    seed: int = 0,
    on_step: Callable[[str], object] = lambda step: None,
) -> InformationFlow:
    """How information from each input token reaches the chosen token's representation.

    Pictures that follow attention (rollout, the theory's path-sum bound, value-weighted rollouts)
    beside the truth (derivatives, replaced tokens), so that a user sees which picture to trust on
    this model. Barbero et al., arXiv 2406.04267, section 5; every field of the result names its
    own source.

    Args:
        model: A TransformerBridge.
        inputs: String, strings, token ids ``[batch position]`` or Sequences.
        query: Position whose representation is explained; negative counts from the end of each
            sequence.
        layer: Look at the stream out of this block instead of the final norm's output. Concerns
            the truths and the bound.
        measures: What to measure, of ``MEASURES``; by default all, as far as the length allows:
            beyond 1,024 tokens ``norm_rollout``, ``alti``, ``sensitivity`` and ``replacement`` only
            if named here.
        probes: Random vectors behind ``sensitivity``; None computes it exactly, at the price of one
            backward pass a dimension of the stream.
        replacements: Positions to replace; by default up to 64, spread over the text.
        changed: Position that ``spread`` changes; by default the middle of the text.
        evict: How many first tokens ``spread_evicted`` hides, from twice that position on.
        prepend_bos: See :func:`eyechart.sequences.prepare`.
        batch_size: Sequences a pass; by default all at once, for replacements what 16,384 tokens
            hold, and for derivatives what 4,096 do.
        accumulate: Number format of softmax and sums; a float64 model takes float64 anyway.
        seed: Of random vectors and replacement tokens.
        on_step: Called with the name of each part as its measurement begins.

    Returns:
        The pictures. One that this model or text does not allow is None, and ``unavailable`` says
        why; a model in training mode or without gradients loses the derivatives only.

    Raises:
        UsageError: an unknown measure, or a position or layer that is not there.
        InputError, CaptureError, NonFiniteError, UnsupportedModelError: as
            :func:`eyechart.capture`, where nothing at all could be measured.
    """
    facts = facts_of(model)
    prepared = sequencing.prepare(model, inputs, prepend_bos=prepend_bos)
    at = _positions(prepared, query)
    wanted = _wanted(measures, probes, prepared)
    _check_places(facts, prepared, at, layer, replacements, changed, evict)
    if accumulate not in ("float32", "float64"):
        raise UsageError(f"accumulate must be 'float32' or 'float64', got {accumulate!r}")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    kind = torch.promote_types(facts.dtype, getattr(torch, accumulate))
    flow = Parts(model, facts, prepared, at, layer, kind)
    if measures is None:
        for name in (m for m in MEASURES if m not in wanted):
            flow.unavailable[name] = (
                f"left out by default beyond {COSTLY_TOKENS:,} tokens, because it costs many "
                f"passes; ask for it: measures=({name!r},)"
            )
    training = model.training
    with Meter(facts.device) as meter:
        if "sensitivity" in wanted:
            on_step("derivatives, tried on two tokens")
            if flow.attempt("sensitivity", lambda: check_differentiable(model) or True) is None:
                wanted.discard("sensitivity")
        with _evaluating(model):
            on_step("one pass over the text")
            flow.look(wanted, batch_size)
            on_step("rollout")
            flow.walk_back(wanted)
            if kinds := tuple(kind for kind in KINDS if kind in wanted):
                on_step("value-weighted rollout")
                flow.walk_back_values(kinds)
            flow.trace = None  # it holds queries and keys of every layer
            if "sensitivity" in wanted:
                on_step("derivatives")
                flow.differentiate(probes, batch_size, seed)
            if "replacement" in wanted:
                on_step("replaced tokens")
                flow.replace(replacements, batch_size, seed)
            if "spread" in wanted:
                on_step("spread of a change")
                flow.spread(changed, evict, batch_size, seed)
    if not flow.sources:
        raise CaptureError(next(iter(flow.unavailable.values())))
    provenance = dataclasses.replace(
        Provenance.together(flow.sources, prepared.digest, seed),
        wall_seconds=round(meter.seconds, 4),
        peak_bytes=meter.peak_bytes,
    )
    if training:
        note = "the model was in training mode and was measured in evaluation mode"
        provenance = dataclasses.replace(provenance, notes=(*provenance.notes, note))
    return InformationFlow(
        sequences=prepared,
        provenance=provenance,
        query=at,
        target="final norm" if layer is None else f"layer {layer}",
        unavailable=flow.unavailable,
        **flow.found,
    )


def _positions(prepared: Sequences, query: int) -> Int[Tensor, " batch"]:
    places = []
    for length in prepared.lengths:
        at = query + length if query < 0 else query
        if not 0 <= at < length:
            raise UsageError(f"query={query}, but a sequence has {length} tokens")
        places.append(at)
    return torch.tensor(places)


def _wanted(measures: Sequence[str] | None, probes: int | None, prepared: Sequences) -> set[str]:
    if probes is not None and probes < 1:
        raise UsageError(f"probes must be at least 1, or None for the exact value; got {probes}")
    if measures is None:
        long = prepared.tokens.shape[1] > COSTLY_TOKENS
        return {name for name in MEASURES if not (long and name in _COSTLY)}
    if isinstance(measures, str):
        measures = (measures,)
    unknown = sorted(set(measures) - set(MEASURES))
    if unknown or not measures:
        said = f"unknown measures {', '.join(map(repr, unknown))}" if unknown else "no measures"
        raise UsageError(f"{said}; choose from {', '.join(MEASURES)}")
    return set(measures)


def _check_places(
    facts: ModelFacts,
    prepared: Sequences,
    query: Int[Tensor, " batch"],
    layer: int | None,
    replacements: Sequence[int] | None,
    changed: int | None,
    evict: int,
) -> None:
    if layer is not None and not 0 <= layer < facts.n_layers:
        raise UsageError(f"layer={layer}, but {facts.name} has layers 0 to {facts.n_layers - 1}")
    if evict < 1:
        raise UsageError(f"evict must be at least 1, got {evict}")
    for name, places, end in (
        ("replacements", replacements or (), int(query.min())),
        ("changed", () if changed is None else (changed,), min(prepared.lengths) - 1),
    ):
        if wrong := [p for p in places if not 0 <= p <= end]:
            raise UsageError(f"{name}={wrong[0]}, but positions go from 0 to {end} here")


@contextmanager
def _evaluating(model: "TransformerBridge") -> Iterator[None]:
    """Evaluation mode for as long as it takes; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
