"""How far apart two prompts that differ by little are, layer by layer and length by length."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.results import collapse_figures
from eyechart.results.base import Result
from eyechart.results.fits import PowerLaw, power_law
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_SAME = 4
"""Times the numeric floor under which two prompts count as the same."""

DISTANCES = ("l1", "l2", "linf", "relative", "cosine")


@storable
@dataclass(frozen=True, eq=False, repr=False)
class CollapseCurve(Result):
    """Distance between the last token's representations of two prompts that differ by little.

    Theorem 4.2 of Barbero et al., arXiv 2406.04267: append the last token once more, and the last
    representation hardly moves. The layer axis has an entry for the embedding, one after each
    block, and, where the model has one, a last entry for the final norm's output.

    Attributes:
        family: Which pairs of prompts (:mod:`eyechart.families`).
        lengths: n, what the shorter prompt of each pair has of what is repeated or drawn.
        layer_labels: Names of the entries of the layer axis.
        l1: Sum of absolute differences.
        l2: Euclidean distance.
        linf: Largest absolute difference.
        relative: L1 distance over the L1 length of the longer prompt's representation.
        cosine: One minus the cosine similarity.
        about: What is compared with what, in one line.
        control: Relative distance of the family's control, None where it has none.
        control_name: What the control is, such as "n and n + 3".
        heads: The same five distances of the last layer's heads, each head's mixture of values by
            itself; empty where the architecture does not show them.
        tv: Total variation of the next-token distributions as the paper has it: the sum of absolute
            differences, 0 to 2. ``tv_half`` is the probability by which they differ. None where
            next tokens were not compared.
        kl: KL(shorter || longer) of the next-token distributions, in nats.
        same_argmax: Whether the likeliest next token is the same.
        formats: Number formats in which the final representations were compared.
        identical: Share of coordinates that are the same number in a format.
        expected: The same as the format's spacing at each coordinate's magnitude predicts: the
            chance that two numbers at the measured distance round to one.
        steps: Between the final representations at the longest length, in units of each format's
            spacing at that magnitude.
        unrelated: Median distance of unrelated prompts at every layer, by the distance's name.
        null: Distance of the same prompt from itself in another arrangement of the pass (other
            neighbours, other shapes of the matrices), by the distance's name: the numeric floor.
        null_lengths: The n at which the floor was measured; of a family whose endings branch off,
            it is that of the longest prompt's first n tokens.
        ends: Index in the first row of ``sequences`` of each prompt's last token: shorter, longer
            and, where there is one, control.
        entropy: Nats of a token of the sequence, where tokens are drawn independently.
    """

    family: str
    lengths: tuple[int, ...]
    layer_labels: tuple[str, ...]
    l1: Float[Tensor, "layer length"]
    l2: Float[Tensor, "layer length"]
    linf: Float[Tensor, "layer length"]
    relative: Float[Tensor, "layer length"]
    cosine: Float[Tensor, "layer length"]
    about: str = ""
    control: Float[Tensor, "layer length"] | None = None
    control_name: str = ""
    heads: dict[str, Float[Tensor, "head length"]] = field(default_factory=dict)
    tv: Float[Tensor, " length"] | None = None
    kl: Float[Tensor, " length"] | None = None
    same_argmax: Bool[Tensor, " length"] | None = None
    formats: tuple[str, ...] = ()
    identical: Float[Tensor, "format length"] | None = None
    expected: Float[Tensor, "format length"] | None = None
    steps: Float[Tensor, "format d_model"] | None = None
    unrelated: dict[str, Float[Tensor, " layer"]] = field(default_factory=dict)
    null: dict[str, Float[Tensor, "layer floor"]] = field(default_factory=dict)
    null_lengths: tuple[int, ...] = ()
    ends: Int[Tensor, "length side"] | None = None
    entropy: float | None = None

    @property
    def forward_passes(self) -> int:
        """Forward passes the curve cost."""
        return self.provenance.forward_passes

    @property
    def tv_half(self) -> Float[Tensor, " length"] | None:
        """Total variation with the half: the largest difference in probability of any event."""
        return None if self.tv is None else self.tv / 2

    def tokens(self, n: int) -> tuple[tuple[str, ...], ...]:
        """The tokens of the prompts compared at n: shorter, longer and, if there is one, control.

        Raises:
            UsageError: n was not measured.
        """
        if self.ends is None:
            raise UsageError("this curve was saved by a version that did not keep the prompts")
        labels = self.sequences.labels[0]
        return tuple(
            tuple(labels[node] for node in self.sequences.path(end))
            for end in self.ends[self._index(n)].tolist()
        )

    def onset(self, layer: int = -1, fraction: float = 0.1) -> int | None:
        """Where collapse sets in: the first n from which ``relative`` stays below a fraction.

        The fraction is of the relative distance at the shortest length. None where the distance
        does not stay below it at the longest length measured, or is nothing but rounding from the
        start (no prefix, rotary positions: every repetition is the same, so there is nothing to
        collapse).
        """
        if not 0 < fraction < 1:
            raise UsageError(f"fraction must be between 0 and 1, got {fraction}")
        curve = self.relative[layer].tolist()
        if curve[0] <= self.noise(layer=layer):
            return None
        onset = None
        for length, value in zip(reversed(self.lengths), reversed(curve), strict=True):
            if value >= fraction * curve[0]:
                break
            onset = length
        return onset

    def fit(
        self,
        layer: int = -1,
        distance: str = "relative",
        start: int = 1,
        seed: int = 0,
    ) -> PowerLaw | None:
        """The straight line through the curve on log-log axes, from n = ``start`` on.

        None where fewer than three lengths are above what arithmetic may make.

        Raises:
            UsageError: there is no such distance.
        """
        if distance not in DISTANCES:
            raise UsageError(f"unknown distance {distance!r}; there are {', '.join(DISTANCES)}")
        values = getattr(self, distance)[layer]
        kept = [
            index
            for index, n in enumerate(self.lengths)
            if n >= start and float(values[index]) > self.noise(distance, layer)
        ]
        return power_law([self.lengths[index] for index in kept], values[kept], seed=seed)

    def floor(self, distance: str = "relative", layer: int = -1) -> float:
        """The largest distance that arithmetic alone made at any length; 0 where not measured."""
        return float(self.null[distance][layer].max()) if distance in self.null else 0.0

    def noise(self, distance: str = "relative", layer: int = -1) -> float:
        """The distance that arithmetic may make: below it two prompts count as the same.

        Four times the floor, which is the largest of a few draws only; and for the relative
        distance at least the eps of the model's own format, by which two representations differ
        that were merely rounded differently at the end. The four is a convention: of 24 curves of
        one repeated token with nothing in front, on three models, the largest distance was 1.9
        times the floor.
        """
        eps = torch.finfo(getattr(torch, self.provenance.dtype)).eps
        return max(_SAME * self.floor(distance, layer), eps if distance == "relative" else 0.0)

    def horizon(self, format: str, share: float = 1.0) -> int | None:
        """The collapse horizon: the first n from which both prompts look the same in a format.

        Looks the same: at least ``share`` of the final representation's coordinates are the same
        number, at this n and at every greater one measured. None where that is not so at the
        longest.

        Raises:
            UsageError: the format was not measured, or ``share`` is no share.
        """
        if not 0 < share <= 1:
            raise UsageError(f"share must be above 0 and at most 1, got {share}")
        shares = self._in_format(self.identical, format).tolist()
        horizon = None
        for length, value in zip(reversed(self.lengths), reversed(shares), strict=True):
            if value < share:
                break
            horizon = length
        return horizon

    def predicted_horizon(self, format: str, start: int = 1) -> float | None:
        """The horizon that the format's spacing predicts, beyond the lengths measured if need be.

        Every coordinate is some steps of the format's spacing apart at the longest length, and
        differs after rounding with that chance if the grid lies at random. The steps are scaled by
        the power law of the relative distance (:meth:`fit`, from ``start`` on) to the n at which
        half a coordinate is expected to differ. An extrapolation: it holds as long as the law does.
        None where the distance does not fall.

        Raises:
            UsageError: the format was not measured.
        """
        return self._reached(format, self.fit(start=start))

    def _reached(self, format: str, law: PowerLaw | None) -> float | None:
        """Where a law brings the steps of a format down to half a coordinate."""
        self._in_format(self.identical, format)
        if self.steps is None or law is None or law.slope >= 0:
            return None
        steps = self.steps[self.formats.index(format)].double()
        # Half a coordinate in all is few steps for any one: where none is certain to differ any
        # more, the sum of steps is the number expected; bisection on the logarithm finds the place.
        low, high = -60.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            many = float((steps * math.exp(middle)).clamp(max=1).sum()) > 0.5
            low, high = (low, middle) if many else (middle, high)
        power = low / law.slope + math.log(self.lengths[-1])
        return math.exp(power) if power < 700 else math.inf

    def to_frame(self) -> "pd.DataFrame":
        """One row a (layer, length)."""
        import pandas as pd

        rows = [
            {"layer": label, "length": length}
            | {name: float(getattr(self, name)[i, j]) for name in DISTANCES}
            | ({} if self.control is None else {"control": float(self.control[i, j])})
            for i, label in enumerate(self.layer_labels)
            for j, length in enumerate(self.lengths)
        ]
        return pd.DataFrame(rows)

    def horizons(self) -> "pd.DataFrame":
        """One row a format: shares at both ends of the curve, the horizon seen and predicted."""
        import pandas as pd

        if self.identical is None or self.expected is None:
            return pd.DataFrame()
        law = self.fit()
        return pd.DataFrame(
            {
                "format": name,
                "identical_first": float(self.identical[index, 0]),
                "identical_last": float(self.identical[index, -1]),
                "expected_last": float(self.expected[index, -1]),
                "horizon": self.horizon(name),
                "predicted_horizon": self._reached(name, law),
            }
            for index, name in enumerate(self.formats)
        )

    def plot(self) -> "go.Figure":
        """Relative distance by length, log-log: layers, heads, control, references and formats."""
        return collapse_figures.curves(self)

    def lines(self) -> tuple[str, ...]:
        """The first and last distance, where collapse sets in, and how fast it goes."""
        first, last = (float(self.relative[-1, i]) for i in (0, -1))
        where = self.layer_labels[-1]
        said = [
            f"{self.family}: {self.about}" if self.about else self.family,
            f"{where}: relative distance goes from {first:.3g} at n={self.lengths[0]} to "
            f"{last:.3g} at n={self.lengths[-1]}",
        ]
        if self.control is not None:
            said.append(
                f"control, {self.control_name}: from {float(self.control[-1, 0]):.3g} to "
                f"{float(self.control[-1, -1]):.3g}"
            )
        onset, law = self.onset(), self.fit()
        said.append(
            f"collapse sets in at n={onset} (below a tenth of the first distance from there on)"
            if onset is not None
            else f"no collapse to a tenth of the first distance up to n={self.lengths[-1]}"
        )
        if law is not None:
            said.append(f"slope on log-log axes {law}")
        if self.unrelated:
            said.append(
                f"unrelated prompts are {float(self.unrelated['relative'][-1]):.3g} apart, and "
                f"arithmetic alone makes {self.floor():.2g}"
            )
        return tuple(said)

    def _index(self, n: int) -> int:
        if n not in self.lengths:
            raise UsageError(f"n={n} was not measured; there are {list(self.lengths)}")
        return self.lengths.index(n)

    def _in_format(self, shares: Tensor | None, format: str) -> Float[Tensor, " length"]:
        if shares is None or format not in self.formats:
            there = ", ".join(self.formats) or "none"
            raise UsageError(f"format {format!r} was not measured; there are {there}")
        return shares[self.formats.index(format)]
