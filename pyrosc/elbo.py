"""The evidence lower bound of each cell.

ELBO = E_q[log p(x | latents)] - sum over latent sites of KL(q || p)

Discrete sites that a story marks with ``infer={"enumerate": "parallel"}`` are summed out exactly, cell by cell:

ELBO = E_q[log sum_y p(y) p(z | y) p(x | z, y)] - E_q[log q(z)]

Those that the guide draws, marked the same, are summed over in expectations:

ELBO = E_q(z) sum_y q(y | z) E_q(u | z, y)[log p(y, u, z, x) - log q(z, y, u)]
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent, LogNormal, MaskedDistribution, Normal, TransformedDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .cells import Cells
from .encoders import FullRankNormal
from .guides import is_computed, is_enumerated
from .program import Program, analytic_kl


def in_cells(site: Any) -> bool:
    """Whether a site is drawn for each cell."""
    return any(f.name == "cells" for f in site["cond_indep_stack"])


def of_cells(values: Tensor, n_front: int = 0) -> Tensor:
    """(..., n) log densities of a site in the plate of cells, summed over plates inside it: (front, n)."""
    inner = tuple(range(n_front, values.dim() - 1))
    return values.sum(inner) if inner else values


def weighed(values: Tensor, site: Any, cells: Cells) -> Tensor:
    """Densities of a site under the masks and scales around it, as of one cell: not times the plate's own scale."""
    mask, scale = site["mask"], site["scale"]
    if in_cells(site):
        scale = scale / (cells.total / len(cells))
    if mask is not None and mask is not True:
        values = torch.where(torch.as_tensor(mask, device=values.device), values, 0.0)
    return values if isinstance(scale, float | int) and scale == 1 else values * scale


def kl(guide_site: Any, model_site: Any, *, closed: bool = True) -> Tensor:
    """KL term of one latent site, of its batch shape: in closed form where that is known and asked for.

    Else log q - log p at the draw, with its gradient through the draw alone (`still`).
    """
    found = analytic_kl(guide_site["fn"], model_site["fn"]) if closed else None
    if found is not None:
        return found
    value = guide_site["value"]
    return still(guide_site["fn"]).log_prob(value) - model_site["fn"].log_prob(value)


def still(law: Any) -> Any:
    """The law with its numbers held fixed, so that a density has its gradient through the value alone.

    Normals, log-normals, and what constant maps make of them; any other law is answered as it is.
    """
    if type(law) in (Normal, LogNormal):
        return type(law)(law.loc.detach(), law.scale.detach(), validate_args=False)
    if type(law) is FullRankNormal:
        return FullRankNormal(law.loc.detach(), scale_tril=law.scale_tril.detach(), validate_args=False)
    if isinstance(law, Independent):
        return Independent(still(law.base_dist), law.reinterpreted_batch_ndims, validate_args=False)
    if type(law) is MaskedDistribution:
        return MaskedDistribution(still(law.base_dist), law._mask)
    if type(law) is TransformedDistribution and not any(isinstance(t, nn.Module) for t in law.transforms):
        base = still(law.base_dist)
        return law if base is law.base_dist else TransformedDistribution(base, law.transforms, validate_args=False)
    return law


@dataclass
class Terms:
    """The terms of an ELBO at KL weight 1, from one draw of the guide.

    reconstruction : (n,) log density of what was observed
    local_kl : site -> (n,)
    global_kl : site -> ()  once for the whole data set
    global_observed : () log density of what was observed of all cells together
    side : (n,) what the guide's factors add to the objective of training, and is no part of the ELBO
    z_mean : (n, K) the guide's mean of the state (z, or what the story computes z from), None without a closed one
    """

    reconstruction: Tensor
    local_kl: dict[str, Tensor] = field(default_factory=dict)
    global_kl: dict[str, Tensor] = field(default_factory=dict)
    global_observed: Tensor | float = 0.0
    side: Tensor | None = None
    z_mean: Tensor | None = None

    @property
    def local(self) -> Tensor:
        """(n,) nats: reconstruction less the KL of the cell's own sites."""
        return self.reconstruction - sum(self.local_kl.values(), torch.zeros_like(self.reconstruction))


def elbo_terms(program: Program, cells: Cells) -> Terms:
    """Terms of the ELBO of these cells; random through the guide's draw.

    Each is as of one cell: plate scales do not enter.
    """
    guide = run_guide(program, cells)
    model = follow(program, guide, cells)
    expected = Expectation(program, guide)
    drawn: dict[str, Any] = guide.nodes
    nodes: dict[str, Any] = model.nodes
    terms = Terms(cells.library.new_zeros(len(cells)))
    summed = Enumerated(program.n_plates)
    for name, site in nodes.items():
        if site["type"] != "sample" or site_is_subsample(site) or is_computed(site):
            continue
        if program.enumerated and (name in program.enumerated or summed.concerns(site)):
            summed.add(name, site, cells)
            continue
        if site["is_observed"]:
            value = site["fn"].log_prob(site["value"])
        else:
            value = kl(drawn[name], site, closed=name not in program.noisy)
        value = expected(weighed(value, site, cells))
        if site["is_observed"] and not in_cells(site):
            terms.global_observed = terms.global_observed + value.sum()
        elif site["is_observed"]:
            terms.reconstruction = terms.reconstruction + of_cells(value)
        elif in_cells(site):
            terms.local_kl[name] = of_cells(value)
        else:
            terms.global_kl[name] = value.sum()
    if program.enumerated:
        # The KL of a site whose prior depends on y is against its prior with y summed out.
        joint, prior = summed.logsumexp()
        terms.reconstruction = terms.reconstruction + joint - prior
        for name in summed.latent:
            term = of_cells(drawn[name]["fn"].log_prob(drawn[name]["value"]))
            terms.local_kl[name] = term - prior
            prior = torch.zeros_like(prior)
        terms.reconstruction = terms.reconstruction + prior
    terms.side = side_terms(guide, cells)
    state = program.state_site
    if state in terms.local_kl:
        try:
            terms.z_mean = drawn[state]["fn"].mean
        except NotImplementedError:
            pass
    return terms


