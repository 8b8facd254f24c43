"""Predictive checks: right stories pass, wrong ones do not, and the numbers are those of brute force."""

import warnings

import numpy as np
import pytest

import pyrosc
from pyrosc import Cells, PoissonLikelihood, PyroscWarning
from pyrosc.check import posterior_predictive, prior_predictive


def quiet_fit(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, progress=False, **options)


@pytest.fixture(scope="module")
def cells(tissue):
    return Cells.from_anndata(tissue[:300], batch="batch", label="cell_type")


@pytest.fixture(scope="module")
def thinned(cells):
    """NB and Poisson fits of thinned counts."""
    kept, _ = cells.thin(0.5, seed=3)
    options = dict(n_latent=3, n_hidden=32)
    return {
        "NB": quiet_fit(pyrosc.scvi(kept, **options), kept, epochs=60),
        "Poisson": quiet_fit(pyrosc.scvi(kept, likelihood=PoissonLikelihood(), **options), kept, epochs=60),
    }


def test_statistics_and_p_values_are_those_of_the_replicates(fitted):
    _, cells, fit = fitted
    few = cells[:40]
    table = posterior_predictive(fit, few, ["mean", "detected genes"], n_draws=30, seed=2)
    drawn, x = fit.predict(few, 30, seed=2), few.x.numpy()

    means = table[table["statistic"] == "mean"]
    assert list(means["name"]) == list(cells.schema.genes)
    np.testing.assert_allclose(means["observed"], x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(means["q95"], np.quantile(drawn.mean(1), 0.95, axis=0), rtol=1e-5)
    seen = table[table["statistic"] == "detected genes"]
    assert list(seen["name"]) == list(few.names)
    observed, made = (x > 0).sum(1), (drawn > 0).sum(2)
    above, below = (made >= observed).sum(0), (made <= observed).sum(0)
    np.testing.assert_allclose(seen["p"], np.minimum(1.0, 2 * (1 + np.minimum(above, below)) / 31))
    assert table.attrs == {"counts": "used twice", "n_draws": 30}


def test_a_story_of_ones_own_statistics_and_levels(fitted):
    _, cells, fit = fitted
    table = posterior_predictive(
        fit, cells[:50], {"total": lambda x: x.sum(), "third": lambda x: x[:, 3]}, n_draws=20, by="cell_type"
    )

    totals = table[table["statistic"] == "total"]
    assert list(totals["level"]) == sorted(set(cells[:50].obs["cell_type"]))
    assert set(totals["of"]) == {"all"}
    assert (table["statistic"] == "third").sum() == 50
    with pytest.raises(ValueError, match='statistic "wrong" answered shape'):
        posterior_predictive(fit, cells[:50], {"wrong": lambda x: x[:2]}, n_draws=20)
    with pytest.raises(ValueError, match='there is no statistic "fano"'):
        posterior_predictive(fit, cells[:50], ["fano"], n_draws=20)
    with pytest.raises(TypeError, match="must be a function"):
        posterior_predictive(fit, cells[:50], {"mean": 3.0}, n_draws=20)
    with pytest.raises(ValueError, match="no column"):
        posterior_predictive(fit, cells[:50], ["mean"], n_draws=20, by="kind")
    with pytest.raises(ValueError, match="n_draws must be a whole number of at least 20"):
        posterior_predictive(fit, cells[:50], ["mean"], n_draws=5)


def test_replicates_come_in_pieces_that_fit_into_memory(fitted, monkeypatch):
    _, cells, fit = fitted
    monkeypatch.setattr("pyrosc.check.predictive._AT_ONCE", 40 * 60 * 7)

    table = posterior_predictive(fit, cells[:40], ["mean"], n_draws=20)

    made = np.concatenate([fit.predict(cells[:40], n, seed=k) for k, n in enumerate((7, 7, 6))]).mean(1)
    for column, at in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
        np.testing.assert_allclose(table[column], np.quantile(made, at, axis=0), rtol=1e-5)


def test_dispersion_of_counts_is_missed_by_poisson_and_not_by_nb(cells, thinned):
    """The tissue is negative binomial with a median dispersion of 2."""
    small = {}
    for name, fit in thinned.items():
        table = posterior_predictive(fit, cells, ["zero fraction", "Fano factor", "mean"], n_draws=100, seed=3)
        assert table.attrs["counts"] == "dropped by thinning"
        small[name] = (table["p"] <= 0.05).groupby(table["statistic"]).mean()

    assert small["NB"]["Fano factor"] < 0.2
    assert small["Poisson"]["Fano factor"] > 0.7  # the twin
    assert small["NB"]["zero fraction"] < 0.5 * small["Poisson"]["zero fraction"]
    assert small["NB"]["mean"] < 0.3


def test_p_values_of_counts_from_the_story_itself_are_uniform(cells, thinned):
    """Counts made by the fit, states drawn from the prior, thinned alike: at 5 % between 1 and 10 % of genes."""
    fit = thinned["NB"]
    kept, _ = cells.thin(0.5, seed=3)
    made = fit.program.generate(kept, seed=9)
    whole = Cells.align(cells, fit.schema)
    theta = fit.program.parts["dispersion"]().detach()
    rng = np.random.default_rng(0)
    # The kept half has mean library * rho; the whole twice that, with the same dispersion.
    rate = rng.gamma(theta.numpy(), 2 * (kept.library * made["rho"]).numpy() / theta.numpy())
    x = rng.poisson(rate)
    x[x.sum(1) == 0, 0] = 1

    # One cell fewer: with as many of the same names it would look like training data that was edited.
    table = posterior_predictive(fit, whole.with_counts(x)[1:], ["zero fraction", "mean"], n_draws=100)

    p = table["p"].to_numpy()
    # 120 p-values of one data set, dependent: binomial(120, 0.05) ends within 0.5 and 10 %, and about half above 0.5
    assert (p <= 0.05).mean() <= 0.12
    assert 0.3 <= (p <= 0.5).mean() <= 0.7


def test_the_prior_predictive_draws_states_anew(fitted):
    _, cells, fit = fitted
    few = cells[:60]
    prior = prior_predictive(fit, few, ["library size", "mean"], n_draws=30)

    assert prior.attrs["counts"] == "prior"
    totals = prior[prior["statistic"] == "library size"]
    np.testing.assert_allclose(totals["q50"], totals["observed"], rtol=0.25)  # the observed totals are known to it
    x = few.x.numpy().ravel()
    likeness = {"likeness": lambda made: np.corrcoef(np.log1p(made).ravel(), np.log1p(x))[0, 1]}
    alike = [check(fit, few, likeness, n_draws=30)["q05"][0] for check in (posterior_predictive, prior_predictive)]
    assert alike[0] > alike[1] + 0.02  # its states are not those of these cells
    assert prior_predictive(fit.program, few, ["mean"], n_draws=30)["q50"].equals(
        prior[prior["statistic"] == "mean"]["q50"].reset_index(drop=True)
    )


def test_pictures_of_checks_and_effects(fitted):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    _, cells, fit = fitted
    table = posterior_predictive(fit, cells[:40], ["mean"], n_draws=20)
    ax = pyrosc.plot.predictive(table, "mean")
    assert ax.get_xlabel() == "observed mean"
    with pytest.raises(ValueError, match="no statistic"):
        pyrosc.plot.predictive(table, "variance")
    effects = fit.differential_expression(cells, "cell_type", "type0", n_draws=20)
    ax = pyrosc.plot.volcano(effects)
    assert "type0 over rest" in ax.get_xlabel()
    assert pyrosc.plot.volcano(effects, ax) is ax
    several = fit.differential_expression(cells, "cell_type", n_draws=20)
    with pytest.raises(ValueError, match="a volcano shows one comparison, and the table holds .* 'type0'"):
        pyrosc.plot.volcano(several)
    with pytest.raises(ValueError, match=r"differential_expression\(...\) answers, not a Cells"):
        pyrosc.plot.volcano(cells)
    with pytest.raises(ValueError, match='posterior_predictive.* not a DataFrame without "statistic"'):
        pyrosc.plot.predictive(effects, "mean")


def test_cells_of_the_fit_that_are_thinned_otherwise_are_refused(cells, thinned):
    fit = thinned["NB"]
    with pytest.raises(ValueError, match="thinned otherwise: with seed=0 .*Pass the seed= of cells.thin"):
        pyrosc.check.posterior_predictive(fit, cells, ["mean"], n_draws=20)
    with pytest.raises(ValueError, match="thinned otherwise"):
        fit.outliers(cells)
    table = pyrosc.check.posterior_predictive(fit, cells, ["mean"], n_draws=20, seed=3)
    assert table.attrs["counts"] == "dropped by thinning"


def test_transforms_of_counts_tell_a_law_that_is_too_narrow(cells, thinned):
    from pyrosc.check import pit

    seen = {name: pit(one, cells, seed=3) for name, one in thinned.items()}

    expressed = cells.x.numpy().mean(0) > 1
    right, wrong = (seen[name].loc[np.array(cells.schema.genes)[expressed]] for name in ("NB", "Poisson"))
    assert seen["NB"].attrs["counts"] == "dropped by thinning"
    assert right["ks"].median() < 0.6 * wrong["ks"].median()
    ends = {name: table.attrs["histogram"][[0, -1]].sum() for name, table in seen.items()}
    assert ends["Poisson"] > 1.3 * ends["NB"]  # too narrow: heaps at both ends
    assert seen["NB"].attrs["histogram"].sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="zeros must be above 0"):
        pit(thinned["NB"], cells, zeros=0, seed=3)


def test_transforms_are_uniform_where_the_story_is_true(fitted):
    """Laws are those that drew the counts, but for what the state was bent to them."""
    from pyrosc.check import pit

    _, cells, fit = fitted
    made = cells.with_counts(fit.predict(cells, 1, seed=5)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        table = pit(fit, made)

    assert table.attrs["counts"] == "used twice"
    # 60 genes of 600 cells: were all uniform, 5 % would have p below 0.05.
    assert (table["p"] < 0.05).mean() < 0.2
    assert abs(table["mean"].mean() - 0.5) < 0.02
