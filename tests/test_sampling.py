"""Chains of cells' own numbers: against posteriors known exactly, against Pyro's NUTS; guides against them."""

import dataclasses
import sys
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyrosc
from pyrosc import Cells
from pyrosc.check import guide_error, sample_posterior
from pyrosc.check.sampling import bulk_ess, chain_diagnostics, split_r_hat
from pyrosc.hmc import by_autograd, moments, transition

COUNTS = np.array([[4, 1, 2, 0, 1, 0], [0, 5, 1, 2, 7, 9], [12, 9, 15, 0, 0, 0], [0, 0, 0, 1, 0, 1]])
SHAPE, INVERSE = 2.0, 0.5


def two_rates(cells):
    """rate (n, 2) ~ Gamma; three genes follow the one and three the other: the posterior is Gamma too."""
    with cells.plate():
        rate = pyro.sample("rate", dist.Gamma(torch.full((len(cells), 2), SHAPE).to(cells.dtype), INVERSE).to_event(1))
        pyro.sample("x", dist.Poisson(rate.repeat_interleave(3, -1)).to_event(1), obs=cells.x)


def exact_guide(narrow):
    """The posterior itself; or with a variance ``narrow`` ** 2 times as large."""

    def guide(cells):
        shape = SHAPE + cells.x.reshape(-1, 2, 3).sum(-1)
        with cells.plate():
            pyro.sample("rate", dist.Gamma(shape / narrow**2, (INVERSE + 3.0) / narrow**2).to_event(1))

    return guide


def conjugate(narrow=1.0, counts=COUNTS):
    cells = Cells.from_counts(counts)
    program = pyrosc.Program(two_rates, cells, exact_guide(narrow)).to(torch.float64)
    settings = {"n_cells": len(cells), "state": "finished", "best_epoch": 1, "kl_weight": 1.0}
    return pyrosc.Fit(program, pd.DataFrame(), settings), cells


