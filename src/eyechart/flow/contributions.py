"""Contributions weighted by the values that attention moves, and their rollout.

What token j brings to token i in one block is the vector T_ij = sum_h a^h_ij W_O^h v^h_j, with the
stream x_i itself added where j = i; they sum, with the bias, to y_i = x_i + attention's write.

norms   |T_ij|_2, the vector's length (Kobayashi et al., arXiv 2004.10102 and 2109.07152: heads are
        summed before the norm, the residual is counted)
alti    max(0, |y_i|_1 - |y_i - T_ij|_1), the L1 length that y_i loses without it (Ferrando et al.,
        arXiv 2203.04212)

Rows are normalised to one, and layers multiplied as in a rollout. A norm between attention's
output and the stream is linearised: it scales coordinates, and the scale is read off the pass.
T exists for a few queries and keys at a time.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eyechart.errors import CaptureError
from eyechart.flow.modules import near, output_matrix, scale_of
from eyechart.flow.trace import Layer, Trace
from eyechart.probes.plan import without_hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

KINDS = ("norm_rollout", "alti")
_QUERIES = 64
# Coordinates of T that exist at once: what a CPU's caches hold, what fills a GPU.
_NUMBERS = {"cpu": 2**19, "cuda": 2**26}


def value_walk(
    model: "TransformerBridge",
    trace: Trace,
    query: Int[Tensor, " batch"],
    kinds: tuple[str, ...],
    accumulate: torch.dtype,
) -> dict[str, Float[Tensor, "batch layer position"]]:
    """Rollout of value-weighted contributions for the chosen row, at every depth.

    Args:
        model: The model that the trace is of.
        trace: A pass with contributions kept.
        query: The chosen position of each sequence.
        kinds: Of :data:`KINDS`.
        accumulate: Number format of everything that is summed.

    Raises:
        CaptureError: what attention writes is not what its heads move through W_O.
    """
    device = torch.device(str(model.cfg.device))
    length = trace.sequences.tokens.shape[1]
    start = torch.nn.functional.one_hot(query, length).to(device)[:, None]
    rows = {kind: start.new_zeros(len(query), 0, length, dtype=accumulate) for kind in kinds}
    for index in sorted(trace.layers, reverse=True):
        layer = trace.layers[index].to(device)
        rows = {k: torch.cat([r, start.to(r.dtype)], dim=1) for k, r in rows.items()}
        moved = {kind: torch.zeros_like(r) for kind, r in rows.items()}
        with torch.no_grad(), without_hooks(model):
            for begin, shares in contributions(model, index, layer, kinds, accumulate):
                for kind, share in shares.items():
                    end = share.shape[-1]
                    moved[kind][..., :end] += (
                        rows[kind][..., begin : begin + share.shape[1]] @ share
                    )
        rows = moved
    return {kind: r.flip(1).cpu() for kind, r in rows.items()}


def contributions(
    model: "TransformerBridge",
    index: int,
    layer: Layer,
    kinds: tuple[str, ...],
    accumulate: torch.dtype,
) -> Iterator[tuple[int, dict[str, Float[Tensor, "batch query key"]]]]:
    """Row-normalised contributions of one block, in blocks of queries.

    Yields the first query, and by kind the rows; keys after the last query are left out.
    """
    before, raw, write, values = layer.before, layer.raw, layer.write, layer.values
    if before is None or raw is None or write is None or values is None:
        raise CaptureError(f"layer {index}: values and the stream around attention were not seen")
    kind = torch.promote_types(before.dtype, accumulate)
    width, like = values.shape[-1], before[0, 0]
    out = output_matrix(model, index, layer.heads, width, like, layer.samples).to(kind)
    before, raw, write, values = (x.to(kind) for x in (before, raw, write, values))
    gain = None
    if "resid_mid" in layer.samples:
        change = layer.samples["resid_mid"] - layer.samples["resid_pre"]
        write = write * scale_of(layer.samples["attn_out"], change, index)
    if not near(raw, write, 1e-3):
        gain = _gain(write, raw)
    after = before + write
    shared = layer.heads // values.shape[1]
    for start, pattern in layer.blocks(accumulate):
        for low in range(0, pattern.shape[2], _QUERIES):
            begin = start + low
            rows = pattern[:, :, low : low + _QUERIES].to(kind)
            end = begin + rows.shape[2]
            rows = rows[..., :end]
            whole = after[:, begin:end]
            length = whole.abs().sum(dim=-1, keepdim=True)
            found = {k: rows.new_zeros(rows.shape[0], end - begin, end) for k in kinds}
            for first, last in _chunks(rows.shape, whole.shape[-1], rows.device):
                # Query head h reads key head h // shared.
                v = values[:, :, first:last].repeat_interleave(shared, dim=1)
                sent = torch.einsum("bhkd,hdm->bhkm", v, out)
                part_of = torch.einsum("bhqk,bhkm->bqkm", rows[..., first:last], sent)
                if gain is not None:
                    part_of = part_of * gain[:, begin:end, None]
                own = torch.arange(first, last, device=rows.device)
                own = own[own >= begin]
                part_of[:, own - begin, own - first] += before[:, own]
                if "norm_rollout" in found:
                    found["norm_rollout"][..., first:last] = part_of.norm(dim=-1)
                if "alti" in found:
                    left = part_of.neg_().add_(whole[:, :, None]).abs_().sum(dim=-1)
                    found["alti"][..., first:last] = (length - left).clamp(min=0)
            yield begin, {k: _normalised(x, begin) for k, x in found.items()}


def _chunks(shape: torch.Size, d_model: int, device: torch.device) -> Iterator[tuple[int, int]]:
    batch, _, queries, keys = shape
    allowed = _NUMBERS.get(device.type, _NUMBERS["cuda"])
    step = max(1, allowed // (batch * queries * d_model))
    for first in range(0, keys, step):
        yield first, min(first + step, keys)


def _gain(write: Tensor, raw: Tensor) -> Tensor:
    """The factors by which a norm scaled each coordinate of attention's output."""
    return torch.where(raw == 0, 0, write / torch.where(raw == 0, 1, raw))


def _normalised(rows: Tensor, begin: int) -> Tensor:
    total = rows.sum(dim=-1, keepdim=True)
    # A row in which nothing contributes says nothing about others: it stays where it is.
    queries = torch.arange(rows.shape[1], device=rows.device)
    alone = torch.zeros_like(rows)
    alone[:, queries, begin + queries] = 1
    return torch.where(total > 0, rows / total.clamp(min=torch.finfo(rows.dtype).tiny), alone)
