"""Pareto smoothed importance sampling: how far weights can be trusted, and weights that can be trusted further.

Weights w_s = p(x, z_s) / q(z_s | x) carry draws of a guide to the posterior. A generalised Pareto distribution fitted
to the largest of them tells whether that works: shape k below 0.5 is good, below 0.7 usable, above it the weights have
no variance worth the name. Replaced by quantiles of that distribution, the largest weights vary less.

Reference: Vehtari et al. 2024, Pareto smoothed importance sampling, JMLR 25:72.
"""

from __future__ import annotations

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor


def tail_size(n_draws: int) -> int:
    """Weights that count as the tail: min(S / 5, 3 sqrt(S)).

    Raises
    ------
    ValueError
        If there are fewer than 100 draws.
    """
    if n_draws < 100:
        raise ValueError(f"a tail needs at least 100 draws, not {n_draws}")
    return int(min(n_draws / 5, 3 * math.sqrt(n_draws)))


def k_threshold(n_draws: int) -> float:
    """Largest shape at which so many draws can be relied on: min(1 - 1 / log10 S, 0.7)."""
    return min(1 - 1 / math.log10(n_draws), 0.7)


def pareto_k(log_weights: Tensor) -> Tensor:
    """(n,) Pareto shape of the upper tail of weights (S, n), S at least 100.

    The largest min(S / 5, 3 sqrt(S)) weights of each column are used. Pyro's estimate pulls towards
    0.5 as ten more tail weights there would, as Vehtari et al. advise.

    Raises
    ------
    ValueError
        If there are fewer than 100 draws.
    """
    return smoothed(log_weights)[1]


def smoothed(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log weights (S, n) with their tails smoothed, up to a constant a column, in float64; and shapes (n,).

    The M largest of a column become the quantiles (j - 1/2) / M of the fitted tail, in their order, and none is
    larger than the largest was.

    Raises
    ------
    ValueError
        If there are fewer than 100 draws.
    """
    n_tail = tail_size(log_weights.shape[0])
    log = log_weights.double() - log_weights.double().max(0).values
    order = log.argsort(0)
    largest = log.gather(0, order[-n_tail - 1 :]).exp()
    shapes = []
    at = (torch.arange(n_tail, dtype=torch.float64) + 0.5) / n_tail
    for i, column in enumerate(largest.unbind(-1)):
        excess = column[1:] - column[0]
        if float(excess[-1]) <= 1e-10:  # all of one weight, up to rounding: none is too large
            shapes.append(-math.inf)
            continue
        k, scale = fit_generalized_pareto(excess)
        shapes.append(float(k))
        if math.isfinite(k) and math.isfinite(scale):
            quantile = scale * (torch.expm1(-k * torch.log1p(-at)) / k if abs(k) > 1e-12 else -torch.log1p(-at))
            log[order[-n_tail:, i], i] = (column[0] + quantile).clamp(max=1.0).log()
    return log, torch.tensor(shapes, dtype=torch.float64)
