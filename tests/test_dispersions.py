"""Dispersions and libraries: what is picked for which cell, priors against densities by hand, recovery on simulated data."""

import math
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

import pyrosc
from pyrosc import (
    BatchDispersion,
    Cells,
    GeneDispersion,
    InverseSqrtPrior,
    LabelDispersion,
    LatentLibrary,
    Prior,
    ProgramError,
    PyroscWarning,
    TrendPrior,
)

from .conftest import small


@pytest.fixture(scope="module")
def cells():
    return Cells.from_anndata(small(), batch="donor", label="cell_type")


def tiny(cells, **options):
    return pyrosc.scvi(cells, **(dict(n_latent=3, n_hidden=8) | options))


def quick(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, **(dict(epochs=3, progress=False) | options))


def fill(part):
    with torch.no_grad():
        part.log_dispersion.copy_(torch.randn_like(part.log_dispersion))
    return part


def test_each_cell_takes_the_row_of_its_batch_or_label(cells):
    for made, codes in ((BatchDispersion(), cells.batch), (LabelDispersion(), cells.label)):
        part = fill(tiny(cells, dispersion=made).parts["dispersion"])
        value = part()

        found = part.at(value, cells)

        assert found.shape == (120, 30)
        for i in (0, 7, 33):
            assert torch.equal(found[i], value[codes[i]])


def test_cells_without_a_label_take_the_geometric_mean(cells):
    part = fill(tiny(cells, dispersion=LabelDispersion()).parts["dispersion"])
    value = part()
    blank = cells._copy(codes=cells.codes | {"cell_type": torch.full((120,), -1)})

    torch.testing.assert_close(part.at(value, blank)[5], value.log().mean(0).exp())


def test_a_dispersion_of_levels_takes_draws_in_front(cells):
    part = tiny(cells, dispersion=BatchDispersion()).parts["dispersion"]
    value = torch.rand(6, 1, 2, 30)  # (S, 1, B, G), as a plate of draws before that of cells makes it

    found = part.at(value, cells)

    assert found.shape == (6, 120, 30)
    assert torch.equal(found[4, 9], value[4, 0, cells.batch[9]])


def test_a_prior_makes_the_dispersion_a_site_and_nothing_else_changes(cells):
    plain = tiny(cells)
    bayes = plain.replace(dispersion=GeneDispersion(prior=Prior(dist.LogNormal, 1.0, 0.5)))
    z, theta = torch.randn(120, 3), torch.rand(30) + 0.5

    fixed = {"z": z, "dispersion": theta}
    traces = [poutine.trace(poutine.condition(p.model, fixed)).get_trace(cells) for p in (plain, bayes)]
    names = [[n for n, site in trace.nodes.items() if site["type"] == "sample"] for trace in traces]

    assert names == [["cells", "z", "library", "rho", "x"], ["dispersion", "cells", "z", "library", "rho", "x"]]
    prior = traces[1].nodes["dispersion"]["fn"].log_prob(theta)
    assert float(prior) == pytest.approx(stats.lognorm(0.5, scale=math.e).logpdf(theta.numpy()).sum(), rel=1e-5)
    law = traces[1].nodes["x"]["fn"].base_dist
    torch.testing.assert_close(law.dispersion[0], theta)


@pytest.mark.parametrize(
    "prior",
    [lambda: Prior(dist.LogNormal, 1.0, 1.0), lambda: Prior(dist.Gamma, 2.0, 1.0), InverseSqrtPrior, TrendPrior],
)
@pytest.mark.parametrize("kind", [GeneDispersion, BatchDispersion, LabelDispersion])
def test_every_prior_fits_every_kind(cells, prior, kind):
    fit = quick(tiny(cells, dispersion=kind(prior=prior())), cells)
    rows = {GeneDispersion: (), BatchDispersion: (2,), LabelDispersion: (3,)}[kind]

    draws = fit.draws("dispersion", cells[:4], 5)
    assert draws.shape == (5, *rows, 30)
    assert (draws > 0).all()
    assert "kl_dispersion" in fit.history


def test_the_inverse_square_root_is_exponential(cells):
    prior = tiny(cells, dispersion=GeneDispersion(prior=InverseSqrtPrior(2.0))).parts["dispersion"].prior
    law = prior()
    theta = torch.tensor([0.05, 0.5, 3.0]).repeat(10)
    s = theta.numpy() ** -0.5

    by_hand = stats.expon(scale=0.5).logpdf(s) + np.log(0.5 * theta.numpy() ** -1.5)  # density of s times |ds/dtheta|

    assert float(law.log_prob(theta)) == pytest.approx(by_hand.sum(), rel=1e-5)
    drawn = law.sample((4000,)).numpy() ** -0.5
    assert stats.kstest(drawn[:, 0], stats.expon(scale=0.5).cdf).pvalue > 1e-3


