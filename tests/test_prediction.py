"""Counts that a story makes: the same noise in another world, synthetic cells, the law of counts by gene."""

import warnings

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats

import pyrosc
from pyrosc import Cells, ProgramError, PyroscWarning
from pyrosc.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from pyrosc.prediction import counts_at, noise_of

LAWS = {
    "NB": lambda mean: NegativeBinomial(mean, torch.tensor([0.3, 2.0, 1e6, 5.0])),
    "ZINB": lambda mean: ZeroInflatedNegativeBinomial(mean, torch.tensor(2.0), torch.tensor([-3.0, 0.0, 1.0, -1.0])),
    "Poisson": lambda mean: Poisson(mean),
}


@pytest.mark.parametrize("name", LAWS)
def test_the_noise_of_a_count_is_uniform_and_gives_the_count_back(name):
    draw = np.random.default_rng(0)
    mean = torch.tensor([0.1, 3.0, 40.0, 3000.0]).expand(20_000, 4)
    law = LAWS[name](mean)
    torch.manual_seed(0)
    x = law.sample().numpy().astype(float)

    lower, upper = noise_of(law, x, draw.uniform(size=x.shape))

    np.testing.assert_allclose(lower + upper, 1.0, atol=1e-9)
    np.testing.assert_array_equal(counts_at(law, lower, upper), x)
    for g in range(4):
        # 20,000 draws: the 99.9 % quantile of the statistic is 1.95 / sqrt(20,000).
        assert stats.kstest(lower[:, g], "uniform").statistic < 1.95 / 20_000**0.5


@pytest.mark.parametrize("name", LAWS)
def test_counts_with_the_noise_of_another_world_follow_the_law_of_their_own(name):
    draw = np.random.default_rng(1)
    ones = torch.ones(20_000, 4)
    before, after = (LAWS[name](torch.tensor(m) * ones) for m in ([0.1, 3.0, 40.0, 300.0], [0.4, 1.0, 60.0, 200.0]))
    torch.manual_seed(0)
    x = before.sample().numpy().astype(float)

    there = counts_at(after, *noise_of(before, x, draw.uniform(size=x.shape)))

    torch.manual_seed(1)
    fresh = after.sample().numpy()
    for g in range(4):
        assert stats.ks_2samp(there[:, g], fresh[:, g]).statistic < 1.95 * (2 / 20_000) ** 0.5
        # The order of cells stays: higher counts do not become lower ones.
        order = np.argsort(x[:, g], kind="stable")
        steps = pd.Series(there[order, g]).groupby(x[order, g])
        assert (steps.min().to_numpy()[1:] >= steps.max().to_numpy()[:-1]).all()


@pytest.mark.parametrize("law", [
    NegativeBinomial(torch.full((3,), 5.0), torch.tensor(2.0)),
    NegativeBinomial(torch.full((3,), 2.0), torch.tensor(50.0)),
    Poisson(torch.full((3,), 2.0)),
])  # fmt: skip
def test_far_tails_keep_their_counts(law):
    x = np.array([150.0, 300.0, 600.0]) if law.mean[0] == 5 else np.array([30.0, 60.0, 120.0])  # tails below 1e-15

    lower, upper = noise_of(law, x, np.full(3, 0.5))

    assert (upper < 1e-15).all()
    np.testing.assert_array_equal(counts_at(law, lower, upper), x)


@pytest.fixture(scope="module")
def fitted():
    data = pyrosc.simulate.tissue(240, 40, n_types=3, n_batches=3, depth=500, n_markers=15, effect=1.0, seed=2)
    cells = Cells.from_anndata(data, batch="batch", label="cell_type")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(pyrosc.scvi(cells, n_latent=3, n_hidden=32), cells, epochs=40, progress=False), cells


