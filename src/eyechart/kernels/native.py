"""The compiled kernels of the CPU: ``rows.c`` and its neighbours, built once by the machine itself.

There is no binary to ship and none to trust: the source is compiled with the C compiler at hand on
first use (two seconds) for this very processor, kept in eyechart's cache, and tried against known
answers every time it is loaded. Without a C compiler everything still works, in torch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.kernels.call import AttentionCall
from eyechart.kernels.trial import Kernel, tried
from eyechart.models.cache import cache_folder

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / name for name in ("rows.c", "carry.c", "pull.c"))
HEADER = FOLDER / "tiles.h"
ROW_NAMES = ("first", "diagonal", "previous", "entropy", "largest", "distance", "lse")

# Finite arithmetic only is not promised: a NaN must stay one.
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_LINK = ("-shared", "-fPIC", "-lm")
_SEGMENTS, _TILE = 8, 8


class _Arguments(ctypes.Structure):
    """``Attention`` of tiles.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((f"{x}_{axis}", ctypes.c_int64) for x in "qkv" for axis in ("batch", "head", "row")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "kv_heads", "length", "width", "value_width")
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("start", "sinks", "lengths", "output")),
        *((name, ctypes.c_void_p) for name in (*ROW_NAMES, "virtual_sink", "received")),
        ("segments", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("carried", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("pull", "delta", "q_pull", "k_pull", "v_pull")),
    )


@functools.lru_cache
def kernel() -> Kernel:
    """The kernel of this machine: compiled, loaded and tried, once a process."""
    return build(("-march=native", "-fopenmp"))


def build(machine: tuple[str, ...]) -> Kernel:
    """Compile for a machine, load and try.

    Args:
        machine: Compiler flags that name the processor and how it runs in parallel.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc"))), None)
    if compiler is None:
        return Kernel(None, "no C compiler (cc or gcc) was found")
    try:
        library = ctypes.CDLL(str(_compiled(compiler, machine)))
        for function in (library.attend, library.carry, library.pull):
            function.restype = ctypes.c_int
    except (OSError, subprocess.SubprocessError, AttributeError) as problem:
        said = getattr(problem, "stderr", None) or str(problem)
        return Kernel(None, f"{compiler} gave no usable kernel: {said.strip().splitlines()[0]}")
    return tried(
        functools.partial(run, library),
        functools.partial(carry, library),
        functools.partial(pull, library),
    )


def run(library: ctypes.CDLL, call: AttentionCall, lengths: Tensor) -> dict[str, Tensor]:
    """All row statistics of one layer in float32, and its output.

    Args:
        library: See :func:`kernel`.
        call: The layer's attention, on the CPU; its ``output`` is set.
        lengths: Real tokens of each sequence.

    Returns:
        ``[batch head query]`` for every row statistic, with ``lse`` the log-sum-exp of the scores;
        ``received`` ``[batch head key]``, a sum.

    Raises:
        MemoryError: the kernel got no memory.
    """
    batch, heads, length, _ = call.q.shape
    v = call.v.float().contiguous()
    names = ROW_NAMES if call.sinks is None else (*ROW_NAMES, "virtual_sink")
    rows = {name: v.new_empty(batch, heads, length) for name in names}
    output = v.new_empty(batch, length, heads, v.shape[-1])
    received = v.new_empty(batch, heads, _SEGMENTS, length)
    sinks = {} if call.sinks is None else {"sinks": call.sinks.float().contiguous()}
    _enter(
        library.attend,
        call,
        {"lengths": lengths.int().contiguous(), "output": output, "received": received}
        | sinks
        | rows,
        v=v,
        segments=_SEGMENTS,
    )
    call.output = output.to(call.v.dtype)
    return rows | {"received": received.sum(dim=2)}


def carry(
    library: ctypes.CDLL,
    call: AttentionCall,
    lse: Float[Tensor, "batch head query"],
    rows: Float[Tensor, "batch row query"],
) -> Float[Tensor, "batch head row key"]:
    """Row vectors times one layer's attention, in float32.

    Args:
        library: See :func:`kernel`.
        call: The layer's attention, on the CPU.
        lse: Log-sum-exp of its scores, as :func:`run` returns it.
        rows: The row vectors.

    Raises:
        MemoryError: the kernel got no memory.
    """
    batch, count, length = rows.shape
    # The kernel takes columns by the tile; columns of zeros are cheaper than a tile that is broken.
    padded = rows.new_zeros(batch, length, -(-count // _TILE) * _TILE, dtype=torch.float32)
    padded[..., :count] = rows.transpose(1, 2)
    carried = padded.new_empty(batch, call.q.shape[1], padded.shape[-1], length)
    _enter(
        library.carry,
        call,
        {"lse": lse.float().contiguous(), "rows": padded, "carried": carried},
        count=padded.shape[-1],
    )
    return carried[:, :, :count]


def pull(
    library: ctypes.CDLL,
    call: AttentionCall,
    lse: Float[Tensor, "batch head query"],
    slope: Float[Tensor, "batch query head d_value"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives with respect to queries, keys and values, from that with respect to the output.

    Args:
        library: See :func:`kernel`.
        call: The layer's attention, on the CPU, with its output.
        lse: Log-sum-exp of its scores, as :func:`run` returns it.
        slope: Derivative with respect to the output.

    Raises:
        MemoryError: the kernel got no memory.
    """
    assert call.output is not None
    v = call.v.float().contiguous()
    slope = slope.float().contiguous()
    pulled = {
        f"{name}_pull": torch.empty(x.shape, dtype=torch.float32)
        for name, x in (("q", call.q), ("k", call.k), ("v", v))
    }
    delta = (slope * call.output).sum(dim=-1).transpose(1, 2).contiguous()
    tensors = {"lse": lse.float().contiguous(), "pull": slope, "delta": delta}
    _enter(library.pull, call, tensors | pulled, v=v)
    q, k, v = pulled.values()
    return q, k, v


