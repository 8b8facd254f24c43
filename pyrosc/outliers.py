"""Outliers: cells that the story has no place for, by four p-values of different things.

    counts   Each count is kept with probability e; the state is read from those kept. How surprising are those that
             were dropped, -log p(x2 | x1, z), beside new ones drawn from their law? Nothing of a cell is used twice
             (a fit to full counts of these very cells has seen them, though: fit thinned ones). A story that
             is a little wrong is surprised by every cell, so the standardised surprise is judged by its own median and
             spread over cells (an empirical null: Efron 2004, JASA 99:96).
    genes    How many more genes are seen among those dropped counts than the state explains, in sds of the law? Cells
             that are mixed with others show genes of both. Judged beside the other cells likewise.
    state    How far is the state from the fifth nearest state of the cells of the fit, beside how far those are from
             each other? Doublets of two types lie between them.
    total    How large is the total beside those of the 50 cells of nearest state, once totals of batches are brought
             to one level? Doublets have two cells' counts.

The last two are conformal: the rank of a cell among those of the fit (Vovk et al. 2005, Algorithmic Learning in a
Random World), uniform for a cell like them. The first two are of the same counts and go together: Cauchy's combination
joins them whatever they share (Liu and Xie 2020, JASA 115:393). That and the last two are joined by Fisher's sum of
logs, its null that of sums of dependent p-values (Brown 1975, Biometrics 31:987) with the covariance that the last two
have among the cells of the fit; dropped counts tell nothing else of sound cells under the story. So cells that are a
little odd in each are found, and ranks do not bound p from below.

The null of the first two is Student's t with 5 degrees of freedom, not the normal: among held-out singlets of Kang's
cells the excess kurtosis of surprise is 2 to 4, as genes with rare large counts have heavier tails than their laws.
"""

from __future__ import annotations

from dataclasses import replace
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
from .overlap import Landmarks
from .posterior import Fit

_NEAREST = 5
_ALIKE = 50
_TAIL = 5  # degrees of freedom of the null of surprise
_LEAST_OF_BATCH = 20  # landmarks, for a level of its own
_ROUNDS = 4  # of bringing totals of batches to one level


def outliers(fit: Fit, cells: Cells, fraction: float, fdr: float, n_draws: int, seed: int) -> pd.DataFrame:
    """See `Fit.outliers`; cells as measured."""
    return judged(scored(fit, cells, fraction, n_draws, seed), fdr)


def scored(fit: Fit, cells: Cells, fraction: float, n_draws: int, seed: int) -> pd.DataFrame:
    """What is said of each cell by itself: "surprise", "extra_genes", "p_predictive", "p_state", "p_total".

    ``.attrs["shared"]`` is the covariance of -2 log p_state and -2 log p_total among the cells of the fit.
    """
    kept, rest = cells.thin(fraction, seed=seed)
    is_thinned = fit.settings.get("kept", 1.0) < 1
    if is_thinned:
        require_thinned_alike(fit, kept, seed)
    score, genes, predictive = _surprise(fit, kept.to(fit.device, fit.program.dtype), rest, fraction, n_draws, seed)
    state, total, shared = _beside(fit, kept if is_thinned else cells)
    table = pd.DataFrame(
        {"surprise": score, "extra_genes": genes, "p_predictive": predictive, "p_state": state, "p_total": total},
        index=cells.names,
    )
    table.attrs["shared"] = shared
    return table


def judged(scores: pd.DataFrame, fdr: float) -> pd.DataFrame:
    """What is said of cells beside each other, most of them sound."""
    table = scores[["surprise", "extra_genes", "p_predictive"]].copy()
    for name, score in (("p_counts", "surprise"), ("p_genes", "extra_genes")):
        table[name] = beside_others(scores[score].to_numpy())
    table[["p_state", "p_total"]] = scores[["p_state", "p_total"]]
    of_counts = either(table[["p_counts", "p_genes"]].to_numpy())
    of_three = np.column_stack([of_counts, table["p_state"], table["p_total"]])
    table["p"] = combined(of_three, scores.attrs["shared"])
    table["q"] = stats.false_discovery_control(table["p"])
    table["is_outlier"] = table["q"] <= fdr
    table.attrs = {}
    return table


def beside_others(score: np.ndarray) -> np.ndarray:
    """(N,) p-values of large scores, under a t law of the median and the spread that the scores have."""
    centre = np.median(score)
    spread = float(np.median(np.abs(score - centre)))
    return stats.t.sf((score - centre) / max(spread / float(stats.t.ppf(0.75, _TAIL)), 1e-12), _TAIL)


