"""Counts that a fitted story makes: new ones, those of another world with the same noise, and the law they follow.

A count x with law F is the quantile of its noise u, uniform between F(x - 1) and F(x). In another world, with law F',
the same noise gives F'^-1(u): the comonotone counterfactual. It is one of the couplings that a story allows, as it
gives the laws of counts in both worlds but not their joint law; draws with new noise are the interventional
distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from pyro import poutine
from scipy import sparse, special, stats
from torch import Tensor

from .cells import Cells
from .counts import require_memory
from .distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from .draws import draw_guide, sites_of
from .elbo import in_cells
from .errors import ProgramError
from .posterior import Fit

_FAR = 1e-6
_MOST_SIZE = 1e10  # inverse dispersions beyond which a negative binomial is Poisson to 1e-9


def law_of_counts(fit: Fit, trace: poutine.Trace) -> Any:
    """The law of single counts in a run of the model.

    Raises
    ------
    ProgramError
        If the story has no counts.
    """
    if "x" not in trace.nodes:
        raise ProgramError(f'{fit.program.story} has no site "x" of counts')
    site: Any = trace.nodes["x"]
    return getattr(site["fn"], "base_dist", site["fn"])


# ---- the same noise in another world ----------------------------------------------------------


def tails(law: Any, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(count <= value) and P(count > value), each with its own digits, in float64; extra zeros included."""
    mean, size, extra = _numbers(law)
    k = np.maximum(value, 0)
    share = mean / (np.minimum(size, _MOST_SIZE) + mean)
    is_poisson = size > _MOST_SIZE
    below = np.where(is_poisson, special.pdtr(k, mean), special.betaincc(k + 1, np.minimum(size, _MOST_SIZE), share))
    above = np.where(is_poisson, special.pdtrc(k, mean), special.betainc(k + 1, np.minimum(size, _MOST_SIZE), share))
    is_none = value < 0
    return np.where(is_none, 0.0, extra + (1 - extra) * below), np.where(is_none, 1.0, (1 - extra) * above)


