"""Tests of weights by cell and by gene."""

import numpy as np
import pytest
import torch

import pyrosc
from pyrosc import Cells
from pyrosc.draws import draw_guide
from pyrosc.errors import ProgramError, PyroscWarning

from .test_encoders import Sum, correlated
from .test_refinement import SETTINGS, Guess, on_grid, two_latents


def test_usable_cells_are_those_below_the_threshold():
    fit, cells = two_latents(0.25)  # as narrow as the counts make the sum
    good = fit.refine(cells, family="full", steps=200, progress=False)

    bad, fine = (pyrosc.check.importance(f, cells, 1000) for f in (fit, good))

    assert bad.attrs["threshold"] == pytest.approx(1 - 1 / 3)
    assert bad.attrs["usable"] < 0.2
    assert fine.attrs["usable"] == 1.0  # not by k_hat: the posterior is skewed, its tail is not the guess's
    assert (bad["is_usable"] == (bad["k_hat"] <= 2 / 3)).all()
    assert fine["ess"].min() > 900
    assert bad["ess"].median() < 100


def test_shares_are_told_by_a_column():
    draw = np.random.default_rng(0)
    cells = Cells.from_counts(draw.poisson(2.0, (40, 10)), label=["a", "b"] * 20)
    fit = pyrosc.Fit(pyrosc.scvi(cells, n_latent=2, n_hidden=8), [], dict(SETTINGS))

    table = pyrosc.check.importance(fit, cells, 200, by="label")

    expected = table["is_usable"].groupby(cells.obs["label"].astype(str)).mean().to_dict()
    assert table.attrs["usable_by"] == pytest.approx(expected)
    with pytest.raises(ValueError, match='no column "type" in adata.obs'):
        pyrosc.check.importance(fit, cells, 200, by="type")
    with pytest.raises(ValueError, match="n_draws must be a whole number of at least 100, not 50"):
        pyrosc.check.importance(fit, cells, 50)


def odd_gene():
    """The encoder knows the posterior by eleven genes; the twelfth was multiplied by four."""
    cells = correlated()[:30]
    x = cells.x.clone()
    x[:, 4] *= 4
    other = Cells.from_counts(x, size_factor=np.ones(30))
    program = pyrosc.scvi(
        other, encoder=Guess([0.0, 0.0], [1.0, 1.0]), decoder=Sum(), likelihood=pyrosc.PoissonLikelihood(),
        dispersion=None,
    )  # fmt: skip
    return pyrosc.Fit(program, [], dict(SETTINGS)), other


def test_a_gene_s_share_is_its_covariance_with_log_weights():
    fit, cells = odd_gene()
    table = pyrosc.check.importance_by_gene(fit, cells, 400, seed=3)

    with fit.program.driven(3), torch.no_grad():  # one block: the same draws
        z = draw_guide(fit.program, cells, 400).nodes["z"]["value"]
    rate = (1.0 + 0.7 * z.sum(-1, keepdim=True)).exp().expand(400, 30, 12).double()
    each = torch.distributions.Poisson(rate).log_prob(cells.x.double()).numpy()
    log_weight = each.sum(-1)  # the guide is the prior
    shares = np.array(
        [[np.cov(log_weight[:, n], each[:, n, g], bias=True)[0, 1] / log_weight[:, n].var() for g in range(12)] for n in range(30)]
    )  # fmt: skip

    np.testing.assert_allclose(table["share"].loc[list(cells.schema.genes)], shares.mean(0), rtol=1e-3, atol=1e-4)
    assert table["share"].sum() + table.attrs["rest"] == pytest.approx(1.0)
    assert table.attrs["rest"] == pytest.approx(0.0, abs=1e-5)
    assert table.attrs["sd"] == pytest.approx(log_weight.std(0).mean(), rel=1e-3)


def test_genes_are_not_told_where_draws_of_others_are_in_the_weights():
    cells = correlated()[:20]
    program = pyrosc.scvi(cells, n_latent=2, dispersion=pyrosc.GeneDispersion(prior=pyrosc.InverseSqrtPrior(3.0)))
    with pytest.raises(ProgramError, match="has global sites"):
        pyrosc.check.importance_by_gene(pyrosc.Fit(program, [], dict(SETTINGS)), cells)


def test_draws_and_expression_by_weights_are_those_of_the_posterior():
    """A guide that is too wide, mended by weights: moments of the state by a grid."""
    fit, cells = two_latents(0.9)
    fit = fit.refine(cells, family="full", progress=False)
    wide = fit.program.copy()
    wide.corrections.z_log_scale += 0.4
    wide.corrections.z_lower *= np.exp(0.4)
    off = pyrosc.Fit(wide, [], dict(SETTINGS))
    mean, covariance, _ = on_grid(cells)

    plain, weighed = (off.draws("z", cells, 1000, importance=n) for n in (0, 4000))

    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt().numpy()
    assert np.median(plain.std(0) / sd) == pytest.approx(np.exp(0.4), rel=0.05)
    # 1,000 draws, some of them twice: an sd has an error near 3 %, its median over 50 numbers less
    assert np.median(weighed.std(0) / sd) == pytest.approx(1.0, abs=0.04)
    assert np.abs((weighed.mean(0) - mean.numpy()) / sd).max() < 0.25
    tables = [off.expression(cells, interval=0.9, n_draws=500, importance=n) for n in (0, 4000)]
    width = [(t.xs("upper", axis=1, level=1) / t.xs("lower", axis=1, level=1)).stack().median() for t in tables]
    assert width[1] < width[0] ** 0.8


def test_cells_whose_weights_fail_keep_the_guide_s_draws_and_are_counted():
    fit, cells = two_latents(0.05)
    with pytest.warns(PyroscWarning, match=r"cannot be relied on in 25 of 25 cells.*fit.refine"):
        z = fit.draws("z", cells, 200, importance=500)

    assert z.std(0).max() < 0.08
    with pytest.raises(ValueError, match="importance must be 0 or at least 200 draws, not 150"):
        fit.draws("z", cells, 200, importance=150)
