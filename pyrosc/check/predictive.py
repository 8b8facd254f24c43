"""Predictive checks: do counts that the story makes up look like those that were measured?

For a statistic T, observed counts x and replicates x_1..x_S from the predictive distribution, the two-sided p-value is

    p = min(1, 2 min(P+, P-)),   P+ = (1 + #{T(x_s) >= T(x)}) / (S + 1),   P- with <=

(Gelman, Meng and Stern 1996, Statistica Sinica 6:733). A fit that was trained on thinned counts is checked on what
thinning dropped, given what it kept: nothing is used twice, and p-values of a true story are uniform. A fit on full
counts is checked on the counts that its states are read from, which draws p-values towards the middle: a small one
still says that something is wrong, a large one less that all is well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from ..cells import Cells
from ..counts import require_memory
from ..draws import by_draws
from ..parts import whole
from ..posterior import Fit, require_fit
from ..program import Program
from ..schema import did_you_mean, listed
from .compare import dropped, require_thinned_alike

Statistic = Callable[[np.ndarray], Any]


def _fano(x: np.ndarray) -> np.ndarray:
    mean = x.mean(0)
    return np.divide(x.var(0), mean, out=np.ones_like(mean), where=mean > 0)


def _top_correlation(x: np.ndarray) -> np.ndarray:
    """Correlations of log1p counts among the 50 genes of largest mean, the mean of their sizes."""
    top = np.argsort(-x.mean(0), kind="stable")[:50]
    logs = np.log1p(x[:, top])
    spread = logs.std(0)
    logs = logs[:, spread > 0]
    if logs.shape[1] < 2:
        return np.array(0.0)
    found = np.corrcoef(logs.T)
    return np.abs(found[np.triu_indices(len(found), 1)]).mean()


STATISTICS: dict[str, tuple[str, Statistic]] = {
    "zero fraction": ("gene", lambda x: (x == 0).mean(0)),
    "mean": ("gene", lambda x: x.mean(0)),
    "variance": ("gene", lambda x: x.var(0)),
    "Fano factor": ("gene", _fano),
    "maximum": ("gene", lambda x: x.max(0)),
    "library size": ("cell", lambda x: x.sum(1)),
    "detected genes": ("cell", lambda x: (x > 0).sum(1)),
    "top-gene correlation": ("all", _top_correlation),
}
_AT_ONCE = 2**27  # counts of replicates held at a time: half a gigabyte


def posterior_predictive(
    fit: Fit,
    cells: Cells | anndata.AnnData,
    statistics: Sequence[str] | Mapping[str, Statistic] | None = None,
    *,
    n_draws: int = 200,
    by: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Statistics of the counts beside those of new counts of the same cells.

    Parameters
    ----------
    cells : preferably ones that the fit has not seen
        For a fit that was trained on ``cells.thin(...)`` as they were measured: they are thinned alike here.
    statistics : names, or functions of your own by name; None for all of ours
        Ours: "zero fraction", "mean", "variance", "Fano factor", "maximum" of each gene; "library size" and "detected
        genes" of each cell; "top-gene correlation". A function takes counts (N, G) and answers a number, one a gene
        (G,) or one a cell (N,).
    n_draws : S, of replicates
    by : a column of ``obs``: statistics are taken within each of its levels
    seed : draws are random through it

    Returns
    -------
    DataFrame
        "statistic", "of" ("gene", "cell" or "all"), "name", with ``by`` "level"; "observed", "q05", "q50", "q95" of
        the replicates, "p" two-sided, at least 2 / (S + 1). ``.attrs["counts"]`` is "dropped by thinning" or "used
        twice".

    Raises
    ------
    ValueError
        If a statistic is unknown or answers another shape, a replicate would not fit into memory, or these are the
        cells of the fit and another ``seed`` thins them otherwise than they were.
    """
    require_fit(fit)
    n_draws = whole("n_draws", n_draws, 20)
    ready, observed, fraction = _halves(fit, cells, seed)
    if fraction < 1:
        replicates = _dropped(fit, ready, observed, fraction, n_draws, seed)
    else:
        replicates = _predicted(fit, ready, n_draws, seed)
    table = _compared(observed, replicates, statistics, n_draws, by)
    table.attrs = {"counts": _how(fraction), "n_draws": n_draws}
    return table


def _halves(fit: Fit, cells: Cells | anndata.AnnData, seed: int) -> tuple[Cells, Cells, float]:
    """Cells to read the state from, those to judge, and the share that the former kept: 1 if they are the same."""
    fraction: float = fit.settings.get("kept", 1.0)
    if fraction == 1:
        ready = fit._ready(cells)
        return ready, ready, 1.0
    given = Cells.align(cells, fit.schema)
    if given.kept != 1:
        raise ValueError("these cells are thinned already; pass them as they were measured")
    kept, rest = given.thin(fraction, seed=seed)
    require_thinned_alike(fit, kept, seed)
    return fit._ready(kept), rest, fraction


