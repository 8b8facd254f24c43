"""Which story predicts better, like with like.

Stories with other likelihoods or libraries give densities of different things (a story that takes the total as
known never predicts it), so they are compared by what they say of counts they have not seen: each count of the
test cells is kept with probability e, the guide reads those kept, and the dropped ones are scored by their
exact law given the kept ones and the latent state,

    log mean_s p(x2 | x1, z_s),   z_s ~ q(z | x1)

    NB:       shape d + x1, mean (1-e) mu (d + x1) / (d + e mu)
    Poisson:  mean (1-e) mu
    ZINB:     as NB, with the gate's posterior given x1

(Thinned Poisson parts are independent; those of an NB depend on each other through the rate, which is why x1
stays in the law.) The fits must have been trained on cells thinned alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from ..cells import Cells
from ..draws import by_draws
from ..errors import ProgramError
from ..guides import law_of
from ..posterior import Fit
from ..schema import column_of, listed

SCORES = ("thinned", "importance")

_RETRAIN = (
    "To compare likelihoods or libraries, fit each on thinned cells: "
    "kept, _ = train.thin(0.5); pyrosc.fit(program, kept)"
)


def compare(
    fits: Mapping[str, Fit] | Sequence[Fit],
    cells: Cells | anndata.AnnData,
    *,
    by: str | None = None,
    score: str | None = None,
    n_draws: int | None = None,
    interval: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank fits by how well they predict cells they were not fitted to.

    Parameters
    ----------
    fits : by name, or a list (then named by their place)
    cells : test cells as measured, which no fit has seen
        The very cells of a fit are refused; an overlap is not noticed.
    by : column of ``obs`` whose levels are the independent units (donors): differences are clustered by it
        None takes the sample column where there is one, else each cell for itself.
    score : "thinned" (fits trained on ``cells.thin(e)[0]``), or "importance", the importance-weighted
        log p(x), for fits with the same likelihood and library; None takes the one that can be had
    n_draws : S, draws of the latent state; None takes 50 ("thinned") or 1000 ("importance")
    interval : probability of the interval of a difference

    Returns
    -------
    DataFrame
        One row a fit, best first: ``score`` (nats a cell), ``difference`` from the best, its ``se``, ``lower`` and
        ``upper`` (paired over cells, clustered, Student t), and ``verdict``: "best", "tied" where the interval
        holds 0, else "worse". ``.attrs`` says which score, how many cells and units. Random through ``seed``,
        which fixes the thinning: all fits predict the same counts from the same counts.

    Raises
    ------
    ValueError
        If the fits cannot be compared: other genes, thinned differently, or trained on full counts with
        different likelihoods or libraries; the text says how to fit them.

    Notes
    -----
    The difference is that of two fits, which also differ by the luck of their starting weights: for a claim about
    stories compare several seeds of each.
    """
    named = _named(fits)
    first = next(iter(named.values()))
    for name, fit in named.items():
        if fit.schema.genes != first.schema.genes:
            raise ValueError(
                f'"{name}" was fitted to other genes than "{next(iter(named))}", or to them in another order'
            )
    score = _score(named, score)
    if not 0 < interval < 1:
        raise ValueError(f"interval must be between 0 and 1, not {interval!r}")
    cells = Cells.align(cells, first.schema)
    units, by = _units(cells, by, first)
    _unseen(named, cells)
    if score == "thinned":
        found = {n: thinned_log_likelihood(f, cells, n_draws or 50, seed=seed) for n, f in named.items()}
    else:
        found = {n: f.log_likelihood(cells, n_draws or 1000, seed=seed) for n, f in named.items()}
    order = sorted(found, key=lambda n: -found[n].mean())
    rows = []
    for name in order:
        mean, se, lower, upper = paired(found[name] - found[order[0]], units, interval)
        verdict = "best" if name == order[0] else "tied" if lower <= 0 <= upper else "worse"
        rows.append((float(found[name].mean()), mean, se, lower, upper, verdict))
    columns = ["score", "difference", "se", "lower", "upper", "verdict"]
    table = pd.DataFrame(rows, index=pd.Index(order, name="fit"), columns=columns)
    table.attrs = {"score": score, "n_cells": len(cells), "by": by, "n_units": len(np.unique(units))}
    return table


