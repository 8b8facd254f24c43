"""Labels: whether the probabilities of types mean what they say.

Of cells to which a probability of 0.8 was given, four in five should be of that type.

    ECE    sum over bins of share of cells * |accuracy - mean probability|, of the most probable type
    Brier  mean over cells of sum_c (p_c - [c is the type])^2, 0 to 2
    NLL    mean of -log p of the type, nats

An ECE is above zero by chance alone; what it would be were every probability right is simulated beside it.
"""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
from scipy import stats

from ..annotation import truths, types_of
from ..cells import Cells
from ..posterior import Fit, require_fit

_LEAST = 1e-6  # probability, for the logarithm
_SIMULATED = 200


def labels(
    fit: Fit,
    cells: Cells | anndata.AnnData,
    *,
    accuracy: float = 0.95,
    by: str = "story",
    n_bins: int = 10,
    n_draws: int = 25,
    seed: int = 0,
) -> pd.DataFrame:
    """Reliability of `Fit.label_probabilities`, on cells whose labels were not used in training.

    Parameters
    ----------
    cells : with known labels; cells without are left out
    accuracy : wanted of the cells that are named, for the threshold
    by : "story" or "neighbors", as in `Fit.label_probabilities`
    n_bins : of the probability of the most probable type, from 1 / C to 1, of equal width
    n_draws, seed : of the probabilities

    Returns
    -------
    DataFrame
        One row a bin with cells: "from" and "to", "n", mean "probability", "accuracy" with its 95 % interval "lower"
        and "upper" (Clopper and Pearson). ``.attrs``: "n", "accuracy", "balanced_accuracy", "brier", "nll", "ece",
        "ece_if_calibrated" (mean of simulated ones), "threshold", the least at which cells at or above it are right
        as often as wanted (nan if never: name none), and "named", their share.

    Raises
    ------
    ValueError
        If no cell has a label, or a number is out of range.
    ProgramError
        If the story tells no types.
    """
    require_fit(fit)
    if isinstance(n_bins, bool) or not hasattr(n_bins, "__index__") or n_bins < 1:
        raise ValueError(f"n_bins must be a whole number of at least 1, not {n_bins!r}")
    if not 0 < accuracy < 1:
        raise ValueError(f"accuracy must be between 0 and 1, not {accuracy!r}")
    types_of(fit)
    own = fit._ready(cells)
    truth = truths(fit, own)
    known = np.flatnonzero(truth >= 0)
    if not len(known):
        raise ValueError("no cell has a label of the fit's, so there is nothing to compare probabilities with")
    share = fit.label_probabilities(own[known], by=by, n_draws=n_draws, seed=seed).to_numpy(dtype=np.float64)
    return reliability(share, truth[known], accuracy, n_bins, seed)


def reliability(share: np.ndarray, truth: np.ndarray, accuracy: float, n_bins: int, seed: int) -> pd.DataFrame:
    """The table of `labels` from probabilities (N, C) and types (N,)."""
    n, n_types = share.shape
    best, surest = share.argmax(1), share.max(1)
    right = best == truth
    edges = np.linspace(1 / n_types, 1, n_bins + 1)
    at = np.clip(np.searchsorted(edges, surest, side="right") - 1, 0, n_bins - 1)
    rows = []
    for b in np.unique(at):
        here = at == b
        k, m = int(right[here].sum()), int(here.sum())
        low, high = stats.binomtest(k, m).proportion_ci(0.95, "exact")
        rows.append((edges[b], edges[b + 1], m, surest[here].mean(), k / m, low, high))
    table = pd.DataFrame(rows, columns=["from", "to", "n", "probability", "accuracy", "lower", "upper"])
    draw = np.random.default_rng(seed)
    chance = [_ece(surest, draw.uniform(size=n) < surest, at, n_bins) for _ in range(_SIMULATED)]
    order = np.argsort(-surest, kind="stable")
    so_far = np.cumsum(right[order]) / np.arange(1, n + 1)
    is_cut = np.append(np.diff(surest[order]) < 0, True)  # cells of one probability are named together
    good = np.flatnonzero((so_far >= accuracy) & is_cut)
    table.attrs |= {
        "n": n, "accuracy": float(right.mean()),
        "balanced_accuracy": float(np.mean([right[truth == c].mean() for c in np.unique(truth)])),
        "brier": float(((share - np.eye(n_types)[truth]) ** 2).sum(1).mean()),
        "nll": float(-np.log(np.maximum(share[np.arange(n), truth], _LEAST)).mean()),
        "ece": _ece(surest, right, at, n_bins), "ece_if_calibrated": float(np.mean(chance)),
        "threshold": float(surest[order][good[-1]]) if len(good) else float("nan"),
        "named": (good[-1] + 1) / n if len(good) else 0.0,
    }  # fmt: skip
    return table


def _ece(surest: np.ndarray, right: np.ndarray, at: np.ndarray, n_bins: int) -> float:
    gap = np.bincount(at, right - surest, minlength=n_bins)
    return float(np.abs(gap).sum() / len(surest))
