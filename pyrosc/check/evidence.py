"""Evidence: log p(x) of each cell between bounds, and what the guide loses.

From draws v_s of the guide, with weights w_s = p(x, v_s) / q(v_s | x):

    ELBO     mean log w_s
    IWAE-k   mean over groups of k draws of log mean w_s        ELBO <= IWAE-k <= log p(x) in expectation, rising with k

By annealed importance sampling (Neal 2001), along t_0 = 0 < ... < t_J = 1 with densities in between

    p_t(v) prop. to p(v) p(x | v)^t              path="prior"
    p_t(v) prop. to b(v)^(1 - t) p(x, v)^t       path="guide", b a Student t with the guide's mean and covariance

    v_0 ~ p_0,  v_j ~ T_j(. | v_{j-1}), Hamiltonian transitions that leave p_{t_j} as it is
    log w = sum_j (t_j - t_{j-1}) d log p_t(v_{j-1}) / dt
    AIS      log mean w over chains, at most log p(x) in expectation

Of a cell that the story itself drew, the state v* is an exact draw of its posterior. Chains that start there and walk
the path backwards have E[1 / w] = 1 / p(x), and - log mean 1 / w is at least log p(x) in expectation (bidirectional
Monte Carlo, Grosse et al. 2015): the two bounds hold log p(x) between them.

Step sizes are learned by chains of their own, before: what a chain learns on its way would spoil its bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..cell_posterior import CellPosterior
from ..cells import Cells
from ..draws import by_block
from ..hmc import Point, moments, transition
from ..parts import whole
from ..posterior import Fit, require_fit
from ..program import Program
from ..psis import pareto_k
from .sampling import guide_draws

_PILOTS = 4  # chains that learn step sizes
_FIRST = 30  # transitions in which they find the first of them
_ACCEPTED = 0.65
_FREEDOM = 5.0  # degrees of freedom of the Student t: a guide that is too narrow somewhere still gets there
_BEND = 4.0  # the schedule is a logistic curve between -4 and 4: small steps at both ends
_SMOOTH = 15  # temperatures that a step size is averaged over


def evidence(
    fit: Fit,
    cells: Cells | anndata.AnnData,
    *,
    n_draws: int = 5000,
    n_chains: int = 16,
    n_steps: int = 500,
    n_leapfrogs: int = 3,
    path: str = "guide",
    simulate: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Bounds of log p(x) of each cell: by the guide's draws, and by annealing.

    Parameters
    ----------
    cells : whose counts are asked about; with ``simulate`` only their covariates and totals
    n_draws : S, of the guide, a multiple of 100
    n_chains : C, of each cell and direction, at least 2
    n_steps : J, steps of the path, at least 2
    n_leapfrogs : of a transition on average: 1 to 2 n_leapfrogs - 1, drawn anew at each step
    path : "guide" starts chains near the posterior, and needs few steps; "prior" starts from the story alone
    simulate : take counts drawn from the story instead of the cells' own, of which upper bounds are known too
    seed : all is random through it
    progress : whether to show a bar

    Returns
    -------
    DataFrame
        By cell, in nats: "elbo", "iwae_10", "iwae_100", "iwae_S" (by its number), "k_hat" of the weights; "ais_1", the
        mean of log w, which is the bound of a single chain, "ais", and "ais_se", its Monte Carlo error; with
        ``simulate`` "bdmc", an upper bound, "bdmc_se", and "gap", bdmc - ais. ``.attrs``: "mean" and "se", dicts by
        column of the mean over cells and of its Monte Carlo error; "acceptance" of transitions; "text", a line with
        the means.

    Raises
    ------
    ValueError
        If a number is out of range or the path unknown.
    ProgramError
        If the guide draws nothing continuous for each cell, or the story has no counts to simulate.

    Notes
    -----
    Bounds hold in expectation over chains and draws: those of a single cell may cross by chance. In float64; discrete
    sites are summed out; global sites are drawn from the guide once and held, so that log p(x) is given them.

    Errors are those of the chains, over which w is averaged: where few chains carry the weight they are too small, as
    is the bound; those of "bdmc" are given v*, from which all chains of a cell start. Time: 2 J n_leapfrogs gradients
    of C x N cells for the two directions, some 4 / C of one of them for the step sizes, and S densities of N cells.
    For an ensemble it is the first fit that is asked.
    """
    require_fit(fit)
    options = _options(n_draws, n_chains, n_steps, n_leapfrogs, path)
    ready, truth = _asked(fit, cells, simulate, seed)
    table = _bounds(fit, ready, truth, options, seed, progress)
    table.index = pd.Index(_names(cells), name="cell")
    return table


