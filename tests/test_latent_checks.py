"""The latent space: information and the aggregate posterior by hand, and what a classifier sees of the prior."""

import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats
from torch import nn

import pyrosc
from pyrosc import Cells, MixturePrior, PoissonLikelihood, Prior, Program, ProgramError, PyroscWarning, check
from pyrosc.check.latent import _densities, _is_one_law, _mixture


class Spelled(nn.Module):
    """The state stands in the counts: loc_k = (x_k - 2000) / 500, so that a test can say what q is."""

    def __init__(self, *sd):
        super().__init__()
        self.register_buffer("sd", torch.tensor(sd))

    def forward(self, cells):
        loc = (cells.x[:, : len(self.sd)] - 2000) / 500
        return loc, self.sd.expand_as(loc)


class Flat(nn.Module):
    def forward(self, z, cells):
        rho = torch.full((*z.shape[:-1], cells.n_genes), 1.0 / cells.n_genes)
        return rho, None


def one_state(cells, *, prior, decoder, likelihood):
    with cells.plate():
        z = pyro.sample("z", prior(cells))
        rho = pyro.deterministic("rho", decoder(z, cells)[0], event_dim=1)
        pyro.sample("x", likelihood(cells.library * rho), obs=cells.x)


def beside(cells, *, encoder):
    with cells.plate():
        loc, scale = encoder(cells)
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def turned(cells, *, encoder):
    """A guide with correlation."""
    with cells.plate():
        loc, scale = encoder(cells)
        tril = torch.diag_embed(scale) + 0.3 * torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))


def collapsed(cells, *, encoder):
    """One that says the prior of every cell."""
    with cells.plate():
        loc, scale = encoder(cells)
        pyro.sample("z", dist.Normal(torch.zeros_like(loc), torch.ones_like(scale)).to_event(1))


def said(loc, sd, prior=None, guide=beside, **columns):
    """(Fit, Cells) of a story whose guide is N(loc (N, K), sd (K,))."""
    loc = np.asarray(loc)
    cells = Cells.from_counts(np.rint(2000 + 500 * loc).clip(0).astype(np.float32), **columns)
    prior = Prior(dist.Normal, 0.0, 1.0, size=loc.shape[1]) if prior is None else prior
    program = Program(
        one_state, cells, guide, encoder=Spelled(*sd), prior=prior, decoder=Flat(), likelihood=PoissonLikelihood()
    )
    return pyrosc.Fit(program, [], {"n_cells": len(loc), "state": "finished", "best_epoch": 1}), cells


# ---- by hand -----------------------------------------------------------------------------------


def test_mixtures_over_cells_are_those_of_scipy():
    draw = np.random.default_rng(0)
    loc, sd, z = draw.normal(size=(30, 3)), draw.uniform(0.2, 1.0, (30, 3)), draw.normal(size=(4, 30, 3))
    by_hand = stats.norm.logpdf(z[..., None, :], loc, sd)  # (4, 30, 30, 3), own cell on the diagonal
    normals = [dist.Normal(*map(torch.tensor, (loc[at], sd[at]))).to_event(1) for at in (slice(7), slice(7, None))]

    own, own_k = _densities(normals, torch.tensor(z))
    mixed, mixed_k = _mixture(normals, torch.tensor(z))

    of_own = np.einsum("snnk->snk", by_hand)
    np.testing.assert_allclose(own_k, of_own, atol=1e-9)
    np.testing.assert_allclose(own, of_own.sum(-1), atol=1e-9)
    np.testing.assert_allclose(mixed_k, special.logsumexp(by_hand, axis=2) - np.log(30), atol=1e-9)
    np.testing.assert_allclose(mixed, special.logsumexp(by_hand.sum(-1), axis=2) - np.log(30), atol=1e-9)


