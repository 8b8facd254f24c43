"""Outliers: p-values of sound cells, and doublets, unseen types and strange counts among them."""

import warnings

import numpy as np
import pytest
from scipy import sparse, stats

import pyrosc
from pyrosc import Cells, PyroscWarning
from pyrosc.outliers import combined, conformal


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


def test_combined_p_values_keep_their_level_though_they_depend_on_each_other():
    draw = np.random.default_rng(1)
    shared = draw.normal(size=(40_000, 1))
    p = stats.norm.sf(0.7 * shared + 0.51**0.5 * draw.normal(size=(40_000, 3)))

    for level in (0.01, 0.05):
        assert (combined(p) <= level).mean() < 1.25 * level
    assert combined(np.array([[1e-8, 0.9, 0.8]]))[0] < 1e-6
    assert combined(np.array([[1.0, 1.0, 1.0]]))[0] > 0.9


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

    table = fit.outliers(every)

    plain = role == "sound"
    for name in ("p_counts", "p_state", "p_total"):
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
        "surprise", "p_predictive", "p_counts", "p_state", "p_total", "p", "q", "is_outlier",
    ]  # fmt: skip
    assert ((table.drop(columns=["surprise"]) >= 0) & (table.drop(columns=["surprise"]) <= 1)).all(axis=None)
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
