"""Outliers: cells that the story has no place for, by three p-values of different things.

    counts   Each count is kept with probability e; the state is read from those kept. How surprising are those that
             were dropped, -log p(x2 | x1, z), beside new ones drawn from their law? Nothing of a cell is used twice
             (a fit to full counts of these very cells has seen them, though: fit thinned ones). A story that
             is a little wrong is surprised by every cell, so the standardised surprise is judged by its own median and
             spread over cells (an empirical null: Efron 2004, JASA 99:96).
    state    How far is the state from the fifth nearest state of the cells of the fit, beside how far those are from
             each other? Doublets of two types lie between them.
    total    How large is the total beside those of the 50 cells of nearest state? Doublets have two cells' counts.

The last two are conformal: the rank of a cell among those of the fit (Vovk et al. 2005, Algorithmic Learning in a
Random World), uniform for a cell like them. The three are joined by Cauchy's combination (Liu and Xie 2020, JASA
115:393).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from .cells import Cells
from .check.compare import dropped, require_thinned_alike
from .errors import ProgramError
from .posterior import Fit

_NEAREST = 5
_ALIKE = 50


def outliers(fit: Fit, cells: Cells, fraction: float, fdr: float, n_draws: int, seed: int) -> pd.DataFrame:
    """See `Fit.outliers`; cells as measured."""
    kept, rest = cells.thin(fraction, seed=seed)
    if fit.settings.get("kept", 1.0) < 1:
        require_thinned_alike(fit, kept, seed)
    score, predictive = _surprise(fit, kept.to(fit.device, fit.program.dtype), rest, fraction, n_draws, seed)
    centre = np.median(score)
    scale = 1.4826 * np.median(np.abs(score - centre))
    table = pd.DataFrame(
        {"surprise": score, "p_predictive": predictive, "p_counts": stats.norm.sf((score - centre) / scale)},
        index=cells.names,
    )
    table["p_state"], table["p_total"] = _beside(fit, kept if fit.settings.get("kept", 1.0) < 1 else cells)
    table["p"] = combined(table[["p_counts", "p_state", "p_total"]].to_numpy())
    table["q"] = stats.false_discovery_control(table["p"])
    table["is_outlier"] = table["q"] <= fdr
    return table


def _surprise(
    fit: Fit, kept: Cells, rest: Cells, fraction: float, n_draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) surprise at the counts dropped, in sds of that at counts drawn; and the predictive p-value."""

    def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
        law = dropped(fit, trace, fraction).to_event(1)
        rows: Any = block._rows
        held: Any = rest.rows(rows.cpu(), whole=True).to(fit.device).x
        drawn = law.sample()
        both = torch.stack([-law.log_prob(held), -law.log_prob(drawn)], -1)
        return both.reshape(-1, len(block), 2)

    seen, drawn = [], []
    for (both,) in fit._runs(kept, [[kept]], n_draws, seed, ask):
        found = both.double().cpu().numpy()
        seen.append(found[..., 0])
        drawn.append(found[..., 1])
    one, new = np.concatenate(seen, 1), np.concatenate(drawn, 1)
    spread = np.maximum((new - new.mean(0)).std(0, ddof=1), 1e-12)
    return (one - new).mean(0) / spread, (1 + (new >= one).sum(0)) / (len(new) + 1)


def _beside(fit: Fit, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """(N,) p-values of states and of totals, beside the cells of the fit."""
    marks = fit.landmarks
    if marks is None:
        raise ProgramError(
            f"{fit.program.story} has no state of each cell, or this fit was saved without the states of some: "
            "outliers are judged beside those; fit again"
        )
    apart, excess = marks.apart(fit._centres(cells), _NEAREST, _ALIKE, cells.library.cpu().double().log().ravel())
    of_marks = marks.apart(marks.loc, _NEAREST, _ALIKE, marks.log_total, themselves=True)
    return conformal(apart.numpy(), of_marks[0].numpy()), conformal(excess.numpy(), of_marks[1].numpy())


def conformal(score: np.ndarray, among: np.ndarray) -> np.ndarray:
    """(N,) share of scores (M,), the cell's own among them, that are at least as large."""
    order = np.sort(among)
    return (1 + len(order) - np.searchsorted(order, score, side="left")) / (len(order) + 1)


def combined(p: np.ndarray) -> np.ndarray:
    """(N,) one p-value of several (N, K), by the mean of their Cauchy quantiles."""
    cauchy = np.tan((0.5 - np.clip(p, 1e-15, 1 - 1e-3)) * np.pi).mean(1)
    return np.clip(stats.cauchy.sf(cauchy), 0.0, 1.0)
