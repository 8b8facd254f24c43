"""Programmes: factors of a linear decoder as lists of genes, in an order and with signs that are the same every time.

What a story with loadings W (G, K) leaves open is settled by rule, from posterior means:

constant  Shares are a softmax, so a number added to all genes' loadings of a factor changes nothing. Loadings are told
          relative to the median gene, draw by draw: under a sparse prior most genes then stay at 0, and a mean would
          move them off it where a factor raises many. Rates (given size factors) have no such constant.
sign      z_k and W_k may both be turned around. The sum of cubed loadings of a factor is positive: the genes that it
          moves most, it raises.
order     Factors are in order of the variance that they give to log shares, var(z_k) sum_g W_gk^2, z from its prior;
          "factor1" has the most.
rotation  Nothing is done about it: W is as the prior and the guide left it. Under N(0, sd) loadings and N(0, I) states
          every rotation is as good, and single factors mean little.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .cells import Cells
from .counts import require_memory
from .draws import run_model, sites_of
from .elbo import in_cells
from .errors import ProgramError
from .posterior import Fit
from .schema import listed

_PRIOR_DRAWS = 4000  # of z, for the variance of its prior: to 2 %


@dataclass
class Factors:
    """Draws of loadings (S, G, K), settled, and where each factor stands in z: ``z[:, place] * sign``.

    strength : (K,) standard deviation over cells, root mean square over genes, of what each factor adds to log shares
    """

    draws: np.ndarray
    place: np.ndarray
    sign: np.ndarray
    strength: np.ndarray

    @property
    def names(self) -> list[str]:
        return [f"factor{k + 1}" for k in range(len(self.place))]


def settled(fit: Fit, n_draws: int, seed: int) -> Factors:
    """Draws of the loadings of a fit, of each refit of an ensemble in turn, settled by the rules above.

    Refits keep the factors that they began with, up to what their own cells say: each refit's are matched to those of
    the fit by correlation over genes.
    """
    n_genes, n_latent = _shape(fit)
    require_memory(
        16 * n_draws * n_genes * n_latent, "these draws of loadings", "Ask for fewer draws: loadings(n_draws=...)."
    )
    blank = fit.program.blank(1)

    def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
        site: Any = trace.nodes["loadings"]
        return site["value"].reshape(-1, 1, n_genes, n_latent).expand(n or 1, 1, n_genes, n_latent).cpu()

    (found,) = fit._runs(blank, [[blank]], n_draws, seed, ask)
    draws = found[0][:, 0].double().numpy()
    if fit.schema.size_factor is None:
        draws = draws - np.median(draws, 1, keepdims=True)
    if fit.members:
        draws = _matched(draws, fit.member_of(n_draws))
    mean = draws.mean(0)
    strength = _sd_of_prior(fit, blank, seed) * np.sqrt((mean**2).mean(0))
    place = np.argsort(-strength, kind="stable")
    sign = np.where((mean**3).sum(0) < 0, -1, 1)[place]
    return Factors(draws[:, :, place] * sign, place, sign, strength[place])


def _shape(fit: Fit) -> tuple[int, int]:
    """(G, K) of the site "loadings"; refuses stories that have none, or another thing by that name."""
    blank = fit.program.blank(1)
    with fit.program.driven(0), torch.no_grad():
        trace = run_model(fit.program, poutine.trace(fit.program.guide).get_trace(blank), blank, None)
    nodes: dict[str, Any] = trace.nodes
    if "loadings" not in nodes:
        decoder = fit.program.parts["decoder"] if "decoder" in fit.program.parts else None
        point = " (its LinearDecoder has weights, without a posterior)" if hasattr(decoder, "loadings") else ""
        raise ProgramError(
            f'{fit.program.story} has no site "loadings", which this needs{point}. Its sites: '
            f"{listed(sites_of(trace), 20)}. Stories with one: pyrosc.linear_scvi(cells)"
        )
    shape = tuple(nodes["loadings"]["value"].shape)
    if in_cells(nodes["loadings"]) or len(shape) != 2 or shape[0] != fit.schema.n_genes:
        raise ProgramError(
            f'site "loadings" of {fit.program.story} must be one for all cells, of shape (genes, factors) = '
            f"({fit.schema.n_genes}, K), not {shape}"
        )
    return shape[0], shape[1]


def _sd_of_prior(fit: Fit, blank: Cells, seed: int) -> np.ndarray:
    """(K,) standard deviations of z under its prior."""
    with fit.program.driven(seed), torch.no_grad():
        nodes: dict[str, Any] = poutine.trace(fit.program.model).get_trace(blank).nodes
        if "z" not in nodes:
            raise ProgramError(
                f'{fit.program.story} has no site "z", which this needs: the state that loadings multiply'
            )
        law = nodes["z"]["fn"]
        try:
            variance = law.variance
        except NotImplementedError:
            variance = law.sample((_PRIOR_DRAWS,)).var(0)
    return variance.reshape(-1, variance.shape[-1]).mean(0).sqrt().double().cpu().numpy()


def _matched(draws: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Draws whose factors are those of the first refit: each other's in the order and with the signs nearest to it."""
    made = draws.copy()
    first = _unit(draws[member == member[0]].mean(0))
    for m in np.unique(member)[1:]:
        alike = first.T @ _unit(draws[member == m].mean(0))  # (K, K)
        _, theirs = linear_sum_assignment(-np.abs(alike))
        signs = np.sign(alike[np.arange(len(theirs)), theirs])
        made[member == m] = draws[member == m][:, :, theirs] * np.where(signs == 0, 1, signs)
    return made


