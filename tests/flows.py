"""An information flow that no model made, for tests of what shows one."""

from typing import Any

import torch
from torch import Tensor

from eyechart.results import InformationFlow, Provenance, Sequences, SinkProfile

LABELS = ("<s>", "The", " lamp", " burned", " low", " and", " slept", ".")


def made_up_flow(
    labels: tuple[str, ...] = LABELS, *, layers: int = 3, heads: int = 4, **changes: Any
) -> InformationFlow:
    """Every picture, of one sequence whose last token is explained; ``changes`` replace fields."""
    length = len(labels)
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw) + 0.01

    def shares(depth: int) -> Tensor:
        values = random(1, depth, length)
        return values / values.sum(dim=-1, keepdim=True)

    spread = random(1, layers + 1, length)
    spread[:, :, :2] = 0
    spread[:, 0, 3:] = 0
    fields: dict[str, Any] = {
        "sequences": Sequences.from_rows(
            [list(range(length))], [list(labels)], prepend_bos=True, name="made-up prompt"
        ),
        "provenance": PROVENANCE,
        "query": torch.tensor([length - 1]),
        "target": "final norm",
        "attention": shares(layers),
        "rollout": shares(layers),
        "through": shares(layers),
        "norm_rollout": shares(layers),
        "alti": shares(layers),
        "path_bound": random(1, length),
        "bound_variant": "operator norms of the blocks",
        "sensitivity": random(1, length),
        "sensitivity_interval": random(1, length) / 10,
        "probes": 16,
        "replacement_kl": random(1, length),
        "replacement_change": random(1, length),
        "replacement_token": torch.full((1, length), 7),
        "spread": spread,
        "spread_evicted": spread / 2,
        "spread_change": torch.tensor([[2, 7]]),
        "spread_labels": ("<b>new</b>",),
        "evicted": (1, 3),
        "eigenvalues": random(1, layers, length),
        "hitting_depth": random(1, layers),
        "sinks": _sinks(random, layers, heads, prepend_bos=True),
        "sinks_other_bos": _sinks(random, layers, heads, prepend_bos=False),
    }
    return InformationFlow(**fields | changes)


def _sinks(random: Any, layers: int, heads: int, prepend_bos: bool) -> SinkProfile:
    by_head = (1, layers, heads)
    return SinkProfile(
        prepend_bos=prepend_bos,
        mass=random(1, layers) / 2,
        rate=random(layers) / 2,
        value_norm=random(*by_head),
        output_norm=random(*by_head),
        key_norm=random(*by_head),
        cosine=random(*by_head) / 2,
        cosine_others=-random(*by_head) / 2,
        residual=random(1, layers + 1) * 100,
    )


PROVENANCE = Provenance(
    versions={"eyechart": "0"},
    model="made-up",
    weights="0" * 64,
    dtype="float32",
    device="cpu",
    attention="pattern",
    tokens="0" * 64,
    seed=0,
    hooks={"pattern": 3},
    forward_passes=4,
    wall_seconds=1.5,
    peak_bytes=None,
    created="2026-01-01T00:00:00+00:00",
)
