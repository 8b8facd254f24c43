"""How many steps: held-out ELBO, and the size of effects where the truth is known, by steps and learning rate.

    python benchmarks/steps.py ../shared/data/kang_pbmc_ifnb.h5ad --out benchmarks/results

Kang PBMC (2,792 cells x 2,000 variable genes, batch = donor) and SIM-A (`pyrosc.simulate.tissue(seed=0)`, 4,000 x
1,000), scVI with pyrosc's other defaults, one split: the figure is the held-out tenth's ELBO over 20 draws, nats a
cell; that tenth also chose the epoch. For SIM-A the slope of decoded on true log2 fold changes between two types over
all genes (1 is right), and their root mean squared error.

``--parts large``: simulated tissues of 16,000 cells (8 types, 3 batches) and 20,000 (16 types, 6 batches), by epochs;
1,200 steps are 7 to 11 of them. Parts that are not asked for stay in the file as they are.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kang import prepare

import pyrosc
from pyrosc import Cells
from pyrosc.loading import n_batches_of

LARGE = {"tissue 16,000": (16_000, 8, 3, 7), "tissue 20,000": (20_000, 16, 6, 5)}  # cells, types, batches, seed
EPOCHS = (5, 10, 20, 40)
SETTINGS = [(600, 1e-2), (600, 2e-2), (900, 1e-2), (900, 2e-2), (1200, 1e-2), (1200, 2e-2), (1500, 1e-2)]


def one(cells: Cells, steps: int, lr: float, epochs: int | None = None) -> tuple[Any, dict[str, Any]]:
    began = time.perf_counter()
    a_pass = n_batches_of(round(0.9 * len(cells)), 128)
    epochs = epochs or max(10, round(steps / a_pass))
    steps = steps or epochs * a_pass
    fit = pyrosc.fit(pyrosc.scvi(cells), cells, progress=False, epochs=epochs, lr=lr)
    seconds = time.perf_counter() - began
    held = np.sort(np.random.default_rng(0).permutation(len(cells))[: round(0.1 * len(cells))])
    row = {"steps": steps, "lr": lr, "ELBO": float(fit.elbo(cells[held], n_draws=20).mean()),
           "active units": int(fit.history["active_units"].iloc[-1]), "epochs run": len(fit.history),
           "seconds": seconds}  # fmt: skip
    return fit, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="kang_pbmc_ifnb.h5ad; not read for large alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=("steps", "large"), default=["steps", "large"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = given.out / "steps.json" if given.out else None
    old: list[dict[str, Any]] = json.loads(where.read_text()) if where and where.exists() else []
    rows = [r for r in old if ("large" if r["data"] in LARGE else "steps") not in given.parts]

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        if given.out:
            (given.out / "steps.json").write_text(json.dumps(rows, indent=1))
            (given.out / "steps.md").write_text(report(rows))

    if "steps" in given.parts:
        for row in few_cells(given.path):
            keep(row)
    if "large" in given.parts:
        for name, (n, n_types, n_batches, seed) in LARGE.items():
            data = pyrosc.simulate.tissue(n, 1000, n_types=n_types, n_batches=n_batches, seed=seed)
            cells = Cells.from_anndata(data, batch="batch")
            for epochs in EPOCHS:
                keep({"data": name} | one(cells, 0, 1e-2, epochs)[1])


def few_cells(path: str) -> Iterator[dict[str, Any]]:
    sim = pyrosc.simulate.tissue(seed=0)
    sets = {
        "Kang": Cells.from_anndata(prepare(path), batch="donor"),
        "SIM-A": Cells.from_anndata(sim, batch="batch", label="cell_type"),
    }
    kind, rho = sim.obs["cell_type"].to_numpy(), np.asarray(sim.layers["rho"], dtype=float)
    truth = np.log2(rho[kind == "type0"].mean(0)) - np.log2(rho[kind == "type5"].mean(0))
    for name, cells in sets.items():
        for steps, lr in SETTINGS:
            fit, row = one(cells, steps, lr)
            row = {"data": name} | row
            if name == "SIM-A":
                table = fit.differential_expression(
                    cells, "cell_type", "type0", "type5", resample=False, batches="own"
                ).loc[list(cells.schema.genes)]
                row["slope"] = float(np.polyfit(truth, table["lfc_mean"], 1)[0])
                row["rmse"] = float(np.sqrt(((table["lfc_mean"] - truth) ** 2).mean()))
            yield row


def report(rows: list[dict[str, Any]]) -> str:
    columns = ["data", "steps", "lr", "ELBO", "active units", "epochs run", "seconds", "slope", "rmse"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        texts = (f"{row[c]:.5g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns)
        lines.append("| " + " | ".join(texts) + " |")
    head = "What is measured: top of `benchmarks/steps.py`. Machines were busy: seconds are of little use."
    return f"# Steps of a fit\n\n{head}\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
