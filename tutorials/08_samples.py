# %% [markdown]
# # Which donors differ, and in which cells?
#
# Cells come from donors, and donors are the units: age, disease and treatment are theirs. We ask in which kinds of
# cells donors differ, which donors are alike there, what a covariate of donors does, and where it changes how many
# cells there are rather than what they are. The data are simulated, so that the answers can be held against the truth:
# eight donors who differ in one of four types, and who have the types in shares of their own. A minute or two.

# %%
import warnings

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy

import pyrosc

adata = pyrosc.simulate.donors(
    1600, 200, 4, 8, n_active=1, n_module=15, fold=3.0, depth=1000, n_markers=20, effect=1.5, proportions=4.0
)
number = adata.obs["donor"].cat.codes.to_numpy()
adata = adata[~((adata.obs["cell_type"] == "type3") & (number < 4)).to_numpy()].copy()
number = adata.obs["donor"].cat.codes.to_numpy()
adata.obs["age"] = np.where(number < 4, "young", "old")
print(f"{adata.n_obs} cells; of type3, young donors have {((adata.obs['cell_type'] == 'type3') & (number < 4)).sum()}")
# > 1329 cells; of type3, young donors have 0

# %% [markdown]
# ## The story
#
# `u` is the state of a cell, whatever its donor. Each donor has an effect on each of a few archetypes, and a cell is
# moved by those of the archetypes that it is made of. `effect_sd` is how much donors differ in an archetype: where
# the counts give no reason for more, it is drawn to 0. `directions` says what a unit of effect does to each gene. Both
# have a prior and a posterior: a network in their place would be free to explain the noise of a donor's counts.

# %%
cells = pyrosc.Cells.from_anndata(adata, sample="donor")
program = pyrosc.mrvi(cells, n_latent=5, n_hidden=64)
print("\n".join(program.describe().splitlines()[1:6]))
with warnings.catch_warnings():
    warnings.simplefilter("ignore", pyrosc.PyroscWarning)  # unused latents: not the question here
    fit = pyrosc.fit(program, cells, epochs=80, warmup=0.3, progress=False)  # short, for a page
# > site           plate  batch | event   law               guide      KL
# > effect_sd                   | 6       HalfNormal        LogNormal  Monte Carlo
# > sample_effect               | 8 6 20  Normal            Normal     analytic
# > directions                  | 20 200  Normal            Normal     analytic
# > u              cells      n | 5       Normal            Normal     analytic

# %% [markdown]
# ## In which cells do donors differ?
#
# The same cells are decoded in every donor. `sd` is how much log2 expression then differs over donors, `p_none` the
# posterior probability that it is below 0.1: "no difference" is an answer here, not the lack of one.

# %%
spread = fit.sample_spread(cells, "cell_type")
print(spread[["sd", "p_none"]].round(1))
# >             sd  p_none
# > cell_type
# > type0      0.6     0.0
# > type1      0.1     1.0
# > type2      0.1     1.0
# > type3      0.1     1.0

# %% [markdown]
# ## Which donors are alike?
#
# Distances have intervals, and "normalized" is in units of how far a donor is from itself for all that is known. In
# type0 the tree of donors should be the one that was put in.

# %%
far = fit.sample_distances(cells, "cell_type")
print(far.groupby("group")["normalized"].mean().round().astype(int))
found = pyrosc.sample_matrix(far, "type0")
truth = adata.uns["distances"]["type0"]
pairs = np.triu_indices(8, 1)
print(f"rank correlation with the truth {stats.spearmanr(found.to_numpy()[pairs], truth.to_numpy()[pairs])[0]:.1f}")
tree, names = pyrosc.sample_tree(far, "type0")
leaves = hierarchy.dendrogram(tree, labels=names, no_plot=True)["ivl"]  # with matplotlib, dendrogram draws it
print(len(leaves), "leaves")
# > group
# > type0    14
# > type1     1
# > type2     1
# > type3     3
# > Name: normalized, dtype: int64
# > rank correlation with the truth 0.9
# > 8 leaves

