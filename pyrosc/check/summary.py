"""The checks that a minute affords, in one table: what was found, what it is held against, and what to do.

    training      has the KL weight come to 1, and had the held-out ELBO come to rest?
    latent use    do latents vary over cells?
    prior         can states of cells be told from draws of the prior?
    calibration   are ranks of simulated truths uniform among the guide's draws?
    coverage      do 90 % regions of the guide hold 90 % of simulated truths?
    guide         are draws for these cells good enough to be reweighed?
    amortisation  how much better is the best of the guide's family, cell by cell?
    family        how much better than that is a guide with a full covariance?
    zeros, variance, correlation   do new counts look like those seen?

Each has its own function in `check`, with more draws and more to say. Remedies go by what a symptom usually comes from.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..cells import Cells
from ..errors import ProgramError, PyroscWarning
from ..isolation import checked_seed
from ..posterior import Fit, require_fit
from .calibration import calibration
from .importance import importance
from .latent import ACTIVE, latent
from .predictive import posterior_predictive

_WORK = 2.5e8  # densities of single counts that one check may take: some ten seconds of one core
_DRAWS = 49  # of a simulated cell
_USABLE = 0.95  # of cells
_GAP = 1.0  # nats
_HOLE = 0.65  # area under the curve
_EXCESS = 2.0  # times the 5 % of genes that are beyond by chance

_REFINE = "fit.refine(cells) for these, fit.train_guide(cells) for any"
_WEIGH = "importance=1000 in fit.draws, fit.expression, fit.differential_expression"


def summary(
    fit: Fit, cells: Cells | anndata.AnnData, *, seed: int = 0, show: bool = True, progress: bool = True
) -> pd.DataFrame:
    """Run the checks that are quick, and say what to do.

    Parameters
    ----------
    cells : preferably ones that the fit has not seen; 20 at least
        Of many, each check takes a part, drawn at random.
    seed : draws and choices are random through it
    show : whether to print the table
    progress : whether to show a bar

    Returns
    -------
    DataFrame
        One row a check: "statistic" (what it is), "value", "reference" (what it is held against), "verdict" ("ok",
        "look" or "fails"; "not run" with the reason in "advice"), "advice", "seconds". ``.attrs["seed"]``.

    Raises
    ------
    ValueError
        If there are fewer than 20 cells.

    Notes
    -----
    The work of a check is bounded, not its error: small numbers of simulated cells see gross faults. "look" is for what
    may be chance or may not matter. The prior's row needs scikit-learn. Fits whose story sums over labels or has global
    sites are judged given the labels' law and one draw of those sites.
    """
    require_fit(fit)
    seed = checked_seed(seed)
    ready = fit._ready(cells)
    if len(ready) < 20:
        raise ValueError(f"summary looks at many cells: give at least 20, not {len(ready)}")
    order = np.random.default_rng([seed, 11]).permutation(len(ready))

    def some(per_cell: float, most: int) -> Cells:
        """So many cells that the work stays within its bound."""
        n = int(np.clip(_WORK / (per_cell * ready.n_genes), 20, most))
        return ready[np.sort(order[:n])]

    run = _Run(fit, some, seed)
    rows = []
    with tqdm(total=len(_CHECKS), desc="summary", unit="check", disable=not progress) as bar:
        for check in _CHECKS:
            began = time.perf_counter()
            found = _tried(check, run)
            seconds = (time.perf_counter() - began) / max(len(found), 1)
            rows += [(*astuple(row), seconds) for row in found]
            bar.update()
    table = pd.DataFrame(
        rows, columns=["check", "statistic", "value", "reference", "verdict", "advice", "seconds"]
    ).set_index("check")
    table.attrs = {"seed": seed, "n_cells": len(ready), "story": fit.program.story}
    if show:
        print(text(table))
    return table


def text(table: pd.DataFrame) -> str:
    """The table of `summary` as it is printed: a line a check, and what to do about those that are not well."""
    rows = [("check", "found", "held against", "verdict")]
    found: list[dict[str, Any]] = [{"check": name} | dict(row) for name, row in table.iterrows()]
    for r in found:
        rows.append((r["check"], f"{r['statistic']} {_number(r['value'])}".strip(), r["reference"], r["verdict"]))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(v.ljust(w) for v, w in zip(row, widths)).rstrip() for row in rows]
    advice = [f"{r['check']}: {r['advice']}" for r in found if r["advice"]]
    return "\n".join([*lines, "", *advice] if advice else lines)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


@dataclass
class Row:
    """What one check found; advice is left out where all is well."""

    check: str
    statistic: str
    value: float
    reference: str
    verdict: str
    advice: str

    @classmethod
    def judged(cls, check: str, statistic: str, value: float, reference: str, ok: bool, look: bool, advice: str) -> Row:
        """ "ok", else "look" where it may be chance or not matter, else "fails"."""
        return cls(
            check, statistic, value, reference, "ok" if ok else "look" if look else "fails", "" if ok else advice
        )

    @classmethod
    def not_run(cls, check: str, why: str) -> Row:
        return cls(check, "", math.nan, "", "not run", why)


@dataclass
class _Run:
    """What the checks of one call share."""

    fit: Fit
    some: Callable[[float, int], Cells]
    seed: int


def _tried(check: Callable[[_Run], list[Row]], run: _Run) -> list[Row]:
    """A check's rows, or why it could not be run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        try:
            return check(run)
        except (ProgramError, ImportError, ValueError) as error:
            return [Row.not_run(check.__name__.strip("_"), str(error).split(". ")[0])]


