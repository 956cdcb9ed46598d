"""The statistics of one layer's attention, by the fastest exact way this machine has."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from eyechart.errors import NonFiniteError
from eyechart.kernels import native
from eyechart.kernels.call import AttentionCall
from eyechart.kernels.definitions import Reducer
from eyechart.kernels.streamed import stream
from eyechart.targets import Target


def attend(
    call: AttentionCall,
    tokens: Int[Tensor, "batch position"],
    mask: Bool[Tensor, "batch position"],
    *,
    statistics: Collection[str] = (),
    targets: Sequence[Target] = (),
    accumulate: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Compute a layer's output and the statistics of its rows, without its pattern.

    Args:
        call: The layer's attention; its ``output`` is set.
        tokens: The keys' tokens.
        mask: True on real tokens.
        statistics: Names from :mod:`eyechart.kernels.definitions`.
        targets: Sets of keys whose mass to compute, at the price of computing the scores again.
        accumulate: Number format of softmax and sums.

    Returns:
        ``[batch head query]`` by name; ``received`` ``[batch head key]``, a sum over real queries.

    Raises:
        NonFiniteError: NaN or infinity among queries or keys.
    """
    if not bool((call.q.sum() + call.k.sum()).isfinite()):
        raise NonFiniteError("NaN or infinity among the queries or keys")
    found: dict[str, Tensor] = {}
    library = native.kernel().library if _suits_native(call, accumulate) else None
    if library is not None:
        rows = native.run(library, call, mask.sum(dim=-1))
        found = {name: rows[name] for name in statistics if name in rows}
    left = frozenset(statistics) - found.keys()
    if left or targets:
        reducer = Reducer(left, targets, tokens, mask)
        stream(call, accumulate, reducer)
        found |= reducer.finish()
    elif call.output is None:
        stream(call, accumulate)
    return found


def slower_because(device: str, accumulate: torch.dtype, dtype: torch.dtype) -> str | None:
    """Why the compiled kernel is not used, None where it is."""
    if device != "cpu":
        return f"no compiled kernel for {device}"
    if torch.float64 in (accumulate, dtype):
        return "the compiled kernel computes in float32"
    return native.kernel().reason or None


def _suits_native(call: AttentionCall, accumulate: torch.dtype) -> bool:
    return slower_because(call.q.device.type, accumulate, call.q.dtype) is None