def side_terms(guide: poutine.Trace, cells: Cells) -> Tensor | None:
    """(n,) what factors of a guide add to the objective: such as how well it tells known labels; None without any.

    A factor in a guide counts against it (``pyro.factor(name, -term, has_rsample=False)``), as in Pyro's objectives.
    """
    found = None
    nodes: dict[str, Any] = guide.nodes
    for site in nodes.values():
        if site["type"] == "sample" and site["is_observed"] and not site_is_subsample(site) and not is_computed(site):
            value = -of_cells(weighed(site["fn"].log_prob(site["value"]), site, cells))
            found = value if found is None else found + value
    return found


def run_guide(program: Program, cells: Cells) -> poutine.Trace:
    """One run of the guide; discrete sites that it draws to be summed over take all their values at once."""
    run: Any = program.guide
    if program.guided_sums:
        run = poutine.enum(run, first_available_dim=-1 - program.n_plates)
    return poutine.trace(run).get_trace(cells)


class Expectation:
    """Expectations over the guide's discrete sites: densities of shape (values..., plates, n) to (plates, n)."""

    def __init__(self, program: Program, guide: poutine.Trace) -> None:
        self.n_batch = program.n_plates
        self.weight: Any = None
        nodes: dict[str, Any] = guide.nodes
        if program.guided_sums:
            logs = [nodes[name]["fn"].log_prob(nodes[name]["value"]) for name in program.guided_sums]
            self.weight = sum(logs[1:], logs[0]).exp()

    def __call__(self, values: Tensor) -> Tensor:
        front = values.dim() - self.n_batch
        if self.weight is None or front <= 0:
            return values
        weighted = self.weight * values
        return weighted.sum(tuple(range(weighted.dim() - self.n_batch)))


def follow(program: Program, guide: poutine.Trace, cells: Cells, n_draws: int | None = None) -> poutine.Trace:
    """The model along a guide's draws; discrete sites that are summed out take all their values at once.

    With ``n_draws`` the guide holds that many draws of every site, in front of the plates.
    """

    def model(cells: Cells) -> None:
        with draws_plate(program, n_draws):
            program.model(cells)

    run: Any = poutine.replay(model, trace=guide)
    if program.enumerated:
        run = poutine.enum(run, first_available_dim=-1 - program.n_plates - (n_draws is not None))
    return poutine.trace(run).get_trace(cells)


def draws_plate(program: Program, n_draws: int | None) -> Any:
    """A plate in front of the story's own; none for None."""
    return nullcontext() if n_draws is None else pyro.plate("draws", n_draws, dim=-1 - program.n_plates)


class Enumerated:
    """Log densities of the sites of a run that depend on enumerated values.

    Their batch shapes are (values..., draws, plates, n), with draws where ``has_draws``.
    """

    def __init__(self, n_plates: int, has_draws: bool = False) -> None:
        self.n_batch, self.n_draws = n_plates + has_draws, int(has_draws)
        self.all: list[Tensor] = []
        self.priors: list[Tensor] = []
        self.latent: list[str] = []

    def concerns(self, site: Any) -> bool:
        """Whether the site's density depends on an enumerated value."""
        return len(site["fn"].batch_shape) > self.n_batch

    def add(self, name: str, site: Any, cells: Cells) -> None:
        """Count a site in."""
        value = weighed(site["fn"].log_prob(site["value"]), site, cells)
        self.all.append(value)
        if not site["is_observed"]:
            self.priors.append(value)
            if not is_enumerated(site):
                self.latent.append(name)

    @property
    def front(self) -> torch.Size:
        """Numbers of values of the enumerated sites."""
        shape = torch.broadcast_shapes(*(v.shape for v in self.all))
        return shape[: len(shape) - self.n_batch]

    def table(self, values: list[Tensor] | None = None) -> Tensor:
        """(combinations of values, draws, n) log densities, plates inside the cells' summed."""
        front, total = self.front, torch.zeros(())
        for value in self.all if values is None else values:
            value = value.expand(*front, *value.shape[max(value.dim() - self.n_batch, 0) :])
            total = total + of_cells(value, len(front) + self.n_draws)
        return total.flatten(0, len(front) - 1)

    def logsumexp(self) -> tuple[Tensor, Tensor]:
        """(draws, n) log of the sum over values: of all densities, and of those of latent sites alone."""
        return self.table().logsumexp(0), self.table(self.priors).logsumexp(0)
