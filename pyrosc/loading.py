"""Mini-batches: from compressed rows straight to tensors, where the counts already are.

No worker processes: a gather of 128 rows takes a fraction of a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .cells import Cells

_BLOCK_VALUES = 2**23  # dense values a block of an unhurried pass may hold: 32 MB in float32


def n_batches_of(n_cells: int, batch_size: int) -> int:
    """How many mini-batches of at most ``batch_size`` an epoch has."""
    return -(-n_cells // batch_size)


def minibatches(cells: Cells, batch_size: int, generator: torch.Generator) -> Iterator[Cells]:
    """One epoch in an order drawn from ``generator``: each cell once, at most ``batch_size`` at a time.

    Sizes differ by at most one, so that no step rests on a handful of left-over cells;
    every mini-batch still knows the total.
    """
    order = torch.randperm(len(cells), generator=generator).to(cells.device)
    for rows in order.tensor_split(n_batches_of(len(cells), batch_size)):
        yield cells.rows(rows, whole=False)


def blocks(cells: Cells, per_cell: int = 1) -> Iterator[Cells]:
    """All cells in order, in data sets of their own small enough to hold densely.

    ``per_cell`` is how many dense rows a cell needs at a time (draws).
    """
    size = max(1, min(1024, _BLOCK_VALUES // max(cells.n_genes * per_cell, 1)))
    for rows in torch.arange(len(cells), device=cells.device).split(size):
        yield cells.rows(rows, whole=True)
