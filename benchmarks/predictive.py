"""Predictive checks on Kang: do Poisson and NB cells have as many zeros, and as much scatter, as real ones?

    python benchmarks/predictive.py ../shared/data/kang_pbmc_ifnb.h5ad --out benchmarks/results

Kang PBMC (2,792 cells x 2,000 variable genes, batch = donor), scVI with Poisson and with NB counts, pyrosc's other
defaults. Each seed holds out 30 % of the cells. A fit is trained on the others, each count of theirs kept with
probability one half (``cells.thin(0.5)[0]``), and checked by `pyrosc.check.posterior_predictive` on the held-out
cells: their kept half is read, their dropped half is what is predicted, so that no count is used twice. "In the fit"
is the same on the cells of the fit, whose dropped half it has not seen, thinned as they were in training.

Figure of merit: the share of genes (mean above 0.1 counts in the held-out cells) whose two-sided p-value is at most
0.05. Of a true story it is 5 %, or less where a statistic takes few values.

To see what the check says of a true story, the held-out cells are replaced by simulated ones of the fitted NB: z from
the guide, which reads the kept half; counts of the program at the totals that were measured. They are thinned and
checked by the same fit, so that decoder and dispersion are the truth, and what remains is the guide (an approximate
posterior, trained on real cells) and that totals are read off the counts. "From the prior" draws z from its prior: then
the story is exact, but the guide meets cells unlike those it was trained on. "Refitted" simulates the training cells
as well and checks another fit on them: that adds what a decoder gets wrong for want of cells.

Set before any run, for means over seeds on held-out cells:

1. Zero fraction: NB's share is at most half of Poisson's.
2. Fano factor: NB's share is below Poisson's.
3. On cells simulated from the fit (z from the guide, the same fit): 3 to 8 % for either statistic.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from kang import prepare

import pyrosc
from pyrosc import Cells, Fit, check

STATISTICS = ("zero fraction", "Fano factor", "mean", "variance")
LAWS: dict[str, dict[str, Any]] = {
    "Poisson": {"likelihood": pyrosc.PoissonLikelihood(), "dispersion": None},
    "NB": {},
}

Rows = list[dict[str, Any]]


def trained(cells: Cells, law: str, seed: int, epochs: int | None) -> Fit:
    kept, _ = cells.thin(0.5, seed=seed)
    return pyrosc.fit(pyrosc.scvi(kept, seed=seed, **LAWS[law]), kept, seed=seed, epochs=epochs, progress=False)


def simulated(fit: Fit, cells: Cells, seed: int) -> Cells:
    """Cells of the story at the totals of these: z from the guide, which reads one half of their counts."""
    kept, _ = cells.thin(0.5, seed=seed)
    # Counts of the kept half beside the library of both: the guide reads the one, the story the other.
    return with_any_counts(cells, fit.predict(cells.with_counts(kept.x), seed=seed)[0])


def with_any_counts(cells: Cells, x: np.ndarray) -> Cells:
    some = x.sum(1) > 0  # a cell without counts is none
    return cells[some].with_counts(x[some])


def checked(fit: Fit, cells: Cells, genes: np.ndarray, n_draws: int, seed: int) -> pd.DataFrame:
    """The table for the genes chosen (G,). ``seed`` thins the cells, in training and here alike."""
    table = check.posterior_predictive(fit, cells, STATISTICS, n_draws=n_draws, seed=seed)
    return table[table["name"].isin(np.asarray(fit.schema.genes)[genes])]


def shares(table: pd.DataFrame) -> dict[str, float]:
    return {name: float((rows["p"] <= 0.05).mean()) for name, rows in table.groupby("statistic", sort=False)}


def one_seed(cells: Cells, seed: int, given: argparse.Namespace) -> tuple[Rows, dict[str, pd.DataFrame]]:
    held = np.random.default_rng(seed).permutation(len(cells))[: round(given.held_out * len(cells))]
    train = cells[np.setdiff1d(np.arange(len(cells)), held)]
    test = cells[np.sort(held)]
    genes = (test.x.mean(0) > 0.1).numpy()
    rows: Rows = []
    tables = {}

    def keep(law: str, on: str, fit: Fit, on_cells: Cells) -> pd.DataFrame:
        began = time.perf_counter()
        table = checked(fit, on_cells, genes, given.draws, seed)
        row = {"seed": seed, "law": law, "cells": on, "n_cells": len(on_cells), "n_genes": int(genes.sum())}
        rows.append(row | shares(table) | {"seconds": time.perf_counter() - began})
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        return table

    for law in LAWS:
        began = time.perf_counter()
        fit = trained(train, law, seed, given.epochs)
        print(f"{law}, seed {seed}: fitted in {time.perf_counter() - began:.0f} s", flush=True)
        tables[law] = keep(law, "held out", fit, test)
        keep(law, "in the fit", fit, train)
    keep("NB", "simulated", fit, simulated(fit, test, seed))
    keep(
        "NB", "simulated from the prior", fit, with_any_counts(test, fit.program.generate(test, seed=seed)["x"].numpy())
    )
    again = trained(simulated(fit, train, seed + 1000), "NB", seed, given.epochs)
    keep("NB", "simulated, refitted", again, simulated(fit, test, seed))
    return rows, tables


def markdown(frame: pd.DataFrame) -> list[str]:
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|---" * len(frame.columns) + "|"]
    return lines + [
        "| " + " | ".join(f"{v:.1%}" if isinstance(v, float) else str(v) for v in row) + " |"
        for row in frame.itertuples(index=False)
    ]


def lines_of(mean: pd.DataFrame) -> list[str]:
    """The lines that were set, and whether they hold."""
    zeros, fano = (mean[name] for name in ("zero fraction", "Fano factor"))
    nb, poisson, made = ("NB", "held out"), ("Poisson", "held out"), ("NB", "simulated")
    inside = all(0.03 <= s[made] <= 0.08 for s in (zeros, fano))
    found = [
        ("1. zero fraction: NB at most half of Poisson's", f"{zeros[nb]:.1%} against {zeros[poisson]:.1%}",
         zeros[nb] <= zeros[poisson] / 2),
        ("2. Fano factor: NB below Poisson", f"{fano[nb]:.1%} against {fano[poisson]:.1%}", fano[nb] < fano[poisson]),
        ("3. simulated from the fit: 3-8 %", f"{zeros[made]:.1%} and {fano[made]:.1%}", inside),
    ]  # fmt: skip
    frame = pd.DataFrame([(a, b, "holds" if c else "fails") for a, b, c in found], columns=["line", "found", ""])
    return markdown(frame)


def report(rows: Rows, note: str) -> str:
    frame = pd.DataFrame(rows)
    mean = frame.groupby(["law", "cells"], sort=False)[list(STATISTICS)].mean()
    by_seed = frame[["seed", "law", "cells", "n_cells", "n_genes", *STATISTICS]]
    return "\n".join([
        "# Predictive checks on Kang", "", note, "", "## The lines", "", *lines_of(mean), "",
        "## Share of genes with p <= 0.05, mean over seeds", "", *markdown(mean.reset_index()), "",
        "## By seed", "", *markdown(by_seed), "", "![replicates against what was counted](predictive.png)", "",
    ])  # fmt: skip


def draw(tables: dict[str, pd.DataFrame], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = STATISTICS[:2]
    figure, axes = plt.subplots(len(tables), len(shown), figsize=(4.5 * len(shown), 4 * len(tables)), squeeze=False)
    for (law, table), line in zip(tables.items(), axes):
        for statistic, ax in zip(shown, line):
            pyrosc.plot.predictive(table, statistic, ax)
            ax.set_title(f"{law}, {statistic}: {ax.get_title()}")
            if statistic == "Fano factor":
                ax.set(xscale="log", yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--held-out", type=float, default=0.3)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--epochs", type=int, help="of a fit; its default if not given")
    parser.add_argument("--prepared", action="store_true", help="the file holds the chosen genes and cells already")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    adata = anndata.read_h5ad(given.path) if given.prepared else prepare(given.path)
    cells = Cells.from_anndata(adata, batch="donor")
    rows: Rows = []
    for seed in given.seeds:
        more, tables = one_seed(cells, seed, given)
        rows += more
        note = (
            f"{len(cells):,} cells x {cells.n_genes:,} genes, seed(s) {', '.join(map(str, given.seeds))}, "
            f"{given.draws} replicates, pyrosc {pyrosc.__version__}, torch {torch.__version__}"
        )
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / "predictive.json").write_text(json.dumps({"note": note, "rows": rows}, indent=1))
            (given.out / "predictive.md").write_text(report(rows, note))
            if seed == given.seeds[0]:
                draw(tables, given.out / "predictive.png")
    print(report(rows, note))


if __name__ == "__main__":
    main()
