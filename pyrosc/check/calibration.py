"""Simulation-based calibration: is the guide right about cells whose states are known, because the story made them?

For r = 1..R the columns and the total of a cell are taken from the data, its latent sites are drawn from the prior, its
counts from the story with the weights as they are fitted, and the guide is asked for S draws of the sites given the
counts. If the guide is the exact posterior, the rank of any scalar of the truth among the same scalar of the draws is
uniform on 0, ..., S. Scalars that read the counts, log p(x | z), see what those of the state alone cannot: a guide that
answers the prior whatever the counts.

    F(j) = #{ranks < j} / R,   R F(j) ~ Binomial(R, j / (S + 1)),   j = 1, ..., S
    gamma = 2 min_j min{P(X <= R F(j)), P(X >= R F(j))}

A simultaneous band of 95 % holds the F whose gamma is no smaller than that of 5 % of uniform samples.

References: Talts et al. 2018, arXiv:1804.06788 (calibration by simulation); Säilynoja, Bürkner and Vehtari 2022,
Statistics and Computing 32:32 (bands); Modrák et al. 2023, Bayesian Analysis (scalars that read the data); Lemos et al.
2023, ICML (coverage by distances to a reference, TARP).
"""

from __future__ import annotations

import json
import os
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from pyro import poutine
from pyro.distributions import constraints
from scipy import sparse, stats
from scipy.sparse.linalg import svds
from torch import Tensor
from tqdm.auto import tqdm

from ..cells import Cells
from ..draws import (
    Importance,
    by_block,
    draw_guide,
    resampled,
    run_model,
    sites_of,
    sites_of_all,
    summed_out,
    with_discrete,
)
from ..elbo import draws_plate, follow, in_cells, of_cells, weighed
from ..errors import ProgramError
from ..guides import is_computed, plain_support
from ..isolation import checked_seed
from ..made_up import is_own, make_up, own_sites, reads_library
from ..parts import whole
from ..posterior import Fit, require_fit
from ..program import Program
from ..schema import did_you_mean, listed

_AT_ONCE = 100  # simulated cells between two looks at the file
_GROUP = 5  # cells in each group of a comparison
_COMPARED = 5  # genes that are compared
_DIRECTIONS = 10
_NUMBERS = 50  # most of one site
_BANDS = 10_000  # uniform samples behind a band
_LIMIT, _LIMIT_AT = 0.05, 1000  # largest deviation that is called small, at so many simulations
_LEVELS = (0.5, 0.8, 0.9, 0.95)
_POSITIVE = (constraints.positive, constraints.nonnegative)
_FEATURES = 20  # of simulated counts, by which their states are foretold
_RESAMPLES = 1000
_TRIES = 300  # cells drawn for one whose total is near its library


# ---- ranks and their band -----------------------------------------------------------------------


