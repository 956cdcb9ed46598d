"""Attention on the GPU against a pattern computed in float64; without a GPU, interpreted."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it comes with torch's CUDA builds")

from eyechart.kernels import gpu
from eyechart.kernels.attend import _gpu_kernel
from eyechart.kernels.call import AttentionCall
from eyechart.kernels.trial import tried

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    start: Tensor | None,
    sinks: Tensor | None,
    lengths: Tensor,
    tiled: bool = False,
) -> dict[str, Tensor]:
    """Everything from the whole pattern; ``tiled`` pairs the heads in the wrong order."""
    q, k, v = q.double(), k.double(), v.double()
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    if tiled:
        k, v = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)
    else:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scale * q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(n, device=q.device)
    away = position[:, None] - position
    seen = (away >= 0).expand(q.shape[0], 1, n, n)
    if start is not None:
        seen = seen & (position >= start[..., None])[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        logits = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logits], dim=-1)
    pattern = scores.softmax(-1)[..., :n]
    real = (position < lengths[:, None])[:, None, :, None]
    previous = torch.zeros_like(pattern[..., 0])
    previous[..., 1:] = pattern.diagonal(-1, 2, 3)
    expected = {
        "output": pattern @ v,
        "first": pattern[..., 0],
        "diagonal": pattern.diagonal(0, 2, 3),
        "previous": previous,
        "entropy": -torch.xlogy(pattern, pattern).sum(-1),
        "largest": pattern.amax(-1),
        "distance": (pattern * away).sum(-1),
        "lse": scores.logsumexp(-1),
        "received": pattern.where(real, 0.0).sum(2),
    }
    if sinks is not None:
        expected["virtual_sink"] = 1 - pattern.sum(-1)
    return expected


def inputs(
    heads: tuple[int, int],
    d: int,
    dv: int,
    n: int,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    loud: float = 1.0,
) -> dict[str, Tensor]:
    """Random queries, keys and values laid out token by token, as projections leave them."""
    torch.manual_seed(1000 * d + n)
    wide = torch.randn(batch, n, heads[0] * d + heads[1] * (d + dv)).to(DEVICE, dtype)
    q, k, v = wide.split([heads[0] * d, heads[1] * d, heads[1] * dv], dim=-1)
    return {
        "q": q.unflatten(-1, (heads[0], d)).transpose(1, 2) * loud,
        "k": k.unflatten(-1, (heads[1], d)).transpose(1, 2),
        "v": v.unflatten(-1, (heads[1], dv)).transpose(1, 2),
    }


def window(n: int, width: int, batch: int = 2) -> Tensor:
    start = (torch.arange(n, device=DEVICE) - width + 1).clamp(min=0)
    return start.expand(batch, n).int()


def lengths(*real: int) -> Tensor:
    return torch.tensor(real, dtype=torch.int32, device=DEVICE)


def run(tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Output ``[batch head query dv]`` and statistics."""
    real = options.pop("lengths")
    call = AttentionCall(**tensors, **options)
    statistics = gpu.run(call, real)
    assert call.output is not None and call.output.is_contiguous()
    return call.output.transpose(1, 2), statistics


def disagreements(tensors: dict[str, Tensor], **options: Any) -> dict[str, float]:
    """The largest difference from the reference, of each thing that is computed."""
    n = tensors["q"].shape[2]
    defaults = {
        "scale": tensors["q"].shape[-1] ** -0.5,
        "softcap": None,
        "start": None,
        "sinks": None,
        "lengths": lengths(*[n] * len(tensors["q"])),
    }
    tiled = options.pop("tiled", False)
    chosen = defaults | options
    output, statistics = run(tensors, **chosen)
    expected = reference(**tensors, **chosen, tiled=tiled)
    assert output.dtype == tensors["q"].dtype
    assert all(x.dtype == torch.float32 for x in statistics.values())
    actual = {"output": output, **statistics}
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name].shape == values.shape, name
    return {name: float((actual[name] - expected[name]).abs().max()) for name in expected}


def check(tensors: dict[str, Tensor], **options: Any) -> None:
    """Masses within 1e-5; more for what is itself larger than one."""
    n = tensors["q"].shape[2]
    found = disagreements(tensors, **options)
    bounds = {"entropy": 1e-4, "distance": 1e-6 * max(10, n), "lse": 2e-5, "received": 2e-5}
    assert {name: x for name, x in found.items() if not x <= bounds.get(name, 1e-5)} == {}


