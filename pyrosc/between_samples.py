"""Between samples: what cells would be in other samples, which samples are alike, and what covariates of samples do.

For draws s of the posterior, every cell i is decoded in every sample d (its own state with that sample's effects), and

    L[s, d, g] = mean over the cells of a group of log2 rho[s, i, d, g]

is what is compared: distances are root mean squares over genes of differences of L. Effects of covariates are
regressions on the covariates of samples of L and what the counts of the group say beyond it,

    y[d, g] = L[d, g] + log2 (counts seen + 1/2) / (counts expected + 1/2),     of the cells of sample d in the group,

as a few directions that all groups share spread a little of what is true of one kind of cells, or gene, to others:
tests of L alone found the effect of two types in six others too. Samples are the units: tests permute them (Freedman
and Lane 1983, JBES 1:292), and no statistic is compared with a law that it would have were coordinates independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import linalg, stats
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from .cells import Cells
from .counts import require_memory
from .effects import Totals, log_odds
from .errors import ProgramError
from .posterior import Fit
from .schema import Factor, did_you_mean, listed
from .shrinkage import moderated

_TINY = 1e-12  # of a share, before its logarithm
_NULL_PAIRS = 200  # of draws, for the distance of a sample from itself
_AT_ONCE = 2e7  # numbers in a block of densities


# ---- decoding in every sample ---------------------------------------------------------------


def sample_factor(fit: Fit, cells: Cells) -> Factor:
    """The sample column of a story that decodes by it.

    Raises
    ------
    ProgramError
        If there is none, or the story does not read it.
    """
    factor = fit.schema.sample
    if factor is None:
        raise ProgramError("this fit has no samples: Cells.from_anndata(adata, sample=...) and pyrosc.mrvi(cells)")
    fit._require_rho_of_cells(cells)
    try:
        fit._require_read(cells, {factor.column: factor.levels[0]})
    except ValueError as error:
        raise ProgramError(
            f'{fit.program.story} does not decode by "{factor.column}" (sample): fit pyrosc.mrvi(cells)'
        ) from error
    return factor


def _worlds(cells: Cells, factor: Factor, levels: Sequence[Any] | None = None) -> list[list[Cells]]:
    return [[cells.do(**{factor.column: level})] for level in (factor.levels if levels is None else levels)]


def states(fit: Fit, cells: Cells, n_draws: int, seed: int) -> np.ndarray:
    """(S, N, D, K) draws of z of each cell in each sample."""
    factor = sample_factor(fit, cells)
    width = fit.latent(cells[:1], 1).shape[-1]
    require_memory(
        4 * n_draws * len(cells) * len(factor) * width, "the states of these cells in every sample",
        "Ask for fewer draws or cells at a time.",
    )  # fmt: skip
    found = [
        torch.stack(z, 2).cpu() for z in fit._draws_of("z", cells, _worlds(cells, factor), n_draws, seed, None, True)
    ]
    return torch.cat(found, 1).numpy()


def _log_shares(
    fit: Fit, cells: Cells, factor: Factor, at: np.ndarray | None, n_draws: int, seed: int
) -> Iterator[tuple[Tensor, int]]:
    """(S, n, D, G) log2 shares in every sample, block by block, and how many cells went before."""
    before = 0
    for rho in fit._draws_of("rho", cells, _worlds(cells, factor), n_draws, seed, at, True):
        block = torch.stack([r.clamp(min=_TINY).log2() for r in rho], 2)
        yield block, before
        before += block.shape[1]


def groups_of(cells: Cells, groupby: str | None) -> dict[Any, np.ndarray]:
    """Positions of the cells of each level of a column, or of all."""
    if groupby is None:
        return {"all": np.arange(len(cells))}
    if groupby not in cells.obs.columns:
        raise ValueError(
            f'groupby: no column "{groupby}" in obs. There are: {listed(map(str, cells.obs.columns), 20)}.'
            + did_you_mean(groupby, map(str, cells.obs.columns))
        )
    column = cells.obs[groupby]
    levels = [v for v in pd.unique(column) if not pd.isna(v)]
    order = list(column.cat.categories) if isinstance(column.dtype, pd.CategoricalDtype) else sorted(levels, key=str)
    return {v: np.flatnonzero((column == v).to_numpy()) for v in order if v in set(levels)}


def profiles(
    fit: Fit, cells: Cells, groupby: str | None, at: np.ndarray | None, most: int, n_draws: int, seed: int
) -> dict[Any, np.ndarray]:
    """By group: (S, D, G) mean over its cells, ``most`` at random, of log2 shares in every sample."""
    factor = sample_factor(fit, cells)
    draw = np.random.default_rng([seed, 11])
    found = {}
    for group, rows in groups_of(cells, groupby).items():
        some = cells[np.sort(draw.permutation(rows)[:most])]
        total: Any = 0.0
        for block, _ in _log_shares(fit, some, factor, at, n_draws, seed):
            total = total + block.double().sum(1).cpu().numpy()
        found[group] = total / len(some)
    return found


def witnessed(
    fit: Fit, cells: Cells, groupby: str | None, planned: Design, least: int, most: int, n_draws: int, seed: int
) -> Iterator[tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:  # fmt: skip
    """By group: positions of the design's samples that have ``least`` cells there; draws (S, D', G) of L in these;

    y (D', G), with what their counts say; and the variance (G,) that counts give it.
    """
    factor, where = sample_factor(fit, cells), groups_of(cells, groupby)
    codes = cells.codes[factor.column].cpu().numpy()
    rows: dict[Any, np.ndarray] = {}
    without: list[str] = []
    for group, here in where.items():
        rows[group] = _witnesses(planned, codes[here], least)
        trouble = planned.trouble(rows[group])
        if trouble:
            without.append(f'"{group}" ({trouble})')
    if len(without) == len(where):
        raise ValueError(
            f"design: no group can be judged: {'; '.join(without[:3])}. Name fewer columns, or lower least= "
            f"(now {least})"
        )
    if without:
        fit._warn(f"left out, as they cannot be judged: groups {'; '.join(without)}", depth=5)
    where = {group: here for group, here in where.items() if not planned.trouble(rows[group])}
    some = np.sort(np.concatenate(list(where.values())))
    position = np.full(len(cells), -1)
    position[some] = np.arange(len(some))
    cells, codes, where = cells[some], codes[some], {group: position[here] for group, here in where.items()}
    decoded = profiles(fit, cells, groupby, None, most, n_draws, seed)
    unit = np.full(len(cells), len(where) * len(factor))  # of cells in no group or sample
    for k, here in enumerate(where.values()):
        unit[here] = np.where(codes[here] >= 0, k * len(factor) + codes[here], unit[here])
    totals = Totals.of(fit, cells, unit, seed)
    for k, group in enumerate(where):
        samples = planned.samples[rows[group]]
        ratios = [totals.log_ratio(_only(k * len(factor) + d, len(totals.seen)), None) for d in samples]
        beyond = np.stack([r.mean(0) for r, _ in ratios])
        noise = np.stack([v for _, v in ratios]).mean(0)
        draws = decoded[group][:, samples]
        yield group, rows[group], draws, draws.mean(0) + beyond, noise


def _only(unit: int, n: int) -> np.ndarray:
    return np.arange(n) == unit


# ---- distances ------------------------------------------------------------------------------


def _rms(a: np.ndarray) -> np.ndarray:
    return np.sqrt((a**2).mean(-1))


def _null(draws: np.ndarray, seed: int) -> tuple[float, float]:
    """Mean and sd of the distance of a sample from itself, between two draws (S, D, G) of the posterior."""
    draw = np.random.default_rng([seed, 13])
    n_draws, n_samples = draws.shape[:2]
    one = draw.integers(n_draws, size=_NULL_PAIRS)
    two = (one + draw.integers(1, n_draws, size=_NULL_PAIRS)) % n_draws
    at = draw.integers(n_samples, size=_NULL_PAIRS)
    centred = draws - draws.mean(1, keepdims=True)  # what all samples share is no difference of samples
    null = _rms(centred[one, at] - centred[two, at])
    return float(null.mean()), float(null.std(ddof=1))


def distances(
    fit: Fit, cells: Cells, groupby: str | None, of: str, n_draws: int, interval: float, most: int, seed: int
) -> pd.DataFrame:
    """One row a group and pair of samples; see `Fit.sample_distances`."""
    factor = sample_factor(fit, cells)
    one, two = np.triu_indices(len(factor), 1)
    names = np.array(factor.levels, dtype=object)
    rows = []
    if of == "expression":
        by_group = profiles(fit, cells, groupby, None, most, n_draws, seed)
    else:
        draw, by_group = np.random.default_rng([seed, 11]), {}
        for group, at in groups_of(cells, groupby).items():
            z = states(fit, cells[np.sort(draw.permutation(at)[:most])], n_draws, seed)
            by_group[group] = z.mean(1) * np.sqrt(z.shape[-1])  # so that a root mean square is a length
    for group, draws in by_group.items():
        each = np.stack([_rms(d[one] - d[two]) for d in draws])
        mean0, sd0 = _null(draws, seed)
        ends = np.quantile(each, [(1 - interval) / 2, (1 + interval) / 2], axis=0)
        rows.append(
            pd.DataFrame(
                {
                    "group": [group] * len(one), "sample1": names[one], "sample2": names[two],
                    "distance": each.mean(0), "sd": each.std(0, ddof=1), "lower": ends[0], "upper": ends[1],
                    "normalized": (each.mean(0) - mean0) / max(sd0, 1e-12),
                }
            )
        )  # fmt: skip
    table = pd.concat(rows, ignore_index=True)
    table.attrs |= {"of": of, "samples": list(factor.levels), "interval": interval, "uncertainty": fit._uncertainty()}
    return table


def distances_by_cell(fit: Fit, cells: Cells, of: str, n_draws: int, seed: int) -> pd.DataFrame:
    """(N, D (D - 1) / 2) posterior mean distances of every pair of samples, cell by cell."""
    factor = sample_factor(fit, cells)
    one, two = np.triu_indices(len(factor), 1)
    require_memory(8 * len(cells) * len(one), "this table", "Ask for fewer cells at a time.")
    found = []
    if of == "state":
        groups = _worlds(cells, factor)
        for z in fit._draws_of("z", cells, groups, n_draws, seed, None, True):
            stacked = torch.stack(z, 2)
            found.append(torch.stack([(stacked[:, :, a] - stacked[:, :, b]).norm(dim=-1).mean(0).cpu()
                                      for a, b in zip(one, two)], 1))  # fmt: skip
    else:
        for block, _ in _log_shares(fit, cells, factor, None, n_draws, seed):
            found.append(
                torch.stack(
                    [
                        (block[:, :, a] - block[:, :, b]).square().mean(-1).sqrt().mean(0).cpu()
                        for a, b in zip(one, two)
                    ],
                    1,
                )
            )
    names = [(factor.levels[a], factor.levels[b]) for a, b in zip(one, two)]
    columns = pd.MultiIndex.from_tuples(names, names=["sample1", "sample2"])
    return pd.DataFrame(torch.cat(found).double().numpy(), index=cells.names, columns=columns)


def sample_matrix(table: pd.DataFrame, group: Any = None, value: str = "distance") -> pd.DataFrame:
    """(D, D) distances of samples from the rows of `Fit.sample_distances`, symmetric, 0 on the diagonal.

    Parameters
    ----------
    group : a level of the table's "group"; None where there is one
    value : the column that is taken

    Raises
    ------
    ValueError
        If the group or column is not in the table, or there are several groups and none is named.
    """
    for name in ("group", "sample1", "sample2", value):
        if name not in table.columns:
            raise ValueError(f'the table has no column "{name}": pass what fit.sample_distances(...) gave')
    known = list(pd.unique(table["group"]))
    if group is None and len(known) > 1:
        raise ValueError(f"the table is of several groups: name one of {listed(known, 10)}, group=...")
    group = known[0] if group is None else group
    if group not in known:
        raise ValueError(f"group {group!r} is not in the table: {listed(known, 10)}." + did_you_mean(group, known))
    rows = table[table["group"] == group]
    names = list(pd.unique(pd.concat([rows["sample1"], rows["sample2"]])))
    names = [v for v in table.attrs.get("samples", names) if v in names]
    square = pd.DataFrame(np.zeros((len(names), len(names))), index=names, columns=names)
    for a, b, v in zip(rows["sample1"], rows["sample2"], rows[value]):
        square.loc[a, b] = square.loc[b, a] = v
    return square


def sample_tree(table: pd.DataFrame, group: Any = None, method: str = "average") -> tuple[np.ndarray, list[Any]]:
    """A tree of samples from their distances, as scipy has it: (linkage matrix (D - 1, 4), names of the leaves).

    ``scipy.cluster.hierarchy.dendrogram(tree, labels=names)`` draws it, ``fcluster(tree, 2, "maxclust")`` cuts it.

    Parameters
    ----------
    table, group : as in `sample_matrix`
    method : of ``scipy.cluster.hierarchy.linkage``
    """
    square = sample_matrix(table, group)
    return hierarchy.linkage(squareform(square.to_numpy(), checks=False), method), list(square.index)


def spread(
    fit: Fit, cells: Cells, groupby: str | None, n_draws: int, interval: float, delta: float, most: int, seed: int
) -> pd.DataFrame:
    """How much samples differ in each group, and the probability that they hardly do; see `Fit.sample_spread`."""
    rows = {}
    for group, draws in profiles(fit, cells, groupby, None, most, n_draws, seed).items():
        sd = np.sqrt(draws.var(1, ddof=1).mean(-1))
        low, high = np.quantile(sd, [(1 - interval) / 2, (1 + interval) / 2])
        rows[group] = {"sd": sd.mean(), "lower": low, "upper": high, "p_none": float((sd < delta).mean())}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = groupby or "group"
    table.attrs["delta"] = delta
    return table


# ---- covariates of samples ------------------------------------------------------------------


class Design:
    """Covariates of samples: a column of the design for each contrast, and what is held fixed beside it.

    samples : positions of the samples among the fit's, (D',)
    names : contrasts, "condition: stim" (against the first level) or "age"
    terms : name -> its columns of ``matrix``
    matrix : (D', p) without the constant
    block : (D',) codes within which samples are exchanged
    """

    def __init__(self, factor: Factor, cells: Cells, design: str | Sequence[str], block: str | None) -> None:
        self.columns = terms_of(design)
        codes = cells.codes[factor.column].cpu().numpy()
        self.samples = np.unique(codes[codes >= 0])
        obs = cells.obs
        values = {name: _by_sample(obs, name, codes, self.samples, factor) for name in self.columns}
        self.names: list[str] = []
        self.terms: dict[str, list[int]] = {}
        found: list[np.ndarray] = []
        for name, value in values.items():
            if pd.api.types.is_numeric_dtype(value) and not pd.api.types.is_bool_dtype(value):
                made = [(name, value.to_numpy(dtype=float))]
            else:
                levels = sorted(pd.unique(value), key=str)
                if isinstance(obs[name].dtype, pd.CategoricalDtype):
                    levels = [v for v in obs[name].cat.categories if v in set(levels)]
                if len(levels) < 2:
                    raise ValueError(f'design: "{name}" is {levels[0]!r} in every sample, so it explains nothing')
                made = [(f"{name}: {v}", (value == v).to_numpy(dtype=float)) for v in levels[1:]]
            self.terms[name] = list(range(len(found), len(found) + len(made)))
            self.names += [label for label, _ in made]
            found += [column for _, column in made]
        self.matrix = np.stack(found, 1)
        self.block = np.zeros(len(self.samples), dtype=int)
        if block is not None:
            self.block = pd.factorize(_by_sample(obs, block, codes, self.samples, factor))[0]
        trouble = self.trouble(np.arange(len(self.samples)))
        if trouble:
            raise ValueError(f"design: {trouble}: name fewer columns, or those that do not follow from each other")

    def fixed(self, rows: np.ndarray, without: list[int]) -> np.ndarray:
        """(D'', q) constant, blocks, and the columns besides ``without``."""
        others = [j for j in range(self.matrix.shape[1]) if j not in without]
        blocks = (self.block[rows, None] == np.unique(self.block[rows])).astype(float)
        return np.concatenate([blocks, self.matrix[rows][:, others]], 1)

    def trouble(self, rows: np.ndarray) -> str:
        """What keeps the columns from being judged in these samples; nothing where they can be."""
        if len(rows) < 3:
            return f"{len(rows)} samples with cells enough"
        whole = self.fixed(rows, [])
        rank = int(np.linalg.matrix_rank(whole))
        if rank < whole.shape[1]:
            return f"columns of {listed(self.columns)}, and blocks, cannot be told apart in its {len(rows)} samples"
        return f"{len(rows)} samples for {rank} numbers leave none to judge by" if len(rows) == rank else ""


def terms_of(design: str | Sequence[str]) -> list[str]:
    """Columns of a design: ``"condition"``, ``"~ condition + age"``, or a list of names."""
    if isinstance(design, str):
        text = design.strip().removeprefix("~")
        names = [piece.strip() for piece in text.split("+")]
    else:
        names = [str(name) for name in design]
    names = [name for name in names if name != "1"]
    if not names or not all(names):
        raise ValueError(f'design names no column: {design!r}; such as "condition" or "~ condition + age"')
    odd = [name for name in names if any(mark in name for mark in ":*^|()")]
    if odd:
        raise ValueError(
            f'design: "{odd[0]}" is not a column. Sums of columns are known, "~ condition + age"; for an interaction '
            "make a column of it"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"design names a column twice: {design!r}")
    return names


def _by_sample(obs: pd.DataFrame, name: str, codes: np.ndarray, samples: np.ndarray, factor: Factor) -> pd.Series:
    """(D',) the value of a column in each sample.

    Raises
    ------
    ValueError
        If there is no such column, it is missing somewhere, or differs within a sample.
    """
    if name not in obs.columns:
        raise ValueError(
            f'design: no column "{name}" in obs. There are: {listed(map(str, obs.columns), 20)}.'
            + did_you_mean(name, map(str, obs.columns))
        )
    column = obs[name].astype(object)
    several = {factor.levels[s]: list(pd.unique(column[codes == s])) for s in samples}
    several = {level: values for level, values in several.items() if len(values) > 1}
    if several:
        first, values = next(iter(several.items()))
        raise ValueError(
            f'design: "{name}" has {len(values)} values in sample "{first}" ({listed(values, 3)}), and more than one '
            f"in {len(several)} of {len(samples)} samples ({listed(several, 10)}): a covariate of samples has one in "
            f'each. Where donors were measured under several, a sample is a donor x "{name}": make a column of both '
            "and read the cells with it, sample=..."
        )
    found = []
    for s in samples:
        inside = pd.unique(column[codes == s])
        if pd.isna(inside[0]):
            raise ValueError(f'design: "{name}" is missing for sample "{factor.levels[s]}": leave its cells out')
        found.append(inside[0])
    return pd.Series(found).infer_objects()


def _orders(block: np.ndarray, n: int, seed: int) -> np.ndarray:
    """(n, D) random orders of samples, exchanged within blocks."""
    draw = np.random.default_rng([seed, 17])
    orders = np.tile(np.arange(len(block)), (n, 1))
    for b in np.unique(block):
        at = np.flatnonzero(block == b)
        orders[:, at] = at[draw.permuted(np.tile(np.arange(len(at)), (n, 1)), axis=1)]
    return orders


def _residual(fixed: np.ndarray) -> np.ndarray:
    """(D, D) projection off the columns of a matrix."""
    basis = linalg.orth(fixed)
    return np.eye(len(fixed)) - basis @ basis.T


def _t(
    y: np.ndarray, x: np.ndarray, off: np.ndarray, df: int, abundance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope, its standard error with a moderated variance, and degrees of freedom, gene by gene of y (D, G)."""
    own = off @ x
    length = float(own @ own)
    slope = own @ y / length
    rest = off @ y
    variance = np.maximum((rest**2).sum(0) - slope**2 * length, 0.0) / df
    variance, total = moderated(variance, df, abundance)
    return slope, np.sqrt(variance / length), np.broadcast_to(total, slope.shape)


def effects(
    fit: Fit, cells: Cells, design: str | Sequence[str], groupby: str | None, *, block: str | None, least: int,
    names: list[str], delta: float, fdr: float, n_permutations: int, n_draws: int, interval: float, most: int,
    seed: int,
) -> pd.DataFrame:  # fmt: skip
    """One row a group, contrast and gene; see `Fit.sample_effects`."""
    planned = Design(sample_factor(fit, cells), cells, design, block)
    found = []
    for group, rows, draws, y, _ in witnessed(fit, cells, groupby, planned, least, most, n_draws, seed):
        for j, name in enumerate(planned.names):
            made = _contrast(
                draws, y, planned, rows, j, list(cells.schema.genes), delta, fdr, n_permutations, interval, seed
            )
            made.insert(0, "contrast", name)
            made.insert(0, "group", group)
            found.append(made if len(names) == cells.n_genes else made[made.index.isin(names)])
    table = pd.concat(found)
    table.attrs |= {"design": planned.columns, "block": block, "delta": delta, "fdr": fdr, "interval": interval,
                    "n_permutations": n_permutations}  # fmt: skip
    return table


def _witnesses(planned: Design, codes: np.ndarray, least: int) -> np.ndarray:
    """Positions of the design's samples that have at least so many cells in a group."""
    return np.flatnonzero([(codes == s).sum() >= least for s in planned.samples])


def _contrast(
    draws: np.ndarray, y: np.ndarray, planned: Design, rows: np.ndarray, j: int, names: list[str], delta: float,
    fdr: float, n_permutations: int, interval: float, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """Effects of one column of a design on genes, from profiles (D, G) of samples, and draws of what is decoded."""
    x, abundance = planned.matrix[rows, j], 2.0 ** y.mean(0)
    fixed = planned.fixed(rows, [j])
    off = _residual(fixed)
    df = len(rows) - int(np.linalg.matrix_rank(fixed)) - 1
    slope, error, total = _t(y, x, off, df, abundance)
    by_draw = np.einsum("d,sdg->sg", off @ x, draws) / float((off @ x) @ (off @ x))
    reach = stats.t.ppf(0.5 + interval / 2, total) * error
    above = stats.t.sf((delta - slope) / error, total) + stats.t.cdf((-delta - slope) / error, total)

    size = np.abs(slope) / error
    rest, own, pooled = off @ y, np.ones(len(size)), []
    for order in _orders(planned.block[rows], n_permutations, seed):
        b, e, _ = _t(rest[order], x, off, df, abundance)
        null = np.abs(b) / e
        own += null >= size - 1e-9
        pooled.append(null)
    null = np.sort(np.concatenate(pooled))
    p_value = own / (n_permutations + 1)
    p_pooled = (1 + len(null) - np.searchsorted(null, size - 1e-9)) / (1 + len(null))
    false = stats.false_discovery_control(p_pooled)
    table = pd.DataFrame(
        {
            "lfc_mean": slope, "lfc_sd": error, "lfc_lower": slope - reach, "lfc_upper": slope + reach,
            "lfc_decoded": by_draw.mean(0), "probability": above, "log_odds": log_odds(above),
            "t": slope / error, "p_value": p_value,
            "p_pooled": p_pooled, "expected_fdp": false, "is_de": false <= fdr, "n_samples": len(rows),
        },
        index=pd.Index(names, name="gene"),
    )  # fmt: skip
    return table.sort_values(["p_pooled", "probability"], ascending=[True, False], kind="stable")


def effects_by_cell(
    fit: Fit, cells: Cells, design: str | Sequence[str], at: np.ndarray | None, names: list[str], delta: float,
    n_draws: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """(N, contrasts x genes x columns) effects in each cell, of these very samples; see `Fit.sample_effects`."""
    factor = sample_factor(fit, cells)
    planned = Design(factor, cells, design, None)
    every = np.arange(len(planned.samples))
    rows = [planned.fixed(every, [j]) for j in range(len(planned.names))]
    weights = []
    for j, fixed in enumerate(rows):
        own = _residual(fixed) @ planned.matrix[:, j]
        weights.append(own / float(own @ own))
    weight = torch.tensor(np.stack(weights), dtype=fit.program.dtype, device=fit.device)  # contrasts, samples
    require_memory(24 * len(cells) * len(weights) * len(names), "this table", "Ask for fewer genes or cells at a time.")
    chosen = torch.as_tensor(planned.samples, device=fit.device)
    found = []
    for block, _ in _log_shares(fit, cells, factor, at, n_draws, seed):
        slopes = torch.einsum("cd,sndg->sncg", weight, block.index_select(2, chosen))
        summary = (slopes.mean(0), slopes.std(0), (slopes.abs() > delta).float().mean(0))
        found.append(torch.stack(summary, -1).cpu())
    values = torch.cat(found).double().numpy()
    columns = pd.MultiIndex.from_product(
        [planned.names, names, ["lfc_mean", "lfc_sd", "probability"]], names=["contrast", "gene", None]
    )
    return pd.DataFrame(values.reshape(len(cells), -1), index=cells.names, columns=columns)


def tests(
    fit: Fit, cells: Cells, design: str | Sequence[str], groupby: str | None, *, block: str | None, least: int,
    n_permutations: int, n_draws: int, most: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """One row a group and covariate: whether all genes together say that samples differ by it."""
    planned, out = Design(sample_factor(fit, cells), cells, design, block), []
    for group, rows, _, y, noise in witnessed(fit, cells, groupby, planned, least, most, n_draws, seed):
        for name, columns in planned.terms.items():
            found = permanova(
                y / np.sqrt(noise), planned.matrix[rows][:, columns], planned.fixed(rows, columns), planned.block[rows],
                n_permutations, seed,
            )  # fmt: skip
            out.append({"group": group, "covariate": name, "n_samples": len(rows)} | found)
    return pd.DataFrame(out)


def permanova(
    y: np.ndarray, x: np.ndarray, fixed: np.ndarray, block: np.ndarray, n_permutations: int, seed: int
) -> dict[str, float]:
    """The share of the squared distances of samples that covariates explain, and its p-value by permutation.

    Parameters
    ----------
    y : (D, G) profiles of samples; x : (D, k) the covariate; fixed : (D, q) what is held fixed, a constant among it
    block : (D,) within which samples are exchanged

    Notes
    -----
    Anderson 2001 (Austral Ecology 26:32), with Euclidean distances of profiles.
    """
    off = _residual(fixed)
    own = np.linalg.qr(off @ x)[0]
    rest = off @ y
    gram = rest @ rest.T
    n_free = len(y) - int(np.linalg.matrix_rank(fixed)) - x.shape[1]

    def ratio(order: np.ndarray) -> tuple[float, float]:
        g = off @ gram[np.ix_(order, order)] @ off
        explained, total = float(np.trace(own.T @ g @ own)), float(np.trace(g))
        return explained / x.shape[1] / max((total - explained) / n_free, 1e-300), explained / max(total, 1e-300)

    f, r2 = ratio(np.arange(len(y)))
    null = np.array([ratio(order)[0] for order in _orders(block, n_permutations, seed)])
    return {
        "r2": r2, "f": f, "p_value": (1 + int((null >= f * (1 - 1e-9)).sum())) / (1 + n_permutations),
        "null_median": float(np.median(null)), "null_95": float(np.quantile(null, 0.95)),
    }  # fmt: skip


# ---- where cells are ------------------------------------------------------------------------


def log_densities(fit: Fit, cells: Cells, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) at each cell's state: log of the mean over a sample's other cells of their q(u | x), and the largest."""
    if fit.schema.sample is None:
        raise ProgramError("this fit has no samples: Cells.from_anndata(adata, sample=...)")
    codes = cells.codes[fit.schema.sample.column].cpu()
    parts = fit._of_state(cells, seed, lambda law: torch.stack([law.mean, law.variance.sqrt()]))
    loc, scale = torch.cat(parts, 1).double()
    n, n_samples = len(loc), fit.schema.n_samples
    mean, largest = torch.full((n, n_samples), -torch.inf).double(), torch.full((n, n_samples), -torch.inf).double()
    constant = -scale.log().sum(1) - 0.5 * loc.shape[1] * np.log(2 * np.pi)
    weight = scale**-2
    step = max(1, int(_AT_ONCE // max(n, 1)))
    for first in range(0, n, step):
        here = loc[first : first + step]
        # (x - m)^2 / s^2 summed over dimensions, as products of matrices
        apart = (here**2) @ weight.T - 2 * here @ (loc * weight).T + (loc**2 * weight).sum(1)
        log = constant - 0.5 * apart.clamp(min=0)
        own = torch.arange(len(here))
        log[own, first + own] = -torch.inf  # a cell is no witness of itself
        for d in range(n_samples):
            inside = codes == d
            if not bool(inside.any()):
                continue
            of_sample = log[:, inside]
            others = inside.sum() - (codes[first : first + step] == d).long()
            mean[first : first + step, d] = of_sample.logsumexp(1) - others.clamp(min=1).log()
            largest[first : first + step, d] = of_sample.amax(1)
    return mean.numpy(), largest.numpy()


def abundance(
    fit: Fit, cells: Cells, column: str, group1: Any, group2: Any, block: str | None, n_permutations: int, fdr: float,
    seed: int,
) -> pd.DataFrame:  # fmt: skip
    """One row a cell: how much denser one group of samples is about its state; see `Fit.differential_abundance`."""
    factor = fit.schema.sample
    if factor is None:
        raise ProgramError("this fit has no samples: Cells.from_anndata(adata, sample=...)")
    codes = cells.codes[factor.column].cpu().numpy()
    samples = np.unique(codes[codes >= 0])
    value = _by_sample(cells.obs, column, codes, samples, factor)
    levels = list(pd.unique(value))
    for name, level in (("group1", group1), ("group2", group2)):
        if level is not None and level not in levels:
            raise ValueError(f'{name}: "{column}" is {level!r} in no sample. There are: {listed(levels, 10)}.')
    if group1 is None or (group2 is None and len(levels) < 2):
        raise ValueError(f'name group1, a level of "{column}": {listed(levels, 10)}')
    first = (value == group1).to_numpy()
    second = (value == group2).to_numpy() if group2 is not None else ~first
    rows = np.flatnonzero(first | second)
    if min(first.sum(), second.sum()) < 2:
        raise ValueError(
            f"abundance is judged by how samples of a group differ: {int(first.sum())} and {int(second.sum())} samples "
            "are too few, give two of each at least"
        )
    blocks = np.zeros(len(samples), dtype=int)
    if block is not None:
        blocks = pd.factorize(_by_sample(cells.obs, block, codes, samples, factor))[0]
    mean, _ = log_densities(fit, cells, seed)
    mean = mean[:, samples[rows]]
    top = mean.max(1, keepdims=True)
    density = np.exp(mean - np.where(np.isfinite(top), top, 0.0))  # by cell, up to a constant that ratios lose
    floor = density.sum(1, keepdims=True) * 1e-6 + 1e-300

    def log_ratio(is_first: np.ndarray) -> np.ndarray:
        one, two = density[:, is_first].mean(1, keepdims=True), density[:, ~is_first].mean(1, keepdims=True)
        return (np.log2(one + floor) - np.log2(two + floor))[:, 0]

    own = first[rows]
    seen = log_ratio(own)
    count, largest = np.ones(len(seen)), []
    for order in _orders(blocks[rows], n_permutations, seed):
        null = np.abs(log_ratio(own[order]))
        count += null >= np.abs(seen) - 1e-9
        largest.append(null.mean())
    p_value = count / (n_permutations + 1)
    table = pd.DataFrame({"lfc": seen, "p_value": p_value}, index=cells.names)
    table["expected_fdp"] = stats.false_discovery_control(p_value)
    table["is_da"] = table["expected_fdp"] <= fdr
    overall = (1 + int((np.array(largest) >= np.abs(seen).mean() - 1e-9).sum())) / (n_permutations + 1)
    table.attrs |= {"column": column, "p_overall": overall, "n_permutations": n_permutations, "fdr": fdr,
                    "n1": int(own.sum()), "n2": int((~own).sum())}  # fmt: skip
    return table


def admissible(fit: Fit, cells: Cells, level: float, seed: int) -> pd.DataFrame:
    """(N, D) whether a cell of such a state is found in a sample; see `Fit.admissible_samples`."""
    _, largest = log_densities(fit, cells, seed)
    factor: Any = fit.schema.sample
    codes = cells.codes[factor.column].cpu().numpy()
    known = np.flatnonzero(codes >= 0)
    own = largest[known, codes[known]]
    limit = float(np.quantile(own[np.isfinite(own)], level)) if np.isfinite(own).any() else -np.inf
    table = pd.DataFrame(largest >= limit, index=cells.names, columns=list(factor.levels))
    table.attrs |= {"limit": limit, "level": level}
    return table
