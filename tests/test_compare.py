"""check.compare: exact laws of thinned counts, standard errors, rankings on simulated truth, and what is refused."""

import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyrosc
from pyrosc import Cells, PoissonLikelihood, PyroscWarning, ZINBLikelihood
from pyrosc.check import compare, paired, thinned_log_likelihood
from pyrosc.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

from .conftest import small


def quick(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, **(dict(progress=False) | options))


# ---- the laws ----------------------------------------------------------------------------------


@pytest.mark.parametrize("e", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("mu, theta, gate", [(3.0, 0.7, -1.0), (0.2, 5.0, 2.0), (12.0, 50.0, 0.0)])
def test_laws_of_dropped_counts_are_those_of_the_joint(e, mu, theta, gate):
    """p(x1, x2) = p(x1 + x2) Binomial(x1; x1 + x2, e), by scipy; ours is p(x1) p(x2 | x1)."""
    x1, x2 = (torch.tensor(v, dtype=torch.float64) for v in np.meshgrid(np.arange(12.0), np.arange(12.0)))
    total = (x1 + x2).numpy()
    nb = stats.nbinom(theta, theta / (theta + mu)).pmf(total)
    extra = 1 / (1 + np.exp(-gate))
    whole = {
        NegativeBinomial: nb,
        Poisson: stats.poisson(mu).pmf(total),
        ZeroInflatedNegativeBinomial: extra * (total == 0) + (1 - extra) * nb,
    }
    m, d, a = (torch.tensor(v, dtype=torch.float64) for v in (e * mu, theta, gate))
    kept = {
        NegativeBinomial: NegativeBinomial(m, d),
        Poisson: Poisson(m),
        ZeroInflatedNegativeBinomial: ZeroInflatedNegativeBinomial(m, d, a),
    }
    for kind, law in kept.items():
        joint = whole[kind] * stats.binom(total, e).pmf(x1.numpy())

        ours = (law.log_prob(x1) + law.rest_given(x1, e).log_prob(x2)).exp()

        np.testing.assert_allclose(ours.numpy(), joint, rtol=1e-6, atol=1e-12)


def test_the_score_is_the_mean_over_draws_of_the_exact_law():
    """A story with a state of two values, summed by hand."""
    cells = Cells.from_counts(np.random.default_rng(0).poisson(4.0, (60, 5)))

    def model(cells):
        with cells.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            pyro.sample(
                "x",
                NegativeBinomial((0.3 * z).exp() * torch.full((5,), 2.0), torch.tensor(3.0)).to_event(1),
                obs=cells.x,
            )

    def guide(cells):
        with cells.plate():
            pyro.sample("z", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))

    program = pyrosc.Program(model, cells, guide)
    fit = pyrosc.Fit(program, pd.DataFrame(), {"n_cells": 1, "state": "finished", "best_epoch": 0, "kept": 0.5})
    kept, rest = cells.thin(0.5, seed=3)
    found = thinned_log_likelihood(fit, cells, 4000, seed=3)

    # z ~ N(0, 1) by quadrature
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    x1, x2 = kept.x.numpy()[:, None], rest.x.numpy()[:, None]
    mean = np.exp(0.3 * nodes)[None, :, None] * 2.0
    size, rate = 3 + x1, mean * (3 + x1) / (3 + mean)
    density = stats.nbinom(size, size / (size + rate)).logpmf(x2).sum(-1)
    exact = np.log((np.exp(density) * weights / weights.sum()).sum(1))
    # 4,000 draws of a density whose log varies by well under one
    assert found == pytest.approx(exact, abs=0.15)
    assert abs((found - exact).mean()) < 0.02


def test_thinned_cells_know_their_share(tmp_path):
    cells = Cells.from_anndata(small())
    kept, rest = cells.thin(0.3)

    assert (cells.kept, kept.kept, rest.kept) == pytest.approx((1.0, 0.3, 0.7))
    assert kept[:5].kept == kept.minibatch([0, 1]).kept == 0.3
    assert kept.thin(0.5)[0].kept == pytest.approx(0.15)
    fit = quick(pyrosc.scvi(kept, n_latent=2, n_hidden=4), kept, epochs=1)
    fit.save(tmp_path / "a.safetensors")
    assert pyrosc.load(tmp_path / "a.safetensors").settings["kept"] == 0.3