def simultaneous_band(n: int, points: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the distribution function of n uniform ranks stays as a whole, with probability ``level``.

    Parameters
    ----------
    n : ranks
    points : S + 1, values that a rank can take; at least 2

    Returns
    -------
    tuple of arrays
        (points - 1,) each: j / points, and the lowest and highest share of ranks below j inside the band.

    Notes
    -----
    By 10,000 uniform samples of a fixed seed, so that the level is right within 0.4 %; kept for the next call.

    >>> at, lower, upper = simultaneous_band(1000, 100)
    >>> round(float(max(upper - at)), 3)
    0.048
    """
    n, points = whole("n", n), whole("points", points, 2)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level!r}")
    at = np.arange(1, points) / points
    gamma = np.quantile(_gammas(n, points), 1 - level, method="lower")
    lower, upper = (stats.binom.ppf(q, n, at) / n for q in (gamma / 2, 1 - gamma / 2))
    return at, lower, upper


@lru_cache(maxsize=64)
def _gammas(n: int, points: int) -> np.ndarray:
    """(10,000,) gammas of samples of n uniform ranks, in order."""
    draw = np.random.default_rng([n, points])
    pieces = [draw.multinomial(n, np.full(points, 1 / points), _BANDS // 10).cumsum(1)[:, :-1] for _ in range(10)]
    if n < _BANDS:  # each number of ranks once
        tails = _tails(np.arange(n + 1)[:, None], n, points)
        found = [2 * tails[counts, np.arange(points - 1)].min(-1) for counts in pieces]
    else:
        found = [2 * _tails(counts, n, points).min(-1) for counts in pieces]
    return np.sort(np.concatenate(found))


def _tails(counts: np.ndarray, n: int, points: int) -> np.ndarray:
    """(..., points - 1) the smaller tail of numbers of ranks below j = 1, ..., points - 1."""
    at = np.arange(1, points) / points
    return np.minimum(stats.binom.cdf(counts, n, at), stats.binom.sf(counts - 1, n, at))


def ecdf(ranks: np.ndarray, n_draws: int) -> np.ndarray:
    """(S,) share of ranks below 1, ..., S."""
    counts = np.bincount(np.asarray(ranks, dtype=np.int64), minlength=n_draws + 1)
    return counts.cumsum()[:-1] / max(len(ranks), 1)


def judged(ranks: Mapping[str, np.ndarray], n_draws: int, *, level: float = 0.95) -> pd.DataFrame:
    """How far ranks are from uniform, scalar by scalar; those of other packages, too.

    Parameters
    ----------
    ranks : by name of the scalar, (n,) whole numbers in 0, ..., S: of the truth among S draws, ties broken at random
    n_draws : S
    level : of the simultaneous band

    Returns
    -------
    DataFrame
        One row a scalar. "n"; "deviation", the largest |F - uniform|; "limit", the deviation that is called small,
        0.05 from 1,000 simulations on, and 0.05 sqrt(1000 / n) for fewer, which an exact posterior passes as often
        (98.6 %); "inside" the band; "p" of gamma; "shift", mean of rank / S less 1/2: above 0 if draws are too low;
        "spread", sd of ranks over that of uniform ones; "shape" of what is outside: "biased" where the mean of ranks
        is further from that of uniform ones than their spread, in its standard errors, else "overconfident" (U) or
        "underconfident" (dome), "-" inside; "verdict": "calibrated" (inside), "small" (outside, below the limit),
        "off". ``.attrs``: "share_below" the limit, "n_outside" and how many an exact posterior would have outside,
        "expected_outside".

    Raises
    ------
    ValueError
        If ranks are none, or out of range.

    >>> uniform = np.arange(1000) % 100
    >>> judged({"z": uniform, "narrow": np.where(uniform < 50, 0, 99)}, 99)[["deviation", "shape", "verdict"]]
            deviation          shape     verdict
    scalar
    z            0.00              -  calibrated
    narrow       0.49  overconfident         off
    """
    n_draws = whole("n_draws", n_draws)
    rows = []
    for name, given in ranks.items():
        rank = np.asarray(given)
        if rank.ndim != 1 or not len(rank):
            raise ValueError(f'ranks["{name}"] must be (n,) whole numbers, not of shape {rank.shape}')
        if rank.dtype.kind not in "iu" or rank.min() < 0 or rank.max() > n_draws:
            raise ValueError(
                f'ranks["{name}"] must be whole numbers in 0..{n_draws}, the number of draws below the truth; '
                f"found {rank.dtype} from {rank.min()} to {rank.max()}"
            )
        rows.append((name, *_row(rank, n_draws, level)))
    columns = ["scalar", "n", "deviation", "limit", "inside", "p", "shift", "spread", "shape", "verdict"]
    table = pd.DataFrame(rows, columns=columns).set_index("scalar")
    table.attrs = {
        "share_below": float((table["deviation"] < table["limit"]).mean()) if len(table) else float("nan"),
        "n_outside": int((~table["inside"].astype(bool)).sum()), "expected_outside": (1 - level) * len(table),
        "level": level, "n_draws": n_draws,
    }  # fmt: skip
    return table


def _row(rank: np.ndarray, n_draws: int, level: float) -> tuple[Any, ...]:
    n, points = len(rank), n_draws + 1
    share = ecdf(rank, n_draws)
    deviation = float(np.abs(share - np.arange(1, points) / points).max())
    gammas = _gammas(n, points)
    gamma = float(2 * _tails(np.rint(share * n), n, points).min())
    inside = bool(gamma >= np.quantile(gammas, 1 - level, method="lower"))
    p = (1 + int(np.searchsorted(gammas, gamma * (1 + 1e-12), side="right"))) / (len(gammas) + 1)
    u = (rank + 0.5) / points - 0.5
    # Of a uniform u on (-1/2, 1/2): var u = 1/12, var u^2 = 1/180; of `points` values less, by 1 / points^2.
    variance = (1 - points**-2) / 12
    moved = abs(u.mean()) / np.sqrt(variance / n)
    wider = ((u**2).mean() - variance) / np.sqrt(1 / 180 / n)
    shape = "-" if inside else "biased" if moved >= abs(wider) else "overconfident" if wider > 0 else "underconfident"
    limit = _LIMIT * max(1.0, np.sqrt(_LIMIT_AT / n))
    verdict = "calibrated" if inside else "small" if deviation < limit else "off"
    spread = float(np.sqrt((u**2).mean() / variance))
    return n, deviation, limit, inside, p, float(rank.mean() / n_draws - 0.5), spread, shape, verdict


def ranks_of(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """(...) how many of the draws values[1:] are below the truth values[0], equal ones put at random."""
    below, ties = (values[1:] < values[0]).sum(0), (values[1:] == values[0]).sum(0)
    return below + draw.integers(0, ties + 1)


# ---- the result ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of simulated truths among the guide's draws. Made by `calibration`.

    Attributes
    ----------
    ranks : dict
        By scalar, (n,) whole numbers in 0, ..., S.
    table : DataFrame
        What `judged` says of them.
    truth, draws : (R, D) and (S, R, D)
        The numbers behind: latent sites of each cell, logs of positive ones; D of them, named by ``names``.
    density_ranks : (R,)
        Of log q(z* | x) among log q(z_s | x).
    counts : CSR (R, G)
        The simulated cells.
    settings : dict
        Arguments, seeds, seconds, what was left out and why.
    """

    ranks: dict[str, np.ndarray]
    table: pd.DataFrame
    names: list[str]
    truth: np.ndarray = field(repr=False)
    draws: np.ndarray = field(repr=False)
    density_ranks: np.ndarray = field(repr=False)
    counts: sparse.csr_matrix = field(repr=False)
    settings: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        s, a = self.settings, self.table.attrs
        return (
            f"Calibration({s['story']}, around the {s['around']}: {s['n_simulations']:,} cells x {s['n_draws']} draws, "
            f"{len(self.table)} scalars, {a['share_below']:.0%} below the limit, {a['n_outside']} outside their "
            f"{a['level']:.0%} bands ({a['expected_outside']:.1f} expected))"
        )

    def coverage(self, levels: Sequence[float] = _LEVELS, *, seed: int = 0) -> pd.DataFrame:
        """How often regions of the guide hold the truth; see `coverage`."""
        return _covered(self, levels, checked_seed(seed))


# ---- the simulation -----------------------------------------------------------------------------


def calibration(
    fit: Fit,
    cells: Cells | anndata.AnnData,
    *,
    around: str = "prior",
    n_simulations: int = 1000,
    n_draws: int = 99,
    genes: int | str | Sequence[str] = 20,
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
    within: float | None = 0.02,
    refined: bool | None = None,
    importance: int = 0,
    seed: int = 0,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
) -> Calibration:
    """Ranks of the truth among draws of the guide, for cells that the fitted story made up.

    Parameters
    ----------
    cells : rows whose columns and totals the simulated cells take, drawn with replacement
    around : "prior" draws the latent sites of a simulated cell from the prior
        "posterior" takes those that the guide draws for the row: states where cells are. See Notes.
    n_simulations : R
    n_draws : S; 99 puts each twentieth and hundredth between two ranks
    genes : names, or how many: evenly among those seen in ``cells``, by their mean count
    groups : of which simulated cells are compared, ("cell_type", "B", "NK") or two masks (N,) of ``cells``
        None compares simulated cells as they come.
    level : of the simultaneous bands
    within : how far the total of a simulated cell may be from the library that the story knows, as a share of it
        Others are drawn again; None takes them as they come. See Notes.
    refined : whether the guess of each simulated cell is refined first, by the fit's own ``refine``
        None does so for a fit that was refined, as it was.
    importance : proposals a cell from which draws are taken by smoothed weights, at least 100; 0 for the guide's own
        As ``importance=`` of `Fit.differential_expression`: cells whose weights cannot be relied on keep the guide's.
    seed : cells and draws are random through it
    progress : whether to show a bar
    resume : a file to keep ranks in, and to go on from; the same call with it goes on where the last one stopped

    Returns
    -------
    Calibration
        Scalars: each number of each latent site ("z[0]", ...; logs of positive ones), |z|^2 and z along ten random
        directions, log p(x|z), log p(z) (of all latent sites of a cell), "log rho GENE", and for five of the genes
        "lfc GENE", the mean of log rho over five simulated cells less that over five others: of R / 10 comparisons
        with draws of ten cells together.

    Raises
    ------
    ValueError
        If arguments are out of range, or the file at ``resume`` is of another fit, other cells or other arguments.
    ProgramError
        If the story has no counts "x", or observes something besides, which is then not simulated.

    Notes
    -----
    What is judged is the guide's posterior of a cell's own sites. Weights are as fitted; sites of all cells are
    held, in story and guide, at one draw from their guide. Of an ensemble the fit itself is judged.

    Where the story takes the observed total as known (``cells.library``), measured cells have counts that add up to it
    and guides are trained on nothing else, while simulated counts add up to it on average only: by 5 to 30 % more or
    less. So cells whose total is near the library are taken. A choice by the data leaves the posterior given the data
    what it is: ranks of an exact guide stay uniform. Where the story does not read the total, the observed total of a
    simulated cell is its own.

    "posterior" simulates z* from the guide's aggregate posterior in place of p(z). The exact posterior is then
    p(x | z) times that mixture, not the p(x | z) p(z) that the guide is trained for. Ranks of a perfect guide are
    uniform if the two are the same, and nearly so if the counts say much more than the prior. Deviations say how wrong
    intervals are at states where cells are, for whatever of these two reasons.

    Time is R (S + 1) runs of the decoder and the likelihood of all genes: 1,000 x 99 of 1,500 genes take about half a
    minute on one core. Blocks of cells hold 32 MB at a time.
    """
    began = time.perf_counter()
    require_fit(fit)
    if resume is not None and not Path(resume).absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {Path(resume).absolute().parent} to keep ranks in (resume=)")
    if around not in ("prior", "posterior"):
        raise ValueError(f'around must be "prior" or "posterior", not {around!r}')
    n_simulations, n_draws = whole("n_simulations", n_simulations, 20), whole("n_draws", n_draws, 9)
    seed = checked_seed(seed)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level!r}")
    if refined is None:
        refined = bool(fit.settings.get("refined"))
    if 0 < whole("importance", importance, 0) < 100:
        raise ValueError(f"importance must be 0 or at least 100 draws, not {importance!r}")
    if importance and fit.program.has_globals:
        raise ProgramError(
            f"{fit.program.story} has global sites, whose draws cannot be weighed cell by cell: leave out importance="
        )
    cells = fit._ready(cells)
    if cells.gene_mask is not None:
        raise ValueError("these cells lack genes of the fit, so that counts cannot be simulated: pass cells with all")
    if within is not None and (isinstance(within, bool) or not 0 < within < np.inf):
        raise ValueError(f"within must be a positive share of the library, such as 0.02, or None, not {within!r}")
    sides = _sides(cells, groups)
    at, names = _genes(fit, cells, genes)
    run = _Simulation(fit, cells, around, n_draws, at, names, sides, within, refined, importance, seed)
    about = run.about() | {
        "n_simulations": n_simulations, "groups": None if sides is None else [zlib.crc32(s.tobytes()) for s in sides]
    }  # fmt: skip
    done = _opened(resume, about)
    before = float(done[0]["seconds"]) if done else 0.0
    starts = range(0, n_simulations, _AT_ONCE)
    with tqdm(total=n_simulations, desc="calibration", unit="cell", disable=not progress) as bar:
        bar.update(min(len(done) * _AT_ONCE, n_simulations))
        for c, start in list(enumerate(starts))[len(done) :]:
            size = min(_AT_ONCE, n_simulations - start)
            done.append(run.piece(c, size))
            done[0]["seconds"] = np.array(before + time.perf_counter() - began)
            if resume is not None:
                _kept(Path(resume), about, done)
            bar.update(size)
    return _result(run, done, about, level)


