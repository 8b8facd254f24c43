"""The density log p(x, v) of cells as a function of the latent numbers v that each has of its own, with its gradient.

    v[n]          numbers of cell n on the real line: its latent sites side by side, mapped from their supports
    log p(v[n])   density of the latent sites, times the Jacobian of the maps
    log p(x | v)  density of what was observed of the cell

What all cells share (weights; draws of global sites) is held fixed, so cells are independent and every sampler and
optimiser runs on all of them at once. Discrete sites are summed out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from .cells import Cells
from .draws import draw_guide, sites_of, sites_of_all
from .elbo import Enumerated, in_cells, of_cells, weighed
from .errors import ProgramError
from .guides import is_computed, settled_support
from .program import Program


@dataclass(frozen=True)
class LocalSite:
    """A latent site of each cell and its place among v.

    batch, free : shapes of its other plates, and of one value on the real line
    """

    name: str
    first: int
    last: int
    batch: torch.Size
    free: torch.Size
    transform: Any

    def value(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The site's value for v (n, D), and log |dvalue / dv| (n,)."""
        free = v[:, self.first : self.last].reshape(len(v), *self.batch, *self.free).movedim(0, len(self.batch))
        value = self.transform(free)
        jacobian = self.transform.log_abs_det_jacobian(free, value)
        events = tuple(range(len(self.batch) + 1, jacobian.dim()))
        return value, of_cells(jacobian.sum(events) if events else jacobian)

    def numbers(self, value: Tensor) -> Tensor:
        """(n, last - first) a value's numbers on the real line."""
        free = self.transform.inv(value)
        return free.movedim(len(self.batch), 0).reshape(free.shape[len(self.batch)], -1)


