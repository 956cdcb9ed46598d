"""One forward pass, any number of probes.

Probes are attached as TransformerLens hooks for the length of the pass and removed whatever
happens; hooks that the user attached stay and fire. Every firing is counted. A probe whose hook did
not fire exactly once on every layer that has it gets no result but an error, because the result
would look right and be wrong.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eyechart import sequences as sequencing
from eyechart.errors import CaptureError, InputError, NonFiniteError, UsageError
from eyechart.models.facts import facts_of
from eyechart.probes.probe import Look, Observations, Probe
from eyechart.probes.provenance import Meter, provenance_of
from eyechart.probes.sites import exact_pattern, hook_names
from eyechart.results.sequences import Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Place = tuple[str, int | None]


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
    if model.training:
        raise InputError(
            "the model is in training mode, where dropout makes every number random; "
            "call model.eval() first."
        )
    wanted = [(probe, tuple(dict.fromkeys(probe.sites(model)))) for probe in probes]
    counts: Counter[str] = Counter()
    notes: list[str] = []
    meter = Meter(facts.device)
    with meter:
        parts, passes = _run_in_parts(model, prepared, wanted, batch_size, counts, notes)
    provenance = provenance_of(
        facts, prepared, meter, hooks=dict(counts), passes=passes, seed=seed, notes=tuple(notes)
    )
    return tuple(
        probe.result(_joined([part[index] for part in parts]), prepared, provenance)
        for index, probe in enumerate(probes)
    )


def _run_in_parts(
    model: "TransformerBridge",
    prepared: Sequences,
    wanted: Sequence[tuple[Probe[Any], tuple[str, ...]]],
    batch_size: int | None,
    counts: Counter[str],
    notes: list[str],
) -> tuple[list[list["_Kept"]], int]:
    total = len(prepared.lengths)
    size, start = min(batch_size or total, total), 0
    parts: list[list[_Kept]] = []
    while start < total:
        rows = prepared.rows(start, min(start + size, total))
        run = _Pass(model, rows, wanted)
        try:
            run.forward()
        except RuntimeError as problem:
            if size == 1 or not _is_out_of_memory(problem):
                raise
            size = (size + 1) // 2
            notes.append(f"out of memory: batch halved to {size} sequences")
        else:
            parts.append(run.kept)
            counts.update(run.fired_by_site())
            start += size
    return parts, len(parts)


def _is_out_of_memory(problem: RuntimeError) -> bool:
    # The CPU's allocator has no exception of its own.
    return isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem)


_Kept = dict[tuple[str, str], dict[int | None, Tensor]]


def _joined(parts: list[_Kept]) -> Observations:
    first = parts[0]
    return Observations(
        {
            key: {layer: torch.cat([part[key][layer] for part in parts]) for layer in by_layer}
            for key, by_layer in first.items()
        }
    )


@dataclass
class _Pass:
    """The state of one forward pass."""

    model: "TransformerBridge"
    rows: Sequences
    wanted: Sequence[tuple[Probe[Any], tuple[str, ...]]]
    fired: Counter[Place] = field(default_factory=Counter)
    scores: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept: list[_Kept] = [defaultdict(dict) for _ in self.wanted]
        device = self.model.cfg.device
        self.tokens, self.mask = self.rows.tokens.to(device), self.rows.mask.to(device)
        self.lookers: dict[str, list[int]] = defaultdict(list)
        for index, (_, sites) in enumerate(self.wanted):
            for site in sites:
                self.lookers[site].append(index)
        needed = set(self.lookers)
        half = (torch.float16, torch.bfloat16)
        if "pattern" in needed and any(p.dtype in half for p in self.model.parameters()):
            needed.add("scores")
        if "scores" in needed:
            needed.add("pattern")  # to see which comes first
        self.needed = self._places(needed)
        # The residual stream is always watched, so that NaN stops the pass where it appears.
        self.places = self.needed | self._places({"resid_post"})

    def _places(self, sites: set[str]) -> dict[Place, str]:
        return {
            (site, layer): name
            for site in sites
            for layer, name in hook_names(self.model, site).items()
        }

    def forward(self) -> None:
        hooks = [(name, partial(self._see, place)) for place, name in self.places.items()]
        options: dict[str, Any] = {}
        accepted = inspect.signature(type(self.model.original_model).forward).parameters
        if "use_cache" in accepted:
            options["use_cache"] = False
        if "logits" not in self.lookers and "logits_to_keep" in accepted:
            options["logits_to_keep"] = 1  # nobody looks at the others
        # No attention mask: under causal attention no real token sees the padding after it, and
        # some architectures lose their causal mask when they are given one for the padding.
        with torch.no_grad(), self.model.hooks(fwd_hooks=hooks):
            self.model(self.tokens, return_type=None, **options)
        self._check_fired()

    def fired_by_site(self) -> dict[str, int]:
        by_site: Counter[str] = Counter()
        for (site, _), times in self.fired.items():
            by_site[site] += times
        return dict(by_site)

    def _see(self, place: Place, activation: Tensor, hook: Any) -> None:
        site, layer = place
        self.fired[place] += 1
        if site == "resid_post":
            self._refuse_non_finite(activation, layer)
        if site == "scores":
            assert layer is not None
            if self.fired["pattern", layer]:
                raise CaptureError(
                    f"layer {layer}: what {self.model.cfg.architecture} hands over as scores comes "
                    "after the softmax, so there are no scores to be had here."
                )
            self.scores[layer] = activation
        sinks = None
        if site == "pattern":
            assert layer is not None
            sinks = getattr(self.model.blocks[layer].attn.original_component, "sinks", None)
            activation = exact_pattern(activation, self.scores.pop(layer, None), sinks, layer)
        look = Look(site, layer, self.mask.to(activation.device), sinks)
        for index in self.lookers.get(site, ()):
            for name, value in self.wanted[index][0].observe(activation, look).items():
                self.kept[index][site, name][layer] = value.detach().cpu()

    def _refuse_non_finite(self, activation: Tensor, layer: int | None) -> None:
        # Padding may hold anything; only what real tokens carry counts.
        padding = ~self.mask.to(activation.device)[..., None]
        if not activation.masked_fill(padding, 0).isfinite().all():
            raise NonFiniteError(
                f"the residual stream of {self.model.cfg.model_name} holds NaN or infinity after "
                f"layer {layer}. In float16 this is usually overflow: load the model in float32 or "
                "bfloat16. Otherwise look at that layer's weights."
            )

    def _check_fired(self) -> None:
        wrong = {place: self.fired[place] for place in self.needed if self.fired[place] != 1}
        if wrong:
            said = ", ".join(
                f"{site} of layer {layer} {times} times"
                if layer is not None
                else f"{site} {times} times"
                for (site, layer), times in list(wrong.items())[:4]
            )
            raise CaptureError(
                f"{len(wrong)} of {len(self.needed)} hooks did not fire exactly once ({said}"
                f"{', ...' if len(wrong) > 4 else ''}): {self.model.cfg.architecture} declares "
                "them but passes through them never or repeatedly, so what they carry cannot be "
                "tied to one place in the model."
            )