def thinned_log_likelihood(fit: Fit, cells: Cells | anndata.AnnData, n_draws: int = 50, *, seed: int = 0) -> np.ndarray:
    """(N,) log probability, in nats, of the counts of each cell that thinning drops, given those it keeps.

    ``cells`` are as measured; they are thinned by the share that the fit's training cells were
    (``fit.settings["kept"]``). Random through ``seed``, which fixes the thinning for every fit.

    Raises
    ------
    ValueError
        If the fit was trained on full counts, the cells are thinned already, or the law of the counts has
        no ``rest_given``.
    """
    fraction = fit.settings.get("kept", 1.0)
    if not 0 < fraction < 1:
        raise ValueError(f"this fit was trained on full counts. {_RETRAIN}")
    cells = Cells.align(cells, fit.schema)
    if cells.kept != 1:
        raise ValueError("these cells are thinned already; pass them as they were measured")
    kept, rest = cells.thin(fraction, seed=seed)

    def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
        law = dropped(fit, trace, fraction)
        rows: Any = block._rows
        held: Any = rest.rows(rows.cpu(), whole=True).to(fit.device).x
        value = law.to_event(1).log_prob(held)
        return value.reshape(-1, len(block))

    ready = fit._ready(kept)
    draws = by_draws(fit.program, ready, [[ready]], n_draws, seed, ask)
    return torch.cat([d.logsumexp(0) - np.log(len(d)) for (d,) in draws]).double().cpu().numpy()


def require_thinned_alike(fit: Fit, kept: Cells, seed: int) -> None:
    """Thinned cells of a fit are those that it was trained on: else counts that it has seen would be predicted.

    Raises
    ------
    ValueError
        If they have the names of the training cells and other counts.
    """
    then = fit.settings.get("fingerprint") or {}
    if then.get("cells") != len(kept):
        return
    now = kept.fingerprint()
    if now["names"] == then["names"] and now["counts"] != then["counts"]:
        raise ValueError(
            f"these are the cells of the fit, thinned otherwise: with seed={seed} a part of what is to be predicted "
            "would be counts that it was trained on. Pass the seed= of cells.thin, or cells that it has not seen"
        )


def dropped(fit: Fit, trace: poutine.Trace, fraction: float) -> Any:
    """Law of the counts that thinning dropped, given those of a run that it kept.

    Raises
    ------
    ProgramError
        If the story has no counts.
    ValueError
        If their law does not know what is left of it.
    """
    if "x" not in trace.nodes:
        raise ProgramError(f'{fit.program.story} has no site "x" of counts, so there is nothing to predict')
    site: Any = trace.nodes["x"]
    law = site["fn"].base_dist if hasattr(site["fn"], "base_dist") else site["fn"]
    if not hasattr(law, "rest_given"):
        raise ValueError(
            f"the law of the counts, {type(law).__name__}, has no method rest_given(kept, fraction): what thinning "
            "drops, given what it keeps. Write one; or use fits on full counts (those of the same likelihood and "
            "library are compared by their log p(x))."
        )
    return law.rest_given(site["value"], fraction)


def paired(difference: np.ndarray, units: np.ndarray, interval: float = 0.95) -> tuple[float, float, float, float]:
    """Mean of differences (N,), its standard error clustered by units (N,), and a Student t interval.

    The variance is D / (D - 1) sum_d (sum_{i in d} (x_i - mean))^2 / N^2 for D units, with D - 1 degrees of
    freedom; with a unit for each cell it is the usual one.
    """
    mean = float(difference.mean())
    _, unit = np.unique(units, return_inverse=True)
    sums = np.bincount(unit, difference - mean)
    n_units = len(sums)
    se = float(np.sqrt(n_units / (n_units - 1) * (sums**2).sum()) / len(difference))
    reach = float(stats.t.ppf(0.5 + interval / 2, n_units - 1)) * se
    return mean, se, mean - reach, mean + reach