def gaps(
    fit: Fit,
    cells: Cells | anndata.AnnData,
    *,
    families: Sequence[str] = ("normal",),
    n_elbo: int = 1000,
    n_draws: int = 5000,
    n_chains: int = 16,
    n_steps: int = 500,
    n_leapfrogs: int = 3,
    path: str = "guide",
    simulate: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """What the guide loses of log p(x), cell by cell: by its family, and by amortisation.

        log p(x) - ELBO(q) = [log p(x) - ELBO(q*)] family gap + [ELBO(q*) - ELBO(q)] amortisation gap

    where q* is the best guide of the family for this cell alone (`Fit.refine`), and log p(x) the annealed estimate of
    `evidence` (Cremer, Li and Duvenaud 2018).

    Parameters
    ----------
    families : of q*, as in `Fit.refine`: first the guide's own, whose gaps are told; then others to set beside it
    n_elbo : draws an ELBO is averaged over
    n_draws, n_chains, n_steps, n_leapfrogs, path, simulate, seed, progress : as in `evidence`

    Returns
    -------
    DataFrame
        The columns of `evidence`; "elbo_normal", by its name, of each family; "family_gap" and "amortisation_gap".
        ``.attrs`` as there, with the means of these.

    Raises
    ------
    ValueError
        If no family is named, or an argument is out of range.
    ProgramError
        As `evidence` and `Fit.refine` do.
    """
    require_fit(fit)
    if isinstance(families, str) or not len(families):
        raise ValueError(f'families must be a list of families of q*, such as ("normal",), not {families!r}')
    options, n_elbo = _options(n_draws, n_chains, n_steps, n_leapfrogs, path), whole("n_elbo", n_elbo)
    ready, truth = _asked(fit, cells, simulate, seed)
    best = {family: _refined_elbo(fit, ready, family, n_elbo, seed, progress) for family in families}
    table = _bounds(fit, ready, truth, options, seed, progress)
    for family, elbo in best.items():
        table[f"elbo_{family}"] = elbo
    own = best[families[0]]
    table["family_gap"] = table["ais"] - own
    table["amortisation_gap"] = own - table["elbo"]
    for name in (*(f"elbo_{family}" for family in families), "family_gap", "amortisation_gap"):
        table.attrs["mean"][name] = float(table[name].mean())
    table.index = pd.Index(_names(cells), name="cell")
    return table


def _refined_elbo(fit: Any, cells: Cells, family: str, n_draws: int, seed: int, progress: bool) -> np.ndarray:
    """(N,) ELBO of the best guide of a family for each cell alone."""
    refined = fit.refine(cells, family=family, moments=0, seed=seed, progress=progress)
    return refined.elbo(cells, n_draws=n_draws, seed=seed)


# ---- what is asked ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    n_draws: int
    n_chains: int
    n_steps: int
    n_leapfrogs: int
    path: str


def _options(n_draws: int, n_chains: int, n_steps: int, n_leapfrogs: int, path: str) -> _Options:
    n_draws = whole("n_draws", n_draws, 100)
    if n_draws % 100:
        raise ValueError(f"n_draws must be a multiple of 100, for groups of 10 and of 100 draws, not {n_draws}")
    if path not in ("guide", "prior"):
        raise ValueError(f'path must be "guide" or "prior", not {path!r}')
    return _Options(
        n_draws, whole("n_chains", n_chains, 2), whole("n_steps", n_steps, 2), whole("n_leapfrogs", n_leapfrogs), path
    )


def _names(cells: Cells | anndata.AnnData) -> list[Any]:
    return list(cells.names if isinstance(cells, Cells) else cells.obs_names)


def _asked(fit: Fit, cells: Cells | anndata.AnnData, simulate: bool, seed: int) -> tuple[Cells, Tensor | None]:
    """The cells whose evidence is asked for, in float64, and, of simulated ones, the truth (N, D)."""
    ready = fit._ready(cells).to(fit.device, torch.float64)
    if not simulate:
        return ready, None
    other = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])  # or draws would begin like the truth

    def ask(block: Cells) -> tuple[Tensor, Tensor]:
        v, x = CellPosterior(program, block, seed=seed).draw_story()
        return v[0], x.cpu()

    program = fit.program.copy().double()
    drawn = list(by_block(program, [ready], 4, other, ask))
    return ready.with_counts(torch.cat([x for _, x in drawn])), torch.cat([v for v, _ in drawn])


