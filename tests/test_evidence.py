"""Bounds of log p(x): against cells whose evidence is known in closed form, or by a grid."""

import warnings

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats

import pyrosc
from pyrosc import Cells
from pyrosc.cell_posterior import CellPosterior
from pyrosc.check import evidence, gaps
from pyrosc.check.evidence import _asked, _GuidePath, _PriorPath, schedule

from .test_sampling import COUNTS, INVERSE, SHAPE, conjugate


def a_fit(program, cells):
    settings = {"n_cells": len(cells), "state": "finished", "best_epoch": 1, "kl_weight": 1.0}
    return pyrosc.Fit(program, pd.DataFrame(), settings)


def exact(counts):
    """(N,) log p(x): Poisson counts, their rates integrated out by hand."""
    total = counts.reshape(-1, 2, 3).sum(-1)
    log = SHAPE * np.log(INVERSE) - special.gammaln(SHAPE) + special.gammaln(SHAPE + total)
    log = log - (SHAPE + total) * np.log(INVERSE + 3)
    return log.sum(-1) - special.gammaln(counts + 1).sum(-1)


# ---- paths ------------------------------------------------------------------------------------


def test_a_schedule_goes_from_nought_to_one_in_small_steps_at_its_ends():
    found = schedule(100)

    assert (found[0], found[-1], len(found)) == (0, 1, 101)
    steps = found.diff()
    assert (steps > 0).all()
    torch.testing.assert_close(steps, steps.flip(0))
    assert steps[0] < steps[50] / 10


@pytest.mark.parametrize("make", [_GuidePath, _PriorPath])
def test_a_path_ends_at_the_posterior_and_starts_at_a_density(make):
    fit, cells = conjugate(0.7)
    cells = cells.to("cpu", torch.float64)
    program = fit.program.copy().double()

    with program.driven(0), torch.no_grad():
        posterior = CellPosterior(program, cells, 3)
        path = make(posterior, torch.cat([posterior.draw() for _ in range(100)]))
        v = path.start()
        point = path.density(v)
        prior, likelihood = posterior.log_joint(v)

    torch.testing.assert_close(point.terms.sum(0), prior + likelihood)
    if make is _PriorPath:
        torch.testing.assert_close(point.terms[0], prior)
    else:
        law = [
            stats.multivariate_t(m, s, df=5) for m, s in zip(path.centre.numpy(), (path.root @ path.root.mT).numpy())
        ]
        paper = np.stack([law[n].logpdf(v[:, n].numpy()) for n in range(4)], -1)
        np.testing.assert_allclose(point.terms[0].numpy(), paper, rtol=1e-10)
    with program.driven(0), torch.no_grad():  # slopes are those of differences
        for d in range(2):
            step = torch.zeros(2, dtype=torch.float64)
            step[d] = 1e-6
            apart = (path.density(v + step).terms - path.density(v - step).terms) / 2e-6
            torch.testing.assert_close(point.slopes[..., d], apart, rtol=1e-5, atol=1e-5)