# ---- intervals ---------------------------------------------------------------------------------


def test_paired_is_the_usual_interval_for_single_cells():
    x = np.random.default_rng(0).normal(1.0, 2.0, 50)

    mean, se, low, high = paired(x, np.arange(50), 0.9)

    assert (mean, se) == pytest.approx((x.mean(), stats.sem(x)))
    assert (low, high) == pytest.approx(stats.t.interval(0.9, 49, x.mean(), stats.sem(x)))


def test_clustered_intervals_cover_where_others_do_not():
    draw = np.random.default_rng(1)
    covered = np.zeros(2)
    for _ in range(600):
        donor = np.repeat(np.arange(8), 40)
        x = draw.normal(0, 1, 8)[donor] + draw.normal(0, 1, 320)
        for i, units in enumerate((donor, np.arange(320))):
            _, _, low, high = paired(x, units, 0.9)
            covered[i] += low < 0 < high

    # 600 repeats: a standard error of 1.2 %
    assert covered[0] / 600 == pytest.approx(0.9, abs=0.04)
    assert covered[1] / 600 < 0.6


# ---- rankings ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split():
    adata = pyrosc.simulate.tissue(700, 50, n_types=3, n_batches=2, depth=400, n_markers=15, effect=1.0, seed=5)
    train, test = Cells.from_anndata(adata, batch="batch").split(0.6, 0.4)
    return train, train.thin(0.5)[0], test


def test_nb_counts_are_told_from_poisson(split):
    _, kept, test = split
    program = pyrosc.scvi(kept, n_latent=3, n_hidden=32)
    fits = {
        "nb": quick(program, kept, epochs=15),
        "zinb": quick(program.replace(likelihood=ZINBLikelihood()), kept, epochs=15),
        "poisson": quick(
            program.replace(likelihood=PoissonLikelihood(), dispersion=pyrosc.NoDispersion()), kept, epochs=15
        ),
        "latent": quick(program.replace(library=pyrosc.LatentLibrary()), kept, epochs=15),
    }

    table = compare(fits, test, by="cell_type")

    assert list(table.columns) == ["score", "difference", "se", "lower", "upper", "verdict"]
    assert table.loc["poisson", "verdict"] == "worse"
    assert table.loc["poisson", "upper"] < -5
    assert (table.loc[["nb", "zinb", "latent"], "difference"] > -2).all()
    assert table.index[-1] == "poisson"
    assert table["verdict"].iloc[0] == "best"
    assert table.attrs == {"score": "thinned", "n_cells": 280, "by": "cell_type", "n_units": 3}
    pd.testing.assert_frame_equal(table, compare(fits, test, by="cell_type"))
    itself = compare({"a": fits["nb"], "b": fits["nb"]}, test)
    assert set(itself["verdict"]) == {"best", "tied"}
    assert itself["difference"].tolist() == [0.0, 0.0]


def test_within_one_likelihood_and_library_log_p_is_compared(split):
    train, _, test = split
    fits = [quick(pyrosc.scvi(train, n_latent=3, n_hidden=32), train, epochs=e) for e in (1, 15)]

    table = compare(fits, test, n_draws=100)

    assert table.attrs["score"] == "importance"
    assert table.index.tolist() == ["fit 1", "fit 0"]
    assert table.loc["fit 0", "verdict"] == "worse"
    assert table["score"].iloc[0] == pytest.approx(fits[1].log_likelihood(test, 100).mean(), abs=1e-6)


