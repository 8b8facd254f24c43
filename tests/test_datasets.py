"""The embedded data."""

import builtins

import numpy as np
import pytest

import pyrosc


def test_pbmc_are_whole_counts_with_cell_types():
    adata = pyrosc.datasets.pbmc()

    assert adata.shape == (700, 765)
    assert (adata.X.data == np.rint(adata.X.data)).all()
    assert adata.X.data.min() > 0
    assert adata.obs["cell_type"].nunique() == 10
    # the genes are a part of the transcriptome whose total is n_counts
    assert (adata.X.sum(1).A1 <= adata.obs["n_counts"] + 0.5).all()
    assert list(adata.uns) == []


def test_without_scanpy_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "scanpy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "pyrosc\[demo\]"'):
        pyrosc.datasets.pbmc()