# ---- bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path, n_steps", [("guide", 60), ("prior", 100)])
def test_evidence_is_the_one_on_paper(path, n_steps):
    fit, cells = conjugate(narrow=0.8)

    found = evidence(fit, cells, n_draws=1000, n_chains=30, n_steps=n_steps, n_leapfrogs=2, path=path, progress=False)

    log_p = exact(COUNTS)
    assert list(found.columns) == ["elbo", "iwae_10", "iwae_100", "iwae_1000", "k_hat", "ais_1", "ais", "ais_se"]
    assert (found["ais_1"] <= found["ais"]).all()
    assert (np.abs(found["ais"] - log_p) < 4 * found["ais_se"] + 1e-3).all()
    assert (found["ais_se"] < 0.15).all()
    # ELBO of a gamma guide with 1 / narrow^2 times the counts: its KL is known.
    shape = SHAPE + COUNTS.reshape(4, 2, 3).sum(-1)
    a, b = torch.tensor(shape / 0.64), torch.tensor(3.5 / 0.64)
    kl = torch.distributions.kl_divergence(dist.Gamma(a, b), dist.Gamma(torch.tensor(shape), torch.tensor(3.5)))
    np.testing.assert_allclose(found["elbo"], log_p - kl.sum(-1).numpy(), atol=4 * found.attrs["se"]["elbo"] * 2)
    # Groups are nested, so that the bounds rise draw by draw.
    columns = ["elbo", "iwae_10", "iwae_100", "iwae_1000"]
    assert (found[columns].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    assert 0.4 < found.attrs["acceptance"] < 0.95
    assert found.attrs["mean"]["ais"] == pytest.approx(found["ais"].mean())


def test_the_exact_guide_leaves_nothing():
    fit, cells = conjugate()

    found = evidence(fit, cells, n_draws=100, n_chains=2, n_steps=2, progress=False)

    np.testing.assert_allclose(found["elbo"], exact(COUNTS), rtol=1e-6)
    np.testing.assert_allclose(found["iwae_100"], exact(COUNTS), rtol=1e-6)


@pytest.fixture(scope="module")
def many():
    """120 cells, of which each has a state, counts and chains of its own: as good as so many seeds."""
    return conjugate(narrow=0.8, counts=np.tile(COUNTS[1:2] + 1, (120, 1)))


@pytest.mark.parametrize("path, n_steps, least", [("guide", 5, 0.02), ("prior", 2, 0.5)])
def test_bounds_hold_in_expectation_however_short_the_path(many, path, n_steps, least):
    fit, cells = many

    found = evidence(fit, cells, n_draws=100, n_chains=3, n_steps=n_steps, path=path, simulate=True, progress=False)

    simulated, truth = _asked(fit, cells, True, 0)
    log_p = exact(simulated.x.numpy())
    assert truth.shape == (120, 2)
    for below, above in ((found["ais"], log_p), (log_p, found["bdmc"])):
        apart = np.asarray(above - below)
        assert apart.mean() > -2 * apart.std() / np.sqrt(120)
    assert found["gap"].mean() > least  # two steps are too few, and it shows
    np.testing.assert_allclose(found["gap"], found["bdmc"] - found["ais"])


def test_bounds_meet_on_longer_paths(many):
    fit, cells = many

    found = evidence(
        fit, cells, n_draws=100, n_chains=8, n_steps=60, n_leapfrogs=2, simulate=True, progress=False, seed=1
    )

    log_p = exact(_asked(fit, cells, True, 1)[0].x.numpy())
    assert abs(found.attrs["mean"]["gap"]) < 0.05
    for name in ("ais", "bdmc"):
        error = (found[name] - log_p).std() / np.sqrt(120)
        assert abs(found.attrs["mean"][name] - log_p.mean()) < 4 * error + 0.01
    assert "<= log p(x) <= BDMC" in found.attrs["text"]


def test_simulated_cells_keep_totals_and_columns_and_are_draws_of_the_story(many):
    fit, cells = many

    simulated, truth = _asked(fit, cells, True, 3)

    torch.testing.assert_close(simulated.library, cells.library.double())
    rate = truth.exp().numpy()
    # 240 draws of a gamma with shape 2 and mean 4: sd 2.83, error of the mean 0.18; counts have their rates as means.
    assert rate.mean() == pytest.approx(4.0, abs=0.75)
    assert stats.kstest(rate.ravel(), stats.gamma(2.0, scale=2.0).cdf).pvalue > 1e-3
    z = (simulated.x.numpy().reshape(120, 2, 3).sum(-1) - 3 * rate) / np.sqrt(3 * rate)
    assert abs(z.mean()) < 4 / np.sqrt(240)
    assert z.var() == pytest.approx(1.0, abs=4 * np.sqrt(2 / 240))


def test_a_truth_that_is_not_gives_no_upper_bound(many):
    """Chains that start at states of other cells: their weights say that something is wrong."""
    fit, cells = many
    from pyrosc.check.evidence import _bounds, _options

    ready, truth = _asked(fit, cells, True, 0)
    options = _options(100, 4, 20, 2, "guide")
    right = _bounds(fit, ready, truth, options, 0, False)
    wrong = _bounds(fit, ready, truth.roll(1, 0), options, 0, False)

    assert abs(right.attrs["mean"]["gap"]) < 0.3
    assert abs(wrong.attrs["mean"]["gap"]) > 1.0


@pytest.fixture(scope="module")
def small_fit():
    data = pyrosc.simulate.tissue(150, 30, n_types=3, n_batches=2, depth=200, n_markers=8, seed=2)
    cells = Cells.from_anndata(data, batch="batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pyrosc.PyroscWarning)
        program = pyrosc.scvi(cells, n_latent=1, n_hidden=16)
        return pyrosc.fit(program, cells, epochs=15, progress=False), cells


def by_grid(fit, cells):
    """log p(x) of cells with one latent number, by the sum over 4,001 points."""
    program, cells = fit.program.copy().double(), cells.to("cpu", torch.float64)
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    total = []
    with torch.no_grad():
        theta = program.parts["dispersion"]()
        for i in range(len(cells)):
            one = cells.rows(torch.full((4001,), i), whole=True)
            rho, _ = program.parts["decoder"](grid.unsqueeze(-1), one)
            mean = one.library * rho
            law = dist.NegativeBinomial(theta, probs=mean / (mean + theta), validate_args=False)
            log = law.log_prob(one.x).sum(-1) + dist.Normal(0.0, 1.0).log_prob(grid)
            total.append(log.logsumexp(0) + np.log(16 / 4000))
    return torch.stack(total).numpy()


def test_evidence_of_scvi_is_that_of_a_grid(small_fit):
    fit, cells = small_fit
    few = cells[:6]

    found = evidence(fit, few, n_draws=1000, n_chains=25, n_steps=30, n_leapfrogs=2, progress=False)

    log_p = by_grid(fit, few)
    assert list(found.index) == list(few.names)
    assert (np.abs(found["ais"] - log_p) < 4 * found["ais_se"] + 0.01).all()
    assert (np.abs(found["iwae_1000"] - log_p) < 0.2).all()
    assert (found["elbo"] < log_p + 0.05).all()
    np.testing.assert_allclose(fit.elbo(few, n_draws=200), found["elbo"], atol=0.3)


def test_latent_libraries_are_numbers_of_their_own(small_fit):
    cells = small_fit[1]
    fit = a_fit(pyrosc.scvi(cells, n_latent=1, n_hidden=8, library=pyrosc.LatentLibrary()), cells)

    state = torch.get_rng_state()
    found = evidence(fit, cells[:5], n_draws=100, n_chains=20, n_steps=5, simulate=True, progress=False)

    assert torch.equal(torch.get_rng_state(), state)
    assert np.isfinite(found.drop(columns="k_hat")).all(axis=None)
    again = evidence(fit, cells[:5], n_draws=100, n_chains=20, n_steps=5, simulate=True, progress=False)
    pd.testing.assert_frame_equal(found, again)


def test_discrete_sites_are_summed_out_and_computed_states_are_no_numbers():
    data = pyrosc.simulate.tissue(40, 20, n_types=2, n_batches=2, depth=100, n_markers=5, seed=2)
    data.obs["seen"] = np.where(np.arange(40) % 2, data.obs["cell_type"].astype(str), "?")
    typed = Cells.from_anndata(data, label="seen", unlabeled="?")
    sampled = Cells.from_anndata(data, sample="batch")
    for program, cells, n in (
        (pyrosc.scanvi(typed, n_latent=2, n_hidden=8), typed, 4),
        (pyrosc.mrvi(sampled, n_latent=2), sampled, None),
    ):
        found = evidence(
            a_fit(program, cells), cells[:12], n_draws=1000, n_chains=10, n_steps=20, simulate=True, progress=False
        )

        # An untrained guide is about the prior, and these are small cells: its draws say it too.
        apart = found["ais"] - found["iwae_1000"]
        assert (apart.abs() < 4 * found["ais_se"] + 0.3).all()
        assert abs(found.attrs["mean"]["gap"]) < 4 * found.attrs["se"]["gap"]
        assert n is None or len(_asked(a_fit(program, cells), cells[:4], True, 0)[1][0]) == n


def test_the_truth_is_given_the_global_draw_that_bounds_are_given():
    cells = Cells.from_counts(COUNTS)
    program = pyrosc.scvi(
        cells, n_latent=1, n_hidden=4, dispersion=pyrosc.GeneDispersion(prior=pyrosc.InverseSqrtPrior(3.0))
    )
    ready = cells.to("cpu", torch.float64)
    simulated, _ = _asked(a_fit(program, cells), cells, True, 5)
    program = program.copy().double()

    held = []
    for seed, of in ((0, ready), (1, simulated)):
        with program.driven(seed), torch.no_grad():
            held.append(CellPosterior(program, of, 2, seed=5)._nodes["dispersion"]["value"].squeeze())

    torch.testing.assert_close(*held)


def test_numbers_out_of_range_are_refused():
    fit, cells = conjugate()
    for wrong, text in (
        (dict(n_draws=150), "n_draws must be a multiple of 100, .* not 150"),
        (dict(n_draws=0), "n_draws must be a whole number of at least 100"),
        (dict(n_chains=1), "n_chains must be a whole number of at least 2"),
        (dict(n_steps=1), "n_steps must be a whole number of at least 2"),
        (dict(n_leapfrogs=0), "n_leapfrogs must be a whole number of at least 1"),
        (dict(path="q"), 'path must be "guide" or "prior", not \'q\''),
    ):
        with pytest.raises(ValueError, match=text):
            evidence(fit, cells, progress=False, **wrong)


# ---- gaps -------------------------------------------------------------------------------------


def test_gaps_add_up_and_a_guide_of_another_cell_is_a_gap_of_amortisation(small_fit):
    fit, cells = small_fit

    found = gaps(fit, cells[:6], n_elbo=1000, n_draws=200, n_chains=25, n_steps=40, progress=False)

    np.testing.assert_allclose(found["family_gap"] + found["amortisation_gap"], found["ais"] - found["elbo"])
    assert (found["family_gap"] > -0.1).all()  # Monte Carlo error: sd 0.03 by 25 chains
    assert found.attrs["mean"]["family_gap"] == pytest.approx(found["family_gap"].mean())
    with pytest.raises(ValueError, match="families must be a list"):
        gaps(fit, cells[:6], families="full", progress=False)
