"""Attention from queries, keys and values: every kernel against the definitions, in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import eyechart
from eyechart.errors import NonFiniteError
from eyechart.kernels import AttentionCall, Reducer, attend, native
from eyechart.kernels.streamed import stream
from eyechart.kernels.trial import Kernel
from eyechart.results import MEASURED

BASELINE = {"x86_64": ("-msse4.2",), "AMD64": ("-msse4.2",)}
NAMES = (*MEASURED, "virtual_sink")


def reference(call: AttentionCall, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every row written out in float64, from the formula alone."""
    q, k, v = call.q.double(), call.k.double(), call.v.double()
    batch, heads, n, _ = q.shape
    rows = torch.zeros(batch, heads, n, n, dtype=torch.float64)
    out = torch.zeros(batch, n, heads, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // k.shape[1])
            for i in range(n):
                low = 0 if call.start is None else int(call.start[b, i])
                s = call.scale * (k[b, group, low : i + 1] @ q[b, h, i])
                if call.softcap is not None:
                    s = call.softcap * torch.tanh(s / call.softcap)
                total = s if call.sinks is None else torch.cat([s, call.sinks[h : h + 1].double()])
                a = (s - total.logsumexp(0)).exp()
                rows[b, h, i, low : i + 1] = a
                out[b, i, h] = a @ v[b, group, low : i + 1]
    reducer = Reducer(NAMES, (), torch.zeros_like(mask, dtype=torch.long), mask)
    reducer.add(0, rows)
    return reducer.finish() | {"output": out}


def case(seed: int, kind: torch.dtype = torch.float32, **options: Any) -> AttentionCall:
    """A call with everything chosen at random, unless it is said."""
    draw = torch.Generator().manual_seed(seed)

    def pick(name: str, *values: Any) -> Any:
        chosen = values[int(torch.randint(len(values), (1,), generator=draw))]
        return options.get(name, chosen)

    n = pick("n", 1, 2, 17, 47, 48, 49, 64, 65, 130)
    groups, per_group = pick("groups", 1, 2, 3), pick("per_group", 1, 3)
    width, value_width = pick("width", 8, 12, 64, 80), pick("value_width", 8, 10, 64)
    window, batch = pick("window", None, 5, 40), pick("batch", 1, 2)
    gain = pick("gain", 0.3, 2.0)
    q, k, v = (
        torch.randn(batch, heads, n, d, generator=draw, dtype=torch.float64).to(kind)
        for heads, d in ((groups * per_group, width), (groups, width), (groups, value_width))
    )
    at = torch.arange(n)
    return AttentionCall(
        q,
        k,
        v,
        scale=gain * width**-0.5,
        softcap=pick("softcap", None, 1.5),
        start=None if window is None else (at - window + 1).clamp(min=0).expand(batch, n),
        sinks=pick("sinks", None, torch.randn(groups * per_group, generator=draw)),
    )


def padded(call: AttentionCall) -> torch.Tensor:
    """A mask that pads the last sequence of the batch."""
    batch, n = call.q.shape[0], call.length
    lengths = torch.tensor([n] * (batch - 1) + [max(1, n - 3)])
    return torch.arange(n) < lengths[:, None]


def computed(
    call: AttentionCall, mask: torch.Tensor, accumulate: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    names = NAMES if call.sinks is not None else MEASURED
    tokens = torch.zeros_like(mask, dtype=torch.long)
    found = attend(call, tokens, mask, statistics=names, accumulate=accumulate)
    assert call.output is not None
    return found | {"output": call.output}


def assert_equal(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], atol: float):
    for name, value in found.items():
        bound = atol * (10 if name in ("entropy", "distance") else 1)
        torch.testing.assert_close(
            value.double(),
            truth[name],
            atol=bound,
            rtol=10 * atol,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_the_compiled_kernel_equals_the_definitions(seed):
    call = case(seed)
    mask = padded(call)
    assert_equal(computed(call, mask), reference(call, mask), 2e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_the_streamed_kernel_equals_the_definitions_in_float64(seed):
    call = case(seed, torch.float64)
    mask = padded(call)
    assert_equal(computed(call, mask), reference(call, mask), 1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), kind=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_inputs_are_accumulated_in_float32(seed, kind):
    call = case(seed, kind)
    mask = padded(call)
    found, truth = computed(call, mask), reference(call, mask)
    assert found["output"].dtype == kind
    del found["output"]
    assert_equal(found, truth, 2e-6)  # of the very same rounded inputs


@pytest.mark.parametrize("statistic", ["first", "received"])
def test_the_wrong_layout_of_grouped_heads_is_told_apart(statistic):
    call = case(3, n=40, groups=2, per_group=3, window=None, softcap=None, sinks=None, batch=1)
    mask = padded(call)
    truth = reference(call, mask)
    tiled = torch.arange(6) % 2  # head h reads key head h % groups: wrong
    wrong = AttentionCall(call.q, call.k[:, tiled], call.v[:, tiled], call.scale)
    assert (computed(wrong, mask)[statistic] - truth[statistic]).abs().max() > 1e-2


@pytest.mark.parametrize("accumulate", [torch.float32, torch.float64])
def test_large_scores_neither_overflow_nor_lose_the_rest(accumulate):
    call = case(1, n=130, gain=80.0, softcap=None, sinks=None, window=None, width=64)
    mask = padded(call)
    found, truth = computed(call, mask, accumulate), reference(call, mask)
    # Scores of several hundreds carry rounding of their own size times epsilon.
    assert_equal(found, truth, 2e-4)


def test_keys_far_below_the_highest_get_exactly_nothing():
    q = torch.zeros(1, 1, 70, 8)
    k = torch.zeros(1, 1, 70, 8)
    q[..., 0], k[0, 0, 0, 0] = 1.0, 200.0
    call = AttentionCall(q, k, torch.randn(1, 1, 70, 4), 1.0)
    found = computed(call, torch.ones(1, 70, dtype=torch.bool))
    assert torch.equal(found["first"], torch.ones(1, 1, 70))
    assert float(found["diagonal"][..., 1:].abs().max()) == 0
    assert torch.equal(found["entropy"], torch.zeros(1, 1, 70))
    torch.testing.assert_close(found["output"][0, :, 0], call.v[0, 0, :1].expand(70, 4))


@pytest.mark.parametrize("flags", ["native", "avx2", "baseline", "one thread"])
def test_every_instruction_set_and_no_openmp_give_the_same(flags):
    import platform

    if platform.machine() not in BASELINE and flags in ("avx2", "baseline"):
        pytest.skip("instruction sets of another processor family")
    chosen = {
        "native": ("-march=native", "-fopenmp"),
        "avx2": ("-mavx2", "-mfma", "-fopenmp"),
        "baseline": (*BASELINE.get(platform.machine(), ()), "-fopenmp"),
        "one thread": ("-march=native",),
    }[flags]
    made = native.build(chosen)
    assert made.run is not None, made.reason
    for seed in range(12):
        call = case(seed)
        mask = padded(call)
        rows = made.run(call, mask.sum(dim=-1))
        truth = reference(call, mask)
        assert call.output is not None
        assert_equal({n: rows[n] for n in NAMES if n in rows}, truth, 2e-6)
        assert_equal({"output": call.output}, truth, 2e-6)


def test_the_same_numbers_whatever_the_number_of_threads():
    call = case(5, n=130, batch=2)
    mask = padded(call)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            call.output = None
            found.append(computed(call, mask))
    finally:
        torch.set_num_threads(threads)
    once, *again = found
    assert all(torch.equal(once[name], other[name]) for other in again for name in once)


def test_without_a_compiler_the_numbers_are_the_same_and_the_reason_is_told(monkeypatch):
    call = case(7, n=65)
    mask = padded(call)
    truth = reference(call, mask)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setattr(native, "kernel", lambda: native.build(("-march=native",)))
    assert native.kernel().run is None
    assert "no C compiler" in native.kernel().reason
    assert_equal(computed(call, mask), truth, 2e-6)


def test_the_result_says_which_kernel_was_missing(monkeypatch, llama):
    found = eyechart.attention_statistics(llama, "Some text.", backend="fused")
    assert found.provenance.notes == ()
    wide = eyechart.attention_statistics(llama, "Some text.", backend="fused", accumulate="float64")
    assert "compiled kernels compute in float32" in wide.provenance.notes[0]
    monkeypatch.setattr(native, "kernel", lambda: Kernel(None, "no C compiler was found"))
    slow = eyechart.attention_statistics(llama, "Some text.", backend="fused")
    assert slow.provenance.notes == (
        "fused statistics are computed through torch: no C compiler was found",
    )
    torch.testing.assert_close(slow.entropy, found.entropy, atol=1e-5, rtol=1e-5)


def test_a_compiler_that_fails_is_quoted(monkeypatch, cache):
    made = native.build(("-march=abacus",))
    assert made.run is None and "abacus" in made.reason


def test_a_kernel_that_computes_something_else_is_refused(monkeypatch, cache, tmp_path):
    source = native.SOURCES[0].read_text(encoding="utf-8")
    wrong = tmp_path / "rows.c"
    # Tiled instead of interleaved groups.
    wrong.write_text(source.replace("g = h / (a->heads / a->kv_heads)", "g = h % a->kv_heads"))
    monkeypatch.setattr(native, "SOURCES", (wrong, *native.SOURCES[1:]))
    made = native.build(("-march=native",))
    assert made.run is None and "differs from its definition" in made.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_among_keys_are_refused(bad):
    call = case(2, n=17)
    call.k[0, 0, 3, 1] = bad
    with pytest.raises(NonFiniteError, match="queries or keys"):
        computed(call, padded(call))


@pytest.mark.parametrize("accumulate", [torch.float32, torch.float64])
def test_bad_numbers_in_the_padding_are_nobodys_business(accumulate):
    call, clean = (case(9, n=65, batch=2, window=None) for _ in range(2))
    mask = padded(call)
    for x in (call.q, call.k):
        x[1, :, -2:] = math.nan
    found, truth = (computed(c, mask, accumulate) for c in (call, clean))
    for name in MEASURED:
        real = mask[:, None].expand_as(found[name])
        assert torch.equal(found[name][real], truth[name][real]), name


def test_large_numbers_in_float16_are_no_infinity():
    call = case(4, torch.float16, n=130, width=64, gain=0.3)
    call.q += 300  # their sum is beyond the format
    computed(call, padded(call))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("kernel", ["compiled", "streamed"])
def test_no_tensor_grows_with_the_square_of_the_length(kernel):
    largest = []
    for n in (1024, 2048, 4096):
        call = case(0, n=n, groups=2, per_group=2, width=64, value_width=64, batch=1, window=None)
        mask = padded(call)
        with Largest() as seen:
            if kernel == "compiled":
                computed(call, mask)
            else:
                reducer = Reducer(MEASURED, (), torch.zeros_like(mask, dtype=torch.long), mask)
                stream(call, torch.float32, reducer)
        largest.append(seen.bytes)
    # Streamed blocks have a fixed size until a few rows fill it; beyond, both grow with the length.
    assert largest[-1] <= max(2 * largest[-2], 2**24)
    assert largest[-1] < 4 * 4096 * 4096  # less than one head's pattern, and there are four