def _how(fraction: float) -> str:
    return "dropped by thinning" if fraction < 1 else "used twice"


def pit(
    fit: Fit, cells: Cells | anndata.AnnData, *, n_draws: int = 50, zeros: float = 0.05, seed: int = 0
) -> pd.DataFrame:
    """Randomised probability integral transforms: where counts lie in the laws that predict them.

    u = F(x - 1) + v (F(x) - F(x - 1)), v uniform, for F the mean over draws of the laws of a count, is uniform if the
    laws are right (Czado, Gneiting and Held 2009, Biometrics 65:1254). Heaps at both ends say that laws are too narrow.

    Parameters
    ----------
    cells : as for `posterior_predictive`: of a fit to thinned counts, what thinning dropped is judged given the rest
    n_draws : S
    zeros : share of zero counts that are looked at in the histogram, where they would hide all else

    Returns
    -------
    DataFrame
        One row a gene: "mean" of u (0.5), "ks", the Kolmogorov-Smirnov distance of its cells from uniform, and "p" of
        that; ``.attrs["histogram"]`` (20,) shares of u by twentieths over counts of all genes, of zeros a part;
        ``.attrs["counts"]`` as for `posterior_predictive`.

    Raises
    ------
    ProgramError
        If the law of the counts is none of ours.
    """
    require_fit(fit)
    from ..prediction import law_of_counts, tails

    n_draws = whole("n_draws", n_draws, 1)
    if not 0 < zeros <= 1:
        raise ValueError(f"zeros must be above 0 and at most 1, not {zeros!r}")
    kept, rest, fraction = _halves(fit, cells, seed)

    def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
        law = dropped(fit, trace, fraction) if fraction < 1 else law_of_counts(fit, trace)
        law = law.expand(torch.Size((n or 1, len(block), law.batch_shape[-1])))
        rows: Any = block._rows
        x: Any = rest.rows(rows.cpu(), whole=True).x if fraction < 1 else block.x
        value = x.cpu().double().numpy()
        ends = [tails(law, v)[0].mean(0) for v in (value - 1, value)]
        return torch.from_numpy(np.stack(ends, -1)).unsqueeze(0)

    draw = np.random.default_rng([seed, 6])
    found, counted = [], np.zeros(20)
    for (ends,) in fit._runs(kept, [[kept]], max(n_draws, len(fit.members)), seed, ask):
        low, high = ends.mean(0).numpy().transpose(2, 0, 1)
        u = low + draw.uniform(size=low.shape) * (high - low)
        found.append(u.astype(np.float32))
        looked = (low > 0) | (draw.uniform(size=low.shape) < zeros)
        counted += np.histogram(u[looked], 20, (0, 1))[0]
    every = np.concatenate(found)
    ks = stats.kstest(every, "uniform", axis=0)
    table = pd.DataFrame(
        {"mean": every.mean(0), "ks": ks.statistic, "p": ks.pvalue}, index=pd.Index(fit.schema.genes, name="gene")
    )
    table.attrs = {"histogram": counted / counted.sum(), "counts": _how(fraction), "n_draws": n_draws}
    return table


