"""Libraries: how many counts a cell was expected to give. Each makes the site ``library``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
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
