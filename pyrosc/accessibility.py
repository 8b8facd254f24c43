"""Accessibility: how open regions are in cells, without what a region has in all of them, and where groups differ.

A region's share of the fragments of a cell, rho, depends on how wide it is and how well it is cut and mapped: its
factor, the same in all cells. Two scales do without it:

    ratio        log2 of mean shares, group1 over group2: factors cancel (`effects`)
    difference   of the probability that a cell with L fragments shows at least one in the region,
                 open = 1 - exp(-L mean share): where ratios are of next to nothing, this is next to nothing

Differences are of populations, from the same draws, counts and priors as the ratios. A group's mean share in draw s is

    M_sg * r_sg,    r_sg ~ Normal(counts seen / counts expected, sd of that)

for M what is decoded, cells weighed by the Bayesian bootstrap, and r what the group's counts say beyond it: on the
scale of shares that is the difference estimator itself (Särndal et al. 1992, chapter 6), with the noise of its counts.
The normal law keeps means where they are; what it puts below 0 is continued as it is, open = L mean share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .cells import Cells
from .counts import require_memory
from .effects import (
    Comparison,
    Effects,
    Sums,
    Totals,
    about_their_mean,
    donors_of,
    draws_of_worlds,
    finished,
    is_false_in,
    log_odds,
    say_confounded,
    scatter,
    shared_levels,
    sum_over_cells,
    units_of,
    worlds_by,
)
from .errors import ProgramError
from .regions import RegionDecoder
from .shrinkage import Shrunk, shrunk

if TYPE_CHECKING:
    from .posterior import Fit

_LEAST_SD = 1e-4  # of a difference of probabilities; less matters to no threshold, and makes the grid of scales long


def without_factors(fit: Fit, table: pd.DataFrame) -> pd.DataFrame:
    """Shares (N, regions) over those of the training cells together."""
    decoder = fit.program.parts["decoder"] if "decoder" in fit.program.parts else None
    if not isinstance(decoder, RegionDecoder):
        raise ProgramError(
            f"{fit.program.story} has no region factors: they are of a RegionDecoder, as pyrosc.poissonvi has. "
            "Ask with factors=True for shares as they are decoded"
        )
    if fit.schema.size_factor is not None:
        raise ProgramError("with given size factors rho is a rate and no share: ask with factors=True")
    regions = table.columns.get_level_values(0) if isinstance(table.columns, pd.MultiIndex) else table.columns
    at = pd.Index(fit.schema.genes).get_indexer(regions)
    attrs = dict(table.attrs)
    table = table.div(decoder.profile.cpu().numpy()[at], axis=1)
    table.attrs = attrs | {"unit": "share over the region's share of all training cells together"}
    return table


def opened(share: Any, library: float) -> Any:
    """Probability of at least one of ``library`` fragments in regions with these shares; linear below a share of 0."""
    mean = library * np.asarray(share, dtype=float)
    return np.where(mean > 0, -np.expm1(-np.maximum(mean, 0.0)), mean)


def differences(
    fit: Fit, cells: Cells, pairs: list[Comparison], *, delta: float, library: float | None, fdr: float, n_draws: int,
    interval: float, resample: bool, residual: bool, shrink: bool, batches: str, donor: str | None, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """See `Fit.differential_accessibility`."""
    asked = np.any([mask for pair in pairs for mask in pair.masks], axis=0)
    if not asked.all():
        cells = cells[asked]
        pairs = [Comparison(pair.names, (pair.masks[0][asked], pair.masks[1][asked])) for pair in pairs]
    library = float(cells.library.median()) if library is None else library
    donors = donors_of(cells, donor)
    keys = shared_levels(fit, cells, pairs, batches)
    worlds = worlds_by(fit, cells, keys)
    unit, inside, by = units_of(pairs, donors)
    per_world = draws_of_worlds(n_draws, keys, max(len(fit.members), 1))
    require_memory(
        8 * sum(per_world.values()) * len(by) * cells.n_genes, "sums over the cells of every group",
        "Ask for fewer draws or groups.",
    )  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    parts: dict[Any, Sums] = {}
    of_donors: dict[Any, Tensor] = {}
    for k, (key, n) in enumerate(per_world.items()):
        weights = torch.empty(n, len(cells)).exponential_(generator=draw) if resample else None
        if weights is not None and donors is not None:
            of_donors[key] = torch.empty(n, int(donors.max()) + 1).exponential_(generator=draw).double()
        (parts[key],) = sum_over_cells(
            fit, cells, [[worlds[key]]], unit, weights, n, seed + k, None, len(per_world) > 1
        )
    totals = Totals.of(fit, cells, unit, seed) if residual else None
    tables = []
    for k, (pair, own) in enumerate(zip(pairs, keys)):
        sums = Sums(torch.cat([parts[key].shares for key in own]), torch.cat([parts[key].weights for key in own]))
        of_donor = torch.cat([of_donors[key] for key in own]) if of_donors else None
        both = [inside[:, 2 * k], inside[:, 2 * k + 1]]
        sizes = [per_world[key] for key in own]
        member = np.concatenate([fit.member_of(n) for n in sizes]) if fit.members else None
        means = [sums.mean(units, by, of_donor) for units in both]
        if totals is not None:
            known = by if donors is not None and resample else None
            means = [_with_counts(m, totals, units, known, member, seed + 2 * k + i) for i, (m, units) in
                     enumerate(zip(means, both))]  # fmt: skip
        probability = [opened(m, library) for m in means]
        drawn = np.clip(about_their_mean(probability[0] - probability[1], sizes), -1.0, 1.0)
        abundance = (means[0] + means[1]).mean(0).numpy() if shrink else None
        effects = Effects.of(drawn, member, abundance)
        effects.sd = np.maximum(effects.sd, _LEAST_SD)
        table, law = _judged(effects, delta, interval, shrink)
        for i in range(2):
            table[f"open{i + 1}"] = np.clip(probability[i].mean(0), 0.0, 1.0)
        is_false = is_false_in(effects.draws, law, delta)
        tables.append(finished(table, fit, cells, pair, means, delta, fdr, 0.0, is_false, "difference_mean"))
    say_confounded(fit, pairs, donors, "population")
    table = pd.concat(tables)
    table.attrs = dict(tables[0].attrs) | {
        "estimand": "population", "scale": "difference", "library": library, "fdr": fdr, "n_cells": len(cells),
        "uncertainty": fit._uncertainty(cells=resample, counts=residual),
    }  # fmt: skip
    table.attrs.pop("pseudocount")
    if len(tables) > 1:
        table.attrs["fdp_interval"] = {t["group1"].iloc[0]: t.attrs["fdp_interval"] for t in tables}
    return table


def _with_counts(
    mean: Tensor, totals: Totals, units: np.ndarray, by: np.ndarray | None, member: np.ndarray | None, seed: int
) -> Tensor:
    """Mean shares (S, G) times what the group's counts say beyond them, with the noise of these."""
    ratio, expected, variance = totals.ratio(units, by)  # (M, G), (G,), (G,)
    ratio = ratio[np.zeros(len(mean), dtype=int) if member is None else member]
    # Few counts that happen to be fewer than expected do not know the mean any better for it.
    sd = np.sqrt(np.maximum(ratio, 1.0) * (variance + 0.5)) / expected
    return mean * torch.as_tensor(ratio + sd * scatter(tuple(mean.shape), seed))


def _judged(effects: Effects, delta: float, interval: float, shrink: bool) -> tuple[pd.DataFrame, Effects | Shrunk]:
    """The table of differences, and the law by which their probability is judged."""
    table = effects.table(delta, interval)
    table.columns = table.columns.str.replace("lfc_", "difference_")
    for name in ("difference_lower", "difference_upper"):  # Student's law of an ensemble knows no bounds
        table[name] = table[name].clip(-1.0, 1.0)
    law: Effects | Shrunk = effects
    if shrink:
        df = effects.df if effects.df is not None else float(len(effects.draws) - 1)
        law = shrunk(effects.mean, effects.sd, df)
        table["probability"] = law.probability(delta)
        table.insert(5, "difference_shrunk", law.mean)
    if delta >= 1:  # no two probabilities are further apart
        table["probability"] = 0.0
    table["log_odds"] = log_odds(table["probability"].to_numpy())
    return table, law