# %% [markdown]
# ## What does a covariate do?
#
# Age is a property of donors, so donors are permuted, not cells. `sample_tests` asks it of all genes together, for
# each type; here the trees of donors know nothing of age. Were 1,300 cells taken for 1,300 witnesses, it would be
# found anywhere. A type that one age group lacks cannot be asked, and is left out with a warning.

# %%
asked = cells[(cells.obs["cell_type"] != "type3").to_numpy()]
tests = fit.sample_tests(asked, "age", "cell_type")
print(tests[["group", "covariate", "n_samples"]].to_string(index=False))
print(f"smallest p-value above 0.01: {tests['p_value'].min() > 0.01}")
effects = fit.sample_effects(asked, "age", "cell_type")
print(f"{effects['is_de'].sum()} genes called in {len(effects)}")
# > group covariate  n_samples
# > type0       age          8
# > type1       age          8
# > type2       age          8
# > smallest p-value above 0.01: True
# > 0 genes called in 600

# %% [markdown]
# With the first branch of the true tree as the covariate there is something to find, and only in type0.

# %%
clade = hierarchy.fcluster(hierarchy.linkage(truth.to_numpy()[pairs], "average"), 2, "maxclust")
adata.obs["clade"] = np.array(["one", "two"])[clade[adata.obs["donor"].cat.codes] - 1]
asked = pyrosc.Cells.from_anndata(adata[(adata.obs["cell_type"] != "type3").to_numpy()].copy(), sample="donor")
tests = fit.sample_tests(asked, "clade", "cell_type").set_index("group")
print(f"type0: p below 0.05, {tests.loc['type0', 'p_value'] < 0.05}")
others = tests.drop("type0")["p_value"].min()
print(f"the others: all above 0.05, {others > 0.05}")
# > type0: p below 0.05, True
# > the others: all above 0.05, True

# %% [markdown]
# ## More cells, or other cells?
#
# Young donors have no type3. That is no effect on expression; it is a density of states. And what a cell of type3
# would be in a young donor is a guess, which `admissible_samples` says.

# %%
abundance = fit.differential_abundance(cells, "age", "young", "old")
is_three = (cells.obs["cell_type"] == "type3").to_numpy()
print(f"log2 of densities, young over old: below -3 in type3, {abundance['lfc'][is_three].median() < -3}")
print(f"within 1 of 0 in the others, {abs(abundance['lfc'][~is_three].median()) < 1}")
allowed = fit.admissible_samples(cells)
young = [f"donor{d}" for d in range(4)]
print(f"cells of type3 that may be asked about in young donors: {allowed.loc[is_three, young].to_numpy().mean():.0%}")
# > log2 of densities, young over old: below -3 in type3, True
# > within 1 of 0 in the others, True
# > cells of type3 that may be asked about in young donors: 0%

# %% [markdown]
# ## Another belief
#
# The simplest hierarchy moves all cells of a donor alike. It cannot tell composition from state, and does not try: an
# effect is the mean state of a donor's cells. So donors "differ" by what cells they have.

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore", pyrosc.PyroscWarning)
    simple = pyrosc.fit(
        pyrosc.shifted_samples(cells, n_latent=5, n_hidden=64), cells, epochs=40, warmup=0.3, progress=False
    )
effect = simple.draws("sample_effect", cells, 50).mean(0)[:, 0]
share = np.stack([(adata.obs["cell_type"][number == d] == "type3").mean() for d in range(8)])
along = np.linalg.lstsq(np.column_stack([effect, np.ones(8)]), share, rcond=None)[0]
print(f"shares of type3 follow from the effects: {np.corrcoef(effect @ along[:-1], share)[0, 1] > 0.9}")
print(f"smallest p_none: {simple.sample_spread(cells, 'cell_type')['p_none'].min():.0f}")
# > shares of type3 follow from the effects: True
# > smallest p_none: 0

# %% [markdown]
# ## What this cannot say
#
# - Eight donors are eight witnesses. An effect of age that tests do not find may be there.
# - "In another donor" means: with that donor's effects, the state kept. Why the donor has them, counts do not say.
# - Effects are a few directions that all kinds of cells share. A little of what is true of one kind is decoded in the
#   others; tests therefore go by the counts of each kind, and `lfc_decoded` is for reading.
# - Intervals hold the uncertainty of effects and states, not that of the decoder of `u`.
