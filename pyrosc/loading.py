"""Mini-batches: from compressed rows straight to tensors, where the counts already are.

No worker processes: a gather of 128 rows takes a fraction of a step. Rows of many mini-batches are gathered in one
go and cut apart, which halves that again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .cells import Cells

_WINDOW = 2**21  # non-zero counts gathered in one go: some 40 MB
_BLOCK_VALUES = 2**23  # dense values a block of an unhurried pass may hold: 32 MB in float32


def n_batches_of(n_cells: int, batch_size: int) -> int:
    """How many mini-batches of at most ``batch_size`` an epoch has."""
    return -(-n_cells // batch_size)


def minibatches(cells: Cells, batch_size: int, generator: torch.Generator) -> Iterator[Cells]:
    """One epoch in an order drawn from ``generator``: each cell once, at most ``batch_size`` at a time.

    Sizes differ by at most one, so that no step rests on a handful of left-over cells;
    every mini-batch still knows the total.
    """
    n, n_batches = len(cells), n_batches_of(len(cells), batch_size)
    order = torch.randperm(n, generator=generator).to(cells.device)
    small, n_larger = divmod(n, n_batches)
    at_once = max(1, int(_WINDOW / max(cells.counts_per_cell * small, 1)))
    start = 0
    for first in range(0, n_batches, at_once):
        cuts = [0]
        for i in range(first, min(first + at_once, n_batches)):
            cuts.append(cuts[-1] + small + (i < n_larger))
        yield from cells.minibatches(order[start : start + cuts[-1]], cuts)
        start += cuts[-1]


def blocks(cells: Cells, per_cell: int = 1) -> Iterator[Cells]:
    """All cells in order, in data sets of their own small enough to hold densely.

    ``per_cell`` is how many dense rows a cell needs at a time (draws).
    """
    size = max(1, min(1024, _BLOCK_VALUES // max(cells.n_genes * per_cell, 1)))
    for rows in torch.arange(len(cells), device=cells.device).split(size):
        yield cells.rows(rows, whole=True)
