# %% [markdown]
# # Which genes differ, by how much, and how sure is that?
#
# Two types of cells in a simulated tissue, so that the truth is known: we ask which genes differ, see that one fit is
# far too sure of it, mend that by refits, and look at two questions that sound alike. Then a trap: groups
# that were found on the counts they are tested on. A minute or two on a laptop.

# %%
import warnings

import numpy as np
from scipy import stats

import pyrosc

warnings.simplefilter("ignore", pyrosc.PyroscWarning)  # unused latents: not the question here
tissue = pyrosc.simulate.tissue(1200, 200, n_types=3, n_batches=1, seed=1)
cells = pyrosc.Cells.from_anndata(tissue, label="cell_type")
fit = pyrosc.fit(pyrosc.scvi(cells), cells, ensemble=5, progress=False)
print(len(fit.members), "refits on resampled", fit.settings["resampled"])
# > 5 refits on resampled cells

# %% [markdown]
# ## The table
#
# Effects are log2 of group1 over group2, of mean expected shares, so that a cell's depth does not enter. `probability`
# is that of an effect beyond `delta`, which comes from the effects themselves. Genes are called from the top as
# long as the expected share of false calls is at most `fdr`.

# %%
table = fit.differential_expression(cells, "cell_type", "type0", "type1", fdr=0.05)
print(", ".join(table.columns[:7]))
print(f"delta {table.attrs['delta']:.1f}, {table['is_de'].sum()} of {len(table)} genes called")
print("the interval holds the uncertainty of:", table.attrs["uncertainty"])
# > lfc_mean, lfc_sd, lfc_median, lfc_lower, lfc_upper, probability, log_odds
# > delta 0.5, 50 of 200 genes called
# > the interval holds the uncertainty of: z, cells and decoder

# %% [markdown]
# ## Is it true?
#
# In a simulation we can look. Beside it the same question to a single fit: it takes its decoder for known, and what
# is left is the uncertainty of each cell's state, which a mean over hundreds of cells averages away.

# %%
kind, rho = tissue.obs["cell_type"].to_numpy(), tissue.layers["rho"]
truth = np.log2(rho[kind == "type0"].mean(0)) - np.log2(rho[kind == "type1"].mean(0))
single = pyrosc.fit(pyrosc.scvi(cells), cells, progress=False)


def judge(asked):
    found = asked.differential_expression(cells, "cell_type", "type0", "type1").loc[list(cells.schema.genes)]
    covered = (found["lfc_lower"] < truth) & (truth < found["lfc_upper"])
    false = (np.abs(truth) <= found.attrs["delta"])[found["is_de"]]
    return covered.mean(), false.mean()


covered, false = judge(fit)
print(f"ensemble: 90 % intervals hold the truth of {covered:.1f} of the genes; {false:.1f} of the calls are false")
covered, _ = judge(single)
print("single fit: fewer than a third of them:", covered < 0.33)
# > ensemble: 90 % intervals hold the truth of 0.9 of the genes; 0.1 of the calls are false
# > single fit: fewer than a third of them: True

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
# scVI finds nothing to say of these cells' states, and so nothing that differs, even on the same counts:

# %%
nothing = pyrosc.fit(pyrosc.scvi(second), second, progress=False)
calls = nothing.differential_expression(second, group1=cut(second))
print(f"{calls['is_de'].sum()} genes; largest effect below 0.05: {calls['lfc_mean'].abs().max() < 0.05}")
# > 0 genes; largest effect below 0.05: True

# %% [markdown]
# ## What this cannot say
#
# - Effects are the decoder's. It is a smooth function of a few numbers a cell: a gene that differs in a handful of
#   cells only is smoothed over.
# - Cells of one donor are not witnesses of their own. With groups that differ by donor, name donors
#   (`sample=`, or `donor=`) and ask `estimand="donor"`; three donors a side are the least.
# - A difference is not a cause: types, conditions and lanes come together in most data.
