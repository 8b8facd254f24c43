"""Importance sampling: the likelihood of each cell, and whether its guide is good enough to say so.

With draws z_s from the guide and weights w_s = p(x, z_s) / q(z_s | x), the mean weight
estimates p(x). A generalised Pareto distribution fitted to the largest weights tells
whether it can be trusted: shape k below 0.5 is good, below 0.7 usable, above it the
weights have no variance worth the name. (Vehtari et al. 2024, Pareto smoothed importance
sampling, JMLR 25:72.)
"""

from __future__ import annotations

import math

import anndata
import numpy as np
import pandas as pd
import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from ..cells import Cells
from ..posterior import Fit


def pareto_k(log_weights: Tensor) -> Tensor:
    """(n,) Pareto shape of the upper tail of weights (S, n), S at least 100.

    The largest min(S / 5, 3 sqrt(S)) weights of each column are used. Pyro's estimate pulls towards
    0.5 as ten more tail weights there would, as Vehtari et al. advise.

    Raises
    ------
    ValueError
        If there are fewer than 100 draws.
    """
    n_draws = log_weights.shape[0]
    if n_draws < 100:
        raise ValueError(f"a tail needs at least 100 draws, not {n_draws}")
    n_tail = int(min(n_draws / 5, 3 * math.sqrt(n_draws)))
    scaled = (log_weights.double() - log_weights.double().max(0).values).exp()
    largest = scaled.sort(0).values[-n_tail - 1 :]
    found = []
    for column in largest.unbind(-1):
        k, _ = fit_generalized_pareto(column[1:] - column[0])
        found.append(float(k))
    return torch.tensor(found, dtype=torch.float64)


def importance(fit: Fit, cells: Cells | anndata.AnnData, n_draws: int = 1000, *, seed: int = 0) -> pd.DataFrame:
    """Log-likelihood of each cell by importance sampling from the guide, and how far to trust it.

    Parameters
    ----------
    n_draws : S, at least 100

    Returns
    -------
    DataFrame
        (N, 3) by cell: ``log_likelihood`` in nats, ``k_hat``, and ``ess``, the effective number of draws
        (sum w)^2 / sum w^2. Random through ``seed``.
    """
    parts = []
    for weights in fit.log_weights(cells, n_draws, seed=seed):
        total = weights.logsumexp(0)
        ess = (2 * total - (2 * weights).logsumexp(0)).exp()
        parts.append(np.stack([(total - math.log(n_draws)).numpy(), pareto_k(weights).numpy(), ess.numpy()], -1))
    index = cells.names if isinstance(cells, Cells) else cells.obs_names
    return pd.DataFrame(np.concatenate(parts), index=index, columns=["log_likelihood", "k_hat", "ess"])
