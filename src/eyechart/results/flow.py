"""How information from each input token reaches one token's representation."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eyechart.errors import UsageError
from eyechart.results.base import Result
from eyechart.results.sinks import SinkProfile
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Measure = Literal["attention", "rollout", "path_bound", "norm_rollout", "alti"]
Truth = Literal["sensitivity", "replacement_kl", "replacement_change"]
CHEAP: tuple[Measure, ...] = ("attention", "rollout", "path_bound", "norm_rollout", "alti")
TRUTHS: tuple[Truth, ...] = ("sensitivity", "replacement_kl", "replacement_change")
BY_LAYER = ("attention", "rollout", "norm_rollout", "alti")


@storable
@dataclass(frozen=True, eq=False, repr=False)
class InformationFlow(Result):
    """Several pictures of one flow: from every input position into the chosen token.

    The cheap ones follow attention; the truths are derivatives and interventions; how well each of
    the first agrees with the second is :meth:`agreement`. A picture that was not asked for, or that
    this model does not allow, is None, and in the second case ``unavailable`` says why. Positions
    after the chosen token are 0, padding is NaN.

    Attributes:
        query: The chosen position of each sequence, whose representation is explained.
        target: Where the truths look: "final norm", or "layer l" for the stream out of block l.
        attention: Head-mean attention of the chosen query in each layer, alone.
        rollout: Share of the chosen row of the product of (A + I)/2 of layers 0 to l, A the mean
            over heads (Abnar and Zuidema, arXiv 2005.00928).
        through: Share of the whole model's rollout that goes by each position on its way into
            layer l; entry 0 is the last entry of ``rollout``.
        norm_rollout: As ``rollout``, with each contribution weighted by the length of the vector it
            adds, residual included (Kobayashi et al., arXiv 2004.10102, summed over heads).
        alti: As ``rollout``, with contributions by how much of the L1 length of the block's output
            is lost without them (Ferrando et al., arXiv 2203.04212).
        path_bound: Upper bound on the operator norm of d y / d v_i with attention held fixed
            (Barbero et al., arXiv 2406.04267, Theorem 5.1 and B.5); ``bound_variant`` says which
            form.
        bound_variant: What was taken for the theorem's constants, in words.
        sensitivity: Frobenius norm of d y / d v_i: y the target at the chosen position, v_i the
            stream into the first block at position i (the embedding, with its position).
        sensitivity_interval: Half width of its 99% interval; 0 where it is exact.
        probes: Random vectors behind ``sensitivity``; None where it is exact.
        replacement_kl: Divergence, in nats, of the next-token distribution at the chosen position
            when one token is replaced: KL(original || replaced). NaN where no token was replaced.
        replacement_change: L2 distance that the target moves then, over its L2 length.
        replacement_token: What each token was replaced with; -1 where it was not.
        spread: Relative L2 distance that every layer and position moves when one token is changed;
            entry 0 is the embedding.
        spread_evicted: The same with the first tokens hidden from later queries.
        spread_change: The changed position of each sequence, and the token it was changed to.
        spread_labels: That token as text.
        evicted: How many first tokens were hidden, and from which query on.
        eigenvalues: Of each layer's matrix (A + I)/2, whose spectrum is its diagonal.
        hitting_depth: Expected number of layers until the chosen token's mass sits on the first
            token, if every layer had this layer's matrix; infinite where it cannot get there.
        sinks: The first token against the others.
        sinks_other_bos: The same for the text with the beginning-of-sequence token added or left
            out, whichever the main text did not have; None where the model has no such token or
            token ids were given.
        unavailable: Why a picture that was asked for is missing, by its name.
    """

    query: Int[Tensor, " batch"]
    target: str
    attention: Float[Tensor, "batch layer position"] | None = None
    rollout: Float[Tensor, "batch layer position"] | None = None
    through: Float[Tensor, "batch layer position"] | None = None
    norm_rollout: Float[Tensor, "batch layer position"] | None = None
    alti: Float[Tensor, "batch layer position"] | None = None
    path_bound: Float[Tensor, "batch position"] | None = None
    bound_variant: str | None = None
    sensitivity: Float[Tensor, "batch position"] | None = None
    sensitivity_interval: Float[Tensor, "batch position"] | None = None
    probes: int | None = None
    replacement_kl: Float[Tensor, "batch position"] | None = None
    replacement_change: Float[Tensor, "batch position"] | None = None
    replacement_token: Int[Tensor, "batch position"] | None = None
    spread: Float[Tensor, "batch stream position"] | None = None
    spread_evicted: Float[Tensor, "batch stream position"] | None = None
    spread_change: Int[Tensor, "batch two"] | None = None
    spread_labels: tuple[str, ...] | None = None
    evicted: tuple[int, int] | None = None
    eigenvalues: Float[Tensor, "batch layer position"] | None = None
    hitting_depth: Float[Tensor, "batch layer"] | None = None
    sinks: SinkProfile | None = None
    sinks_other_bos: SinkProfile | None = None
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def sink_share(self) -> Float[Tensor, "batch layer"]:
        """Share of the rollout that sits on the first token after layers 0 to l."""
        return self.by_layer("rollout")[..., 0]

    def by_layer(self, measure: str) -> Float[Tensor, "batch layer position"]:
        """One of the measures that exist at every depth: attention, rollout, norm_rollout, alti.

        Raises:
            UsageError: there is none of that name, or this result does not have it.
        """
        if measure not in BY_LAYER:
            raise UsageError(f"unknown measure {measure!r}; by layer there are {BY_LAYER}")
        return self._there(measure)

    def by_position(self, measure: str) -> Float[Tensor, "batch position"]:
        """A measure or truth of the whole model, one number an input position.

        Attention is averaged over layers; rollouts are taken after the last.

        Raises:
            UsageError: there is none of that name, or this result does not have it.
        """
        if measure not in (*CHEAP, *TRUTHS):
            raise UsageError(f"unknown measure {measure!r}; there are {(*CHEAP, *TRUTHS)}")
        values = self._there(measure)
        if measure == "attention":
            return values.nanmean(dim=1)
        return values[:, -1] if measure in BY_LAYER else values

    def receptive_size(self, measure: str = "rollout") -> Float[Tensor, "batch layer"]:
        """exp of the entropy of a measure over positions: how many tokens it is spread over."""
        shares = self.by_layer(measure).nan_to_num()
        return torch.special.entr(shares).sum(dim=-1).exp()

    def centre(self, measure: str = "rollout") -> Float[Tensor, "batch layer"]:
        """Centre of mass of a measure over positions, in tokens from the start."""
        shares = self.by_layer(measure).nan_to_num()
        return shares @ torch.arange(shares.shape[-1], dtype=shares.dtype)

    def u_shape(self, truth: str = "sensitivity") -> tuple[tuple[float, float], ...]:
        """Of each sequence, the first and the chosen position's value over the median.

        Both above one: the model hears the beginning and the end best (Barbero et al., arXiv
        2406.04267, section 5).
        """
        values = self.by_position(truth)
        ratios = []
        for row, last in zip(values, self.query.tolist(), strict=True):
            middle = float(row[: last + 1].nanmedian())
            ends = (float(row[0]), float(row[last]))
            ratios.append(tuple(end / middle if middle else math.nan for end in ends))
        return tuple(ratios)

    def log_paths(self) -> Float[Tensor, "batch position"]:
        """Natural logarithm of the number of causal paths from each position to the chosen one.

        binomial(n - i + L - 1, L - 1) for the chosen position n and L layers; -inf after n.
        """
        layers = self.layers
        away = (self.query[:, None] - torch.arange(self.sequences.tokens.shape[1])).double()
        counts = (
            torch.lgamma(away.clamp(min=0) + layers)
            - torch.lgamma(away.clamp(min=0) + 1)
            - math.lgamma(layers)
        )
        return counts.masked_fill(away < 0, -torch.inf)

    @property
    def layers(self) -> int:
        """Blocks of the model.

        Raises:
            UsageError: the result holds nothing that has layers.
        """
        for name in (*BY_LAYER, "eigenvalues"):
            if (found := getattr(self, name)) is not None:
                return found.shape[1]
        if self.spread is not None:
            return self.spread.shape[1] - 1
        if self.sinks is not None:
            return self.sinks.mass.shape[1]
        raise UsageError("this result holds nothing measured layer by layer")

    def have(self, *names: str) -> tuple[str, ...]:
        """Which of the pictures this result holds."""
        return tuple(name for name in names if getattr(self, name) is not None)

    def agreement(self) -> "pd.DataFrame":
        """Which picture to trust on this model: Spearman correlation with each truth.

        One row a cheap measure and truth, over the positions of each sequence up to the chosen one:
        mean, lowest and highest over sequences, and their number. A sequence of fewer than three
        measured positions, or a measure without any variation, says nothing and is left out.
        """
        import pandas as pd

        rows = []
        for measure in self.have(*CHEAP):
            for truth in self.have(*TRUTHS):
                found = [rho for rho in self.correlations(measure, truth) if not math.isnan(rho)]
                if found:
                    rows.append(
                        {
                            "measure": measure,
                            "truth": truth,
                            "spearman": sum(found) / len(found),
                            "lowest": min(found),
                            "highest": max(found),
                            "sequences": len(found),
                        }
                    )
        columns = ["measure", "truth", "spearman", "lowest", "highest", "sequences"]
        return pd.DataFrame(rows, columns=columns)

    def correlations(self, measure: str, truth: str) -> tuple[float, ...]:
        """Spearman correlation of a measure with a truth over positions, one a sequence."""
        import pandas as pd

        left, right = self.by_position(measure), self.by_position(truth)
        found = []
        for a, b, last in zip(left, right, self.query.tolist(), strict=True):
            pair = pd.DataFrame({"a": a[: last + 1].numpy(), "b": b[: last + 1].numpy()}).dropna()
            rho = pair.corr(method="spearman").iloc[0, 1] if len(pair) >= 3 else math.nan
            found.append(float(rho))
        return tuple(found)

    def summary(self) -> dict[str, Any]:
        """The numbers of the printed summary, ready for JSON: None where there is no number."""
        return {
            "query": self.query.tolist(),
            "target": self.target,
            "sink_share": None if self.rollout is None else _numbers(self.sink_share[:, -1]),
            "u_shape": {
                truth: [_numbers(torch.tensor(ends)) for ends in self.u_shape(truth)]
                for truth in self.have(*TRUTHS)
            },
            "agreement": self.agreement().to_dict("records"),
            "unavailable": dict(self.unavailable),
        }

    def to_frame(self) -> "pd.DataFrame":
        """One row a (sequence, position) up to the chosen one, with every measure and truth."""
        import pandas as pd

        names = self.have(*CHEAP, *TRUTHS, "sensitivity_interval")
        values = {
            name: getattr(self, name) if name.endswith("interval") else self.by_position(name)
            for name in names
        }
        return pd.DataFrame(
            [
                {"batch": b, "position": i, "token": self.sequences.labels[b][i]}
                | {name: float(value[b, i]) for name, value in values.items()}
                for b, last in enumerate(self.query.tolist())
                for i in range(last + 1)
            ]
        )

    def plot(self) -> "go.Figure":
        """Every measure and truth of the first sequence by position, as shares of its sum."""
        from eyechart.results import flow_figures

        return flow_figures.by_position(self)

    def lines(self) -> tuple[str, ...]:
        """Where the rollout sits, the truth's shape, which measure to trust, what is missing."""
        said = []
        if self.rollout is not None:
            share, size = self.sink_share[0], self.receptive_size()[0]
            said.append(
                f"rollout: {float(share[-1]):.3f} of the chosen row sits on the first token after "
                f"all layers ({float(share[0]):.3f} after the first); effective size "
                f"{float(size[-1]):.3g} tokens"
            )
        for truth in self.have(*TRUTHS):
            first, last = self.u_shape(truth)[0]
            said.append(
                f"{truth.replace('_', ' ')}: first token {first:.3g}, chosen token {last:.3g} "
                "times the median"
            )
        table = self.agreement().sort_values("spearman", ascending=False).to_dict("records")
        for truth in self.have(*TRUTHS):
            ranked = ", ".join(
                f"{row['measure']} {row['spearman']:.2f}" for row in table if row["truth"] == truth
            )
            if ranked:
                said.append(f"agreement with {truth.replace('_', ' ')} (Spearman): {ranked}")
        if self.sinks is not None:
            said.append(
                f"the first token's values have {self.sinks.value_drain:.2f} of the others' length "
                f"(median over heads); its residual stream reaches "
                f"{float(self.sinks.residual.nan_to_num().max()):.3g} times theirs"
            )
        said += [f"{name} not available: {reason}" for name, reason in self.unavailable.items()]
        return tuple(said)

    def _there(self, name: str) -> Tensor:
        found = getattr(self, name)
        if found is None:
            reason = self.unavailable.get(name, "it was not asked for")
            raise UsageError(f"this result has no {name}: {reason}")
        return found


def _numbers(values: Tensor) -> list[float | None]:
    """A list as JSON can hold it."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
