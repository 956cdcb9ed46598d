"""Every family: heads equal to what transformers computes, alone, padded, and with its stream."""

import re

import pytest
import torch
from families import (
    FAMILIES,
    FLOW_WITHOUT,
    NO_HALF_RUN,
    NO_STREAM,
    REASONS,
    ROUNDED,
    TABLE,
    UNFUSED,
    beside_plain,
    built,
    table,
)
from transformers import AutoModelForCausalLM

import eyechart
from eyechart.attention.probe import reduce_pattern
from eyechart.errors import CaptureError
from eyechart.flow import MEASURES
from eyechart.kernels import seers
from eyechart.results import STATISTICS

LENGTH = 21  # longer than the windows


pytestmark = pytest.mark.filterwarnings("ignore::eyechart.errors.FallbackWarning")


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_what_transformers_computes(family):
    ids = torch.randint(3, 250, (2, LENGTH))
    with built(family) as folder:
        model = eyechart.load(str(folder), device="cpu")
        plain = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
    with torch.no_grad():
        patterns = plain(ids, output_attentions=True).attentions
    patterns = [pattern for pattern in patterns if pattern is not None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    for backend in ("pattern", "fused"):
        expected = "pattern" if family in UNFUSED else backend
        found = eyechart.attention_statistics(model, ids, backend=backend)
        layers = [layer for layer, how in enumerate(found.backend) if how == expected]
        assert len(patterns) == len(layers) >= 1 and set(found.backend) <= {expected, "none"}
        told = [reason for reason in found.reasons if reason]
        assert len(told) == (len(layers) if backend != expected else 0)
        for layer, pattern in zip(layers, patterns, strict=True):
            truth = reduce_pattern(pattern, ids, mask)
            truth["received"] /= seers(mask)[:, None]
            for name, value in truth.items():
                ours = getattr(found, name)[:, layer]
                torch.testing.assert_close(ours, value, atol=2e-5, rtol=1e-4)

        texts = ["A longer line of text.", "Short."]
        together, alone = (
            eyechart.attention_statistics(model, t, backend=backend) for t in (texts, texts[1])
        )
        count = alone.first.shape[-1]
        for name in (*STATISTICS, "received"):
            ours, theirs = getattr(together, name)[1, ..., :count], getattr(alone, name)[0]
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, equal_nan=True)

    if family in NO_STREAM:
        with pytest.raises(CaptureError, match="cannot be tied to one place"):
            eyechart.residual_norms(model, ids)
    else:
        stream = eyechart.residual_norms(model, ids)
        with torch.no_grad():
            states = plain(ids, output_hidden_states=True).hidden_states
        assert stream.final_norm is not None
        torch.testing.assert_close(stream.final_norm, states[-1].norm(dim=-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_formats_are_read_or_refused(family):
    ids = torch.randint(3, 250, (2, LENGTH))
    with built(family) as folder:
        half, full = (
            eyechart.load(str(folder), device="cpu", dtype=dtype)
            for dtype in ("bfloat16", "float32")
        )
    if family in ROUNDED:
        with pytest.raises(CaptureError, match="only after rounding it to bfloat16"):
            eyechart.attention_statistics(half, ids, backend="pattern")
        with pytest.raises(CaptureError, match="comes after the softmax"):
            eyechart.capture(full, ids, [eyechart.Record("scores")])
    if family in NO_HALF_RUN:
        with pytest.raises(RuntimeError, match="dtype"):
            eyechart.attention_statistics(half, ids, backend="pattern")
    if family in ROUNDED & UNFUSED:
        with pytest.raises(CaptureError, match="only after rounding it to bfloat16"):
            eyechart.attention_statistics(half, ids)
        return
    ours, truth = (eyechart.attention_statistics(model, ids) for model in (half, full))
    assert family in UNFUSED or "pattern" not in ours.backend
    for name in ("first", "diagonal", "previous", "largest"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(truth, name), atol=2e-2, rtol=0, equal_nan=True
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_information_flow_is_that_of_transformers_attention_and_streams(family):
    ids = torch.randint(3, 250, (2, LENGTH))
    model, plain = beside_plain(family)
    found = eyechart.information_flow(model, ids, probes=2, replacements=[5])
    without = {name: why for why, names in FLOW_WITHOUT.get(family, {}).items() for name in names}
    assert set(found.unavailable) == set(without)
    for name, reason in found.unavailable.items():
        assert re.search(REASONS[without[name]][0], reason), (name, reason)
    fields = {"topology": "hitting_depth", "replacement": "replacement_kl"}
    for name in MEASURES:
        assert (getattr(found, fields.get(name, name)) is None) == (name in without), name
    assert (found.spread_evicted is None) == bool({"spread", "spread_evicted"} & set(without))

    with torch.no_grad():
        ran = plain(ids, output_attentions=True, output_hidden_states=True)
    patterns = [pattern for pattern in ran.attentions if pattern is not None]
    assert ("rollout" in without) == (len(patterns) < plain.config.num_hidden_layers)
    if found.rollout is not None:
        product = torch.eye(LENGTH)
        for layer, pattern in enumerate(patterns):
            product = (pattern.mean(dim=1) + torch.eye(LENGTH)) / 2 @ product
            row = product[:, -1] / product[:, -1].sum(dim=-1, keepdim=True)
            torch.testing.assert_close(found.rollout[:, layer], row, atol=1e-5, rtol=1e-4)
    if found.replacement_kl is not None and found.replacement_token is not None:
        replaced = ids.clone()
        replaced[:, 5] = found.replacement_token[:, 5]
        with torch.no_grad():
            logits = [plain(x).logits[:, -1].double() for x in (ids, replaced)]
        p, q = (x.softmax(dim=-1) for x in logits)
        kl = (p * (p / q).log()).sum(dim=-1).float()
        torch.testing.assert_close(found.replacement_kl[:, 5], kl, atol=1e-6, rtol=1e-2)
    if found.sinks is None or found.spread is None or found.spread_change is None:
        return
    there = ~found.sinks.mass.isnan().all(dim=0)
    mass = torch.stack([pattern[..., 0].mean(dim=(1, 2)) for pattern in patterns], dim=1)
    torch.testing.assert_close(found.sinks.mass[:, there], mass, atol=1e-5, rtol=1e-4)
    # Without a seam the vectors behind a pattern are not seen.
    vectors = (found.sinks.value_norm, found.sinks.key_norm, found.sinks.cosine)
    for values in vectors:
        assert values[:, there].isnan().all() == values[:, there].isnan().any()
        assert bool(values[:, there].isnan().all()) == (family in UNFUSED)
    changed = ids.clone()
    changed[torch.arange(2), found.spread_change[:, 0]] = found.spread_change[:, 1]
    with torch.no_grad():
        other = plain(changed, output_hidden_states=True)
    # The last of transformers' states is taken after the final norm.
    for depth in range(len(ran.hidden_states) - 1):
        before, after = ran.hidden_states[depth], other.hidden_states[depth]
        size = before.norm(dim=-1)
        moved = (after - before).norm(dim=-1) / size
        torch.testing.assert_close(found.spread[:, depth], moved, atol=1e-5, rtol=1e-4)
        peak = size[:, 0] / size[:, 1:].sort(dim=-1).values[:, (LENGTH - 2) // 2]
        torch.testing.assert_close(found.sinks.residual[:, depth], peak, atol=1e-5, rtol=1e-4)


def test_most_families_take_the_fused_path():
    fused = len(FAMILIES) - len(UNFUSED)
    assert len(FAMILIES) >= 45 and fused >= 36
    readme = (TABLE.parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"{fused} of the [{len(FAMILIES)} families" in readme


def test_the_page_of_architectures_is_true():
    assert TABLE.read_text(encoding="utf-8") == table(), "run: python tests/families.py"