def test_laws_that_are_no_products_have_the_density_of_all_dimensions_alone():
    draw = np.random.default_rng(1)
    loc, z = draw.normal(size=(12, 2)), draw.normal(size=(1, 12, 2))
    cov = np.array([[1.0, 0.6], [0.6, 0.5]])
    law = dist.MultivariateNormal(torch.tensor(loc), torch.tensor(cov))

    own, own_k = _densities([law], torch.tensor(z))
    mixed, mixed_k = _mixture([law], torch.tensor(z))

    by_hand = np.array([[stats.multivariate_normal(m, cov).logpdf(v) for m in loc] for v in z[0]])
    assert own_k is None
    assert mixed_k is None
    np.testing.assert_allclose(own[0], np.diag(by_hand), atol=1e-9)
    np.testing.assert_allclose(mixed[0], special.logsumexp(by_hand, axis=1) - np.log(12), atol=1e-9)


# ---- where the answer is known -----------------------------------------------------------------

SD = np.array([0.5, 0.8])


def matching(n, seed=0):
    """Posterior means (N, 2) whose aggregate with sds ``SD`` is N(0, I), but for the sample: q and p of PPCA."""
    return np.random.default_rng(seed).normal(size=(n, 2)) * np.sqrt(1 - SD**2)


def test_information_of_a_linear_gaussian_story_is_the_closed_one():
    fit, cells = said(matching(2000), SD)

    table = check.latent(fit, cells, seed=1)

    found = table.attrs
    truth = -np.log(SD)  # I(z; x) = log(1 / s) where z is N(0, 1) and z | x has sd s
    # Draws scatter by 0.02. Means of 2,000 cells in place of their law cost a few hundredths (twice the cells, half).
    assert found["information"] == pytest.approx(truth.sum(), abs=4 * found["information_se"] + 0.02)
    np.testing.assert_allclose(table["information"], truth, atol=0.08)
    np.testing.assert_allclose(table["kl"], truth, atol=0.08)  # p is right, so that KL is all information
    assert abs(found["kl_aggregate"]) < 0.02
    assert abs(found["auc"] - 0.5) < 4 * found["auc_se"]
    np.testing.assert_allclose(table["variance"], 1 - SD**2, rtol=0.15)  # of 2,000: 4 times sqrt(2 / N)
    np.testing.assert_allclose(table["sd"], SD, rtol=1e-6)
    assert found["n_active"] == 2
    assert found["site"] == "z"
    assert found["most_information"] == np.log(2000)


def test_a_prior_beside_the_states_costs_its_distance_and_is_told():
    fit, cells = said(matching(2000), SD, Prior(dist.Normal, 1.0, 1.0, size=2))

    found = check.latent(fit, cells, seed=1).attrs

    assert found["kl_aggregate"] == pytest.approx(1.0, abs=0.15)  # two means 1 apart: 1/2 each; sd sqrt(2 / N) = 0.03
    assert found["information"] == pytest.approx(-np.log(SD).sum(), abs=0.1)  # which is not about the prior
    # Two normals sqrt(2) apart: the best area is Phi(sqrt(2) / sqrt(2)). The classifier has to learn it.
    assert stats.norm.cdf(1.0) - 0.04 < found["auc"] < stats.norm.cdf(1.0) + 4 * found["auc_se"]


def test_kl_is_information_and_distance_together_and_that_of_dimensions_added():
    fit, cells = said(matching(300), SD, Prior(dist.Laplace, 0.3, 1.2, size=2))

    table = check.latent(fit, cells, n_draws=3, holes=False)

    a = table.attrs
    assert a["kl"] == pytest.approx(a["information"] + a["kl_aggregate"], abs=1e-9)
    assert a["kl"] == pytest.approx(table["kl"].sum(), abs=1e-6)
    assert "auc" not in a


