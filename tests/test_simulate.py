"""The simulated tissue: what it says of itself is so."""

import numpy as np
import pytest

import pyrosc


def test_counts_follow_the_stated_shares_totals_and_dispersions():
    adata = pyrosc.simulate.tissue(4000, 50, n_types=2, n_batches=1, depth=500, n_markers=10, seed=2)
    x, rho = adata.X.toarray(), adata.layers["rho"].astype(float)
    mean = adata.obs["library"].to_numpy()[:, None] * rho
    variance = mean + mean**2 / adata.var["dispersion"].to_numpy()
    scaled = (x - mean) / np.sqrt(variance)

    np.testing.assert_allclose(rho.sum(1), 1, rtol=1e-4)
    # by gene, over 4,000 cells: means within five standard errors, variances within what heavy tails allow
    assert np.abs(scaled.mean(0)).max() < 5 / 4000**0.5
    assert abs((scaled**2).mean() - 1) < 0.1
    assert abs(np.log(adata.obs["library"]).mean() - np.log(500)) < 5 * 0.35 / 4000**0.5


def test_types_batches_and_the_missing_type_are_there():
    adata = pyrosc.simulate.tissue(500, 80, n_types=4, n_batches=3, seed=0)
    table = adata.obs.groupby(["batch", "cell_type"], observed=False).size()

    assert table[("batch2", "type3")] == 0
    assert (table.drop(("batch2", "type3")) > 0).all()


def test_it_is_seeded_and_checks_its_arguments():
    one, other, third = (pyrosc.simulate.tissue(50, 60, seed=s) for s in (1, 1, 2))

    assert (one.X != other.X).nnz == 0
    assert (one.X != third.X).nnz > 0
    with pytest.raises(ValueError, match="n_markers must be between"):
        pyrosc.simulate.tissue(50, 20)
