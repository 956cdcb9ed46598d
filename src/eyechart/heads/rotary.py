"""Which coordinates of queries and keys are turned with position, how fast, and who uses them.

How a model turns its queries is not looked up but seen: every position of a block is given the same
stream, so that queries and keys differ from position to position by the rotation alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.kernels import AttentionCall, attend
from eyechart.probes import Look, Observations, Probe, capture, hook_names
from eyechart.results import Provenance, RotaryUse, Sequences
from eyechart.sequences import from_ids

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_POSITIONS = 48
# Of the mean squared length; rounding in half formats is at its square.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.05


@dataclass(frozen=True)
class Rotation:
    """How one layer turns its queries and keys, the fastest bands first.

    Attributes:
        first: Coordinate of each band ...
        second: ... and the one it is turned together with.
        angle: Radians a token; 0 for coordinates that are not turned.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    angle: Float[Tensor, " band"]


def rotary_use(
    model: "TransformerBridge", texts: Sequences, batch_size: int | None
) -> tuple[RotaryUse | None, str, tuple[Provenance, ...]]:
    """How heads use the rotation, or why that cannot be said; and the passes it took."""
    count = min(_POSITIONS, int(model.cfg.n_ctx or _POSITIONS))
    alike = from_ids(model, [[int(texts.tokens[0, -1])] * count], name="one token repeated")
    # On one token alone the stream of most rotary models is the same everywhere by itself (Gu et
    # al., arXiv 2410.10781, C.1); learned positions and recurrent blocks make it differ.
    level = [(name, _first_everywhere) for name in hook_names(model, "resid_pre").values()]
    with model.hooks(fwd_hooks=level):
        ((turned, source),) = capture(model, alike, [_QueriesProbe()])
    if not turned:
        return None, "attention is code of its own, which does not show queries and keys", (source,)
    found = {layer: rotation(q[0]) for layer, q in turned.items()}
    rotations = {layer: made for layer, made in found.items() if isinstance(made, Rotation)}
    if not rotations:
        return None, str(next(iter(found.values()))), (source,)
    use, read = capture(
        model, texts, [_UseProbe(rotations, int(model.cfg.n_layers))], batch_size=batch_size
    )[0]
    return use, "", (source, read)


def rotation(q: Float[Tensor, "head position d_head"]) -> Rotation | str:
    """The rotation that makes every position's queries of the first one's, or why there is none.

    Both layouts are tried, turned coordinates in front or behind: halves (coordinate k goes with
    k + r/2) and neighbours (2k with 2k + 1).
    """
    kind, (_, positions, width) = q.dtype, q.shape
    q = q.double()
    tolerance = _TOLERANCE.get(kind, _HALF_TOLERANCE)
    size = q.square().sum(dim=-1).mean()
    if positions < 3 or bool((q - q[:, :1]).square().sum(dim=-1).max() <= tolerance**2 * size):
        return "queries and keys are not turned with position: no rotary embedding"
    for first, second in _layouts(width):
        pairs = q[..., first].square() + q[..., second].square()
        rest = sorted(set(range(width)) - {*first, *second})
        moved = (pairs - pairs[:, :1]).abs().sum(dim=-1).max()
        moved += (q[..., rest] - q[:, :1, rest]).square().sum(dim=-1).max() if rest else 0
        if moved <= tolerance * size:
            angle = _angles(q[..., first], q[..., second])
            pairs = [*zip(first, second, strict=True), *zip(rest[0::2], rest[1::2], strict=False)]
            angle = torch.cat([angle, torch.zeros(len(pairs) - len(angle), dtype=angle.dtype)])
            order = angle.abs().argsort(descending=True, stable=True)
            return Rotation(
                tuple(pairs[i][0] for i in order.tolist()),
                tuple(pairs[i][1] for i in order.tolist()),
                angle[order],
            )
    return "queries change with position, but not by a rotation in a layout that is known here"


def _layouts(width: int) -> list[tuple[list[int], list[int]]]:
    found = []
    for turned in range(width - width % 2, 0, -2):
        for start in sorted({0, width - turned}):
            half = turned // 2
            at = list(range(start, start + turned))
            found += [(at[:half], at[half:]), (at[0::2], at[1::2])]
    return found


def _angles(
    a: Float[Tensor, "head position band"], b: Float[Tensor, "head position band"]
) -> Float[Tensor, " band"]:
    """Turn a token, from the phase at all positions; heads count by their energy."""
    steps = torch.atan2(
        b[:, 1:] * a[:, :-1] - a[:, 1:] * b[:, :-1], a[:, 1:] * a[:, :-1] + b[:, 1:] * b[:, :-1]
    )
    weight = (a.square() + b.square())[:, 1:]
    return (steps * weight).sum(dim=(0, 1)) / weight.sum(dim=(0, 1)).clamp(min=1e-30)


def _first_everywhere(stream: Tensor, hook: Any) -> Tensor:
    return stream[:, :1].expand_as(stream).contiguous()


class _QueriesProbe(Probe[tuple[dict[int, Tensor], Provenance]]):
    """Keeps queries as attention meets them."""

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        return ("attention",)

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        if not isinstance(activation, AttentionCall):
            return {}
        return {"q": activation.q.clone()}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> tuple[dict[int, Tensor], Provenance]:
        kept = observations.layers("attention", "q")
        return {layer: q for layer, q in kept.items() if layer is not None}, provenance


class _UseProbe(Probe[tuple[RotaryUse, Provenance]]):
    """Reduces queries and keys to their size in each band."""

    def __init__(self, rotations: Mapping[int, Rotation], n_layers: int) -> None:
        self.rotations, self.n_layers = rotations, n_layers

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        return ("attention",)

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        turned = None if look.layer is None else self.rotations.get(look.layer)
        if turned is None or not isinstance(activation, AttentionCall):
            return {}
        attend(activation, look.tokens, look.mask)
        kept = {}
        for name, x in (("q", activation.q), ("k", activation.k)):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            energy = x[..., turned.first].square() + x[..., turned.second].square()
            fast = max(1, energy.shape[-1] // 4)
            high = energy[..., :fast].sum(dim=(2, 3)) / energy.sum(dim=(2, 3))
            shared = activation.q.shape[1] // x.shape[1]
            kept[f"{name}_norm"] = energy.sqrt().mean(dim=2).repeat_interleave(shared, dim=1)
            kept[f"{name}_high"] = high.repeat_interleave(shared, dim=1)
        return kept

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> tuple[RotaryUse, Provenance]:
        means = {
            name: observations.stack("attention", name, self.n_layers).mean(dim=0)
            for name in ("q_norm", "k_norm", "q_high", "k_high")
        }
        some = next(iter(self.rotations.values()))
        still = torch.full_like(some.angle, torch.nan)
        angles = [
            self.rotations[layer].angle if layer in self.rotations else still
            for layer in range(self.n_layers)
        ]
        return RotaryUse(angle=torch.stack(angles).float(), **means), provenance
