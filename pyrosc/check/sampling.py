"""Sampling: the posterior of chosen cells by Markov chains, and how far the guide is from it.

The decoder and all else that cells share is held fixed; each cell's own numbers are sampled from p(v | x) by
Hamiltonian Monte Carlo (`pyrosc.hmc`), all cells and chains at once, or by Pyro's NUTS, one chain after another.
R-hat and effective sample sizes are those of Vehtari et al. 2021, Bayesian Analysis 16:667: of ranks, in split chains.
ArviZ computes them where ``arviz-stats`` is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from ..cell_posterior import CellPosterior, LocalSite
from ..cells import Cells
from ..draws import by_block
from ..hmc import DualAveraging, by_autograd, moments, transition
from ..parts import positive, whole
from ..posterior import Fit, require_fit
from ..schema import listed

_GUIDE_DRAWS = 400  # for the mean and covariance that chains are whitened by
_WIDER = 1.5  # starts of chains, against draws of the guide
_ACCEPTED = 0.8
_LEAST, _MOST = 0.8, 1.25  # a ratio of sds that will do
_SHARE = 0.9  # of numbers whose ratio must do


@dataclass(frozen=True)
class PosteriorDraws:
    """Draws of the posterior of cells' own numbers, and how the chains did.

    Attributes
    ----------
    draws : dict
        Site -> (C, S, N, event): chains, draws, cells; on the site's own scale. Further plates stand after N.
    numbers : array
        (C, S, N, D) the same on the real line (a positive site as its logarithm), in the order of ``table``.
    table : DataFrame
        One row a (cell, number): "mean", "sd" on the real line, "r_hat", "ess" (of the bulk). ``table.attrs["by"]``
        says whose functions computed the last two, "arviz-stats" or "pyrosc"; they differ by less than 5 % in "ess".
    cells : DataFrame
        One row a cell: "r_hat" (its largest), "ess" (its smallest), "acceptance" and "step_size" (means over chains),
        "divergences" (trajectories after warm-up whose energy was off by 1,000 nats or more).
    """

    draws: dict[str, np.ndarray]
    numbers: np.ndarray
    table: pd.DataFrame
    cells: pd.DataFrame

    def __repr__(self) -> str:
        c, s, n, d = self.numbers.shape
        off = int((~(self.cells["r_hat"] <= 1.01)).sum())
        return (
            f"PosteriorDraws({', '.join(self.draws)}: {c} chains x {s:,} draws x {n:,} cells, {d} numbers each; "
            f"R-hat above 1.01 in {off:,} cells, least ESS {self.cells['ess'].min():,.0f})"
        )

    def to_arviz(self) -> Any:
        """An ``xarray.DataTree`` with the group "posterior": (chain, draw, cell, ...).

        Raises
        ------
        ImportError
            Without ``arviz-base``: pip install "pyrosc[arviz]".
        """
        try:
            from arviz_base import from_dict
        except ImportError as error:
            raise ImportError('to_arviz needs arviz-base: pip install "pyrosc[arviz]"') from error
        dims = {
            name: ["cell", *(f"{name}_dim_{i}" for i in range(value.ndim - 3))] for name, value in self.draws.items()
        }
        tree = from_dict({"posterior": self.draws}, coords={"cell": list(self.cells.index)}, dims=dims)
        tree.attrs |= {"inference_library": "pyrosc"}
        return tree


def sample_posterior(
    fit: Fit,
    cells: Cells | anndata.AnnData,
    *,
    n_chains: int = 4,
    warmup: int = 500,
    n_draws: int = 1000,
    sampler: str = "hmc",
    max_leapfrogs: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> PosteriorDraws:
    """Draws of the posterior of each cell's own numbers by Markov chains, the decoder held fixed.

    What the guide guesses at once is sampled here as exactly as chains of this length can: for a hundred cells or so,
    to see whether the guide may be believed (`guide_error`).

    Parameters
    ----------
    n_chains : C, at least 2; they start from draws of the guide, 1.5 times as far from its mean
    warmup : steps at the start of a chain that are thrown away, at least 50
        Step sizes learn to be accepted four times in five; halfway, the covariance by which a cell's numbers are
        whitened is taken anew from draws of all its chains.
    n_draws : S, kept of each chain, at least 10
    sampler : "hmc", all cells and chains at once; or "nuts", Pyro's own, one chain of one cell after another: slow,
        and made by others, so a reference for a handful of cells
    max_leapfrogs : of "hmc": steps of a trajectory, 1 to so many, drawn at each transition
    seed : chains are random through it
    progress : whether to show a bar

    Returns
    -------
    PosteriorDraws

    Raises
    ------
    ValueError
        If a number is too small or the sampler unknown.
    ProgramError
        If the guide draws nothing continuous for each cell.

    Notes
    -----
    Discrete sites are summed out. Global sites are drawn from the guide once and held. Time: (warmup + S)
    (max_leapfrogs + 1) / 2 gradients of C x N cells; 100 cells x 1,500 genes take some five minutes on one core. For an
    ensemble it is the first fit that is asked.
    """
    require_fit(fit)
    n_chains, n_draws = whole("n_chains", n_chains, 2), whole("n_draws", n_draws, 10)
    warmup, max_leapfrogs = whole("warmup", warmup, 50), whole("max_leapfrogs", max_leapfrogs)
    if sampler not in ("hmc", "nuts"):
        raise ValueError(f'sampler must be "hmc" or "nuts", not {sampler!r}')
    ready = fit._ready(cells)
    names = cells.names if isinstance(cells, Cells) else cells.obs_names
    n_steps = warmup + n_draws
    total = n_steps * len(ready) * (1 if sampler == "hmc" else n_chains)
    found: list[_Chains] = []
    with tqdm(total=total, desc=f"sampling {len(ready):,} cells", unit="step", disable=not progress) as bar:

        def ask(block: Cells) -> _Chains:
            if sampler == "hmc":
                posterior = CellPosterior(fit.program, block, n_chains, seed=seed)
                return _hmc(posterior, warmup, n_draws, max_leapfrogs, lambda: bar.update(len(block)))
            one_by_one = []
            for row in range(len(block)):
                one = block.rows(torch.tensor([row], device=block.device), whole=True)
                posterior = CellPosterior(fit.program, one, seed=seed)
                one_by_one.append(_nuts(posterior, n_chains, warmup, n_draws, lambda: bar.update(n_steps)))
            return _joined(one_by_one)

        found.extend(by_block(fit.program, [ready], 8 * n_chains, seed, ask))
    return _told(_joined(found), names)


@dataclass(frozen=True)
class _Chains:
    """Numbers v (C, S, N, D); acceptance, step size, divergences, each (C, N); and whose numbers they are."""

    v: Tensor
    acceptance: Tensor
    size: Tensor
    divergences: Tensor
    sites: tuple[LocalSite, ...]


def _joined(parts: list[_Chains]) -> _Chains:
    return _Chains(
        torch.cat([p.v for p in parts], 2), torch.cat([p.acceptance for p in parts], 1),
        torch.cat([p.size for p in parts], 1), torch.cat([p.divergences for p in parts], 1), parts[0].sites,
    )  # fmt: skip


def _joint(posterior: CellPosterior) -> Any:
    def log_joint(v: Tensor) -> Tensor:
        prior, likelihood = posterior.log_joint(v)
        return prior + likelihood

    return log_joint


def guide_draws(posterior: CellPosterior, n_draws: int) -> Tensor:
    """(S, N, D) draws of the guide, S the first multiple of the copies that is enough."""
    return torch.cat([posterior.draw() for _ in range(-(-n_draws // posterior.n_copies))])


def _hmc(posterior: CellPosterior, warmup: int, n_draws: int, max_leapfrogs: int, tick: Any) -> _Chains:
    density = by_autograd(_joint(posterior))
    drawn = guide_draws(posterior, _GUIDE_DRAWS)
    centre, covariance = moments(drawn)
    factor = torch.linalg.cholesky(covariance).to(drawn.dtype)
    centre = centre.to(drawn.dtype)
    point = density(centre + _WIDER * (drawn[: posterior.n_copies] - centre))
    one = point.at.new_ones(1)
    size = point.at.new_full(point.at.shape[:2], posterior.size**-0.25)
    steps, kept, seen = DualAveraging(size, _ACCEPTED), [], []
    accepted, divergences = torch.zeros_like(size), torch.zeros_like(size)
    for i in range(warmup + n_draws):
        is_warm = i >= warmup
        n_leapfrogs = int(torch.randint(1, max_leapfrogs + 1, ()))
        moved = transition(density, point, one, factor, steps.settled if is_warm else steps.size, n_leapfrogs)
        point = moved.point
        if is_warm:
            kept.append(point.at)
            accepted, divergences = accepted + moved.acceptance, divergences + moved.diverged
        else:
            steps.learn(moved.acceptance)
            if warmup // 5 <= i < warmup // 2:
                seen.append(point.at)
            if i + 1 == warmup // 2:
                factor = torch.linalg.cholesky(moments(torch.cat(seen))[1]).to(drawn.dtype)
                steps = DualAveraging(size, _ACCEPTED)
        tick()
    return _Chains(torch.stack(kept, 1), accepted / n_draws, steps.settled, divergences, posterior.sites)


def _nuts(posterior: CellPosterior, n_chains: int, warmup: int, n_draws: int, tick: Any) -> _Chains:
    """Chains of one cell by Pyro's NUTS, on the real line, with a dense mass matrix of its own."""
    log_joint = _joint(posterior)

    def potential(values: dict[str, Tensor]) -> Tensor:
        return -log_joint(values["v"].reshape(1, 1, -1)).squeeze()

    drawn = guide_draws(posterior, _GUIDE_DRAWS)[:, 0]
    chains, accepted, sizes, divergences = [], [], [], []
    for c in range(n_chains):
        with torch.enable_grad():
            first = drawn.mean(0) + _WIDER * (drawn[c] - drawn.mean(0))
            kernel = NUTS(potential_fn=potential, full_mass=True, target_accept_prob=_ACCEPTED)
            run = MCMC(kernel, n_draws, warmup, initial_params={"v": first}, disable_progbar=True)
            run.run()
        told = run.diagnostics()
        chains.append(run.get_samples()["v"].detach())
        accepted.append(float(told["acceptance rate"]["chain 0"]))
        divergences.append(len(told["divergences"]["chain 0"]))
        sizes.append(float(kernel.step_size))
        tick()
    by_chain = [drawn.new_tensor(numbers).unsqueeze(-1) for numbers in (accepted, sizes, divergences)]
    return _Chains(torch.stack(chains).unsqueeze(2), by_chain[0], by_chain[1], by_chain[2], posterior.sites)


