"""The latent space: is it used, and is its prior the law of the states that cells have?

With q_n the guide's law of the state of cell n, and q = mean_n q_n the aggregate posterior,

    KL       mean_n KL(q_n || p)                        what the objective pays for states
    I        mean_n E_{q_n} [log q_n(z) - log q(z)]     mutual information of cell and state
    KL - I   KL(q || p)                                 what a better prior would save

(Hoffman and Johnson 2016, "ELBO surgery", NIPS workshop on advances in approximate inference). I is that of a state
and which of these N cells it is of, and so at most log N: above some log N - 1 it says little more than that states
tell cells apart, and KL(q || p) is that of N bumps. I of the law that the cells are a sample of is larger, and
KL(q || p) smaller. A dimension is active where its posterior mean varies over cells by more than 0.01 (Burda, Grosse
and Salakhutdinov 2016, ICLR, section 5.3).

Whether p has holes, or mass where no cell is, is asked of a classifier: can draws of q be told from draws of p
(a classifier two-sample test: Lopez-Paz and Oquab 2017, ICLR)?
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from pyro import poutine
from pyro.infer.inspect import get_model_relations
from torch import Tensor

from ..cells import Cells
from ..draws import by_block, draw_guide, sites_of, sites_of_all
from ..elbo import in_cells
from ..errors import ProgramError, PyroscWarning
from ..guides import is_computed
from ..isolation import checked_seed
from ..parts import whole
from ..posterior import Fit, _mean, _sd, require_fit
from ..program import Program
from ..schema import did_you_mean, listed

ACTIVE = 0.01  # variance of the posterior mean
_AT_ONCE = 2**22  # numbers of a block of states under laws of many cells: 16 MB
_LEAST_CELLS = 20
_WIDEST = 30  # dimensions whose products a classifier is given too: 465


def latent(
    fit: Fit,
    cells: Cells | anndata.AnnData,
    *,
    site: str | None = None,
    n_draws: int = 1,
    n_cells: int = 5000,
    holes: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """What each latent dimension is used for, and how far the prior is from the states that cells have.

    Parameters
    ----------
    cells : preferably ones that the fit has not seen; at least 20
    site : a state of each cell; None takes the one that the guide draws first ("u" of `mrvi`, "z" elsewhere)
    n_draws : S, of the state of each cell
    n_cells : more cells than that are represented by so many of them, drawn at random
    holes : whether a classifier is asked to tell states of cells from draws of the prior; needs scikit-learn
    seed : draws, choices and folds are random through it

    Returns
    -------
    DataFrame
        One row a dimension: "variance" of the posterior mean over cells; "sd", the posterior's, mean over cells; "kl",
        in nats, mean over cells (nan unless guide and prior are products over dimensions); "information" I(z_k; x), in
        nats (nan unless the guide is one); "active". ``.attrs``:

        - "n_active"
        - "kl", "information" (with "information_se"), "kl_aggregate" = kl - information; in nats, of all
          dimensions together; "most_information" = log N
        - "auc", "auc_se": area under the curve of telling one draw of each cell's state from one of its prior; 0.5
          where they cannot be told (see `c2st`)
        - "site", "n_cells", "n_draws"

    Raises
    ------
    ValueError
        If there are fewer than 20 cells, or no such site.
    ProgramError
        If the site is none of each cell, or the guide draws it given another: then it has no density of its own.
    ImportError
        If ``holes`` is asked for without scikit-learn.

    Warns
    -----
    PyroscWarning
        If "information" is within log 2 of log N: a draw of a state then tells which cell it is of.

    Notes
    -----
    Any law with a ``log_prob`` will do, of guide and prior. Where the prior of a state depends on another state
    (`scanvi`: on u and y), "kl" and "kl_aggregate" are nan; priors that differ between cells (by label) are averaged
    over cells in "kl_aggregate". Global sites are drawn once. Time S N^2 K, about 2 s for 2,000 cells and 10 dimensions
    (and 5 to 20 s for the classifier); memory is bounded.

    For a prior that is learned scales of z are free, and "active" is about scale: look at "information" then.
    """
    require_fit(fit)
    n_draws, n_cells = whole("n_draws", n_draws, 1), whole("n_cells", n_cells, _LEAST_CELLS)
    seed = checked_seed(seed)
    if holes:
        _classifier(0)  # a missing package is said first
    ready = fit._ready(cells)
    if len(ready) < _LEAST_CELLS:
        raise ValueError(f"the aggregate posterior is that of many cells: give at least 20, not {len(ready)}")
    if len(ready) > n_cells:
        chosen = np.sort(np.random.default_rng([seed, 8]).permutation(len(ready))[:n_cells])
        ready = ready.rows(torch.as_tensor(chosen, device=ready.device), whole=True)
    site = fit.program.state_site if site is None else site
    has_prior = _prior_is_known(fit.program, site)

    blocks = _states(fit.program, ready, site, n_draws, seed)
    laws, priors = [b[0] for b in blocks], [b[2] for b in blocks]
    z, made = torch.cat([b[1] for b in blocks], 1), torch.cat([b[3] for b in blocks])  # (S, N, K), (N, K)
    with fit.program.driven(seed), torch.no_grad():
        mean, sd = (torch.cat([f(law) for law in laws]).double() for f in (_mean, _sd))
        own, own_k = _densities(laws, z)
        mixed, mixed_k = _mixture(laws, z)
        information = own - mixed
        kl = kl_k = to_aggregate = None
        if has_prior:
            law, law_k = _densities(priors, z)
            kl = own - law
            kl_k = None if own_k is None or law_k is None else (own_k - law_k).mean((0, 1))
            to_aggregate = mixed - (law if _is_one_law(priors, z[0]) else _mixture(priors, z)[0])
    information_k = None if own_k is None or mixed_k is None else (own_k - mixed_k).mean((0, 1))

    variance = mean.var(0, unbiased=False)
    table = pd.DataFrame(
        {
            "variance": variance.cpu().numpy(), "sd": sd.mean(0).cpu().numpy(), "kl": _column(kl_k, len(variance)),
            "information": _column(information_k, len(variance)), "active": (variance > ACTIVE).cpu().numpy(),
        },
        index=pd.RangeIndex(len(variance), name=site),
    )  # fmt: skip
    by_cell = information.mean(0)
    table.attrs = {
        "site": site, "n_cells": len(ready), "n_draws": n_draws, "n_active": int(table["active"].sum()),
        "kl": float("nan") if kl is None else float(kl.mean()),
        "information": float(by_cell.mean()), "information_se": float(by_cell.std()) / math.sqrt(len(by_cell)),
        "most_information": math.log(len(ready)),
        "kl_aggregate": float("nan") if to_aggregate is None else float(to_aggregate.mean()),
    }  # fmt: skip
    if holes:
        table.attrs["auc"], table.attrs["auc_se"] = c2st(z[0].cpu().numpy(), made.cpu().numpy(), seed=seed)
    if table.attrs["information"] > table.attrs["most_information"] - math.log(2):
        warnings.warn(
            f"I(z; x) is {table.attrs['information']:.2f} nats, and of {len(ready):,} cells it is at most "
            f"{table.attrs['most_information']:.2f}: a state tells its cell from all others, so this is a lower bound, "
            'and "kl_aggregate" an upper one. Give more cells',
            PyroscWarning, stacklevel=2,
        )  # fmt: skip
    return table


def c2st(one: Any, other: Any, *, n_folds: int = 5, seed: int = 0) -> tuple[float, float]:
    """Can two samples be told apart? Area under the curve of a classifier on parts it was not trained on.

    Parameters
    ----------
    one, other : (N, K) and (M, K)
    n_folds : parts that are held out in turn, each of at least 5 rows of both samples
    seed : parts are drawn through it

    Returns
    -------
    float, float
        The area, mean over parts, and its standard error. Of one law the area is 0.5, or by chance slightly below as
        often as above. Within a part the variance is that of DeLong et al. (1988, Biometrics 44:837); parts share what
        their classifiers were trained on, so their mean is taken to have 1 / n_folds + 1 / (n_folds - 1) of it (Nadeau
        and Bengio 2003, Machine Learning 52:239), a rule of thumb: for two samples of one law, (area - 0.5) / se had an
        sd of 0.98 (300 rows, 3 dimensions) and 0.76 (1,000 rows, 5 dimensions). Taken as independent, 1.47 and 1.14.

    Raises
    ------
    ValueError
        If the samples have other widths, numbers that are not finite, or too few rows.
    ImportError
        Without scikit-learn.

    Notes
    -----
    The classifier is one: boosted trees, on the dimensions, their squares, the sum of these and, for K up to 30, the
    other products. Trees see holes, clusters and steps; products are for correlations and the sum for shells, of which
    cuts along axes see little.
    """
    one, other = (np.asarray(v, dtype=np.float64) for v in (one, other))
    n_folds = whole("n_folds", n_folds, 2)
    for name, value in (("one", one), ("other", other)):
        if value.ndim != 2 or value.shape[1] != one.shape[-1]:
            raise ValueError(f"{name} must have shape (rows, {one.shape[-1]}), not {value.shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} has {int((~np.isfinite(value)).sum())} numbers that are not finite")
        if len(value) < 5 * n_folds:
            raise ValueError(f"{name} has {len(value)} rows; {n_folds} folds need at least {5 * n_folds}")
    draw = np.random.default_rng(checked_seed(seed))
    x = _with_products(np.concatenate([one, other]))
    is_other = np.repeat([False, True], [len(one), len(other)])
    fold = np.concatenate([draw.permutation(np.arange(len(v)) % n_folds) for v in (one, other)])
    areas, variances = [], []
    for k in range(n_folds):
        held = fold == k
        found = _classifier(seed).fit(x[~held], is_other[~held]).predict_proba(x[held])[:, 1]
        area, variance = _area(found[~is_other[held]], found[is_other[held]])
        areas.append(area)
        variances.append(variance)
    return float(np.mean(areas)), float(np.sqrt(np.mean(variances) * (1 / n_folds + 1 / (n_folds - 1))))


def _classifier(seed: int) -> Any:
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError as error:
        raise ImportError(
            'telling samples apart needs scikit-learn: pip install "pyrosc[demo]"; or ask without, holes=False'
        ) from error
    return HistGradientBoostingClassifier(
        max_iter=60, max_leaf_nodes=8, min_samples_leaf=20, early_stopping=False, random_state=seed % 2**32
    )


def _with_products(x: np.ndarray) -> np.ndarray:
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    n = x.shape[1]
    i, j = np.triu_indices(n) if n <= _WIDEST else (np.arange(n), np.arange(n))
    return np.concatenate([x, x[:, i] * x[:, j], (x**2).sum(1, keepdims=True)], 1).astype(np.float32)


def _area(low: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    """P(high > low), ties half, and its variance by DeLong."""

    def placed(value: np.ndarray, among: np.ndarray) -> np.ndarray:
        among = np.sort(among)
        return (np.searchsorted(among, value, "left") + np.searchsorted(among, value, "right")) / (2 * len(among))

    of_high, of_low = placed(high, low), placed(low, high)
    return float(of_high.mean()), float(of_high.var(ddof=1) / len(high) + of_low.var(ddof=1) / len(low))


# ---- states, and densities of them -------------------------------------------------------------


def _prior_is_known(program: Program, site: str) -> bool:
    """Whether the prior of a state depends on no other site of cells; that the guide's law does not is required."""
    blank = program.blank(3)
    with program.driven(0), torch.no_grad():
        found = {}
        for name, run in (("guide", program.guide), ("model", program.model)):
            trace = poutine.trace(run).get_trace(blank)
            nodes: dict[str, Any] = trace.nodes
            drawn = sites_of(trace)
            if site not in drawn:
                remedy = f' pass site="{program.state_site}".' if site == "z" and program.state_site != "z" else ""
                raise ValueError(
                    f'the {name} of {program.story} draws no "{site}"; it draws {listed(drawn)}.'
                    + (remedy or did_you_mean(site, drawn))
                )
            law = nodes[site]["fn"]
            if is_computed(nodes[site]) or not in_cells(nodes[site]) or law.event_dim != 1 or len(law.batch_shape) != 1:
                raise ProgramError(f'site "{site}" of {program.story} is no state of each cell with a law of its own')
            parents = get_model_relations(run, (blank,))["sample_sample"].get(site, [])
            found[name] = [
                p for p in parents if p != site and p in drawn and not nodes[p]["is_observed"] and in_cells(nodes[p])
            ]  # fmt: skip
    if found["guide"]:
        raise ProgramError(
            f'the guide of {program.story} draws "{site}" given {listed(found["guide"])}, so it has no density of its '
            f'own: ask about "{program.state_site}"'
        )
    return not found["model"]