def _unit(loadings: np.ndarray) -> np.ndarray:
    return loadings / np.maximum(np.linalg.norm(loadings, axis=0), 1e-300)


def _attributes(fit: Fit, factors: Factors) -> dict[Hashable | None, Any]:
    is_share = fit.schema.size_factor is None
    return {
        "place": [int(k) for k in factors.place],
        "sign": [int(s) for s in factors.sign],
        "strength": [float(s) for s in factors.strength],
        "unit": f"natural log of the {'share' if is_share else 'rate'} per unit of z",
        "relative_to": "the median gene" if is_share else "nothing",
        "uncertainty": "loadings at one rotation, each for itself (mean field)" + " and refits" * bool(fit.members),
    }


def loadings(fit: Fit, n_draws: int, interval: float, seed: int) -> pd.DataFrame:
    """See `Fit.loadings`."""
    factors = settled(fit, n_draws, seed)
    sd, lower, upper = fit.spread(factors.draws, interval)
    values = np.stack([factors.draws.mean(0), sd, lower, upper], -1)  # (G, K, 4)
    header = pd.MultiIndex.from_product([factors.names, ["mean", "sd", "lower", "upper"]], names=["factor", None])
    genes = pd.Index(fit.schema.genes, name="gene")
    table = pd.DataFrame(values.reshape(len(genes), -1), index=genes, columns=header)
    table.attrs = _attributes(fit, factors)
    return table


def top_genes(fit: Fit, n: int, n_draws: int, interval: float, seed: int) -> pd.DataFrame:
    """See `Fit.top_genes`."""
    table = loadings(fit, n_draws, interval, seed)
    pieces = []
    for name in table.columns.unique("factor"):
        of_factor = table[name]
        first = np.argsort(-of_factor["mean"].abs().to_numpy(), kind="stable")[:n]
        piece = of_factor.iloc[first].reset_index()
        piece.index = pd.MultiIndex.from_product([[name], range(1, len(piece) + 1)], names=["factor", "rank"])
        pieces.append(piece)
    found = pd.concat(pieces)
    found.attrs = table.attrs
    return found


def scores(fit: Fit, cells: Cells, n_draws: int, seed: int) -> pd.DataFrame:
    """See `Fit.factors`."""
    factors = settled(fit, n_draws, seed)
    z = fit._centres(cells).double().cpu().numpy()
    table = pd.DataFrame(z[:, factors.place] * factors.sign, index=cells.names, columns=factors.names)
    table.attrs = _attributes(fit, factors)
    return table