def _named(fits: Mapping[str, Fit] | Sequence[Fit]) -> dict[str, Fit]:
    if isinstance(fits, Fit):
        raise TypeError("compare takes several fits: a dict by name, or a list")
    named = dict(fits) if isinstance(fits, Mapping) else {f"fit {i}": fit for i, fit in enumerate(fits)}
    wrong = [f"{n} ({type(f).__name__})" for n, f in named.items() if not isinstance(f, Fit)]
    if wrong:
        raise TypeError(f"compare takes fits, as pyrosc.fit gives them; not {listed(wrong)}")
    if len(named) < 2:
        raise ValueError(f"there is nothing to compare: {len(named)} fit")
    return named


def _kind(fit: Fit) -> tuple[str, str]:
    """What makes densities of two fits comparable: the law of the counts, and whether the total is taken as known."""
    program = fit.program
    with program.driven(0), torch.no_grad():
        nodes: dict[str, Any] = poutine.trace(program.model).get_trace(program.blank(3)).nodes
    law = law_of(nodes["x"]["fn"]) if "x" in nodes else "no counts"
    if "library" not in nodes:  # it may or may not read the total: comparable within this story only
        return law, f"library as in {program.story}"
    return law, "known library" if nodes["library"]["is_observed"] else "latent library"


def _score(named: dict[str, Fit], score: str | None) -> str:
    if score is not None and score not in SCORES:
        raise ValueError(f'score must be "thinned", "importance" or None, not {score!r}')
    kept = {name: round(fit.settings.get("kept", 1.0), 9) for name, fit in named.items()}
    if len(set(kept.values())) > 1:
        shares = ", ".join(f"{n}: {k:g}" for n, k in kept.items())
        raise ValueError(f"the fits were trained on cells thinned to different shares ({shares}). {_RETRAIN}")
    is_thinned = next(iter(kept.values())) < 1
    kinds = {name: _kind(fit) for name, fit in named.items()}
    if score is None:
        score = "thinned" if is_thinned else "importance"
    if score == "thinned" and not is_thinned:
        raise ValueError(f"these fits were trained on full counts. {_RETRAIN}")
    if score == "importance" and len(set(kinds.values())) > 1:
        found = "; ".join(f'"{n}": {", ".join(kind)}' for n, kind in kinds.items())
        raise ValueError(f"log p(x) of other likelihoods or libraries cannot be compared ({found}). {_RETRAIN}")
    if score == "importance" and is_thinned:
        raise ValueError(
            'these fits were trained on thinned cells: score="thinned" predicts the rest of the test cells'
        )
    return score


def _units(cells: Cells, by: str | None, fit: Fit) -> tuple[np.ndarray, str]:
    if by is None:
        if fit.schema.sample is None or not bool((cells.sample >= 0).all()):
            if len(cells) < 2:
                raise ValueError("differences are judged over cells: give at least two")
            return np.arange(len(cells)), "cell"
        by = fit.schema.sample.column
    units = column_of(cells.obs, by, "by").astype(str).to_numpy()
    if len(np.unique(units)) < 2:
        raise ValueError(f'by="{by}" has one level in these cells; differences are judged by at least two')
    return units, by


def _unseen(named: dict[str, Fit], cells: Cells) -> None:
    now = cells.fingerprint()
    seen = []
    for name, fit in named.items():
        then = fit.settings.get("fingerprint") or {}
        same_counts = fit.settings.get("kept", 1.0) < 1 or then.get("counts") == now["counts"]
        if then.get("names") == now["names"] and same_counts:
            seen.append(name)
    if seen:
        raise ValueError(f"these are the cells that {listed(seen)} was fitted to: pass cells that were held out")
