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
# # Heads that do nothing
#
# Some heads look at themselves, some park on the first token. Barbero et al. call the first kind
# expensive no-ops ([2410.06205](https://arxiv.org/abs/2410.06205)); Guo et al. call the second
# dormant ([2410.13835](https://arxiv.org/abs/2410.13835)). A pattern does not prove it: this
# notebook puts something cheap in the heads' place and looks at what the model then says. Every
# number it talks about is asserted in the cell that computes it.
#
# All 30 layers of SmolLM2-135M-Instruct take minutes; two of them will do here.

# %%
import torch

import eyechart
from eyechart.results import head_figures

model = eyechart.load("smollm2-135m-instruct", device="cpu")
census = eyechart.head_census(model, layers=[11, 18], context=512)
census

# %% [markdown]
# ## Names
#
# Each score is the share of attention on a set of keys, averaged over the queries of twelve texts
# (or of random tokens said twice); `chance` is what uniform attention scores. A head is named where
# more than half of what chance does not explain goes one way, with 95% confidence over texts.

# %%
scores = census.scores()
diagonal = scores[(scores["score"] == "diagonal") & (scores["low"] > census.names.share)]
print(diagonal.drop(columns="score").round(3).to_string(index=False))
assert census.heads_named("diagonal") == ("L11H6",)
assert "L18H6" in census.heads_named("induction") and len(census.heads_named("sink")) > 50
census.plot()

# %% [markdown]
# ## A diagonal head is a linear map of each token
#
# L11H6 looks mostly at itself. In its place the identity, each token's own value, costs a hundredth
# of a nat; nothing at all costs several times that. So it does something, but nothing for which it
# would have to look around.

# %%
frame = census.to_frame().set_index(["layer", "head"])
head = frame.loc[(11, 6)]
for name in ("identity", "zero", "mean", "resample"):
    low, high = head[f"kl_{name}_low"], head[f"kl_{name}_high"]
    print(f"{name:>9} {head[f'kl_{name}']:.4f} nats ({low:.4f} to {high:.4f})")
assert head["kl_identity"] < 0.02 and head["kl_zero"] > 2 * head["kl_identity"]

# %% [markdown]
# ## A sink can be zeroed
#
# L18H8 has all of its attention on the first token, whose value is nearly nothing. Zeroed, it is
# not missed.

# %%
sink = frame.loc[(18, 8)]
print(f"mass on the first token {sink['sink']:.4f}, zeroed {sink['kl_zero']:.4f} nats")
assert sink["sink"] > 0.99 and sink["kl_zero"] < 0.005 and sink["verdict"] == "no-op"

# %% [markdown]
# ## How much is nothing?
#
# A verdict depends on the budget, which is for you to choose; asking again costs nothing.

# %%
for budget in (0.002, 0.005, 0.01, 0.02):
    found = census.no_ops(budget)
    print(f"{budget:5} nats: {len(found):2d} of 18 heads, such as {found[:3]}")
assert len(census.no_ops(0.002)) < len(census.no_ops(0.02))

# %% [markdown]
# ## Together
#
# What heads cost does not add up, so sets are run as a whole. `skip_heads` runs the model without
# the largest set that fits; no score is computed for these heads.

# %%
text = "The lamp burned low, and the keeper of the lamp slept."
with torch.no_grad():
    before = model(text, return_type="loss")
    with eyechart.lenses.skip_heads(census):
        after = model(text, return_type="loss")
together = census.together
print(
    f"{len(together.heads)} heads for {float(together.kl.mean()):.3f} nats; "
    f"the loss on this text goes from {before:.3f} to {after:.3f}"
)
assert abs(after - before) < 0.3 and float(together.kl.mean()) <= together.budget
head_figures.together(census)

# %% [markdown]
# ## Asleep on one domain, at work on another
#
# The first token's share of attention depends on the text. These heads sleep on one domain and
# work on another; what looks like a no-op on prose need not be one on code.

# %%
changing = census.changing()
print(changing.head().round(2).to_string(index=False))
assert len(changing) >= 5 and (changing["highest"] - changing["lowest"]).max() > 0.5
head_figures.domains(census)

# %% [markdown]
# ## Positional heads turn fast
#
# Queries and keys of heads that go by position use the fast rotary frequencies, as the theory of
# diagonal and previous-token heads wants it. `eyechart heads` writes all of this into one HTML
# file, with the attention of every head a click away.

# %%
names, rotary = census.names, census.rotary
positional = names.score("diagonal").maximum(names.score("previous"))
correlation = rotary.agreement(positional)
print(f"Spearman correlation with the share of the fastest quarter: {correlation:.2f}")
assert correlation > 0.3
head_figures.rotary_bands(census)