def test_nothing_set_is_as_it_was_seen(fitted):
    fit, cells = fitted
    same = fit.predict(cells, 3, do={}, noise="same")
    moved = fit.predict(cells, 3, do={"batch": "batch1"}, noise="same")
    anew = fit.predict(cells, 3, do={"batch": "batch1"})

    x = cells.x.numpy()
    np.testing.assert_array_equal(same, np.broadcast_to(x, same.shape))
    there = (cells.obs["batch"] == "batch1").to_numpy()
    np.testing.assert_array_equal(moved[:, there], np.broadcast_to(x[there], moved[:, there].shape))
    # Elsewhere counts change, by less than with new noise.
    away = ~there
    assert 0 < np.abs(moved[:, away] - x[away]).mean() < 0.5 * np.abs(anew[:, away] - x[away]).mean()


def test_counts_with_their_own_noise_have_the_means_of_the_world_that_is_set(fitted):
    fit, cells = fitted
    away = cells[(cells.obs["batch"] == "batch0").to_numpy()]
    same = fit.predict(away, 100, do={"batch": "batch1"}, noise="same", seed=1).mean((0, 1))
    anew = fit.predict(away, 100, do={"batch": "batch1"}, seed=2).mean((0, 1))
    factual = away.x.numpy().mean(0)

    # Each cell's own noise stays, so the ratio of sums is that of the worlds but for how well the story fits.
    model = fit.predict(away, 100, seed=3).mean((0, 1))
    seen = factual > 0.3
    np.testing.assert_allclose(
        np.log(same[seen] / factual[seen]), np.log(anew[seen] / model[seen]), atol=0.12
    )  # 80 cells, 100 draws of about 30 to 500 counts a gene: standard errors up to 0.04


def test_the_same_noise_answers_in_blocks_and_of_ensembles(fitted, monkeypatch):
    from pyrosc import loading

    fit, cells = fitted
    both = pyrosc.Fit(fit.program, fit.history, fit.settings, [fit.program, fit.program.copy()])
    whole = both.predict(cells[:50], 4, do={}, noise="same")
    monkeypatch.setattr(loading, "_BLOCK_VALUES", 2**14)
    cut = both.predict(cells[:50], 4, do={"batch": "all"}, noise="same")

    np.testing.assert_array_equal(whole, np.broadcast_to(cells[:50].x.numpy(), whole.shape))
    assert cut.shape == whole.shape
    assert both.predict(cells[:3], 1, noise="same").shape == (1, 3, 40)  # fewer than refits: of one at random
    with pytest.raises(ValueError, match='noise must be "new" or "same", not \'old\''):
        fit.predict(cells, 1, noise="old")


def test_genes_are_chosen_with_the_same_noise_too(fitted):
    fit, cells = fitted
    whole = fit.predict(cells[:20], 2, do={"batch": "batch2"}, noise="same", seed=4)
    some = fit.predict(cells[:20], 2, ["gene7", "gene3"], do={"batch": "batch2"}, noise="same", seed=4)

    np.testing.assert_array_equal(some, whole[..., [7, 3]])


# ---- synthetic cells ---------------------------------------------------------------------------


def test_generated_cells_are_like_those_they_are_drawn_from(fitted):
    fit, cells = fitted
    made = fit.generate(600, like=cells, seed=1)

    assert made.shape == (600, 40)
    assert set(made.obs) >= {"batch", "cell_type", "library", "like"}
    assert made.obs_names.is_unique
    assert made.uns["pyrosc"]["source"] == "aggregate posterior"
    # The states are of the cells named, and counts are at their totals.
    at = cells.names.get_indexer(made.obs["like"])
    np.testing.assert_allclose(made.obs["library"], cells.library.numpy().ravel()[at])
    assert np.array_equal(made.obs["cell_type"].astype(str), cells.obs["cell_type"].astype(str).to_numpy()[at])
    centre = fit.latent(cells)[at]
    spread = fit.latent_sd(cells)[at]
    z = (made.obsm["z"] - centre) / spread
    assert np.abs(z.mean()) < 0.15
    assert z.std() == pytest.approx(1.0, abs=0.08)
    total = np.asarray(made.X.sum(1)).ravel()
    # Totals scatter about the library with the variance of negative binomial counts.
    assert (total / made.obs["library"]).mean() == pytest.approx(1.0, abs=0.05)
    one = fit.generate(like=cells[:7])
    assert list(one.obs["like"]) == list(cells.names[:7])