def test_information_between_correlated_laws_is_the_closed_one():
    # q_n = N(a_n, L L') with L = [[.5, 0], [.3, .6]], a_n ~ N(0, C): I = log(|C + LL'| / |LL'|) / 2.
    tril, cov = np.array([[0.5, 0.0], [0.3, 0.6]]), np.diag([0.6, 0.3])
    loc = np.random.default_rng(2).multivariate_normal(np.zeros(2), cov, 2000)
    fit, cells = said(loc, [0.5, 0.6], guide=turned)

    table = check.latent(fit, cells, holes=False)

    noise = tril @ tril.T
    truth = 0.5 * np.log(np.linalg.det(cov + noise) / np.linalg.det(noise))
    assert table.attrs["information"] == pytest.approx(truth, abs=4 * table.attrs["information_se"] + 0.02)
    assert table[["kl", "information"]].isna().all(axis=None)  # not of single dimensions
    np.testing.assert_allclose(table["sd"], np.sqrt(np.diag(noise)), rtol=1e-5)


def test_a_guide_that_says_the_prior_has_no_information_and_no_unit():
    fit, cells = said(matching(400), SD, guide=collapsed)

    table = check.latent(fit, cells, n_draws=2)

    a = table.attrs
    assert not table["active"].any()
    assert a["n_active"] == 0
    assert (table["variance"] == 0).all()
    for name in ("kl", "information", "kl_aggregate"):
        assert a[name] == pytest.approx(0.0, abs=1e-5)  # float32
    assert abs(a["auc"] - 0.5) < 4 * a["auc_se"]


def test_one_dimension_of_two_is_said_to_be_used():
    loc = matching(400) * [1.0, 0.0]
    fit, cells = said(loc, [0.5, 1.0])

    table = check.latent(fit, cells, holes=False)

    assert list(table["active"]) == [True, False]
    assert table["information"][1] == pytest.approx(0.0, abs=1e-5)
    assert table["information"][0] > 0.5


# ---- holes -------------------------------------------------------------------------------------


def two_groups(n, seed=0):
    """Means in two groups whose aggregate has mean 0 and variance 1 in each dimension, as N(0, I) has."""
    draw = np.random.default_rng(seed)
    return np.where(draw.random((n, 1)) < 0.5, 0.8, -0.8) * np.ones(2) + draw.normal(size=(n, 2)) * 0.3


def test_a_hole_between_two_groups_is_found_and_a_mixture_fills_it():
    sd = np.full(2, (1 - 0.8**2 - 0.3**2) ** 0.5)
    locs, scales = 0.8 * np.array([[1.0, 1.0], [-1.0, -1.0]]), np.full((2, 2), 0.6)
    plain, cells = said(two_groups(1000), sd)
    mixture, _ = said(two_groups(1000), sd, MixturePrior(locs=locs, scales=scales, learned=False))

    hole, filled = (check.latent(fit, cells, seed=2).attrs for fit in (plain, mixture))

    assert hole["auc"] > 0.5 + 8 * hole["auc_se"]
    assert abs(filled["auc"] - 0.5) < 4 * filled["auc_se"]
    assert hole["kl_aggregate"] > 0.3
    assert abs(filled["kl_aggregate"]) < 0.02
    # The closed one of the hole: entropies by a grid.
    grid = np.linspace(-6, 6, 601)
    one = np.stack(np.meshgrid(grid, grid), -1)
    law = sum(0.5 * stats.norm.pdf(one, m, 0.6).prod(-1) for m in locs)
    log = np.log(np.maximum(law, 1e-300)) - stats.norm.logpdf(one).sum(-1)
    assert hole["kl_aggregate"] == pytest.approx(float((law * log).sum() * 0.02**2), abs=0.1)


