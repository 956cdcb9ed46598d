"""``eyechart.precision``: number formats, and which numbers they can no longer tell apart.

Rounding a tensor to a format and back shows what a machine of that precision would have kept. Of
floating formats the spacing grows with the number; formats of few whole numbers have one scale a
vector, so that a large coordinate coarsens all others.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eyechart.errors import UsageError

# Below this a vector counts as zero when its scale is taken (BitNet b1.58, reference code).
_SMALLEST = 1e-5


@dataclass(frozen=True)
class Format(ABC):
    """A number format.

    Attributes:
        name: As in :data:`FORMATS`.
        bits: Bits a number takes; log2 3 for three values.
    """

    name: str
    bits: float

    @property
    @abstractmethod
    def eps(self) -> float | None:
        """Distance from 1 to the next larger number; None where a scale sets it."""

    @property
    @abstractmethod
    def largest(self) -> float | None:
        """Largest finite number; None where a scale sets it."""

    def scale(
        self, x: Float[Tensor, "*batch d"], where: Bool[Tensor, "*#batch d"] | None = None
    ) -> Float[Tensor, "*batch 1"] | None:
        """Codes a unit, one scale a vector of the last axis; None where the format has none.

        Args:
            x: The numbers.
            where: Coordinates that count, all by default.
        """
        return None

    @abstractmethod
    def codes(
        self, x: Float[Tensor, "*batch d"], scale: Float[Tensor, "*#batch 1"] | None = None
    ) -> Float[Tensor, "*batch d"]:
        """What is stored of each coordinate, comparable with ``==``.

        For floating formats the rounded number itself; for formats with a scale the whole number,
        whatever the scale is. Zero has no sign. Held in float32 at least.

        Args:
            x: The numbers.
            scale: Of formats that have one; by default x's own.
        """

    def round(
        self, x: Float[Tensor, "*batch d"], scale: Float[Tensor, "*#batch 1"] | None = None
    ) -> Float[Tensor, "*batch d"]:
        """The nearest number of the format, ties to even, in x's own dtype.

        Of floating formats numbers beyond the largest, infinity too, become the largest; where
        there is a scale an infinity spoils its vector. NaN stays NaN. Derivatives pass straight
        through (Bengio et al., arXiv 1308.3432), as in training with rounded numbers.

        Args:
            x: The numbers.
            scale: Of formats that have one; by default x's own.
        """
        rounded = self._values(x.detach(), scale).to(x.dtype)
        passes = x.requires_grad and torch.is_grad_enabled()
        return _StraightThrough.apply(x, rounded) if passes else rounded

    @abstractmethod
    def _values(self, x: Tensor, scale: Tensor | None) -> Tensor: ...

    @abstractmethod
    def spacing(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Distance of neighbouring numbers of the format at each coordinate's magnitude."""

    @abstractmethod
    def steps(
        self, a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch d"]:
        """How many spacings lie between two numbers, before they are rounded.

        Of floating formats in the coarser spacing of the two. Where there is a scale each vector is
        taken in its own, and beyond the outermost code nothing differs any more.
        """

    @abstractmethod
    def emulated(self, device: torch.device | str) -> str | None:
        """One sentence where a device has no such numbers; None where it has."""


@dataclass(frozen=True)
class Floating(Format):
    """Sign, exponent and mantissa, subnormal numbers included.

    Attributes:
        dtype: The format as torch knows it.
    """

    dtype: torch.dtype

    @property
    def eps(self) -> float:
        """Distance from 1 to the next larger number."""
        return torch.finfo(self.dtype).eps

    @property
    def largest(self) -> float:
        """Largest finite number."""
        return torch.finfo(self.dtype).max

    def codes(
        self, x: Float[Tensor, "*batch d"], scale: Float[Tensor, "*#batch 1"] | None = None
    ) -> Float[Tensor, "*batch d"]:
        """The rounded number, held in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.eps <= torch.finfo(wide.dtype).eps:
            return wide
        bounded = wide.clamp(-self.largest, self.largest)
        if wide.dtype == torch.float32 and holds(wide.device, self.dtype):
            return bounded.to(self.dtype).to(wide.dtype)
        # torch casts float64 by way of float32, which rounds twice; the spacing is a power of two,
        # so that nothing but the rounding itself is inexact here.
        spacing = self.spacing(bounded)
        return (bounded / spacing).round() * spacing

    def _values(self, x: Tensor, scale: Tensor | None) -> Tensor:
        return self.codes(x)

    def spacing(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Unit in the last place; below the normal numbers that of the smallest of them."""
        least = torch.float64 if self.dtype == torch.float64 else torch.float32
        if least == torch.float64 and not holds(x.device, least):
            x = x.cpu()
        wide = x.to(torch.promote_types(x.dtype, least))
        facts = torch.finfo(self.dtype)
        exponent = torch.frexp(wide.abs().clamp(facts.tiny, facts.max)).exponent - 1
        return torch.ldexp(torch.full_like(wide, facts.eps), exponent)

    def steps(
        self, a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch d"]:
        """Distance over the larger spacing of the two."""
        spacing = torch.maximum(self.spacing(a), self.spacing(b))
        return (a.to(spacing) - b.to(spacing)).abs() / spacing

    def emulated(self, device: torch.device | str) -> str | None:
        """Whether torch can make such a tensor there, and compute in it by the device's own way."""
        device = torch.device(device)
        old = device.type == "cuda" and self.dtype == torch.bfloat16
        if holds(device, self.dtype) and not (
            old and not torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            return None
        return f"{device.type} has no {self.name} of its own: its numbers are rounded in software"


@dataclass(frozen=True)
class Scaled(Format):
    """Whole numbers times one scale a vector, as BitNet b1.58 takes them (arXiv 2402.17764).

    Attributes:
        low: Smallest code.
        high: Largest code.
        mean: The scale makes the mean magnitude 1 (absmean), not the largest magnitude ``high``
            (absmax).
    """

    low: int
    high: int
    mean: bool = False

    @property
    def eps(self) -> None:
        """None: a scale sets it."""

    @property
    def largest(self) -> None:
        """None: a scale sets it."""

    def scale(
        self, x: Float[Tensor, "*batch d"], where: Bool[Tensor, "*#batch d"] | None = None
    ) -> Float[Tensor, "*batch 1"]:
        """Codes a unit: ``high`` over the largest magnitude, or one over the mean magnitude."""
        size = x.to(torch.promote_types(x.dtype, torch.float32)).abs()
        if where is not None:
            size = size.masked_fill(~where, 0)
        if not self.mean:
            size = size.amax(dim=-1, keepdim=True)
        elif where is None:
            size = size.mean(dim=-1, keepdim=True)
        else:
            size = size.sum(dim=-1, keepdim=True) / where.sum(dim=-1, keepdim=True).clamp(min=1)
        return self.high / size.clamp(min=_SMALLEST)

    def codes(
        self, x: Float[Tensor, "*batch d"], scale: Float[Tensor, "*#batch 1"] | None = None
    ) -> Float[Tensor, "*batch d"]:
        """Whole numbers from ``low`` to ``high``, held in float32 at least."""
        return self._places(x, self.scale(x) if scale is None else scale).round() + 0.0

    def _values(self, x: Tensor, scale: Tensor | None) -> Tensor:
        scale = self.scale(x) if scale is None else scale
        return self.codes(x, scale) / scale

    def spacing(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """One over the scale, the same for all coordinates of a vector."""
        return (1 / self.scale(x)).expand(x.shape)

    def steps(
        self, a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch d"]:
        """Distance of the codes before they are made whole."""
        return (self._places(a, self.scale(a)) - self._places(b, self.scale(b))).abs()

    def emulated(self, device: torch.device | str) -> str:
        """No device computes with such numbers here."""
        return f"{self.name} is emulated: whole numbers times a scale, held as floating numbers"

    def _places(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x.to(scale.dtype) * scale).clamp(self.low, self.high)


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Floating("float64", 64, torch.float64),
        Floating("float32", 32, torch.float32),
        Floating("float16", 16, torch.float16),
        Floating("bfloat16", 16, torch.bfloat16),
        Floating("float8_e4m3", 8, torch.float8_e4m3fn),
        Floating("float8_e5m2", 8, torch.float8_e5m2),
        Scaled("int8", 8, -128, 127),
        Scaled("int4", 4, -8, 7),
        Scaled("ternary", 1.584962500721156, -1, 1, mean=True),
    )
}
"""The formats by name, of each kind the finest first."""

_ALIASES = {
    "double": "float64",
    "fp64": "float64",
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "float8_e4m3fn": "float8_e4m3",
    "e4m3fn": "float8_e4m3",
    "e4m3": "float8_e4m3",
    "e5m2": "float8_e5m2",
    "b1.58": "ternary",
}


def format_named(name: str | torch.dtype | Format) -> Format:
    """A format by its name, by a usual short name ("bf16", "e4m3") or as torch spells it.

    Raises:
        UsageError: nothing goes by that name; says what there is.
    """
    if isinstance(name, Format):
        return name
    plain = str(name).removeprefix("torch.").lower()
    found = FORMATS.get(_ALIASES.get(plain, plain))
    if found is None:
        raise UsageError(f"unknown number format {str(name)!r}; there are {', '.join(FORMATS)}")
    return found


def share_identical(
    a: Float[Tensor, "*batch d_model"],
    b: Float[Tensor, "*batch d_model"],
    format: str | torch.dtype | Format,
) -> Float[Tensor, "*batch"]:
    """Share of the coordinates that are stored alike, over the last axis; 1: indistinguishable.

    Of formats with a scale a vector the codes are compared, whatever the two scales are.

    Raises:
        UsageError: unknown format, or shapes that differ.
    """
    _refuse_unlike(a, b)
    chosen = format_named(format)
    same = chosen.codes(a) == chosen.codes(b)
    return same.to(torch.promote_types(a.dtype, torch.float32)).mean(dim=-1)


def share_expected(
    a: Float[Tensor, "*batch d_model"],
    b: Float[Tensor, "*batch d_model"],
    format: str | torch.dtype | Format,
) -> Float[Tensor, "*batch"]:
    """The share that the format's spacing predicts: mean of max(0, 1 - |a_i - b_i| / spacing_i).

    That is the chance that two numbers so far apart are rounded to one if the grid lay at random.
    Where :func:`share_identical` is larger, the numbers favour places that round alike.

    Raises:
        UsageError: unknown format, or shapes that differ.
    """
    _refuse_unlike(a, b)
    return (1 - format_named(format).steps(a, b)).clamp(min=0).mean(dim=-1)


def _refuse_unlike(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or not a.is_floating_point() or a.dtype != b.dtype:
        raise UsageError(
            "expected two floating tensors of one shape and dtype, got "
            f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )


@functools.lru_cache
def holds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can make such a tensor on the device; asked, because lists grow old."""
    try:
        torch.zeros(1, device=device).to(dtype)
    except (TypeError, RuntimeError):
        return False
    return True


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return slopes[0], None