def test_what_cannot_be_compared_is_refused_with_the_remedy(split):
    train, kept, test = split
    full = [quick(pyrosc.scvi(train, n_latent=2, n_hidden=4, likelihood=like()), train, epochs=1)
            for like in (pyrosc.NBLikelihood, ZINBLikelihood)]  # fmt: skip
    half = quick(pyrosc.scvi(kept, n_latent=2, n_hidden=4), kept, epochs=1)
    other = Cells.from_counts(np.ones((20, 4), int) + np.eye(20, 4, dtype=int))
    small_fit = quick(pyrosc.scvi(other, n_latent=2, n_hidden=4), other, epochs=1)

    for fits, options, says in (
        (full, {}, r"other likelihoods or libraries cannot be compared.*train.thin\(0.5\)"),
        (full, dict(score="thinned"), r"trained on full counts.*train.thin\(0.5\)"),
        ([full[0], half], {}, "thinned to different shares"),
        ([half, half], dict(score="importance"), "trained on thinned cells"),
        ([full[0], full[0]], dict(score="elbo"), 'score must be "thinned", "importance" or None'),
        ([full[0], small_fit], {}, "fitted to other genes"),
        ([full[0]], {}, "nothing to compare: 1 fit"),
        ([half, half], dict(by="doner"), 'no column "doner"'),
        ([half, half], dict(interval=1.0), "interval must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=says):
            compare(fits, test, **options)
    with pytest.raises(ValueError, match='the cells that "fit 0", "fit 1" was fitted to'):
        compare([full[0], full[0]], train)
    with pytest.raises(ValueError, match="thinned already"):
        compare([half, half], test.thin(0.5)[0])
    with pytest.raises(TypeError, match="a dict by name, or a list"):
        compare(half, test)
    with pytest.raises(TypeError, match="takes fits"):
        compare([half, "half"], test)


def test_stories_that_hide_their_law_in_the_function_are_told_apart(split):
    train, _, test = split

    def counts(law):
        def model(cells):
            with cells.plate():
                pyro.sample("x", law(cells.library / 50).expand([len(cells), 50]).to_event(1), obs=cells.x)

        return model

    program = pyrosc.Program(counts(lambda m: Poisson(m)), train)
    other = pyrosc.Program(counts(lambda m: NegativeBinomial(m, torch.ones(1))), train)
    made = [
        pyrosc.Fit(p, pd.DataFrame(), {"n_cells": 1, "state": "finished", "best_epoch": 0}) for p in (program, other)
    ]

    with pytest.raises(ValueError, match="other likelihoods or libraries.*Poisson.*NegativeBinomial"):
        compare(made, test)


def test_shares_of_thinning_are_kept_in_order(split):
    train, kept, test = split

    assert np.diff([train.schema.log_library_mean, kept.schema.log_library_mean], axis=0) == pytest.approx(
        -0.7, abs=0.05
    )
    assert kept.with_counts(train.x).kept == 1.0
    fits = [quick(pyrosc.scvi(c, n_latent=2, n_hidden=4), c, epochs=1)
            for c in (train.thin(0.3)[0], train.thin(0.7)[1])]  # fmt: skip
    assert len(compare(fits, test)) == 2
    with pytest.raises(ValueError, match="at least two"):
        compare(fits, test[:1])
    one, other = (Cells.from_counts(np.random.default_rng(s).poisson(3.0, (30, 6))) for s in (0, 1))
    same_names = [quick(pyrosc.scvi(one, n_latent=2, n_hidden=4, seed=s), one, epochs=1) for s in (0, 1)]
    with pytest.warns(PyroscWarning, match="other counts"):  # cell0, cell1, ... are names of any matrix
        compare(same_names, other, n_draws=20)


def test_a_latent_library_of_thinned_cells_expects_thinned_totals(split):
    _, kept, _ = split
    fit = quick(pyrosc.scvi(kept, n_latent=2, n_hidden=8, library=pyrosc.LatentLibrary()), kept, epochs=10)

    off = np.log(fit.draws("library", kept, 50)[..., 0]).mean(0) - np.log(kept.library[:, 0].numpy())
    assert abs(off.mean()) < 0.15


def test_a_law_of_ones_own_needs_to_say_what_is_left(split):
    _, kept, test = split

    class Own(pyrosc.Part):
        def forward(self, mean, dispersion=None, hidden=None):
            return dist.Poisson(mean).to_event(1)

    fit = quick(pyrosc.scvi(kept, n_latent=2, n_hidden=4, likelihood=Own(), dispersion=None), kept, epochs=1)
    with pytest.raises(ValueError, match=r"Poisson, has no method rest_given\(kept, fraction\)"):
        compare([fit, fit], test)
