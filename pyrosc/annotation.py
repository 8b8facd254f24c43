"""Annotation: which type a cell is of, by what a Fit says of its counts, and whether it is of any that it knows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from scipy import linalg, optimize
from torch import Tensor

from .cells import Cells
from .draws import by_block, draw_guide, in_front, sites_of, summed_out
from .elbo import follow
from .errors import ProgramError
from .outliers import combined, conformal
from .posterior import Fit
from .prediction import law_of_counts
from .program import Program
from .schema import listed

UNKNOWN = "unknown"
_FACTORS, _DRAWS, _FEW = 10, 5, 50
_LARGE = 50.0  # squared residual factor, beyond which more says no more
_GENES = 4000  # whose residuals are looked at: those of most counts
_EXAMPLES = 20  # of types with two or more, for a p-value
_SHRINK = 10.0  # examples that the common covariance counts for beside those at hand


def types_of(fit: Fit) -> list[Any]:
    """Names of the types that a story tells apart, in order.

    Raises
    ------
    ProgramError
        If there are none.
    """
    types = getattr(dict(fit.program.parts.items()).get("labels"), "types", None)
    if types is not None:
        return list(types)
    if fit.schema.label is None:
        raise ProgramError(
            f"{fit.program.story} was fitted without labels: Cells.from_anndata(adata, label=...), then "
            "pyrosc.scanvi(cells), or pyrosc.scvi(cells, prior=MixturePrior(labels=True))"
        )
    return list(fit.schema.label.levels)


# ---- by the story ---------------------------------------------------------------------------


def probabilities(fit: Fit, cells: Cells, n_draws: int, seed: int) -> Tensor:
    """(N, C) probability of each type, averaged over draws; cells in the order of the fit, their labels not used."""
    n_types, cells = len(types_of(fit)), cells.without_labels()
    sharpness = 1 / fit.settings.get("label_temperature", 1.0)
    total: Any = 0
    members = fit.members or (fit.program,)
    for m, (member, n) in enumerate(zip(members, np.bincount(fit.member_of(n_draws)).tolist())):
        found = list(_of_program(member, cells, n, seed + m, n_types, sharpness))
        total = total + torch.cat(found) * (n / n_draws)
    return total


def _of_program(
    program: Program, cells: Cells, n_draws: int, seed: int, n_types: int, sharpness: float
) -> Iterator[Tensor]:
    each = in_front(program, cells, n_draws)

    def ask(block: Cells) -> Tensor:
        found = [_log_odds(program, block, n, n_types) for n in each]
        both = torch.cat([f.reshape(-1, len(block), f.shape[-1]) for f in found])
        return (sharpness * both).softmax(-1).mean(0).cpu()

    yield from by_block(program, [cells], n_draws * program.n_combinations, seed, ask)


def _log_odds(program: Program, block: Cells, n: int | None, n_types: int) -> Tensor:
    """(S, n, C) log probability of the types given each draw, up to a constant."""
    guide = draw_guide(program, block, n)
    nodes: dict[str, Any] = guide.nodes
    if "y" in nodes and nodes["y"]["fn"].has_enumerate_support:
        return nodes["y"]["fn"].logits
    if program.enumerated == ["y"]:
        found = summed_out(program, follow(program, guide, block, n), block, n).table().movedim(0, -1)
        if found.shape[-1] != n_types:
            raise ProgramError(
                f'"y" has {found.shape[-1]} values and there are {n_types} labels: values are labels, in order'
            )
        return found
    prior: Any = dict(program.parts.items()).get("prior")
    if "z" in nodes and hasattr(prior, "responsibilities"):
        return prior.responsibilities(nodes["z"]["value"], block)[..., :n_types].log()
    raise ProgramError(
        f'{program.story} tells no types: it needs a discrete site "y" with the labels for values, or a prior that '
        f"answers responsibilities(z, cells). Its guide draws {listed(sites_of(guide))}"
    )


def truths(fit: Fit, cells: Cells) -> np.ndarray:
    """(N,) place of each cell's label among the types; -1 for none, or one that stands for several."""
    factor = fit.schema.label
    types = types_of(fit)
    place = [types.index(v) if v in types else -1 for v in (factor.levels if factor is not None else ())]
    return np.array([*place, -1])[cells.label.cpu().numpy()]