def _states(
    program: Program, cells: Cells, site: str, n_draws: int, seed: int
) -> list[tuple[Any, Tensor, Any, Tensor]]:
    """By block of cells: the guide's law of their states, S draws of it, their prior and one draw of that."""
    shared: poutine.Trace | None = None

    def ask(block: Cells) -> tuple[Any, Tensor, Any, Tensor]:
        nonlocal shared
        guide = draw_guide(program, block, None, shared)
        shared = sites_of_all(guide) if shared is None else shared
        model = poutine.trace(poutine.replay(program.model, trace=shared)).get_trace(block)
        law: Any = guide.nodes[site]["fn"]
        prior: Any = model.nodes[site]
        size = torch.Size([len(block)])
        return law.expand(size), law.expand(size).sample((n_draws,)), prior["fn"].expand(size), prior["value"]

    return list(by_block(program, [cells], 1, seed, ask))


def _factors(law: Any) -> Any:
    """The laws of single dimensions, where the law is their product; else None."""
    base = getattr(law, "base_dist", None)
    if getattr(law, "reinterpreted_batch_ndims", 0) == 1 and base is not None and not base.event_shape:
        return base
    return None


def _densities(laws: list[Any], z: Tensor) -> tuple[Tensor, Tensor | None]:
    """(S, N) log density of states (S, N, K) under the law of their own cell; (S, N, K) of dimensions, or None."""
    parts = z.split([law.batch_shape[0] for law in laws], 1)
    joint = torch.cat([law.log_prob(part).double() for law, part in zip(laws, parts)], 1)
    factors = [_factors(law) for law in laws]
    if any(f is None for f in factors):
        return joint, None
    return joint, torch.cat([f.log_prob(part).double() for f, part in zip(factors, parts)], 1)