def test_cells_generated_from_the_prior_have_its_states_and_can_be_read(fitted):
    fit, _ = fitted
    made = fit.generate(900, seed=3)

    assert made.obsm["z"].shape == (900, 3)
    assert made.obsm["z"].std() == pytest.approx(1.0, abs=0.06)
    assert made.uns["pyrosc"] == {"story": "scvi", "source": "prior", "seed": 3}
    shares = made.obs["batch"].value_counts(normalize=True)
    assert shares.max() < 0.5
    again = Cells.from_anndata(made, batch="batch", label="cell_type")
    assert len(again) == 900
    assert fit.latent(again).shape == (900, 3)
    moved = fit.generate(50, do={"batch": "batch2"})
    assert set(moved.obs["batch"].astype(str)) == {"batch2"}


def test_cells_generated_from_the_prior_share_what_the_fit_knows_of_all(fitted):
    from pyrosc.prediction import shared_draw

    _, cells = fitted
    part = pyrosc.GeneDispersion(pyrosc.Prior(dist.LogNormal, 5.0, 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(pyrosc.scvi(cells, dispersion=part, n_hidden=16), cells, epochs=1, progress=False)

    known = shared_draw(fit, 3)
    assert set(known) == {"dispersion"}
    made = fit.program.generate(5, fixed=known)["dispersion"]
    torch.testing.assert_close(made, known["dispersion"])
    assert fit.generate(30).shape == (30, 40)


def test_generate_refuses_what_it_cannot(fitted):
    fit, cells = fitted
    with pytest.raises(ValueError, match="generate needs a number of cells"):
        fit.generate()
    with pytest.raises(ValueError, match="n_cells must be a whole number of at least 1, not 0"):
        fit.generate(0)
    with pytest.raises(ValueError, match='"all" has no cell of its own'):
        fit.generate(5, do={"batch": "all"})
    with pytest.raises(ValueError, match="has no level .batch9."):
        fit.generate(5, like=cells, do={"batch": "batch9"})


# ---- the law of counts -------------------------------------------------------------------------


def test_the_noise_of_genes_is_that_of_the_law(fitted):
    fit, cells = fitted
    table = fit.noise(cells)

    from pyro import poutine

    with fit.program.driven(0), torch.no_grad():
        law = poutine.trace(fit.program.model).get_trace(cells[:3]).nodes["x"]["fn"].base_dist
    np.testing.assert_allclose(table["dispersion"], law.dispersion[0].numpy(), rtol=1e-5)
    assert list(table.columns) == ["dispersion", "dispersion_lower", "dispersion_upper"]
    assert list(table.index) == list(cells.schema.genes)
    np.testing.assert_allclose(table["dispersion_lower"], table["dispersion_upper"], rtol=1e-5)


@pytest.fixture(scope="module")
def gated(fitted):
    _, cells = fitted
    program = pyrosc.scvi(cells, n_latent=3, n_hidden=32, likelihood=pyrosc.ZINBLikelihood())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, epochs=10, progress=False), cells


def test_technical_zeros_are_by_bayes_rule(gated):
    fit, cells = gated
    some = cells[:30]
    found = fit.technical_zeros(some, n_draws=200)

    x = some.x.numpy()
    assert (found.to_numpy()[x > 0] == 0).all()
    zeros = found.to_numpy()[x == 0]
    assert ((zeros > 0) & (zeros < 1)).all()
    # By hand, with the law's own densities at the posterior mean of the state: P(extra) = gate / P(x = 0).
    from pyro import poutine

    with fit.program.driven(0), torch.no_grad():
        guide = poutine.trace(fit.program.guide).get_trace(some)
        guide.nodes["z"]["value"] = guide.nodes["z"]["fn"].mean
        law = poutine.trace(poutine.replay(fit.program.model, trace=guide)).get_trace(some).nodes["x"]["fn"].base_dist
    none = law.log_prob(torch.zeros(30, 40)).exp().numpy()
    by_hand = special.expit(law.gate_logits.numpy()) / none
    assert np.corrcoef(by_hand[x == 0], zeros)[0, 1] > 0.98
    assert np.abs(by_hand[x == 0] - zeros).mean() < 0.02
    one = fit.technical_zeros(some, "gene5", n_draws=200)
    np.testing.assert_allclose(one["gene5"], found["gene5"], rtol=1e-5)


def test_stories_without_gates_or_dispersions_say_so(fitted, gated):
    fit, cells = fitted
    with pytest.raises(ProgramError, match="NegativeBinomial, which has no extra zeros.*ZINBLikelihood"):
        fit.technical_zeros(cells)
    table = gated[0].noise(cells)
    assert {"dispersion", "gate", "gate_lower", "gate_upper"} <= set(table.columns)
    assert ((table["gate"] > 0) & (table["gate"] < 1)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        program = pyrosc.scvi(cells, likelihood=pyrosc.PoissonLikelihood())
        poisson = pyrosc.fit(program, cells, epochs=1, progress=False)
    with pytest.raises(ProgramError, match="are Poisson: they have no dispersion"):
        poisson.noise(cells)


def test_a_dispersion_with_a_prior_has_an_interval(fitted):
    _, cells = fitted
    part = pyrosc.GeneDispersion(pyrosc.Prior(dist.LogNormal, 0.0, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(pyrosc.scvi(cells, dispersion=part, n_hidden=16), cells, epochs=3, progress=False)

    table = fit.noise(cells, n_draws=200)
    drawn = fit.draws("dispersion", cells, 200)

    assert (table["dispersion_lower"] < table["dispersion_upper"]).all()
    np.testing.assert_allclose(table["dispersion"], drawn.mean(0), rtol=0.25)


# ---- for ArviZ ---------------------------------------------------------------------------------


def test_draws_go_to_arviz_with_their_names(fitted):
    fit, cells = fitted
    some = cells[:12]
    both = pyrosc.Fit(fit.program, fit.history, fit.settings, [fit.program, fit.program.copy()])
    tree = both.to_arviz(some, 8, seed=5)

    assert set(tree.children) >= {"posterior", "posterior_predictive", "observed_data", "log_likelihood"}
    z = tree["posterior"]["z"]
    assert z.dims == ("chain", "draw", "cell", "z_dim")
    assert z.shape == (2, 8, 12, 3)
    assert list(z.coords["cell"].values) == list(some.names)
    np.testing.assert_array_equal(z.values[0], fit.draws("z", some, 8, seed=5))
    x = tree["posterior_predictive"]["x"]
    assert x.dims == ("chain", "draw", "cell", "gene")
    assert list(x.coords["gene"].values) == list(cells.schema.genes)
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, some.x.numpy())
    # log p(x | z) of the first draw, by the story along that z.
    import pyro
    from pyro import poutine

    with fit.program.driven(0), torch.no_grad():
        held = pyro.condition(fit.program.model, data={"z": torch.as_tensor(z.values[0, 0])})
        site = poutine.trace(held).get_trace(some).nodes["x"]
    np.testing.assert_allclose(
        tree["log_likelihood"]["x"].values[0, 0], site["fn"].log_prob(site["value"]).numpy(), rtol=1e-4
    )
    shares = fit.to_arviz(some, 3, ["rho"])["posterior"]["rho"]
    assert shares.dims == ("chain", "draw", "cell", "gene")
    assert shares.sum("gene").values == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match='no site "depth"'):
        fit.to_arviz(some, 3, ["depth"])


def test_global_sites_go_to_arviz_by_gene(fitted):
    _, cells = fitted
    part = pyrosc.GeneDispersion(pyrosc.Prior(dist.LogNormal, 0.0, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(pyrosc.scvi(cells, dispersion=part, n_hidden=16), cells, epochs=1, progress=False)

    posterior = fit.to_arviz(cells[:5], 6)["posterior"]
    assert posterior["dispersion"].dims == ("chain", "draw", "gene")
    assert posterior["z"].dims == ("chain", "draw", "cell", "z_dim")


def test_without_arviz_it_says_what_to_install(fitted, monkeypatch):
    import sys

    fit, cells = fitted
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    with pytest.raises(ImportError, match=r'pip install "pyrosc\[arviz\]"'):
        fit.to_arviz(cells[:3], 2)
