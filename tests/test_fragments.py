"""Fragments and reads: which of the two counts look like, from one to the other, and what is refused."""

import anndata
import numpy as np
import pytest
from scipy import sparse, stats

import pyrosc
from pyrosc import BernoulliLikelihood, Cells, GeneDispersion, NBLikelihood, PyroscWarning, count_kind, poissonvi
from pyrosc import reads_to_fragments as converted


@pytest.fixture(scope="module")
def atac():
    return pyrosc.simulate.fragments(300, 400, n_types=2, depth=150.0, n_quantitative=20, seed=1)


def layer(adata, name):
    return anndata.AnnData(X=adata.layers[name].copy(), obs=adata.obs[["cell_type"]], var=adata.var[[]])


def presence(adata):
    return anndata.AnnData(X=(adata.X > 0).astype(np.float32), obs=adata.obs[["cell_type"]], var=adata.var[[]])


def test_reads_fragments_and_presence_are_told_apart(atac):
    assert count_kind(atac) == "fragments"
    assert count_kind(atac, layer="reads") == "reads"
    assert count_kind(presence(atac)) == "presence"
    assert count_kind(Cells.from_anndata(atac)) == "fragments"
    assert count_kind(atac.X.toarray()) == count_kind(sparse.csc_matrix(atac.X)) == "fragments"


def test_many_fragments_in_wide_regions_are_not_taken_for_reads():
    draw = np.random.default_rng(0)
    wide = draw.poisson(3.0, (100, 40))

    assert (wide == 2).sum() > (wide == 1).sum()
    assert count_kind(wide) == "fragments"
    assert count_kind(2 * wide) == "reads"


@pytest.mark.parametrize("losses", [0.0, 0.15, 0.3])
def test_half_of_the_reads_rounded_up_are_the_fragments(losses):
    adata = pyrosc.simulate.fragments(100, 200, n_types=2, depth=80.0, n_quantitative=10, edge_losses=losses, seed=0)

    found = converted(layer(adata, "reads"))

    assert (found.X != adata.X).nnz == 0


def test_conversion_makes_a_new_object_and_keeps_what_else_is_there(atac):
    before = atac.layers["reads"].copy()

    found = converted(atac, layer="reads")

    assert (atac.layers["reads"] != before).nnz == 0
    assert (found.layers["reads"] != atac.X).nnz == 0
    assert (found.X != atac.X).nnz == 0
    assert found.obs.equals(atac.obs)
    assert found.layers["reads"].dtype == before.dtype
    assert converted(np.array([[200, 255, 2, 4]], dtype=np.uint8)).tolist() == [[100, 128, 1, 2]]  # no overflow
    view = atac[:50]
    assert converted(view, layer="reads").n_obs == 50
    assert view.is_view


def test_what_is_no_reads_is_not_halved(atac):
    with pytest.raises(ValueError, match=r"adata.X looks like fragments, not reads: [\d,]+ ones, .* pass check=False"):
        converted(atac)
    with pytest.raises(ValueError, match="looks like presence"):
        converted(presence(atac))
    with pytest.raises(ValueError, match=r"2 of 4 values looked at are not \(first: 0.5\)"):
        converted(np.array([[0.5, 2.0], [-1.0, 4.0]]))
    with pytest.raises(ValueError, match='no layer "read"'):
        converted(atac, layer="read")
    with pytest.raises(ValueError, match="no counts above 0"):
        converted(np.zeros((2, 2)))
    with pytest.raises(TypeError, match="make Cells of it"):
        converted(Cells.from_anndata(atac))
    with pytest.raises(TypeError, match="must hold numbers"):
        converted(np.array([["2"]]))
    assert converted(atac, check=False).X.max() == np.ceil(atac.X.max() / 2)


# ---- the door of the story ---------------------------------------------------------------------


def test_fragments_pass_and_reads_are_warned_of(atac):
    poissonvi(Cells.from_anndata(atac))
    with pytest.warns(PyroscWarning, match=r"look like reads, not fragments.*reads_to_fragments\(adata\)"):
        poissonvi(Cells.from_anndata(layer(atac, "reads")))
    poissonvi(Cells.from_anndata(converted(layer(atac, "reads"))))
    with pytest.warns(PyroscWarning, match="look like reads"):
        poissonvi(Cells.from_anndata(layer(atac, "reads")), likelihood=NBLikelihood(), dispersion=GeneDispersion())


