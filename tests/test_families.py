"""Every family: heads equal to what transformers computes, alone, padded, and with its stream."""

import pytest
import torch
from families import FAMILIES, NO_HALF_RUN, NO_STREAM, ROUNDED, TABLE, built, table
from transformers import AutoModelForCausalLM

import eyechart
from eyechart.attention.probe import reduce_pattern
from eyechart.errors import CaptureError
from eyechart.results import STATISTICS

LENGTH = 21  # longer than the windows


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_what_transformers_computes(family):
    ids = torch.randint(3, 250, (2, LENGTH))
    with built(family) as folder:
        model = eyechart.load(str(folder), device="cpu")
        plain = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
    found = eyechart.attention_statistics(model, ids)
    with torch.no_grad():
        patterns = plain(ids, output_attentions=True).attentions
    patterns = [pattern for pattern in patterns if pattern is not None]
    layers = [layer for layer, how in enumerate(found.backend) if how == "pattern"]
    assert len(patterns) == len(layers) >= 1
    mask = torch.ones_like(ids, dtype=torch.bool)
    for layer, pattern in zip(layers, patterns, strict=True):
        for name, truth in reduce_pattern(pattern, mask).items():
            torch.testing.assert_close(getattr(found, name)[:, layer], truth, atol=2e-5, rtol=1e-4)

    texts = ["A longer line of text.", "Short."]
    together, alone = (eyechart.attention_statistics(model, t) for t in (texts, texts[1]))
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
            eyechart.attention_statistics(half, ids)
        with pytest.raises(CaptureError, match="comes after the softmax"):
            eyechart.capture(full, ids, [eyechart.Record("scores")])
        return
    if family in NO_HALF_RUN:
        with pytest.raises(RuntimeError, match="dtype"):
            eyechart.attention_statistics(half, ids)
        return
    ours, truth = (eyechart.attention_statistics(model, ids) for model in (half, full))
    for name in ("first", "diagonal", "previous", "largest"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(truth, name), atol=2e-2, rtol=0, equal_nan=True
        )


def test_the_page_of_architectures_is_true():
    assert TABLE.read_text(encoding="utf-8") == table(), "run: python tests/families.py"