def _enter(
    function: Any,
    call: AttentionCall,
    tensors: dict[str, Tensor],
    v: Tensor | None = None,
    **numbers: int,
) -> None:
    """Hand a call to the library; ``tensors`` are contiguous and stay alive until it returns."""
    # Every block of queries reads all keys and values: worth a copy without gaps.
    q, k = call.q.float(), call.k.float().contiguous()
    if q.stride(-1) != 1:
        q = q.contiguous()
    batch, heads, length, width = q.shape
    if call.start is not None:
        tensors["start"] = call.start.int().expand(batch, length).contiguous()
    arguments = _Arguments(
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        length=length,
        width=width,
        value_width=0 if v is None else v.shape[-1],
        scale=call.scale,
        softcap=call.softcap or 0.0,
        threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        **numbers,
    )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is not None:
            setattr(arguments, name, tensor.data_ptr())
            for axis, stride in zip(("batch", "head", "row"), tensor.stride(), strict=False):
                setattr(arguments, f"{name}_{axis}", stride)
    if function(ctypes.byref(arguments)):
        raise MemoryError("can't allocate memory for the blocks of attention rows")


def _compiled(compiler: str, machine: tuple[str, ...]) -> Path:
    command = [compiler, *_FLAGS, *machine]
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    written = [path.read_text(encoding="utf-8") for path in (HEADER, *SOURCES)]
    made_of = (*written, repr(command), version, _processor())
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    library = cache_folder() / "kernels" / f"rows-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            fresh = Path(folder) / library.name
            subprocess.run(
                [*command, f"-I{FOLDER}", *map(str, SOURCES), "-o", str(fresh), *_LINK],
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            )
            fresh.replace(library)
    return library


def _processor() -> str:
    """What the compiler's idea of the native processor depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({l for l in lines if l.startswith(("flags", "Features", "model name"))})
    )