def _numbers(law: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean before extra zeros, inverse dispersion (infinite for Poisson), probability of an extra zero."""
    if not isinstance(law, (NegativeBinomial, ZeroInflatedNegativeBinomial, Poisson)):
        raise ProgramError(
            f"counts of {type(law).__name__} have no noise that another world could share; those of NegativeBinomial, "
            'ZeroInflatedNegativeBinomial and Poisson have. Draw them anew: noise="new"'
        )
    parameters = [law.mean] if isinstance(law, Poisson) else [law._full(name) for name in law._names]
    full = [p.detach().cpu().double().numpy() for p in parameters]
    mean = full[0]
    size = full[1] if len(full) > 1 else np.full_like(mean, np.inf)
    extra = special.expit(full[2]) if len(full) > 2 else np.zeros_like(mean)
    return mean, size, extra


def noise_of(law: Any, value: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noise of counts, as its distance from 0 and from 1.

    ``place`` is where it lies, from 0 to 1, between those of the count below and the count (uniform draws).
    """
    below, above = tails(law, value)
    below1, above1 = tails(law, value - 1)
    # p(x) is the difference of the smaller tails, which keep their digits.
    p = np.where(below < 0.5, below - below1, above1 - above)
    return below1 + place * p, above + (1 - place) * p


def counts_at(law: Any, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Counts of a law at given noise, by its distances from 0 and from 1."""
    mean, size, extra = _numbers(law)
    found = np.zeros(lower.shape)
    at = np.nonzero(lower > tails(law, np.zeros(mean.shape))[0])
    if len(at[0]):
        mean, size, extra = (a[at] for a in np.broadcast_arrays(mean, size, extra))
        low, high = (lower[at] - extra) / (1 - extra), upper[at] / (1 - extra)
        capped = np.minimum(size, _MOST_SIZE)
        counts = np.where(
            size > _MOST_SIZE, stats.poisson.ppf(low, mean), stats.nbinom.ppf(low, capped, capped / (capped + mean))
        )
        far = high < _FAR  # where 1 - high has lost the digits that tell
        if far.any():
            counts[far] = _beyond(high[far], mean[far], size[far])
        found[at] = counts
    return found


def _beyond(tail: np.ndarray, mean: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Smallest counts with no more than this probability above them, by bisection; without extra zeros."""

    def above(k: np.ndarray) -> np.ndarray:
        capped = np.minimum(size, _MOST_SIZE)
        nb = special.betainc(k + 1, capped, mean / (capped + mean))
        return np.where(size > _MOST_SIZE, special.pdtrc(k, mean), nb)

    low, high = np.full(mean.shape, -1.0), np.ceil(mean) + 1
    while (short := above(high) > tail).any():
        low, high = np.where(short, high, low), np.where(short, 2 * high, high)
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        short = above(middle) > tail
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return high


def same_noise(
    fit: Fit, cells: Cells, worlds: list[Cells], n_draws: int, at: np.ndarray | None, names: list[str], seed: int
) -> np.ndarray:
    """(S, N, genes) counts of these cells in another world (one of ``worlds`` at random), with the noise they had."""
    draw, found = np.random.default_rng([seed, 3]), []
    chosen = slice(None) if at is None else at
    noise: list[tuple[np.ndarray, np.ndarray, np.ndarray, Any]] = []
    n_told = 0

    def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
        # Of a block of cells the factual world comes first, for every run of the guide; then the others, likewise.
        nonlocal n_told
        law = law_of_counts(fit, trace)
        shape = torch.Size((n or 1, len(block), law.batch_shape[-1]))
        law = law.expand(shape)
        if block.has_counts:
            if n_told:
                noise.clear()
                n_told = 0
            x: Any = block.x
            value = np.broadcast_to(x.cpu().double().numpy(), shape)
            noise.append((*noise_of(law, value, draw.uniform(size=shape)), value, _numbers(law)))
            return torch.zeros(shape[0], len(block), len(names))
        lower, upper, value, before = noise[n_told % len(noise)]
        counts = counts_at(law, lower, upper)
        is_same = np.all([a == b for a, b in zip(before, _numbers(law))], axis=0)
        counts = np.where(is_same, value, counts)  # exactly, and not but for rounding
        n_told += 1
        return torch.from_numpy(counts[..., chosen].astype(np.float32))

    groups = [[cells], *([world.without_counts()] for world in worlds)]
    for answers in fit._runs(cells, groups, n_draws, seed, ask):
        drawn = torch.stack(answers[1:])
        which = torch.from_numpy(draw.integers(len(worlds), size=(1, *drawn.shape[1:3], 1)))
        found.append(drawn.gather(0, which.expand(1, *drawn.shape[1:]))[0])
    return torch.cat(found, 1).numpy()


# ---- synthetic cells --------------------------------------------------------------------------


def generated(
    fit: Fit, n_cells: int | None, like: Cells | None, do: Mapping[str, Any] | None, seed: int
) -> anndata.AnnData:
    """See `Fit.generate`."""
    draw = np.random.default_rng(seed)
    if like is None:
        world = Cells.blank(fit.schema, n_cells or 0, seed=seed).to(fit.device, fit.program.dtype)
        read = world
    else:
        rows = np.arange(len(like)) if n_cells is None else np.sort(draw.choice(len(like), n_cells))
        read = world = like[rows]
    require_memory(16 * len(world) * world.n_genes, "these cells", "Ask for fewer at a time.")
    if do:
        worlds = fit._worlds(world, do)
        if len(worlds) > 1:
            raise ValueError('generate sets columns to one level each; "all" has no cell of its own')
        world = worlds[0]
    rows_x: list[sparse.csr_matrix] = []
    states: list[np.ndarray] = []
    if like is None:
        known = shared_draw(fit, seed)
        for start in range(0, len(world), 1000):
            part = world[np.arange(start, min(start + 1000, len(world)))]
            values = fit.program.generate(part, fixed=known, seed=int(draw.integers(2**31)))
            if "x" not in values:
                raise ProgramError(f'{fit.program.story} has no site "x" of counts, so it makes no cells')
            rows_x.append(sparse.csr_matrix(values["x"].numpy()))
            if "z" in values:
                states.append(values["z"].numpy())
    else:

        def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
            law_of_counts(fit, trace)  # there are counts to make
            nodes: dict[str, Any] = trace.nodes
            values = [nodes[name]["value"] for name in ("x", "z") if name in nodes]
            return torch.cat([v.reshape(1, len(block), -1) for v in values], -1)

        runs = fit._runs(read, [[world.without_counts()]], 1, seed, ask, fit.program)
        for (block,) in runs:
            both = block[0].cpu().numpy()
            rows_x.append(sparse.csr_matrix(both[:, : world.n_genes]))
            states.append(both[:, world.n_genes :])
    obs = world.obs.copy()
    if like is not None:
        obs["like"] = list(read.names)
    obs["library"] = world.library.cpu().numpy().ravel()
    obs.index = pd.Index([f"generated{i}" for i in range(len(world))])
    made = anndata.AnnData(sparse.vstack(rows_x).tocsr(), obs=obs, var=pd.DataFrame(index=list(fit.schema.genes)))
    if states and states[0].shape[1]:
        made.obsm["z"] = np.concatenate(states)
    source = "prior" if like is None else "aggregate posterior"
    made.uns["pyrosc"] = {"story": fit.program.story, "source": source, "seed": seed}
    return made


def shared_draw(fit: Fit, seed: int) -> dict[str, Tensor]:
    """One posterior draw of the sites that all cells have in common."""
    program = fit.program
    if not program.has_globals:
        return {}
    with program.driven(seed), torch.no_grad():
        guide = draw_guide(program, program.blank(2))
        model = poutine.trace(program.model).get_trace(program.blank(2))
    sites: dict[str, Any] = {name: guide.nodes[name] for name in sites_of(guide)}
    drawn: dict[str, Any] = model.nodes
    return {
        name: site["value"].reshape(drawn[name]["value"].shape)
        for name, site in sites.items()
        if name in drawn and not in_cells(drawn[name])
    }


# ---- the law of counts, gene by gene ----------------------------------------------------------


def noise(fit: Fit, cells: Cells, n_draws: int, interval: float, seed: int) -> pd.DataFrame:
    """See `Fit.noise`."""
    total: Tensor | float = 0.0
    has_gate = False

    def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
        nonlocal has_gate
        law = law_of_counts(fit, trace)
        if not hasattr(law, "dispersion"):
            raise ProgramError(f"counts of {fit.program.story} are {type(law).__name__}: they have no dispersion")
        has_gate = hasattr(law, "gate_logits")
        parts = [law.dispersion, torch.sigmoid(law.gate_logits)] if has_gate else [law.dispersion]
        return torch.cat([p.expand(n or 1, len(block), p.shape[-1]) for p in parts], -1)

    for (values,) in fit._runs(cells, [[cells]], n_draws, seed, ask):
        total = total + values.double().sum(1).cpu()
    mean = np.asarray(total) / len(cells)
    _, low, high = fit.spread(mean, interval, least=0.0)
    columns: dict[str, np.ndarray] = {}
    n_genes = cells.n_genes
    for k, name in enumerate(["dispersion", "gate"] if has_gate else ["dispersion"]):
        here = slice(k * n_genes, (k + 1) * n_genes)
        columns |= {name: mean[:, here].mean(0), f"{name}_lower": low[here], f"{name}_upper": high[here]}
    return pd.DataFrame(columns, index=pd.Index(fit.schema.genes, name="gene"))


def technical_zeros(
    fit: Fit, cells: Cells, at: np.ndarray | None, names: list[str], n_draws: int, seed: int
) -> pd.DataFrame:
    """See `Fit.technical_zeros`."""
    require_memory(8 * len(cells) * len(names), "this table", "Ask for fewer genes or cells at a time.")
    chosen = torch.arange(cells.n_genes) if at is None else torch.as_tensor(at)
    found = []

    def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
        law = law_of_counts(fit, trace)
        if not hasattr(law, "gate_logits"):
            raise ProgramError(
                f"counts of {fit.program.story} are {type(law).__name__}, which has no extra zeros; fit the story with "
                "likelihood=ZINBLikelihood() to ask for them"
            )
        here = chosen.to(block.device)
        mean, size = (law._full(name).index_select(-1, here) for name in ("mean", "dispersion"))
        zero = -size * torch.log1p(mean / size)
        extra = torch.sigmoid(law.gate_logits.index_select(-1, here) - zero)
        x: Any = block.x
        extra = torch.where(x.index_select(-1, here) > 0, 0.0, extra)
        return extra.expand(n or 1, len(block), len(here))

    for (values,) in fit._runs(cells, [[cells]], n_draws, seed, ask):
        found.append(values.mean(0).cpu().numpy())
    return pd.DataFrame(np.concatenate(found), index=cells.names, columns=names)


# ---- for ArviZ --------------------------------------------------------------------------------


def to_arviz(fit: Fit, cells: Cells, n_draws: int, sites: Sequence[str] | None, seed: int) -> Any:
    """See `Fit.to_arviz`."""
    try:
        from arviz_base import from_dict
    except ImportError as error:
        raise ImportError('to_arviz needs arviz-base: pip install "pyrosc[arviz]"') from error
    if sites is None:
        with fit.program.driven(0), torch.no_grad():
            guide = draw_guide(fit.program, cells.rows(torch.arange(1, device=cells.device), whole=True))
        drawn = {n for n in sites_of(guide) if not guide.nodes[n]["is_observed"]}
        sites = [*(n for n in sites_of(guide) if n in drawn), *(n for n in fit.program.enumerated if n not in drawn)]
    chains = [Fit(program, fit.history, fit.settings) for program in fit.members or (fit.program,)]
    posterior: dict[str, np.ndarray] = {}
    dims: dict[str, list[str]] = {"x": ["cell", "gene"]}
    for name in sites:
        posterior[name] = np.stack([chain.draws(name, cells, n_draws, seed=seed) for chain in chains])
        shape = posterior[name].shape[2:]
        is_cells = bool(shape) and shape[0] == len(cells) and _is_of_cells(fit, name)
        rest = shape[1:] if is_cells else shape
        of_genes = [("gene" if n == cells.n_genes else f"{name}_dim") for n in rest]
        dims[name] = ["cell"] * is_cells + [d if of_genes.count(d) == 1 else f"{d}_{i}" for i, d in enumerate(of_genes)]

    def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
        site: Any = trace.nodes["x"]
        return site["fn"].log_prob(site["value"]).reshape(n or 1, len(block))

    likelihood = [
        torch.cat([d.cpu() for (d,) in chain._runs(cells, [[cells]], n_draws, seed, ask)], 1) for chain in chains
    ]
    x: Any = cells.x
    held = {
        "posterior": posterior,
        "posterior_predictive": {"x": np.stack([chain.predict(cells, n_draws, seed=seed) for chain in chains])},
        "log_likelihood": {"x": torch.stack(likelihood).numpy()},
        "observed_data": {"x": x.cpu().numpy()},
    }
    coords = {"cell": list(cells.names), "gene": list(cells.schema.genes)}
    tree = from_dict(held, coords=coords, dims=dims)
    tree.attrs |= {"inference_library": "pyrosc", "story": fit.program.story}
    return tree


def _is_of_cells(fit: Fit, name: str) -> bool:
    with fit.program.driven(0), torch.no_grad():
        trace = poutine.trace(fit.program.model).get_trace(fit.program.blank(2))
    return in_cells(trace.nodes[name])
