# %% [markdown]
# # A first fit: what state is each cell in, and how sure are we?
#
# 700 human blood cells, 765 genes, counts. We say how such counts come about, fit it,
# and ask three things: does the state of a cell tell its type, how much of a gene does a cell
# express and how sure is that, and should we believe the intervals? Everything runs in
# under a minute on a laptop; lines after `# >` are what the cell above them prints.

# %%
import warnings

import numpy as np
import pyro.distributions as dist
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

import pyrosc

adata = pyrosc.datasets.pbmc()
cells = pyrosc.Cells.from_anndata(adata, label="cell_type")
print(cells)
# > Cells(700 cells x 765 genes, label='cell_type')

# %% [markdown]
# ## The story
#
# The story of scVI fits on a screen (`pyrosc/models/scvi.py`). Without its docstring:
#
#     def model(cells, *, prior, library, dispersion, decoder, likelihood):
#         theta = dispersion()
#         with cells.plate():
#             z = pyro.sample("z", prior(cells))
#             total = library(cells)
#             rho, hidden = decoder(z, cells)
#             rho = pyro.deterministic("rho", rho, event_dim=1)
#             counts = likelihood(total * rho, dispersion.at(theta, cells, hidden), hidden)
#             pyro.sample("x", counts, obs=cells.x)
#
# A cell has a state `z`, drawn from a prior. A network decodes it to `rho`, the share of the cell's
# counts that each gene is expected to get; times the total, and with negative binomial
# scatter, that gives the counts. What is handed in by name is a *part*, and can be replaced.

# %%
program = pyrosc.scvi(cells)
print(program.describe())
# > scvi: 765 genes, 201,998 weights, columns cell_type (10)
# > site     plate  batch | event  law               guide     KL
# > z        cells      n | 10     Normal            Normal    analytic
# > library  cells      n | 1      computed
# > rho      cells      n | 765    computed
# > x        cells      n | 765    NegativeBinomial  observed
# > depends: rho <- z; x <- z
# > parts:
# >   prior: Prior(Normal, 0, 1, size=10)
# >   library: ObservedLibrary()
# >   dispersion: GeneDispersion()
# >   decoder: Decoder(n_latent=10, n_hidden=128, n_layers=1, dropout=0.0, covariates='first')
# >   likelihood: NBLikelihood()
# >   encoder: Encoder(n_latent=10, n_hidden=128, n_layers=1, dropout=0.1, covariates=False)

# %% [markdown]
# ## The fit
#
# `fit` trains a copy: variational inference, a tenth of the cells held out, the KL terms warmed
# up to their full weight. The history shows it: the weight ends at 1, and the held-out bound is that of
# the best epoch.

# %%
# The data ask for fewer than ten dimensions, which pyrosc says in a warning; here that is no news.
warnings.simplefilter("ignore", pyrosc.PyroscWarning)

fit = pyrosc.fit(program, cells, progress=False)
first, best = fit.history.iloc[0], fit.history.iloc[fit.settings["best_epoch"] - 1]
print(f"KL weight {best.kl_weight:.0f} at the best epoch")
print(f"held-out ELBO: {first.validation_elbo:.0f} nats a cell after one epoch, {best.validation_elbo:.0f} at best")
# > KL weight 1 at the best epoch
# > held-out ELBO: -734 nats a cell after one epoch, -654 at best

# %% [markdown]
# ## Does the state tell the type?
#
# The labels were never used for training. k-means on the posterior means of `z`, against the labels
# that came with the data:

# %%
z = fit.latent(cells)
found = KMeans(10, n_init=10, random_state=0).fit_predict(z)
nmi = normalized_mutual_info_score(cells.label, found)
print(f"mutual information with the {len(cells.schema.label)} labels: {nmi:.1f}")
# > mutual information with the 10 labels: 0.6

# %% [markdown]
# ## How much of a gene, and how sure?
#
# CD79A marks B cells. Expected counts per 10,000 in one B cell and one monocyte, with the interval
# that holds 90 % of the posterior of that cell's state:

# %%
kind = cells.obs["cell_type"]
pair = cells[[int((kind == "CD19+ B").argmax()), int((kind == "CD14+ Monocyte").argmax())]]
table = fit.expression(pair, "CD79A", scale=1e4, interval=0.9, n_draws=1000)["CD79A"]
for label, row in zip(pair.obs["cell_type"], table.itertuples()):
    print(f"{label}: about {row.mean:.0f}, between {row.lower:.0f} and {row.upper:.0f}")
assert table["lower"].iloc[0] > table["upper"].iloc[1]
# > CD19+ B: about 72, between 52 and 94
# > CD14+ Monocyte: about 1, between 1 and 2

# %% [markdown]
# ## Should we believe the intervals?
#
# A guide can be checked where the truth is known: take states near where the cells are, draw counts
# for them from the fitted story, and see how often the guide's 90 % intervals hold the state that the
# counts were drawn from. (This asks whether inference is right *if the story is*, no more.)

# %%
near = torch.tensor(fit.latent(cells, n_draws=1)[0])
drawn = fit.program.generate(cells, fixed={"z": near}, seed=1)
with torch.no_grad():
    loc, sd = fit.program.parts["encoder"](cells.with_counts(drawn["x"]))
inside = ((near - loc).abs() < 1.645 * sd).float().mean()
print(f"nominal 90 %, covered {100 * inside:.0f} %")
assert 0.7 < inside < 0.9
# > nominal 90 %, covered 79 %

# %% [markdown]
# Too narrow: an encoder that learned from 630 cells reads new counts less well than it believes. Take
# such intervals as a lower bound on the doubt. With more cells it gets better: on 2,000 simulated cells the
# tests of this package find between 82 and 96 %.

# %% [markdown]
# ## Another prior
#
# Suppose states have heavier tails than a normal. One part changes, nothing else does; the KL term
# then has no closed form, and `describe` says so.

# %%
heavy = fit.program.replace(prior=pyrosc.Prior(dist.StudentT, 5.0, 0.0, 1.0))
print(heavy.describe().splitlines()[2])
refit = pyrosc.fit(heavy, cells, progress=False)
difference = refit.history["validation_elbo"].max() - fit.history["validation_elbo"].max()
print(f"the held-out bound moves by less than 5 nats a cell: {abs(difference) < 5}")
# > z        cells      n | 10     StudentT          Normal    Monte Carlo
# > the held-out bound moves by less than 5 nats a cell: True

# %% [markdown]
# ## What the answer cannot say
#
# The intervals carry the uncertainty of a cell's state, *given the weights* of the decoder; with 700 cells the
# weights are uncertain too, so a mean over many cells is less sure than its interval (tables say
# `uncertainty: z only`). And a state that tells the types apart is no proof that ten types exist.

# %%
print(fit.expression(pair, "CD79A").attrs["uncertainty"])
assert np.isfinite(z).all()
# > z only
