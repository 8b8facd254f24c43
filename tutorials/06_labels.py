# %% [markdown]
# # Which type is each cell?
#
# Seven hundred blood cells, of which we pretend to know the type of ten each. A story in which a cell's state comes
# from its type learns from the labelled and the unlabelled alike; then we ask how often it is right, whether its
# probabilities mean what they say, and what it does with a type that nobody named. A minute or two on a laptop.

# %%
import warnings

import numpy as np

import pyrosc

adata = pyrosc.datasets.pbmc()
kind = adata.obs["cell_type"].astype(str).to_numpy()
common = [k for k in np.unique(kind) if (kind == k).sum() >= 60]
adata, kind = adata[np.isin(kind, common)].copy(), kind[np.isin(kind, common)]
adata = adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()
draw = np.random.default_rng(0)
shown = np.concatenate([draw.choice(np.flatnonzero(kind == k), 10, replace=False) for k in common])
label = np.full(len(kind), None, dtype=object)
label[shown] = kind[shown]
adata.obs["label"] = label
print(f"{len(kind)} cells, {len(common)} types, {len(shown)} labels")
# > 532 cells, 4 types, 40 labels

# %% [markdown]
# ## The story
#
# A missing label means unlabelled. `y` is the type, `u` how a cell varies within it, `z` the state that is decoded.
# In the guide `y` is summed over all its values, exactly: counts depend on it through `z` alone, so no cell is
# decoded twice. A label that is known is what the prior of `y` says of that cell; there is no second story for it.

# %%
cells = pyrosc.Cells.from_anndata(adata, label="label")
program = pyrosc.scanvi(cells)
print("\n".join(program.describe().splitlines()[1:5]))
with warnings.catch_warnings():
    warnings.simplefilter("ignore", pyrosc.PyroscWarning)  # unused latents: not the question here
    fit = pyrosc.fit(program, cells, progress=False)
# > site     plate  batch | event  law               guide                     KL
# > y        cells      n |        Categorical       Categorical (summed out)  analytic
# > u        cells      n | 10     Normal            Normal                    analytic
# > z        cells      n | 10     Normal            Normal                    Monte Carlo

# %% [markdown]
# ## Is it right, and does it know when it is not?
#
# Probabilities are averaged over draws of the state, and the cells' own labels are not looked at. We hold them
# against the truth of cells that had no label. `ece` is how far probabilities are from the share that is right;
# `ece_if_calibrated` what it would be by chance alone.

# %%
hidden = draw.permutation(np.setdiff1d(np.arange(len(kind)), shown))
known = adata[hidden].copy()
known.obs["label"] = kind[hidden]
tuning, test = known[:100].copy(), known[100:].copy()
table = pyrosc.check.labels(fit, test)
print(f"right: {table.attrs['accuracy']:.1f} of hidden cells")
print(f"ECE {table.attrs['ece']:.1f}, by chance {table.attrs['ece_if_calibrated']:.1f}")
# > right: 0.9 of hidden cells
# > ECE 0.1, by chance 0.0

# %% [markdown]
# Ten labels a type leave a classifier too sure of itself. A temperature by which log odds are divided is chosen on
# cells whose labels the fit has not seen, never on those it was taught with; `threshold` is then where nine in ten of
# the cells that are named are named rightly. The others are "unknown".

# %%
cooler = fit.with_temperature(tuning)
print(f"ECE with a temperature of its own: {pyrosc.check.labels(cooler, test).attrs['ece']:.1f}")
threshold = pyrosc.check.labels(cooler, tuning, accuracy=0.9).attrs["threshold"]
named = cooler.labels(test, threshold=threshold)
is_named = (named["label"] != "unknown").to_numpy()
print(f"named: {is_named.mean():.1f} of them, right: {(named['label'] == test.obs['label'])[is_named].mean():.1f}")
# > ECE with a temperature of its own: 0.0
# > named: 0.9 of them, right: 0.9

# %% [markdown]
# ## A type that nobody named
#
# A classifier has no word for what it was not taught, and may be sure of the wrong one. So `labels` has a second
# number: how far a cell's state is from the labelled cells of any type, and whether it shares with others what the
# fit does not explain. We take the labels of the B cells away.

# %%
b = next(k for k in common if "B" in k)
adata.obs["label"] = np.where(kind == b, None, label)
other = pyrosc.Cells.from_anndata(adata, label="label")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", pyrosc.PyroscWarning)
    without = pyrosc.fit(pyrosc.scanvi(other), other, progress=False)
found = without.labels(other)
print(f"typical probability of the type named, of {b}: {found['probability'][kind == b].median():.1f}")
print(f"typical p-value of being of a known type: {found['p_known'][kind == b].median():.1f}")
print(f"of the other cells: {found['p_known'][kind != b].median():.1f}")
# > typical probability of the type named, of CD19+ B: 1.0
# > typical p-value of being of a known type: 0.0
# > of the other cells: 0.4

# %% [markdown]
# ## What is known otherwise
#
# Labels that may be wrong, types that are known by their group only, and how common types are, are arguments of one
# part. With `errors` a label is evidence, not a fact; `groups` names labels that stand for several types.

# %%
labels = pyrosc.LabelPrior(errors=0.1, groups={"myeloid": ["CD14+ Monocyte", "Dendritic"]})
adata.obs["label"] = np.where(np.isin(kind, labels.groups["myeloid"]), "myeloid", kind)
adata.obs.loc[adata.obs_names[shown], "label"] = kind[shown]
mixed = pyrosc.Cells.from_anndata(adata, label="label")
part = pyrosc.scanvi(mixed, labels=labels).parts["labels"]
i = int(np.flatnonzero(adata.obs["label"] == "myeloid")[0])
seen = dict(zip(part.types, part(mixed[[i]]).probs[0].tolist()))
print({name: round(p, 2) for name, p in seen.items()})
# > {'CD14+ Monocyte': 0.48, 'CD19+ B': 0.02, 'CD4+/CD25 T Reg': 0.02, 'Dendritic': 0.48}

# %% [markdown]
# ## What this cannot say
#
# - A type is what the labels say it is. If those given are the clearest cells of each, the others are told less
#   surely than held-out labels of the same kind make believe.
# - `p_known` is small for a cell of a known type that was measured otherwise, too; a few cells of a new type may
#   hide.
# - Shares that are learned (`learned=True`) are of these cells, and wrong where types are hardly told apart.
