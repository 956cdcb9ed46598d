"""Every head's output replaced, one head at a time, and what that costs."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eyechart.heads.divergence import Reference
from eyechart.heads.names import interval
from eyechart.heads.onward import HeadOutputs, Onward, own_values
from eyechart.heads.partial import Partial
from eyechart.kernels import Replacement
from eyechart.probes.capture import is_out_of_memory
from eyechart.results import HeadTrials
from eyechart.results.head_trials import cheap_enough

if TYPE_CHECKING:
    from eyechart.results import HeadNames

TRIED = ("zero", "first", "mean", "identity", "resample")

SUGGESTED = {"sink": "first", "diagonal": "identity"}
"""Kinds whose pattern says what could take their place."""

SLACK = 2.0
"""How many times the budget a replacement may be expected to cost and still be tried."""

UNITS = 8
"""The bootstrap draws over texts, or over blocks of them where there are fewer texts than this."""

_TOKENS = 2**11  # in one batch of runs

Trial = tuple[int, str]  # head, replacement


def trials(
    onward: Onward,
    reference: Reference,
    names: "HeadNames",
    known: HeadOutputs,
    domains: tuple[str, ...],
    budget: float,
    screen: bool,
    layers: Sequence[int] | None,
    partial: Partial,
    seed: int,
    step: Callable[[str], object],
) -> HeadTrials:
    """Try every head of every layer.

    Zeroing is tried on every head. What a pattern suggests, the first token's value for a sink and
    the token's own for a diagonal head, is tried on these, and mean and resampled outputs too
    unless zeroing has settled that they do nothing. On all others a replacement is tried where it
    may be cheap enough though zeroing is not: it comes closer to the head's output than nothing
    does, and what it misses of the squared length, times what zeroing costs, is within reach of
    the budget (the divergence is quadratic in small changes).

    Args:
        onward: The model on the held-out texts.
        reference: What it says when nothing is replaced.
        names: The heads' kinds.
        known: What heads wrote on the texts that named them.
        domains: Of the held-out texts.
        budget: KL in nats of a no-op.
        screen: False tries everything.
        layers: Whose heads are tried; None for all.
        partial: Where finished layers are kept.
        seed: Of the resampling and the bootstrap.
        step: Told of each layer.
    """
    units = units_of(len(onward.texts.tokens), len(onward.positions))
    means, missed = _means_and_missed(known, onward.facts.n_layers)
    kinds = names.kinds()
    of_unit = [domains[text] for text in units.tolist()]
    kl = {name: torch.full((len(units), *missed["zero"].shape), torch.nan) for name in TRIED}
    loss = {name: x.clone() for name, x in kl.items()}
    still = reference.moved(onward.logits(onward.layers[-1], {}))[0]
    wanted = [l for l in onward.layers if layers is None or l in layers]
    for index, layer in enumerate(wanted):
        step(f"trials: layer {index + 1} of {len(wanted)}")
        found = partial.open(layer)
        if found is None:
            there = _OfLayer(onward, reference, layer, means[layer], len(units), seed)
            heads = range(onward.outputs.mixed[layer].shape[2])
            there.run([(head, "zero") for head in heads])
            settled, zeroed = there.settled(of_unit, budget), there.stacked("zero").mean(dim=0)
            there.run(
                [
                    (head, name)
                    for head, kind in enumerate(kinds[layer])
                    for name in TRIED[1:]
                    if there.can(name)
                    and (
                        not screen
                        or _worth_trying(
                            name,
                            kind,
                            settled[head],
                            float(missed[name][layer, head]) if name in missed else None,
                            float(zeroed[head]),
                            budget,
                        )
                    )
                ]
            )
            found = there.tensors()
            partial.keep(layer, found)
        for name in TRIED:
            kl[name][:, layer], loss[name][:, layer] = found[f"kl {name}"], found[f"loss {name}"]
    ends = {name: interval(x, seed) for name, x in kl.items()}
    loss_ends = {name: interval(x, seed) for name, x in loss.items()}
    return HeadTrials(
        texts=onward.texts,
        domains=domains,
        positions=onward.positions,
        units=units,
        kl=kl,
        loss=loss,
        low={name: low for name, (low, _) in ends.items()},
        high={name: high for name, (_, high) in ends.items()},
        loss_low={name: low for name, (low, _) in loss_ends.items()},
        loss_high={name: high for name, (_, high) in loss_ends.items()},
        missed=missed,
        means=means,
        floor=float(still.mean()),
        passes=round(onward.passes, 2),
        shared=onward.shares,
    )


def units_of(texts: int, positions: int) -> Int[Tensor, " unit"]:
    """Text of each unit: one a text, or several blocks of positions where texts are few."""
    return torch.arange(texts).repeat_interleave(min(positions, -(-UNITS // texts)))


def in_units(moved: Float[Tensor, "copy text position"], units: int) -> Float[Tensor, "copy unit"]:
    """Means over units, which are blocks of positions of one text each."""
    copies, texts, _ = moved.shape
    blocks = moved.tensor_split(units // texts, dim=-1)
    return torch.stack([block.mean(dim=-1) for block in blocks], dim=-1).view(copies, units)


class _OfLayer:
    """The trials of one layer."""

    def __init__(
        self,
        onward: Onward,
        reference: Reference,
        layer: int,
        means: Float[Tensor, "head d_value"],
        units: int,
        seed: int,
    ) -> None:
        self.onward, self.reference, self.layer, self.units = onward, reference, layer, units
        self.mixed = onward.outputs.mixed[layer]
        self.values = onward.outputs.values[layer]
        self.means, self.seed = means, seed
        texts, length = self.mixed.shape[:2]
        draw = torch.Generator().manual_seed(seed + layer)
        # The first token can only look at itself, so it is left alone and lends to nobody.
        self.others = torch.randperm(texts * (length - 1), generator=draw)
        self.kl: dict[Trial, Tensor] = {}
        self.loss: dict[Trial, Tensor] = {}

    def can(self, name: str) -> bool:
        """Whether the replacement can be made here."""
        return self.values is not None or name not in ("first", "identity")

    def run(self, tried: list[Trial]) -> None:
        """Run trials, as many at once as make a batch, or as fit the memory."""
        texts, length = self.mixed.shape[:2]
        size, begin = max(1, _TOKENS // (texts * length)), 0
        while begin < len(tried):
            batch = tried[begin : begin + size]
            try:
                self._run_at_once(batch)
            except (RuntimeError, MemoryError) as problem:
                if size == 1 or not is_out_of_memory(problem):
                    raise
                size //= 2
            else:
                begin += size

    def _run_at_once(self, batch: list[Trial]) -> None:
        texts = len(self.mixed)

        def put(mixed: Tensor, values: Tensor | None) -> None:
            for copy, (head, name) in enumerate(batch):
                rows = slice(copy * texts, (copy + 1) * texts)
                mixed[rows, :, head] = self.instead(head, name).to(mixed)

        logits = self.onward.logits(self.layer, {self.layer: put}, len(batch))
        for kept, moved in zip((self.kl, self.loss), self.reference.moved(logits), strict=True):
            kept.update(zip(batch, in_units(moved, self.units), strict=True))

    def instead(self, head: int, name: str) -> Float[Tensor, "text position d_value"]:
        """What a head writes in a trial."""
        mixed = self.mixed[:, :, head]
        if name == "resample":
            drawn = mixed[:, 1:].flatten(0, 1)[self.others].view_as(mixed[:, 1:])
            return torch.cat([mixed[:, :1], drawn], dim=1)
        own = own_values(self.mixed, self.values, head)
        return _replacement(name, self.means[head]).of(own)

    def settled(self, domains: list[str], budget: float) -> list[bool]:
        """Whether zeroing each head is cheap enough for a verdict."""
        kl = self.stacked("zero")
        _, high = interval(kl[:, None], self.seed)
        return cheap_enough(kl[:, None], high, domains, budget)[0].tolist()

    def stacked(self, name: str, what: str = "kl") -> Float[Tensor, "unit head"]:
        """What one replacement did to each head; NaN where it was not tried."""
        found = torch.full((self.units, self.mixed.shape[2]), torch.nan)
        for (head, tried), value in getattr(self, what).items():
            if tried == name:
                found[:, head] = value
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        return {
            f"{what} {name}": self.stacked(name, what) for what in ("kl", "loss") for name in TRIED
        }


def _replacement(name: str, mean: Float[Tensor, " d_value"]) -> Replacement:
    return Replacement(name, mean if name == "mean" else None)


def _worth_trying(
    name: str, kind: str, settled: bool, missed: float | None, zeroed: float, budget: float
) -> bool:
    """Whether a trial can change what is known of a head; see :func:`trials`."""
    own = SUGGESTED.get(kind)
    if settled or name == own:
        return name == own
    if own is not None and name in ("mean", "resample"):
        return True
    return missed is not None and missed < 1 and missed * zeroed < SLACK * budget


def _means_and_missed(
    known: HeadOutputs, n_layers: int
) -> tuple[Float[Tensor, "layer head d_value"], dict[str, Tensor]]:
    """Each head's mean output, and the share of it that each replacement misses.

    The first position is left out: every replacement but nothing gives it what it has.
    """
    some = next(iter(known.mixed.values()))
    heads, width = max(m.shape[2] for m in known.mixed.values()), some.shape[-1]
    means = torch.full((n_layers, heads, width), torch.nan)
    missed = {name: torch.full((n_layers, heads), torch.nan) for name in TRIED[:-1]}
    for layer, mixed in known.mixed.items():
        z = mixed[:, 1:].to(torch.promote_types(mixed.dtype, torch.float32))
        means[layer] = z.mean(dim=(0, 1))
        values = known.values[layer]
        for name, into in missed.items():
            for head in range(heads):
                if values is None and name in ("first", "identity"):
                    continue
                own = own_values(mixed, values, head)
                made = _replacement(name, means[layer, head]).of(own.to(means))[:, 1:]
                of = z[:, :, head]
                into[layer, head] = (of - made).square().sum() / of.square().sum().clamp(min=1e-30)
    return means, missed
