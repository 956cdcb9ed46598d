"""How far a text's token representations have become one and the same, layer by layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.results import figures
from eyechart.results.base import Result
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MEASURES = (
    "residual",
    "effective_rank",
    "matrix_entropy",
    "matrix_entropy_normalised",
    "mean_cosine",
)

# Dark enough for a white page and light enough for a dark one.
_COLOURS = {
    "full": figures.GREY,
    "no MLP": "#4f7fd0",
    "no skip": "#b07d12",
    "attention only": "#d1495b",
}


@storable
@dataclass(frozen=True, eq=False, repr=False)
class RankCollapse(Result):
    """Spectral measures of the states X ``[token d_model]`` of each text at every depth.

    Every measure is there twice: of all tokens, and ``_without_first`` of all but the first, whose
    massive activations alone can make a stream look as if it had little rank. The layer axis has an
    entry for the embedding, one after each block, and, where the model has one, a last entry for
    the final norm's output. A measure that is not defined is NaN: everything for a state that is
    zero or a text without tokens left, and what compares tokens where there is only one.

    Attributes:
        variants: Names of the passes with the same weights: "full", "no MLP" (the MLPs write
            nothing), "no skip" (no residual connection: Dong et al.'s SAN + MLP), "attention only"
            (neither: their SAN).
        layer_labels: Names of the entries of the layer axis.
        unavailable: Variants that this model does not allow, and why.
        residual: ``|X - 1 m^T| / |X|``, from 0 (all tokens alike; rounding leaves some 1e-7 in
            float32) to below 2, where m is the mean over tokens and ``|X|`` the composite norm, the
            square root of the induced 1-norm (largest column sum of magnitudes) times the induced
            infinity-norm (largest row sum). Dong et al., arXiv 2103.03404: they define m as what
            makes the residual least, and take the mean in their figures, as here.
        effective_rank: Exponential of the entropy (nats) of X's singular values over their sum;
            from 1 to the number of tokens or dimensions. Roy and Vetterli, EUSIPCO 2007.
        matrix_entropy: Entropy (nats) of the eigenvalues of ``X X^T`` over their sum. The S_1 of
            Skean et al., arXiv 2502.02013, of the states as they are.
        matrix_entropy_normalised: The same after the mean over tokens is taken off and every row
            brought to unit length, over the logarithm of the number of tokens; from 0 to 1. So in
            the code of Skean et al., but that nothing of the Gram matrix is clamped here.
        mean_cosine: Mean cosine of all pairs of two tokens; 1 is rank collapse. Noci et al.,
            arXiv 2206.03126. Tokens whose state is zero have no direction and are left out.
    """

    variants: tuple[str, ...]
    layer_labels: tuple[str, ...]
    unavailable: dict[str, str]
    residual: Float[Tensor, "variant text layer"]
    effective_rank: Float[Tensor, "variant text layer"]
    matrix_entropy: Float[Tensor, "variant text layer"]
    matrix_entropy_normalised: Float[Tensor, "variant text layer"]
    mean_cosine: Float[Tensor, "variant text layer"]
    residual_without_first: Float[Tensor, "variant text layer"]
    effective_rank_without_first: Float[Tensor, "variant text layer"]
    matrix_entropy_without_first: Float[Tensor, "variant text layer"]
    matrix_entropy_normalised_without_first: Float[Tensor, "variant text layer"]
    mean_cosine_without_first: Float[Tensor, "variant text layer"]

    @property
    def blocks(self) -> slice:
        """The stream's part of the layer axis: embedding and blocks, without the final norm."""
        return slice(0, len(self.layer_labels) - (self.layer_labels[-1] == "final norm"))

    def of(
        self, measure: str, variant: str = "full", *, without_first: bool = False
    ) -> Float[Tensor, "text layer"]:
        """One measure of one variant.

        Raises:
            UsageError: there is no such measure, or the variant was not measured; says why.
        """
        if measure not in MEASURES:
            raise UsageError(f"unknown measure {measure!r}; there are {', '.join(MEASURES)}")
        if variant not in self.variants:
            why = self.unavailable.get(variant, f"measured were {', '.join(self.variants)}")
            raise UsageError(f"no variant {variant!r} here: {why}")
        values = getattr(self, f"{measure}_without_first" if without_first else measure)
        return values[self.variants.index(variant)]

    def onset(self, variant: str = "attention only", below: float = 0.1) -> int | None:
        """Where the stream has collapsed: the layer from which the residual stays below a bound.

        Of the mean over texts, as an index of the layer axis; None where it does not. The bound is
        a convention.
        """
        curve = self.of("residual", variant).nanmean(dim=0)[self.blocks]
        above = (~(curve < below)).nonzero()
        onset = int(above[-1]) + 1 if len(above) else 0
        return onset if onset < len(curve) else None

    def dips(
        self, measure: str = "effective_rank", *, without_first: bool = False
    ) -> Float[Tensor, "text layer"]:
        """How far below its surroundings a measure of the full stream is, from 0 to 1.

        One minus the value over what it reaches on both sides, that is over the lower of the
        highest value up to this layer and the highest from it on; embedding and blocks only. A
        valley is a dip far from both ends.
        """
        curve = self.of(measure, without_first=without_first)[:, self.blocks]
        before = curve.cummax(dim=1).values
        after = curve.flip(1).cummax(dim=1).values.flip(1)
        return 1 - curve / torch.minimum(before, after)

    def to_frame(self) -> "pd.DataFrame":
        """One row a (variant, text, layer, tokens), tokens being "all" or "without the first"."""
        import pandas as pd

        texts = range(len(self.sequences.lengths))
        parts = []
        for index, variant in enumerate(self.variants):
            for tokens, suffix in (("all", ""), ("without the first", "_without_first")):
                labels = [(variant, t, label, tokens) for t in texts for label in self.layer_labels]
                part = pd.DataFrame(labels, columns=["variant", "text", "layer", "tokens"])
                for name in MEASURES:
                    part[name] = getattr(self, name + suffix)[index].flatten().numpy()
                parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def plot(self) -> "go.Figure":
        """Residual by layer for every variant; effective rank with and without the first token.

        Means over texts.
        """
        from plotly.subplots import make_subplots

        titles = ("residual, relative to the states", "effective rank of the full stream")
        figure = make_subplots(cols=2, horizontal_spacing=0.1, subplot_titles=titles)
        labels = [figures.plain(label) for label in self.layer_labels]

        def draw(column: int, name: str, values: Tensor, line: dict[str, object]) -> None:
            # Exactly zero has no place on a logarithmic axis: leave a gap.
            (kept,) = figures.rows(
                values.nanmean(dim=0).where(values.ne(0).any(0), torch.nan)[None]
            )
            figure.add_scatter(
                x=labels,
                y=kept,
                name=name,
                mode="lines",
                line=line,
                hovertemplate=f"{name}, %{{x}}: %{{y:.3g}}<extra></extra>",
                row=1,
                col=column,
            )

        for variant in self.variants:
            line = {"color": _COLOURS[variant], "width": 4 if variant == "full" else 2}
            draw(1, variant, self.of("residual", variant), line)
        for name, without in (("all tokens", False), ("without the first", True)):
            line = {"color": _COLOURS["full"], "width": 4, "dash": "dot" if without else "solid"}
            draw(2, name, self.of("effective_rank", without_first=without), line)
        figure.update_xaxes(dtick=figures.step(len(labels)))
        figure.update_yaxes(type="log", exponentformat="power", row=1, col=1)
        figure.update_yaxes(rangemode="tozero", row=1, col=2)
        return figures.dress(figure, height=420)

    def lines(self) -> tuple[str, ...]:
        """Where the variants end, where they collapse, and what the first token does to rank."""
        return (*self._collapse(), self._rank(), *self._missing())

    def _collapse(self) -> tuple[str, ...]:
        last = self.blocks.stop - 1
        ends = ", ".join(
            f"{variant} {float(self.of('residual', variant)[:, last].nanmean()):.2g}"
            for variant in self.variants
        )
        onsets = {variant: self.onset(variant) for variant in self.variants}
        fallen = "; ".join(
            f"{variant}: never" if at is None else f"{variant}: from {self.layer_labels[at]} on"
            for variant, at in onsets.items()
        )
        return (
            f"residual relative to the states, after the last block: {ends}",
            f"tokens have become alike (below 0.1 and staying there): {fallen}",
        )

    def _rank(self) -> str:
        whole, rest = (
            (
                self.of("effective_rank", without_first=without).nanmean(dim=0),
                self.dips(without_first=without).nanmean(dim=0),
            )
            for without in (False, True)
        )
        at = int(whole[1].nan_to_num(-1).argmax())
        return (
            f"effective rank dips most at {self.layer_labels[at]}: {float(whole[0][at]):.3g}, "
            f"{float(whole[1][at]):.0%} below both sides; without the first token "
            f"{float(rest[0][at]):.3g}, {float(rest[1][at]):.0%}"
        )

    def _missing(self) -> tuple[str, ...]:
        reasons: dict[str, list[str]] = {}
        for variant, why in self.unavailable.items():
            reasons.setdefault(why, []).append(variant)
        return tuple(f"no {', no '.join(map(repr, v))}: {why}" for why, v in reasons.items())
