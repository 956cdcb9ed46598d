# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first eye exam
#
# What does a language model look at, and what can it no longer see? This notebook examines
# SmolLM2-135M-Instruct on a short English text. Every number it talks about is asserted in the cell
# that computes it, so the text cannot drift away from what the code finds.

# %%
import torch

import eyechart

model = eyechart.load("smollm2-135m-instruct", device="cpu")
exam = eyechart.exam(model)
exam

# %% [markdown]
# ## Every head at a glance
#
# The brightest row of the first map is layer 18: three of its heads give nearly all their attention
# to the first token, whatever they are asked. Such heads are *attention sinks*. The *sink rate* is
# the share of heads whose mean attention to the first token exceeds 0.3
# (Gu et al., [2410.10781](https://arxiv.org/abs/2410.10781)); it falls with length, so it is always
# said at which.

# %%
heads = exam.attention
((layer, head, mass),) = heads.strongest("first", 1)
rate = heads.sink_rate(eps=0.3, length=64)
print(f"strongest sink L{layer}H{head}: {mass:.4f}; sink rate at 64 tokens: {rate:.2f}")
assert layer == 18 and mass > 0.99
assert 0.5 < rate < 0.65
heads.plot()

# %% [markdown]
# Some heads look at themselves (*diagonal* heads), some at the token before (*previous-token*
# heads). Both need the position: a model with rotary positions can build them, one without any
# positions cannot (Barbero et al., [2410.06205](https://arxiv.org/abs/2410.06205)).

# %%
table = heads.to_frame().set_index(["layer", "head"])
print(table.nlargest(3, "diagonal")[["diagonal", "entropy"]].round(3))
print(table.nlargest(3, "previous")[["previous", "entropy"]].round(3))
assert table["diagonal"].idxmax() == (11, 6) and 0.65 < table["diagonal"].max() < 0.8
assert table["previous"].idxmax() == (16, 0) and 0.65 < table["previous"].max() < 0.85

# %%
exam.patterns.plot()

# %% [markdown]
# ## Why the first token
#
# Its residual stream is two orders of magnitude longer than anyone else's, because of a handful of
# *massive activations* (Sun et al., [2402.17762](https://arxiv.org/abs/2402.17762)): a few
# coordinates, always the same ones, and only at the first token.

# %%
massive = exam.residual.massive()
print(massive[0])
assert {item.position for item in massive} == {0}
assert {item.dimension for item in massive} == {247, 507}
norm = exam.residual.norm[0, 15]
assert norm[0] / norm[1:].median() > 100
exam.residual.plot()

# %% [markdown]
# ## What it can no longer see
#
# Ask the model to count ones, and append one more. Its last representation hardly moves, and the
# longer the sequence, the less (Barbero et al.,
# [2406.04267](https://arxiv.org/abs/2406.04267), Theorem 4.2). One forward pass measures all
# lengths, because under a causal mask every shorter prompt is inside the longest one.

# %%
collapse = exam.collapse
final = collapse.relative[-1]
print(f"n=1: {final[0]:.3f}   n=500: {final[-1]:.4f}   sets in at n={collapse.onset()}")
assert final[0] / final[-1] > 20
assert collapse.onset() == 100
assert collapse.forward_passes == 2  # one for every n, one for floor and unrelated prompts
collapse.plot()

# %% [markdown]
# ## Your own probe
#
# A probe looks at named sites while the pass runs and keeps what it makes of them.
# `Record` keeps any site, reduced by any function; TransformerLens hooks work around it, so an
# intervention and its measurement are one pass. Here the strongest sink head, L18H8, is silenced:
# nothing happens. The diagonal head L11H6 is another matter: it looks mostly at itself, and yet its
# output is missed. A pattern alone does not prove that a head does nothing.

# %%
from eyechart.sequences import BUILT_IN_PROMPT


def silence(head):
    def hook(z, hook):
        z[:, :, head] = 0.0
        return z

    return hook


def loss():
    (logits,) = eyechart.capture(model, BUILT_IN_PROMPT, [eyechart.Record("logits")])
    targets = exam.sequences.tokens[0, 1:]
    return torch.nn.functional.cross_entropy(logits[None][0, :-1], targets).item()


plain = loss()
with model.hooks(fwd_hooks=[("blocks.18.attn.hook_z", silence(8))]):
    without_sink = loss()
with model.hooks(fwd_hooks=[("blocks.11.attn.hook_z", silence(6))]):
    without_diagonal = loss()
print(f"loss {plain:.4f}; without L18H8 {without_sink:.4f}; without L11H6 {without_diagonal:.4f}")
assert abs(without_sink - plain) < 0.005
assert without_diagonal - plain > 0.03

# %% [markdown]
# ## Keep it
#
# Results save whole or not at all and open again equal. `eyechart report FOLDER` turns a saved exam
# into one HTML file that opens offline.

# %%
import tempfile

folder = exam.save(tempfile.mkdtemp())
assert eyechart.open_result(folder) == exam
