"""The statistics of one layer's attention, by the fastest exact way this machine has."""

import functools
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from eyechart.errors import NonFiniteError, UsageError
from eyechart.kernels import native
from eyechart.kernels.branches import attend_branches, trunk_of
from eyechart.kernels.call import AttentionCall
from eyechart.kernels.definitions import Reducer
from eyechart.kernels.streamed import stream
from eyechart.kernels.tree import Tree
from eyechart.kernels.trial import Kernel, tried
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
        UsageError: statistics of heads that are replaced, or of prompts that share tokens.
    """
    if call.replaced:
        return _attend_the_rest(call, tokens, mask, bool(statistics or targets))
    if call.tree is not None:
        return _attend_in_tree(call, call.tree, tokens, mask, bool(statistics or targets))
    _refuse_non_finite(call, mask)
    found: dict[str, Tensor] = {}
    # A compiled kernel has no rows that could be rounded.
    kernel = kernel_for(call.q.device, accumulate, call.q.dtype)
    run = kernel.run if call.rounded is None else None
    if run is not None:
        if not call.found or call.output is None:
            call.found = run(call, mask.sum(dim=-1))
        found = {name: call.found[name] for name in statistics if name in call.found}
    left = frozenset(statistics) - found.keys()
    if left or targets:
        reducer = Reducer(left, targets, tokens, mask)
        stream(call, accumulate, reducer)
        found |= reducer.finish()
    elif call.output is None:
        stream(call, accumulate)
    return found


def _attend_the_rest(
    call: AttentionCall,
    tokens: Int[Tensor, "batch position"],
    mask: Bool[Tensor, "batch position"],
    measured: bool,
) -> dict[str, Tensor]:
    if measured:
        raise UsageError(
            "heads are skipped under a lens: they have no attention to measure. Measure attention "
            "without the lens, or what becomes of the stream and the logits under it."
        )

    def mix(part: AttentionCall) -> Tensor:
        attend(part, tokens, mask)
        assert part.output is not None
        return part.output

    if call.output is None:
        call.output = call.around_replaced(mix)
    return {}


def _attend_in_tree(
    call: AttentionCall,
    tree: Tree,
    tokens: Int[Tensor, "batch position"],
    mask: Bool[Tensor, "batch position"],
    measured: bool,
) -> dict[str, Tensor]:
    if measured:
        raise UsageError(
            "these tokens are several prompts that share their beginnings: a key's attention is of "
            "no one prompt. Measure attention on the prompts one by one."
        )
    if call.output is None:
        _refuse_non_finite(call, mask)
        trunk = trunk_of(call, tree)
        attend(trunk, tokens[:, : tree.trunk], mask[:, : tree.trunk])
        assert trunk.output is not None
        call.output = torch.cat([trunk.output, *attend_branches(call, tree, torch.float32)], dim=1)
    return {}


def _refuse_non_finite(call: AttentionCall, mask: Bool[Tensor, "batch position"]) -> None:
    # A kernel's maxima and exponentials would swallow a NaN. One sum tells nearly always that there
    # is none; padding may hold anything.
    for x in (call.q, call.k):
        wide = torch.promote_types(x.dtype, torch.float32)
        if not bool(x.sum(dtype=wide).isfinite()):
            real = x.masked_fill(~mask[:, None, :, None], 0)
            if not bool(real.isfinite().all()):
                raise NonFiniteError("NaN or infinity among the queries or keys")


def kernel_for(device: torch.device, accumulate: torch.dtype, dtype: torch.dtype) -> Kernel:
    """The kernel written for this device and format, or why there is none."""
    if torch.float64 in (accumulate, dtype):
        return Kernel(None, "compiled kernels compute in float32")
    if device.type == "cpu":
        return native.kernel()
    if device.type == "cuda":
        return _gpu_kernel(device)
    return Kernel(None, f"there is no kernel for {device.type}")


@functools.lru_cache
def _gpu_kernel(device: torch.device) -> Kernel:
    try:
        from eyechart.kernels import gpu

        return tried(gpu.run, device=device)
    except ImportError:
        return Kernel(None, "Triton is not installed")
    except Exception as problem:  # whatever Triton, its compiler or the driver may throw
        lines = str(problem).splitlines()
        return Kernel(None, f"Triton gave no usable kernel: {lines[0] if lines else problem!r}")
