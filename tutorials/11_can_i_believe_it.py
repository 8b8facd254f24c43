# %% [markdown]
# # Can I believe it? A fit that fails its checks, repaired step by step
#
# A fit always answers, with intervals. This page asks whether they may be believed: first of a fit that they may not,
# then of the same one after each repair. Seven hundred blood cells and the 250 genes seen most; a minute or two on a
# laptop.

# %%
import warnings

import numpy as np

import pyrosc

warnings.simplefilter("ignore", pyrosc.PyroscWarning)  # epochs and unused latents: not the question here
adata = pyrosc.datasets.pbmc()
often = np.sort(np.argsort(-np.asarray(adata.X.mean(0)).ravel())[:250])
cells = pyrosc.Cells.from_anndata(adata, label="cell_type", genes=list(adata.var_names[often]))
train, test = cells.split(0.85, 0.15, seed=0)

# %% [markdown]
# ## The story, and a belief that is wrong
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
# With `PoissonLikelihood()` it says that counts scatter no more than a Poisson law around what state and total give.

# %%
poisson = pyrosc.scvi(train, likelihood=pyrosc.PoissonLikelihood(), dispersion=None)
fit = pyrosc.fit(poisson, train, progress=False)

# %% [markdown]
# `pyrosc.check.summary` runs the checks that a minute affords and prints what it found and what to do. It answers the
# same as a table, of which we show some rows. Held-out cells are the ones to ask about.


# %%
def show(table, *checks):
    for check in checks:
        row = table.loc[check]
        print(f"{check:12} {row['value']:4.1f}  held against {row['reference']:12} {row['verdict']}")


table = pyrosc.check.summary(fit, test, show=False, progress=False)
show(table, "latent use", "amortisation", "coverage", "calibration")
print(table.loc["amortisation", "advice"])
# > latent use   10.0  held against >= 2         ok
# > amortisation  8.3  held against <= 1         fails
# > coverage      0.1  held against 0.9 +- 0.05  fails
# > calibration   0.2  held against >= 0.95      fails
# > the encoder lags behind its family: fit.refine(cells) for these, fit.train_guide(cells) for any

# %% [markdown]
# Most of it fails. Of regions that should hold the state of a cell with probability 0.9, one in ten does. That is asked
# of cells which the fit itself made up, whose states are known (`pyrosc.check.calibration`), so a wrong story is no
# excuse: the encoder does not find the posterior even where the story is true. The gap says by how many nats.
#
# Two things can be wrong, and they are told apart by two kinds of checks. *Is the story like the data?* is asked by
# counts that it makes up.

# %%
predictive = pyrosc.check.posterior_predictive(fit, test, ["variance", "top-gene correlation"], n_draws=100)
share = (predictive.loc[predictive["statistic"] == "variance", "p"] < 0.05).mean()
print(f"share of genes whose variance is not as the story makes it: {share:.1f} (0.05 by chance)")
# > share of genes whose variance is not as the story makes it: 0.1 (0.05 by chance)

# %% [markdown]
# ## First repair: the story
#
# More genes scatter more than Poisson than chance allows, and the state has to take up what they scatter: it is sharper
# than it should be, and hard to find. A negative binomial has a number for that. Cells of blood come in groups, so a
# mixture is a better prior; and latents may depend on each other given the counts, so the encoder may say so.

# %%
program = pyrosc.scvi(train, prior=pyrosc.MixturePrior(10), encoder=pyrosc.FullRankEncoder())
fit = pyrosc.fit(program, train, progress=False)
table = pyrosc.check.summary(fit, test, show=False, progress=False)
show(table, "variance", "prior", "amortisation", "coverage", "calibration", "guide")
# > variance      0.1  held against <= 0.16      ok
# > prior         0.5  held against <= 0.65      ok
# > amortisation  1.5  held against <= 1         look
# > coverage      0.6  held against 0.9 +- 0.05  fails
# > calibration   0.6  held against >= 0.95      fails
# > guide         0.6  held against >= 0.95      look

# %% [markdown]
# Counts now look like those that were seen, and half of the guide's error is gone: what was wrong with the story had
# been hard on the encoder too. *Is the guide the posterior?* is still answered by no: one network guesses all cells,
# and has seen six hundred of them.
#
# ## Second repair: the guess of each cell
#
# Weights are left alone. Each cell's guess is improved from where the encoder starts.

# %%
refined = fit.refine(test, family="full", progress=False)
before, after = refined.settings["refined"]["elbo_before"], refined.settings["refined"]["elbo_after"]
print(f"ELBO {before:.1f} before, {after:.1f} after: {after - before:.1f} nats a cell")
table = pyrosc.check.summary(refined, test, show=False, progress=False)
show(table, "family", "coverage", "calibration", "guide")
# > ELBO -361.2 before, -359.5 after: 1.7 nats a cell
# > family        0.2  held against <= 1         ok
# > coverage      0.9  held against 0.9 +- 0.05  ok
# > calibration   1.0  held against >= 0.95      ok
# > guide         1.0  held against >= 0.95      ok

# %% [markdown]
# Regions hold what they say, and weights of draws are even enough to take the rest of the error away (`importance=`).
#
# ## Beside a sampler
#
# A check may share a mistake with what it checks. Hamiltonian Monte Carlo shares none with the encoder: for six cells,
# with weights held, what are the posterior's sds beside the guide's?

# %%
few = test[:6]
draws = pyrosc.check.sample_posterior(fit, few, n_chains=4, warmup=300, n_draws=500, progress=False)
for name, one in (("encoder", fit), ("refined", refined)):
    error = pyrosc.check.guide_error(one, few, draws, progress=False)
    off = error["mean_error"].mean()
    print(f"{name}: {error.attrs['share']:.0%} of sds within a fifth of the sampler's, means off by {off:.2f} sd")
# > encoder: 92% of sds within a fifth of the sampler's, means off by 0.27 sd
# > refined: 100% of sds within a fifth of the sampler's, means off by 0.05 sd

# %% [markdown]
# ## What this does to an answer
#
# Intervals of expression come from draws of the state. For the gene that B cells are known by, how wide are they?

# %%
gene = "CD79A"
width = {}
for name, one in (("encoder", fit), ("refined", refined)):
    table = one.expression(test, gene, interval=0.9, n_draws=200)
    width[name] = np.log2(table[gene]["upper"] / table[gene]["lower"]).median()
    print(f"{name}: the 90 % interval of {gene} spans a factor of {2 ** width[name]:.2f}")
# > encoder: the 90 % interval of CD79A spans a factor of 2.22
# > refined: the 90 % interval of CD79A spans a factor of 2.42

# %% [markdown]
# ## What the checks cannot say
#
# - Calibration is about cells that the story makes. Where data are not like that, as with the Poisson above, a guide
#   can be right about a wrong story: look at both kinds of checks.
# - All of this is given the weights. That other weights would fit as well is the business of `fit(..., ensemble=5)`.
# - `ok` is no proof. A minute's checks see errors of the size that they state; `pyrosc.check.calibration`,
#   `importance`, `evidence` and `sample_posterior` see smaller ones for more time.
# - Refined cells are those that were handed in. New ones have the encoder's guess until they are refined, and say so.
#   `fit.train_guide(cells)` betters the encoder itself, for any cell and by less: it learns on while the story stands
#   still, on measured cells and on ones that the story makes up.
