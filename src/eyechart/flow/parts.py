"""The parts of one call of :func:`eyechart.information_flow`, each with what it needs and finds."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from eyechart import sequences as sequencing
from eyechart.errors import CaptureError, EyechartError
from eyechart.flow.bound import VARIANT, Gains, gains_of
from eyechart.flow.contributions import KINDS, value_walk
from eyechart.flow.replacement import replace
from eyechart.flow.rollout import HITTING_TOKENS, walk
from eyechart.flow.sensitivity import sensitivity
from eyechart.flow.sinks import SinkProbe
from eyechart.flow.spread import changed_pairs, spread
from eyechart.flow.trace import Trace, TraceProbe
from eyechart.lenses.attention import first_keys_hidden
from eyechart.models import ModelFacts
from eyechart.probes import Probe, capture
from eyechart.probes.notes import notes_of
from eyechart.probes.plan import fusable
from eyechart.probes.provenance import Meter, provenance_of
from eyechart.results import Provenance, Sequences, SinkProfile

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

T = TypeVar("T")


class Parts:
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
            for name in wanted & {"topology", "path_bound"}:
                self.unavailable.setdefault(name, self.unavailable["rollout"])
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
                notes=notes_of(self.model),
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
            with first_keys_hidden(self.model, evict, 2 * evict):
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