def _result(run: _Simulation, done: list[dict[str, np.ndarray]], about: dict[str, Any], level: float) -> Calibration:
    def joined(key: str, axis: int = 0) -> np.ndarray:
        return np.concatenate([piece[key] for piece in done], axis)

    scalars = [str(v) for v in done[0]["scalars"]]
    ranks = dict(zip(scalars, joined("ranks").T))
    compared = joined("compared")
    if len(compared):
        ranks |= dict(zip((f"lfc {name}" for name in run.gene_names[:_COMPARED]), compared.T))
    counts = sparse.vstack([
        sparse.csr_matrix((p["count"], p["gene"], p["end"]), shape=(len(p["truth"]), run.cells.n_genes)) for p in done
    ]).tocsr()  # fmt: skip
    tried = joined("log_ratio")
    settings = {
        "story": run.program.story, "around": run.around, "n_simulations": len(joined("truth")),
        "n_draws": run.n_draws, "seed": run.seed, "seconds": float(done[0]["seconds"]), "refined": run.refined,
        "importance": run.importance,
        "library": "known" if run.is_library_known else "that of the simulated counts",
        "within": run.within if run.is_library_known else None, "n_drawn": len(tried),
        "log_total_sd": float(tried.std()),
        "left_out": [str(v) for v in done[0]["left_out"]], "about": about,
    }  # fmt: skip
    table = judged(ranks, run.n_draws, level=level)
    table.attrs |= {k: v for k, v in settings.items() if k != "about"}
    names = [str(v) for v in done[0]["names"]]
    return Calibration(
        ranks, table, names, joined("truth"), joined("draws", 1), joined("density_ranks"), counts, settings
    )


