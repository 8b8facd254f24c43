"""Why fit's defaults are what they are: held-out ELBO by setting, on three real data sets.

    python benchmarks/defaults.py DATA_FOLDER --out benchmarks/results

Kang PBMC (2,000 variable genes, batch = donor), cell-line mixology (2,000 variable genes, batch =
batch) and the embedded PBMC. Two splits: a tenth of the cells is held out and chooses the epoch, a
tenth is left for tests and not touched here. The figure is the held-out tenth's ELBO at KL weight
1 over 20 draws, in nats per cell; seconds are of one fit.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scanpy as sc
import torch

import pyrosc
from pyrosc import Cells
from pyrosc.loading import n_batches_of

SETTINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("defaults", {}, {}),
    ("weight_decay=0", {}, {"weight_decay": 0.0}),
    ("weight_decay=700/N", {}, {"weight_decay": 700.0}),
    ("lr=3e-3", {}, {"lr": 3e-3}),
    ("weight_decay=7/N", {}, {"weight_decay": 7.0}),
    ("lr=2e-2", {}, {"lr": 2e-2}),
    ("n_hidden=256", {"n_hidden": 256}, {}),
    ("warmup=0", {}, {"warmup": 0.0}),
    ("batch_size=64", {}, {"batch_size": 64}),
    ("dropout=0", {"dropout": 0.0}, {}),
    ("constant lr", {}, {"schedule": "constant"}),
    ("lr=5e-3", {}, {"lr": 5e-3}),
    ("warmup=0.1", {}, {"warmup": 0.1}),
    ("warmup=0.6", {}, {"warmup": 0.6}),
    ("batch_size=256, as many epochs", {}, {"batch_size": 256, "steps": 300}),
    ("batch_size=256, as many steps", {}, {"batch_size": 256}),
    ("1,200 steps", {}, {"steps": 1200}),
    ("1,200 steps, lr=5e-3", {}, {"steps": 1200, "lr": 5e-3}),
    ("Vamp 50", {"prior": pyrosc.VampPrior(50)}, {"steps": 600}),
    ("Vamp 50, 1,200 steps", {"prior": pyrosc.VampPrior(50)}, {"steps": 1200}),
    ("flow", {"prior": pyrosc.FlowPrior()}, {"steps": 600}),
    ("flow, 1,200 steps", {"prior": pyrosc.FlowPrior()}, {"steps": 1200}),
]


def load(name: str, folder: Path) -> Cells:
    if name == "pbmc":
        return Cells.from_anndata(pyrosc.datasets.pbmc())
    file, batch = {"kang": ("kang_pbmc_ifnb.h5ad", "donor"), "mixology": ("cellline_mixology_5batch.h5ad", "batch")}[
        name
    ]
    adata = sc.read_h5ad(folder / file)
    adata = adata[adata.obs[batch] != "none"].copy()
    options = {} if name == "kang" else {"batch_key": "batch", "span": 0.5}
    sc.pp.highly_variable_genes(adata, n_top_genes=2000, flavor="seurat_v3", **options)
    return Cells.from_anndata(adata, batch=batch, genes="highly_variable")


def run(cells: Cells, split: int, program: dict[str, Any], fit: dict[str, Any]) -> tuple[float, float]:
    order = np.random.default_rng(split).permutation(len(cells))
    tenth = len(cells) // 10
    held, keep = order[:tenth], np.sort(np.r_[order[:tenth], order[2 * tenth :]])
    if fit.get("weight_decay"):
        fit = fit | {"weight_decay": fit["weight_decay"] / (len(keep) - tenth)}
    if "steps" in fit:
        n_batches = n_batches_of(len(keep) - tenth, fit.get("batch_size", 128))
        fit["epochs"] = max(1, round(fit.pop("steps") / n_batches))
    began = time.perf_counter()
    result = pyrosc.fit(
        pyrosc.scvi(cells, seed=split, **program), cells[keep], seed=split, progress=False,
        validation=np.flatnonzero(np.isin(keep, held)), **fit,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    return float(result.elbo(cells[np.sort(held)], n_draws=20).mean()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="settings whose name starts so")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    names = ("kang", "mixology", "pbmc")
    sets = {name: load(name, given.folder) for name in names}
    rows: list[dict[str, Any]] = []
    lines = ["| setting | " + " | ".join(f"{n} ({len(sets[n]):,} cells)" for n in names) + " |", "|---" * 4 + "|"]
    print("\n".join(lines))
    for label, program, fit in SETTINGS:
        if given.only and not label.startswith(tuple(given.only)):
            continue
        texts = []
        for name in names:
            found = [run(sets[name], split, dict(program), dict(fit)) for split in (0, 1)]
            elbo, seconds = (float(np.mean(column)) for column in zip(*found))
            rows.append(
                {"setting": label, "data": name, "elbo": [f[0] for f in found], "seconds": [f[1] for f in found]}
            )
            texts.append(f"{elbo:.1f} ({seconds:.0f} s)")
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
        print(lines[-1], flush=True)
        if given.out:  # after each row: a long run that is cut short keeps what it measured
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / "defaults.json").write_text(json.dumps(rows, indent=1))
            text = f"Held-out ELBO, nats a cell (mean of two splits), and seconds of a fit, {given.threads} thread(s)."
            (given.out / "defaults.md").write_text(f"# Defaults\n\n{text}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