def _surprise(
    fit: Fit, kept: Cells, rest: Cells, fraction: float, n_draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N,) surprise at the counts dropped, in sds of that at counts drawn; genes seen beyond those expected, in sds of
    their number; and the predictive p-value."""

    def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
        single = dropped(fit, trace, fraction)
        law = single.to_event(1)
        rows: Any = block._rows
        held: Any = rest.rows(rows.cpu(), whole=True).to(fit.device).x
        drawn = law.sample()
        none = single.log_prob(torch.zeros_like(held)).exp()
        genes = ((held > 0).sum(-1) - (1 - none).sum(-1)) / (none * (1 - none)).sum(-1).sqrt().clamp(min=1e-6)
        found = torch.stack([-law.log_prob(held), -law.log_prob(drawn), genes], -1)
        return found.reshape(-1, len(block), 3)

    seen, drawn, genes = [], [], []
    for (both,) in fit._runs(kept, [[kept]], n_draws, seed, ask):
        found = both.double().cpu().numpy()
        seen.append(found[..., 0])
        drawn.append(found[..., 1])
        genes.append(found[..., 2].mean(0))
    one, new = np.concatenate(seen, 1), np.concatenate(drawn, 1)
    spread = np.maximum((new - new.mean(0)).std(0, ddof=1), 1e-12)
    return (one - new).mean(0) / spread, np.concatenate(genes), (1 + (new >= one).sum(0)) / (len(new) + 1)


def _beside(fit: Fit, cells: Cells) -> tuple[np.ndarray, np.ndarray, float]:
    """(N,) p-values of states and of totals, beside the cells of the fit; and what the two share among those."""
    marks = fit.landmarks
    if marks is None:
        raise ProgramError(
            f"{fit.program.story} has no state of each cell, or this fit was saved without the states of some: "
            "outliers are judged beside those; fit again"
        )
    log_total = cells.library.cpu().double().log().ravel()
    column = None if fit.schema.batch is None else fit.schema.batch.column
    if column is not None and column in marks.columns:
        marks, level = levelled(marks, column)
        log_total = log_total - _at(level, cells.codes[column].cpu().long())
    apart, excess = marks.apart(fit._centres(cells), _NEAREST, _ALIKE, log_total)
    of_marks = [v.numpy() for v in marks.apart(marks.loc, _NEAREST, _ALIKE, marks.log_total, themselves=True)]
    own = [-2 * np.log(conformal(v, v)) for v in of_marks]
    state, total = (conformal(v.numpy(), among) for v, among in zip((apart, excess), of_marks))
    return state, total, float(np.cov(*own)[0, 1])


def levelled(marks: Landmarks, column: str) -> tuple[Landmarks, Tensor]:
    """Landmarks with log totals less the level of their batch, and the levels, by code.

    Of cells of like state, by backfitting; so that batches that hold other types are not taken for deep ones.
    """
    code = marks.columns[column].long()
    known = code >= 0
    level = torch.zeros(int(code.max()) + 1, dtype=torch.float64)
    count = torch.bincount(code[known], minlength=len(level))
    adjusted = marks
    for _ in range(_ROUNDS):
        _, excess = adjusted.apart(marks.loc, _NEAREST, _ALIKE, adjusted.log_total, themselves=True)
        mean = torch.bincount(code[known], excess[known], minlength=len(level)) / count.clamp(min=1)
        level = level + torch.where(count >= _LEAST_OF_BATCH, mean, 0.0)
        level = level - level[code[known]].mean()
        adjusted = replace(marks, log_total=marks.log_total - _at(level, code))
    return adjusted, level


def _at(level: Tensor, code: Tensor) -> Tensor:
    """Levels of batches by code; 0, their mean, of those that are unknown or that the cells of the fit had none of."""
    known = (code >= 0) & (code < len(level))
    return torch.where(known, level[code.where(known, 0)], 0.0)


def conformal(score: np.ndarray, among: np.ndarray) -> np.ndarray:
    """(N,) share of scores (M,), the cell's own among them, that are at least as large."""
    order = np.sort(among)
    return (1 + len(order) - np.searchsorted(order, score, side="left")) / (len(order) + 1)


def either(p: np.ndarray) -> np.ndarray:
    """(N,) one p-value of several (N, K) that may depend on each other, by the mean of their Cauchy quantiles."""
    cauchy = np.tan((0.5 - np.clip(p, 1e-15, 1 - 1e-3)) * np.pi).mean(1)
    return np.clip(stats.cauchy.sf(cauchy), 0.0, 1.0)


def combined(p: np.ndarray, shared: float = 0.0) -> np.ndarray:
    """(N,) one p-value of several (N, K): Fisher's -2 sum log p, against a scaled chi-squared.

    ``shared`` is the sum over pairs of the covariances of their -2 log p; negative ones count as none.
    """
    n = p.shape[1]
    variance = 4 * n + 2 * max(shared, 0.0)  # of a sum whose mean is 2 K
    scale = variance / (4 * n)
    total = -2 * np.log(np.clip(p, 1e-300, 1.0)).sum(1)
    return stats.chi2.sf(total / scale, 2 * n / scale)
