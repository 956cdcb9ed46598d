"""Rows of products of attention matrices, carried from the last layer to the first.

One row vector a depth of interest: the row of layer l starts as the chosen token's own and is
multiplied with the matrices of layers l, l-1, ..., 0. All of them, and the bound's, share each
layer's scores, so that every depth costs little more than one.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eyechart.flow.bound import Gains
from eyechart.flow.topology import hitting_depth
from eyechart.flow.trace import Layer, Trace

HITTING_TOKENS = 2048
"""Longest text whose hitting depths are computed: they need every row of attention, in torch."""


@dataclass(frozen=True, eq=False)
class Walk:
    """What a walk through the layers found; see :class:`eyechart.results.InformationFlow`."""

    attention: Float[Tensor, "batch layer position"]
    rollout: Float[Tensor, "batch layer position"]
    through: Float[Tensor, "batch layer position"]
    eigenvalues: Float[Tensor, "batch layer position"]
    path_bound: Float[Tensor, "batch position"] | None
    hitting_depth: Float[Tensor, "batch layer"] | None


def walk(
    trace: Trace,
    query: Int[Tensor, " batch"],
    device: torch.device,
    gains: Gains | None,
    hitting: bool,
    accumulate: torch.dtype,
) -> Walk:
    """Rollout of the chosen row at every depth, and the path-sum bound.

    Args:
        trace: A pass through a model in which every block has attention.
        query: The chosen position of each sequence.
        device: Where to compute.
        gains: Constants of the bound; None leaves it out.
        hitting: Whether hitting depths are wanted.
        accumulate: Number format of scores and sums.
    """
    length = trace.sequences.tokens.shape[1]
    layers = sorted(trace.layers)
    start = torch.nn.functional.one_hot(query, length).to(device)
    rows = start.new_zeros(len(query), 0, length, dtype=accumulate)
    bound = start.double() if gains is None else start.double() * gains.final[:, None]
    log_scale = torch.zeros(len(query), 1, dtype=torch.float64, device=device)
    attention, through, eigenvalues, depths = [], [], [], []
    for index in reversed(layers):
        layer = trace.layers[index].to(device)
        rows = torch.cat([rows, start[:, None].to(rows.dtype)], dim=1)
        own = None if gains is None else gains.layers.get(index)
        sent = [rows]
        if own is not None:
            # Kept near 1, because products of many layers leave any format's range.
            peak = bound.amax(dim=-1, keepdim=True)
            bound, log_scale = bound / peak, log_scale + peak.log()
            sent.append(own.sent(bound)[:, None].to(rows.dtype))
        carried = layer.carry(torch.cat(sent, dim=1), accumulate)
        if own is not None:
            bound = own.received(bound, carried[:, :, -1].double())
        mean = carried[:, :, : rows.shape[1]].mean(dim=1)
        attention.append(mean[:, -1])
        rows = (mean.to(rows.dtype) + rows) / 2
        through.append(rows[:, 0])
        assert layer.diagonal is not None
        eigenvalues.append((1 + layer.diagonal.mean(dim=1)) / 2)
        if hitting:
            depths.append(_depth(layer, accumulate, length).gather(1, query[:, None].to(device)))
    return Walk(
        attention=_stacked(attention),
        # Row 0 is the deepest; results go from the first layer up.
        rollout=_shares(rows.flip(1)).cpu(),
        through=_shares(_stacked(through)),
        eigenvalues=_stacked(eigenvalues),
        path_bound=None if gains is None else (bound.log() + log_scale).exp().cpu(),
        hitting_depth=_stacked(depths)[..., 0] if hitting else None,
    )


def _depth(layer: Layer, accumulate: torch.dtype, length: int) -> Float[Tensor, "batch position"]:
    means = ((begin, rows.mean(dim=1)) for begin, rows in layer.blocks(accumulate))
    return hitting_depth(means, length)


def _stacked(from_last: list[Tensor]) -> Tensor:
    return torch.stack(from_last[::-1], dim=1).cpu()


def _shares(rows: Tensor) -> Tensor:
    # Rows lose mass to learned sinks; what is left is the chosen row's total.
    return rows / rows.sum(dim=-1, keepdim=True)
