"""Fit: its answers, that they do not depend on the other cells in the call, and what is written where."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrosc
from pyrosc import Cells, Part, PoissonLikelihood, Prior, Program, ProgramError, PyroscWarning
from pyrosc.elbo import elbo_terms


@pytest.fixture
def fit(fitted):
    return fitted[2]


@pytest.fixture
def cells(fitted):
    return fitted[1]


# ---- answers -----------------------------------------------------------------------------------


def test_latent_is_the_encoders_mean_and_its_draws_scatter_by_the_sd(fit, cells):
    mean, sd = fit.program.parts["encoder"](cells)

    np.testing.assert_allclose(fit.latent(cells), mean.detach(), atol=1e-5)
    np.testing.assert_allclose(fit.latent_sd(cells), sd.detach(), rtol=1e-4)
    draws = fit.latent(cells, n_draws=2000)
    assert draws.shape == (2000, 600, 4)
    scaled = (draws.mean(0) - mean.detach().numpy()) / sd.detach().numpy() * 2000**0.5
    assert abs(scaled.std() - 1) < 0.1  # 2,400 standardised means: sd 1 to 5 errors of 0.014


def test_answers_do_not_depend_on_the_other_cells(fit, cells, monkeypatch):
    few = cells[[5, 300, 17]]
    np.testing.assert_allclose(fit.latent(few), fit.latent(cells)[[5, 300, 17]], atol=1e-5)
    whole, part = fit.expression(cells, n_draws=400), fit.expression(few, n_draws=400, interval=0.5)
    sd = part.xs("sd", axis=1, level=1).to_numpy()
    # two means over 400 draws: six standard errors of their difference, over 180 numbers
    assert (
        np.abs(whole.loc[few.names].to_numpy() - part.xs("mean", axis=1, level=1).to_numpy())
        < 6 * sd * (2 / 400) ** 0.5 + 1e-7
    ).all()

    before = fit.latent(cells)
    monkeypatch.setattr("pyrosc.loading._BLOCK_VALUES", 500)  # eight cells at a time
    np.testing.assert_allclose(fit.latent(cells), before, atol=1e-5)


def test_answers_are_seeded_and_leave_the_generator(fit, cells):
    state = torch.get_rng_state()
    one, other, third = (fit.expression(cells[:5], seed=s) for s in (1, 1, 2))

    pd.testing.assert_frame_equal(one, other)
    assert not one.equals(third)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == 0


def test_expression_is_the_mean_share_over_draws(fit, cells):
    few = cells[:4]
    table = fit.expression(few, n_draws=3000)
    z = torch.tensor(fit.latent(few, n_draws=3000, seed=7))
    rho = fit.program.parts["decoder"](z, few)[0].detach()

    np.testing.assert_allclose(table.sum(1), 1, rtol=1e-5)
    error = rho.std(0).numpy() * (2 / 3000) ** 0.5
    assert (np.abs(table.to_numpy() - rho.mean(0).numpy()) < 6 * error + 1e-7).all()
    assert list(table.index) == list(few.names)
    assert list(table.columns) == list(fit.schema.genes)
    assert table.attrs["uncertainty"] == "z only"


def test_expression_of_chosen_genes_with_an_interval(fit, cells):
    table = fit.expression(cells[:6], ["gene7", "gene2"], n_draws=500, scale=1e4, interval=0.8)
    draws = (
        fit.program.parts["decoder"](torch.tensor(fit.latent(cells[:6], n_draws=500)), cells[:6])[0].detach()[
            ..., [7, 2]
        ]
        * 1e4
    )

    assert list(table.columns.get_level_values(0).unique()) == ["gene7", "gene2"]
    assert (table["gene7"]["lower"] < table["gene7"]["mean"]).all()
    inside = (draws >= torch.tensor(table.xs("lower", axis=1, level=1).to_numpy())) & (
        draws <= torch.tensor(table.xs("upper", axis=1, level=1).to_numpy())
    )
    # other draws from the same law fall inside 80 % of the time: 6,000 of them, five errors, correlated by cell
    assert abs(inside.float().mean() - 0.8) < 0.04


def test_do_decodes_under_another_batch_and_all_averages(fit, cells):
    few = cells[:5]
    one, other, both = (fit.expression(few, n_draws=50, do={"batch": level}) for level in ("batch0", "batch1", "all"))

    assert not np.allclose(one, other, rtol=1e-2)
    np.testing.assert_allclose((one + other) / 2, both, rtol=1e-4)
    as_seen = fit.expression(few, n_draws=50)
    own = few.batch.numpy() == 0
    np.testing.assert_allclose(one[own], as_seen[own], rtol=1e-6)
    np.testing.assert_allclose(other[~own], as_seen[~own], rtol=1e-6)


def test_elbo_is_that_of_the_program(fit, cells):
    with fit.program.driven(0), torch.no_grad():
        expected = elbo_terms(fit.program, cells).local.numpy()

    np.testing.assert_allclose(fit.elbo(cells), expected, rtol=1e-4, atol=1e-2)


def test_the_likelihood_is_above_the_elbo_and_rises_with_draws(fit, cells):
    few = cells[:60]
    elbo = fit.elbo(few, n_draws=200).mean()
    ten, many = (fit.log_likelihood(few, n).mean() for n in (10, 1000))

    assert elbo < ten < many + 0.2
    assert many < elbo + 20


def test_the_likelihood_is_right_where_it_is_known():
    """One latent dimension and a Poisson: the integral over z by quadrature."""

    class Line(Part):
        def forward(self, z, cells):
            weight = torch.tensor([0.5, -0.5, 0.2], dtype=z.dtype)
            return (z * weight).softmax(-1), None

    cells = Cells.from_counts([[5, 1, 2], [0, 7, 1], [2, 2, 2]])
    program = pyrosc.scvi(
        cells, n_latent=1, n_hidden=4, decoder=Line(), dispersion=None, likelihood=PoissonLikelihood()
    )
    fit = pyrosc.Fit(program, pd.DataFrame(), {"n_cells": 3, "state": "untrained", "best_epoch": 0})
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64).reshape(-1, 1, 1)
    rho = (grid * torch.tensor([0.5, -0.5, 0.2], dtype=torch.float64)).softmax(-1)
    x = cells.x.double()
    joint = torch.distributions.Poisson(x.sum(-1, keepdim=True) * rho).log_prob(x).sum(-1) + dist.Normal(
        0.0, 1.0
    ).log_prob(grid.squeeze(-1))
    exact = joint.logsumexp(0) + np.log(16 / 4000)

    found = fit.log_likelihood(cells, 20_000)
    table = pyrosc.check.importance(fit, cells, 2000)

    # a guide that is not far off: the error of a log mean of 20,000 weights is about 0.01
    np.testing.assert_allclose(found, exact, atol=0.05)
    assert list(table.columns) == ["log_likelihood", "k_hat", "ess", "is_usable"]
    assert (table["ess"] > 20).all()


def test_pareto_k_tells_good_weights_from_bad():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4000, 50, generator=generator, dtype=torch.float64)
    for n_draws, n_tail in ((4000, 189), (400, 60)):
        for k in (0.2, 0.7, 0.9):
            found = pyrosc.check.pareto_k(-k * uniform[:n_draws].log())  # weights u^-k have tail shape k
            expected = (n_tail * k + 5) / (n_tail + 10)  # pulled to 0.5 once
            # sd (1 + k) / sqrt(n_tail) of one estimate, 50 of them, five errors
            assert float(found.mean()) == pytest.approx(expected, abs=5 * (1 + k) / (50 * n_tail) ** 0.5)
    with pytest.raises(ValueError, match="at least 100"):
        pyrosc.check.pareto_k(torch.zeros(10, 2))


def test_predictive_is_pyros_own_and_agrees_with_expression(fit, cells):
    few = cells[:5]
    torch.manual_seed(0)

    drawn = fit.predictive(400, ["x", "rho"])(few)

    assert isinstance(fit.predictive(1), pyro.infer.Predictive)
    assert set(drawn) == {"x", "rho"}
    expected = fit.expression(few, n_draws=400).to_numpy()
    error = drawn["rho"].std(0).squeeze().numpy() * (2 / 400) ** 0.5
    assert (np.abs(drawn["rho"].mean(0).squeeze().numpy() - expected) < 6 * error + 1e-6).all()
    total = drawn["x"].sum(-1).mean(0)
    # counts scatter around the observed total; 6 errors of a mean over 400 draws
    assert (abs(total - few.library.squeeze(-1)) < 6 * drawn["x"].sum(-1).std(0) / 20).all()


def test_an_anndata_is_brought_into_order(fitted, fit, cells):
    adata = fitted[0]

    np.testing.assert_allclose(fit.latent(adata[:9, ::-1]), fit.latent(cells[:9]), atol=1e-5)


def test_one_cell_is_fine_and_none_is_not(fit, cells):  # row 108
    assert fit.latent(cells[:1]).shape == (1, 4)
    assert fit.expression(cells[3], n_draws=1, interval=0.9).shape == (1, 240)
    with pytest.raises(ValueError, match="no cells"):
        fit.latent(cells[:0])


def test_a_story_with_a_global_site_answers_too(cells):
    class Point(Part):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(60))

        def forward(self):
            return dist.LogNormal(self.loc, 0.1).to_event(1)

    def model(cells, *, prior, decoder, likelihood):
        dispersion = pyro.sample("dispersion", dist.LogNormal(0.0, 1.0).expand([60]).to_event(1))
        with cells.plate():
            z = pyro.sample("z", prior())
            rho, hidden = decoder(z, cells)
            rho = pyro.deterministic("rho", rho, event_dim=1)
            pyro.sample("x", likelihood(cells.library * rho, dispersion, hidden), obs=cells.x)

    def guide(cells, *, encoder, point):
        pyro.sample("dispersion", point())
        with cells.plate():
            pyro.sample("z", dist.Normal(*encoder(cells)).to_event(1))

    few = cells[:80]
    program = Program(
        model, few, guide, point=Point(), prior=Prior(dist.Normal, 0.0, 1.0), encoder=pyrosc.Encoder(2, 8),
        decoder=pyrosc.Decoder(2, 8), likelihood=pyrosc.NBLikelihood(),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        result = pyrosc.fit(program, few, epochs=3, progress=False, patience=None)

    assert {"kl_z", "kl_dispersion"} <= set(result.history)
    assert result.expression(few[:5], n_draws=3).shape == (5, 60)
    assert result.log_likelihood(few, 200).mean() > result.elbo(few, n_draws=50).mean()


def test_a_global_rho_is_repeated_and_do_is_said_to_be_idle(cells):
    def model(cells, *, profile, likelihood):
        rho = pyro.sample("rho", profile())
        with cells.plate():
            pyro.sample("x", likelihood(cells.library * rho), obs=cells.x)

    def guide(cells, *, profile):
        pyro.sample("rho", profile())
        with cells.plate():
            pass

    program = Program(
        model, cells, guide, profile=Prior(dist.Dirichlet, torch.ones(60)), likelihood=PoissonLikelihood()
    )
    fit = pyrosc.Fit(program, pd.DataFrame(), {"n_cells": 1, "state": "finished", "best_epoch": 0})

    table = fit.expression(cells[:3], n_draws=4)
    assert np.allclose(table.iloc[0], table.iloc[2])
    with pytest.warns(PyroscWarning, match="do= changes nothing") as caught:
        fit.expression(cells[:3], do={"batch": "all"}, n_draws=4)
    assert len(caught) == 1
    with pytest.raises(ProgramError, match='draws no "z"'):
        fit.latent(cells)


def test_wrong_questions_are_explained(fit, cells):
    with pytest.raises(ValueError, match='genes "gene99" are not in this fit'):
        fit.expression(cells, ["gene99"])
    with pytest.raises(ValueError, match="n_draws must be a whole number"):
        fit.expression(cells, n_draws=0)
    with pytest.raises(ValueError, match="interval must be between"):
        fit.expression(cells, interval=90)
    with pytest.raises(ValueError, match="mini-batch"):
        fit.latent(cells.minibatch([1, 2]))
    with pytest.raises(ValueError, match="hold no counts"):
        fit.latent(cells.without_counts())
    with pytest.raises(TypeError, match="expected Cells or an AnnData"):
        fit.latent(np.ones((3, 60)))
    with pytest.raises(TypeError, match="do takes columns and levels"):
        fit.expression(cells, do="batch=batch0")
    with pytest.raises(ValueError, match="scale must be a positive number"):
        fit.expression(cells, scale="cpm")
    with pytest.raises(TypeError, match="genes takes names"):
        fit.expression(cells, 3)
    with pytest.raises(ValueError, match="names a gene twice"):
        fit.expression(cells, ["gene1", "gene1"])
    with pytest.raises(TypeError, match="takes an AnnData first, not Cells"):
        fit.write(cells)
    with pytest.raises(ValueError, match='no covariate "bach"'):
        fit.expression(cells, do={"bach": "batch0"})


def test_a_table_that_does_not_fit_is_refused(fit, cells, monkeypatch):
    monkeypatch.setattr("pyrosc.counts.available_memory", lambda: 1000)

    with pytest.raises(ValueError, match="this table would take"):
        fit.expression(cells)
    with pytest.raises(ValueError, match="the draws of one cell would take .* fewer draws"):
        fit.log_likelihood(cells, 10_000)


def test_edited_training_data_are_noticed(fitted, fit, cells):  # row 38
    adata = fitted[0].copy()
    adata.X[0, 0] += 1

    with pytest.warns(PyroscWarning, match="names of the training cells but other counts"):
        fit.latent(adata)
    fit.latent(fitted[0])  # as it was: no remark


# ---- writing to AnnData ------------------------------------------------------------------------


def test_write_puts_results_where_scanpy_looks(fitted, fit, cells, tmp_path):
    adata = fitted[0].copy()

    written = fit.write(adata, key="X_scvi")

    assert written == ['obsm["X_scvi"]', 'obsm["X_scvi_sd"]', 'uns["X_scvi"]']
    np.testing.assert_allclose(adata.obsm["X_scvi"], fit.latent(cells), atol=1e-6)
    np.testing.assert_allclose(adata.obsm["X_scvi_sd"], fit.latent_sd(cells), atol=1e-6)
    for suffix, read in (("h5ad", anndata.read_h5ad), ("zarr", anndata.read_zarr)):  # row 111
        getattr(adata, f"write_{suffix}")(tmp_path / f"a.{suffix}")
        again = read(tmp_path / f"a.{suffix}")
        assert again.uns["X_scvi"]["story"] == "scvi"
        np.testing.assert_array_equal(again.obsm["X_scvi"], adata.obsm["X_scvi"])


def test_write_refuses_to_replace_unless_told(fitted, fit):  # row 110
    adata = fitted[0].copy()
    fit.write(adata)

    with pytest.raises(ValueError, match=r'obsm\["X_pyrosc"\].*is there already: pass overwrite=True'):
        fit.write(adata)
    fit.write(adata, overwrite=True)


def test_write_joins_a_subset_by_name(fitted, fit, cells):  # row 113
    adata = fitted[0][::-1].copy()
    part = cells[10:30]

    fit.write(adata, part)

    z = pd.DataFrame(adata.obsm["X_pyrosc"], index=adata.obs_names)
    np.testing.assert_allclose(z.loc[part.names], fit.latent(part), atol=1e-6)
    assert z.drop(part.names).isna().all(axis=None)
    with pytest.raises(ValueError, match="600 of these cells are not in adata|are not in adata"):
        fit.write(fitted[0][:5].copy(), cells)


def test_write_wants_an_object_in_memory(fitted, fit, tmp_path):  # rows 112, 114
    with pytest.raises(ValueError, match=r"a view.*adata\.copy\(\)"):
        fit.write(fitted[0][:5])
    fitted[0].write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"backed.*to_memory"):
        fit.write(anndata.read_h5ad(tmp_path / "a.h5ad", backed="r"))
    with pytest.raises(ValueError, match='without "/"'):
        fit.write(fitted[0].copy(), key="a/b")


def test_between_blocks_of_weights_the_world_is_as_it_was(fit, cells, monkeypatch):
    monkeypatch.setattr("pyrosc.loading._BLOCK_VALUES", 60 * 2 * 10 * 4)  # four cells at a time
    state = torch.get_rng_state()
    weights = fit.log_weights(cells[:12], 10)

    first = next(weights)
    assert torch.equal(torch.get_rng_state(), state)
    fit.latent(cells[:3])  # other questions may come between
    rest = list(weights)

    assert first.shape == (10, 4)
    again = list(fit.log_weights(cells[:12], 10))
    assert all(torch.equal(a, b) for a, b in zip([first, *rest], again))
    assert not torch.equal(again[0], again[1])