def _told(chains: _Chains, names: Any) -> PosteriorDraws:
    c, s, n, d = chains.v.shape
    draws = {}
    for site in chains.sites:
        value = site.value(chains.v.reshape(-1, d))[0]
        value = value.movedim(len(site.batch), 0).reshape(c, s, n, *site.batch, *value.shape[len(site.batch) + 1 :])
        draws[site.name] = value.cpu().numpy()
    numbers = chains.v.cpu().numpy()
    r_hats, sizes, by = chain_diagnostics(numbers)
    flat = numbers.reshape(-1, n * d)
    index = pd.MultiIndex.from_product([list(names), number_names(chains.sites)], names=["cell", "number"])
    columns = {
        "mean": flat.mean(0, dtype=float), "sd": flat.std(0, dtype=float, ddof=1), "r_hat": r_hats.ravel(),
        "ess": sizes.ravel(),
    }  # fmt: skip
    by_cell = {
        "r_hat": r_hats.max(-1), "ess": sizes.min(-1), "acceptance": chains.acceptance.mean(0).cpu().numpy(),
        "step_size": chains.size.mean(0).cpu().numpy(),
        "divergences": chains.divergences.sum(0).cpu().numpy().astype(int),
    }  # fmt: skip
    of_cells = pd.DataFrame(by_cell, index=pd.Index(list(names), name="cell"))
    table = pd.DataFrame(columns, index=index)
    table.attrs["by"] = by
    return PosteriorDraws(draws, numbers, table, of_cells)