def _mixture(laws: list[Any], z: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same under the mean over all cells of their laws."""
    flat = z.reshape(-1, 1, z.shape[-1])
    factors = [_factors(law) for law in laws]
    by_dimension = all(f is not None for f in factors)
    joint: Any = None
    each: Any = None
    for law, factor in zip(laws, factors):
        size = max(1, _AT_ONCE // (law.batch_shape[0] * z.shape[-1]))
        joints, dims = [], []
        for some in flat.split(size):
            if by_dimension:
                found = factor.log_prob(some)  # (M, n, K)
                dims.append(found.logsumexp(1).double())
                joints.append(found.sum(-1).logsumexp(1).double())
            else:
                joints.append(law.log_prob(some).logsumexp(1).double())
        here = torch.cat(joints)
        joint = here if joint is None else torch.logaddexp(joint, here)
        if by_dimension:
            here = torch.cat(dims)
            each = here if each is None else torch.logaddexp(each, here)
    log_n = math.log(sum(law.batch_shape[0] for law in laws))
    return (joint - log_n).reshape(z.shape[:2]), None if each is None else (each - log_n).reshape(z.shape)


def _is_one_law(laws: list[Any], z: Tensor) -> bool:
    """Whether all cells have one prior: by its density at some states."""
    for point in z[:: max(1, len(z) // 3)]:
        every = torch.cat([law.log_prob(point.expand(law.batch_shape[0], -1)) for law in laws])
        if not torch.allclose(every, every[:1], rtol=1e-5, atol=1e-4):
            return False
    return True


def _column(values: Tensor | None, n: int) -> np.ndarray:
    return np.full(n, np.nan) if values is None else values.cpu().numpy()
