"""The census of heads: what each looks at, what it is for, and what it costs."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import UInt8
from torch import Tensor

from eyechart.results import head_figures
from eyechart.results.base import Result, head_name
from eyechart.results.head_names import KINDS, MIXED, HeadNames
from eyechart.results.head_set import HeadPrice, HeadSet
from eyechart.results.head_trials import REPLACEMENTS, HeadTrials
from eyechart.results.rotary import RotaryUse
from eyechart.results.storage import storable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

DORMANT, AWAKE = 0.8, 0.5
"""Mean mass on the first token from which a head sleeps on a domain, and below which it is awake.
The first is what Guo et al., arXiv 2410.13835, see in a dormant head."""

STEPS = 255
"""Patterns are kept as whole numbers of this many steps, for looking at."""


@storable
@dataclass(frozen=True, eq=False, repr=False)
class HeadCensus(Result):
    """Every head named, tried and priced.

    Attributes:
        names: What each head looks at, on ``sequences``.
        trials: What replacing it costs, on texts that named nothing.
        budget: KL in nats under which a replaced head counts as a no-op.
        rotary: How heads use rotary frequencies, None where there is no rotation.
        together: The largest set of heads that can go at once.
        price: What attention costs, and what of it that set is to blame for.
        patterns: Attention of every head on the first text's first tokens, in 255ths.
        unavailable: Why a part is missing, by its name.
    """

    names: HeadNames
    trials: HeadTrials
    budget: float
    rotary: RotaryUse | None = None
    together: HeadSet | None = None
    price: HeadPrice | None = None
    patterns: UInt8[Tensor, "layer head query key"] | None = None
    unavailable: dict[str, str] = field(default_factory=dict)

    def no_ops(self, budget: float | None = None) -> tuple[tuple[int, int, str], ...]:
        """Heads that can be replaced one at a time, as ``(layer, head, replacement)``.

        Args:
            budget: KL in nats that each may cost; the census's own by default.

        Raises:
            UsageError: the budget is not positive.
        """
        verdicts = self.trials.verdicts(self.budget if budget is None else budget)
        return tuple(
            (layer, head, replacement)
            for layer, row in enumerate(verdicts)
            for head, (verdict, replacement) in enumerate(row)
            if verdict == "no-op"
        )

    def scores(self) -> "pd.DataFrame":
        """Every score of every head: its mean and spread over texts, beside chance.

        ``spread`` is the standard deviation over texts (NaN for one text); ``evidence`` what of
        the mean chance does not explain, with its 95% interval; ``chance`` the score under uniform
        attention; ``shuffled`` what shuffled keys would exceed once in a thousand.
        """
        import pandas as pd

        rows = []
        for name, texts in self.names.scores.items():
            mean, spread = self.names.score(name), texts.std(dim=0)
            columns = {
                "mean": mean,
                "spread": spread,
                "evidence": self.names.evidence(name),
                "low": self.names.low[name],
                "high": self.names.high[name],
                "shuffled": self.names.shuffled[name],
            }
            for layer, head in (~mean.isnan()).nonzero().tolist():
                found = {each: float(x[layer, head]) for each, x in columns.items()}
                where = {"layer": layer, "head": head, "score": name}
                rows.append({**where, **found, "chance": self.names.chance[name]})
        return pd.DataFrame(rows)

    def domains(self) -> "pd.DataFrame":
        """Every head on every domain: mass on the first token, status, and what zeroing it costs.

        ``status`` is "dormant" where the mean mass on the first token is at least 0.8, "active"
        below 0.5, "drowsy" between. ``kl_zero`` is NaN where no held-out text is of that domain.
        """
        import pandas as pd

        sink, zero = self.names.by_domain("sink"), self.trials.by_domain("zero")
        rows = []
        for domain, mass in sink.items():
            for layer, of_layer in enumerate(mass.tolist()):
                for head, value in enumerate(of_layer):
                    if value != value:
                        continue
                    status = "dormant" if value >= DORMANT else "drowsy"
                    rows.append(
                        {
                            "layer": layer,
                            "head": head,
                            "domain": domain,
                            "sink": value,
                            "status": "active" if value < AWAKE else status,
                            "kl_zero": float(zero[domain][layer, head])
                            if domain in zero
                            else float("nan"),
                        }
                    )
        return pd.DataFrame(rows)

    def changing(self) -> "pd.DataFrame":
        """Heads that sleep on one domain and work on another, the widest awake first.

        One row a head: the domains on which it is dormant and active, and the range of its mass on
        the first token.
        """
        import pandas as pd

        columns = ["layer", "head", "dormant", "active", "lowest", "highest"]
        heads: dict[tuple[int, int], list[tuple[str, str, float]]] = {}
        for layer, head, domain, sink, status, _ in self.domains().itertuples(index=False):
            heads.setdefault((layer, head), []).append((domain, status, sink))
        rows = []
        for at, of_head in sorted(heads.items()):
            asleep, awake = (
                [domain for domain, status, _ in of_head if status == wanted]
                for wanted in ("dormant", "active")
            )
            if asleep and awake:
                masses = [sink for *_, sink in of_head]
                said = ", ".join(asleep), ", ".join(awake)
                rows.append([*at, *said, min(masses), max(masses)])
        found = pd.DataFrame(rows, columns=columns)
        return found.sort_values("lowest", ignore_index=True)

    def to_frame(self) -> "pd.DataFrame":
        """One row a head with attention.

        ``kind``; the scores; ``evidence`` for the kind with its interval; what each replacement
        costs (``kl_zero``, ``kl_zero_low``, ...; NaN where it was not tried) and does to the loss
        (``loss_zero``, ...); ``verdict``, ``replacement`` and what a head that can be replaced so
        is; what it costs (``cost_flops``, ``cost_kv_bytes``, at the length of ``price``); whether
        it is in the set that can go ``together``.
        """
        import pandas as pd

        kinds, scores = self.names.kinds(), {name: self.names.score(name) for name in KINDS}
        verdicts = self.trials.verdicts(self.budget)
        of_kind = {kind: name for name, kind in KINDS.items()}
        together = {head[:2] for head in self.together.heads} if self.together else set()
        costs = {name: self.trials.cost(name) for name in self.trials.kl}
        losses = {name: self.trials.loss_change(name) for name in self.trials.kl}
        rows = []
        for layer, row in enumerate(kinds):
            for head, kind in enumerate(row):
                if not kind:
                    continue
                at = (layer, head)
                name = of_kind.get(kind)
                found = {"layer": layer, "head": head, "kind": kind}
                found |= {each: float(x[at]) for each, x in scores.items()}
                for end, of in (("", None), ("_low", self.names.low), ("_high", self.names.high)):
                    value = float("nan")
                    if name is not None:
                        value = float((self.names.evidence(name) if of is None else of[name])[at])
                    found[f"evidence{end}"] = value
                found["smallest_diagonal"] = float(self.names.smallest_diagonal[at])
                if self.rotary is not None:
                    found["q_high"] = float(self.rotary.q_high[at])
                    found["k_high"] = float(self.rotary.k_high[at])
                for each in costs:
                    found[f"kl_{each}"] = float(costs[each][at])
                    found[f"kl_{each}_low"] = float(self.trials.low[each][at])
                    found[f"kl_{each}_high"] = float(self.trials.high[each][at])
                    found[f"loss_{each}"] = float(losses[each][at])
                    found[f"loss_{each}_low"] = float(self.trials.loss_low[each][at])
                    found[f"loss_{each}_high"] = float(self.trials.loss_high[each][at])
                found["verdict"], found["replacement"] = verdicts[layer][head]
                found["meaning"] = REPLACEMENTS.get(found["replacement"], "")
                found["together"] = at in together
                price = self.price
                found["cost_flops"] = float(price.flops[at]) if price else float("nan")
                found["cost_kv_bytes"] = float(price.kv_bytes[at]) if price else float("nan")
                rows.append(found)
        return pd.DataFrame(rows)

    def plot(self) -> "go.Figure":
        """The kind of every head, and which of them do nothing."""
        verdicts = self.trials.verdicts(self.budget)
        return head_figures.census_map(
            self.names.kinds(), [[v for v, _ in row] for row in verdicts]
        )

    def lines(self) -> tuple[str, ...]:
        """How many heads of each kind, the no-ops, the set, its price."""
        kinds = Counter(kind for row in self.names.kinds() for kind in row if kind)
        verdicts = Counter(v for row in self.trials.verdicts(self.budget) for v, _ in row if v)
        said = [
            ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
            f"{verdicts['no-op']} of {verdicts.total()} heads are no-ops: replaced cheaply, each"
            f" costs under {self.budget:g} nats; {verdicts['active']} are active, of "
            f"{verdicts['depends']} it cannot be said",
        ]
        ways = Counter(replacement for *_, replacement in self.no_ops())
        if ways:
            named = (f"{ways[name]} by {name}" for name in REPLACEMENTS if ways[name])
            said.append(f"replaced {', '.join(named)}")
        if self.rotary is not None:
            positional = self.names.score("diagonal").maximum(self.names.score("previous"))
            said.append(
                "diagonal and previous-token scores go with fast rotary frequencies: "
                f"Spearman {self.rotary.agreement(positional):.2f}"
            )
        if (changing := len(self.changing())) > 0:
            said.append(f"{changing} heads sleep on one domain and work on another")
        if self.together is not None:
            found = self.together
            chance = f"{found.factor:.1f} times as many as at random"
            if not math.isfinite(found.factor):
                chance = "at random not one"
            line = (
                f"{len(found.heads)} heads can go at once for {float(found.kl.mean()):.3f} nats "
                f"({chance})"
            )
            if found.unseen_loss is not None:
                line += (
                    f"; on unseen text the loss changes by {float(found.unseen_loss.mean()):+.3f}"
                )
            said.append(line)
        if self.price is not None and self.together is not None:
            price = self.price
            said.append(
                f"at {price.context} tokens they are {price.share:.0%} of the operations of "
                f"attention, which without them takes {price.time:.2f} of its time"
            )
        said += [f"{part} is missing: {reason}" for part, reason in self.unavailable.items()]
        return tuple(said)

    def summary(self) -> dict[str, Any]:
        """The numbers of the printed summary, ready for JSON: None where there is no number."""
        verdicts = Counter(v for row in self.trials.verdicts(self.budget) for v, _ in row if v)
        changing = self.changing()[["layer", "head", "dormant", "active"]]
        found, price = self.together, self.price
        said: dict[str, Any] = {
            "kinds": {
                kind: list(heads)
                for kind in (*KINDS.values(), MIXED)
                if (heads := self.heads_named(kind))
            },
            "budget": self.budget,
            "verdicts": {verdict: verdicts[verdict] for verdict in ("no-op", "active", "depends")},
            "no_ops": [
                {"head": head_name(layer, head), "replacement": replacement}
                for layer, head, replacement in self.no_ops()
            ],
            "changing": [
                {"head": head_name(layer, head), "dormant": dormant, "active": active}
                for layer, head, dormant, active in changing.itertuples(index=False)
            ],
            "unavailable": dict(self.unavailable),
        }
        if found is not None:
            said["together"] = {
                "heads": [head_name(layer, head) for layer, head, _ in found.heads],
                "budget": found.budget,
                "kl": float(found.kl.mean()),
                "factor": found.factor if math.isfinite(found.factor) else None,
                "unseen_loss": None
                if found.unseen_loss is None
                else float(found.unseen_loss.mean()),
            }
        if price is not None and found is not None:
            said["price"] = {
                "context": price.context,
                "share": price.share,
                "time": price.time,
            }
        return said

    def heads_named(self, kind: str) -> tuple[str, ...]:
        """Short names of the heads of a kind, such as ``L11H6``."""
        return tuple(
            head_name(layer, head)
            for layer, row in enumerate(self.names.kinds())
            for head, found in enumerate(row)
            if found == kind
        )
