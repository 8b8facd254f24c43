"""Hamiltonian Monte Carlo on many short vectors at once.

C chains of each of N cells move together. Each (chain, cell) has numbers v (D,), a step size e and a decision of its
own; only the number of leapfrog steps is common to all, and is best drawn anew for each transition, so that no orbit
closes on itself.

    momentum    r ~ Normal(0, I)
    leapfrog    r += e/2 L' grad log p(v);  v += e L r;  r += e/2 L' grad log p(v)      so many times
    acceptance  with probability min(1, exp(H before - H after)),  H = -log p(v) + |r|^2 / 2

L L' (N, D, D) is a guess of the covariance of each cell's posterior; a wrong one costs time, not truth.

References: Neal 2011, Handbook of Markov Chain Monte Carlo, chapter 5; Hoffman and Gelman 2014, JMLR 15:1593 (step
sizes by dual averaging).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_DIVERGED = 1000.0  # nats of energy error: the trajectory has left


@dataclass(frozen=True)
class Point:
    """Where the chains are, and log densities there, in terms that a target weighs and adds.

    at : (C, N, D)
    terms : (T, C, N) log densities
    slopes : (T, C, N, D) their gradients
    """

    at: Tensor
    terms: Tensor
    slopes: Tensor

    def value(self, weights: Tensor) -> Tensor:
        """(C, N) log density of the target with these weights (T,) of the terms."""
        return torch.tensordot(weights, self.terms, 1)

    def slope(self, weights: Tensor) -> Tensor:
        """(C, N, D) its gradient."""
        return torch.tensordot(weights, self.slopes, 1)

    def replaced(self, taken: Tensor, other: Point) -> Point:
        """``other`` where ``taken`` (C, N), else this."""
        wide = taken.unsqueeze(-1)
        return Point(
            torch.where(wide, other.at, self.at),
            torch.where(taken, other.terms, self.terms),
            torch.where(wide, other.slopes, self.slopes),
        )


Density = Callable[[Tensor], Point]


def by_autograd(function: Callable[[Tensor], Tensor]) -> Density:
    """A density of one term from a function of numbers (C, N, D) to log densities (C, N)."""

    def density(v: Tensor) -> Point:
        with torch.enable_grad():
            free = v.detach().requires_grad_()
            value = function(free)
            (slope,) = torch.autograd.grad(value.sum(), free)
        return Point(v.detach(), value.detach().unsqueeze(0), slope.unsqueeze(0))

    return density


@dataclass(frozen=True)
class Moved:
    """After a transition: the new point, probabilities of acceptance (C, N), and which trajectories left (C, N)."""

    point: Point
    acceptance: Tensor
    diverged: Tensor


def transition(
    density: Density, start: Point, weights: Tensor, factor: Tensor, size: Tensor, n_leapfrogs: int
) -> Moved:
    """One step of every chain; leaves the target invariant and is its own reverse.

    Parameters
    ----------
    weights : (T,) of the terms of the target
    factor : L, (N, D, D)
    size : step sizes, to be broadcast with (C, N)
    """
    momentum = torch.randn_like(start.at)
    energy = 0.5 * momentum.square().sum(-1) - start.value(weights)
    length, end = size.unsqueeze(-1), start
    for _ in range(n_leapfrogs):
        momentum = momentum + 0.5 * length * _times(factor.mT, end.slope(weights))
        end = density(end.at + length * _times(factor, momentum))
        momentum = momentum + 0.5 * length * _times(factor.mT, end.slope(weights))
    error = 0.5 * momentum.square().sum(-1) - end.value(weights) - energy
    acceptance = (-error).clamp(max=0.0).exp().nan_to_num(0.0)  # outside of what can be computed: refused
    taken = torch.rand_like(acceptance) < acceptance
    return Moved(start.replaced(taken, end), acceptance, ~(error < _DIVERGED))


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    """(C, N, D) matrices (N, D, D) times vectors (C, N, D)."""
    return torch.einsum("nij,cnj->cni", matrix, v)


class DualAveraging:
    """Step sizes, one for each (chain, cell), that are accepted as often as wanted.

    Hoffman and Gelman 2014, algorithm 5, with their gamma = 0.05, t0 = 10, kappa = 0.75.
    """

    def __init__(self, first: Tensor, wanted: float) -> None:
        self.wanted, self._centre = wanted, (10.0 * first).log()
        self.size = first
        self._mean_log, self._excess, self._t = torch.zeros_like(first), torch.zeros_like(first), 0

    def learn(self, acceptance: Tensor) -> None:
        self._t += 1
        t = self._t
        self._excess = self._excess + (self.wanted - acceptance - self._excess) / (t + 10)
        log = self._centre - math.sqrt(t) / 0.05 * self._excess
        self._mean_log = self._mean_log + t**-0.75 * (log - self._mean_log)
        self.size = log.exp()

    @property
    def settled(self) -> Tensor:
        """The average of what was tried."""
        return self._mean_log.exp() if self._t else self.size


def moments(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Means (N, D) and covariances (N, D, D) of draws (S, N, D), in float64.

    Correlations are shrunk by S / (S + D + 5), so that a covariance of few draws can be inverted; a number that does
    not vary at all counts as if it did a little.
    """
    draws = draws.double()
    n, _, d = draws.shape
    mean = draws.mean(0)
    apart = draws - mean
    covariance = torch.einsum("sni,snj->nij", apart, apart) / max(n - 1, 1)
    kept = n / (n + d + 5)
    variance = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12)
    return mean, kept * covariance + (1 - kept) * torch.diag_embed(variance) + 1e-12 * torch.eye(d).to(covariance)
