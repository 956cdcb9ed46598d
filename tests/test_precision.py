"""Number formats: every value by brute force, and by what torch itself casts to."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eyechart import precision
from eyechart.errors import UsageError
from eyechart.precision import FORMATS, Floating, format_named, share_expected, share_identical

# Name: bits, eps, largest, smallest normal, smallest subnormal (OCP 8-bit formats; IEEE 754).
TABLE = {
    "float64": (64, 2.0**-52, (2 - 2.0**-52) * 2.0**1023, 2.0**-1022, 2.0**-1074),
    "float32": (32, 2.0**-23, (2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-149),
    "float16": (16, 2.0**-10, 65504, 2.0**-14, 2.0**-24),
    "bfloat16": (16, 2.0**-7, (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133),
    "float8_e4m3": (8, 0.125, 448, 2.0**-6, 2.0**-9),
    "float8_e5m2": (8, 0.25, 57344, 2.0**-14, 2.0**-16),
}
SMALL = ("float16", "bfloat16", "float8_e4m3", "float8_e5m2")
SCALED = ("int8", "int4", "ternary")


def floating(name: str) -> Floating:
    format = FORMATS[name]
    assert isinstance(format, Floating)
    return format


def values_of(name: str) -> Tensor:
    """Every finite number of a format from zero up, in float64: in the order of its codes."""
    format = floating(name)
    kind = torch.int16 if format.bits == 16 else torch.int8
    values = torch.arange(2 ** (int(format.bits) - 1)).to(kind).view(format.dtype).double()
    values = values[values.isfinite()]
    assert bool((values.diff() > 0).all()) and float(values[0]) == 0
    return values


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """The definition: the nearest of all values, of two as near the one with the even code."""
    size = x.abs().clamp(max=float(values[-1]))
    above = torch.searchsorted(values, size).clamp(min=1)
    low, high = values[above - 1], values[above]
    up = (high - size < size - low) | ((high - size == size - low) & (above % 2 == 0))
    return torch.where(up, high, low) * x.sign()


@pytest.mark.parametrize("name", TABLE)
def test_facts(name):
    format, (bits, eps, largest, normal, subnormal) = FORMATS[name], TABLE[name]
    assert (format.bits, format.eps, format.largest) == (bits, eps, largest)
    one = torch.tensor([1.0, largest, normal, normal / 2, subnormal, 0.0]).double()
    _, exponent = math.frexp(largest)
    expected = [eps, eps * 2.0 ** (exponent - 1), *[subnormal] * 4]
    assert format.spacing(one).tolist() == expected


def test_facts_of_formats_with_a_scale():
    assert FORMATS["int8"].bits == 8 and FORMATS["int4"].bits == 4
    assert FORMATS["ternary"].bits == math.log2(3)
    assert all(FORMATS[name].eps is None and FORMATS[name].largest is None for name in SCALED)


@pytest.mark.parametrize("name", SMALL)
def test_float64_is_rounded_once(name):
    values, format = values_of(name), floating(name)
    ties = (values[1:] + values[:-1]) / 2
    near = [values, ties, *(ties * (1 + sign * 2.0**-50) for sign in (-1, 1))]
    x = torch.cat([*near, torch.rand(20_000).double() * 3, values[-1:] * 1.5])
    x = torch.cat([x, -x])
    assert torch.equal(format.round(x), nearest(x, values))
    # The trap: by way of float32 a number just above a tie falls on it, and then to the even side.
    assert not torch.equal(x.float().to(format.dtype).double(), nearest(x, values))


@pytest.mark.parametrize("name", SMALL)
def test_float32_is_rounded_as_torch_casts_with_and_without_a_cast(name, monkeypatch):
    format = floating(name)
    x = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    x = torch.cat([x[x.isfinite()], torch.randn(50_000)])
    x = x[x.abs() <= format.largest]
    assert int((x.abs() < torch.finfo(format.dtype).tiny).sum()) > 100  # subnormals are there
    cast = x.to(format.dtype).float()
    assert torch.equal(format.round(x), cast)
    monkeypatch.setattr(precision, "holds", lambda device, dtype: False)
    assert torch.equal(format.round(x), cast)


@pytest.mark.parametrize("name", SMALL)
def test_spacing_is_the_distance_to_the_next_value(name):
    values, format = values_of(name), FORMATS[name]
    for sign in (1, -1):
        assert torch.equal(format.spacing(sign * values)[:-1], values.diff())
    between = (values[1:] + values[:-1]) / 2
    assert torch.equal(format.spacing(between), values.diff())
    assert float(format.spacing(values)[-1]) == float(values.diff()[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spacing_of_the_wide_formats_is_torchs_next_number(dtype):
    x = (torch.rand(10_000, dtype=dtype) * 250 - 140).exp2()
    x = torch.cat([x, torch.tensor([1.0, 2.0, 1.5], dtype=dtype)])
    upward = torch.nextafter(x, torch.full_like(x, torch.inf)) - x
    assert torch.equal(format_named(dtype).spacing(x), upward)


def test_counts_become_one_where_their_reciprocals_do():
    n = torch.arange(1, 3000).double()
    for name, first in (("bfloat16", 190), ("float16", 1464)):
        codes = FORMATS[name].codes(1 / n)
        same = (codes[1:] == codes[:-1]).nonzero()
        assert int(n[same[0, 0]]) == first


@pytest.mark.parametrize("name", TABLE)
def test_what_is_too_large_is_clamped_and_nan_stays(name):
    format = FORMATS[name]
    assert format.largest is not None
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0]).double()
    rounded = format.codes(x)
    if name != "float64":
        assert rounded[:2].tolist() == [format.largest, -format.largest]
    assert bool(rounded[2].isnan()) and float(rounded[3]) == 0
    held = format.round(torch.tensor([1e30, 3.0]).bfloat16())
    assert held.dtype == torch.bfloat16 and float(held[1]) == 3


def test_a_wider_format_changes_nothing():
    x = torch.randn(100)
    for name in ("float32", "float64"):
        assert torch.equal(FORMATS[name].round(x), x)
    assert torch.equal(FORMATS["float16"].round(x.half()), x.half())


def test_whole_numbers_by_hand():
    codes = {
        "int8": ([127.0, 1.4, -2.6, 0.5], [127, 1, -3, 0]),
        "int4": ([-14.0, 7.0, -3.0, 0.9], [-7, 4, -2, 0]),  # 3.5 and -1.5 are ties: to even
        "ternary": ([4.0, -1.0, 0.5, -0.1], [1, -1, 0, 0]),
    }
    scales = {"int8": 1.0, "int4": 0.5, "ternary": 1 / 1.4}
    for name, (x, expected) in codes.items():
        format, row = FORMATS[name], torch.tensor([x, [0.0] * 4]).double()
        scale = scales[name]
        assert format.codes(row).tolist() == [expected, [0] * 4]
        torch.testing.assert_close(format.round(row)[0], torch.tensor(expected).double() / scale)
        torch.testing.assert_close(format.spacing(row)[0], torch.full((4,), 1 / scale).double())
    assert FORMATS["int8"].codes(torch.tensor([1e-7, -5e-6])).tolist() == [1, -64]  # not noise


def test_a_mean_is_over_what_counts():
    x = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    seen = torch.tensor([[True, True, False, False], [True] * 4])
    scale = FORMATS["ternary"].scale(x, seen)
    assert scale is not None
    torch.testing.assert_close(1 / scale, torch.tensor([[0.5], [0.25]]))
    rounded = FORMATS["ternary"].round(x, scale)
    torch.testing.assert_close(rounded, torch.tensor([[0.5, 0.5, 0, 0], [0, 0.25, 0.25, 0.25]]))
    largest = FORMATS["int8"].scale(x, ~seen[[0, 0]])
    assert largest is not None
    torch.testing.assert_close(127 / largest, torch.tensor([[1e-5], [0.4]]))


vectors = st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(vectors, st.sampled_from(sorted(FORMATS)))
def test_rounding_again_changes_nothing(x, name):
    format, row = FORMATS[name], torch.tensor(x)
    rounded = format.round(row)
    # A format's own scale may move by rounding, and the mean of ternary numbers does move.
    assert torch.equal(format.codes(rounded), format.codes(row))
    scale = format.scale(row)
    torch.testing.assert_close(format.round(rounded, scale), rounded, rtol=1e-6, atol=0)
    if scale is None:
        assert torch.equal(format.round(rounded), rounded)


@settings(max_examples=60, deadline=None)
@given(vectors, st.sampled_from(sorted(FORMATS)))
def test_order_is_kept_and_half_a_spacing_is_the_most_that_is_lost(x, name):
    format, row = FORMATS[name], torch.tensor(x).sort().values.double()
    rounded = format.round(row)
    assert bool((rounded.diff() >= 0).all())
    inside = torch.ones_like(row, dtype=torch.bool)
    if format.largest is not None:
        inside = row.abs() <= format.largest
    elif name == "ternary":
        inside = row.abs() <= 1.5 * format.spacing(row)
    lost = (row - rounded).abs() - format.spacing(row) / 2 * (1 + 1e-12)
    assert bool((lost[inside] <= 0).all())


# Shares.


def test_the_same_is_the_same_and_the_far_is_not():
    a = torch.randn(3, 5, 64)
    for name in FORMATS:
        assert torch.equal(share_identical(a, a.clone(), name), torch.ones(3, 5))
        assert torch.equal(share_expected(a, a.clone(), name).float(), torch.ones(3, 5))
    assert float(share_identical(a, -a, "int8").max()) < 0.1
    assert float(share_expected(a, -a, "int8").max()) < 0.1
    assert share_identical(torch.tensor([0.0, 1]), torch.tensor([-0.0, 1]), "fp16") == 1


def test_by_hand():
    a, b = torch.tensor([1.0, 1.0, 1.0, 3.0]), torch.tensor([1.001, 1.0059, 1.25, 3.0])
    assert float(share_identical(a, b, "bf16")) == 0.5  # 1.0059 is nearer to 1.0078 than to 1
    expected = (1 - 0.001 * 128 + 1 - 0.0059 * 128 + 0 + 1) / 4
    assert float(share_expected(a, b, "bf16")) == pytest.approx(expected, abs=1e-4)
    # The scales differ by a hundredth, the codes do not: one is the other a little larger.
    assert share_identical(a, a * 1.01, "int8") == 1
    assert float(share_expected(a, a * 1.01, "int8")) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3", "float8_e5m2", "int8"])
@pytest.mark.parametrize("steps", [0.1, 0.6, 1.3])
def test_the_expected_share_is_that_of_a_random_grid(name, steps):
    count, format = 200_000, FORMATS[name]
    a = torch.rand(count).double() * 0.5 + 1.1
    a[-1] = 2.54  # int8: steps of 0.02, so that the range is whole steps
    b = a + steps * format.spacing(a)
    b[-1] = 2.54
    found = float(share_identical(a, b, name))
    expected = max(0.0, 1 - steps)
    assert float(share_expected(a, b, name)) == pytest.approx(expected, abs=1e-4)
    assert found == pytest.approx(expected, abs=4 * (0.25 / count) ** 0.5)


# Names, devices, derivatives.


def test_names():
    for name, spelled in {
        "bfloat16": ("torch.bfloat16", "bf16", torch.bfloat16, FORMATS["bfloat16"]),
        "float8_e4m3": ("float8_e4m3fn", "e4m3", torch.float8_e4m3fn, "FLOAT8_E4M3"),
        "float16": ("fp16", "half", torch.float16),
        "float32": ("fp32", "torch.float32"),
        "int8": ("int8", torch.int8),
        "ternary": ("b1.58",),
    }.items():
        assert all(format_named(each) is FORMATS[name] for each in spelled)
    with pytest.raises(UsageError, match="unknown number format 'float4'; there are float64, "):
        format_named("float4")
    a = torch.randn(2, 4)
    for share in (share_identical, share_expected):
        with pytest.raises(UsageError, match="one shape and dtype"):
            share(a, a.double(), "bf16")


def test_what_a_device_has_not_is_said():
    assert FORMATS["float16"].emulated("cpu") is None
    assert FORMATS["float8_e4m3"].emulated(torch.device("cpu")) is None
    said = FORMATS["float64"].emulated("mps")  # has it nowhere, nor is it here
    assert said is not None and said.startswith("mps has no float64 of its own")
    assert "int4 is emulated" in str(FORMATS["int4"].emulated("cpu"))


@pytest.mark.parametrize("name", ["bfloat16", "int4", "ternary"])
def test_derivatives_pass_straight_through(name):
    x = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(5, 8)
    rounded = FORMATS[name].round(x)
    assert torch.equal(rounded.detach(), FORMATS[name].round(x.detach()))
    (slope,) = torch.autograd.grad((rounded * weight).sum(), x)
    assert torch.equal(slope, weight)
