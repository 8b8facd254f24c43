"""Effects: log2 ratios of expected expression between groups of cells, from posterior draws and counts.

For draw s, let rho_sig be the share of gene g in cell i and w_s weights of cells. A group's mean share is
M_sg = sum_i w_si rho_sig / sum_i w_si, and the effect

    lfc_sg = log2(M1_sg + e) - log2(M2_sg + e)

with a pseudocount e on the scale of shares. Estimands (methods of Boyeau et al. 2023, PNAS 120:e2209124120, and Squair
et al. 2021, Nature Communications 12:5692, for donors):

    population   the groups' means in the population the cells come from: each draw weighs cells (within donors,
                 and donors, where samples are known) by Dirichlet(1, ..., 1), the Bayesian bootstrap (Rubin 1981)
    cell         a random cell of one group against a random cell of the other
    donor        means of donors, by a moderated t (Smyth 2004); called by a test of |lfc| <= delta

To the effects of "population" is added what the groups' counts say beyond what is decoded: log2 of counts seen over
counts expected (a difference estimator of survey sampling: Särndal et al. 1992, Model Assisted Survey Sampling, chapter
6), so that a difference which the decoder averages away is found all the same.

Genes of the first two are called by the posterior expected false discovery proportion: in order of P(|lfc| > delta),
as long as the mean of 1 - P over those called is at most ``fdr`` (Müller et al. 2004, JASA 99:990). In "population" P
is that of effects with the prior that all genes share (`shrinkage`): with a flat prior on each the rate is not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from scipy import special, stats
from torch import Tensor

from .cells import Cells
from .counts import require_memory
from .draws import Importance
from .errors import ProgramError
from .loading import blocks
from .psis import k_threshold
from .schema import did_you_mean, listed
from .shrinkage import Shrunk, moderated, shrunk

if TYPE_CHECKING:
    from .posterior import Fit

_PAIRS = 5000  # pairs of cells of the estimand "cell"
ESTIMANDS = ("population", "cell", "donor")
_EVIDENCE = ((3.0, "barely worth a mention"), (10.0, "substantial"), (100.0, "strong"), (np.inf, "decisive"))


# ---- sums over cells --------------------------------------------------------------------------


@dataclass
class Sums:
    """Weighted sums of shares over the cells of each unit, draw by draw.

    shares : (S, U, G) sum_i w_si rho_sig
    weights : (S, U) sum_i w_si
    """

    shares: Tensor
    weights: Tensor

    def mean(self, units: np.ndarray, by: np.ndarray | None = None, of_donor: Tensor | None = None) -> Tensor:
        """(S, G) mean share over the cells of these units; of donors ``by`` (U,), weighed by ``of_donor`` (S, D)."""
        at = torch.as_tensor(np.flatnonzero(units))
        shares, weights = self.shares[:, at], self.weights[:, at]
        if by is None or of_donor is None:
            return shares.sum(1) / weights.sum(1).unsqueeze(-1)
        donor = torch.as_tensor(by[units])
        there = donor.unique()
        means = torch.stack([
            shares[:, donor == d].sum(1) / weights[:, donor == d].sum(1).unsqueeze(-1) for d in there
        ], 1)  # fmt: skip
        share = of_donor[:, there] / of_donor[:, there].sum(1, keepdim=True)
        return torch.einsum("sd,sdg->sg", share, means)


def sum_over_cells(
    fit: Fit, read: Cells, worlds: list[list[Cells]], unit: np.ndarray, weights: Tensor | None, n_draws: int, seed: int,
    at: np.ndarray | None, changed: bool, importance: Importance | None = None,
) -> list[Sums]:  # fmt: skip
    """Sums of ``rho`` over cells by unit (N,), for each group of worlds; cells pass block by block.

    ``weights`` (S, N) of draws and cells; None for 1.
    """
    n_units = int(unit.max()) + 1
    code = torch.as_tensor(unit)
    found: list[Sums] = []
    start = 0
    for groups in fit._draws_of("rho", read, worlds, n_draws, seed, at, changed, importance):
        n = groups[0].shape[1]
        here = slice(start, start + n)
        local, place = code[here].unique(return_inverse=True)  # a block of cells meets few of many units
        member = (place.unsqueeze(-1) == torch.arange(len(local))).double()  # (n, u)
        of_cells = member.expand(n_draws, n, len(local))
        if weights is not None:
            of_cells = of_cells * weights[:, here].double().unsqueeze(-1)
        for k, shares in enumerate(groups):
            if len(found) <= k:
                room = torch.zeros(n_draws, n_units, shares.shape[-1], dtype=torch.float64)
                found.append(Sums(room, torch.zeros(n_draws, n_units, dtype=torch.float64)))
            sums = torch.einsum("snu,sng->sug", of_cells.to(shares), shares)
            found[k].shares.index_add_(1, local, sums.double().cpu())
            found[k].weights.index_add_(1, local, of_cells.sum(1))
        start += n
    return found


@dataclass
class Totals:
    """Counts of the cells of each unit, seen and expected.

    seen : (U, G) sums of counts
    expected : (M, U, G) sums of means of their laws under each member of an ensemble, averaged over draws of the state
    variance : (U, G) sums of variances of their laws
    """

    seen: np.ndarray
    expected: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, fit: Fit, cells: Cells, unit: np.ndarray, seed: int) -> Totals:
        n_units, n_genes = int(unit.max()) + 1, cells.n_genes
        code = torch.as_tensor(unit)

        def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
            site: Any = trace.nodes["x"]
            law = site["fn"]
            x: Any = block.x
            try:
                moments = law.mean, law.variance
            except NotImplementedError as error:
                raise ProgramError(
                    f"the law of the counts, {type(law).__name__}, has no mean or variance, so that counts seen cannot "
                    "be compared with those expected: give it both, or ask with residual=False"
                ) from error
            found = [t.expand(n or 1, len(block), n_genes).mean(0) for t in moments]
            return torch.cat([*found, x], -1).unsqueeze(0)

        programs = fit.members or (fit.program,)
        n_draws = max(2, 10 // len(programs))
        sums = torch.zeros(len(programs), n_units, 3 * n_genes, dtype=torch.float64)
        for m, program in enumerate(programs):
            start = 0
            for (values,) in fit._runs(cells, [[cells]], n_draws, seed, ask, program):
                sums[m].index_add_(0, code[start : start + values.shape[1]], values.mean(0).double().cpu())
                start += values.shape[1]
        expected, variance, seen = np.moveaxis(sums.numpy().reshape(len(programs), n_units, 3, n_genes), 2, 0)
        return cls(seen[0], expected, variance.mean(0))

    def ratio(self, units: np.ndarray, by: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts seen over expected in some units together, (M, G), those expected, and the variance of both, (G,).

        Half a count is added to those seen and expected.

        Of the counts' laws; or, where donors ``by`` (U,) scatter more, of donors (Cochran 1977, Sampling Techniques,
        section 6.4, the ratio estimator).
        """
        y, mean, scatter = self.seen[units], self.expected[:, units], self.variance[units]
        if by is not None and len(np.unique(by[units])) > 1:
            # Donors count alike, as in what is decoded: counts are taken per expected total of the donor.
            _, of_donor = np.unique(by[units], return_inverse=True)
            depth = np.bincount(of_donor, mean.mean(0).sum(-1))
            weight = (depth.mean() / depth)[of_donor][:, None]
            y, mean, scatter = y * weight, mean * weight, scatter * weight**2
        total, expected = y.sum(0) + 0.5, mean.sum(1) + 0.5
        variance = scatter.sum(0)
        if by is not None and len(np.unique(by[units])) > 1:
            rest = np.zeros((of_donor.max() + 1, y.shape[1]))
            np.add.at(rest, of_donor, y - total / expected.mean(0) * mean.mean(0))
            variance = np.maximum(variance, (rest**2).sum(0) * len(rest) / (len(rest) - 1))
        return total / expected, expected.mean(0), variance

    def log_ratio(self, units: np.ndarray, by: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """log2 of `ratio`, (M, G), and the variance of that, (G,)."""
        ratio, expected, variance = self.ratio(units, by)
        # A count with that mean and variance is about a gamma variable, whose log has variance trigamma(shape).
        shape = expected**2 / np.maximum(variance, 1e-12)
        return np.log2(ratio), special.polygamma(1, shape) / np.log(2) ** 2


# ---- what is said of an effect ----------------------------------------------------------------


def log2_ratio(above: Tensor | np.ndarray, below: Tensor | np.ndarray, pseudocount: float) -> np.ndarray:
    """log2 (above + e) / (below + e), as a float64 array."""
    return np.log2(np.asarray(above, dtype=float) + pseudocount) - np.log2(np.asarray(below, dtype=float) + pseudocount)


def t_law(draws: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sd and degrees of freedom of a quantity from draws (S, ...) of members (S,); see `Fit.spread`."""
    groups = [draws[member == m] for m in np.unique(member)]
    n_members, n_each = len(groups), len(draws) / len(groups)
    means = np.stack([g.mean(0) for g in groups])
    within = np.mean([g.var(0, ddof=1) if len(g) > 1 else np.zeros(g.shape[1:]) for g in groups], axis=0)
    between = np.maximum(means.var(0, ddof=1) - within / n_each, 0.0) * (1 + 1 / n_members)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = (n_members - 1) * (1 + within / between) ** 2
    df = np.where(np.isfinite(df), np.minimum(df, 1e6), 1e6)
    return means.mean(0), np.sqrt(within + between), df


@dataclass
class Effects:
    """What draws say of each gene's effect, without regard to the others.

    mean, sd : (G,)
    draws : (S, G)
    df : (G,) of Student's law about the mean, for an ensemble; None for one fit, whose law is that of the draws
    """

    mean: np.ndarray
    sd: np.ndarray
    draws: np.ndarray
    df: np.ndarray | None

    @classmethod
    def of(cls, draws: np.ndarray, member: np.ndarray | None, abundance: np.ndarray | None = None) -> Effects:
        """From draws (S, G) and the refit (S,) that each is of; with ``abundance`` (G,) variances are moderated."""
        if member is None:
            return cls(draws.mean(0), draws.std(0, ddof=1), draws, None)
        mean, sd, df = t_law(draws, member)
        if abundance is not None:
            variance, df = moderated(sd**2, df, abundance)
            sd = np.sqrt(variance)
        return cls(mean, sd, draws, df)

    def quantiles(self, *at: float) -> list[np.ndarray]:
        """(G,) for each probability."""
        if self.df is None:
            return list(np.quantile(self.draws, at, axis=0))
        return [self.mean + stats.t.ppf(q, self.df) * self.sd for q in at]

    def cdf(self, value: float) -> np.ndarray:
        """(G,) probability of an effect of at most ``value``."""
        if self.df is None:
            return (self.draws <= value).mean(0)
        return stats.t.cdf((value - self.mean) / np.maximum(self.sd, 1e-12), self.df)

    def log_odds(self, delta: float) -> np.ndarray:
        """(G,) log odds of |effect| > delta."""
        if self.df is not None:
            return log_odds(1 - self.cdf(delta) + self.cdf(-delta))
        above = (np.abs(self.draws) > delta).sum(0)
        return np.log((above + 0.5) / (len(self.draws) - above + 0.5))

    def table(self, delta: float, interval: float) -> pd.DataFrame:
        """One row a gene: mean, sd, median, equal-tailed interval, P(|lfc| > delta) and its log odds."""
        low, middle, high = self.quantiles((1 - interval) / 2, 0.5, (1 + interval) / 2)
        chance = (np.abs(self.draws) > delta).mean(0) if self.df is None else 1 - self.cdf(delta) + self.cdf(-delta)
        return pd.DataFrame({
            "lfc_mean": self.mean, "lfc_sd": self.sd, "lfc_median": middle, "lfc_lower": low, "lfc_upper": high,
            "probability": chance, "log_odds": self.log_odds(delta),
        })  # fmt: skip


def log_odds(probability: np.ndarray) -> np.ndarray:
    """log p / (1 - p), of p within 1e-12 of 0 and 1 at most."""
    return np.log(np.maximum(probability, 1e-12)) - np.log(np.maximum(1 - probability, 1e-12))


def expected_fdp(probability: np.ndarray) -> np.ndarray:
    """(G,) posterior expected false discovery proportion if a gene and all of higher probability are called."""
    order = np.argsort(-probability, kind="stable")
    found = np.empty(len(probability))
    found[order] = np.cumsum(1 - probability[order]) / np.arange(1, len(probability) + 1)
    # Genes of one probability are called together.
    return pd.Series(found).groupby(probability).transform("max").to_numpy()


def pseudocount_of(counts: Sequence[np.ndarray], shares: Sequence[Tensor]) -> float:
    """A share that genes which were not seen still get (Boyeau et al. 2023).

    For each group, the 90th percentile over genes without a count in it of their largest mean share over draws;
    the larger of the two, 0 where every gene was seen.
    """
    found = [0.0]
    for count, share in zip(counts, shares):
        unseen = np.flatnonzero(count == 0)
        if len(unseen):
            found.append(float(np.quantile(share.numpy().max(0)[unseen], 0.9)))
    return max(found)


def delta_of(lfc: np.ndarray, least: float = 0.3) -> float:
    """A threshold from the effects (G,) themselves: 0.6 times the mean size of the outer two of three normals.

    A mixture of three normals is fitted by EM to the genes' mean effects (Boyeau et al. 2023).
    """
    loc = np.quantile(lfc, [0.05, 0.5, 0.95])
    scale, weight = np.full(3, lfc.std() + 1e-6), np.full(3, 1 / 3)
    for _ in range(200):
        log_p = np.log(weight) + stats.norm.logpdf(lfc[:, None], loc, scale)
        member = special.softmax(log_p, axis=1)
        total = member.sum(0) + 1e-9
        loc = (member * lfc[:, None]).sum(0) / total
        scale = np.sqrt((member * (lfc[:, None] - loc) ** 2).sum(0) / total) + 1e-3
        weight = total / total.sum()
    outer = np.sort(loc)[[0, 2]]
    return max(least, 0.6 * float(np.abs(outer).mean()))


# ---- groups -----------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Two groups of cells, each a mask (N,), with their names."""

    names: tuple[str, str]
    masks: tuple[np.ndarray, np.ndarray]


def comparisons(cells: Cells, groupby: str | None, group1: Any, group2: Any) -> list[Comparison]:
    """The pairs of groups that are asked for.

    Raises
    ------
    ValueError
        If a group is unknown, empty, or shares cells with the other.
    """
    if groupby is None:
        one = _mask(cells, group1, "group1")
        two = ~one if group2 is None else _mask(cells, group2, "group2")
        pairs = [Comparison(("group1", "rest" if group2 is None else "group2"), (one, two))]
    else:
        if groupby not in cells.obs.columns:
            raise ValueError(
                f'groupby: there is no column "{groupby}". Columns: {listed(cells.obs.columns, 10)}.'
                + did_you_mean(groupby, cells.obs.columns)
            )
        column = cells.obs[groupby]
        known = column.notna().to_numpy()
        value = column.astype(object).astype(str).to_numpy()
        levels = sorted(set(value[known]))
        if group1 is None:
            if group2 is not None:
                raise ValueError("group2 without group1: name group1 too, or neither for every group against the rest")
            if len(levels) < 2:
                raise ValueError(f'groupby: "{groupby}" has one level, so there is nothing to compare with')
            asked: list[Any] = list(levels)
        else:
            asked = [group1]
        pairs = []
        for group in asked:
            one = known & _levels(value, group, levels, "group1")
            two = known & (~one if group2 is None else _levels(value, group2, levels, "group2"))
            pairs.append(Comparison((_text(group), "rest" if group2 is None else _text(group2)), (one, two)))
    for pair in pairs:
        for name, mask in zip(("group1", "group2"), pair.masks):
            if not mask.any():
                raise ValueError(f"{name} ({pair.names[name == 'group2']}) holds no cell")
        both = pair.masks[0] & pair.masks[1]
        if both.any():
            raise ValueError(f"{int(both.sum()):,} cells are in both groups ({listed(cells.names[both])})")
    return pairs


def _text(group: Any) -> str:
    return str(group) if isinstance(group, str) or np.ndim(group) == 0 else " + ".join(map(str, group))


def _levels(value: np.ndarray, group: Any, levels: list[str], name: str) -> np.ndarray:
    if isinstance(group, (np.ndarray, pd.Series)) and np.asarray(group).dtype == bool:
        raise ValueError(f"{name} is a mask; masks go without groupby")
    wanted = [group] if isinstance(group, str) or np.ndim(group) == 0 else list(group)
    if wanted == ["rest"] and "rest" not in levels:
        raise ValueError(f'{name}: "rest" is no level; leave group2 out for the rest')
    for level in wanted:
        if str(level) not in levels:
            raise ValueError(
                f'{name}: there is no level "{level}". Levels: {listed(levels, 10)}.' + did_you_mean(str(level), levels)
            )
    return np.isin(value, [str(w) for w in wanted])


def _mask(cells: Cells, group: Any, name: str) -> np.ndarray:
    if group is None:
        raise ValueError('name a column to group by, groupby="cell_type", or give group1= a mask of cells')
    if isinstance(group, pd.Series) and not group.index.equals(cells.names):
        if not group.index.is_unique or set(group.index) != set(cells.names):
            raise ValueError(f"{name} is a Series whose index is not the names of these cells; pass an array, in order")
        group = group.loc[cells.names]
    mask = np.asarray(group)
    if mask.dtype != bool or mask.shape != (len(cells),):
        raise ValueError(
            f"{name} without groupby must be a mask of {len(cells):,} cells, not {type(group).__name__} of shape "
            f"{mask.shape}; or name a column by groupby="
        )
    return mask


# ---- differential expression ------------------------------------------------------------------


def differential_expression(
    fit: Fit, cells: Cells, pairs: list[Comparison], *, estimand: str, delta: float | None, pseudocount: float | None,
    fdr: float, n_draws: int, interval: float, resample: bool, residual: bool, shrink: bool, batches: str,
    donor: str | None, design: Sequence[str], importance: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """See `Fit.differential_expression`."""
    asked = np.any([mask for pair in pairs for mask in pair.masks], axis=0)
    if not asked.all():  # cells in no group have nothing to say
        cells = cells[asked]
        pairs = [Comparison(pair.names, (pair.masks[0][asked], pair.masks[1][asked])) for pair in pairs]
    donors = donors_of(cells, donor)
    if estimand == "donor" and donors is None:
        raise ValueError(
            'estimand="donor" needs to know donors: name a column, donor=..., or read cells with sample=...'
        )
    weighed = _weighed(fit, cells, importance, seed) if importance else None
    keys = shared_levels(fit, cells, pairs, batches if estimand != "donor" else "own")
    worlds = worlds_by(fit, cells, keys)
    tables = []
    if estimand == "cell":
        for i, (pair, own) in enumerate(zip(pairs, keys)):
            some = [worlds[key] for key in own]
            lfcs, means, e = _cell_pairs(fit, cells, pair, some, pseudocount, seed + i, weighed)
            found = Effects.of(lfcs, None)
            tables.append(_table(
                fit, cells, pair, found, found, means, delta, fdr, interval, e, some, False, seed + i
            ))  # fmt: skip
    else:
        is_population = estimand == "population"
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
            weights = torch.empty(n, len(cells)).exponential_(generator=draw) if resample and is_population else None
            if weights is not None and donors is not None:
                of_donors[key] = torch.empty(n, int(donors.max()) + 1).exponential_(generator=draw).double()
            changed = len(per_world) > 1
            (parts[key],) = sum_over_cells(
                fit, cells, [[worlds[key]]], unit, weights, n, seed + k, None, changed, weighed
            )  # fmt: skip
        totals = Totals.of(fit, cells, unit, seed) if residual else None
        for k, (pair, own) in enumerate(zip(pairs, keys)):
            sums = Sums(torch.cat([parts[key].shares for key in own]), torch.cat([parts[key].weights for key in own]))
            both, some = [inside[:, 2 * k], inside[:, 2 * k + 1]], [worlds[key] for key in own]
            if estimand == "donor":
                tables.append(_by_donor(
                    fit, cells, pair, sums, both, by, donors, delta, pseudocount, fdr, interval, design, totals, some,
                    seed,
                ))  # fmt: skip
                continue
            of_donor = torch.cat([of_donors[key] for key in own]) if of_donors else None
            means = [sums.mean(units, by, of_donor) for units in both]
            counts = [_counts_of(cells, mask)[0] for mask in pair.masks]
            e = pseudocount_of(counts, means) if pseudocount is None else pseudocount
            sizes = [per_world[key] for key in own]
            lfc = about_their_mean(log2_ratio(means[0], means[1], e), sizes)
            member = np.concatenate([fit.member_of(n) for n in sizes]) if fit.members else None
            abundance = (means[0] + means[1]).mean(0).numpy() if shrink else None
            found = decoded = Effects.of(lfc, member, abundance)
            if totals is not None:
                known = by if donors is not None and resample else None
                found = _with_counts(lfc, totals, both, known, member, abundance, seed)
            tables.append(_table(
                fit, cells, pair, found, decoded, means, delta, fdr, interval, e, some, shrink, seed + k
            ))  # fmt: skip
            if totals is not None:
                more = pd.Series(found.mean - lfc.mean(0), index=list(fit.schema.genes))
                tables[-1].insert(5 + shrink, "lfc_residual", more)
        say_confounded(fit, pairs, donors, estimand)
    table = pd.concat(tables)
    of_population = estimand == "population"
    by_draws = fit._uncertainty(cells=resample and of_population, counts=residual and of_population)
    named = {pair.names[0]: list(own) if own != [None] else "own" for pair, own in zip(pairs, keys)}
    levels = next(iter(named.values())) if len({str(v) for v in named.values()}) == 1 else named
    table.attrs = dict(tables[0].attrs) | {
        "estimand": estimand, "fdr": fdr, "batches": levels,
        "uncertainty": "donors" if estimand == "donor" else by_draws,
        "n_cells": len(cells),
    } | _counted(cells, importance, weighed)  # fmt: skip
    if len(tables) > 1:
        for name in ("delta", "pseudocount", "fdp_interval"):
            table.attrs[name] = {t["group1"].iloc[0]: t.attrs[name] for t in tables}
    return table


def _with_counts(
    lfc: np.ndarray, totals: Totals, groups: list[np.ndarray], by: np.ndarray | None, member: np.ndarray | None,
    abundance: np.ndarray | None, seed: int,
) -> Effects:  # fmt: skip
    """Decoded effects (S, G) with what the groups' counts say beyond them.

    As it is, log2 of counts seen over expected makes up for whatever the decoder gets wrong, and brings the noise of
    the counts. One fit has followed that noise without saying so, and does not know how wrong it is: it takes this.
    Refits know, and may do better with few counts: there it is drawn towards 0 by the law that it has over genes. The
    comparison takes what is surer of most genes; a choice gene by gene would take what is too sure.
    """
    (one, v1), (two, v2) = (totals.log_ratio(units, by) for units in groups)
    rest, noise = one - two, scatter(lfc.shape, seed)  # (M, G), (S, G)
    sd = np.sqrt(v1 + v2)
    as_it_is = Effects.of(lfc + (rest if member is None else rest[member]) + sd * noise, member, abundance)
    if member is None:
        return as_it_is
    drawn = shrunk(rest.mean(0), sd)
    by_refits = Effects.of(lfc + drawn.mean + drawn.sd * noise, member, abundance)
    return by_refits if np.median(by_refits.sd) < np.median(as_it_is.sd) else as_it_is


def scatter(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """(S, G) standard normal numbers, each column its quantiles in random order: no mean moves by chance."""
    column = stats.norm.ppf((np.arange(shape[0]) + 0.5) / shape[0])
    column /= column.std(ddof=1)
    return np.random.default_rng([seed, 4]).permuted(np.tile(column, (shape[1], 1)), axis=1).T


def _weighed(fit: Fit, cells: Cells, proposals: int, seed: int) -> Importance | None:
    """Importance weights, if at least four fifths of 200 of these cells have some that can be relied on."""
    some = np.sort(np.random.default_rng([seed, 2]).choice(len(cells), size=min(200, len(cells)), replace=False))
    tried = Importance(proposals)
    for _ in fit._draws_of("rho", cells[some], [[cells[some]]], max(len(fit.members), 1), seed, None, False, tried):
        pass
    if tried.n_unweighted <= 0.2 * tried.n_cells:
        return Importance(proposals)
    fit._warn(
        f"importance weights cannot be relied on in {tried.n_unweighted:,} of {tried.n_cells:,} cells that were tried "
        f"(k-hat above {k_threshold(proposals):.2f}): all cells keep the guide's own draws"
    )
    return None


def _counted(cells: Cells, proposals: int, weighed: Importance | None) -> dict[str, Any]:
    """How many of the draws' cells were not weighed."""
    if not proposals:
        return {}
    if weighed is None:
        return {"n_unweighted": len(cells)}
    return {"n_unweighted": round(len(cells) * weighed.n_unweighted / weighed.n_cells)}


def donors_of(cells: Cells, column: str | None) -> np.ndarray | None:
    """(N,) code of each cell's donor; None where they are not known."""
    if column is None:
        if cells.schema.sample is None or cells.schema.sample.column not in cells.obs.columns:
            return None
        column = cells.schema.sample.column
    if column not in cells.obs.columns:
        raise ValueError(f'donor: there is no column "{column}".' + did_you_mean(column, cells.obs.columns))
    missing = cells.obs[column].isna().to_numpy()
    if missing.any():
        raise ValueError(f'donor: "{column}" is missing for {missing.sum():,} cells ({listed(cells.names[missing])})')
    return np.unique(cells.obs[column].astype(str).to_numpy(), return_inverse=True)[1]


def shared_levels(fit: Fit, cells: Cells, pairs: list[Comparison], batches: str) -> list[list[Any]]:
    """For each comparison the batches that both of its groups have; [None] where cells keep their own."""
    factor = fit.schema.batch
    if batches == "own" or factor is None or len(factor) < 2:
        return [[None] for _ in pairs]
    code, found = cells.batch.cpu().numpy(), []
    for pair in pairs:
        shared = sorted(set(code[pair.masks[0]]) & set(code[pair.masks[1]]) - {-1})
        if not shared:
            has = [listed([factor.levels[c] for c in sorted(set(code[mask])) if c >= 0]) for mask in pair.masks]
            raise ValueError(
                f'{pair.names[0]} (in {has[0]}) and {pair.names[1]} (in {has[1]}) share no level of "{factor.column}", '
                'so they cannot be compared within one: batches="own" compares them each under its own, with what the '
                "batches differ by"
            )
        found.append([factor.levels[b] for b in shared])
    return found


def worlds_by(fit: Fit, cells: Cells, keys: list[list[Any]]) -> dict[Any, Cells]:
    """The cells as they are decoded under each batch that any comparison asks for."""
    factor = fit.schema.batch
    every = list(dict.fromkeys(key for own in keys for key in own))
    return {k: cells if k is None or factor is None else cells.do(**{factor.column: k}) for k in every}


def draws_of_worlds(n_draws: int, keys: list[list[Any]], least: int) -> dict[Any, int]:
    """Draws under each batch, so that every comparison has at least ``n_draws``, and ``least`` under each."""
    found: dict[Any, int] = {}
    for own in keys:
        for key in own:
            found[key] = max(found.get(key, least), -(-n_draws // len(own)))
    return found


def about_their_mean(lfc: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Effects (S, G) under one batch after the other, moved to their mean over batches.

    What is asked is that mean: how effects differ between batches is not uncertainty of it.
    """
    by_batch = np.split(lfc, np.cumsum(sizes)[:-1])
    centre = np.mean([one.mean(0) for one in by_batch], axis=0)
    return np.concatenate([one - one.mean(0) + centre for one in by_batch])


def say_confounded(fit: Fit, pairs: list[Comparison], donors: np.ndarray | None, estimand: str) -> None:
    """Warn where groups of populations share no donor and there are few of them."""
    if donors is None or estimand != "population":
        return
    for pair in pairs:
        there = [set(donors[mask]) for mask in pair.masks]
        if not there[0] & there[1] and min(map(len, there)) < 3:
            fit._warn(
                f"{pair.names[0]} ({len(there[0])} donors) and {pair.names[1]} ({len(there[1])}) share no donor: what "
                "donors differ by cannot be told from the effect of the group"
            )
            return


def units_of(pairs: list[Comparison], donors: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells of a donor that no comparison tells apart make one unit.

    Returns
    -------
    (N,) number of each cell's unit; (U, 2 P) whether a unit is in group1 and group2 of each pair; (U,) its donor
    """
    member = np.stack([mask for pair in pairs for mask in pair.masks], 1)
    donor = np.zeros(len(member), dtype=int) if donors is None else donors
    kinds, unit = np.unique(np.column_stack([member, donor]), axis=0, return_inverse=True)
    return unit.reshape(-1), kinds[:, :-1].astype(bool), kinds[:, -1]


def _counts_of(cells: Cells, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(G,) total counts, mean count and share of cells with a count, of the cells in a mask."""
    chosen = cells[mask]
    n = max(len(chosen), 1)
    total, seen = np.zeros(cells.n_genes), np.zeros(cells.n_genes)
    for _, gene, count in chosen._own_counts().pieces():
        at = gene.numpy()
        total += np.bincount(at, count.double().numpy(), cells.n_genes)
        seen += np.bincount(at, minlength=cells.n_genes)
    return total, total / n, seen / n


def _cell_pairs(
    fit: Fit,
    cells: Cells,
    pair: Comparison,
    worlds: list[Cells],
    pseudocount: float | None,
    seed: int,
    weighed: Importance | None,
) -> tuple[np.ndarray, list[Tensor], float]:
    """(P, G) effects of random pairs of cells, one of each group; means (1, G); the pseudocount."""
    draw = np.random.default_rng(seed)
    least, n = max(len(fit.members), 1), max(1, _PAIRS // len(worlds))  # pairs under each batch
    sides = []
    for k, mask in enumerate(pair.masks):
        inside, rows = np.flatnonzero(mask), []
        for j, world in enumerate(worlds):
            some = np.sort(draw.choice(inside, size=min(len(inside), max(1, n // least)), replace=False))
            n_draws = max(-(-n // len(some)), least)
            shares = fit._draws_of(
                "rho", cells[some], [[world[some]]], n_draws, seed + 1000 * k + j, None, len(worlds) > 1, weighed
            )
            drawn = torch.cat([s.transpose(0, 1).reshape(-1, s.shape[-1]).cpu() for (s,) in shares])
            rows.append(drawn[torch.from_numpy(draw.permutation(len(drawn))[:n])])
        sides.append(torch.cat(rows))  # pairs share their batch
    if pseudocount is None:
        pseudocount = pseudocount_of([_counts_of(cells, m)[0] for m in pair.masks], sides)
    return log2_ratio(sides[0], sides[1], pseudocount), [s.mean(0, keepdim=True) for s in sides], pseudocount


def _table(
    fit: Fit, cells: Cells, pair: Comparison, effects: Effects, decoded: Effects, means: list[Tensor],
    delta: float | None, fdr: float, interval: float, pseudocount: float, worlds: list[Cells], shrink: bool, seed: int,
) -> pd.DataFrame:  # fmt: skip
    delta = delta_of(effects.mean) if delta is None else delta
    table = effects.table(delta, interval)
    law: Effects | Shrunk = effects
    if shrink:
        # Draws of one fit have the sd that they show; with S draws it is known to S - 1 degrees of freedom.
        df = effects.df if effects.df is not None else float(len(effects.draws) - 1)
        law = shrunk(effects.mean, effects.sd, df)
        table["probability"] = law.probability(delta)
        table["log_odds"] = log_odds(table["probability"].to_numpy())
        table.insert(5, "lfc_shrunk", law.mean)
    # Of what is decoded alone: effects of the prior have no noise of counts.
    _add_bayes(table, decoded.log_odds(delta), _prior_effects(fit, pair, worlds, pseudocount, seed), delta)
    return finished(table, fit, cells, pair, means, delta, fdr, pseudocount, is_false_in(effects.draws, law, delta))


def _add_bayes(table: pd.DataFrame, log_odds: np.ndarray, prior: np.ndarray, delta: float) -> None:
    """Bayes factors of |lfc| > delta against effects (S, G) between states from the prior, with a word for them."""
    chance = (np.abs(prior) > delta).mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.exp(log_odds) / (chance / (1 - chance))
    factor = np.where((chance > 0.001) & (chance < 0.999), factor, np.nan)
    table["bayes_factor"] = factor
    table["evidence"] = [next(word for top, word in _EVIDENCE if f <= top) if f > 1 else "" for f in factor]


def is_false_in(draws: np.ndarray, law: Any, delta: float) -> np.ndarray:
    """(S, G) whether |effect| <= delta, draw by draw: genes have their own law, and go together as the draws do."""
    place = (stats.rankdata(draws, axis=0) - 0.5) / len(draws)
    return (place > law.cdf(-delta)) & (place <= law.cdf(delta))


def finished(
    table: pd.DataFrame, fit: Fit, cells: Cells, pair: Comparison, means: list[Tensor], delta: float, fdr: float,
    pseudocount: float, is_false: np.ndarray | None, size: str = "lfc_mean",
) -> pd.DataFrame:  # fmt: skip
    if "expected_fdp" not in table:
        table["expected_fdp"] = expected_fdp(table["probability"].to_numpy())
    table["is_de"] = table["expected_fdp"] <= fdr
    for k, mask in enumerate(pair.masks, 1):
        table[f"share{k}"] = means[k - 1].mean(0).numpy()
        _, table[f"raw_mean{k}"], table[f"detected{k}"] = _counts_of(cells, mask)
    table["group1"], table["group2"] = pair.names
    table.index = pd.Index(fit.schema.genes, name="gene")
    table["n1"], table["n2"] = (int(mask.sum()) for mask in pair.masks)
    called = table["is_de"].to_numpy()
    fdp = None
    if is_false is not None and called.any():
        fdp = tuple(float(q) for q in np.quantile(is_false[:, called].mean(1), [0.05, 0.95]))
    table.attrs = {"delta": float(delta), "pseudocount": float(pseudocount), "fdp_interval": fdp}
    if "p_value" in table:
        return table.sort_values("p_value", kind="stable")
    return table.sort_values(["probability", size], ascending=False, key=abs)


def _prior_effects(fit: Fit, pair: Comparison, worlds: list[Cells], pseudocount: float, seed: int) -> np.ndarray:
    """(1000, G) effects between one state from the prior for each group, decoded as the groups' cells are."""
    draw, sides = np.random.default_rng([seed, 1]), []
    for mask in pair.masks:
        chosen = np.sort(draw.choice(np.flatnonzero(mask), 1000))
        world = worlds[int(draw.integers(len(worlds)))].rows(torch.as_tensor(chosen).to(fit.device), whole=True)
        # Counts are there, so that the story draws the states alone, from their prior.
        with fit.program.driven(int(draw.integers(2**31))), torch.no_grad():
            runs: list[Any] = [poutine.trace(fit.program.model).get_trace(block) for block in blocks(world)]
            found = [run.nodes["rho"]["value"] for run in runs]
        sides.append(torch.cat(found).cpu()[torch.from_numpy(draw.permutation(1000))])
    return log2_ratio(sides[0], sides[1], pseudocount)


# ---- donors -----------------------------------------------------------------------------------


def _by_donor(
    fit: Fit, cells: Cells, pair: Comparison, sums: Sums, inside: list[np.ndarray], by: Any, donors: Any,
    delta: float | None, pseudocount: float | None, fdr: float, interval: float, design: Sequence[str] = (),
    totals: Totals | None = None, worlds: list[Cells] | None = None, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """A moderated t on donors' log2 mean shares: paired where donors are in both groups, else of two samples.

    Each donor's mean is what is decoded and log2 of its counts over those expected. Least squares on the group, the
    columns of ``design``, and a constant for each donor where donors are paired.
    """
    there = [np.unique(donors[mask]) for mask in pair.masks]
    both = np.intersect1d(there[0], there[1])
    is_paired = len(both) >= 3
    sides = [both, both] if is_paired else [np.setdiff1d(t, both) for t in there]
    if not is_paired and min(map(len, sides)) < 3:
        raise ValueError(
            'estimand="donor" needs three donors in both groups, or three on each side; '
            f"{len(both)} are in both, {len(there[0])} in group1 and {len(there[1])} in group2"
        )
    means = [
        torch.stack([sums.mean(units & (by == d)).mean(0) for d in side]) for units, side in zip(inside, sides)
    ]  # (D, G) each
    e = pseudocount_of([_counts_of(cells, m)[0] for m in pair.masks], means) if pseudocount is None else pseudocount
    levels = np.log2(torch.cat(means).numpy() + e)  # (samples, G)
    if totals is not None:  # a decoder that was not told of donors makes them all alike
        ratios = [
            totals.log_ratio(units & (by == d), None)[0].mean(0) for units, side in zip(inside, sides) for d in side
        ]
        levels = levels + np.stack(ratios)
    group = np.repeat([1.0, 0.0], [len(side) for side in sides])
    donor = np.concatenate(sides)
    around = (donor[:, None] == both).astype(float) if is_paired else np.ones((len(group), 1))
    columns = _columns(cells, pair, sides, donors, design)
    terms = np.column_stack([group, around, columns]) if columns.size else np.column_stack([group, around])
    known = float(len(terms) - np.linalg.matrix_rank(terms))
    if np.linalg.matrix_rank(terms[:, 1:]) == np.linalg.matrix_rank(terms):
        raise ValueError(
            f"design: the groups can be told by {listed(list(design))}, so that no effect of the group is left"
        )
    if known < 2:
        raise ValueError(
            f"design: {len(terms)} samples of donors leave {known:.0f} degrees of freedom beside the group and "
            f"{listed(list(design))}; name fewer columns"
        )
    inverse = np.linalg.pinv(terms)
    fitted = inverse @ levels
    effect = fitted[0]
    variance = ((levels - terms @ fitted) ** 2).sum(0) / known
    variance, df = moderated(variance, known, 2.0 ** levels.mean(0))
    se = np.sqrt(variance * (inverse[0] ** 2).sum())
    delta = delta_of(effect) if delta is None else delta
    law = stats.t(df)
    reach = law.ppf(0.5 + interval / 2) * se
    chance = law.sf((delta - effect) / se) + law.cdf((-delta - effect) / se)
    # Few donors against many genes without an effect: a flat prior would call too many. The test of |lfc| <= delta
    # with Benjamini-Hochberg keeps the rate (McCarthy and Smyth 2009, Bioinformatics 25:765).
    p_value = law.sf((np.abs(effect) - delta) / se) + law.sf((np.abs(effect) + delta) / se)
    table = pd.DataFrame({
        "lfc_mean": effect, "lfc_sd": se, "lfc_median": effect, "lfc_lower": effect - reach,
        "lfc_upper": effect + reach, "probability": chance,
        "log_odds": log_odds(chance), "t": effect / se, "p_value": p_value, "df": df,
        "expected_fdp": stats.false_discovery_control(np.clip(p_value, 0.0, 1.0)),
    })  # fmt: skip
    if worlds is not None:
        _add_bayes(table, log_odds(chance), _prior_effects(fit, pair, worlds, e, seed), delta)
    return finished(table, fit, cells, pair, [m.mean(0, keepdim=True) for m in means], delta, fdr, e, None)


def _columns(
    cells: Cells, pair: Comparison, sides: list[np.ndarray], donors: np.ndarray, design: Sequence[str]
) -> np.ndarray:
    """(samples, P) columns of a design: numbers as means of a sample's cells, levels as 0 and 1 beside the first."""
    found = []
    for name in design:
        if name not in cells.obs.columns:
            raise ValueError(f'design: there is no column "{name}".' + did_you_mean(name, cells.obs.columns))
        column = cells.obs[name]
        if column.isna().any():
            raise ValueError(f'design: "{name}" is missing for {column.isna().sum():,} cells')
        samples = [
            column[mask & (donors == d)] for mask, side in zip(pair.masks, sides) for d in side
        ]  # fmt: skip
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            value = np.array([float(s.mean()) for s in samples])
            found.append(((value - value.mean()) / max(float(value.std()), 1e-12))[:, None])
            continue
        mixed = [s for s in samples if s.nunique() > 1]
        if mixed:
            raise ValueError(
                f'design: "{name}" has {mixed[0].nunique()} levels within one donor and group '
                f"({listed(mixed[0].unique())}; {len(mixed):,} of {len(samples):,} samples of donors have several); "
                "a column of a design is one of samples"
            )
        value = np.array([str(s.iloc[0]) for s in samples])
        found.append((value[:, None] == np.unique(value)[1:]).astype(float))
    return np.concatenate(found, 1) if found else np.zeros((0, 0))


# ---- as scanpy has it --------------------------------------------------------------------------


def ranked(table: pd.DataFrame, genes: list[str]) -> dict[str, Any]:
    """A table of effects as ``uns["rank_genes_groups"]`` of scanpy: arrays by group, genes in the table's order.

    Raises
    ------
    ValueError
        If this is no table of effects, or its genes are not those of the AnnData.
    """
    needed = {"lfc_mean", "log_odds", "probability", "expected_fdp", "group1", "group2", "detected1", "detected2"}
    if not isinstance(table, pd.DataFrame) or needed - set(table.columns):
        raise ValueError("effects must be a table from differential_expression(), with all of its columns")
    strange = [g for g in table.index.unique() if g not in set(genes)]
    if strange:
        raise ValueError(f"effects: {len(strange):,} genes are not in adata ({listed(strange)})")
    groups = [(name, part) for name, part in table.groupby("group1", sort=False)]
    if len({len(part) for _, part in groups}) > 1 or any(not part.index.is_unique for _, part in groups):
        raise ValueError("effects must have one row a gene in each group1")

    def by_group(column: Any, kind: str) -> np.ndarray:
        return np.rec.fromarrays([np.asarray(column(part), dtype=kind) for _, part in groups],
                                 dtype=[(str(name), kind) for name, _ in groups])  # fmt: skip

    second = {str(part["group2"].iloc[0]) for _, part in groups}
    longest = max(len(str(g)) for g in table.index)
    return {
        "params": {
            "groupby": str(table.attrs.get("groupby") or "groups"),
            "reference": second.pop() if len(second) == 1 else "rest",
            "method": f"pyrosc {table.attrs.get('estimand', 'population')}",
            "use_raw": False, "layer": None, "corr_method": "expected false discovery proportion",
        },
        "names": by_group(lambda t: t.index.astype(str), f"<U{longest}"),
        "scores": by_group(lambda t: t["lfc_mean"] / np.maximum(t["lfc_sd"], 1e-12), "f4"),
        "logfoldchanges": by_group(lambda t: t["lfc_mean"], "f4"),
        "pvals": by_group(lambda t: t["p_value"] if "p_value" in t else 1 - t["probability"], "f8"),
        "pvals_adj": by_group(lambda t: t["expected_fdp"], "f8"),
        "pts": pd.DataFrame({str(n): t["detected1"].reindex(genes) for n, t in groups}, index=genes),
        "pts_rest": pd.DataFrame({str(n): t["detected2"].reindex(genes) for n, t in groups}, index=genes),
    }  # fmt: skip
