"""A power law through a curve: the number by which two models, or two lenses, are compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eyechart.errors import UsageError

_RESAMPLES = 2000
_FEWEST = 3  # points through which a line with an interval can be drawn


@dataclass(frozen=True)
class PowerLaw:
    """value = scale * n ** slope, a straight line on log-log axes.

    Attributes:
        slope: Least squares on the logarithms; -1 is what uniform attention gives (the paper's
            Theorem 4.2 promises only that the distance vanishes).
        low: Lower end of the slope's 95% interval, from resampling the points; it says how straight
            the curve is, not how it would be for other prompts.
        high: Upper end.
        scale: Value at n = 1 on the line.
        points: How many lengths it goes through.
    """

    slope: float
    low: float
    high: float
    scale: float
    points: int

    def at(self, n: float) -> float:
        """The value on the line."""
        return self.scale * n**self.slope

    def reaches(self, value: float) -> float | None:
        """The n at which the line comes down to a value, None where it does not fall."""
        if self.slope >= 0 or value <= 0 or self.scale <= 0:
            return None
        power = math.log(value / self.scale) / self.slope
        return math.exp(power) if power < 700 else math.inf

    def __str__(self) -> str:
        return f"{self.slope:.2f} [{self.low:.2f}, {self.high:.2f}]"


def power_law(lengths: Sequence[int], values: Tensor, *, seed: int = 0) -> PowerLaw | None:
    """Fit a power law; None where fewer than three values are above zero.

    Args:
        lengths: n.
        values: One a length; zeros and NaN have no logarithm and are left out.
        seed: Of the resampling.
    """
    if len(lengths) != len(values):
        raise UsageError(f"{len(lengths)} lengths, but {len(values)} values")
    values = values.double()
    there = values > 0
    if int(there.sum()) < _FEWEST:
        return None
    x = torch.tensor(list(lengths), dtype=torch.float64)[there].log()
    y = values[there].log()
    slope, start = (float(number) for number in _line(x, y))
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(x), (_RESAMPLES, len(x)), generator=draw)
    slopes, _ = _line(x[chosen], y[chosen])
    # A sample of one point many times has no slope.
    ends = slopes[slopes.isfinite()].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = (float(end) for end in ends)
    return PowerLaw(slope, min(low, slope), max(high, slope), math.exp(start), len(x))


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x_mean, y_mean = x.mean(dim=-1, keepdim=True), y.mean(dim=-1, keepdim=True)
    wide = (x - x_mean).square().sum(dim=-1)
    wide = wide.where(wide > 1e-9, torch.nan)
    slope = ((x - x_mean) * (y - y_mean)).sum(dim=-1) / wide
    return slope, y_mean[..., 0] - slope * x_mean[..., 0]
