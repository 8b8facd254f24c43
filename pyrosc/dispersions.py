"""Dispersions: how much counts scatter beyond Poisson noise.

A dispersion is asked twice: ``dispersion()`` before the plate, where a sampled one makes
its global site, and ``dispersion.at(value, cells, hidden)`` inside, for the cells at hand.
The variance of a count is mean + mean^2 / dispersion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .cells import Cells
from .parts import Part
from .schema import Schema


class GeneDispersion(Part):
    """One number a gene, (G,), estimated without a prior.

    Before the first fit it is set by moments around one profile scaled by depth. Those
    hold what the cells' differences add, so it starts too low and rises in training.
    """

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        self.log_dispersion = nn.Parameter(torch.zeros(schema.n_genes))

    def start(self, cells: Cells) -> None:
        sums = cells.gene_sums()
        depth = cells.depth.double()
        share = sums.counts / depth.sum()
        # sum (x - l m)^2 = sum (l m) + sum (l m)^2 / dispersion under one profile m
        scatter = sums.squares - 2 * share * sums.by_depth + share**2 * (depth**2).sum()
        excess = scatter - share * depth.sum()
        moment = share**2 * (depth**2).sum() / excess.clamp(min=1e-12)
        moment = torch.where(excess > 0, moment, torch.full_like(moment, torch.inf)).clamp(0.1, 100.0)
        with torch.no_grad():
            self.log_dispersion.copy_(torch.where(sums.counts > 0, moment.log(), torch.zeros_like(moment)))

    def forward(self) -> Tensor:
        return self.log_dispersion.exp()

    def at(self, value: Tensor, cells: Cells, hidden: Tensor | None = None) -> Tensor:
        """The dispersion of these cells: the same for all, (G,)."""
        return value


class NoDispersion(Part):
    """None, for likelihoods without one (Poisson)."""

    def forward(self) -> None:
        return None

    def at(self, value: Any, cells: Cells, hidden: Tensor | None = None) -> None:
        return None
