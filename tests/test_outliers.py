"""Outliers: p-values of sound cells, and doublets, unseen types and strange counts among them."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats

import pyrosc
from pyrosc import Cells, PyroscWarning
from pyrosc.outliers import beside_others, combined, conformal, either, judged, levelled
from pyrosc.overlap import Landmarks


def area(score, is_strange):
    return stats.mannwhitneyu(score[is_strange], score[~is_strange]).statistic / (
        is_strange.sum() * (~is_strange).sum()
    )


def test_conformal_p_values_of_cells_like_the_others_are_uniform():
    draw = np.random.default_rng(0)
    among = draw.gamma(2.0, size=500)

    p = conformal(draw.gamma(2.0, size=4000), among)

    assert p.min() >= 1 / 501
    for level in (0.05, 0.2, 0.5):  # the sample of 500 and that of 4,000: standard errors of 0.022 at most
        assert (p <= level).mean() == pytest.approx(level, abs=0.05)
    assert conformal(np.array([100.0]), among)[0] == pytest.approx(1 / 501)


def test_combined_p_values_of_independent_ones_are_those_of_fisher():
    p = np.random.default_rng(1).random((50, 3))

    by_scipy = [stats.combine_pvalues(row, method="fisher").pvalue for row in p]

    np.testing.assert_allclose(combined(p), by_scipy, rtol=1e-10)
    np.testing.assert_allclose(combined(p, -2.0), by_scipy, rtol=1e-10)  # what would lower p is not used
    assert combined(np.array([[1e-8, 0.9, 0.8]]))[0] < 1e-5
    assert combined(np.array([[0.04, 0.04, 0.04]]))[0] < 0.005  # a little of each
    assert combined(np.array([[1.0, 1.0, 1.0]]))[0] == 1.0


def test_combined_p_values_keep_their_level_where_what_they_share_is_told():
    draw = np.random.default_rng(1)
    both = draw.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 40_000)
    p = stats.norm.sf(np.column_stack([draw.normal(size=40_000), both]))
    shared = np.cov(-2 * np.log(p[:, 1]), -2 * np.log(p[:, 2]))[0, 1]

    for level in (0.01, 0.05):  # standard errors 0.0005 and 0.0011; Brown's law is an approximation
        assert (combined(p, shared) <= level).mean() == pytest.approx(level, rel=0.12)
        assert (combined(p) <= level).mean() > 1.2 * level


def test_totals_of_batches_are_brought_to_one_level_whatever_types_they_hold():
    draw = np.random.default_rng(2)
    batch = draw.integers(2, size=1500)
    kind = (draw.random(1500) < np.where(batch == 0, 0.8, 0.2)).astype(int)  # batch 0 holds more of the deep type
    loc = torch.tensor(draw.normal(size=(1500, 2)) + 20 * kind[:, None])
    log_total = torch.tensor(6 + 1.0 * kind + np.where(batch == 0, -0.5, 0.5) + 0.3 * draw.normal(size=1500))
    marks = Landmarks(loc, log_total, {"batch": torch.tensor(batch)})

    adjusted, level = levelled(marks, "batch")

    raw = [float(log_total[batch == b].mean()) for b in (0, 1)]
    assert raw[1] - raw[0] < 0.6  # what averages of batches would say
    # Errors of means of 750: 0.3 / sqrt(750) each, and of neighbours likewise.
    assert float(level[1] - level[0]) == pytest.approx(1.0, abs=0.06)
    within = [float(adjusted.log_total[(batch == b) & (kind == 1)].mean()) for b in (0, 1)]
    assert within[0] == pytest.approx(within[1], abs=0.08)
    unknown = replace(marks, columns={"batch": torch.tensor(np.where(np.arange(1500) < 5, -1, batch))})
    assert torch.equal(levelled(unknown, "batch")[0].log_total[:5], log_total[:5])


def test_scores_that_are_heavy_tailed_are_judged_by_a_heavy_tail():
    score = 2 + 3 * np.random.default_rng(3).standard_t(5, 20_000)

    p = beside_others(score)

    for level in (0.05, 0.005):  # standard errors 0.0015 and 0.0005, and that of the spread
        assert (p < level).mean() == pytest.approx(level, rel=0.2)
    spread = stats.median_abs_deviation(score, scale="normal")
    assert (stats.norm.sf((score - 2) / spread) < 0.0005).mean() > 0.0025  # five times too many


def test_p_values_of_the_same_counts_keep_their_level_whatever_they_share():
    draw = np.random.default_rng(1)
    for r in (0.0, 0.7, 0.99):
        p = stats.norm.sf(draw.multivariate_normal([0, 0], [[1, r], [r, 1]], 40_000))
        for level in (0.01, 0.05):  # standard errors 0.0005 and 0.0011
            assert (either(p) <= level).mean() == pytest.approx(level, rel=0.25)
    assert either(np.array([[1e-8, 0.9]]))[0] < 1e-6
    assert either(np.array([[1.0, 1.0]]))[0] > 0.9


def test_p_values_of_sound_cells_keep_their_level_where_surprise_and_genes_go_together():
    draw = np.random.default_rng(5)
    normals = draw.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 20_000)
    first = stats.t.ppf(stats.norm.cdf(normals), 5)
    table = pd.DataFrame({"surprise": first[:, 0], "extra_genes": first[:, 1], "p_predictive": 0.5})
    table[["p_state", "p_total"]] = draw.random((20_000, 2))
    table.attrs["shared"] = 0.0

    found = judged(table, 0.1)

    for level in (0.05, 0.005):  # standard errors 0.0015 and 0.0005; Brown's law is an approximation
        assert (found["p"] <= level).mean() == pytest.approx(level, rel=0.3)
    # As if they told two things:
    alone = combined(found[["p_counts", "p_genes", "p_state", "p_total"]].to_numpy())
    assert (alone <= 0.005).mean() > 1.3 * (found["p"] <= 0.005).mean()


@pytest.fixture(scope="module")
def tissue_of_types():
    return pyrosc.simulate.tissue(700, 120, n_types=4, n_batches=1, depth=900, n_markers=40, effect=1.2, seed=3)


@pytest.fixture(scope="module")
def fit(tissue_of_types):
    data = tissue_of_types[:500]
    cells = Cells.from_anndata(data[data.obs["cell_type"] != "type3"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(pyrosc.scvi(cells, n_latent=5, n_hidden=64), cells, progress=False)


def test_unseen_types_and_doublets_stand_out_from_sound_cells(fit, tissue_of_types):
    held = tissue_of_types[500:]
    kind = held.obs["cell_type"].to_numpy()
    sound, unseen = np.flatnonzero(kind != "type3"), np.flatnonzero(kind == "type3")
    draw = np.random.default_rng(0)
    one, two = draw.choice(sound, 200), draw.choice(sound, 200)
    pairs = kind[one] != kind[two]
    x = sparse.csr_matrix(held.X)
    both = x[one[pairs][:40]] + x[two[pairs][:40]]
    every = Cells.from_counts(sparse.vstack([x[sound], x[unseen], both]).tocsr(), genes=list(held.var_names))
    role = np.repeat(["sound", "unseen", "doublet"], [len(sound), len(unseen), 40])

    table = fit.outliers(every, n_draws=50)

    plain = role == "sound"
    for name in ("p_counts", "p_genes", "p_state", "p_total"):
        # Some 150 sound cells: a rate of 0.05 scatters by 0.018.
        assert (table["p" if name == "p" else name][plain] < 0.05).mean() < 0.15
    assert (table["is_outlier"][plain]).mean() < 0.06
    for what, least in (("unseen", 0.75), ("doublet", 0.85)):
        some = plain | (role == what)
        assert area(-table["p"].to_numpy()[some], role[some] == what) > least
    # It takes both the state and the total: the total alone tells doublets, and not types.
    total = np.asarray(every.library).ravel()
    some = plain | (role == "unseen")
    assert area(total[some], role[some] == "unseen") < 0.65


def test_outliers_have_names_and_are_repeatable(fit, tissue_of_types):
    cells = Cells.from_anndata(tissue_of_types[500:560])
    table = fit.outliers(cells, n_draws=30, seed=3)

    assert list(table.index) == list(cells.names)
    assert list(table.columns) == [
        "surprise", "extra_genes", "p_predictive", "p_counts", "p_genes", "p_state", "p_total", "p", "q", "is_outlier",
    ]  # fmt: skip
    shares = table.drop(columns=["surprise", "extra_genes"])
    assert ((shares >= 0) & (shares <= 1)).all(axis=None)
    assert table.equals(fit.outliers(cells, n_draws=30, seed=3))
    assert not table.equals(fit.outliers(cells, n_draws=30, seed=4))


@pytest.mark.filterwarnings("error::pyrosc.PyroscWarning")
def test_cells_of_the_fit_may_be_asked_too(fit, tissue_of_types):
    data = tissue_of_types[:500]
    own = Cells.from_anndata(data[data.obs["cell_type"] != "type3"])

    table = fit.outliers(own, n_draws=30)

    assert table["is_outlier"].mean() < 0.05
    assert table["p_state"].median() == pytest.approx(0.5, abs=0.1)


def test_outliers_refuse_what_they_cannot_judge(fit, tissue_of_types):
    cells = Cells.from_anndata(tissue_of_types[500:560])
    with pytest.raises(ValueError, match="give at least 20, not 5"):
        fit.outliers(cells[:5])
    with pytest.raises(ValueError, match="thinned already"):
        fit.outliers(cells.thin(0.5)[0])
    with pytest.raises(ValueError, match="fdr must be between 0 and 1"):
        fit.outliers(cells, fdr=2.0)
