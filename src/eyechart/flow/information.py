"""``eyechart.information_flow``: one question, several answers that check each other."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from eyechart import lenses
from eyechart import sequences as sequencing
from eyechart.errors import CaptureError, EyechartError, UsageError
from eyechart.flow.bound import VARIANT, Gains, gains_of
from eyechart.flow.contributions import KINDS, value_walk
from eyechart.flow.replacement import replace
from eyechart.flow.rollout import HITTING_TOKENS, walk
from eyechart.flow.sensitivity import check_differentiable, sensitivity
from eyechart.flow.sinks import SinkProbe
from eyechart.flow.spread import changed_pairs, spread
from eyechart.flow.trace import Trace, TraceProbe
from eyechart.models import ModelFacts, facts_of
from eyechart.probes import Probe, capture
from eyechart.probes.plan import fusable
from eyechart.probes.provenance import Meter, provenance_of
from eyechart.results import InformationFlow, Provenance, Sequences, SinkProfile

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

T = TypeVar("T")


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
    flow = _Flow(model, facts, prepared, at, layer, kind)
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


class _Flow:
    """The state of one call: what was found, and what could not be."""

    def __init__(
        self,
        model: "TransformerBridge",
        facts: ModelFacts,
        prepared: Sequences,
        query: Int[Tensor, " batch"],
        target: int | None,
        accumulate: torch.dtype,
    ) -> None:
        self.model, self.facts, self.prepared = model, facts, prepared
        self.query, self.target, self.accumulate = query, target, accumulate
        self.found: dict[str, Any] = {}
        self.unavailable: dict[str, str] = {}
        self.sources: list[Provenance] = []
        self.trace: Trace | None = None

    def attempt(self, name: str, run: Callable[[], T]) -> T | None:
        """What ``run`` returns; where it fails, None, and the reason is kept under ``name``."""
        try:
            return run()
        except (EyechartError, RuntimeError, MemoryError) as problem:
            self.unavailable[name] = str(problem) or type(problem).__name__
            return None

    def look(self, wanted: set[str], batch_size: int | None) -> None:
        """One pass with everything attached; if it is refused, part by part."""
        contributions, bound = bool(wanted & set(KINDS)), "path_bound" in wanted
        traced = bool(wanted & {"rollout", "topology", "path_bound", *KINDS})
        _, reasons = fusable(self.model, self.facts, ("attention",))

        def probe(contributions: bool, bound: bool) -> Probe[Any]:
            return TraceProbe(contributions, bound, bool(reasons), self.accumulate)

        probes = {"rollout": probe(contributions, bound)} if traced else {}
        if "sinks" in wanted:
            probes["sinks"] = SinkProbe(self.model, self.accumulate)
        if not probes:
            return
        try:
            results = capture(
                self.model, self.prepared, list(probes.values()), batch_size=batch_size
            )
            found = dict(zip(probes, results, strict=True))
        except (CaptureError, RuntimeError, MemoryError) as problem:
            if not (contributions or bound or "sinks" in wanted):
                raise
            # The stream is not to be had, or there is too little memory: keep the attention.
            for name in wanted & {"path_bound", "sinks", *KINDS}:
                self.unavailable[name] = str(problem) or type(problem).__name__
            wanted -= {"path_bound", "sinks", *KINDS}
            if not traced:
                return
            one = probe(False, False)
            found = {"rollout": capture(self.model, self.prepared, [one])[0]}
        self.trace = found.get("rollout")
        if self.trace is not None:
            self.sources.append(self.trace.provenance)
        if "sinks" in found:
            self.found["sinks"], source = found["sinks"]
            self.sources += [] if self.sources else [source]
            other = sequencing.other_bos(self.model, self.prepared)
            if other is not None:
                again = self.attempt("sinks_other_bos", lambda: self._sinks(other, batch_size))
                self.found["sinks_other_bos"] = again

    def _sinks(self, sequences: Sequences, batch_size: int | None) -> SinkProfile:
        probe = SinkProbe(self.model, self.accumulate)
        ((profile, source),) = capture(self.model, sequences, [probe], batch_size=batch_size)
        self.sources.append(source)
        return profile

    def walk_back(self, wanted: set[str]) -> None:
        """Rollout, its spectrum, and the bound."""
        trace = self.trace
        if trace is None:
            return
        without = sorted(set(range(self.facts.n_layers)) - trace.layers.keys())
        if without:
            for name in wanted & {"rollout", "topology", "path_bound", *KINDS}:
                self.unavailable[name] = (
                    f"blocks {', '.join(map(str, without))} have no attention; what passes "
                    "between tokens there is in no product of attention matrices"
                )
            wanted -= {"rollout", "topology", "path_bound", *KINDS}
            self.trace = None
            return
        gains: Gains | None = None
        if "path_bound" in wanted:
            gains = self.attempt(
                "path_bound", lambda: gains_of(self.model, trace, self.query, self.target)
            )
        length = self.prepared.tokens.shape[1]
        hitting = "topology" in wanted and length <= HITTING_TOKENS
        walked = self.attempt(
            "rollout",
            lambda: walk(
                trace,
                self.query,
                torch.device(self.facts.device),
                gains,
                hitting,
                self.accumulate,
            ),
        )
        if walked is None:
            return
        keep = {
            "rollout": ("attention", "rollout", "through"),
            "path_bound": ("path_bound",),
            "topology": ("eigenvalues", "hitting_depth"),
        }
        for measure in wanted & keep.keys():
            for name in keep[measure]:
                value = getattr(walked, name)
                self.found[name] = value if name == "hitting_depth" else self._masked(value)
        if gains is not None:
            self.found["bound_variant"] = VARIANT
        if "topology" in wanted and not hitting:
            self.unavailable["hitting_depth"] = (
                f"it reads every row of attention, which is done up to {HITTING_TOKENS:,} tokens"
            )

    def walk_back_values(self, kinds: tuple[str, ...]) -> None:
        """Rollouts of value-weighted contributions."""
        trace = self.trace
        if trace is None:
            return
        reason = self.unavailable
        before = dict(reason)
        walked = self.attempt(
            kinds[0], lambda: value_walk(self.model, trace, self.query, kinds, self.accumulate)
        )
        if walked is None:
            self.unavailable = before | dict.fromkeys(kinds, reason[kinds[0]])
        else:
            self.found |= {kind: self._masked(rows) for kind, rows in walked.items()}

    def differentiate(self, probes: int | None, batch_size: int | None, seed: int) -> None:
        """Sensitivity to every position."""
        with Meter(self.facts.device) as meter:
            found = self.attempt(
                "sensitivity",
                lambda: sensitivity(
                    self.model,
                    self.prepared,
                    self.query,
                    self.target,
                    probes,
                    batch_size,
                    seed,
                ),
            )
        if found is None:
            return
        *values, graphs = found
        value, half = (self._masked(x) for x in values)
        self.found |= {"sensitivity": value, "sensitivity_interval": half, "probes": probes}
        end = "final_norm" if self.target is None else "resid_post"
        self.sources.append(
            provenance_of(
                self.facts,
                self.prepared,
                meter,
                attention="autograd",
                hooks={"resid_pre": graphs, end: graphs},
                passes=graphs,
                seed=seed,
            )
        )

    def replace(self, positions: Sequence[int] | None, batch_size: int | None, seed: int) -> None:
        """Replace tokens one at a time."""
        found = self.attempt(
            "replacement",
            lambda: replace(
                self.model, self.prepared, self.query, self.target, positions, batch_size, seed
            ),
        )
        if found is not None:
            self.sources += found.provenance
            self.found["replacement_kl"] = found.kl
            self.found["replacement_change"] = found.change
            self.found["replacement_token"] = found.token

    def spread(self, changed: int | None, evict: int, batch_size: int | None, seed: int) -> None:
        """Change one token, with and without the first tokens in sight."""
        pairs, change = changed_pairs(self.prepared, self.query, changed, seed)
        found = self.attempt("spread", lambda: spread(self.model, pairs, batch_size))
        if found is None:
            return
        self.found["spread"], source = found
        self.found["spread_change"] = change
        self.found["spread_labels"] = tuple(sequencing.readable(self.model, change[:, 1].tolist()))
        self.sources.append(source)

        def hidden() -> tuple[Tensor, Provenance]:
            with lenses.evict(self.model, evict, 2 * evict):
                return spread(self.model, pairs, batch_size)

        found = self.attempt("spread_evicted", hidden)
        if found is not None:
            self.found["spread_evicted"], source = found
            self.found["evicted"] = (evict, 2 * evict)
            self.sources.append(source)

    def _masked(self, values: Tensor | None) -> Tensor | None:
        """NaN on padding, of something whose last axis is the position."""
        if values is None:
            return None
        padding = ~self.prepared.mask
        return values.masked_fill(padding if values.ndim == 2 else padding[:, None], torch.nan)


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