def _bounds(fit: Fit, ready: Cells, truth: Tensor | None, options: _Options, seed: int, progress: bool) -> pd.DataFrame:
    program, done = fit.program.copy().double(), 0
    n_passes = 2 if truth is None else 3
    found: list[dict[str, Tensor]] = []
    with tqdm(
        total=(n_passes * options.n_steps + 1) * len(ready), desc=f"annealing {len(ready):,} cells", unit="step",
        disable=not progress,
    ) as bar:  # fmt: skip

        def ask(block: Cells) -> dict[str, Tensor]:
            nonlocal done
            own = None if truth is None else truth[done : done + len(block)]
            done += len(block)
            return _of_block(program, block, own, options, seed, lambda: bar.update(len(block)))

        found.extend(by_block(program, [ready], 4 * options.n_chains, seed, ask))
    table = pd.DataFrame({k: torch.cat([part[k] for part in found]).cpu().numpy() for k in found[0]})
    accepted = float(table.pop("acceptance").mean())
    errors: dict[str, Any] = {"elbo": table.pop("elbo_se"), "ais": table["ais_se"]}
    if truth is not None:
        table["gap"] = table["bdmc"] - table["ais"]
        errors |= {"bdmc": table["bdmc_se"], "gap": np.hypot(table["ais_se"], table["bdmc_se"])}
    columns = [str(name) for name in table]
    mean = {name: float(table[name].mean()) for name in columns if not name.endswith("_se") and name != "k_hat"}
    se = {name: float(np.sqrt((e**2).sum()) / len(table)) for name, e in errors.items()}
    text = f"mean over {len(table):,} cells, nats: ELBO {mean['elbo']:.2f}"
    text += "".join(f", {k.upper().replace('_', '-')} {v:.2f}" for k, v in mean.items() if k.startswith("iwae"))
    text += f", AIS {mean['ais']:.3f} (se {se['ais']:.3f})"
    if truth is not None:
        text += f" <= log p(x) <= BDMC {mean['bdmc']:.3f} (se {se['bdmc']:.3f})"
    table.attrs = {"mean": mean, "se": se, "acceptance": accepted, "text": text}
    return table


def _of_block(
    program: Program, block: Cells, truth: Tensor | None, options: _Options, seed: int, tick: Callable[[], Any]
) -> dict[str, Tensor]:
    posterior = CellPosterior(program, block, options.n_chains, seed=seed)
    found = _by_guide(posterior, options.n_draws)
    tick()
    drawn = guide_draws(posterior, 400)
    temperatures = schedule(options.n_steps)
    make = _PriorPath if options.path == "prior" else _GuidePath
    pilot = make(CellPosterior(program, block, _PILOTS, seed=seed), drawn)
    sizes = learned(pilot, temperatures, options.n_leapfrogs, tick)
    path = make(posterior, drawn)
    weights, accepted = annealed(path, path.start(), temperatures, sizes, options.n_leapfrogs, tick)
    found["ais_1"] = weights.mean(0)
    found["ais"], found["ais_se"] = _log_mean(weights)
    found["acceptance"] = accepted
    if truth is not None:
        start = truth.expand(options.n_chains, *truth.shape)
        weights, _ = annealed(path, start, temperatures, sizes, options.n_leapfrogs, tick, backwards=True)
        below, found["bdmc_se"] = _log_mean(-weights)
        found["bdmc"] = -below
    return found