def test_presence_is_refused_with_what_to_use_instead_and_taken_by_bernoulli(atac):
    cells = Cells.from_anndata(presence(atac))

    with pytest.raises(ValueError, match=r"all 0 or 1.*layer=.*likelihood=BernoulliLikelihood\(\)"):
        poissonvi(cells)
    with pytest.raises(ValueError, match="all 0 or 1"):
        poissonvi(cells, likelihood=NBLikelihood(), dispersion=GeneDispersion())
    poissonvi(cells, likelihood=BernoulliLikelihood())
    with pytest.raises(ValueError, match=r"these go further.*adata.X = \(adata.X > 0\)"):
        poissonvi(Cells.from_anndata(atac), likelihood=BernoulliLikelihood())
    poissonvi(Cells.empty(cells.schema))  # nothing to look at


def test_many_regions_are_no_reason_to_select_some():
    draw = np.random.default_rng(0)
    places = np.unique(np.concatenate([np.arange(12_000), draw.integers(50 * 12_000, size=12_000)]))
    cell, region = places % 50, places // 50 % 12_000
    cell[:12_000], region[:12_000] = np.arange(12_000) % 50, np.arange(12_000)  # each region is seen
    x = sparse.csr_matrix((np.ones(len(places), dtype=np.float32), (cell, region)), shape=(50, 12_000))
    x.sum_duplicates()
    names = [f"chr{1 + j % 22}_{500 * j}_{500 * j + 499}" for j in range(x.shape[1])]

    Cells.from_counts(x, genes=names)  # a warning would be an error here
    with pytest.warns(PyroscWarning, match="Select some first"):
        Cells.from_counts(x)


# ---- the simulator -----------------------------------------------------------------------------


def test_simulated_fragments_are_poisson_about_their_means():
    adata = pyrosc.simulate.fragments(3000, 300, n_types=3, depth=120.0, n_quantitative=20, seed=2)
    rho = adata.varm["rho"].to_numpy().T[adata.obs["cell_type"].cat.codes.to_numpy()]
    mean = adata.obs["library"].to_numpy()[:, None] * rho
    scaled = (adata.X.toarray() - mean) / np.sqrt(mean)

    np.testing.assert_allclose(adata.varm["rho"].sum(0), 1.0, rtol=1e-12)
    assert np.abs(scaled.mean(0)).max() < 5 / 3000**0.5  # five standard errors, 300 regions
    squares = scaled**2
    assert abs(squares.mean() - 1) < 5 * squares.std() / squares.size**0.5
    # the twin: reads are twice as many and not Poisson
    reads = adata.layers["reads"].toarray()
    assert ((reads - 2 * mean) ** 2 / (2 * mean)).mean() > 1.3
    lost = 2 * adata.X.toarray() - reads
    assert set(np.unique(lost)) == {0, 1}
    assert stats.binomtest(int(lost.sum()), adata.X.nnz, 0.15).pvalue > 1e-4
    assert abs(np.log(adata.obs["library"]).mean() - np.log(120)) < 5 * 0.4 / 3000**0.5


def test_regions_are_of_the_kinds_that_are_stated():
    adata = pyrosc.simulate.fragments(500, seed=0)
    rate = adata.varm["rho"].to_numpy() * 1000.0
    kind = adata.var["kind"].to_numpy()

    assert 0.05 < adata.X.nnz / np.prod(adata.shape) < 0.10
    assert (kind == "quantitative").sum() == 200
    assert rate[kind == "quantitative"].max() < 6.0 + 0.05
    assert rate[kind == "quantitative"].min() > 0.5
    np.testing.assert_allclose(rate[kind == "closed"], 0.01)
    open_in = (rate[kind != "quantitative"] > 0.02).mean(0)
    np.testing.assert_allclose(open_in, 0.08, atol=0.001)


def test_the_simulator_is_seeded_and_checks_its_arguments():
    small = dict(n_cells=20, n_regions=100, n_quantitative=5, depth=50.0)
    one, other, third = (pyrosc.simulate.fragments(**small, seed=s) for s in (1, 1, 2))
    assert (one.X != other.X).nnz == 0
    assert (one.X != third.X).nnz > 0
    for wrong, text in (
        (dict(accessible=0.0), "accessible is the share"),
        (dict(n_quantitative=100), "n_quantitative must be"),
        (dict(edge_losses=1.2), "edge_losses is a probability"),
        (dict(highest=0.1), "highest must be above"),
        (dict(depth=5.0), "raise depth"),
        (dict(n_cells=0), "n_cells must be"),
    ):
        with pytest.raises(ValueError, match=text):
            pyrosc.simulate.fragments(**(small | wrong))