def prior_predictive(
    program: Program | Fit,
    cells: Cells | anndata.AnnData,
    statistics: Sequence[str] | Mapping[str, Statistic] | None = None,
    *,
    n_draws: int = 50,
    by: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The same for cells that the story makes up from its prior, with the columns and totals of these cells.

    Before a fit it shows what starting values imply; after one, holes of the prior of states that no cell falls into
    (sites that all cells share are then drawn from their posterior).
    """
    n_draws = whole("n_draws", n_draws, 20)
    story = program.program if isinstance(program, Fit) else program
    ready = Cells.align(cells, story.schema)

    from ..prediction import shared_draw

    _at_once(ready, n_draws)  # refused where one replicate would not fit

    def made() -> Iterator[np.ndarray]:
        for s in range(n_draws):
            mixed = int(np.random.SeedSequence([seed, s]).generate_state(1)[0])
            shared = shared_draw(program, mixed) if isinstance(program, Fit) else None
            yield story.generate(ready, fixed=shared, seed=mixed)["x"].numpy()

    table = _compared(ready, made(), statistics, n_draws, by)
    table.attrs = {"counts": "prior", "n_draws": n_draws}
    return table


def _at_once(cells: Cells, n_draws: int) -> list[int]:
    """Numbers of replicates to make at a time."""
    require_memory(16 * len(cells) * cells.n_genes, "a replicate of these cells", "Take fewer cells: cells[:1000].")
    size = max(1, min(n_draws, _AT_ONCE // max(len(cells) * cells.n_genes, 1)))
    return [min(size, n_draws - start) for start in range(0, n_draws, size)]


def _predicted(fit: Fit, cells: Cells, n_draws: int, seed: int) -> Iterator[np.ndarray]:
    for k, n in enumerate(_at_once(cells, n_draws)):
        drawn = fit.predict(cells, max(n, len(fit.members)), seed=seed + k)
        # Draws come member by member: fewer than there are members are taken at random.
        some = np.random.default_rng(seed + k).permutation(len(drawn))[:n] if n < len(drawn) else np.arange(n)
        yield from drawn[some]


def _dropped(fit: Fit, kept: Cells, rest: Cells, fraction: float, n_draws: int, seed: int) -> Iterator[np.ndarray]:
    """Replicates of what thinning dropped, given what it kept."""

    def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
        drawn = dropped(fit, trace, fraction).sample()
        return drawn.reshape(-1, len(block), drawn.shape[-1])

    programs = fit.members or (fit.program,)
    for k, n in enumerate(_at_once(kept, n_draws)):
        for m, program in enumerate(programs):
            mine = len(range(m, n, len(programs)))
            if mine:
                found = by_draws(program, kept, [[kept]], mine, seed + 1000 * m + k, ask)
                yield from torch.cat([d.cpu() for (d,) in found], 1).numpy()


def _chosen(statistics: Sequence[str] | Mapping[str, Statistic] | None) -> dict[str, tuple[str | None, Statistic]]:
    if statistics is None:
        return dict(STATISTICS)
    if isinstance(statistics, Mapping):
        for name, function in statistics.items():
            if not callable(function):
                raise TypeError(f'statistics["{name}"] must be a function of counts (N, G), not {function!r}')
        return {name: (None, function) for name, function in statistics.items()}
    names = [statistics] if isinstance(statistics, str) else list(statistics)
    for name in names:
        if name not in STATISTICS:
            known = list(STATISTICS)
            raise ValueError(f'there is no statistic "{name}"; ours: {listed(known, 10)}.' + did_you_mean(name, known))
    return {name: STATISTICS[name] for name in names}


def _compared(
    cells: Cells, replicates: Iterator[np.ndarray], statistics: Any, n_draws: int, by: str | None
) -> pd.DataFrame:
    asked = _chosen(statistics)
    levels = _levels(cells, by)
    x: Any = cells.to("cpu").x
    observed = _answers(x.numpy(), asked, levels, cells)
    drawn: dict[Any, list[np.ndarray]] = {key: [] for key in observed}
    for replicate in replicates:
        for key, (_, value) in _answers(replicate, asked, levels, cells).items():
            drawn[key].append(value)
    frames = []
    for (name, level), (of, value) in observed.items():
        made = np.stack(drawn[name, level])
        low, middle, high = np.quantile(made, [0.05, 0.5, 0.95], axis=0)
        above, below = ((1 + side.sum(0)) / (len(made) + 1) for side in (made >= value, made <= value))
        names = cells.schema.genes if of == "gene" else cells.names[levels[level]] if of == "cell" else [""]
        frames.append(pd.DataFrame({
            "statistic": name, "of": of, "name": list(names), **({} if by is None else {"level": level}),
            "observed": np.atleast_1d(value), "q05": np.atleast_1d(low), "q50": np.atleast_1d(middle),
            "q95": np.atleast_1d(high), "p": np.minimum(1.0, 2 * np.minimum(above, below)),
        }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def _levels(cells: Cells, by: str | None) -> dict[Any, np.ndarray]:
    """Masks (N,) of the cells of each level."""
    if by is None:
        return {None: np.ones(len(cells), dtype=bool)}
    if by not in cells.obs.columns:
        raise ValueError(f'by: there is no column "{by}".' + did_you_mean(by, cells.obs.columns))
    column = cells.obs[by]
    return {level: (column == level).to_numpy() for level in sorted(column.dropna().unique(), key=str)}


def _answers(
    x: np.ndarray, asked: Mapping[str, tuple[str | None, Statistic]], levels: Mapping[Any, np.ndarray], cells: Cells
) -> dict[Any, tuple[str, np.ndarray]]:
    found = {}
    for name, (of, function) in asked.items():
        for level, mask in levels.items():
            part = x if mask.all() else x[mask]
            value = np.asarray(function(part), dtype=float)
            shapes = {(cells.n_genes,): "gene", (len(part),): "cell", (): "all"}
            if value.shape not in shapes:
                raise ValueError(
                    f'statistic "{name}" answered shape {value.shape} for counts {part.shape}; it must be a number, '
                    "one a gene or one a cell"
                )
            found[name, level] = (of or shapes[value.shape], value)
    return found
