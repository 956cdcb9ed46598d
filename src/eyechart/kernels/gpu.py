"""The kernel of the GPU, in Triton: output and statistics of attention, and no pattern.

Two passes: the first is attention and everything that is said of rows, the second what every key
received, for which it computes the scores again but needs no values. Memory grows with the number
of tokens, and results do not vary from run to run.

Importing this module imports triton, which comes with torch's CUDA builds. With
``TRITON_INTERPRET=1`` set before that, the kernels run on tensors of the CPU, slowly, for tests.
"""

# Triton need not be installed.
# pyright: reportMissingImports=false, reportIndexIssue=false

import math
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Int
from torch import Tensor

from eyechart.kernels.call import AttentionCall
from eyechart.kernels.triton_kernels import columns_kernel, rows_kernel

ROWS = ("first", "diagonal", "previous", "entropy", "largest", "distance", "lse")
"""In the order in which the kernel writes them."""


class _Sizes(NamedTuple):
    """How the work is cut: ``kept`` stays while blocks of ``passing`` stream by."""

    kept: int
    passing: int
    stages: int


def run(call: AttentionCall, lengths: Int[Tensor, " batch"]) -> dict[str, Tensor]:
    """All row statistics of one layer in float32, and its output.

    Args:
        call: The layer's attention, in float32 or a half format; its ``output`` is set.
        lengths: Real tokens of each sequence.

    Returns:
        ``[batch head query]`` for every row statistic, with ``lse`` the log-sum-exp of the scores;
        ``received`` ``[batch head key]``, a sum.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    batch, heads, n, d = q.shape
    dv = v.shape[-1]
    options = {
        **_strides("q", q),
        **_strides("k", k),
        "n": n,
        "heads": heads,
        "group": heads // k.shape[1],
        # The kernels' scores are in units of log 2.
        "inner": call.scale / (math.log(2) if call.softcap is None else call.softcap),
        "outer": None if call.softcap is None else call.softcap / math.log(2),
        "d": d,
        "d_block": _padded(d),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }
    start = None if call.start is None else call.start.int().expand(batch, n).contiguous()
    sinks = None if call.sinks is None else call.sinks.float().contiguous()
    lengths = lengths.int().contiguous()
    out = torch.empty(batch, heads, n, dv, dtype=q.dtype, device=q.device)
    rows = torch.empty(len(ROWS), batch, heads, n, device=q.device)
    peak, received = torch.empty_like(rows[0]), torch.empty_like(rows[0])
    virtual = None if sinks is None else torch.empty_like(peak)
    # Triton launches on the current device, which need not be where the tensors are.
    with torch.cuda.device_of(q):
        sizes = _sizes(_padded(d) + _padded(dv), q)
        grid = (batch * heads, triton.cdiv(n, sizes.kept))
        options |= {"kept": sizes.kept, "passing": sizes.passing, "num_stages": sizes.stages}
        rows_kernel[grid](
            q, k, v, start, sinks, out, rows, peak, virtual,
            **_strides("v", v), plane=rows.stride(0), dv=dv, dv_block=_padded(dv), **options,
        )  # fmt: skip
        columns_kernel[grid](
            q, k, start, None if start is None else _seers(start, sizes), lengths,
            peak, rows[ROWS.index("largest")], received, **options,
        )  # fmt: skip
    call.output = out.transpose(1, 2).contiguous()
    found = dict(zip(ROWS, rows, strict=True)) | {"received": received}
    return found if virtual is None else found | {"virtual_sink": virtual}


def _strides(name: str, x: Tensor) -> dict[str, Any]:
    """Of all axes but the last, as the kernels call them."""
    axes = (f"{name}_batch", f"{name}_head", f"{name}_row")
    return dict(zip(axes, x.stride()[:3], strict=True))


def _padded(width: int) -> int:
    """A power of two, at least the 16 that a matrix unit takes."""
    return max(16, triton.next_power_of_2(width))


def _sizes(width: int, like: Tensor) -> _Sizes:
    """Chosen to keep within registers and shared memory; ``width`` is of a key and its value."""
    if like.dtype == torch.float32:
        # Products in full float32 bypass the matrix units and need registers instead.
        table = {128: (64, 32, 2), 256: (64, 16, 2), 512: (32, 16, 2), 1024: (32, 16, 1)}
    elif _shared_memory(like.device) >= 200_000:
        table = {256: (128, 64, 3), 512: (128, 64, 2), 1024: (64, 32, 2)}
    else:
        table = {256: (128, 32, 3), 512: (64, 32, 2), 1024: (32, 32, 2)}
    for widest, sizes in table.items():
        if width <= widest:
            return _Sizes(*sizes)
    raise ValueError(f"heads of {width} numbers, key and value together, are wider than 1024")


def _shared_memory(device: torch.device) -> int:
    """Bytes that one block of threads can have; interpreted, as many as on a data centre's GPU."""
    if device.type == "cpu":
        return 227 * 1024
    driver: Any = triton.runtime.driver.active
    return driver.utils.get_device_properties(device.index)["max_shared_mem"]


def _seers(start: Int[Tensor, "batch query"], sizes: _Sizes) -> Int[Tensor, "batch block 2"]:
    """Where, for each block of keys, the queries that see all of it and that see any of it end.

    Both are positions at the edge of a block of queries. The first counts from the diagonal on.
    """
    n, passing = start.shape[1], sizes.passing
    blocks = triton.cdiv(n, passing)
    # The last start again for the queries that fill up the last block.
    at = torch.arange(blocks * passing, device=start.device).clamp(max=n - 1)
    lowest, highest = start[:, at].unflatten(1, (blocks, passing)).aminmax(dim=-1)
    first_key = torch.arange(0, n, sizes.kept, device=start.device)[:, None]
    block = torch.arange(blocks, device=start.device, dtype=torch.int32)
    misses_some = highest[:, None] > first_key
    sees_some = lowest[:, None] < first_key + sizes.kept
    whole = torch.where(misses_some, block, blocks).amin(dim=-1)
    part = torch.where(sees_some, block + 1, 0).amax(dim=-1)
    return (torch.stack([whole, part], dim=-1) * passing).to(torch.int32)