@pytest.fixture(params=["own", "small"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block sizes as they are, and such that few tokens make many blocks of each kind."""
    if request.param == "small":
        monkeypatch.setattr(gpu, "_sizes", lambda width, like: gpu._Sizes(32, 16, 2))


@pytest.mark.parametrize("n", [1, 17, 130])
@pytest.mark.parametrize(
    ("heads", "d", "dv"), [((9, 3), 64, 64), ((2, 1), 80, 80), ((3, 3), 24, 16)]
)
def test_shapes(heads: tuple[int, int], d: int, dv: int, n: int) -> None:
    check(inputs(heads, d, dv, n), lengths=lengths(n, max(1, n - 40)))


@pytest.mark.parametrize("width", [None, 1, 20, 64, 100])
def test_windows_and_padding(width: int | None, blocks: None) -> None:
    start = None if width is None else window(130, width, batch=3)
    check(inputs((2, 1), 16, 16, 130, batch=3), start=start, lengths=lengths(130, 77, 1))


def test_chunks_and_starts_in_any_order(blocks: None) -> None:
    tensors = inputs((2, 1), 16, 16, 130)
    position = torch.arange(130, device=DEVICE).expand(2, 130)
    # Only the first or only the second text in chunks.
    for chunked in ([[1], [0]], [[0], [1]]):
        check(tensors, start=(position // 48 * 48 * torch.tensor(chunked, device=DEVICE)).int())
    torch.manual_seed(0)
    scattered = (torch.rand(2, 130).to(DEVICE) * (position + 1)).int()
    check(tensors, start=scattered, lengths=lengths(130, 99))
    late = torch.where(position % 50 < 25, 0, position // 2).int()
    check(tensors, start=late, lengths=lengths(130, 99))


@pytest.mark.parametrize("sinks", [None, (-2.0, 0.5, 40.0)])
@pytest.mark.parametrize("softcap", [None, 5.0, 50.0])
def test_softcap_and_sinks(softcap: float | None, sinks: tuple[float, ...] | None) -> None:
    check(
        inputs((3, 1), 24, 16, 130, loud=3.0),
        softcap=softcap,
        sinks=None if sinks is None else torch.tensor(sinks, device=DEVICE),
        start=window(130, 50),
        lengths=lengths(130, 111),
    )


def test_large_scores_leave_one_key() -> None:
    """Scores of some hundreds: nothing overflows, and rows are sharp."""
    found = disagreements(inputs((2, 1), 16, 16, 130, loud=100.0), scale=1.0)
    assert found.pop("distance") < 1e-2
    assert all(x < 1e-3 for x in found.values()), found


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_formats(dtype: torch.dtype, rounding: float) -> None:
    """Only the output passes through the format; the statistics are those of float32."""
    found = disagreements(
        inputs((4, 2), 80, 64, 130, dtype),
        start=window(130, 100),
        sinks=torch.tensor([0.0, 1.0, -1.0, 2.0], device=DEVICE),
        lengths=lengths(130, 100),
    )
    assert found.pop("output") < rounding
    assert found.pop("distance") < 1e-3
    assert all(x < 1e-4 for x in found.values()), found


def test_tiled_heads_are_noticed() -> None:
    """The wrong pairing of heads is far outside every bound."""
    found = disagreements(inputs((9, 3), 64, 64, 17), tiled=True)
    assert found["output"] > 0.1 and found["first"] > 0.1 and found["entropy"] > 0.1


def test_strides() -> None:
    """A last axis that is not contiguous, and sliced heads."""
    tensors = inputs((4, 4), 32, 32, 40)
    k = torch.empty(2, 4, 32, 40, device=DEVICE).mT.copy_(tensors["k"])
    check(tensors | {"q": tensors["q"][:, ::2], "k": k[:, 1::2], "v": tensors["v"][:, 2:]})


def test_the_same_every_time() -> None:
    tensors = inputs((2, 1), 16, 16, 130)
    options = {"scale": 0.25, "softcap": None, "start": None, "sinks": None}
    once, rows = run(tensors, **options, lengths=lengths(130, 90))
    again, same = run(tensors, **options, lengths=lengths(130, 90))
    assert torch.equal(once, again)
    assert all(torch.equal(rows[name], same[name]) for name in rows)


def test_the_kernel_passes_its_trial() -> None:
    assert tried(gpu.run, device=DEVICE).run is gpu.run
    if DEVICE == "cuda":
        assert _gpu_kernel(torch.device("cuda")).run is gpu.run