def test_the_trend_starts_at_a_line_through_the_moments():
    """Counts whose dispersion follows exp(0.5 + 0.6 log mean) exactly: the line is found, and points shrink to it."""
    draw = np.random.default_rng(0)
    mean = np.exp(draw.uniform(0, 3, 200))
    theta = np.exp(0.5 + 0.6 * np.log(mean))
    counts = draw.poisson(draw.gamma(theta, mean / theta, (3000, 200)))
    data = Cells.from_counts(counts, size_factor=np.ones(3000))
    program = pyrosc.scvi(data, n_latent=1, n_hidden=4, dispersion=GeneDispersion(prior=TrendPrior()))
    program.start(data)
    prior = program.parts["dispersion"].prior

    # 3,000 cells give each moment an error of a few percent; the line through 200 of them is known to 0.02
    assert float(prior.slope) == pytest.approx(0.6, abs=0.05)
    assert float(prior.intercept) == pytest.approx(0.5, abs=0.1)
    assert float(prior.log_sd.exp()) == pytest.approx(0.1, abs=0.06)
    torch.testing.assert_close(prior.log_mean.exp(), torch.tensor(counts.mean(0)).float(), rtol=1e-3, atol=1e-3)


def test_a_strong_prior_pulls_rare_genes_and_leaves_common_ones():
    """A gene with many counts says its own dispersion; one that was hardly seen keeps what was believed."""
    draw = np.random.default_rng(1)
    mean = np.r_[np.full(10, 30.0), np.full(10, 0.02)]
    counts = draw.poisson(draw.gamma(0.5, mean / 0.5, (1500, 20)))
    data = Cells.from_counts(counts, size_factor=np.ones(1500))
    program = pyrosc.scvi(
        data, n_latent=1, n_hidden=4, dispersion=GeneDispersion(prior=Prior(dist.LogNormal, math.log(8.0), 0.3))
    )
    fit = quick(program, data, epochs=None)

    found = np.log(fit.draws("dispersion", data[:1], 400))
    centre, sd = found.mean(0), found.std(0)
    assert centre[:10] == pytest.approx(math.log(0.5), abs=0.3)
    assert (sd[:10] < 0.15).all()
    assert centre[10:].mean() == pytest.approx(math.log(8.0), abs=0.35)
    assert (sd[10:] > 0.2).all()


# ---- libraries ---------------------------------------------------------------------------------


def test_a_latent_library_has_the_moments_of_its_batch(cells):
    program = tiny(cells, library=LatentLibrary())
    drawn = np.stack([np.log(program.generate(cells, seed=s)["library"][:, 0].numpy()) for s in range(60)])
    observed = np.log(cells.library[:, 0].numpy())

    for b in range(2):
        of_batch = cells.batch.numpy() == b
        mean, sd = float(observed[of_batch].mean()), float(observed[of_batch].std())
        sample = drawn[:, of_batch].ravel()
        assert sample.mean() == pytest.approx(mean, abs=5 * sd / math.sqrt(len(sample)))
        assert sample.std() == pytest.approx(sd, rel=5 / math.sqrt(2 * len(sample)))


def test_numbers_of_the_library_can_be_given(cells):
    law = tiny(cells, library=LatentLibrary(5.0, 0.2)).parts["library"]

    assert law.mean.tolist() == [5.0, 5.0]
    assert law.sd.tolist() == pytest.approx([0.2, 0.2])
    with pytest.raises(ValueError, match="sd must be positive"):
        LatentLibrary(5.0, 0.0)
    with pytest.raises(ValueError, match="mean is that of log counts"):
        LatentLibrary(math.nan)


@pytest.mark.parametrize(
    "parts, says",
    [
        (
            dict(dispersion=GeneDispersion(prior=Prior(dist.LogNormal, torch.zeros(29), 1.0))),
            '"dispersion".*29.*30 genes',
        ),
        (dict(dispersion=GeneDispersion(prior=Prior(dist.Normal, 0.0, 1.0))), "must be positive"),
    ],
)
def test_priors_of_dispersions_that_do_not_fit_are_explained(cells, parts, says):  # row 70
    with pytest.raises(ProgramError, match=says):
        tiny(cells, **parts)


def test_columns_that_are_not_there_are_asked_for():
    plain = Cells.from_anndata(small(20))
    for part, says in ((BatchDispersion(), "batch column"), (LabelDispersion(), "label column")):
        with pytest.raises(ProgramError, match=f"needs a {says}"):
            tiny(plain, dispersion=part)
    with pytest.raises(ValueError, match="prior must be a part"):
        GeneDispersion(prior="lognormal")
    with pytest.raises(ValueError, match="rate must be positive"):
        InverseSqrtPrior(0.0)
    with pytest.raises(ValueError, match="sd must be positive"):
        TrendPrior(-1.0)
    factors = Cells.from_counts(np.ones((3, 4), int), size_factor=[1.0, 2.0, 1.0])
    with pytest.raises(ProgramError, match="rho is a rate.*use GivenLibrary"):
        tiny(factors, library=LatentLibrary())
