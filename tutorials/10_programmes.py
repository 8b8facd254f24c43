# %% [markdown]
# # Programmes: which genes go together, and how sure is that?
#
# The decoder of scVI is a network: a latent dimension is no list of genes. Here log shares are linear in the state,
# so it is one, with an interval for each gene. The price is some held-out likelihood, printed below. Seven hundred
# blood cells; a minute or two on a laptop.

# %%
import warnings

import pyrosc

warnings.simplefilter("ignore", pyrosc.PyroscWarning)  # epochs and unused latents: not the question here
cells = pyrosc.Cells.from_anndata(pyrosc.datasets.pbmc(), label="cell_type")
train, test = cells.split(0.8, 0.2, seed=0)

# %% [markdown]
# ## The story
#
#     def model(cells, *, prior, loadings, library, dispersion, decoder, likelihood):
#         theta = dispersion()
#         weights = loadings()
#         with cells.plate():
#             z = pyro.sample("z", prior(cells))
#             total = library(cells)
#             rho = pyro.deterministic("rho", decoder(z, cells, weights), event_dim=1)
#             counts = likelihood(total * rho, dispersion.at(theta, cells))
#             pyro.sample("x", counts, obs=cells.x)
#
# `decoder` is softmax(z W' + covariates + offset), and W, genes by factors, is drawn once for all cells by the part
# `loadings`. By default that is a horseshoe: most genes hardly move with a factor, a few may move far.

# %%
program = pyrosc.linear_scvi(train)
print("\n".join(line.rstrip() for line in program.describe().splitlines()[1:5]))
fit = pyrosc.fit(program, train, progress=False)
# > site          plate  batch | event  law               guide                  KL
# > gene_scale                 | 765 10 HalfCauchy        LogNormal (completed)  Monte Carlo
# > factor_scale               | 10     HalfCauchy        LogNormal (completed)  Monte Carlo
# > loadings                   | 765 10 Normal            Normal (completed)     analytic

# %% [markdown]
# ## Reading the factors
#
# `top_genes` has the genes that each factor moves most, with intervals. Some factors that anyone who works with blood
# will know, found by one gene that each should have: which others are among the first twenty?

# %%
top = fit.top_genes(20)
known = {
    "GNLY": {"GZMB", "GZMH", "NKG7", "FGFBP2", "PRF1"},
    "MS4A1": {"CD79A", "CD79B", "BANK1", "BLK"},
    "TNFRSF17": {"MZB1", "IGJ"},
    "LYZ": {"CST3", "HLA-DRA", "HLA-DPA1", "HLA-DPB1"},
}
loadings = fit.loadings()
mean = loadings.xs("mean", axis=1, level=1)
for gene, others in known.items():
    factor = mean.loc[gene].abs().idxmax()
    found = others & set(top.loc[factor]["gene"])
    print(f"{gene}: {len(found)} of {len(others)}")
# > GNLY: 5 of 5
# > MS4A1: 4 of 4
# > TNFRSF17: 2 of 2
# > LYZ: 4 of 4

# %% [markdown]
# Cytotoxic cells, B cells, plasma cells, monocytes and dendritic cells. A loading is the change of a gene's log share
# per unit of the factor, relative to the median gene. Order and signs of factors are by a rule: most variance first,
# and the genes that move most go up. `factors` gives cells' scores in the same order and with the same signs.

# %%
cytotoxic = mean.loc["GNLY"].abs().idxmax()
row = loadings.loc["GNLY", cytotoxic]
print(f"GNLY: {row['mean']:.1f}, 90 % interval {row['lower']:.1f} to {row['upper']:.1f}")
rare = cells.schema.genes[int((train.x.sum(0) - 40).abs().argmin())]
widths = [loadings.loc[gene, cytotoxic]["upper"] - loadings.loc[gene, cytotoxic]["lower"] for gene in ("GNLY", rare)]
print(f"{rare}, 40 counts: an interval more than twice as wide: {widths[1] > 2 * widths[0]}")
score = fit.factors(test)[cytotoxic]
kind = test.obs["cell_type"].astype(str).to_numpy()
print(f"NK cells {score[kind == 'CD56+ NK'].mean():.1f}, B cells {score[kind == 'CD19+ B'].mean():.1f}")
# > GNLY: 2.6, 90 % interval 2.4 to 2.7
# > CD40LG, 40 counts: an interval more than twice as wide: True
# > NK cells 1.4, B cells -0.4

# %% [markdown]
# ## What does it cost?

# %%
network = pyrosc.fit(pyrosc.scvi(train), train, progress=False)
table = pyrosc.check.compare({"network": network, "linear": fit}, test, n_draws=100)
lost = -table.loc["linear", "difference"]
print(f"lost: {lost:.0f} nats of {-table.loc['network', 'score']:.0f} a cell, {table.loc['linear', 'verdict']}")
# > lost: 9 nats of 655 a cell, worse

# %% [markdown]
# A bend in the response of a gene is what a line cannot follow. On simulated tissue, which has none, the loss is a
# fraction of a per cent (benchmarks/results/programmes.md).
#
# ## Another belief
#
# Under normal loadings all genes may move with every factor. Do held-out cells mind? Hardly: what the
# prior changes is the angle from which the factors are seen, and how far small loadings are drawn to 0.

# %%
normal = pyrosc.fit(program.replace(loadings=pyrosc.NormalLoadings(1.0)), train, progress=False)
table = pyrosc.check.compare({"horseshoe": fit, "normal": normal}, test, n_draws=100)
apart = abs(table["difference"]).max()
print(f"apart by less than 2 nats a cell: {apart < 2}")
# > apart by less than 2 nats a cell: True

# %% [markdown]
# ## What the answer cannot say
#
# - Under normal loadings and normal states every rotation of the factors is as good as another. A sparse prior prefers
#   one, but training may end at another that is nearly as good: fit with other seeds, and trust what returns.
# - Intervals are of one guide, which takes loadings to be independent and states to be what it says. On planted
#   programmes they held genes that nothing moves as often as they promise, and those that move less often: refits,
#   `fit(..., ensemble=5)`, are nearer.
# - Two programmes that always go together in these cells are one factor. Types that exclude each other are opposite
#   ends of one, or each has its own: that is not in the counts.