def temperature(fit: Fit, cells: Cells, n_draws: int, seed: int) -> Fit:
    """See `Fit.with_temperature`."""
    truth = truths(fit, cells)
    known = np.flatnonzero(truth >= 0)
    if len(known) < 20:
        raise ValueError(f"{len(known)} of these cells have a label, and a temperature takes at least 20")
    cells = cells[known]
    made = copy.copy(fit)

    def loss(log_temperature: float) -> float:
        made.settings = fit.settings | {"label_temperature": float(np.exp(log_temperature))}
        share = probabilities(made, cells, n_draws, seed).numpy()
        return -float(np.log(np.maximum(share[np.arange(len(cells)), truth[known]], 1e-12)).mean())

    best = optimize.minimize_scalar(loss, bounds=(np.log(0.2), np.log(5.0)), method="bounded", options={"xatol": 0.02})
    made.settings = fit.settings | {"label_temperature": float(np.exp(best.x))}
    return made


# ---- beside the examples --------------------------------------------------------------------


def strangeness(z: Tensor, examples: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """How far states (N, K) are from the nearest type, and how far examples are from the others of theirs.

    Squared Mahalanobis distance to the mean of a type's examples (M, K), in units of one covariance for all types, a
    little of its diagonal mixed in where examples are few. Of an example, the mean is that of the others.
    """
    z, examples = z.double().cpu(), examples.double().cpu()
    kinds = label.unique()
    counts = torch.stack([(label == k).sum() for k in kinds]).double()  # of one, its own distance says nothing
    means = torch.stack([examples[label == k].mean(0) for k in kinds])
    at = torch.searchsorted(kinds, label)
    within = examples - means[at]
    free = max(len(examples) - len(kinds), 1)
    covariance = within.T @ within / free
    share = _SHRINK / (_SHRINK + free)
    covariance = (1 - share) * covariance + share * torch.diag(covariance.diagonal().clamp(min=1e-6))
    root = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(len(covariance), dtype=torch.float64))

    def apart(points: Tensor) -> Tensor:  # (n, types)
        away = points.unsqueeze(1) - means
        return (
            torch.linalg.solve_triangular(root, away.flatten(0, 1).T, upper=False).square().sum(0).view(len(points), -1)
        )

    found, own = apart(z).min(1).values, apart(examples)
    # Without itself the mean of n is further from an example by n / (n - 1).
    factor = (counts / (counts - 1).clamp(min=0.5))[at].square()
    own[torch.arange(len(own)), at] *= factor
    return found, own.min(1).values[counts[at] > 1]


def p_state(fit: Fit, cells: Cells) -> np.ndarray:
    """(N,) conformal p-value that a cell's state is one of the types known: among labelled cells of the fit.

    nan where the fit holds too few of them.
    """
    loc, place = examples_of(fit)
    if len(loc) < _EXAMPLES:
        return np.full(len(cells), np.nan)
    found, own = strangeness(fit._centres(cells.without_labels()), loc, place)
    return conformal(found.numpy(), own.numpy()) if len(own) >= _EXAMPLES else np.full(len(cells), np.nan)


def examples_of(fit: Fit) -> tuple[Tensor, Tensor]:
    """(M, K) states of the labelled cells that a fit keeps, and (M,) places of their types; none of groups."""
    marks, factor = fit.examples, fit.schema.label
    if marks is None or factor is None or factor.column not in marks.columns:
        return torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)
    types = types_of(fit)
    levels = torch.tensor([*(types.index(v) if v in types else -1 for v in factor.levels), -1])
    place = levels[marks.columns[factor.column]]
    return marks.loc[place >= 0], place[place >= 0]


def p_residual(fit: Fit, cells: Cells, seed: int) -> np.ndarray:
    """(N,) p-value that a cell has no part in what many of these cells have in common and the fit does not explain.

    Counts less their expectation, in sds of their law, less each gene's mean over the cells (what a new batch adds to
    all): their leading ten factors, each as a robust z-score of cells. A factor weighs (s^2 / s0^2 - 1)^2, for s its
    singular value and s0 the largest of counts drawn from the fit; none counts unless s > s0. The weighted sum of
    squares is judged beside that of normal z-scores. Cells of a type that the encoder takes for another stand out so;
    a type of which there are few cells does not, nor one that most of the cells are of. 1 for fewer than 50 cells.
    """
    n = len(cells)
    if n < _FEW:
        return np.ones(n)
    genes = np.sort(np.argsort(-cells.gene_sums().counts.cpu().numpy(), kind="stable")[:_GENES])
    grams: list[Any] = [0, 0]
    sums: list[Any] = [0, 0]
    for both in _residuals(fit, cells, genes, seed):
        for k, residual in enumerate(both):
            grams[k], sums[k] = grams[k] + residual.T @ residual, sums[k] + residual.sum(0)
    values, factors = _leading(grams[0] - np.outer(sums[0], sums[0]) / n, _FACTORS)
    edge, _ = _leading(grams[1] - np.outer(sums[1], sums[1]) / n, 1)
    weight = np.maximum(0.0, values / edge[0] - 1) ** 2
    if not weight.any():
        return np.ones(n)
    z = np.concatenate([(observed - sums[0] / n) @ factors for observed, _ in _residuals(fit, cells, genes, seed)])
    z -= np.median(z, 0)
    z /= np.maximum(1.4826 * np.median(np.abs(z), 0), 1e-12)
    score = np.minimum(z**2, _LARGE) @ weight
    null = np.random.default_rng(seed).normal(size=(20_000, len(weight))) ** 2 @ weight
    return conformal(score, null)


