"""What attention costs at one length, counted from its shapes and measured by the clock."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eyechart.errors import UnsupportedModelError, UsageError
from eyechart.kernels import AttentionCall, Replacement, attend
from eyechart.models import ModelFacts, facts_of
from eyechart.probes.forward import thrift
from eyechart.probes.plan import fusable
from eyechart.probes.seam import edits_of, taken_over
from eyechart.results import HeadPrice

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ROUNDS = 2
"""Runs with all heads and runs without some take turns; the fastest of each counts."""


def price(
    model: "TransformerBridge",
    replaced: Mapping[int, Mapping[int, Replacement]],
    context: int,
    rounds: int = ROUNDS,
) -> HeadPrice:
    """Count and time attention with and without some heads.

    Args:
        model: A TransformerBridge.
        replaced: What takes the place of which heads, by layer.
        context: Tokens of the text.
        rounds: Runs of each kind.

    Raises:
        UsageError: the context is longer than the model's.
        UnsupportedModelError: attention is code of its own, of which no head can be left out.
    """
    facts = facts_of(model)
    check_context(facts, context)
    layers, reasons = fusable(model, facts, ())
    if reasons:
        layer, reason = next(iter(sorted(reasons.items())))
        raise UnsupportedModelError(f"no head can be left out: layer {layer}: {reason}")
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(facts.vocabulary, (1, context), generator=draw).to(facts.device)
    clock = _Clock(model, tokens)
    best = {skip: (float("inf"), float("inf")) for skip in (False, True)}
    for _ in range(rounds):
        for skip in best:
            found = clock.run(sorted(layers), replaced if skip else {})
            best[skip] = (min(best[skip][0], found[0]), min(best[skip][1], found[1]))
    flops, kv_bytes = _stacked(clock.flops, facts.n_layers), _stacked(clock.bytes, facts.n_layers)
    freed = 0.0
    for layer, shared in clock.shared.items():
        gone = set(replaced.get(layer, {}))
        for group in range(kv_bytes.shape[1] // shared):
            heads = range(group * shared, (group + 1) * shared)
            freed += float(kv_bytes[layer, list(heads)].sum()) if gone.issuperset(heads) else 0
    return HeadPrice(
        context=context,
        flops=flops,
        kv_bytes=kv_bytes,
        set_flops=sum(float(flops[layer, list(gone)].sum()) for layer, gone in replaced.items()),
        set_kv_bytes=freed,
        seconds=best[False][0],
        seconds_without=best[True][0],
        pass_seconds=best[False][1],
        pass_seconds_without=best[True][1],
    )


def check_context(facts: ModelFacts, context: int) -> None:
    """Refuse a length that the model cannot take.

    Raises:
        UsageError: it is not one that the model sees.
    """
    if not 0 < context <= (facts.n_ctx or context):
        raise UsageError(f"context={context}, but {facts.name} sees 1 to {facts.n_ctx} tokens")


class _Clock:
    """Runs the model once and takes the time of attention apart."""

    def __init__(self, model: "TransformerBridge", tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.mask = torch.ones_like(tokens, dtype=torch.bool)
        self.flops: dict[int, Tensor] = {}
        self.bytes: dict[int, Tensor] = {}
        self.shared: dict[int, int] = {}
        self._spent = 0.0

    def run(
        self, layers: list[int], replaced: Mapping[int, Mapping[int, Replacement]]
    ) -> tuple[float, float]:
        """Seconds in attention, and in all."""
        self._spent = 0.0

        def handle(layer: int, call: AttentionCall) -> Tensor:
            self._count(layer, call)
            for edit in edits_of(self.model):
                edit(layer, call)
            call.replaced |= replaced.get(layer, {})
            tokens, mask = self.tokens.to(call.q.device), self.mask.to(call.q.device)
            begin = self._now(call.q.device)
            attend(call, tokens, mask)
            self._spent += self._now(call.q.device) - begin
            assert call.output is not None
            return call.output

        device = self.tokens.device
        with torch.no_grad(), taken_over(self.model, layers, True, handle):
            begin = self._now(device)
            self.model(self.tokens, return_type=None, **thrift(self.model))
            return self._spent, self._now(device) - begin

    def _count(self, layer: int, call: AttentionCall) -> None:
        batch, heads, length, width = call.q.shape
        groups, wide = call.k.shape[1], call.v.shape[-1]
        self.shared[layer] = heads // groups
        pairs, kept = length * (length + 1) / 2, length
        if call.start is not None:
            at = torch.arange(length, device=call.start.device)
            seen = at - call.start + 1
            pairs, kept = float(seen.sum()) / batch, int(seen.max())
        self.flops[layer] = torch.full((heads,), 2 * pairs * (width + wide))
        of_group = kept * (width + wide) * call.k.element_size()
        self.bytes[layer] = torch.full((heads,), of_group * groups / heads)

    @staticmethod
    def _now(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


def _stacked(found: Mapping[int, Tensor], n_layers: int) -> Tensor:
    blank = torch.full_like(next(iter(found.values())), torch.nan)
    return torch.stack([found.get(layer, blank) for layer in range(n_layers)])