def _training(run: _Run) -> list[Row]:
    settings, history = run.fit.settings, run.fit.history
    weight = settings.get("kl_weight", 1.0)
    if weight < 1 or "validation_elbo" not in history or settings.get("state") == "stopped early":
        advice = "the posterior is too narrow: train on (epochs=), or with a smaller warmup="
        return [Row.judged("training", "KL weight at the end", weight, "1", weight == 1, False, advice)]
    last = history["validation_elbo"].to_numpy()[-max(3, len(history) // 10) :]
    rise, limit = float(last[-1] - last[0]) / max(len(last) - 1, 1), 3e-4 * abs(float(last[-1]))
    advice = "it had not come to rest: more epochs="
    statistic = "rise of the held-out ELBO, nats an epoch:"
    return [Row.judged("training", statistic, rise, f"<= {limit:.2g}", rise <= limit, True, advice)]


def _latent(run: _Run) -> list[Row]:
    few = run.some(1, 2000)
    try:
        table = latent(run.fit, few, seed=run.seed)
    except ImportError:
        table = latent(run.fit, few, holes=False, seed=run.seed)
    n, k = table.attrs["n_active"], len(table)
    statistic = f"of {k} latents active (variance > {ACTIVE:g}):"
    advice = "the state says little of cells: a larger warmup=, more epochs=, or a decoder with less of its own"
    rows = [Row.judged("latent use", statistic, n, f">= {min(2, k)}", n >= min(2, k), n > 0, advice)]
    if "auc" not in table.attrs or math.isnan(table.attrs["auc"]):
        return [*rows, Row.not_run("prior", "telling states from draws of the prior needs scikit-learn")]
    auc = table.attrs["auc"]
    advice = "cells made from the prior are not like yours: prior=MixturePrior(20), VampPrior(50) or FlowPrior()"
    statistic = "area of telling states from the prior's:"
    return [*rows, Row.judged("prior", statistic, auc, f"<= {_HOLE:g}", auc <= _HOLE, auc < 0.85, advice)]


def _calibration(run: _Run) -> list[Row]:
    n = int(np.clip(_WORK / ((_DRAWS + 30) * run.fit.program.schema.n_genes), 60, 300))
    done = calibration(
        run.fit, run.some(1, 2000), n_simulations=n, n_draws=_DRAWS, genes=10, seed=run.seed, progress=False
    )
    share, table = float(done.table.attrs["share_below"]), done.table
    worst = table["deviation"].idxmax()
    repair = f'fit.refine(cells, family="full") for these and {_WEIGH}; fit.train_guide(cells) for any'
    if (run.fit.settings.get("refined") or {}).get("family") == "full":
        repair = _WEIGH
    advice = f'"{worst}" is the worst ({table["shape"].to_dict()[worst]}): {repair}'
    statistic = f"share of {len(table)} scalars with near uniform ranks:"
    # One scalar alone sees a guide that does not read the counts, or that is wrong in many directions by a little.
    is_near = bool((table.loc[table.index == "log p(x|z)", "verdict"] != "off").all())
    covered = float(done.coverage([0.9], seed=run.seed)["90%"].to_dict()["HPD"])
    error = 2 * math.sqrt(0.9 * 0.1 / n) + 0.02
    narrow = "narrow" if covered < 0.9 else "wide"
    return [
        Row.judged(
            "calibration", statistic, share, ">= 0.95", share >= 0.95 and is_near, share >= 0.8 and is_near, advice
        ),
        Row.judged(
            "coverage", "of simulated truths by 90 % regions:", covered, f"0.9 +- {error:.2f}",
            abs(covered - 0.9) <= error, abs(covered - 0.9) <= 0.15, f"the guide is too {narrow}: {repair}",
        ),
    ]  # fmt: skip


def _guide(run: _Run) -> list[Row]:
    table = importance(run.fit, run.some(1000, 200), 1000, seed=run.seed)
    usable, threshold = table.attrs["usable"], table.attrs["threshold"]
    statistic = f"share of {len(table)} cells with k-hat <= {threshold:.2g} or even weights:"
    advice = (
        'weights cannot mend the draws of the others: fit.refine(cells, family="full"), encoder=FullRankEncoder(), '
        'objective="iwae"; pyrosc.check.importance_by_gene tells genes'
    )
    return [Row.judged("guide", statistic, usable, f">= {_USABLE:g}", usable >= _USABLE, usable >= 0.5, advice)]


def _gaps(run: _Run) -> list[Row]:
    few = run.some(3000, 100)
    elbo = {"encoder": run.fit.elbo(few, n_draws=64, seed=run.seed)}
    for family in ("normal", "full"):
        refined = run.fit.refine(few, family=family, moments=0, seed=run.seed, progress=False)
        elbo[family] = refined.elbo(few, n_draws=64, seed=run.seed)
    amortisation = float((elbo["normal"] - elbo["encoder"]).mean())
    family_gap = float((elbo["full"] - elbo["normal"]).mean())
    dependent = 'latents depend on each other given the counts: encoder=FullRankEncoder(), or refine with family="full"'
    return [
        Row.judged(name, "gap, nats a cell:", gap, f"<= {_GAP:g}", gap <= _GAP, gap <= 5 * _GAP, advice)
        for name, gap, advice in (
            ("amortisation", amortisation, f"the encoder lags behind its family: {_REFINE}"),
            ("family", family_gap, dependent),
        )
    ]


def _predictive(run: _Run) -> list[Row]:
    statistics = ["zero fraction", "variance", "top-gene correlation"]
    found = posterior_predictive(run.fit, run.some(80, 500), statistics, n_draws=40, seed=run.seed)
    twice = ", on counts seen twice" if found.attrs["counts"] == "used twice" else ""
    zeros, variance, together = (found.loc[found["statistic"] == name, "p"].to_numpy() for name in statistics)
    rows = []
    for name, p, advice in (
        (
            "zeros",
            zeros,
            "zeros are not as the story makes them: NBLikelihood() for Poisson, ZINBLikelihood() for NB",
        ),
        ("variance", variance, "counts scatter otherwise: BatchDispersion() or CellDispersion() for dispersion="),
    ):
        # Two-sided p-values of 40 replicates come in steps of 2 / 41: below 0.05 by chance for one gene in 20.
        share, limit = float((p < 0.05).mean()), _EXCESS * (0.05 + 2 * math.sqrt(0.05 * 0.95 / len(p)))
        statistic = f"share of genes with p < 0.05{twice}:"
        rows.append(Row.judged(name, statistic, share, f"<= {limit:.2g}", share <= limit, share < 0.3, advice))
    p_together = float(together[0])
    advice = "genes move together otherwise than the story says: a larger n_latent=, or a deeper decoder"
    rows.append(
        Row.judged("correlation", f"p of top genes{twice}:", p_together, ">= 0.05", p_together >= 0.05, True, advice)
    )
    return rows


_CHECKS: list[Callable[[_Run], list[Row]]] = [_training, _latent, _calibration, _guide, _gaps, _predictive]
