"""Small data that most tests share."""

import anndata
import numpy as np
import pandas as pd
import pyro
import pyro.infer
import pytest
import torch
from scipy import sparse

import pyrosc


@pytest.fixture(autouse=True)
def nothing_outside_changes():
    """Every test leaves Pyro's store and its and torch's validation as they were (no call of ours may change them)."""
    torch.manual_seed(0)

    def world():
        checks = torch.distributions.Distribution._validate_args, pyro.distributions.is_validation_enabled()
        return (*checks, pyro.infer.is_validation_enabled(), list(pyro.get_param_store().keys()))

    before = world()
    yield
    assert world() == before
    pyro.clear_param_store()


def small(n_cells=120, n_genes=30, seed=0, **columns):
    """An AnnData of Poisson counts with two donors, two conditions and three cell types."""
    draw = np.random.default_rng(seed)
    counts = draw.poisson(draw.gamma(2.0, 1.0, n_genes), (n_cells, n_genes))
    obs = pd.DataFrame(
        {
            "donor": draw.choice(["d1", "d2"], n_cells),
            "condition": draw.choice(["ctrl", "stim"], n_cells),
            "cell_type": draw.choice(["B", "NK", "T"], n_cells),
            "age": draw.normal(40, 10, n_cells),
        }
        | columns,
        index=[f"c{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"g{j}" for j in range(n_genes)])
    return anndata.AnnData(X=sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


@pytest.fixture
def adata():
    return small()


@pytest.fixture(scope="session")
def tissue():
    """A simulated tissue with a known truth, small enough to fit in seconds."""
    return pyrosc.simulate.tissue(600, 60, n_types=4, n_batches=2, depth=600, n_markers=20, effect=1.0, seed=1)


@pytest.fixture(scope="session")
def fitted(tissue):
    """(AnnData, Cells, Fit) of that tissue. Read only."""
    cells = pyrosc.Cells.from_anndata(tissue, batch="batch", label="cell_type")
    program = pyrosc.scvi(cells, n_latent=4, n_hidden=32)
    return tissue, cells, pyrosc.fit(program, cells, epochs=12, progress=False, patience=None)


def pytest_collection_modifyitems(items):
    """Pages take longest, so they start first: at the end one process would wait for the other."""
    items.sort(key=lambda item: "test_pages" not in item.nodeid)
