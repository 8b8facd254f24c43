"""Refinement: the guide's guess of single cells, improved cell by cell until it is as good as its family allows.

An encoder that serves all cells is worse for some than the best member of its family; the difference is the
amortisation gap (Cremer, Li and Duvenaud 2018, ICML, "Inference suboptimality in variational autoencoders"). Here each
cell gets corrections of its own (`corrections`), which maximise its ELBO from where the encoder starts (semi-amortised
inference: Kim et al. 2018, ICML). All cells of a block are improved at once; weights stay as they are.

    ELBO[n] = mean_s [log p(x[n], v_s) - log q_n(v_s)],    v_s = q_n's draws, new at each step

Gradients pass through the draws alone (`elbo.still`): their noise vanishes as q_n nears the posterior. Steps are by
natural gradients (Amari 1998, Neural Computation 10:251), which latents that depend on each other do not slow down.

The normal of the highest ELBO is narrower than a posterior with long tails. So at last q_n gets the posterior's mean
and covariance, where importance weights of draws from q_n and from wider ones can tell them: of all normals that one is
the nearest by KL(p || q).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm.auto import tqdm

from .cells import Cells
from .corrections import Correcting, Corrections, _factor, cell_keys, numbers_of
from .draws import draw_guide, log_weight, propose, shared_out, sites_of
from .elbo import elbo_terms, in_cells
from .errors import FitError, ProgramError, PyroscWarning
from .guides import is_computed, is_enumerated
from .loading import blocks
from .program import Program
from .psis import k_threshold, smoothed

if TYPE_CHECKING:
    from .posterior import Fit

_RISING = 0.5  # nats a cell between the middle and the end of the steps, above which there were too few
_ROUNDS = 2  # of moments, the second by draws of the first
_JUDGED = 64  # draws that say whether a cell's ELBO is better than it was


@dataclass(frozen=True)
class How:
    """How guesses are refined, as `Fit.refine` says."""

    family: str
    steps: int
    n_draws: int
    lr: float
    moments: int


def refine(fit: Fit, cells: Cells, how: How, seed: int, progress: bool) -> Fit:
    """See `Fit.refine`; cells in the order of the fit."""
    from .posterior import Fit

    refined = []
    for m, program in enumerate((fit.program, *fit.members)):
        what = "refine" if m == 0 else f"refine member {m}"
        refined.append(refined_program(program, cells, how, seed, what if progress else None))
    main, *members = (program for program, _ in refined)
    before, after = refined[0][1]
    corrections: Any = main.corrections
    done = {"cells": len(corrections), **asdict(how), "elbo_before": before, "elbo_after": after}
    return Fit(main, fit.history, fit.settings | {"refined": done}, members, fit.landmarks, fit.examples)


def correctable(program: Program, cells: Cells) -> dict[str, int]:
    """Sites of cells that can be corrected, and how many numbers each has.

    Raises
    ------
    ProgramError
        If there is none.
    """
    few = cells.rows(torch.arange(min(3, len(cells)), device=cells.device), whole=True)
    with program.driven(0), torch.no_grad():
        guide = poutine.trace(program.guide).get_trace(few)
        found, why = {}, []
        for name in sites_of(guide):
            site: Any = guide.nodes[name]
            if site["is_observed"] or is_computed(site) or not in_cells(site) or is_enumerated(site):
                continue
            if len(site["fn"].batch_shape) != 1:
                why.append(f'"{name}" stands in further plates')
                continue
            try:
                found[name] = numbers_of(site["fn"])
            except NotImplementedError as error:
                why.append(f'"{name}" is drawn from {error}, which is no normal nor made from one')
    if not found:
        raise ProgramError(f"the guide of {program.story} has no site that can be refined: {'; '.join(why) or 'none'}")
    return found


def refined_program(
    program: Program, cells: Cells, how: How, seed: int, what: str | None
) -> tuple[Program, tuple[float, float]]:
    """A copy of the program with corrections of these cells beside those it has; mean ELBOs before and after."""
    new = program.copy()
    new.corrections = None
    sizes = correctable(new, cells)
    trainable = [p.requires_grad for p in new.parameters()]
    new.requires_grad_(False)
    per_cell = 2 * how.n_draws  # the tape holds about twice what a run does
    parts = list(blocks(cells, per_cell))
    found, before, after, rises = [], [], [], []
    with tqdm(total=how.steps * len(parts), desc=what, unit="step", disable=what is None) as bar:
        for i, block in enumerate(parts):
            with new.driven(seed + i):
                corrections, elbos, rise = _refined_block(new, block, sizes, how, bar)
            found.append(corrections)
            rises.append(rise * len(block) / len(cells))
            before.append(elbos[0])
            after.append(elbos[1])
    if sum(rises) > _RISING:
        warnings.warn(
            f"the ELBO of refined cells was still rising, by {sum(rises):.1f} nats a cell from the middle of the steps "
            "to the end: refine with more steps=, or a larger lr=",
            PyroscWarning, stacklevel=4,
        )  # fmt: skip
    old = program.corrections
    if old is not None and old.family == how.family and old.sizes == sizes:
        found.append(old)  # new ones of the same cell come first
    merged = Corrections(sizes, how.family, sum(len(c) for c in found))
    for name, _ in merged.named_buffers():
        setattr(merged, name, torch.cat([getattr(c, name) for c in found]))
    new.corrections = merged.sorted()
    for p, was in zip(new.parameters(), trainable):
        p.requires_grad_(was)
    return new, (float(torch.cat(before).mean()), float(torch.cat(after).mean()))


def _refined_block(
    program: Program, block: Cells, sizes: dict[str, int], how: How, bar: Any
) -> tuple[Corrections, tuple[Tensor, Tensor], float]:
    """Corrections of these cells, their ELBOs before and after, and how much these still rose at the end."""
    family, steps, n_draws = how.family, how.steps, how.n_draws
    numbers = {name: _start(len(block), size, family, block) for name, size in sizes.items()}
    free = [value.requires_grad_() for values in numbers.values() for value in values if value is not None]
    # Stories with global sites, or whose guide sums, take one draw of a cell a run: cells stand there several times.
    in_front = not (program.has_globals or program.guided_sums)
    many = block if in_front else block.rows(torch.arange(len(block), device=block.device).repeat(n_draws), whole=True)
    seen: list[float] = []
    for step in range(steps):
        elbo = _elbo(program, block, many, numbers, n_draws, in_front)
        elbo.sum().backward()
        rate = how.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for values in numbers.values():
                _natural_step(values, rate)
        for value in free:
            value.grad = None
        seen.append(float(elbo.detach().mean()))
        bar.update()
    middle, end = (torch.tensor(seen[int(a * steps) : int(b * steps) + 1]).mean() for a, b in ((0.4, 0.6), (0.8, 1.0)))
    with torch.no_grad():
        judged: Any = [torch.zeros(len(block), device=block.device) for _ in range(2)]
        nothing = {name: _start(len(block), size, family, block) for name, size in sizes.items()}
        rounds = max(1, _JUDGED // n_draws)
        for i, tried in enumerate((nothing, numbers)):
            with program.driven(1):  # the same noise for both
                for _ in range(rounds):
                    judged[i] += _elbo(program, block, many, tried, n_draws, in_front) / rounds
        better = judged[1] > judged[0]
        if not bool(torch.isfinite(judged[0]).all()):
            at = int((~torch.isfinite(judged[0])).nonzero()[0])
            raise FitError(f"the ELBO of a cell (row {at} of a block) is not finite before it is refined")
        for values in numbers.values():
            for found in values:
                if found is not None:
                    found.mul_(better.reshape(-1, *(1,) * (found.dim() - 1)))
        for _ in range(_ROUNDS if how.moments else 0):
            _match_moments(program, many, numbers, how.moments, 4 * n_draws, None if in_front else n_draws)
        made = Corrections(sizes, family, len(block)).to(block.library)
        made.keys = cell_keys(block)
        for name, values in numbers.items():
            for kind, found in zip(("shift", "log_scale", "lower"), values):
                if found is not None:
                    setattr(made, f"{name}_{kind}", found.detach())
    return made, (judged[0].cpu(), torch.maximum(*judged).cpu()), float(end - middle)


def _natural_step(numbers: list[Any], rate: float) -> None:
    """One step uphill by the natural gradient of normals, at most ``rate`` sds of the guess, whatever its shape.

    For N(m, F F'), F lower triangular, a step is m + rate F F' g and F (I + rate P), where g is the gradient by m and P
    the lower triangle of F' G, its diagonal halved, for the gradient G by F (the Fisher metric of m is (F F')^-1, that
    of P twice the identity on the diagonal and once beside it).
    """

    shift, log_scale, lower = numbers

    def within(values: Tensor | None) -> Any:  # a draw that went astray is not followed
        return None if values is None else torch.nan_to_num(values, 0.0, 0.0, 0.0)

    scale = log_scale.exp()
    by_shift, by_log, by_lower = (
        within(shift.grad),
        within(log_scale.grad),
        within(None if lower is None else lower.grad),
    )
    if lower is None or by_lower is None:
        shift += rate * scale * (scale * by_shift).clamp(-1, 1)
        log_scale += rate * (0.5 * by_log).clamp(-1, 1)
        return
    factor = torch.diag_embed(scale) + lower.tril(-1)
    up = factor.transpose(-1, -2)
    shift += rate * (factor @ (up @ by_shift.unsqueeze(-1)).clamp(-1, 1)).squeeze(-1)
    turned = up @ (by_lower.tril(-1) + torch.diag_embed(by_log / scale))
    along = (0.5 * turned.diagonal(dim1=-2, dim2=-1)).clamp(-1, 1)
    new = factor @ (rate * turned.tril(-1).clamp(-1, 1) + torch.diag_embed((rate * along).exp()))
    log_scale.copy_(new.diagonal(dim1=-2, dim2=-1).log())
    lower.copy_(new.tril(-1))


def _start(n: int, size: int, family: str, cells: Cells) -> list[Tensor | None]:
    zeros = cells.library.new_zeros
    return [zeros(n, size), zeros(n, size), zeros(n, size, size) if family == "full" else None]


def _elbo(
    program: Program, block: Cells, many: Cells, numbers: dict[str, list[Any]], n_draws: int, in_front: bool
) -> Tensor:
    """(n,) ELBO of cells by some draws, with gradients by the corrections."""
    if in_front:
        program.corrections = _Trial(numbers)
        guide = draw_guide(program, block, n_draws)
        return log_weight(program, guide, block, n_draws, path_gradients=True).mean(0)
    program.corrections = _Trial(_repeated(numbers, n_draws))
    return elbo_terms(program, many).local.reshape(n_draws, -1).mean(0)


def _repeated(numbers: dict[str, list[Any]], n_draws: int) -> dict[str, list[Any]]:
    return {
        name: [None if v is None else v.repeat(n_draws, *(1,) * (v.dim() - 1)) for v in values]
        for name, values in numbers.items()
    }


def _match_moments(
    program: Program, cells: Cells, numbers: dict[str, list[Any]], n: int, at_once: int, n_copies: int | None
) -> None:
    """Give guesses the mean and covariance of the posterior, by n draws and importance weights (`draws.propose`).

    Cells whose weights cannot be relied on keep their guess.
    """
    program.corrections = _Trial(_repeated(numbers, n_copies or 1))
    found = propose(program, cells, shared_out(n), at_once, n_copies)
    log, k = smoothed(found.log_weight.cpu())
    weight = log.softmax(0).to(cells.library)
    n_effective = weight.square().sum(0).reciprocal()[:, None, None]
    taken = (k <= k_threshold(len(log))).to(cells.device)[:, None]
    for name, (shift, log_scale, lower) in numbers.items():
        at = found.standard[name]
        mean = torch.einsum("sn,snd->nd", weight, at)
        covariance = torch.einsum("sn,sna,snb->nab", weight, at - mean, at - mean)
        # Few effective draws do not say all of a covariance: as if d + 1 more had that of the guess.
        d = at.shape[-1]
        prior = torch.eye(d).to(covariance)
        covariance = (n_effective * covariance + (d + 1) * prior) / (n_effective + d + 1)
        factor = _factor(log_scale, lower)
        moved = shift + (factor @ mean.unsqueeze(-1)).squeeze(-1)
        if lower is None:
            scale = log_scale + 0.5 * covariance.diagonal(dim1=-2, dim2=-1).log()
        else:
            factor = factor @ torch.linalg.cholesky(covariance)
            scale = factor.diagonal(dim1=-2, dim2=-1).log()
            lower.copy_(torch.where(taken.unsqueeze(-1), factor.tril(-1), lower))
        shift.copy_(torch.where(taken, moved, shift))
        log_scale.copy_(torch.where(taken, scale, log_scale))


class _Trial(nn.Module):
    """Corrections of the cells at hand, row by row, as they are tried."""

    def __init__(self, numbers: dict[str, list[Any]]) -> None:
        super().__init__()
        self.numbers = numbers

    def of(self, cells: Cells) -> Correcting:
        return Correcting(self.numbers)
