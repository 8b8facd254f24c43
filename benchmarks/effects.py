"""Do intervals of effects cover, and do calls keep their rate? A single fit and an ensemble, on cells of known truth.

    python benchmarks/effects.py --out benchmarks/results

SIM-A (`pyrosc.simulate.tissue()`: 4,000 cells x 1,000 genes, 8 types, 3 batches), one simulated tissue a seed. Each is
fitted once with pyrosc's defaults and ``ensemble=5``; the single fit is the ensemble's own start.

Coverage: of nominal 90 % intervals of log2 mean share of each type, and of log2 fold changes of every pair of types, by
terciles of true mean share, over all genes; the truth is that of the simulated cells (``resample=False``,
``batches="own"``). A rate of 85 to 95 % in each tercile is the line.

Calls: for every pair, at posterior expected false discovery proportions of 0.05, 0.1 and 0.2; a gene is different if
its true |lfc| is above the delta of the call. FDP realised (mean over pairs, standard error over seeds), power, and a
Wilcoxon test with Benjamini-Hochberg and the same filter on its estimated |lfc| beside. The line: mean FDP at most
1.5 alpha.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

import pyrosc
from pyrosc import Cells, Fit, effects

RATES = (0.05, 0.1, 0.2)


Rows = list[dict[str, Any]]


def one_seed(seed: int, n_cells: int, n_members: int) -> tuple[Rows, Rows, float, float]:
    data = pyrosc.simulate.tissue(n_cells, seed=seed)
    cells = Cells.from_anndata(data, batch="batch", label="cell_type")
    began = time.perf_counter()
    ensemble = pyrosc.fit(pyrosc.scvi(cells, seed=seed), cells, seed=seed, ensemble=n_members, progress=False)
    seconds = time.perf_counter() - began
    single = Fit(ensemble.program, ensemble.history, ensemble.settings)
    kind, rho = data.obs["cell_type"].to_numpy(), np.asarray(data.layers["rho"], dtype=float)
    types = list(cells.schema.label.levels)
    truth = {t: rho[kind == t].mean(0) for t in types}
    tercile = np.digitize(rho.mean(0), np.quantile(rho.mean(0), [1 / 3, 2 / 3]))
    genes = list(cells.schema.genes)
    coverage, calls = [], []
    for name, fit in (("single fit", single), ("ensemble", ensemble)):
        unit = np.searchsorted(types, kind)
        (sums,) = effects.sum_over_cells(fit, cells, [[cells]], unit, None, 100, 0, None, False)
        hits: dict[str, list[np.ndarray]] = {"mean share": [], "fold change": []}
        for t in types:
            draws = np.log2(sums.mean(np.array(types) == t).numpy())
            _, low, high = fit.spread(draws, 0.9)
            hits["mean share"].append((low < np.log2(truth[t])) & (np.log2(truth[t]) < high))
        for one, two in combinations(types, 2):
            options = dict(resample=False, batches="own")
            table = fit.differential_expression(cells, "cell_type", one, two, **options).loc[genes]
            lfc = np.log2(truth[one]) - np.log2(truth[two])
            hits["fold change"].append(((table["lfc_lower"] < lfc) & (lfc < table["lfc_upper"])).to_numpy())
            different = np.abs(lfc) > table.attrs["delta"]
            wilcoxon = by_wilcoxon(data, kind, one, two, table.attrs["delta"]) if name == "ensemble" else None
            for rate in RATES:
                called = (table["expected_fdp"] <= rate).to_numpy()
                row = {"seed": seed, "fit": name, "pair": f"{one}/{two}", "rate": rate} | score(called, different)
                row["expected"] = float(table["expected_fdp"][called].max()) if called.any() else 0.0
                calls.append(row)
                if wilcoxon is not None:
                    q, is_large = wilcoxon
                    calls.append({"seed": seed, "fit": "Wilcoxon", "pair": f"{one}/{two}", "rate": rate}
                                 | score((q <= rate) & is_large, different))  # fmt: skip
        for what, found in hits.items():
            both = np.stack(found)
            row = {"seed": seed, "fit": name, "what": what, "all": float(both.mean())}
            coverage.append(row | {f"tercile {k + 1}": float(both[:, tercile == k].mean()) for k in range(3)})
    return coverage, calls, seconds, float(ensemble.settings["seconds"])


def score(called: np.ndarray, different: np.ndarray) -> dict[str, float]:
    return {
        "called": int(called.sum()),
        "fdp": float((called & ~different).sum() / max(called.sum(), 1)),
        "power": float((called & different).sum() / max(different.sum(), 1)),
    }


def by_wilcoxon(data: Any, kind: np.ndarray, one: str, two: str, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """Adjusted p-values on log1p of counts per 10,000, and whether the fold change of their means is above delta."""
    x = np.asarray(data.X.todense(), dtype=float)
    x = 1e4 * x / x.sum(1, keepdims=True)
    a, b = x[kind == one], x[kind == two]
    p = stats.mannwhitneyu(np.log1p(a), np.log1p(b), axis=0).pvalue
    with np.errstate(divide="ignore", invalid="ignore"):
        lfc = np.log2(a.mean(0)) - np.log2(b.mean(0))
    return stats.false_discovery_control(np.nan_to_num(p, nan=1.0)), np.nan_to_num(np.abs(lfc), nan=0.0) > delta


def table(frame: pd.DataFrame) -> list[str]:
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|---" * len(frame.columns) + "|"]
    return lines + [
        "| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row) + " |"
        for row in frame.itertuples(index=False)
    ]


def report(coverage: Rows, calls: Rows, note: str) -> str:
    of_coverage = (
        pd.DataFrame(coverage).groupby(["what", "fit"]).mean(numeric_only=True).drop(columns="seed").reset_index()
    )
    frame = pd.DataFrame(calls)
    by_seed = frame.groupby(["rate", "fit", "seed"])[["fdp", "power", "called", "expected"]].mean()
    rows = by_seed.groupby(["rate", "fit"]).agg(
        fdp=("fdp", "mean"), se=("fdp", lambda v: v.std(ddof=1) / len(v) ** 0.5), expected=("expected", "mean"),
        power=("power", "mean"), called=("called", "mean"),
    )  # fmt: skip
    return "\n".join([
        "# Effects on simulated cells", "", note, "", "## Coverage of nominal 90 % intervals", "",
        *table(of_coverage), "", "## Calls", "", *table(rows.reset_index()), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--cells", type=int, default=4000)
    parser.add_argument("--members", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    coverage: Rows = []
    calls: Rows = []
    for seed in given.seeds:
        more, further, seconds, alone = one_seed(seed, given.cells, given.members)
        coverage += more
        calls += further
        note = (
            f"{len({r['seed'] for r in coverage})} simulated tissues of {given.cells:,} cells, ensembles of "
            f"{given.members} (the last took {seconds:.0f} s, its first fit {alone:.0f} s), one thread, "
            f"torch {torch.__version__}"
        )
        text = report(coverage, calls, note)
        print(text, flush=True)
        if given.out:
            (given.out / "effects.json").write_text(json.dumps({"coverage": coverage, "calls": calls}, indent=1))
            (given.out / "effects.md").write_text(text)


if __name__ == "__main__":
    main()