def _by_guide(posterior: CellPosterior, n_draws: int) -> dict[str, Tensor]:
    """ELBO, IWAE and k-hat of each cell from so many draws of the guide."""
    parts = []
    for _ in range(-(-n_draws // posterior.n_copies)):
        v = posterior.draw()
        prior, likelihood = posterior.log_joint(v)
        parts.append(prior + likelihood - posterior.log_guide(v))
    weights = torch.cat(parts)[:n_draws]
    found = {"elbo": weights.mean(0), "elbo_se": weights.std(0) / math.sqrt(n_draws)}
    for k in sorted({10, 100, n_draws}):
        found[f"iwae_{k}"] = (weights.reshape(-1, k, weights.shape[-1]).logsumexp(1) - math.log(k)).mean(0)
    found["k_hat"] = pareto_k(weights.cpu()).to(weights)
    return found


def _log_mean(log: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) log of the mean of weights (C, N) given by their logs, and its standard error to first order."""
    c = len(log)
    mean = log.logsumexp(0) - math.log(c)
    return mean, (log - mean).exp().std(0) / math.sqrt(c)


# ---- paths ------------------------------------------------------------------------------------


class _Path:
    """Densities p_t = exp(base + t tilt) of the numbers of cells, and what chains on them start from."""

    precision: tuple[Tensor, Tensor]  # (N, D, D) about that of p_0, and of p_1

    def density(self, v: Tensor) -> Point:
        """base and tilt, with slopes."""
        raise NotImplementedError

    def start(self) -> Tensor:
        """(C, N, D) draws of p_0."""
        raise NotImplementedError

    def factor(self, t: float) -> Tensor:
        """(N, D, D) of a guess of the covariance of p_t."""
        first, last = self.precision
        return torch.linalg.cholesky(torch.linalg.inv((1 - t) * first + t * last))


class _PriorPath(_Path):
    """From p(v) to p(v) p(x | v)."""

    def __init__(self, posterior: CellPosterior, drawn: Tensor) -> None:
        self.posterior = posterior
        n = -(-200 // posterior.n_copies)
        prior = moments(torch.cat([self.start() for _ in range(n)]))[1]
        self.precision = torch.linalg.inv(prior), torch.linalg.inv(moments(drawn)[1])

    def start(self) -> Tensor:
        return self.posterior.draw_story()[0]

    def density(self, v: Tensor) -> Point:
        with torch.enable_grad():
            free = v.detach().requires_grad_()
            terms = self.posterior.log_joint(free)
            slopes = [torch.autograd.grad(term.sum(), free, retain_graph=True)[0] for term in terms]
        return Point(v.detach(), torch.stack(terms).detach(), torch.stack(slopes))


class _GuidePath(_Path):
    """From a Student t with the guide's mean and covariance as scale to p(x, v)."""

    def __init__(self, posterior: CellPosterior, drawn: Tensor) -> None:
        self.posterior = posterior
        self.centre, scale = moments(drawn)
        self.root = torch.linalg.cholesky(scale)
        inverse = torch.linalg.inv(scale)
        self.inverse = inverse
        self.precision = inverse * (_FREEDOM - 2) / _FREEDOM, inverse
        d = posterior.size
        self.constant = (
            math.lgamma((_FREEDOM + d) / 2) - math.lgamma(_FREEDOM / 2) - 0.5 * d * math.log(_FREEDOM * math.pi)
        ) - self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # (N,)

    def start(self) -> Tensor:
        shape = (self.posterior.n_copies, *self.centre.shape)
        normal = torch.randn(shape, dtype=torch.float64, device=self.centre.device)
        chi = torch.distributions.Chi2(normal.new_tensor(_FREEDOM)).sample(shape[:2]).unsqueeze(-1)
        return self.centre + torch.einsum("nij,cnj->cni", self.root, normal) * (_FREEDOM / chi).sqrt()

    def density(self, v: Tensor) -> Point:
        with torch.enable_grad():
            free = v.detach().requires_grad_()
            prior, likelihood = self.posterior.log_joint(free)
            joint = prior + likelihood
            (slope,) = torch.autograd.grad(joint.sum(), free)
        away = v.detach() - self.centre
        turned = torch.einsum("nij,cnj->cni", self.inverse, away)
        square = (away * turned).sum(-1)
        power = (_FREEDOM + v.shape[-1]) / 2
        base = self.constant - power * (square / _FREEDOM).log1p()
        base_slope = -2 * power * turned / (_FREEDOM + square).unsqueeze(-1)
        return Point(
            v.detach(), torch.stack([base, joint.detach() - base]), torch.stack([base_slope, slope - base_slope])
        )


def schedule(n_steps: int) -> Tensor:
    """(J + 1,) temperatures from 0 to 1 along a logistic curve."""
    curve = torch.linspace(-_BEND, _BEND, n_steps + 1, dtype=torch.float64).sigmoid()
    return (curve - curve[0]) / (curve[-1] - curve[0])


def learned(path: _Path, temperatures: Tensor, n_leapfrogs: int, tick: Callable[[], Any]) -> Tensor:
    """(J - 1, N) step sizes of each transition and cell, from a walk along the path by these chains alone."""
    point = path.density(path.start())
    n = point.at.shape[1]
    log, sizes = point.at.new_full((n,), math.log(0.7)), []
    for j in range(1, len(temperatures) - 1):
        factor = path.factor(float(temperatures[j]))
        for first in range(_FIRST if j == 1 else 1):
            moved = _moved(path, point, float(temperatures[j]), factor, log.exp(), n_leapfrogs)
            point = moved.point
            rate = 1.0 if j == 1 and first < _FIRST // 2 else 0.4
            log = log + rate * (moved.acceptance.mean(0) - _ACCEPTED)
        sizes.append(log)
        tick()
    tick()
    return _smooth(torch.stack(sizes)).exp()


def _smooth(values: Tensor) -> Tensor:
    """Moving averages along the first axis, over what there is at the ends."""
    half = _SMOOTH // 2
    total = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
    at = torch.arange(len(values), device=values.device)
    first, last = (at - half).clamp(min=0), (at + half + 1).clamp(max=len(values))
    return (total[last] - total[first]) / (last - first).unsqueeze(-1)


def annealed(
    path: _Path, start: Tensor, temperatures: Tensor, sizes: Tensor, n_leapfrogs: int, tick: Callable[[], Any],
    *, backwards: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log weights (C, N) of chains from ``start`` along the path, or back along it, and their acceptance (N,)."""
    point = path.density(start)
    steps = temperatures.diff()
    accepted, order = torch.zeros_like(point.at[0, :, 0]), range(len(steps))
    weights = torch.zeros_like(point.terms[0])
    for i in reversed(order) if backwards else order:
        # v_i stands between the temperatures i and i + 1; those inside the path are moved at.
        weights = weights + steps[i] * point.terms[1]
        j = i if backwards else i + 1
        if 0 < j < len(steps):
            t = float(temperatures[j])
            moved = _moved(path, point, t, path.factor(t), sizes[j - 1], n_leapfrogs)
            point, accepted = moved.point, accepted + moved.acceptance.mean(0)
        tick()
    return weights, accepted / max(len(steps) - 1, 1)


def _moved(path: _Path, point: Point, t: float, factor: Tensor, size: Tensor, n_leapfrogs: int) -> Any:
    weights = point.at.new_tensor([1.0, t])
    return transition(path.density, point, weights, factor, size, int(torch.randint(1, 2 * n_leapfrogs, ())))
