"""How far the guide is from the posterior, cell by cell, on the data at hand.

Weights w_s = p(x, v_s) / q(v_s | x) of draws of the guide are even where it is the posterior. The shape k of their
upper tail, and the number of draws that they are worth, tell how far it is (Vehtari et al. 2024, JMLR 25:72; Yao et
al. 2018, ICML, "Yes, but did it work?"). Where k is above min(1 - 1 / log10 S, 0.7), S draws cannot mend the guide.
The sd of an estimated k is near 0.13 at S = 1,000 and 0.06 at 5,000.
"""

from __future__ import annotations

import math
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..cells import Cells
from ..draws import by_block, draw_guide, follow, log_weight
from ..errors import ProgramError
from ..parts import whole
from ..posterior import Fit, require_fit
from ..psis import k_threshold, pareto_k
from ..schema import column_of

_DRAWS = 5000
_EVEN = 0.9


def importance(
    fit: Fit, cells: Cells | anndata.AnnData, n_draws: int = _DRAWS, *, by: str | None = None, seed: int = 0
) -> pd.DataFrame:
    """Log-likelihood of each cell by importance sampling from the guide, and how far to trust it and the guide.

    Parameters
    ----------
    n_draws : S, at least 100
    by : column of ``obs`` for the summary in ``.attrs``

    Returns
    -------
    DataFrame
        By cell: ``log_likelihood`` in nats; ``k_hat``; ``ess``, the effective number of draws (sum w)^2 / sum w^2; and
        ``is_usable``, whether k_hat is at most the threshold or the draws are worth nine tenths of their number, which
        leaves nothing to mend (k is the shape of the tail and not its size: weights within a few per cent of each other
        may have any). ``.attrs``: "threshold", "n_draws", "usable", the share
        of cells that are, with ``by`` also "usable_by", the share for each level. Random through ``seed``.

    Raises
    ------
    ValueError
        If there are fewer than 100 draws, or no such column.

    Notes
    -----
    Time and memory of S decodings of each cell: 5,000 draws of 500 cells and 2,000 genes are 5 x 10^9 densities.
    """
    require_fit(fit)
    n_draws = whole("n_draws", n_draws, 100)
    levels = None if by is None else np.asarray(column_of(cells.obs, by, "by").astype(str))
    parts = []
    for weights in fit.log_weights(cells, n_draws, seed=seed):
        total = weights.logsumexp(0)
        ess = (2 * total - (2 * weights).logsumexp(0)).exp()
        parts.append(np.stack([(total - math.log(n_draws)).numpy(), pareto_k(weights).numpy(), ess.numpy()], -1))
    index = cells.names if isinstance(cells, Cells) else cells.obs_names
    table = pd.DataFrame(np.concatenate(parts), index=index, columns=["log_likelihood", "k_hat", "ess"])
    threshold = k_threshold(n_draws)
    table["is_usable"] = (table["k_hat"] <= threshold) | (table["ess"] >= _EVEN * n_draws)
    table.attrs = {"threshold": threshold, "n_draws": n_draws, "usable": float(table["is_usable"].mean())}
    if levels is not None:
        table.attrs["usable_by"] = {str(k): float(v) for k, v in table["is_usable"].groupby(levels).mean().items()}
    return table


def importance_by_gene(fit: Fit, cells: Cells | anndata.AnnData, n_draws: int = 1000, *, seed: int = 0) -> pd.DataFrame:
    """Which genes make the weights of draws uneven: where the guide and the counts disagree.

    The variance of log w over draws is the sum of its covariances with the log density of each gene's count, and with
    what is left (log prior less log guide). A gene's share is its covariance over the variance, averaged over cells.

    Parameters
    ----------
    cells : those of interest, such as the ones that `importance` finds not usable
    n_draws : S, at least 20

    Returns
    -------
    DataFrame
        By gene, largest first: ``share`` of the variance of log w, mean over cells (shares of genes and
        ``.attrs["rest"]``, the share of prior and guide, sum to 1; one may be negative), and ``share_top``, the share
        of cells in which it is among the ten largest. ``.attrs["sd"]`` is the mean sd of log w in nats: 0.1 is even,
        above 1 draws are worth a third of their number or less. Random through ``seed``.

    Raises
    ------
    ProgramError
        If the story has no counts ``x``, or sums out a site that they depend on.
    """
    require_fit(fit)
    n_draws = whole("n_draws", n_draws, 20)
    ready, program = fit._ready(cells), fit.program
    if program.enumerated or program.has_globals:
        why = "sums out a discrete site" if program.enumerated else "has global sites"
        raise ProgramError(f"{program.story} {why}: the weights of a cell are not those of its own draws alone")

    def ask(block: Cells) -> tuple[Tensor, Tensor]:
        guide = draw_guide(program, block, n_draws)
        weights = log_weight(program, guide, block, n_draws).double()
        nodes: dict[str, Any] = follow(program, guide, block, n_draws).nodes
        if "x" not in nodes:
            raise ProgramError(f'{program.story} has no site "x" of counts')
        site = nodes["x"]
        each = getattr(site["fn"], "base_dist", site["fn"]).log_prob(site["value"]).double()
        centred = weights - weights.mean(0)
        variance = centred.square().mean(0)
        shares = torch.einsum("sn,sng->ng", centred, each) / n_draws / variance.clamp(min=1e-300).unsqueeze(-1)
        return shares.cpu(), variance.sqrt().cpu()

    found = list(by_block(program, [ready], 2 * n_draws, seed, ask))
    shares, sd = (torch.cat([f[i] for f in found]).numpy() for i in (0, 1))
    top = np.argsort(-shares, axis=1)[:, :10]
    table = pd.DataFrame(
        {
            "share": shares.mean(0),
            "share_top": np.bincount(top.ravel(), minlength=shares.shape[1]) / len(shares),
        },
        index=pd.Index(fit.schema.genes, name="gene"),
    ).sort_values("share", ascending=False, kind="stable")
    table.attrs = {"rest": float(1 - shares.sum(1).mean()), "sd": float(sd.mean()), "n_draws": n_draws}
    return table
