"""Libraries: how many counts a cell was expected to give. Each makes the site ``library``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .cells import Cells
from .errors import ProgramError
from .parts import Part
from .schema import Schema


class ObservedLibrary(Part):
    """The observed total over the genes held, taken as known: (n, 1), counts per cell."""

    def forward(self, cells: Cells) -> Tensor:
        return pyro.deterministic("library", cells.library, event_dim=1)


class GivenLibrary(Part):
    """The user's size factors, ``Cells.from_anndata(size_factor=...)``: (n, 1), in their own unit."""

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        if schema.size_factor is None:
            raise ProgramError("GivenLibrary needs size factors: Cells.from_anndata(adata, size_factor=...)")

    def forward(self, cells: Cells) -> Tensor:
        given: Any = cells.size_factor  # there, as build() saw to
        return pyro.deterministic("library", given, event_dim=1)


class LatentLibrary(Part):
    """An unknown expected total, (n, 1): log library ~ Normal(mean[b], sd[b]) for a cell of batch b.

    The observed total then scatters around it. A guide that leaves ``library`` out is completed; its 90 % intervals
    covered 87-91 % of simulated totals where counts scatter little beyond Poisson, and about 80 % where they scatter
    much (dispersion around 2), as the network then reads the total less well than the posterior allows.

    Parameters
    ----------
    mean, sd : of the log of the expected total; None takes those of log observed totals in each batch
        (the schema's; Lopez et al. 2018)
    """

    mean: Tensor  # (B,) of log library
    sd: Tensor  # (B,)

    def __init__(self, mean: float | None = None, sd: float | None = None) -> None:
        if mean is not None and not math.isfinite(mean):
            raise ValueError(f"mean is that of log counts, such as 7.0, not {mean!r}")
        if sd is not None and not 0 < sd < math.inf:
            raise ValueError(f"sd must be positive, not {sd!r}")
        super().__init__(mean=mean, sd=sd)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        if schema.size_factor is not None:
            raise ProgramError(
                "with given size factors rho is a rate, so a latent library could not be told apart from it: "
                "use GivenLibrary(), or make cells without size_factor="
            )
        a = self.arguments
        means = torch.tensor(schema.log_library_mean)
        sds = torch.tensor(schema.log_library_sd)
        self.register_buffer("mean", means if a["mean"] is None else torch.full_like(means, a["mean"]))
        self.register_buffer("sd", sds if a["sd"] is None else torch.full_like(sds, a["sd"]))

    def forward(self, cells: Cells) -> Tensor:
        mean, sd = (numbers[cells.batch].unsqueeze(-1) for numbers in (self.mean, self.sd))
        return pyro.sample("library", dist.LogNormal(mean, sd).to_event(1))
