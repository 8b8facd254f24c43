"""Training of the guide alone: its networks learn on while the story stands still.

An encoder that is trained with its decoder has seen a few thousand cells, each many times, and knows those better than
others: its guess of new cells is worse than that of the cells it learned from (Zhang, Hayes and Barber 2022, NeurIPS,
"Generalization gap in amortized inference"). Once the decoder stands still there is no end of further cells to learn
from, as the story makes them up. So each step takes measured cells, cells made up around the guide's states of measured
ones, and cells made up from the prior, and goes uphill on the ELBO of all. The maximum for each cell is the best guess
of its family, whichever cells are taken, so these only say where the network is to be good.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .cells import Cells
from .draws import draw_guide, log_weight, run_model, sites_of
from .elbo import elbo_terms, in_cells
from .errors import FitError, ProgramError, PyroscWarning
from .loading import blocks
from .made_up import make_up, own_sites
from .optim import FusedClippedAdam, share_of_rate
from .program import Program
from .schema import listed

if TYPE_CHECKING:
    from .posterior import Fit

_MIX = {"posterior": 0.4, "prior": 0.2, "measured": 0.4}  # of the cells of a step
_JUDGED, _JUDGED_DRAWS = 1000, 16  # cells, and draws of each, that say how much was gained
_CLIP = 10.0  # nats per cell, as of `fit`


def train_guide(fit: Fit, cells: Cells, steps: int, batch_size: int, lr: float, seed: int, progress: bool) -> Fit:
    """See `Fit.train_guide`; cells in the order of the fit."""
    from .posterior import Fit

    if fit.program.has_factors:
        raise ProgramError(
            f"the guide of {fit.program.story} learns from labels, too, which made-up cells lack: refine single cells "
            "instead, fit.refine(cells)"
        )
    if cells.schema.label is not None:
        cells = cells.without_labels()
    made = []
    for m, program in enumerate((fit.program, *fit.members)):
        what = "train_guide" if m == 0 else f"train_guide of member {m}"
        made.append(_trained(program, cells, steps, batch_size, lr, seed, what if progress else None))
    (main, (before, after)), *members = made
    if after < before:
        warnings.warn(
            f"the ELBO of these cells fell from {before:.2f} to {after:.2f} nats a cell: train_guide with a smaller "
            "lr=, or more steps=",
            PyroscWarning, stacklevel=3,
        )  # fmt: skip
    settings = {name: value for name, value in fit.settings.items() if name != "refined"} | {
        "guide": {
            "cells": len(cells), "steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed,
            "elbo_before": before, "elbo_after": after,
        }
    }  # fmt: skip
    return Fit(main, fit.history, settings, [p for p, _ in members], fit.landmarks, fit.examples)


def guide_weights(program: Program, cells: Cells) -> dict[str, Tensor]:
    """Weights that the guide's sites of cells rest on, and nothing else does.

    Raises
    ------
    ProgramError
        If there is none, or the story reads one of them.
    """
    few = cells.rows(torch.arange(min(3, len(cells)), device=cells.device), whole=True)
    with program.driven(0):
        guide = draw_guide(program, few)
        drawn: dict[str, Any] = guide.nodes
        by_own, by_all = ([drawn[n] for n in sites_of(guide) if in_cells(drawn[n]) == own] for own in (True, False))
        own, shared = _rests_on(program, by_own), _rests_on(program, by_all)
        for name in sites_of(guide):
            drawn[name]["value"] = drawn[name]["value"].detach()
        model = run_model(program, guide, few, None)
        read = _rests_on(program, [model.nodes[n] for n in sites_of(model)])
    both = sorted(own & read)
    if both:
        raise ProgramError(
            f"the story of {program.story} reads weights of its guide ({listed(both)}), as VampPrior does, and would "
            "change with them. Refine single cells instead, fit.refine(cells)"
        )
    chosen: dict[str, Tensor] = {name: p for name, p in program.named_parameters() if name in own - shared}
    if not chosen:
        raise ProgramError(f"the guide of {program.story} has no free weights that its sites of cells alone rest on")
    return chosen


def _rests_on(program: Program, sites: list[Any]) -> set[str]:
    """Names of the free weights that values and densities of these sites rest on."""
    free = {name: p for name, p in program.named_parameters() if p.requires_grad}
    total = sum((s["value"].sum() + s["fn"].log_prob(s["value"]).sum() for s in sites), torch.zeros(()))
    if not isinstance(total, Tensor) or not total.requires_grad or not free:
        return set()
    found = torch.autograd.grad(total, list(free.values()), allow_unused=True)
    return {name for name, gradient in zip(free, found) if gradient is not None}


def _trained(
    program: Program, cells: Cells, steps: int, batch_size: int, lr: float, seed: int, what: str | None
) -> tuple[Program, tuple[float, float]]:
    """A copy of the program whose guide was trained on; mean ELBOs of the cells before and after."""
    new = program.copy()
    new.corrections = None  # of guesses that will be others
    own_sites(new, cells, seed, "a guide can be trained on where only x is observed")
    weights = guide_weights(new, cells)
    trainable = {name: p.requires_grad for name, p in new.named_parameters()}
    for name, p in new.named_parameters():
        p.requires_grad_(name in weights)
    judged = cells.rows(
        torch.as_tensor(np.random.default_rng(seed).permutation(len(cells))[:_JUDGED], device=cells.device), whole=True
    )
    optimizer = FusedClippedAdam(list(weights.values()), lr=lr, clip_norm=_CLIP)
    before = _elbo(new, judged, seed)
    order = torch.Generator().manual_seed(seed)
    sizes = {name: max(1, round(share * batch_size)) for name, share in _MIX.items()}
    with new.driven(seed), tqdm(total=steps, desc=what, unit="step", disable=what is None) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * share_of_rate(step, steps)
            batch = _batch(new, cells, sizes, order)
            elbo = _of_cells(new, batch).mean()
            if not bool(torch.isfinite(elbo)):
                raise FitError(f"the ELBO is not finite at step {step + 1} of train_guide: try a smaller lr=")
            (-elbo).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
    after = _elbo(new, judged, seed)
    for name, p in new.named_parameters():
        p.requires_grad_(trainable[name])
    return new, (before, after)


def _batch(program: Program, cells: Cells, sizes: dict[str, int], order: torch.Generator) -> Cells:
    """Cells of one step: measured ones, and made-up ones with their own totals."""
    rows = torch.randint(len(cells), (sum(sizes.values()),), generator=order).to(cells.device)
    pieces: list[Tensor] = []
    start = 0
    with torch.no_grad():
        for around, size in sizes.items():
            here = cells.rows(rows[start : start + size], whole=True)
            start += size
            x: Any = here.x if around == "measured" else make_up(program, here, around).nodes["x"]["value"]
            pieces.append(x)
    x = torch.cat(pieces)
    made = cells.rows(rows, whole=True).with_counts(x)
    return made._copy(library=x.sum(-1, keepdim=True).clamp(min=1).to(made.library))


def _of_cells(program: Program, cells: Cells) -> Tensor:
    """(n,) ELBO of cells by a draw each, with gradients through the draws alone where they can be."""
    if program.guided_sums:
        return elbo_terms(program, cells).local
    return log_weight(program, draw_guide(program, cells), cells, path_gradients=True).squeeze(0)


def _elbo(program: Program, cells: Cells, seed: int) -> float:
    """Mean ELBO of cells, by draws that are the same for any weights."""
    total = 0.0
    with torch.no_grad():
        for i, block in enumerate(blocks(cells, 2 * program.n_combinations)):
            with program.driven(seed + i):
                total += sum(float(_of_cells(program, block).sum()) for _ in range(_JUDGED_DRAWS)) / _JUDGED_DRAWS
    return total / len(cells)