def test_samples_of_other_laws_are_told_by_as_much_as_they_can_be():
    draw = np.random.default_rng(3)
    here = draw.normal(size=(1500, 5))

    shifted, se = check.c2st(here, draw.normal(size=(1500, 5)) + [0.8, 0, 0, 0, 0])
    wide, _ = check.c2st(here, 1.5 * draw.normal(size=(1000, 5)))
    chol = np.linalg.cholesky(0.6 * np.eye(5) + 0.4)
    correlated, _ = check.c2st(here, draw.normal(size=(1500, 5)) @ chol.T)

    best = stats.norm.cdf(0.8 / 2**0.5)
    assert best - 0.05 < shifted < best + 4 * se
    # Scale: |z|^2 against 2.25 |z|^2, chi-squared of 5; area by its ratio, F(5, 5).
    best = stats.f.cdf(2.25, 5, 5)
    assert best - 0.05 < wide < best + 4 * 0.015
    assert correlated > 0.65


def test_one_law_is_told_from_itself_by_chance_alone():
    draw = np.random.default_rng(4)

    found = np.array([check.c2st(*draw.normal(size=(2, 200, 2)), seed=i) for i in range(12)])

    z = (found[:, 0] - 0.5) / found[:, 1]
    assert np.abs(z).max() < 3.5  # of 12 about standard normal
    assert 0.3 < z.std() < 1.7  # chi-squared of 11, 0.1 % at either side of 0.7 and 1
    one, other = draw.normal(size=(2, 60, 2))
    assert check.c2st(one, other, seed=1) == check.c2st(one, other, seed=1)


@pytest.mark.slow
def test_areas_of_one_law_have_the_error_that_is_stated():
    draw = np.random.default_rng(5)

    found = np.array([check.c2st(*draw.normal(size=(2, 300, 3)), seed=i) for i in range(150)])

    z = (found[:, 0] - 0.5) / found[:, 1]
    assert abs(z.mean()) < 4 / 150**0.5
    assert 0.6 < z.std() < 1.23  # at most 1, and 4 times 1 / sqrt(300); folds taken as independent give 1.5
    assert 1.5 * z.std() > 1.23


# ---- any story ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pyrosc.PyroscWarning")
@pytest.mark.parametrize(
    "prior", [MixturePrior(3), pyrosc.VampPrior(5), pyrosc.FlowPrior(2), MixturePrior(labels=True)],
    ids=["mixture", "vamp", "flow", "labels"],
)  # fmt: skip
def test_any_prior_will_do(prior, tissue):
    cells = Cells.from_anndata(tissue[:200], batch="batch", label="cell_type")
    fit = pyrosc.fit(pyrosc.scvi(cells, n_latent=3, n_hidden=16, prior=prior), cells, epochs=1, progress=False)
    before = {name: value.clone() for name, value in fit.program.state_dict().items()}

    table = check.latent(fit, cells, holes=False, seed=3)

    assert all(torch.equal(value, before[name]) for name, value in fit.program.state_dict().items())
    a = table.attrs
    law = fit.program.parts["prior"]
    by_label = bool(getattr(law, "arguments", {}).get("labels"))
    if not by_label:
        assert a["kl"] == pytest.approx(a["information"] + a["kl_aggregate"], abs=1e-6)
    else:  # its KL is that to the prior of a cell's own label, the distance that to their mean
        assert a["kl"] > 0
        assert np.isfinite(a["kl_aggregate"])
    assert table["kl"].isna().all()
    assert (table["information"] >= 0).all()
    # The KL beside that of 400 more draws: 200 cells, sds of some nats.
    assert a["kl"] == pytest.approx(check.latent(fit, cells, n_draws=50, holes=False).attrs["kl"], abs=1.0)
    assert check.latent(fit, cells, holes=False, seed=3).equals(table)


