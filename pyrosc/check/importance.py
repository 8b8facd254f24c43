"""Importance sampling: the likelihood of each cell, and whether its guide is good enough to say so.

With draws z_s from the guide and weights w_s = p(x, z_s) / q(z_s | x), the mean weight
estimates p(x); `psis` says whether it can be trusted.
"""

from __future__ import annotations

import math

import anndata
import numpy as np
import pandas as pd

from ..cells import Cells
from ..posterior import Fit
from ..psis import pareto_k


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
