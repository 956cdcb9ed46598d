"""Whether a model can take several prompts that share their beginnings as one row, found by trying.

It must take positions as they are given and mix tokens nowhere but in attention that can be taken
over. A convolution, a state that is handed on, or positions counted by the model itself show in a
rehearsal on a few tokens, once a model; nothing depends on a list of architectures.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eyechart.errors import EyechartError
from eyechart.models.facts import ModelFacts, check_evaluating
from eyechart.probes.forward import Pass
from eyechart.probes.kept import Observations
from eyechart.probes.plan import Rehearsals, plan_of
from eyechart.probes.probe import Look, Probe
from eyechart.results.base import Provenance
from eyechart.results.sequences import Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# Branches at several depths, one of them of a branch, as indices of the tokens before them.
_PARENTS = (*range(-1, 15), 3, 16, 9, 18, 19, 17, 12)
# Shares of the stream's length that rounding explains; a wrong position moves it by more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
_HALF_TOLERANCE = 0.05


def why_not_branching(model: "TransformerBridge", facts: ModelFacts) -> str:
    """The reason why prompts must go through this model one by one; empty where they need not.

    Raises:
        InputError: the model is in training mode.
    """
    check_evaluating(model)
    plan = plan_of(model, facts)
    if plan.reasons:
        layer, reason = next(iter(sorted(plan.reasons.items())))
        return f"layer {layer}: {reason}"
    return _REASONS.of(model, facts)


def _rehearse(model: "TransformerBridge", facts: ModelFacts) -> str:
    tokens = [(index * 7 + 3) % facts.vocabulary for index in range(len(_PARENTS))]
    if facts.n_ctx is not None and facts.n_ctx < len(_PARENTS):
        return f"it sees {facts.n_ctx} tokens only"
    parents = torch.tensor([_PARENTS])
    tree = Sequences(
        tokens=torch.tensor([tokens]),
        mask=torch.ones_like(parents, dtype=torch.bool),
        labels=(tuple(map(str, tokens)),),
        parents=parents,
    )
    leaves = [index for index in range(len(tokens)) if index not in _PARENTS]
    paths = [_path(leaf) for leaf in leaves]
    rows = Sequences.from_rows(
        [[tokens[node] for node in path] for path in paths],
        [[str(tokens[node]) for node in path] for path in paths],
    )
    probe, layers = _Streams(), facts.attention_layers
    try:
        found, truth = (Pass(model, x, [(probe, ("resid_post",))], layers) for x in (tree, rows))
        found.forward()
        truth.forward()
    except (EyechartError, TypeError, ValueError, RuntimeError, IndexError) as problem:
        lines = str(problem).splitlines()
        return f"it does not take positions as they are given ({lines[0] if lines else problem!r})"
    last = facts.n_layers - 1
    ours = found.kept[0]["resid_post", "stream"].layers()[last][0]
    theirs = truth.kept[0]["resid_post", "stream"].layers()[last]
    for row, path in zip(theirs, paths, strict=True):
        there = row[: len(path)].double()
        error = float(((ours[path].double() - there).norm(dim=-1) / there.norm(dim=-1)).max())
        if not error <= _TOLERANCE.get(facts.dtype, _HALF_TOLERANCE):
            return (
                f"prompts that share tokens come out otherwise than alone (by {error:.2g} of their "
                "length): its positions are its own, or not only attention mixes tokens"
            )
    return ""


_REASONS = Rehearsals(_rehearse)


def _path(node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = _PARENTS[node]
    return path[::-1]


class _Streams(Probe[None]):
    """Keeps the stream out of every block."""

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        return ("resid_post",)

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        return {"stream": activation}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> None:
        return None
