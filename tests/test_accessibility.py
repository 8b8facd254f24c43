"""Accessibility: what a region has in all cells is taken away, and differences of probabilities are judged rightly."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import pyrosc
from pyrosc import Cells, ProgramError, PyroscWarning
from pyrosc.accessibility import _with_counts, opened
from pyrosc.effects import Totals
from pyrosc.shrinkage import shrunk


def quick(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, **(dict(epochs=30, progress=False) | options))


@pytest.fixture(scope="module")
def atac():
    adata = pyrosc.simulate.fragments(600, 500, n_types=3, depth=150.0, n_quantitative=30, highest=3.0, seed=5)
    return adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()


@pytest.fixture(scope="module")
def cells(atac):
    return Cells.from_anndata(atac, label="cell_type")


@pytest.fixture(scope="module")
def fit(cells):
    return quick(pyrosc.poissonvi(cells), cells)


# ---- without region factors --------------------------------------------------------------------


def test_accessibility_is_shares_over_those_of_all_training_cells(fit, cells):
    rho = fit.expression(cells[:20], n_draws=4, seed=1)
    profile = fit.program.parts["decoder"].profile.numpy()
    found = fit.accessibility(cells[:20], n_draws=4, seed=1)

    np.testing.assert_allclose(found, rho / profile, rtol=1e-6)
    assert found.attrs["unit"].startswith("share over the region's share")
    pd.testing.assert_frame_equal(fit.accessibility(cells[:20], factors=True, n_draws=4, seed=1), rho)
    names = list(rho.columns[[7, 2]])
    np.testing.assert_allclose(fit.accessibility(cells[:20], names, n_draws=4, seed=1), found[names], rtol=1e-6)
    wide = fit.accessibility(cells[:20], names, interval=0.9, n_draws=4, seed=1)
    np.testing.assert_allclose(wide[names[0]]["mean"], found[names[0]], rtol=1e-5)
    assert (wide[names[0]]["lower"] <= wide[names[0]]["upper"]).all()


def test_region_factors_are_gone_and_regions_of_all_types_are_near_one(atac, fit, cells):
    a = fit.accessibility(cells, n_draws=5)
    rho = fit.accessibility(cells, factors=True, n_draws=5)
    profile = fit.program.parts["decoder"].profile.numpy()
    weight = cells.library.numpy().ravel()

    # Shares differ a thousandfold between regions, accessibility of the average cell does not
    mean = np.average(a, axis=0, weights=weight)
    seen = np.asarray(atac.X.sum(0)).ravel() >= 100
    assert np.abs(np.log(mean[seen])).max() < 0.25
    assert np.ptp(np.log(rho.mean(0)[seen])) > 1.0
    truth = atac.varm["rho"].to_numpy().T[atac.obs["cell_type"].cat.codes.to_numpy()] / profile
    assert stats.spearmanr(a.to_numpy()[:, seen].ravel(), truth[:, seen].ravel())[0] > 0.6


def test_it_does_not_depend_on_what_is_bias_and_what_is_weight(fit, cells):
    # A unit of the last layer that is on in every cell: what it adds can be moved from the bias into its weights.
    program = fit.program.copy()
    decoder = program.parts["decoder"]
    norm = decoder.layers[-1].norm.norm
    with torch.no_grad():
        before = decoder.out.weight[:, 0].clone()
        norm.weight[0], norm.bias[0] = 0.0, 1.0  # constant unit, 1 in all cells
        decoder.out.bias += 0 * before
    one = pyrosc.Fit(program, fit.history, fit.settings)
    other = pyrosc.Fit(program.copy(), fit.history, fit.settings)
    moved = other.program.parts["decoder"]
    with torch.no_grad():
        shift = torch.randn(cells.n_genes)
        moved.out.weight[:, 0] += shift
        moved.out.bias -= shift

    # the same of every fragment ...
    np.testing.assert_allclose(one.expression(cells[:5]), other.expression(cells[:5]), rtol=1e-4)
    # ... and so the same accessibility
    np.testing.assert_allclose(one.accessibility(cells[:5]), other.accessibility(cells[:5]), rtol=1e-4)
    # the twin: shares with the bias at zero, as published, are not
    published = []
    for f in (one, other):
        zeroed = f.program.copy()
        with torch.no_grad():
            zeroed.parts["decoder"].out.bias.zero_()
        published.append(pyrosc.Fit(zeroed, f.history, f.settings).expression(cells[:5]).to_numpy())
    assert np.abs(np.log(published[0] / published[1])).max() > 1


def test_stories_without_region_factors_say_so(cells):
    fit = quick(pyrosc.scvi(cells, n_latent=2, n_hidden=8), cells, epochs=1)
    with pytest.raises(ProgramError, match=r"no region factors.*poissonvi.*factors=True"):
        fit.accessibility(cells[:3])
    assert fit.accessibility(cells[:3], factors=True).shape == (3, cells.n_genes)
    with pytest.raises(TypeError, match="factors is True or False"):
        fit.accessibility(cells[:3], factors="no")


# ---- differences -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(fit, cells):
    return fit.differential_accessibility(
        cells, "cell_type", "type0", "type1", scale="difference", delta=0.1, library=150.0
    )


def truth_of(atac, one="type0", two="type1", library=150.0):
    rho = atac.varm["rho"]
    return pd.Series(opened(rho[one], library) - opened(rho[two], library), index=atac.var_names)


def test_differences_are_between_probabilities_of_seeing_a_region_open(atac, table):
    truth = truth_of(atac)[table.index]

    assert opened(0.01, 100.0) == pytest.approx(1 - np.exp(-1.0))
    assert opened(1e-12, 1.0) == pytest.approx(1e-12, rel=1e-6)
    assert opened(-0.01, 100.0) == pytest.approx(-1.0)  # noise below 0 keeps its mean
    near = table["open1"].between(0.05, 0.95) & table["open2"].between(0.05, 0.95)  # no draw is cut
    assert ((table["open1"] - table["open2"]) - table["difference_mean"])[near].abs().max() < 1e-3
    assert table[["open1", "open2"]].to_numpy().min() >= 0
    # 200 cells a group: a difference of probabilities has a standard error of at most sqrt(2 x 0.25 / 200) = 0.05
    assert np.abs(table["difference_mean"] - truth).max() < 5 * 0.05
    assert np.sqrt(np.mean((table["difference_mean"] - truth) ** 2)) < 0.05
    # the twin: the other type's truth is far off
    other = truth_of(atac, "type0", "type2")[table.index]
    assert np.sqrt(np.mean((table["difference_mean"] - other) ** 2)) > 0.08


def test_intervals_cover_and_calls_are_right(atac, table):
    truth = truth_of(atac)[table.index]
    covered = ((table["difference_lower"] <= truth) & (truth <= table["difference_upper"])).mean()

    assert 0.8 < covered < 0.99  # of 500 regions that go together, nominal 0.9
    called = table["is_da"].to_numpy()
    assert called.sum() > 30
    assert (np.abs(truth)[called] <= 0.1).mean() < 0.15  # false ones among those called at 0.05
    assert table["expected_fdp"][called].max() <= 0.05
    assert table["probability"].is_monotonic_decreasing


def test_an_impossible_effect_has_probability_zero(fit, cells):
    for scale in ("difference", "ratio"):
        found = fit.differential_accessibility(
            cells, "cell_type", "type0", "type1", scale=scale, delta=50.0, n_draws=20
        )
        assert not found["is_da"].any()
        # A ratio of 2^50 is not impossible, only far beyond a mixture of normals.
        assert (found["probability"] <= (0 if scale == "difference" else 1e-50)).all()
    # beyond what shrinks too
    found = fit.differential_accessibility(
        cells, "cell_type", "type0", "type1", scale="difference", delta=1.0, n_draws=20, shrink=False
    )
    assert (found["probability"] == 0).all()


def test_far_tails_of_shared_laws_are_exact():
    law = shrunk(np.array([0.0, 0.5, 3.0]), np.array([0.1, 0.1, 0.1]))
    assert (law.probability(50.0) == 0).all()
    assert law.probability(0.3)[0] == pytest.approx(1 - law.cdf(0.3)[0] + law.cdf(-0.3)[0], abs=1e-12)
    assert law.probability(0.3)[2] == pytest.approx(1.0)
    # a point at zero is in no tail, and in both at once nowhere
    assert 0 < law.probability(0.0)[0] < 1


def test_random_halves_do_not_differ(fit, cells):
    half = np.random.default_rng(0).uniform(size=len(cells)) < 0.5
    found = fit.differential_accessibility(cells, group1=half, scale="difference", delta=0.05, n_draws=50)

    assert found["is_da"].sum() == 0
    assert (found["difference_lower"] <= 0).mean() > 0.9  # of 500 intervals of 90 %, one side


def test_ratios_are_those_of_differential_expression(fit, cells):
    options = dict(n_draws=20, delta=0.5, seed=3)
    ratio = fit.differential_accessibility(cells, "cell_type", "type0", "type1", **options)
    same = fit.differential_expression(cells, "cell_type", "type0", "type1", **options)

    np.testing.assert_array_equal(ratio["lfc_mean"], same["lfc_mean"])
    assert list(ratio["is_da"]) == list(same["is_de"])
    assert ratio.index.name == "region"
    assert ratio.attrs["scale"] == "ratio"


def test_counts_beyond_what_is_decoded_move_means_as_they_should():
    totals = Totals(seen=np.array([[30.0, 0.0]]), expected=np.array([[[20.0, 4.0]]]), variance=np.array([[20.0, 4.0]]))
    mean = torch.tensor([[0.01, 0.002]], dtype=torch.float64).expand(20_000, 2)

    found = _with_counts(mean, totals, np.array([True]), None, None, [0]).numpy()

    ratio, one = np.array([30.5 / 20.5, 0.5 / 4.5]), mean[0].numpy()
    np.testing.assert_allclose(found.mean(0), ratio * one, rtol=1e-6)  # quantiles, so that no mean moves by chance
    # Poisson: the variance of a count is its mean, that seen or that expected if this is more
    np.testing.assert_allclose(found.var(0), np.array([30.5, 4.5]) / np.array([20.5, 4.5]) ** 2 * one**2, rtol=0.01)


def test_an_ensemble_and_donors_and_all_groups_are_taken(atac):
    data = atac[:200].copy()
    data.obs["donor"] = [f"d{i % 4}" for i in range(200)]
    cells = Cells.from_anndata(data[:, np.asarray(data.X.sum(0)).ravel() > 0].copy(), sample="donor")
    fit = quick(pyrosc.poissonvi(cells, n_latent=3, n_hidden=8), cells, epochs=3, ensemble=2)

    found = fit.differential_accessibility(cells, "cell_type", scale="difference", n_draws=10)

    assert set(found["group1"]) == {"type0", "type1", "type2"}
    assert found.attrs["uncertainty"] == "z, cells, counts and decoder"
    assert found["difference_lower"].min() >= -1
    assert found["difference_upper"].max() <= 1


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(scale="share"), ValueError, 'scale must be "ratio" or "difference"'),
        (dict(library=100.0), ValueError, 'library is for scale="difference"'),
        (dict(scale="difference", library=-1.0), ValueError, "library must be a positive number of fragments"),
        (dict(scale="difference", estimand="donor"), ValueError, "differences are of populations"),
        (dict(scale="difference", pseudocount=0.1), TypeError, "no option 'pseudocount' for scale=\"difference\""),
        (dict(scale="difference", delta=-0.1), ValueError, "delta must be at least 0"),
        (dict(scale="difference", shrink="no"), TypeError, "shrink is True or False"),
        (dict(n_drawz=3), TypeError, 'Did you mean "n_draws"'),
        (dict(scale="difference", batches="all"), ValueError, 'batches must be "shared" or "own"'),
    ],
)
def test_what_is_wrong_is_named(fit, cells, options, error, text):
    with pytest.raises(error, match=text):
        fit.differential_accessibility(cells, "cell_type", "type0", "type1", **options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_intervals_of_differences_cover_and_calls_keep_their_rate_at_few_counts(seed):
    # Closed regions have some three fragments in a group.
    atac = pyrosc.simulate.fragments(800, 1000, n_types=3, depth=250.0, n_quantitative=60, highest=3.0, seed=seed)
    cells = Cells.from_anndata(atac, label="cell_type")
    fit = quick(pyrosc.poissonvi(cells), cells, epochs=40)
    covered = {}
    for residual in (True, False):
        found = fit.differential_accessibility(
            cells, "cell_type", "type0", "type1", scale="difference", delta=0.1, residual=residual
        )
        truth = truth_of(atac, library=found.attrs["library"])[found.index]
        covered[residual] = found["difference_lower"].le(truth) & found["difference_upper"].ge(truth)
        if residual:
            assert (truth[found["is_da"]].abs() <= 0.1).mean() < 0.1  # asked for 0.05, of about 120 that are called

    assert 0.85 < covered[True].mean() < 0.95  # nominal 0.9; 1,000 regions, a standard error of 0.01
    assert covered[False].mean() < 0.2  # the twin: what is decoded alone
