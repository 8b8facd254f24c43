"""Overlap: were cells like these seen under the columns that a counterfactual sets?

A Fit keeps the states of some cells that it was fitted to, with their columns. Among the k nearest of them to a state,

    overlap(z, level) = share of the k that have the level / share of all that have it

estimates the ratio of the densities of states under the level and of all states. Near 0 the decoder extrapolates. And
if neighbours tell the column of a cell (an area under the curve well above 0.5), a part of what the column does is in
the state, where setting the column leaves it. (Positivity and the balancing of representations: Hernán and Robins,
Causal Inference: What If, section 3.3; Johansson et al. 2022, JMLR 23:227.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from .cells import Cells
from .errors import ProgramError
from .posterior import Fit

_KEPT = 2000  # cells
_EXAMPLES = 200  # labelled cells of a type
LITTLE = 0.2  # overlap below which a cell counts as without
_AUC = 0.75


@dataclass
class Landmarks:
    """States of some of the cells of a fit, and the columns that they had.

    loc : (M, K) posterior means
    log_total : (M,) logs of their library, observed counts
    columns : (M,) by name, codes of levels (-1 where unknown) or numbers in their own units
    """

    loc: Tensor
    log_total: Tensor
    columns: dict[str, Tensor]

    @classmethod
    def of(cls, fit: Fit, cells: Cells, seed: int) -> Landmarks | None:
        """2,000 cells at random, or all; None for a story without a state of each cell."""
        return cls._at(fit, cells, np.sort(np.random.default_rng(seed).permutation(len(cells))[:_KEPT]))

    @classmethod
    def of_labels(cls, fit: Fit, cells: Cells, seed: int) -> Landmarks | None:
        """Up to 200 labelled cells of each label, at random; None where no label is known."""
        if cells.schema.label is None:
            return None
        codes = cells.label.cpu().numpy()
        order = np.random.default_rng(seed).permutation(len(cells))
        found = [order[codes[order] == code][:_EXAMPLES] for code in np.unique(codes[codes >= 0])]
        return cls._at(fit, cells, np.sort(np.concatenate(found))) if found else None

    @classmethod
    def _at(cls, fit: Fit, cells: Cells, positions: np.ndarray) -> Landmarks | None:
        chosen = cells[positions]
        try:
            loc = fit._centres(chosen.without_labels() if cells.schema.label is not None else chosen)
        except ProgramError:
            return None
        columns = {name: code.cpu() for name, code in chosen.codes.items()}
        for covariate in cells.schema.continuous:
            values = chosen.values[covariate.column].cpu().double()
            columns[covariate.column] = values * covariate.sd + covariate.mean
        return cls(loc, chosen.library.cpu().double().log().ravel(), columns) if loc.dim() == 2 else None

    @property
    def n_neighbors(self) -> int:
        return max(1, min(50, len(self.loc) // 20))

    def shares(self, z: Tensor, column: str, code: int, *, themselves: bool = False) -> Tensor:
        """(N,) share of the neighbours of states (N, K) that have a level; without themselves if they are these."""
        has = (self.columns[column] == code).double()
        return torch.cat([has[at].mean(-1) for _, at in self._nearest(z, self.n_neighbors, themselves)])

    def _nearest(self, z: Tensor, k: int, themselves: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, k) distances and places of the nearest, nearest first, block by block of states (N, K)."""
        k = max(1, min(k, len(self.loc) - 1))
        for start in range(0, len(z), 1000):
            # Without products, whose rounding would part a state from itself.
            block = z[start : start + 1000].double()
            distance = torch.cdist(block, self.loc.double(), compute_mode="donot_use_mm_for_euclid_dist")
            if themselves:
                rows = torch.arange(len(distance))
                distance[rows, rows + start] = torch.inf
            else:  # a cell that is one of these is not its own neighbour
                distance = distance.where(distance > 1e-6, torch.inf)
            found = distance.topk(k, largest=False)
            yield found.values, found.indices

    def apart(
        self, z: Tensor, k: int, alike: int, log_total: Tensor, *, themselves: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Distances of states (N, K) to their k-th nearest; and log totals (N,) less the mean of those ``alike``."""
        distances, excess, start = [], [], 0
        for values, at in self._nearest(z, max(k, alike), themselves):
            distances.append(values[:, min(k, values.shape[1]) - 1])
            own = log_total[start : start + len(values)]
            excess.append(own - self.log_total[at[:, :alike]].mean(-1))
            start += len(values)
        return torch.cat(distances), torch.cat(excess)

    def overlap(self, z: Tensor, column: str, code: int) -> Tensor:
        """(N,) ratio of densities of states under a level and of all; 0 where no neighbour has it."""
        overall = float((self.columns[column] == code).double().mean())
        return self.shares(z, column, code) / max(overall, 1e-12)

    def auc(self, column: str, code: int) -> float:
        """Area under the curve of telling a level by the neighbours of a state; nan where all cells or none have it."""
        has = (self.columns[column] == code).numpy()
        n_with, n_without = int(has.sum()), int((~has).sum())
        if not n_with or not n_without:
            return float("nan")
        rank = stats.rankdata(self.shares(self.loc, column, code, themselves=True).numpy())
        return float((rank[has].sum() - n_with * (n_with + 1) / 2) / (n_with * n_without))


def assess(fit: Fit, cells: Cells, do: Mapping[str, Any]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """By column that is set, how far cells of these states were seen so; and what to warn of, with numbers."""
    marks = fit.landmarks
    found: dict[str, dict[str, float]] = {}
    notes: list[str] = []
    if marks is None:
        return found, notes
    z = None
    for name, level in do.items():
        factor, covariate = fit.schema.factor(name), fit.schema.covariate(name)
        if covariate is not None:
            low, high = (float(f(marks.columns[covariate.column])) for f in (torch.min, torch.max))
            values = np.atleast_1d(np.asarray(level, dtype=float))
            found[name] = {"low": low, "high": high}
            if values.min() < low or values.max() > high:
                notes.append(f'"{name}" is set to {_ends(values)}, outside of what was seen ({low:g} to {high:g})')
        if factor is None or np.ndim(level) or (level == "all" and "all" not in factor.levels):
            continue
        code = factor.code(level)
        moved = (cells.codes[factor.column] != code).cpu().numpy()
        auc = marks.auc(factor.column, code)
        found[name] = {"auc": auc}
        if moved.any():
            z = fit._centres(cells) if z is None else z
            ratio = marks.overlap(z[torch.from_numpy(moved)], factor.column, code)
            without = int((ratio < LITTLE).sum())
            found[name] |= {"median": float(ratio.median()), "without": without / len(ratio)}
            if without > 0.1 * len(ratio):
                notes.append(
                    f"{without:,} of {len(ratio):,} cells have states that were hardly seen with "
                    f'{name}="{level}" (density ratio below {LITTLE}, median {float(ratio.median()):.2g}): the decoder '
                    "extrapolates there"
                )
        if auc > _AUC:
            notes.append(
                f'the latent state still tells {name}="{level}" from the rest (AUC {auc:.2f}): what comes with the '
                "column is in part in the state, and is not in the effect"
            )
    return found, notes


def _ends(values: np.ndarray) -> str:
    return f"{values.min():g}" if values.min() == values.max() else f"{values.min():g} to {values.max():g}"