def _residuals(fit: Fit, cells: Cells, genes: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Block by block (n, genes) residuals of the counts, and of counts drawn from the fit."""

    def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
        site: Any = trace.nodes.get("x")
        law, x = law_of_counts(fit, trace), site["value"]
        mean, variance = (v.reshape(-1, len(block), v.shape[-1]).mean(0) for v in (law.mean, law.variance))
        drawn = law.sample().reshape(-1, len(block), x.shape[-1])[0]
        both = torch.stack([x.reshape(-1, len(block), x.shape[-1])[0], drawn])
        found = ((both - mean) / variance.clamp(min=1e-12).sqrt()).clamp(-10, 10)
        if cells.gene_mask is not None:
            found = found * cells.gene_mask
        return found

    for (both,) in fit._runs(cells, [[cells]], max(_DRAWS, len(fit.members)), seed, ask):
        found = both.double().cpu().numpy()[..., genes]
        yield found[0], found[1]


def _leading(gram: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenvalues, in order, and their vectors (G, k)."""
    k = min(k, len(gram))
    values, vectors = linalg.eigh(gram, subset_by_index=(len(gram) - k, len(gram) - 1))
    return np.maximum(values[::-1], 1e-12), vectors[:, ::-1]


def annotated(
    fit: Fit, cells: Cells, threshold: float | None, novelty: float | None, n_draws: int, seed: int
) -> pd.DataFrame:
    """See `Fit.labels`."""
    types = types_of(fit)
    share = probabilities(fit, cells, n_draws, seed).numpy()
    best = share.argmax(1)
    surest = share[np.arange(len(share)), best]
    state, residual = p_state(fit, cells), p_residual(fit, cells, seed)
    if novelty is not None and np.isnan(state).any():
        raise ProgramError(
            f"novelty is judged beside labelled cells, and this fit keeps fewer than {_EXAMPLES} of types with two or "
            'more; a fit mapped with train="all" keeps those of the query alone: leave novelty= out'
        )
    known = state if (residual == 1).all() else combined(np.stack([state, residual], 1))
    is_unknown = np.zeros(len(cells), dtype=bool)
    if threshold is not None:
        is_unknown |= surest < threshold
    if novelty is not None:
        is_unknown |= known < novelty
    names = list(dict.fromkeys([*types, UNKNOWN]))
    code: Any = np.where(is_unknown, names.index(UNKNOWN), best)
    label = pd.Categorical.from_codes(code, dtype=pd.CategoricalDtype(names))
    return pd.DataFrame(
        {"label": label, "probability": surest, "p_known": known, "p_state": state, "p_residual": residual},
        index=cells.names,
    )


def by_neighbors(fit: Fit, cells: Cells, k: int, n_draws: int, seed: int) -> Tensor:
    """(N, C) weighted shares of types among the k nearest labelled cells of the fit, averaged over draws of the state.

    Weights fall with distance as exp(-t sd^2 / 4), sd that of a cell's k distances t (Lotfollahi et al. 2022, Nature
    Biotechnology 40:121).
    """
    types = types_of(fit)
    loc, place = examples_of(fit)
    if not len(loc):
        raise ProgramError(f"{fit.program.story} keeps no labelled cells to be neighbours of; fit again with labels")
    loc, k = loc.double(), min(k, len(loc))
    own = cells.without_labels()
    total = torch.zeros(len(cells), len(types), dtype=torch.float64)
    for z in torch.from_numpy(fit.latent(own, n_draws, seed=seed)).double():
        for start in range(0, len(z), 1000):
            distance, at = torch.cdist(z[start : start + 1000], loc).topk(k, largest=False)
            sd = distance.std(1, keepdim=True) if k > 1 else torch.zeros(len(distance), 1, dtype=torch.float64)
            weight = (-distance * sd.square() / 4).softmax(1)
            total[start : start + 1000].scatter_add_(1, place[at], weight)
    return total / n_draws