class _Simulation:
    """Simulated cells and the guide's answers, a piece at a time; each piece has seeds of its own."""

    def __init__(
        self, fit: Fit, cells: Cells, around: str, n_draws: int, genes: np.ndarray, gene_names: list[str],
        sides: tuple[np.ndarray, np.ndarray] | None, within: float | None, refined: bool, importance: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.fit, self.program, self.cells, self.around, self.n_draws = fit, fit.program, cells, around, n_draws
        self.genes, self.gene_names, self.sides = torch.as_tensor(genes), gene_names, sides
        self.within, self.refined, self.importance, self.seed = within, refined, importance, seed
        self.shared = _drawn_once(self.program, seed)
        self.axis = own_sites(self.program, cells, seed, "calibrate a story in which only x is observed")
        self.is_library_known = reads_library(self.program, cells)
        self.left_out: dict[str, None] = {}  # in order

    def about(self) -> dict[str, Any]:
        """What a file of ranks is of."""
        checksum = 0
        for value in self.program.state_dict().values():
            checksum = zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes(), checksum)
        return {
            "story": self.program.story, "weights": f"{checksum:08x}", "cells": self.cells.fingerprint(),
            "around": self.around, "n_draws": self.n_draws, "genes": self.gene_names, "within": self.within,
            "refined": self.refined, "importance": self.importance, "seed": self.seed,
        }  # fmt: skip

    def piece(self, c: int, size: int) -> dict[str, np.ndarray]:
        """Ranks of ``size`` simulated cells, the c-th piece of them."""
        draw = np.random.default_rng([self.seed, c])
        rows, truth, x, log_ratio = self._accepted(draw, size)
        made = self.cells.rows(torch.as_tensor(rows, device=self.cells.device), whole=True).with_counts(x)
        made = made._copy(_obs=pd.DataFrame(index=[f"simulated{c * _AT_ONCE + i}" for i in range(size)]))
        if not self.is_library_known:
            made = made._copy(library=x.sum(-1, keepdim=True).to(made.library))
        program = self._guide_of(made)
        found: dict[str, list[Tensor]] = {}
        start = 0

        def ask(block: Cells) -> dict[str, Tensor]:
            nonlocal start
            here = {name: truth[name].narrow(axis, start, len(block)) for name, axis in self.axis.items()}
            start += len(block)
            return self._measured(program, block, here)

        per_cell = 2 * max(self.n_draws + 1, self.importance) * program.n_combinations
        for values in by_block(program, [made], per_cell, int(draw.integers(2**31)), ask):
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        return self._ranked({k: torch.cat(v, 1).double().numpy() for k, v in found.items()}, x, draw) | {
            "log_ratio": log_ratio
        }

    def _accepted(
        self, draw: np.random.Generator, size: int
    ) -> tuple[np.ndarray, dict[str, Tensor], Tensor, np.ndarray]:
        """Rows, latent sites and counts of simulated cells; and of all that were drawn, log of total over library."""
        chosen = np.zeros(size, dtype=np.int64)
        kept: dict[str, list[Any]] = {name: [None] * size for name in (*self.axis, "x")}
        axes = self.axis | {"x": 0}
        pending, ratios, n_tried = np.arange(size), [], 0
        while len(pending):
            if n_tried > _TRIES * size:
                raise ValueError(
                    f"within={self.within}: of {n_tried:,} simulated cells {size - len(pending)} have a total so "
                    "near to their library. Allow more, within=0.1, or any, within=None"
                )
            slots = np.repeat(pending, max(1, min(_TRIES, 2 * _AT_ONCE // len(pending))) if n_tried else 1)
            rows = self._rows(draw, slots)
            read = self.cells.rows(torch.as_tensor(rows, device=self.cells.device), whole=True)
            truth, x = self._simulated(read, int(draw.integers(2**31)))
            total, library = (v.double().clamp(min=0.5) for v in (x.sum(-1), read.library.cpu().squeeze(-1)))
            log_ratio = (total / library).log().numpy()
            ratios.append(log_ratio)
            n_tried += len(slots)
            is_near = np.ones(len(slots), dtype=bool)
            if self.is_library_known and self.within is not None:
                is_near = np.abs(log_ratio) <= np.log1p(self.within)
            first = np.flatnonzero(is_near)[np.unique(slots[is_near], return_index=True)[1]]
            values = truth | {"x": x}
            for i in first:
                chosen[slots[i]] = rows[i]
                for name, pieces in kept.items():
                    pieces[slots[i]] = values[name].narrow(axes[name], int(i), 1)
            pending = np.setdiff1d(pending, slots[first])
        joined = {name: torch.cat(pieces, axes[name]) for name, pieces in kept.items()}
        x = joined.pop("x")
        return chosen, joined, x, np.concatenate(ratios)

    def _rows(self, draw: np.random.Generator, slots: np.ndarray) -> np.ndarray:
        if self.sides is None:
            return draw.integers(len(self.cells), size=len(slots))
        first = slots % (2 * _GROUP) < _GROUP
        return np.where(first, *(draw.choice(np.flatnonzero(side), len(slots)) for side in self.sides))

    def _simulated(self, read: Cells, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the latent sites of these cells, and their counts."""

        def ask(block: Cells) -> dict[str, Tensor]:
            nodes: dict[str, Any] = make_up(self.program, block, self.around, self.shared).nodes
            return {name: nodes[name]["value"].cpu() for name in (*self.axis, "x")}

        pieces = list(by_block(self.program, [read], 2 * self.program.n_combinations, seed, ask))
        made = {
            name: torch.cat([piece[name] for piece in pieces], axis) for name, axis in (self.axis | {"x": -2}).items()
        }
        x = made.pop("x")
        return made, x

    def _guide_of(self, made: Cells) -> Program:
        """The program whose guide is asked about these cells."""
        if not self.refined:
            return self.program
        was = self.fit.settings.get("refined") or {}
        options = {name: was[name] for name in ("family", "steps", "n_draws", "lr", "moments") if name in was}
        return self.fit.refine(made, seed=self.seed, progress=False, **options).program

    def _measured(self, program: Program, block: Cells, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(1 + S, n, ...) scalars of the truth and of S draws, each by the same runs."""
        n = self.n_draws
        if self.importance:
            guide = resampled(program, block, n, Importance(self.importance))
        else:
            guide = draw_guide(program, block, n, self.shared)
        both = poutine.Trace()
        for name in sites_of(guide):
            node: Any = dict(guide.nodes[name])
            if is_own(node):
                own = truth[name].to(node["value"])
                own = own.reshape((1,) * (node["value"].dim() - own.dim()) + own.shape)
                node["value"] = torch.cat([own.expand(1, *node["value"].shape[1:]), node["value"]])
            if not node["is_observed"]:
                both.add_node(name, **node)
        again = _again(program, both, block, n + 1)
        model = follow(program, both, block, n + 1)
        found = self._numbers(both, len(block))
        found["log q"] = _log_guide(again, block)
        found["log p(x|z)"], found["log p(z)"] = _log_model(program, model, block, n + 1)
        nodes: dict[str, Any] = model.nodes
        if program.enumerated:
            nodes = run_model(program, with_discrete(program, both, block, n + 1), block, n + 1).nodes
        if "rho" in nodes and in_cells(nodes["rho"]):
            rho = nodes["rho"]["value"].index_select(-1, self.genes.to(block.device))
            found["log rho"] = rho.clamp(min=1e-37).log().reshape(n + 1, len(block), -1)
        elif "rho" not in nodes:
            self.left_out['genes: the story has no site "rho"'] = None
        else:
            self.left_out['genes: "rho" is one for all cells'] = None
        return {name: value.cpu() for name, value in found.items()}

    def _numbers(self, both: poutine.Trace, n_cells: int) -> dict[str, Tensor]:
        """ "site" -> (1 + S, n, numbers): latent sites of a cell, logs of positive ones; at most 50 numbers of each."""
        found = {}
        for name in sites_of(both):
            site: Any = both.nodes[name]
            if not is_own(site):
                continue
            if site["fn"].support.is_discrete:
                self.left_out[f"{name}: discrete"] = None
                continue
            value = site["value"].movedim(_place(site), 1)
            value = value.reshape(self.n_draws + 1, n_cells, -1)
            if value.shape[-1] > _NUMBERS:
                self.left_out[f"{name}: {value.shape[-1]} numbers, of which the first {_NUMBERS} are taken"] = None
            positive = plain_support(site["fn"].support) in _POSITIVE
            found[("site log " if positive else "site ") + name] = (value.log() if positive else value)[..., :_NUMBERS]
        if not found:
            raise ProgramError(
                f"{self.program.story} has no continuous latent site of a cell whose ranks could be told"
            )
        return found

    def _ranked(self, found: dict[str, np.ndarray], x: Tensor, draw: np.random.Generator) -> dict[str, np.ndarray]:
        names: list[str] = []
        states = []
        for key in [k for k in found if k.startswith("site ")]:
            value, site = found.pop(key), key.removeprefix("site ")
            names += [f"{site}[{i}]" for i in range(value.shape[-1])] if value.shape[-1] > 1 else [site]
            states.append((site, value))
        every = np.concatenate([value for _, value in states], -1)
        scalars = dict(zip(names, np.moveaxis(every, -1, 0)))
        site, state = next(((s, v) for s, v in states if s.endswith(self.program.state_site)), states[0])
        if state.shape[-1] > 1:
            along = np.random.default_rng([self.seed, 11]).normal(size=(state.shape[-1], _DIRECTIONS))
            along /= np.linalg.norm(along, axis=0)
            scalars[f"|{site}|^2"] = (state**2).sum(-1)
            scalars |= {f"u{i}.{site}": state @ along[:, i] for i in range(_DIRECTIONS)}
        scalars |= {name: found[name] for name in ("log p(x|z)", "log p(z)")}
        shares = found.get("log rho")
        compared = np.zeros((0, 0), dtype=np.int64)
        if shares is not None:
            scalars |= {f"log rho {name}": shares[..., g] for g, name in enumerate(self.gene_names)}
            whole_groups = shares.shape[1] // (2 * _GROUP)
            parts = shares[:, : whole_groups * 2 * _GROUP, :_COMPARED]
            parts = parts.reshape(len(parts), whole_groups, 2, _GROUP, -1).mean(3)
            compared = ranks_of(parts[:, :, 0] - parts[:, :, 1], draw)
        counts = sparse.csr_matrix(x.numpy().astype(np.float32))
        return {
            "scalars": np.array(list(scalars)), "names": np.array(names),
            "left_out": np.array(list(self.left_out), dtype=str),
            "ranks": np.stack([ranks_of(v, draw) for v in scalars.values()], -1), "compared": compared,
            "density_ranks": ranks_of(found["log q"], draw),
            "truth": every[0].astype(np.float32), "draws": every[1:].astype(np.float32),
            "count": counts.data, "gene": counts.indices.astype(np.int32), "end": counts.indptr.astype(np.int64),
        }  # fmt: skip


def _place(site: Any) -> int:
    """The axis of cells in the value of a site."""
    return site["value"].dim() - site["fn"].event_dim - 1


def _drawn_once(program: Program, seed: int) -> poutine.Trace | None:
    """One draw of the sites of all cells from their guide; None where there are none."""
    if not program.has_globals:
        return None
    with program.driven(seed), torch.no_grad():
        return sites_of_all(draw_guide(program, program.blank(2)))


def _again(program: Program, values: poutine.Trace, block: Cells, n_draws: int) -> poutine.Trace:
    """The guide along values of its sites, for their densities."""

    def guide(cells: Cells) -> None:
        with draws_plate(program, n_draws):
            program.guide(cells)

    return poutine.trace(poutine.replay(guide, trace=values)).get_trace(block)


def _log_guide(guide: poutine.Trace, block: Cells) -> Tensor:
    """(S, n) log q of the sites of each cell."""
    total = block.library.new_zeros(1, len(block))
    for name in sites_of(guide):
        site: Any = guide.nodes[name]
        if is_own(site):
            total = total + of_cells(weighed(site["fn"].log_prob(site["value"]), site, block), 1)
    return total


def _log_model(program: Program, model: poutine.Trace, block: Cells, n_draws: int) -> tuple[Tensor, Tensor]:
    """(S, n) log density of the counts of each cell, and of its latent sites; discrete ones summed out."""
    counts = prior = block.library.new_zeros(n_draws, len(block))
    summed = summed_out(program, model, block, n_draws)
    for name in sites_of(model):
        site: Any = model.nodes[name]
        if is_computed(site) or not in_cells(site) or name in program.enumerated or summed.concerns(site):
            continue
        value = of_cells(weighed(site["fn"].log_prob(site["value"]), site, block), 1)
        if site["is_observed"]:
            counts = counts + value
        else:
            prior = prior + value
    if program.enumerated:
        joint, latent = summed.logsumexp()
        counts, prior = counts + joint - latent, prior + latent
    return counts, prior


def _genes(fit: Fit, cells: Cells, genes: Any) -> tuple[np.ndarray, list[str]]:
    if isinstance(genes, (int, np.integer)) and not isinstance(genes, bool):
        if genes < 1:
            raise ValueError(f"genes must be names, or how many, at least 1, not {genes!r}")
        counts = cells.gene_sums().counts.cpu().numpy()
        order = np.argsort(counts, kind="stable")[int((counts == 0).sum()) :]
        at = order[np.unique(np.linspace(0, len(order) - 1, min(int(genes), len(order))).round().astype(int))][::-1]
        # Those that are compared come first, and are of all sizes too.
        first = at[:: max(1, len(at) // _COMPARED)][:_COMPARED]
        at = np.concatenate([first, at[~np.isin(at, first)]])
        return at, [fit.schema.genes[i] for i in at]
    found, names = fit._genes(genes)
    return np.arange(cells.n_genes) if found is None else found, names


def _sides(cells: Cells, groups: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Masks (N,) of two groups."""
    if groups is None:
        return None
    groups = tuple(groups)
    if len(groups) == 3 and isinstance(groups[0], str):
        column, *levels = groups
        if column not in cells.obs.columns:
            raise ValueError(f'groups: there is no column "{column}".' + did_you_mean(column, cells.obs.columns))
        sides = [(cells.obs[column] == level).to_numpy() for level in levels]
        for level, side in zip(levels, sides):
            if not side.any():
                known = sorted(map(str, cells.obs[column].dropna().unique()))
                raise ValueError(
                    f'groups: no cell has "{level}" in "{column}". Levels: {listed(known, 20)}.'
                    + did_you_mean(str(level), known)
                )
        return sides[0], sides[1]
    if len(groups) != 2 or any(np.asarray(g).shape != (len(cells),) or np.asarray(g).dtype != bool for g in groups):
        raise ValueError(
            f'groups must be (column, level, level), such as ("cell_type", "B", "NK"), or two masks of {len(cells):,} '
            "cells"
        )
    masks = [np.asarray(g) for g in groups]
    if not (masks[0].any() and masks[1].any()):
        raise ValueError("groups: one of the masks holds no cell")
    return masks[0], masks[1]


# ---- what is kept -------------------------------------------------------------------------------


def _kept(path: Path, about: dict[str, Any], done: list[dict[str, np.ndarray]]) -> None:
    """Write the pieces beside the file, then put them in its place."""
    arrays: dict[str, Any] = {f"{i}.{name}": value for i, piece in enumerate(done) for name, value in piece.items()}
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), pieces=np.array(len(done)), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _opened(path: str | os.PathLike[str] | None, about: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """The pieces of a file, none where there is no file.

    Raises
    ------
    ValueError
        If it is no such file, or of something else.
    """
    if path is None or not Path(path).exists():
        return []
    try:
        with np.load(path, allow_pickle=False) as file:
            was, n_pieces = json.loads(str(file["about"])), int(file["pieces"])
            pieces: list[dict[str, np.ndarray]] = [{} for _ in range(n_pieces)]
            for key in file.files:
                if "." in key:
                    i, name = key.split(".", 1)
                    pieces[int(i)][name] = file[key]
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"resume: {path} holds no ranks of calibration ({error}). Name another file, or remove it"
        ) from error
    now = json.loads(json.dumps(about))
    changed = [name for name in now if was.get(name) != now[name]]
    if changed:
        said = "; ".join(f"{name} was {_short(was.get(name))}, is {_short(now[name])}" for name in changed)
        raise ValueError(f"resume: {path} holds ranks of something else: {said}. Name another file, or remove it")
    return pieces


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


# ---- coverage -----------------------------------------------------------------------------------


def coverage(
    fit: Fit,
    cells: Cells | anndata.AnnData,
    *,
    levels: Sequence[float] = _LEVELS,
    **options: Any,
) -> pd.DataFrame:
    """How often regions of the guide hold the state that simulated counts came from.

    Parameters
    ----------
    levels : probabilities of regions
    **options : of `calibration`, whose simulated cells these are; ``calibration(...).coverage()`` shares them

    Returns
    -------
    DataFrame
        One row a kind of region. "HPD": where the guide's density is highest. "TARP, another": balls around the state
        of another simulated cell; "TARP, counts": balls around a state foretold from the counts of the cell itself,
        linearly, as learned from the other half of the cells; distances in units of each number's sd. A reference that
        has nothing to do with the cell cannot tell a guide that answers the prior; one that reads its counts can.
        Columns of `judged` for the expected coverage ECP(a), the share of cells whose region of mass a holds the truth:
        "deviation" the largest |ECP - a|, "inside" its simultaneous band, ...; "area", the mean of ECP - a (below 0:
        overconfident, for "HPD"), with "lower" and "upper", 95 % by resampling simulated cells; and a column a level,
        "50%", the share covered. ``.attrs["ecp"]`` holds the curves, by kind, at ``.attrs["at"]``.

    Raises
    ------
    ValueError
        As `calibration`, and if a level is not between 0 and 1.
    """
    _check_levels(levels)
    return calibration(fit, cells, **options).coverage(levels)


def _check_levels(levels: Sequence[float]) -> None:
    wrong = [v for v in levels if isinstance(v, bool) or not 0 < v < 1]
    if wrong:
        raise ValueError(f"levels must be between 0 and 1, not {wrong[0]!r}")


def _covered(done: Calibration, levels: Sequence[float], seed: int) -> pd.DataFrame:
    _check_levels(levels)
    draw = np.random.default_rng([seed, 5])
    n_draws, n = len(done.draws), len(done.truth)
    sd = np.maximum(done.truth.std(0), 1e-12)
    truth, draws = done.truth / sd, done.draws / sd
    references = {
        "TARP, another": truth[(np.arange(n) + draw.integers(1, n, n)) % n],
        "TARP, counts": _foretold(done.counts, truth, draw),
    }
    ranks = {"HPD": n_draws - done.density_ranks}  # draws where the guide is denser than at the truth
    for name, reference in references.items():
        apart = np.concatenate([[((truth - reference) ** 2).sum(-1)], ((draws - reference) ** 2).sum(-1)])
        ranks[name] = ranks_of(apart, draw)
    table = judged(ranks, n_draws, level=done.table.attrs["level"])
    dense = table.loc["HPD"]
    if dense["shape"] != "-":
        table.loc["HPD", "shape"] = "overconfident" if dense["shift"] > 0 else "underconfident"
    at = np.arange(1, n_draws + 1) / (n_draws + 1)
    again = draw.integers(n, size=(_RESAMPLES, n))
    added: dict[str, list[float]] = {
        name: [] for name in ("area", "lower", "upper", *(f"{100 * v:g}%" for v in levels))
    }
    for rank in ranks.values():
        # The mean over levels of F - a is linear in ranks, so that its resamples are means of ranks.
        area = 0.5 - rank / n_draws
        low, high = np.quantile(area[again].mean(1), [0.025, 0.975])
        place = (rank + draw.uniform(size=n)) / (n_draws + 1)
        numbers = [area.mean(), low, high, *((place < v).mean() for v in levels)]
        for name, value in zip(added, numbers):
            added[name].append(float(value))
    table = table.assign(**added)
    table.index.name = "region"
    table.attrs |= {"ecp": {name: ecdf(rank, n_draws).tolist() for name, rank in ranks.items()}, "at": at.tolist()}
    return table


def _foretold(counts: sparse.csr_matrix, truth: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """(R, D) truths foretold from counts: ridge regression on leading components, learned from the other half."""
    total = np.maximum(np.asarray(counts.sum(1)), 1.0)
    logs = sparse.csr_matrix(counts.multiply(np.median(total) / total)).astype(np.float64).log1p()
    n_features = min(_FEATURES, len(truth) // 4, min(logs.shape) - 1)
    if n_features < 1:  # one gene
        features = logs.toarray()
    else:
        left, size, _ = svds(logs, k=n_features, v0=draw.normal(size=min(logs.shape)))
        features = left * size
    features = (features - features.mean(0)) / np.maximum(features.std(0), 1e-12)
    features = np.concatenate([features, np.log(total), np.ones((len(truth), 1))], 1)
    found = np.zeros_like(truth, dtype=float)
    for half in (0, 1):
        learn, tell = features[half::2], features[1 - half :: 2]
        gram = learn.T @ learn + np.eye(features.shape[1])
        found[1 - half :: 2] = tell @ np.linalg.solve(gram, learn.T @ truth[half::2])
    return found
