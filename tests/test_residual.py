"""Norms of the residual stream and massive activations."""

import pytest
import torch

import eyechart
from eyechart.probes import Record
from eyechart.sequences import BUILT_IN_PROMPT


def test_norms_equal_those_of_the_recorded_stream(llama):
    texts = ["A longer line of text.", "Short."]
    found = eyechart.residual_norms(llama, texts)
    pre, post, final = eyechart.capture(
        llama, texts, [Record("resid_pre"), Record("resid_post"), Record("final_norm")]
    )
    stream = torch.stack([pre[0], post[0], post[1]], dim=1)
    mask = found.sequences.mask
    for layer in range(3):
        real = found.norm[:, layer][mask]
        torch.testing.assert_close(real, stream[:, layer].norm(dim=-1)[mask])
        assert found.norm[:, layer][~mask].isnan().all()
    assert found.final_norm is not None
    torch.testing.assert_close(found.final_norm[mask], final[None].norm(dim=-1)[mask])
    for row, length in enumerate(found.sequences.lengths):
        for layer in range(3):
            magnitudes = stream[row, layer, :length].abs()
            assert found.median[row, layer] == magnitudes.median()
            ranked = magnitudes.sort(dim=-1, descending=True)
            torch.testing.assert_close(
                found.largest[row, layer, :length].abs(), ranked.values[:, :3]
            )
            assert torch.equal(found.largest_dimension[row, layer, :length], ranked.indices[:, :3])


def test_a_planted_massive_activation_is_found_and_nothing_else(llama):
    def plant(stream, hook):
        stream = stream.clone()
        stream[0, 4, 17] = -5000.0
        return stream

    assert eyechart.residual_norms(llama, "Some text.").massive() == ()
    with llama.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", plant)]):
        found = eyechart.residual_norms(llama, "Some text.")
    (item,) = found.massive()
    assert (item.batch, item.layer, item.position, item.dimension) == (0, 2, 4, 17)
    assert item.value == pytest.approx(-5000, rel=1e-3)
    assert "dimensions 17" in repr(found)


def test_both_clauses_of_the_rule_count(llama):
    def scale(factor):
        return lambda stream, hook: stream * factor

    with llama.hooks(fwd_hooks=[("hook_embed", scale(1e6))]):
        big = eyechart.residual_norms(llama, "Some text.")
    assert float(big.largest.abs().max()) > 100
    assert big.massive() == ()  # everything is large, so nothing stands out
    assert big.massive(ratio=1.0)


def test_default_model_has_massive_activations_at_the_first_token(default_model):
    found = eyechart.residual_norms(default_model, BUILT_IN_PROMPT)
    massive = found.massive()
    assert massive and {item.position for item in massive} == {0}
    assert massive[0].value > 10_000 and massive[0].ratio > 5_000
    middle = found.norm[0, 15]
    assert float(middle[0] / middle[1:].median()) > 50
