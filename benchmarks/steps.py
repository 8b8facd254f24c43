"""How many steps: held-out ELBO, and the size of effects where the truth is known, by steps and learning rate.

    python benchmarks/steps.py ../shared/data/kang_pbmc_ifnb.h5ad --out benchmarks/results

Kang PBMC (2,792 cells x 2,000 variable genes, batch = donor) and SIM-A (`pyrosc.simulate.tissue(seed=0)`, 4,000 x
1,000), scVI with pyrosc's other defaults, one split: the figure is the held-out tenth's ELBO over 20 draws, nats a
cell; that tenth also chose the epoch. For SIM-A the slope of decoded on true log2 fold changes between two types over
all genes (1 is right), and their root mean squared error.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kang import prepare

import pyrosc
from pyrosc import Cells
from pyrosc.loading import n_batches_of

SETTINGS = [(600, 1e-2), (600, 2e-2), (900, 1e-2), (900, 2e-2), (1200, 1e-2), (1200, 2e-2), (1500, 1e-2)]


def one(cells: Cells, steps: int, lr: float) -> tuple[Any, dict[str, Any]]:
    began = time.perf_counter()
    epochs = max(10, round(steps / n_batches_of(round(0.9 * len(cells)), 128)))
    fit = pyrosc.fit(pyrosc.scvi(cells), cells, progress=False, epochs=epochs, lr=lr)
    seconds = time.perf_counter() - began
    held = np.sort(np.random.default_rng(0).permutation(len(cells))[: round(0.1 * len(cells))])
    row = {"steps": steps, "lr": lr, "ELBO": float(fit.elbo(cells[held], n_draws=20).mean()),
           "active units": int(fit.history["active_units"].iloc[-1]), "epochs run": len(fit.history),
           "seconds": seconds}  # fmt: skip
    return fit, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sim = pyrosc.simulate.tissue(seed=0)
    sets = {
        "Kang": Cells.from_anndata(prepare(given.path), batch="donor"),
        "SIM-A": Cells.from_anndata(sim, batch="batch", label="cell_type"),
    }
    kind, rho = sim.obs["cell_type"].to_numpy(), np.asarray(sim.layers["rho"], dtype=float)
    truth = np.log2(rho[kind == "type0"].mean(0)) - np.log2(rho[kind == "type5"].mean(0))
    rows: list[dict[str, Any]] = []
    columns = ["data", "steps", "lr", "ELBO", "active units", "epochs run", "seconds", "slope", "rmse"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
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
            rows.append(row)
            texts = (f"{row[c]:.5g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns)
            lines.append("| " + " | ".join(texts) + " |")
            print(lines[-1], flush=True)
            if given.out:
                (given.out / "steps.json").write_text(json.dumps(rows, indent=1))
                (given.out / "steps.md").write_text(f"# Steps of a fit\n\n{__doc__}\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
