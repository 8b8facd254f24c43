"""Are doublets and unseen types found, and are sound cells left in peace?

    python benchmarks/outliers.py --kang kang2000.h5ad --out benchmarks/results

SIM-A in small (`pyrosc.simulate.tissue`: 2,000 cells x 500 genes, 6 types, 2 batches) and, if its file is given (2,000
genes, as ``kang.prepare`` makes it), Kang. Seven tenths of the cells are fitted, thinned by half; the rest are asked,
with 200 doublets: sums of two of them of different types in one batch (a donor, on Kang). Then the fit is done again
without one type, and cells of that type stand for the doublets. Area under the curve of telling them from sound cells
by `Fit.outliers` ("p", and each of its parts), by total counts and by the number of genes seen; the share of sound
cells with p below 0.05, and what is called at ``fdr=0.1``.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from effects import table
from scipy import sparse, stats

import pyrosc
from pyrosc import Cells


def area(score: np.ndarray, is_strange: np.ndarray) -> float:
    rank = stats.rankdata(score)
    n = int(is_strange.sum())
    return float((rank[is_strange].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def judged(name: str, fit: Any, x: Any, obs: pd.DataFrame, var: pd.DataFrame, is_strange: np.ndarray) -> dict[str, Any]:
    obs = obs.copy()
    obs.index = [f"asked{i}" for i in range(len(obs))]
    asked = anndata.AnnData(x, obs=obs, var=var)
    found = fit.outliers(asked)
    row: dict[str, Any] = {"strange": name, "n": int(is_strange.sum())}
    for column in ("p", "p_counts", "p_state", "p_total"):
        row[column] = area(-found[column].to_numpy(), is_strange)
    row["total"] = area(np.asarray(x.sum(1)).ravel(), is_strange)
    row["genes seen"] = area(np.asarray((x > 0).sum(1)).ravel(), is_strange)
    row["sound p < .05"] = float((found["p"][~is_strange] < 0.05).mean())
    row["called"] = int(found["is_outlier"].sum())
    row["called, sound"] = int(found["is_outlier"][~is_strange].sum())
    return row


def one_set(data: Any, batch: str, unseen: str, seed: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    order = draw.permutation(data.n_obs)
    cut = int(0.7 * data.n_obs)
    train, test = np.sort(order[:cut]), np.sort(order[cut:])
    x, kind = sparse.csr_matrix(data.X), data.obs["cell_type"].astype(str).to_numpy()
    place = data.obs[batch].astype(str).to_numpy()

    def fitted(rows: np.ndarray) -> Any:
        cells = Cells.from_anndata(data[rows].copy(), batch=batch).thin(0.5, seed=seed)[0]
        return pyrosc.fit(pyrosc.scvi(cells, seed=seed), cells, seed=seed, progress=False)

    one, two = draw.choice(test, 4000), draw.choice(test, 4000)
    apart = (kind[one] != kind[two]) & (place[one] == place[two])
    one, two = one[apart][:200], two[apart][:200]
    both = sparse.vstack([x[test], x[one] + x[two]]).tocsr()
    obs = data.obs.iloc[np.concatenate([test, one])]
    rows = [judged("doublets", fitted(train), both, obs, data.var, np.arange(both.shape[0]) >= len(test))]
    without = train[kind[train] != unseen]
    rows.append(judged(unseen, fitted(without), x[test], data.obs.iloc[test], data.var, kind[test] == unseen))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kang", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sets = {
        "SIM-A": (pyrosc.simulate.tissue(2000, 500, n_types=6, n_batches=2, depth=1500, n_markers=40), "batch", "type2")
    }
    if given.kang:
        data = anndata.read_h5ad(given.kang)
        sets["Kang"] = (data[data.obs["donor"] != "none"].copy(), "donor", "NK")
    rows = []
    for name, (data, batch, unseen) in sets.items():
        rows += [{"data": name} | row for row in one_set(data, batch, unseen, given.seed)]
        text = "\n".join([
            "# Outliers", "", f"Areas under the curve, one seed; one thread, torch {torch.__version__}", "",
            *table(pd.DataFrame(rows)), "",
        ])  # fmt: skip
        print(text, flush=True)
        if given.out:
            (given.out / "outliers.json").write_text(json.dumps(rows, indent=1))
            (given.out / "outliers.md").write_text(text)


if __name__ == "__main__":
    main()
