"""Cells that a story makes up as it was fitted: columns and totals of measured cells, states and counts of its own."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine

from .cells import Cells
from .draws import draw_guide, run_model, sites_of, sites_of_all, with_discrete
from .elbo import in_cells
from .errors import ProgramError
from .guides import is_computed
from .program import Program
from .schema import listed


def is_own(site: Any) -> bool:
    """Whether a site is latent, and of one cell."""
    return in_cells(site) and not site["is_observed"] and not is_computed(site)


def own_sites(program: Program, cells: Cells, seed: int, why: str) -> dict[str, int]:
    """Latent sites of a cell as the model draws them, and which axis of their values is that of cells.

    Parameters
    ----------
    why : what a story is asked to be, where it cannot make cells up as a whole

    Raises
    ------
    ProgramError
        If the story has no counts "x", or observes something besides, which would not be made up with the state.
    """
    few = cells.rows(torch.arange(min(3, len(cells)), device=cells.device), whole=True)
    with program.driven(seed), torch.no_grad():
        nodes: dict[str, Any] = poutine.trace(program.model).get_trace(few.without_counts()).nodes
    if "x" not in nodes:
        raise ProgramError(f'{program.story} has no site "x" of counts, so there are no cells to simulate')
    others = [
        name for name, site in nodes.items()
        if site["type"] == "sample" and site["is_observed"] and not is_computed(site)
    ]  # fmt: skip
    if others:
        raise ProgramError(
            f"{program.story} observes {listed(others)} besides the counts, which would not be simulated with the "
            f"state: {why}"
        )
    return {
        name: -1 - site["fn"].event_dim
        for name, site in nodes.items()
        if site["type"] == "sample" and name != "x" and is_own(site)
    }


def reads_library(program: Program, cells: Cells) -> bool:
    """Whether the story takes the observed total of a cell as known."""
    few = cells.rows(torch.arange(min(3, len(cells)), device=cells.device), whole=True)
    others = few._copy(library=2 * few.library + 1)
    with program.driven(0), torch.no_grad():
        one = poutine.trace(program.model).get_trace(few)
        two = poutine.trace(poutine.replay(program.model, trace=one)).get_trace(others)
        nodes: dict[str, Any] = one.nodes
        for name in sites_of(one):
            site: Any = nodes[name]
            other: Any = two.nodes[name]
            if is_computed(site):
                same = torch.equal(site["value"], other["value"])
            else:
                same = torch.equal(site["fn"].log_prob(site["value"]), other["fn"].log_prob(site["value"]))
            if not same:
                return True
    return False


def make_up(program: Program, read: Cells, around: str, shared: poutine.Trace | None = None) -> poutine.Trace:
    """A run of the model that draws counts for these rows. Random; draws from the global state, under no_grad.

    Parameters
    ----------
    around : "prior" draws the latent sites of each cell from the prior, "posterior" from the guide, given its counts
    shared : a run of the guide whose values sites of all cells keep; None draws them from the guide
    """
    if around == "posterior":
        guide = draw_guide(program, read, None, shared)
        guide = with_discrete(program, guide, read, None)
    elif shared is None and program.has_globals:
        guide = sites_of_all(draw_guide(program, read))
    else:
        guide = poutine.Trace() if shared is None else shared
    return run_model(program, guide, read.without_counts(), None)