@pytest.fixture(scope="module")
def small_fit():
    data = pyrosc.simulate.tissue(150, 30, n_types=3, n_batches=2, depth=200, n_markers=8, seed=2)
    cells = Cells.from_anndata(data, batch="batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pyrosc.PyroscWarning)
        program = pyrosc.scvi(cells, n_latent=2, n_hidden=16)
        return pyrosc.fit(program, cells, epochs=15, progress=False), cells


# ---- transitions ------------------------------------------------------------------------------


def test_a_transition_leaves_its_target_as_it_is():
    """Draws of a normal stay draws of it, at any step size, and the target is that of the weighed terms."""
    torch.manual_seed(1)
    covariance = torch.tensor([[1.0, 0.8], [0.8, 2.0]], dtype=torch.float64)
    target = dist.MultivariateNormal(torch.tensor([1.0, -1.0], dtype=torch.float64), covariance)
    density = by_autograd(lambda v: target.log_prob(v) / 3)
    v = target.sample((20000, 1))
    point, factor = density(v), torch.eye(2, dtype=torch.float64).unsqueeze(0)

    for size, least, most in ((0.3, 0.9, 1.0), (1.2, 0.0, 0.9)):  # the second is refused often
        moved = transition(density, point, v.new_tensor([3.0]), factor, v.new_tensor(size), 3)
        found = moved.point.at[:, 0]

        # 20,000 draws: standard errors sqrt(2 / 20,000) = .01 of means, .02 of (co)variances; four of them.
        torch.testing.assert_close(found.mean(0), target.mean, atol=0.04, rtol=0)
        torch.testing.assert_close(found.T.cov(), covariance, atol=0.08, rtol=0)
        assert least < moved.acceptance.mean() < most
        torch.testing.assert_close(moved.point.terms, density(moved.point.at).terms)
        torch.testing.assert_close(moved.point.slopes, density(moved.point.at).slopes)
    wrong = transition(density, point, v.new_tensor([1.0]), factor, v.new_tensor(0.3), 3).point.at
    assert wrong.var() > 1.05 * v.var()  # that is another target, and it shows


def test_trajectories_that_leave_are_refused_and_counted():
    density = by_autograd(lambda v: -1e6 * v.pow(4).sum(-1))
    point, factor = density(torch.full((3, 2, 1), 0.03)), torch.ones(2, 1, 1)

    moved = transition(density, point, torch.ones(1), factor, torch.tensor(10.0), 5)

    assert moved.diverged.all()
    torch.testing.assert_close(moved.point.at, point.at)
    assert torch.isfinite(moved.point.slopes).all()


def test_covariances_of_few_draws_can_be_inverted():
    draws = torch.randn(3, 2, 5)
    draws[:, 1, 4] = 0.7

    mean, covariance = moments(draws)

    torch.testing.assert_close(mean, draws.double().mean(0))
    torch.linalg.cholesky(covariance)
    many = torch.randn(50000, 1, 2) @ torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    torch.testing.assert_close(moments(many)[1][0], many[:, 0].double().T.cov(), rtol=1e-3, atol=1e-3)


# ---- diagnostics ------------------------------------------------------------------------------


def chains(correlation, n=4000, seed=0):
    draw = np.random.default_rng(seed).normal(size=(4, n, 3))
    for i in range(1, n):
        draw[:, i] = correlation * draw[:, i - 1] + np.sqrt(1 - correlation**2) * draw[:, i]
    return draw


def test_effective_draws_of_an_autoregression_are_those_on_paper():
    for correlation in (0.0, 0.6):
        expected = 16000 * (1 - correlation) / (1 + correlation)
        np.testing.assert_allclose(bulk_ess(chains(correlation)), expected, rtol=0.15)
    # A monotone map changes no rank.
    np.testing.assert_allclose(bulk_ess(np.exp(3 * chains(0.6))), bulk_ess(chains(0.6)))


def test_r_hat_sees_chains_that_differ_in_place_or_in_scale():
    fine, place, scale = chains(0.3), chains(0.3), chains(0.3)
    place[0] += 0.5
    scale[0] *= 1.5

    assert (split_r_hat(fine) < 1.005).all()
    assert (split_r_hat(place) > 1.01).all()
    assert (split_r_hat(scale) > 1.01).all()


def test_diagnostics_are_arviz_s_where_it_is_installed_and_the_same_where_not(monkeypatch):
    draws = chains(0.5, 500)

    r_hat, ess, by = chain_diagnostics(draws)
    monkeypatch.setitem(sys.modules, "arviz_stats.base", None)
    own_r_hat, own_ess, whose = chain_diagnostics(draws)

    assert (by, whose) == ("arviz-stats", "pyrosc")
    np.testing.assert_allclose(own_r_hat, r_hat, atol=1e-6)
    # The sum of autocorrelations is cut off in ways that differ in details.
    np.testing.assert_allclose(own_ess, ess, rtol=0.02)


# ---- chains -----------------------------------------------------------------------------------


def test_draws_are_of_the_posterior_that_is_known():
    fit, cells = conjugate(narrow=0.7)  # a guide that is off costs nothing

    found = sample_posterior(fit, cells, n_draws=600, warmup=150, max_leapfrogs=3, progress=False, seed=3)

    rate = found.draws["rate"]
    assert rate.shape == (4, 600, 4, 2)
    np.testing.assert_allclose(found.numbers, np.log(rate), rtol=1e-5, atol=1e-6)  # float32
    shape = SHAPE + COUNTS.reshape(4, 2, 3).sum(-1)
    ess = found.table["ess"].to_numpy().reshape(4, 2)
    mean, sd = shape / (INVERSE + 3), np.sqrt(shape) / (INVERSE + 3)
    # Four standard errors of means by their effective draws; an sd has an error of some 1 / sqrt(2 ESS).
    assert (np.abs(rate.mean((0, 1)) - mean) < 4 * sd / np.sqrt(ess)).all()
    np.testing.assert_allclose(rate.std((0, 1)), sd, rtol=4 * 1.5 / np.sqrt(2 * ess.min()))
    thinned = rate[:, ::6].reshape(-1, 4, 2)
    p = [stats.kstest(thinned[:, n, k], stats.gamma(shape[n, k], scale=1 / 3.5).cdf).pvalue
         for n in range(4) for k in range(2)]  # fmt: skip
    assert min(p) > 1e-3
    guide = stats.gamma(shape[2, 0] / 0.49, scale=0.49 / 3.5).cdf  # what the guide says instead
    assert stats.kstest(thinned[:, 2, 0], guide).pvalue < 1e-3
    assert (found.cells["r_hat"] < 1.02).all()
    assert (found.cells["ess"] > 600).all()
    assert (found.cells["divergences"] == 0).all()
    assert found.cells["acceptance"].between(0.65, 0.97).all()


def test_pyros_nuts_finds_the_posterior_that_is_known():
    fit, cells = conjugate()

    found = sample_posterior(fit, cells[[2]], n_chains=2, warmup=50, n_draws=60, sampler="nuts", progress=False, seed=1)

    assert found.draws["rate"].shape == (2, 60, 1, 2)
    shape = SHAPE + COUNTS[2].reshape(2, 3).sum(-1)
    error = np.sqrt(shape) / 3.5 / np.sqrt(found.table["ess"].to_numpy())
    assert (np.abs(found.draws["rate"].mean((0, 1, 2)) - shape / 3.5) < 4 * error).all()


@pytest.mark.slow
def test_chains_agree_with_those_of_pyros_nuts(small_fit):
    fit, cells = small_fit
    few = cells[[3, 40]]

    ours = sample_posterior(fit, few, n_draws=1000, progress=False)
    theirs = sample_posterior(fit, few, n_chains=2, warmup=150, n_draws=350, sampler="nuts", progress=False)

    assert theirs.draws["z"].shape == (2, 350, 2, 2)
    assert list(ours.table.index) == list(theirs.table.index)
    error = np.hypot(ours.table["sd"] / np.sqrt(ours.table["ess"]), theirs.table["sd"] / np.sqrt(theirs.table["ess"]))
    assert ((ours.table["mean"] - theirs.table["mean"]).abs() < 4 * error).all()
    relative = np.sqrt(1 / (2 * ours.table["ess"]) + 1 / (2 * theirs.table["ess"]))
    assert ((ours.table["sd"] / theirs.table["sd"] - 1).abs() < 4 * 1.5 * relative).all()
    assert (ours.cells["r_hat"] < 1.01).all()


def test_sites_keep_their_scale_and_shape(small_fit):
    cells = small_fit[1]
    program = pyrosc.scvi(cells, n_latent=2, n_hidden=8, library=pyrosc.LatentLibrary())
    settings = {"n_cells": len(cells), "state": "finished", "best_epoch": 1, "kl_weight": 1.0}
    fit = pyrosc.Fit(program, pd.DataFrame(), settings)

    found = sample_posterior(fit, cells[:3], warmup=50, n_draws=20, max_leapfrogs=1, progress=False)

    assert found.draws["z"].shape == (4, 20, 3, 2)
    assert found.draws["library"].shape == (4, 20, 3, 1)
    assert (found.draws["library"] > 0).all()
    np.testing.assert_allclose(np.log(found.draws["library"][..., 0]), found.numbers[..., 2], rtol=1e-5)
    assert list(found.table.loc[cells.names[1]].index) == ["z[0]", "z[1]", "library"]
    assert "4 chains x 20 draws x 3 cells, 3 numbers each" in repr(found)
    again = sample_posterior(fit, cells[:3], warmup=50, n_draws=20, max_leapfrogs=1, progress=False)
    np.testing.assert_array_equal(again.numbers, found.numbers)


def test_draws_are_handed_to_arviz():
    fit, cells = conjugate()

    tree = sample_posterior(fit, cells, warmup=50, n_draws=12, progress=False).to_arviz()

    assert dict(tree["posterior"]["rate"].sizes) == {"chain": 4, "draw": 12, "cell": 4, "rate_dim_0": 2}


def test_numbers_out_of_range_are_refused():
    fit, cells = conjugate()
    for wrong, text in (
        (dict(n_chains=1), "n_chains must be a whole number of at least 2, not 1"),
        (dict(warmup=10), "warmup must be a whole number of at least 50"),
        (dict(n_draws=2.5), "n_draws must be a whole number of at least 10"),
        (dict(max_leapfrogs=0), "max_leapfrogs must be a whole number of at least 1"),
        (dict(sampler="gibbs"), 'sampler must be "hmc" or "nuts", not \'gibbs\''),
    ):
        with pytest.raises(ValueError, match=text):
            sample_posterior(fit, cells, progress=False, **wrong)


# ---- guides against them ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact_draws():
    fit, cells = conjugate(counts=np.random.default_rng(4).poisson(4.0, (20, 6)))
    return cells, sample_posterior(fit, cells, warmup=100, n_draws=400, max_leapfrogs=3, progress=False)


def test_the_exact_guide_passes_and_a_narrowed_one_is_caught(exact_draws):
    cells, draws = exact_draws
    counts = cells.x.numpy()

    right = guide_error(conjugate(1.0, counts)[0], cells, draws, max_r_hat=1.05)
    narrow = guide_error(conjugate(0.7, counts)[0], cells, draws, max_r_hat=1.05)

    assert right.attrs["verdict"] == "pass"
    assert right.attrs["share"] == 1.0
    assert right["sd_ratio"].to_numpy() == pytest.approx(1.0, abs=0.15)
    assert (right["mean_error"] < 0.2).all()
    assert right.attrs["wasserstein"] < 0.06
    assert narrow.attrs["verdict"] == "fail"
    assert narrow.attrs["share"] < 0.2
    assert narrow["sd_ratio"].median() == pytest.approx(0.7, abs=0.03)
    assert narrow.attrs["wasserstein"] > 0.15  # 0.3 sd times E|N(0, 1)| = 0.24
    assert "0% of 40 numbers (90% wanted): fail." in narrow.attrs["text"]


def test_cells_whose_chains_have_not_met_are_named_and_left_out(exact_draws):
    cells, draws = exact_draws
    worse = draws.cells.copy()
    worse.iloc[4, worse.columns.get_loc("r_hat")] = 1.3
    draws = dataclasses.replace(draws, cells=worse)

    found = guide_error(conjugate(1.0, cells.x.numpy())[0], cells, draws, max_r_hat=1.05)

    assert found.attrs["unmixed"] == [cells.names[4]]
    assert (~found["is_judged"]).sum() == 2
    assert f'chains have not met (R-hat above 1.05): "{cells.names[4]}".' in found.attrs["text"]


def test_draws_of_other_cells_are_refused(exact_draws):
    cells, draws = exact_draws
    fit = conjugate(1.0, cells.x.numpy())[0]
    with pytest.raises(ValueError, match="draws are of other cells"):
        guide_error(fit, cells[:5], draws)
    with pytest.raises(ValueError, match="nothing to sample"):
        guide_error(fit, cells, draws, warmup=100)
