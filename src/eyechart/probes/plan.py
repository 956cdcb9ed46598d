"""Which layers can give their attention without its pattern, found out by trying.

A rehearsal on a few tokens, once for a model: the attention of every layer is taken over, and what
comes of it is compared with the pattern that the bridge computes by itself. A layer that does not
come by, brings something unknown, or disagrees, is read by its pattern from then on, and the reason
is kept. Nothing depends on a list of architectures.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from eyechart.errors import CaptureError, EyechartError
from eyechart.kernels import AttentionCall, Reducer, attend
from eyechart.models.facts import ModelFacts
from eyechart.probes.forward import Pass
from eyechart.probes.kept import Observations
from eyechart.probes.probe import Look, Probe
from eyechart.probes.seam import UnfusableError
from eyechart.probes.sites import OUTPUT, has_site, hook_names
from eyechart.results.base import Provenance
from eyechart.results.sequences import Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

T = TypeVar("T")

_LENGTH = 24
_COMPARED = ("first", "diagonal", "previous", "largest", "received")
# Differences of masses that rounding explains: the largest, and in half formats, where the bridge
# rounds scores to three digits, the mean.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.02


@dataclass(frozen=True)
class Plan:
    """What the rehearsal of a model found.

    Attributes:
        reasons: Layers whose attention must be read by its pattern, and why.
        silent: Hook points of each other layer that are not passed when it is taken over.
    """

    reasons: Mapping[int, str]
    silent: Mapping[int, frozenset[str]]


class Rehearsals(Generic[T]):
    """What is found out about models by running them, anew only when their weights have changed.

    Args:
        find: Finds it out; the user's hooks are off meanwhile.

    Attributes:
        known: The facts of each model, and what was found out when they held.
    """

    def __init__(self, find: "Callable[[TransformerBridge, ModelFacts], T]") -> None:
        self._find = find
        self.known: weakref.WeakKeyDictionary[TransformerBridge, tuple[ModelFacts, T]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, model: "TransformerBridge", facts: ModelFacts) -> T:
        """What is known of a model, found out if need be."""
        known = self.known.get(model)
        if known is None or known[0] is not facts:
            with without_hooks(model):
                known = (facts, self._find(model, facts))
            self.known[model] = known
        return known[1]


def plan_of(model: "TransformerBridge", facts: ModelFacts) -> Plan:
    """The plan of a model; rehearsed anew only when its weights have changed."""
    return PLANS.of(model, facts)


def fusable(
    model: "TransformerBridge", facts: ModelFacts, sites: Sequence[str]
) -> tuple[frozenset[int], dict[int, str]]:
    """The layers to take over in a pass, and of the others why not.

    Args:
        model: A TransformerBridge, with whatever hooks the user has attached.
        facts: Its facts.
        sites: All sites that probes look at in this pass.
    """
    plan = plan_of(model, facts)
    reasons = dict(plan.reasons)
    watched = _watched_hooks(model, sites)
    for layer in facts.attention_layers:
        blocked = sorted(name for name in plan.silent.get(layer, ()) if name in watched)
        if blocked:
            reasons[layer] = f"{blocked[0]} has a hook, which only the explicit pattern passes"
    return frozenset(facts.attention_layers).difference(reasons), reasons


def _rehearse(model: "TransformerBridge", facts: ModelFacts) -> Plan:
    length = min(_LENGTH, facts.n_ctx or _LENGTH)
    tokens = (torch.arange(length) * 7 + 3) % facts.vocabulary
    rows = Sequences.from_rows([tokens.tolist()], [[str(t) for t in tokens.tolist()]])
    probe = _Rehearsal()
    reasons: dict[int, str] = {}
    entries = list(hook_names(model, "resid_pre").values()) if has_site(model, "resid_pre") else []
    while layers := sorted(set(facts.attention_layers) - reasons.keys()):
        run = Pass(model, rows, [(probe, ("attention",))], layers)
        passed: set[str] = set()
        streams: dict[str, Tensor] = {}
        # Plain torch hooks: TransformerLens refuses to hook points that a setting has switched off.
        handles = [
            model.hook_dict[name].register_forward_hook(_count(passed, name))
            for name in _inside(model, layers)
        ]
        try:
            with model.hooks(fwd_hooks=[(n, _keep_in(streams, n)) for n in entries]):
                run.forward()
        except UnfusableError as problem:
            where = layers if problem.layer is None else [problem.layer]
            reasons |= dict.fromkeys(where, problem.reason)
            continue
        except (TypeError, AttributeError, ValueError, RuntimeError, CaptureError) as problem:
            # Modelling code that does not pass on what it does not know, a mask above all.
            reasons |= dict.fromkeys(
                layers, f"its attention is code of its own ({_first_line(problem)})"
            )
            continue
        finally:
            for handle in handles:
                handle.remove()
        missed = [layer for layer in layers if run.fired["attention", layer] != 1]
        if missed:
            said = "its attention does not go through transformers' attention interface"
            reasons |= dict.fromkeys(missed, said)
            continue
        reasons |= _disagreements(model, rows, probe, run, layers, streams)
        fused = set(layers) - reasons.keys()
        return Plan(
            reasons,
            {l: frozenset(n for n in _inside(model, [l]) if n not in passed) for l in fused},
        )
    return Plan(reasons, {})


def _disagreements(
    model: "TransformerBridge",
    rows: Sequences,
    probe: "_Rehearsal",
    run: Pass,
    layers: list[int],
    streams: Mapping[str, Tensor],
) -> dict[int, str]:
    """Layers whose statistics are not those of their pattern, where that can be read at all.

    Every layer gets the stream it got in the rehearsal, so that it answers for itself only.
    """
    explicit = Pass(model, rows, [(probe, ("attention",))])
    try:
        with model.hooks(fwd_hooks=[(n, _put_back(stream)) for n, stream in streams.items()]):
            explicit.forward()
        explicit.check_fired()
    except (EyechartError, RuntimeError):
        return {}
    found: dict[int, str] = {}
    for name in _COMPARED:
        ours, truth = (p.kept[0]["attention", name].layers() for p in (run, explicit))
        for layer in layers:
            kind = next(model.parameters()).dtype
            differences = (ours[layer].double() - truth[layer].double()).abs()
            half = kind in (torch.float16, torch.bfloat16)
            error = float(differences.mean() if half else differences.max())
            if not error <= _TOLERANCE.get(kind, _HALF_TOLERANCE):
                found.setdefault(layer, f"{name} differs from the pattern's by {error:.2g}")
    return found


class _Rehearsal(Probe[None]):
    """Keeps the statistics that are compared."""

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        return ("attention",)

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        if isinstance(activation, AttentionCall):
            return attend(activation, look.tokens, look.mask, statistics=_COMPARED)
        reducer = Reducer(_COMPARED, (), look.tokens, look.mask)
        reducer.add(0, activation)
        return reducer.finish()

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> None:
        return None


def _inside(model: "TransformerBridge", layers: Sequence[int]) -> list[str]:
    """Hook points within the attention of these layers."""
    starts = tuple(f"blocks.{layer}.attn." for layer in layers)
    return [name for name in model.hook_dict if name.startswith(starts)]


def _count(passed: set[str], name: str) -> Any:
    def count(module: Any, inputs: Any, output: Any) -> None:
        passed.add(name)

    return count


def _keep_in(streams: dict[str, Tensor], name: str) -> Any:
    def keep(stream: Tensor, hook: Any) -> None:
        streams[name] = stream.clone()

    return keep


def _put_back(stream: Tensor) -> Any:
    return lambda other, hook: stream


def _watched_hooks(model: "TransformerBridge", sites: Sequence[str]) -> set[str]:
    """Names of the hook points that a user's hook or a probe of this pass looks at."""
    watched = {name for name, point in model.hook_dict.items() if point.fwd_hooks}
    watched |= {name for name, point in model.hook_dict.items() if point.bwd_hooks}
    for site in sites:
        if site != "attention":
            watched |= set(hook_names(model, site).values())
    # One hook point may have several names; the model's own output has none.
    points = {id(model.hook_dict[name]) for name in watched if name != OUTPUT}
    return {name for name, point in model.hook_dict.items() if id(point) in points}


@contextmanager
def without_hooks(model: "TransformerBridge") -> Iterator[None]:
    """A user's hooks are neither for rehearsals nor for modules that are tried by themselves."""
    stashed = []
    for point in {id(point): point for point in model.hook_dict.values()}.values():
        stashed.append((point, point._forward_hooks, point._forward_pre_hooks))
        point._forward_hooks, point._forward_pre_hooks = (
            type(point._forward_hooks)(),
            type(point._forward_pre_hooks)(),
        )
    try:
        yield
    finally:
        for point, forward, before in stashed:
            point._forward_hooks, point._forward_pre_hooks = forward, before


PLANS = Rehearsals(_rehearse)


def _first_line(problem: Exception) -> str:
    lines = str(problem).splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"[:120]