@pytest.mark.filterwarnings("ignore::pyrosc.PyroscWarning")
def test_stories_of_several_states_are_asked_about_the_one_that_has_a_law(tissue):
    cells = Cells.from_anndata(tissue[:120], label="cell_type", batch="batch")
    typed = pyrosc.fit(pyrosc.scanvi(cells, n_latent=3, n_hidden=16), cells, epochs=1, progress=False)
    donors = Cells.from_anndata(tissue[:120], sample="batch")
    shifted = pyrosc.fit(pyrosc.mrvi(donors, n_latent=3, n_hidden=16), donors, epochs=1, progress=False)

    of_types = check.latent(typed, cells)
    of_samples = check.latent(shifted, donors, holes=False)

    assert of_types.index.name == "z"
    assert np.isnan(of_types.attrs["kl"])
    assert np.isnan(of_types.attrs["kl_aggregate"])
    assert of_types.attrs["information"] > 0
    assert 0 < of_types.attrs["auc"] < 1
    assert of_samples.index.name == "u"
    assert np.isfinite(of_samples.attrs["information"])
    with pytest.raises(ProgramError, match='draws "u" given .*"z".* ask about "z"'):
        check.latent(typed, cells, site="u")
    with pytest.raises(ValueError, match='the guide of mrvi draws no "z".*pass site="u"'):
        check.latent(shifted, donors, site="z")


def test_a_dispersion_with_a_prior_is_drawn_once(tissue):
    cells = Cells.from_anndata(tissue[:100])
    program = pyrosc.scvi(cells, n_latent=2, dispersion=pyrosc.GeneDispersion(Prior(dist.LogNormal, 0.0, 1.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(program, cells, epochs=1, progress=False)

        assert np.isfinite(check.latent(fit, cells, holes=False).attrs["kl_aggregate"])
    with pytest.raises(ValueError, match='draws no "theta"'):
        check.latent(fit, cells, site="theta")
    with pytest.raises(ProgramError, match='site "dispersion" .* is no state of each cell'):
        check.latent(fit, cells, site="dispersion")


def test_priors_that_differ_between_cells_are_noticed():
    same = dist.Normal(torch.zeros(4, 2), torch.ones(4, 2)).to_event(1)
    other = dist.Normal(torch.tensor([[0.0, 0.0]] * 3 + [[0.5, 0.0]]), torch.ones(4, 2)).to_event(1)

    assert _is_one_law([same, same], torch.zeros(8, 2))
    assert not _is_one_law([same, other], torch.zeros(8, 2))


def test_narrow_states_are_said_to_be_at_the_bound():
    fit, cells = said(matching(100), [0.002, 0.8])

    with pytest.warns(PyroscWarning, match=r"of 100 cells it is at most 4\.61.*Give more cells"):
        found = check.latent(fit, cells, holes=False).attrs

    assert np.log(100) - np.log(2) < found["information"] <= np.log(100)
    with warnings.catch_warnings():  # wide ones are not
        warnings.simplefilter("error")
        check.latent(*said(matching(100), SD), holes=False)


def test_many_cells_are_represented_by_some():
    fit, cells = said(matching(500), SD)

    found = check.latent(fit, cells, n_cells=200, holes=False)

    assert found.attrs["n_cells"] == 200
    assert found.attrs["most_information"] == np.log(200)
    assert found.attrs["information"] == pytest.approx(-np.log(SD).sum(), abs=0.35)


def test_what_cannot_be_asked_is_refused(monkeypatch):
    fit, cells = said(matching(60), SD)
    with pytest.raises(ValueError, match="at least 20, not 5"):
        check.latent(fit, cells[:5])
    with pytest.raises(ValueError, match="n_draws must be a whole number of at least 1, not 0"):
        check.latent(fit, cells, n_draws=0)
    one = np.zeros((50, 2))
    with pytest.raises(ValueError, match=r"other must have shape \(rows, 2\), not \(50, 3\)"):
        check.c2st(one, np.zeros((50, 3)))
    with pytest.raises(ValueError, match="other has 20 rows; 5 folds need at least 25"):
        check.c2st(one, np.zeros((20, 2)))
    with pytest.raises(ValueError, match="one has 1 numbers that are not finite"):
        check.c2st(np.where(np.arange(100).reshape(50, 2) == 7, np.nan, one), one)
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ImportError, match=r'pip install "pyrosc\[demo\]"'):
        check.latent(fit, cells)
