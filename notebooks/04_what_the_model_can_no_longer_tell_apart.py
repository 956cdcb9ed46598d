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
# # What the model can no longer tell apart
#
# Append the last token of a prompt once more, and the last representation hardly moves (Barbero
# et al., [2406.04267](https://arxiv.org/abs/2406.04267), Theorem 4.2). At which length, in which
# layer, for which sequences, and when does a number format no longer see it? Every number this
# notebook talks about is asserted in the cell that computes it.

# %%
import eyechart
from eyechart import families

model = eyechart.load("smollm2-135m-instruct", device="cpu")
ones = eyechart.collapse_curve(model, "repeat", lengths=(1, 2, 5, 10, 20, 50, 100, 200, 500))
ones

# %% [markdown]
# A question stands in front, then n ones; the other prompt has n + 1. All nine lengths come from
# one forward pass, because the prompt with n ones is the beginning of every longer one. A second
# pass tells what the numbers are worth: how far apart unrelated prompts are, and what arithmetic
# alone makes of the same prompt.

# %%
first, last = float(ones.relative[-1, 0]), float(ones.relative[-1, -1])
assert ones.forward_passes == 2
assert last < first / 30 and ones.onset() == 100
assert ones.floor() < last / 1000 and float(ones.unrelated["relative"][-1]) > 2 * first
ones.plot()

# %% [markdown]
# ## Which sequences collapse
#
# Digits drawn at random, ending in one 1 or in two, stay apart far longer than ones do: what is
# repeated is what collapses.

# %%
digits = eyechart.collapse_curve(model, families.digits(seed=0), lengths=ones.lengths)
slopes = {curve.family: curve.fit(start=10) for curve in (ones, digits)}
print({family: str(slope) for family, slope in slopes.items()})
assert float(digits.relative[-1, -1]) > 10 * last
assert slopes["repeat"].slope < -0.5 < slopes["digits"].slope

# %% [markdown]
# ## What a separator is worth
#
# The paper puts a comma after every third digit, and n and n + 1 stay apart. They do; but the last
# one then has another place in its group of three. At n + 3 it has the same place, and n and n + 3
# collapse as plain ones do. Counted from the right, as thousands are written, n and n + 1 collapse
# too. What separators preserve is the count modulo three.

# %%
lengths = (1, 4, 10, 49, 100, 199, 499)  # one more than a multiple of three: both end in a 1
left = eyechart.collapse_curve(model, families.separated(every=3), lengths)
right = eyechart.collapse_curve(model, families.separated(every=3, anchor="right"), lengths)
print("tokens at n = 4:", *("".join(tokens[-9:]) for tokens in left.tokens(4)), sep="\n  ")
one_more, group_more, from_the_right = (
    float(values[-1, -1]) for values in (left.relative, left.control, right.relative)
)
print(f"n and n + 1: {one_more:.3f}; n and n + 3: {group_more:.3f}")
print(f"n and n + 1, counted from the right: {from_the_right:.3f}")
assert one_more > 5 * group_more and one_more > 5 * from_the_right

# %% [markdown]
# ## When a number format no longer sees it
#
# Of the 576 coordinates of the final representation more and more are the same number as n grows,
# and the more the coarser the format. How many follows from the spacing of the format at the
# magnitudes measured.

# %%
print(ones.horizons().round(3).to_string(index=False))
shares = {name: ones.identical[index] for index, name in enumerate(ones.formats)}
assert shares["float8_e5m2"][-1] > shares["float8_e4m3"][-1] > shares["bfloat16"][-1] > 0.05
assert float(shares["bfloat16"][0]) < 0.01
off = (ones.identical - ones.expected).abs()[1:6].max()
assert off < 0.06  # float32 to e5m2, at every length

# %% [markdown]
# Running the whole model in bfloat16 is another thing: its rounding adds a difference of its own,
# so that the curve stops falling where float32's goes on.

# %%
with eyechart.lenses.precision(model, "bfloat16", at="model"):
    half = eyechart.collapse_curve(model, "repeat", ones.lengths, references=False)
print(f"n = 500: float32 {last:.4f}, bfloat16 {float(half.relative[-1, -1]):.4f}")
print(half.provenance.notes[0])
assert float(half.relative[-1, -1]) > 1.2 * last

# %% [markdown]
# ## Layer by layer
#
# A family of your own needs two sequences a length. Where in the network do they part? Both
# prompts below end in the same token; the first token differs.

# %%
flipped = eyechart.collapse_curve(model, families.changed(at=0), lengths=(2, 20, 200))
by_layer = flipped.relative[:, -1]
print("at n = 200, by layer:", [round(value, 3) for value in by_layer[::5].tolist()])
assert float(by_layer[0]) == 0  # the last tokens are the same token
assert float(flipped.relative[-1, 0]) > 3 * float(flipped.relative[-1, -1])

# %% [markdown]
# `eyechart collapse smollm2-135m-instruct` does all of this, on a ladder of formats, and writes a
# page. [docs/collapse.md](../docs/collapse.md) defines every quantity.
