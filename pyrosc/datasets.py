"""Real data that needs no download."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
from scipy import sparse


def pbmc() -> anndata.AnnData:
    """700 human blood cells x 765 genes with raw counts and ten cell types; ships inside scanpy.

    A subset of the 68,000 PBMC of Zheng et al. 2017 (Nature Communications 8:14049) that scanpy
    uses for its tests. Raw counts are had exactly from its normalised values: each is a
    whole number to within 0.1 before rounding, which is checked.

    Returns
    -------
    AnnData
        ``X`` CSR counts; ``obs["cell_type"]`` and ``obs["n_counts"]`` (total over all genes of the
        original, not just these 765).

    Raises
    ------
    ImportError
        If scanpy is not installed (the extra ``pyrosc[demo]``).

    Notes
    -----
    The genes were chosen for variability, and 33 % of the counts are not zero: more than in a
    whole transcriptome.
    """
    try:
        import scanpy
    except ImportError as error:
        raise ImportError('pyrosc.datasets.pbmc() needs scanpy: pip install "pyrosc[demo]"') from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = scanpy.datasets.pbmc68k_reduced()
    logged = held.raw.X.toarray().astype(np.float64)
    depth = held.obs["n_counts"].to_numpy(dtype=np.float64)
    exact = np.expm1(logged) * depth[:, None] / 1e4
    counts = np.rint(exact)
    if np.abs(exact - counts).max() > 0.1:
        raise ValueError("scanpy's pbmc68k_reduced no longer gives whole counts; please report this")
    obs = held.obs[["n_counts"]].copy()
    obs["cell_type"] = held.obs["bulk_labels"].astype(str).astype("category")
    return anndata.AnnData(X=sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=held.raw.var[[]].copy())