class CellPosterior:
    """The posterior of each cell's latent numbers, up to a constant, and the guide's guess of it.

    Parameters
    ----------
    program : Program
        Its weights are read, not changed.
    cells : Cells
        With counts, in the order of the program's schema, on its device.
    n_copies : C, how often each cell stands side by side (chains, draws), each copy with numbers of its own
    seed : global sites are drawn from the guide through it, once, and held

    Attributes
    ----------
    sites : tuple of LocalSite
    size : D, latent numbers of a cell

    Raises
    ------
    ProgramError
        If the guide draws nothing continuous for each cell.

    Notes
    -----
    Call it inside ``program.driven(seed)``. Memory: C x N x G numbers a run, and their gradients.
    """

    def __init__(self, program: Program, cells: Cells, n_copies: int = 1, *, seed: int = 0) -> None:
        self.program, self.n_copies, self.n_cells = program, n_copies, len(cells)
        rows = torch.arange(len(cells), device=cells.device).repeat(n_copies)
        self.cells = cells.rows(rows, whole=True)
        with program.driven(seed), torch.no_grad():
            shared = draw_guide(program, cells.rows(rows[:1], whole=True))
            first = draw_guide(program, self.cells, shared=sites_of_all(shared))
        self._nodes: dict[str, Any] = {}
        self._discrete: list[str] = []
        found, place = [], 0
        for name in sites_of(first):
            site: Any = first.nodes[name]
            if site["is_observed"] or is_computed(site):
                continue
            self._nodes[name] = site
            if not in_cells(site):
                continue
            if site["fn"].support.is_discrete:
                self._discrete.append(name)
                continue
            transform = biject_to(settled_support(site["fn"], len(self.cells)))
            batch = site["fn"].batch_shape[:-1]
            free = transform.inv(site["value"]).shape[len(batch) + 1 :]
            size = int(free.numel() * batch.numel())
            found.append(LocalSite(name, place, place + size, batch, free, transform))
            place += size
        if not found:
            raise ProgramError(f"the guide of {program.story} draws nothing continuous for each cell")
        self.sites, self.size = tuple(found), place

    def draw(self) -> Tensor:
        """(C, N, D) a draw of the guide. Random."""
        trace = draw_guide(self.program, self.cells, shared=self._shared())
        return self._packed(trace)

    def draw_story(self) -> tuple[Tensor, Tensor]:
        """Numbers (C, N, D) drawn from p(v), and counts (C * N, G) from p(x | v). Random.

        Raises
        ------
        ProgramError
            If the story makes no counts.
        """
        run = poutine.replay(self.program.model, trace=self._shared())
        trace = poutine.trace(run).get_trace(self.cells.without_counts())
        if "x" not in trace.nodes:
            raise ProgramError(f'{self.program.story} has no site "x" of counts, so it makes no cells')
        x: Any = trace.nodes["x"]
        return self._packed(trace), x["value"]

    def log_joint(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """log p(v) and log p(x | v), each (C, N), of numbers (C, N, D); with gradients."""
        values, jacobian = self._values(v)
        model = self._run(self.program.model, values)
        summed = Enumerated(self.program.n_plates)
        prior, likelihood = jacobian, torch.zeros_like(jacobian)
        for name in sites_of(model):
            site: Any = model.nodes[name]
            if is_computed(site) or not in_cells(site):
                continue
            if name in self._discrete or name in self.program.enumerated or summed.concerns(site):
                summed.add(name, site, self.cells)
                continue
            density = of_cells(weighed(site["fn"].log_prob(site["value"]), site, self.cells))
            if site["is_observed"]:
                likelihood = likelihood + density
            else:
                prior = prior + density
        if summed.all:
            joint, latent = summed.logsumexp()
            prior, likelihood = prior + latent, likelihood + joint - latent
        return self._by_copy(prior), self._by_copy(likelihood)

    def log_guide(self, v: Tensor) -> Tensor:
        """(C, N) log q(v | x) of numbers (C, N, D), discrete sites of the guide summed out; with gradients."""
        values, total = self._values(v)
        guide = self._run(self.program.guide, values)
        summed = Enumerated(self.program.n_plates)
        for name in sites_of(guide):
            site: Any = guide.nodes[name]
            if site["is_observed"] or is_computed(site) or not in_cells(site):
                continue
            if name in self._discrete or summed.concerns(site):
                summed.add(name, site, self.cells)
            else:
                total = total + of_cells(weighed(site["fn"].log_prob(site["value"]), site, self.cells))
        return self._by_copy(total + summed.logsumexp()[0] if summed.all else total)

    def values(self, v: Tensor) -> dict[str, Tensor]:
        """Values of the sites, by name, (..., C * N, event) for numbers (C, N, D): copies one after the other."""
        return self._values(v)[0]

    def _values(self, v: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        flat, values = v.reshape(-1, self.size), {}
        total = flat.new_zeros(len(flat))
        for site in self.sites:
            values[site.name], jacobian = site.value(flat)
            total = total + jacobian
        return values, total

    def _packed(self, trace: poutine.Trace) -> Tensor:
        nodes: dict[str, Any] = trace.nodes
        flat = torch.cat([site.numbers(nodes[site.name]["value"]) for site in self.sites], -1)
        return flat.reshape(self.n_copies, self.n_cells, self.size)

    def _by_copy(self, values: Tensor) -> Tensor:
        return values.expand(len(self.cells)).reshape(self.n_copies, self.n_cells)

    def _shared(self) -> poutine.Trace:
        kept = poutine.Trace()
        for name, site in self._nodes.items():
            if not in_cells(site):
                kept.add_node(name, **site)
        return kept

    def _run(self, function: Any, values: dict[str, Tensor]) -> poutine.Trace:
        """A run of model or guide with these values; discrete sites take all of theirs at once."""
        held = self._shared()
        for name, value in values.items():
            held.add_node(name, **(self._nodes[name] | {"value": value}))
        run = poutine.replay(function, trace=held)
        if self._discrete or self.program.enumerated:
            marked = poutine.infer_config(
                run, lambda site: {"enumerate": "parallel"} if site["name"] in self._discrete else {}
            )
            run = poutine.enum(marked, first_available_dim=-1 - self.program.n_plates)
        return poutine.trace(run).get_trace(self.cells)
