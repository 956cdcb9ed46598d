"""One forward pass, any number of probes.

Probes are attached as TransformerLens hooks for the length of the pass and removed whatever
happens; hooks that the user attached stay and fire. Every firing is counted. A probe whose hook did
not fire exactly once on every layer that has it gets no result but an error, because the result
would look right and be wrong.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from eyechart import sequences as sequencing
from eyechart.errors import UsageError
from eyechart.models.facts import check_evaluating, facts_of
from eyechart.probes.branching import why_not_branching
from eyechart.probes.forward import Kept, Pass, Wanted
from eyechart.probes.kept import Observations, joined
from eyechart.probes.notes import notes_of
from eyechart.probes.plan import fusable
from eyechart.probes.probe import Probe
from eyechart.probes.provenance import Meter, provenance_of
from eyechart.probes.seam import UnfusableError, edits_of
from eyechart.results.sequences import Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def capture(
    model: "TransformerBridge",
    inputs: sequencing.Inputs,
    probes: Sequence[Probe[Any]],
    *,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> tuple[Any, ...]:
    """Run the model once and let every probe look.

    Args:
        model: A TransformerBridge in evaluation mode.
        inputs: String, strings, token ids ``[batch position]`` or Sequences.
        probes: What to measure.
        prepend_bos: See :func:`eyechart.sequences.prepare`.
        batch_size: Sequences a pass; all at once by default. Halved, and noted in the provenance,
            when memory runs out.
        seed: Recorded as the seed the inputs were made with; capture itself draws nothing.

    Returns:
        The probes' results, in order.

    Raises:
        InputError: the inputs do not fit the model, or the model is in training mode.
        CaptureError: a hook did not fire once on every layer that has it.
        NonFiniteError: NaN or infinity in the weights or the residual stream; names the layer.
        UnsupportedModelError: the model is not causal or has no attention.
    """
    if not probes:
        raise UsageError("capture needs at least one probe")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    facts = facts_of(model)
    prepared = sequencing.prepare(model, inputs, prepend_bos=prepend_bos)
    check_evaluating(model)
    wanted = [(probe, tuple(dict.fromkeys(probe.sites(model)))) for probe in probes]
    sites = {site for _, seen in wanted for site in seen}
    fused: frozenset[int] = frozenset()
    reasons: dict[int, str] = {}
    need = "a lens that changes attention works" if edits_of(model) else ""
    if prepared.parents is not None:
        need = "prompts that share their beginnings can be measured"
    if "attention" in sites or need:
        fused, reasons = fusable(model, facts, sorted(sites))
    if need and (reasons or sites & {"pattern", "scores"}):
        reads = bool(sites & {"pattern", "scores"})
        why = "a probe reads the pattern" if reads else "; ".join(sorted(set(reasons.values())))
        raise UsageError(
            f"{need} only where attention is computed without its pattern, and here it is not: "
            f"{why}."
        )
    if prepared.parents is not None and (reason := why_not_branching(model, facts)):
        raise UsageError(f"prompts that share their beginnings need another model here: {reason}.")
    runs = _Runs(model, prepared, wanted, fused, reasons)
    meter = Meter(facts.device)
    with meter:
        runs.run(batch_size)
    provenance = provenance_of(
        facts,
        prepared,
        meter,
        attention=runs.attention,
        hooks=dict(runs.counts),
        passes=len(runs.parts),
        seed=seed,
        notes=(
            *notes_of(model),
            *runs.notes,
            *runs.told(),
            *(n for probe in probes for n in probe.notes(facts)),
        ),
    )
    return tuple(
        probe.result(runs.observations(index), prepared, provenance)
        for index, probe in enumerate(probes)
    )


@dataclass
class _Runs:
    """As many passes as the batch takes, and what came of them."""

    model: "TransformerBridge"
    prepared: Sequences
    wanted: Wanted
    fused: frozenset[int]
    reasons: dict[int, str]
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    parts: list[list[Kept]] = field(default_factory=list)

    def run(self, batch_size: int | None) -> None:
        total = len(self.prepared.lengths)
        size, start = min(batch_size or total, total), 0
        while start < total:
            rows = self.prepared.rows(start, min(start + size, total))
            one = Pass(self.model, rows, self.wanted, self.fused)
            try:
                one.forward()
            except UnfusableError as problem:
                # Something a short rehearsal does not show: all over again, so that the parts of
                # one result are computed alike.
                self._read_pattern(problem)
                self.parts.clear()
                self.counts.clear()
                start = 0
            except (RuntimeError, MemoryError) as problem:
                if size == 1 or not is_out_of_memory(problem):
                    raise
                size = (size + 1) // 2
                self.notes.append(f"out of memory: batch halved to {size} sequences")
            else:
                one.check_fired()
                self.parts.append(one.kept)
                self.counts.update(one.fired_by_site())
                start += size

    @property
    def attention(self) -> str:
        """How attention was computed, for the provenance."""
        if not self.fused:
            return "pattern"
        return "fused, pattern" if self.reasons else "fused"

    def told(self) -> list[str]:
        """Why layers were read by their pattern, one note a reason."""
        by_reason: dict[str, list[str]] = {}
        for layer, reason in sorted(self.reasons.items()):
            by_reason.setdefault(reason, []).append(str(layer))
        return [
            f"layers {', '.join(layers)} read by their pattern: {reason}"
            for reason, layers in by_reason.items()
        ]

    def observations(self, index: int) -> Observations:
        """What one probe kept, over all passes."""
        parts = [part[index] for part in self.parts]
        kept = {key: joined([part[key] for part in parts]) for key in parts[0]}
        return Observations(kept, self.fused, self.reasons)

    def _read_pattern(self, problem: UnfusableError) -> None:
        if edits_of(self.model):
            raise problem
        layers = self.fused if problem.layer is None else {problem.layer}
        self.reasons |= dict.fromkeys(layers, problem.reason)
        self.fused -= layers


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether a smaller batch may help."""
    # The CPU's allocator has no exception of its own.
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(problem)
    )
