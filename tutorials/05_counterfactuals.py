# %% [markdown]
# # What would these cells look like under the other condition?
#
# A simulated tissue in two conditions, so that the truth is known: stimulation halves ten genes, in every type. We ask
# what unstimulated cells would have looked like stimulated, see how that is answered and when it should not be, and
# tell two kinds of "would have" apart. A minute or two on a laptop.

# %%
import warnings

import numpy as np

import pyrosc

tissue = pyrosc.simulate.tissue(1500, 150, n_types=3, n_batches=1, depth=1500, seed=4)
draw = np.random.default_rng(0)
stimulated = draw.uniform(size=1500) < 0.5
x = tissue.X.toarray().astype(int)
x[np.ix_(stimulated, np.arange(10))] = draw.binomial(x[np.ix_(stimulated, np.arange(10))], 0.5)
tissue.X = x.astype(np.float32)
tissue.obs["condition"] = np.where(stimulated, "stim", "ctrl")

# %% [markdown]
# ## The question
#
# The condition is a column that the decoder sees. A counterfactual has three steps (Pearl 2009): read the state of a
# cell as it was seen, set the column, decode. Both worlds get the same draws of the state, so that what differs between
# them is the column's doing.

# %%
cells = pyrosc.Cells.from_anndata(tissue, label="cell_type", categorical=["condition"])
with warnings.catch_warnings():
    warnings.simplefilter("ignore", pyrosc.PyroscWarning)  # unused latents: not the question here
    fit = pyrosc.fit(pyrosc.scvi(cells), cells, ensemble=5, progress=False)

control = cells[((cells.obs["condition"] == "ctrl") & (cells.obs["cell_type"] == "type0")).to_numpy()]
table = fit.counterfactual(control, do={"condition": "stim"})
halved, rest = table.iloc[:10], table.iloc[10:]
print(f"log2 fold change of the halved genes: {halved['lfc_mean'].median():.1f}")
print(f"of the others, nine in ten within: {rest['lfc_mean'].abs().quantile(0.9):.1f}")
print(f"intervals that hold -1: {((halved['lfc_lower'] < -1) & (-1 < halved['lfc_upper'])).sum()} of 10")
print("they hold the uncertainty of:", table.attrs["uncertainty"])
# > log2 fold change of the halved genes: -0.9
# > of the others, nine in ten within: 0.2
# > intervals that hold -1: 10 of 10
# > they hold the uncertainty of: z and decoder

# %% [markdown]
# ## May it be asked?
#
# Cells of such a state must have been seen under both conditions, and the state must not give the condition away: what
# of the effect is in the state stays there when the column is set. Both are measured on cells that the fit keeps.
# "median" is the density of these states among stimulated cells over that among all; near 1 is good.

# %%
seen = table.attrs["overlap"]["condition"]
print(f"density ratio {seen['median']:.1f}; cells without overlap: {seen['without']:.1f}; AUC {seen['auc']:.1f}")
# > density ratio 1.0; cells without overlap: 0.0; AUC 0.5

# %% [markdown]
# Now a fit that never saw type2 stimulated. Asked about it, it answers, but says that it was not there:

# %%
never = ~((cells.obs["condition"] == "stim") & (cells.obs["cell_type"] == "type2")).to_numpy()
blind = cells[never]
with warnings.catch_warnings():
    warnings.simplefilter("ignore", pyrosc.PyroscWarning)
    other = pyrosc.fit(pyrosc.scvi(blind), blind, progress=False)

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    far = other.counterfactual(blind[(blind.obs["cell_type"] == "type2").to_numpy()], do={"condition": "stim"})
print("it warns:", any("the decoder extrapolates" in str(w.message) for w in said))
print(f"cells without overlap: {far.attrs['overlap']['condition']['without']:.1f}")
# > it warns: True
# > cells without overlap: 1.0

# %% [markdown]
# And it should. The effect is the same in every type, but nothing in the data says so: the decoder carries over a part
# of what it saw in the other types, and is sure of it.

# %%
known, unknown = table.iloc[:10]["lfc_mean"].median(), far.iloc[:10]["lfc_mean"].median()
print("halved genes where both worlds were seen:", "about -1" if abs(known + 1) < 0.25 else f"{known:.1f}")
print("where one was not:", "far from it" if abs(unknown + 1) > 0.4 else f"{unknown:.1f}")
# > halved genes where both worlds were seen: about -1
# > where one was not: far from it

# %% [markdown]
# ## Two kinds of "would have"
#
# `predict` draws counts. With new noise they are those of another experiment on cells of the same state: the
# interventional distribution. With the noise that each count was seen with (its place among the counts of its own
# world), they are those of these very cells, had only the column been different: the comonotone counterfactual. The
# means agree; a gene that is not touched keeps its counts.

# %%
quiet = dict(do={"condition": "stim"}, n_draws=20)
anew, same = fit.predict(control, **quiet), fit.predict(control, noise="same", **quiet)
counts = control.x.numpy()
print(
    f"halved genes, mean count seen {counts[:, :10].mean():.1f}, new {anew[..., :10].mean():.1f}, "
    f"same noise {same[..., :10].mean():.1f}"
)
for name, drawn in (("new", anew), ("same noise", same)):
    agreement = np.corrcoef(counts[:, 10:].ravel(), drawn[0, :, 10:].ravel())[0, 1]
    print(f"other genes, correlation with what was seen: {name} {agreement:.1f}")
# > halved genes, mean count seen 7.3, new 3.9, same noise 4.0
# > other genes, correlation with what was seen: new 0.6
# > other genes, correlation with what was seen: same noise 1.0

# %% [markdown]
# ## What a column does at all
#
# Averaged over levels, expression is free of the column; and of each gene one can ask how much of what the decoder
# makes vary is the column's.

# %%
free = fit.expression(cells[:3], ["gene0", "gene1"], do={"condition": "all"}, scale=1e4)
print(free.shape)
explained = fit.variance_explained(cells, "condition")
most = set(explained.index[:10]) & {f"gene{i}" for i in range(10)}
print(f"of the ten genes that it explains most, {len(most)} are of the ten halved")
# > (3, 2)
# > of the ten genes that it explains most, 7 are of the ten halved

# %% [markdown]
# ## What this cannot say
#
# - That the column is the cause. In most data conditions come with lanes, days and donors; the model cannot tell one
#   from the other. Only an assignment at random can.
# - What an effect is in a type that was not seen under the level. It carries over a part of what it saw in others.
# - What the same cell would have done: no cell is seen twice. "The same noise" is one coupling of the two worlds out of
#   many that fit the data as well; means over cells do not depend on it.
# - Intervals here are those of the decoder (`ensemble=5`) and the state; a single fit's are far too narrow.
