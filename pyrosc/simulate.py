"""Simulated tissues: counts with a known truth, to test stories against. Numpy only, seeded."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse


def tissue(
    n_cells: int = 4000,
    n_genes: int = 1000,
    n_types: int = 8,
    n_batches: int = 3,
    *,
    depth: float = 2500.0,
    n_markers: int = 60,
    effect: float = 0.7,
    dispersion: float = 2.0,
    seed: int = 0,
) -> anndata.AnnData:
    """A tissue of related cell types measured in batches, with negative binomial counts.

    Types are the leaves of a binary tree: each branch shifts the log rates of ``n_markers``
    genes by Normal(0, ``effect``). Within types one continuous factor moves 40 genes (at most 4 %) by Normal(0, 0.3) a
    unit. Batches shift every gene by Normal(0, 0.3), and by Normal(0, 0.1) more in each
    type; the last type is missing from the last batch if there are two or more batches.
    Base log rates are Normal(-1, 1.2), shares their softmax; totals are LogNormal around
    ``depth`` with sd 0.35, batches differing by 0, 0.3, -0.4, ...; inverse dispersions are
    LogNormal(log ``dispersion``, 1).

    Returns
    -------
    AnnData
        ``X`` CSR counts (N, G); ``obs``: "batch", "cell_type", "factor" (the continuous one) and
        "library" (expected total); ``layers["rho"]`` (N, G) true shares; ``var["dispersion"]``.
    """
    draw = np.random.default_rng(seed)
    if not 1 <= n_markers <= n_genes:
        raise ValueError(f"n_markers must be between 1 and n_genes={n_genes}, not {n_markers}")
    if not dispersion > 0:
        raise ValueError(f"dispersion must be positive, not {dispersion!r}")
    of_factor = min(40, max(2, n_genes // 25))
    levels = max(1, int(np.ceil(np.log2(max(n_types, 2)))))
    of_type = np.zeros((n_types, n_genes))
    for level in range(levels):
        for branch in range(2 ** (level + 1)):
            inside = [t for t in range(n_types) if t >> (levels - 1 - level) == branch]
            genes = draw.choice(n_genes, n_markers, replace=False)
            shift = draw.normal(0, effect, n_markers)
            for t in inside:
                of_type[t, genes] += shift
    loading = np.zeros(n_genes)
    loading[draw.choice(n_genes, of_factor, replace=False)] = draw.normal(0, 0.3, of_factor)
    base = draw.normal(-1, 1.2, n_genes)
    shift = draw.normal(0, 0.3, (n_batches, n_genes)) if n_batches > 1 else np.zeros((1, n_genes))
    cross = draw.normal(0, 0.1, (n_batches, n_types, n_genes)) if n_batches > 1 else np.zeros((1, n_types, n_genes))
    inverse = draw.lognormal(np.log(dispersion), 1, n_genes)

    batch = draw.integers(n_batches, size=n_cells)
    kind = draw.integers(n_types, size=n_cells)
    if n_batches > 1 and n_types > 1:
        absent = (batch == n_batches - 1) & (kind == n_types - 1)
        kind[absent] = draw.integers(n_types - 1, size=absent.sum())
    factor = draw.normal(size=n_cells)
    logits = base + of_type[kind] + factor[:, None] * loading + shift[batch] + cross[batch, kind]
    rho = np.exp(logits - logits.max(1, keepdims=True))
    rho /= rho.sum(1, keepdims=True)
    offset = np.resize([0.0, 0.3, -0.4], n_batches)
    library = draw.lognormal(np.log(depth) + offset[batch], 0.35)
    counts = draw.poisson(draw.gamma(inverse, library[:, None] * rho / inverse))

    obs: dict[str, Any] = {
        "batch": pd.Categorical([f"batch{b}" for b in batch]),
        "cell_type": pd.Categorical([f"type{t}" for t in kind]),
        "factor": factor,
        "library": library,
    }
    return anndata.AnnData(
        X=sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(obs, index=[f"cell{i}" for i in range(n_cells)]),
        var=pd.DataFrame({"dispersion": inverse}, index=[f"gene{j}" for j in range(n_genes)]),
        layers={"rho": rho.astype(np.float32)},
    )