def number_names(sites: Sequence[LocalSite]) -> list[str]:
    """Names of the numbers: a site's own where it is one number, else with its place, "z[3]"."""
    return [
        site.name if site.last - site.first == 1 else f"{site.name}[{i}]"
        for site in sites
        for i in range(site.last - site.first)
    ]


# ---- diagnostics of chains --------------------------------------------------------------------


def chain_diagnostics(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """(...) R-hat and (...) bulk ESS of draws (C, S, ...), by ArviZ where it is installed, and by whom."""
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        return split_r_hat(draws), bulk_ess(draws), "pyrosc"
    over = {"chain_axis": 0, "draw_axis": 1}
    return array_stats.rhat(draws, **over), array_stats.ess(draws, **over, method="bulk"), "arviz-stats"


def split_r_hat(draws: np.ndarray) -> np.ndarray:
    """(...) R-hat of draws (C, S, ...): the larger of that of ranks and of ranks of the distances from the median.

    Between split chains, of normal scores of ranks: it sees chains that differ in place or in scale.
    """
    folded = np.abs(draws - np.median(draws, (0, 1)))
    both = [split_gelman_rubin(torch.as_tensor(_scores(d)), 0, 1).numpy() for d in (draws, folded)]
    return np.maximum(*both)


def bulk_ess(draws: np.ndarray) -> np.ndarray:
    """(...) effective number of draws (C, S, ...) for the middle of their distribution: of normal scores of ranks."""
    half = draws.shape[1] // 2
    scores = _scores(np.concatenate([draws[:, :half], draws[:, -half:]]))
    return effective_sample_size(torch.as_tensor(scores), 0, 1).numpy()


def _scores(draws: np.ndarray) -> np.ndarray:
    """Normal scores (r - 3/8) / (n + 1/4) of ranks over chains and draws."""
    flat = draws.reshape(draws.shape[0] * draws.shape[1], -1)
    rank = stats.rankdata(flat, axis=0)
    return stats.norm.ppf((rank - 0.375) / (len(flat) + 0.25)).reshape(draws.shape)


# ---- the guide against them -------------------------------------------------------------------


def guide_error(
    fit: Fit,
    cells: Cells | anndata.AnnData,
    draws: PosteriorDraws | None = None,
    *,
    n_draws: int = 1000,
    max_r_hat: float = 1.01,
    seed: int = 0,
    progress: bool = True,
    **sampling: Any,
) -> pd.DataFrame:
    """How far the guide is from the posterior of each cell, number by number.

    Parameters
    ----------
    draws : of `sample_posterior` for these cells; None samples them
    n_draws : of the guide, at least 100
    max_r_hat : cells with a larger R-hat are not judged: their chains have not met
    seed : draws and directions are random through it
    progress : whether to show a bar
    **sampling : further arguments of `sample_posterior`

    Returns
    -------
    DataFrame
        One row a (cell, number), on the real line: "mean_error", |difference of means| in posterior sds; "sd_ratio",
        the guide's sd over the posterior's; "wasserstein", of the cell: the Wasserstein-1 distance along a direction,
        averaged over 50 random ones, with numbers in posterior sds (some 0.03 by chance at 1,000 draws); "r_hat";
        "is_judged". ``.attrs``: "share" of judged numbers whose ratio of sds is in 0.8 to 1.25, "mean_error" and
        "wasserstein" (medians), "unmixed", the names of cells left out, "verdict": "pass" where the share is at least
        0.9, "fail", or "none" without a cell to judge; and "text", a line that says so.

    Raises
    ------
    ValueError
        If ``draws`` are of other cells, or a number is out of range.
    """
    require_fit(fit)
    n_draws, max_r_hat = whole("n_draws", n_draws, 100), positive("max_r_hat", max_r_hat)
    names = list(cells.names if isinstance(cells, Cells) else cells.obs_names)
    if draws is None:
        draws = sample_posterior(fit, cells, seed=seed, progress=progress, **sampling)
    elif sampling:
        raise ValueError(f"{listed(sampling)}: there is nothing to sample, as draws= are given")
    elif list(draws.cells.index) != names:
        raise ValueError("draws are of other cells, or in another order: sample_posterior(fit, cells) for these")

    def ask(block: Cells) -> Tensor:
        return guide_draws(CellPosterior(fit.program, block, 8, seed=seed), n_draws).cpu()

    guessed = torch.cat(list(by_block(fit.program, [fit._ready(cells)], 64, seed, ask)), 1).double().numpy()
    c, s, n, d = draws.numbers.shape
    exact = draws.numbers.reshape(c * s, n, d).astype(np.float64)
    if guessed.shape[2] != d:
        raise ValueError(f"draws have {d} numbers a cell and the guide {guessed.shape[2]}: they are of another fit")
    mean, sd = exact.mean(0), exact.std(0, ddof=1)
    table = pd.DataFrame(index=draws.table.index)
    table["mean_error"] = (np.abs(guessed.mean(0) - mean) / sd).ravel()
    table["sd_ratio"] = (guessed.std(0, ddof=1) / sd).ravel()
    table["wasserstein"] = np.repeat(_sliced((guessed - mean) / sd, (exact - mean) / sd, seed), d)
    table["r_hat"] = draws.table["r_hat"]
    mixed = (draws.cells["r_hat"] <= max_r_hat).to_numpy()
    table["is_judged"] = np.repeat(mixed, d)
    judged = table[table["is_judged"]]
    unmixed = [name for name, is_mixed in zip(names, mixed) if not is_mixed]
    share = float(judged["sd_ratio"].between(_LEAST, _MOST).mean()) if len(judged) else float("nan")
    verdict = "none" if not len(judged) else "pass" if share >= _SHARE else "fail"
    left_out = "" if not unmixed else (
        f" {len(unmixed)} of {n:,} cells are left out, as their chains have not met (R-hat above {max_r_hat:g}): "
        f"{listed(unmixed)}. Sample them longer."
    )  # fmt: skip
    text = (
        f"the guide's sd is within {_LEAST:g} to {_MOST:g} of the posterior's in {share:.0%} of {len(judged):,} "
        f"numbers ({_SHARE:.0%} wanted): {verdict}.{left_out}"
    )
    table.attrs = {
        "share": share, "mean_error": float(judged["mean_error"].median()),
        "wasserstein": float(judged["wasserstein"].median()), "unmixed": unmixed, "verdict": verdict, "text": text,
    }  # fmt: skip
    return table


def _sliced(one: np.ndarray, other: np.ndarray, seed: int, n_directions: int = 50) -> np.ndarray:
    """(N,) Wasserstein-1 distance of draws (S, N, D) and (T, N, D) along random directions, averaged over them."""
    directions = np.random.default_rng(seed).normal(size=(one.shape[-1], n_directions))
    directions /= np.linalg.norm(directions, axis=0)
    at = (np.arange(200) + 0.5) / 200  # W1 is the mean distance of quantiles
    found = []
    for cell in range(one.shape[1]):
        a, b = (np.quantile(draws[:, cell] @ directions, at, axis=0) for draws in (one, other))
        found.append(np.abs(a - b).mean())
    return np.array(found)
