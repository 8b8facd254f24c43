# %% [markdown]
# # Which genes differ, by how much, and how sure is that?
#
# Two types of cells in a simulated tissue, so that the truth is known: we ask which genes differ, look whether
# intervals and calls mean what they say, and what refits add where cells are few. Then two questions that sound
# alike, and a trap: groups that were found on the counts they are tested on. A minute or two on a laptop.

# %%
import warnings

import numpy as np
from scipy import stats

import pyrosc

warnings.simplefilter("ignore", pyrosc.PyroscWarning)  # unused latents: not the question here
tissue = pyrosc.simulate.tissue(1200, 200, n_types=3, n_batches=1, seed=1)
cells = pyrosc.Cells.from_anndata(tissue, label="cell_type")
fit = pyrosc.fit(pyrosc.scvi(cells), cells, progress=False)

# %% [markdown]
# ## The table
#
# Effects are log2 of group1 over group2, of mean expected shares, so that a cell's depth does not enter. `probability`
# is that of an effect beyond `delta`, which comes from the effects themselves. Genes are called from the top as
# long as the expected share of false calls is at most `fdr`.

# %%
table = fit.differential_expression(cells, "cell_type", "type0", "type1", fdr=0.05)
print(", ".join(table.columns[:8]))
print(f"delta {table.attrs['delta']:.1f}, {table['is_de'].sum()} of {len(table)} genes called")
print("the interval holds the uncertainty of:", table.attrs["uncertainty"])
# > lfc_mean, lfc_sd, lfc_median, lfc_lower, lfc_upper, lfc_shrunk, lfc_residual, probability
# > delta 0.5, 49 of 200 genes called
# > the interval holds the uncertainty of: z, cells and counts

# %% [markdown]
# ## Is it true?
#
# In a simulation we can look. Three things make it so. What is decoded is compared with what was counted, and the
# rest added (`lfc_residual`): a decoder may be wrong, and one fit does not know by how much. Each draw weighs the cells
# anew, for the population they come from. And a gene is judged by what all genes do: most effects are small, so a large
# estimate is in part luck. Without the first, intervals are those of each cell's state alone, which a mean over
# hundreds of cells averages away:

# %%
kind, rho = tissue.obs["cell_type"].to_numpy(), tissue.layers["rho"]
truth = np.log2(rho[kind == "type0"].mean(0)) - np.log2(rho[kind == "type1"].mean(0))


def judge(asked, some, **options):
    found = asked.differential_expression(some, "cell_type", "type0", "type1", **options).loc[list(cells.schema.genes)]
    different = np.abs(truth) > found.attrs["delta"]
    covered = ((found["lfc_lower"] < truth) & (truth < found["lfc_upper"])).mean()
    is_de = found["is_de"].to_numpy()
    return f"cover {covered:.0%}; {is_de.sum()} calls, {(is_de & ~different).sum()} of them false"


print("90 % intervals", judge(fit, cells))
print("decoded alone: ", judge(fit, cells, residual=False))
# > 90 % intervals cover 85%; 49 calls, 3 of them false
# > decoded alone:  cover 26%; 55 calls, 6 of them false

# %% [markdown]
# ## Few cells
#
# Counts of 25 cells a type say little by themselves. But the decoder has learned from the others what such cells look
# like; how sure it may be of that, refits on resampled cells tell. With `ensemble=5` more is found, and still
# the calls are right.

# %%
few = cells[np.concatenate([np.flatnonzero(kind == name)[:25] for name in ("type0", "type1")])]
ensemble = pyrosc.fit(pyrosc.scvi(cells), cells, ensemble=5, progress=False)
print("one fit: ", judge(fit, few))
print("ensemble:", judge(ensemble, few))
# > one fit:  cover 93%; 19 calls, 1 of them false
# > ensemble: cover 92%; 46 calls, 2 of them false

# %% [markdown]
# ## Two questions that sound alike
#
# "Do the types differ in their mean?" gets surer with every cell. "Does a cell of one differ from a cell of the
# other?" does not: its spread is that of the cells. `estimand="cell"` asks the second, as scvi-tools does.

# %%
pairs = fit.differential_expression(cells, "cell_type", "type0", "type1", estimand="cell")
ratio = (pairs["lfc_sd"] / table.loc[pairs.index, "lfc_sd"]).median()
print("a random pair of cells is less sure than the means:", ratio > 1.5)
# > a random pair of cells is less sure than the means: True

# %% [markdown]
# ## The trap: groups that were found on these counts
#
# One population, nothing to find. We cut it in two along the main direction of its counts and ask which genes differ
# between the halves: they were cut to differ. Thinning splits each count at random into two independent halves: cut on
# one, test on the other. Here by a Wilcoxon test of each gene, at a false discovery rate of 5 %. (The halves are
# independent where counts are Poisson given the cell; what a cell's rates scatter beyond that, both halves share.)

# %%
draw = np.random.default_rng(0)
profile, depth = draw.dirichlet(np.full(150, 5.0)), draw.lognormal(np.log(800), 0.3, 600)
population = pyrosc.Cells.from_counts(draw.poisson(depth[:, None] * profile))
first, second = population.thin(0.5, seed=0)


def residuals(some):
    """Counts less what their totals let expect, in units of their scatter."""
    x, total = some.x.numpy(), some.library.numpy()
    apart = (x - total * x.sum(0) / x.sum()) / np.sqrt(total)
    return apart / apart.std(0)


def cut(some):
    return np.linalg.svd(residuals(some), full_matrices=False)[0][:, 0] > 0


def wilcoxon(some, group):
    p = stats.mannwhitneyu(residuals(some)[group], residuals(some)[~group], axis=0).pvalue
    return int((stats.false_discovery_control(p) <= 0.05).sum())


print(f"cut and tested on the same counts: {wilcoxon(second, cut(second))} genes")
print(f"cut on one half, tested on the other: {wilcoxon(second, cut(first))} genes")
# > cut and tested on the same counts: 44 genes
# > cut on one half, tested on the other: 0 genes

# %% [markdown]
# scVI finds nothing to say of these cells' states, and so nothing that differs in what it decodes, even on the same
# counts. But what the counts say beyond it was cut to differ, and `differential_expression` cannot know that:

# %%
nothing = pyrosc.fit(pyrosc.scvi(second), second, progress=False)
decoded = nothing.differential_expression(second, group1=cut(second), residual=False)
print(f"decoded, same counts: {decoded['is_de'].sum()} genes")
for name, group in (("same counts", cut(second)), ("the other half", cut(first))):
    calls = nothing.differential_expression(second, group1=group, delta=0.2)
    print(f"cut on {name}: {calls['is_de'].sum()} genes")
# > decoded, same counts: 0 genes
# > cut on same counts: 9 genes
# > cut on the other half: 0 genes

# %% [markdown]
# ## What this cannot say
#
# - Effects of single cells and of donors are the decoder's, a smooth function of a few numbers a cell: a gene that
#   differs in a handful of cells only is smoothed over. Means of groups are made up for by their counts.
# - Cells of one donor are not witnesses of their own. With groups that differ by donor, name donors
#   (`sample=`, or `donor=`) and ask `estimand="donor"`; three donors a side are the least.
# - A difference is not a cause: types, conditions and lanes come together in most data.
