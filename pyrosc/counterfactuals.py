"""Counterfactuals: expression of the same cells in another world, and how much of what varies a column explains.

Both decode the states of cells as they were seen under columns that are set (Pearl 2009, Causality, section 7.1:
abduction, action, prediction); all worlds get the same draws. Where that may be asked is in `overlap`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .cells import Cells
from .counts import require_memory
from .effects import Effects, log2_ratio, sum_over_cells
from .posterior import Fit


def counterfactual(
    fit: Fit, cells: Cells, do: Mapping[str, Any], *, n_draws: int, at: np.ndarray | None, names: list[str],
    scale: float, delta: float, pseudocount: float, interval: float, by_cell: bool, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """See `Fit.counterfactual`."""
    worlds = [[cells], fit._worlds(cells, do)]
    if not by_cell:
        unit = np.zeros(len(cells), dtype=int)
        factual, other = sum_over_cells(fit, cells, worlds, unit, None, n_draws, seed, at, True)
        all_cells = np.array([True])
        means = [factual.mean(all_cells), other.mean(all_cells)]
        member = fit.member_of(n_draws) if fit.members else None
        table = Effects.of(log2_ratio(means[1], means[0], pseudocount), member).table(delta, interval)
        table.insert(0, "factual", scale * means[0].mean(0).numpy())
        table.insert(1, "counterfactual", scale * means[1].mean(0).numpy())
        table.index = pd.Index(names, name="gene")
    else:
        columns = ["factual", "counterfactual", "lfc_mean", "lfc_sd", "lfc_lower", "lfc_upper", "probability"]
        require_memory(
            8 * len(cells) * len(names) * len(columns), "this table", "Ask for fewer genes or cells at a time."
        )
        table = _of_each_cell(
            fit, fit._draws_of("rho", cells, worlds, n_draws, seed, at, True), cells, names, columns, scale, delta,
            pseudocount, interval,
        )  # fmt: skip
    table.attrs = {
        "do": {k: str(v) for k, v in do.items()}, "delta": delta, "pseudocount": pseudocount,
        "uncertainty": fit._uncertainty(cells=False), "n_cells": len(cells),
    }  # fmt: skip
    return table


def _of_each_cell(
    fit: Fit, draws: Iterator[list[Tensor]], cells: Cells, names: list[str], columns: list[str], scale: float,
    delta: float, pseudocount: float, interval: float,
) -> pd.DataFrame:  # fmt: skip
    rows = []
    for factual, other in draws:
        one, two = factual.cpu().numpy(), other.cpu().numpy()
        lfc = log2_ratio(two, one, pseudocount)
        member = fit.member_of(len(lfc)) if fit.members else None
        flat = Effects.of(lfc.reshape(len(lfc), -1), member).table(delta, interval)[columns[2:]].to_numpy()
        rows.append(np.concatenate([
            scale * np.stack([one.mean(0), two.mean(0)], -1), flat.reshape(*lfc.shape[1:], -1)
        ], -1))  # fmt: skip
    block = np.concatenate(rows).reshape(len(cells), -1)
    header = pd.MultiIndex.from_product([names, columns], names=["gene", None])
    return pd.DataFrame(block, index=cells.names, columns=header)


def variance_explained(
    fit: Fit, cells: Cells, column: str, levels: list[Any], n_draws: int, interval: float, pseudocount: float, seed: int
) -> pd.DataFrame:
    """See `Fit.variance_explained`."""
    groups = [[cells.do(**{column: level})] for level in levels]
    of_column: Any = 0.0
    mean: Any = 0.0
    square: Any = 0.0
    n = 0
    for worlds in fit._draws_of("rho", cells, groups, n_draws, seed, None, False):
        total = torch.zeros_like(worlds[0], dtype=torch.float64)
        square_total = torch.zeros_like(total)
        for shares in worlds:
            logs = torch.log2(shares.double() + pseudocount)
            total, square_total = total + logs, square_total + logs**2
        centre = total / len(levels)  # (S, n, G) of a cell over the levels
        of_column = of_column + (square_total / len(levels) - centre**2).clamp(min=0).sum(1).cpu().numpy()
        mean, square = mean + centre.sum(1).cpu().numpy(), square + (centre**2).sum(1).cpu().numpy()
        n += centre.shape[1]
    column_variance = of_column / n  # (S, G)
    state_variance = np.maximum(square / n - (mean / n) ** 2, 0.0)
    share = column_variance / np.maximum(column_variance + state_variance, 1e-300)
    _, low, high = fit.spread(share, interval, least=0.0)
    table = pd.DataFrame(
        {
            "share": share.mean(0), "lower": low, "upper": np.minimum(high, 1.0),
            "sd_column": np.sqrt(column_variance.mean(0)), "sd_state": np.sqrt(state_variance.mean(0)),
        },
        index=pd.Index(fit.schema.genes, name="gene"),
    )  # fmt: skip
    table.attrs = {"column": column, "levels": list(levels), "uncertainty": fit._uncertainty()}
    return table.sort_values("share", ascending=False)
