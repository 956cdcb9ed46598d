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
# # Where a token's information comes from
#
# Which of the tokens before it does the last token's representation rest on? There are pictures of
# that which cost nothing, since they follow attention, and there is the truth: nudge an input, or
# replace it, and look what moves. This notebook holds the one against the other on
# SmolLM2-135M-Instruct. Every number it talks about is asserted in the cell that computes it.

# %%
import torch

import eyechart
from eyechart.flow import topology
from eyechart.results import flow_figures

model = eyechart.load("smollm2-135m-instruct", device="cpu")
text = " ".join(eyechart.sequences.BUILT_IN_PROMPT.split()[:80])
flow = eyechart.information_flow(model, text)
flow

# %% [markdown]
# ## The truth is U-shaped
#
# `sensitivity` is the length of the derivative of the last token's final representation by each
# input embedding, from 16 random vectors, with an interval. The first and the last token stand out
# (Barbero et al., [2406.04267](https://arxiv.org/abs/2406.04267), section 5).

# %%
((first, last),) = flow.u_shape("sensitivity")
print(f"first token {first:.1f}, last token {last:.1f} times the median")
assert first > 2 and last > 2
flow.plot()

# %% [markdown]
# ## Attention alone drives everything to the start
#
# Causal attention can only look back, and the first token only at itself. Multiply the layers, and
# the product forgets everyone else: with uniform attention at a known rate, in this model faster,
# because its heads park on the first token.

# %%
rollout = flow.sink_share[0]
length, layers = flow.sequences.lengths[0], flow.layers
uniform = float(topology.deep_limit(topology.uniform(length), layers)[-1, 0])
print(
    f"on the first token after {layers} layers: {rollout[-1]:.4f}; uniform attention {uniform:.4f}"
)
assert rollout[0] < 0.05 and rollout[-1] > 0.99
flow_figures.rollout_map(flow)

# %% [markdown]
# ## Which picture to trust
#
# If the rollout were right, this model would hear nothing but its first token. It is not: a sink's
# value is nearly zero, so that looking there moves nothing. ALTI weighs what each token really
# adds, and ranks the tokens much as the derivative does; the theory's bound holds, but ranks
# nothing.

# %%
table = flow.agreement().pivot(index="measure", columns="truth", values="spearman")
print(table.round(2))
trust = table["sensitivity"]
assert trust.idxmax() == "alti" and trust["alti"] > 0.5
assert trust["alti"] > trust["rollout"] + 0.3 and trust["alti"] > trust["path_bound"] + 0.3
drain = flow.sinks.value_drain
print(f"the first token's values have {drain:.2f} of the others' length")
assert drain < 0.5

# %% [markdown]
# ## What the sink is for
#
# Change one token in the middle, and see how far every layer and position moves; then hide the
# first four tokens from later queries and change it again. Without the sink the change spreads
# further: the sink keeps tokens apart (Barbero et al.,
# [2504.02732](https://arxiv.org/abs/2504.02732)).

# %%
position = int(flow.spread_change[0, 0])
late = slice(layers // 2, layers + 1)
intact, evicted = (
    moved[0, late, position + 1 :].log().mean().exp()
    for moved in (flow.spread, flow.spread_evicted)
)
print(f"later tokens move {intact:.3f} with the sink, {evicted:.3f} without")
assert evicted > intact
flow_figures.spread_map(flow)

# %% [markdown]
# ## At any length
#
# Rollout and bound carry one row through the layers and never build a matrix of tokens by tokens:
# they work at the model's whole context. `eyechart flow` writes all of this into one HTML file.

# %%
long = eyechart.information_flow(model, torch.arange(2000)[None] + 100, measures=("rollout",))
assert long.rollout.shape == (1, layers, 2000)
print(f"effective size {float(long.receptive_size()[0, -1]):.3f} of 2,000 tokens")
