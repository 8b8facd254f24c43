"""Zeroed counts guessed back, and cells made up: pyrosc beside scvi-tools and the gene mean, on Kang.

    python benchmarks/imputation.py ../shared/data/kang_pbmc_ifnb.h5ad --out benchmarks/results
    python benchmarks/imputation.py ... --no-peer                   # without scvi-tools
    python benchmarks/imputation.py ... --peer other/bin/python     # scvi-tools of another environment

Kang PBMC, 2,000 variable genes (seurat_v3), batch = donor, NB. Arms as in `kang.py`: pyrosc's defaults; scvi-tools'
defaults (400 epochs); the same with early stopping and pyrosc's learning rate. Both of scvi-tools' keep their best
epoch. Every arm runs in a process of its own, on the same cells, entries and splits; pyrosc answers by its public
methods.

Imputation (Lopez et al. 2018): a tenth of the non-zero counts, at random, is set to zero, and every arm is fitted to
what is left, a tenth of the cells held out to choose the epoch. A zeroed count is guessed by its expected value,
the cell's (corrupted) total times the mean share over 25 draws of its state. Error: |guess - count| over the zeroed
entries; its median, as papers report it, its mean, and its median by size of the count. Most zeroed counts are ones,
so the guess "0" has a median error of 1, and as only non-zeros are zeroed every arm guesses low.
Beside: the gene's mean, and its mean share times the cell's total.

Synthetic cells: fits on 60 % of the cells (a tenth more chooses the epoch). As many of their training cells as there
are held-out ones lend totals and donors, and counts are drawn with states

    posterior   of these cells, as the encoder gives them (the aggregate posterior)
    prior       from the prior

A classifier tells them from the 30 % of cells that were held out: logistic regression on standardised log1p counts,
and a random forest on log1p counts, area under the curve of 5-fold predictions; 0.5 is a perfect imitation. Beside:
the training cells themselves (real against real, 0.5 but for chance), and Poisson cells of mean shares (a bad
imitation, which the classifiers must see).

Set before any run, for means over seeds:

1. Imputation: pyrosc's median error is at most 1.02 times the better of scvi-tools', and below both gene means'.
2. Synthetic cells, posterior: pyrosc's area is at most 0.02 above the better of scvi-tools', by either classifier.
3. Synthetic cells, prior: likewise.
4. The classifiers work: 0.45 to 0.55 for real against real, above 0.9 for mean shares.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from kang import ARMS, fit_scvi, prepare
from scipy import sparse

import pyrosc
from pyrosc import Cells
from pyrosc.distributions import NegativeBinomial

SIZES = {"1": (1, 1), "2-4": (2, 4), "5+": (5, np.inf)}
N_DRAWS = 25

Result = dict[str, Any]


def corrupted(x: sparse.csr_matrix, seed: int) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Counts with a tenth of the non-zeros set to zero, and rows and columns of these."""
    x = x.tocsr().copy()
    x.eliminate_zeros()
    chosen = np.sort(np.random.default_rng([seed, 1]).choice(x.nnz, x.nnz // 10, replace=False))
    rows = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))[chosen]
    columns = x.indices[chosen].copy()
    x.data[chosen] = 0
    x.eliminate_zeros()
    return x, rows, columns


def split(n: int, seed: int, **shares: float) -> dict[str, np.ndarray]:
    """Positions in disjoint random parts; "train" has what is left."""
    order, found, start = np.random.default_rng([seed, 2]).permutation(n), {}, 0
    for name, share in shares.items():
        found[name] = np.sort(order[start : start + round(share * n)])
        start += round(share * n)
    return found | {"train": np.sort(order[start:])}


def errors(guess: np.ndarray, truth: np.ndarray) -> Result:
    off = np.abs(guess - truth)
    found = {"median": float(np.median(off)), "mean": float(off.mean())}
    for name, (low, high) in SIZES.items():
        found[f"median of {name}"] = float(np.median(off[(truth >= low) & (truth <= high)]))
    return found


# ---- pyrosc -----------------------------------------------------------------------------------


def ours(adata: anndata.AnnData, at: dict[str, Any], seed: int) -> tuple[Any, Cells]:
    """(fit, all cells)."""
    cells = Cells.from_anndata(adata, batch="donor")
    keep = np.sort(np.concatenate([at["train"], at["validation"]]))
    held = np.flatnonzero(np.isin(keep, at["validation"]))
    return pyrosc.fit(pyrosc.scvi(cells, seed=seed), cells[keep], validation=held, seed=seed, progress=False), cells


def our_means(adata: anndata.AnnData, at: dict[str, Any], seed: int) -> np.ndarray:
    fit, cells = ours(adata, at, seed)
    return cells.library.numpy() * fit.expression(cells, n_draws=N_DRAWS).to_numpy()


def our_cells(adata: anndata.AnnData, at: dict[str, Any], lend: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    fit, cells = ours(adata, at, seed)
    return {
        "posterior": fit.predict(cells[lend], seed=seed)[0],
        "prior": fit.program.generate(cells[lend], seed=seed)["x"].numpy(),
    }


# ---- scvi-tools -------------------------------------------------------------------------------


class Theirs:
    """A fit of scvi-tools by its encoder and decoder, in blocks of cells."""

    def __init__(self, adata: anndata.AnnData, at: dict[str, Any], seed: int, early: bool) -> None:
        self.encode, self.decode, *_ = fit_scvi(adata, at, seed, early, False)
        self.x = torch.tensor(adata.X.toarray(), dtype=torch.float64)
        self.batch = torch.tensor(np.unique(adata.obs["donor"].astype(str), return_inverse=True)[1])

    def blocks(self, rows: np.ndarray, n_draws: int, prior: bool, seed: int) -> Any:
        """(expected counts (S, n, G), dispersion), block by block."""
        torch.manual_seed(seed)
        for some in torch.as_tensor(rows).split(64):
            x, batch = self.x[some], self.batch[some]
            with torch.no_grad():
                loc, scale = self.encode(x, batch)
                q = torch.distributions.Normal(torch.zeros_like(loc), 1.0) if prior else None
                z = (q or torch.distributions.Normal(loc, scale)).sample((n_draws,))
                rho, dispersion = self.decode(z, x, batch)
            yield x.sum(-1, keepdim=True) * rho, dispersion

    def means(self) -> np.ndarray:
        rows = np.arange(len(self.x))
        return torch.cat([mean.mean(0) for mean, _ in self.blocks(rows, N_DRAWS, False, 0)]).numpy()

    def cells(self, lend: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        return {
            name: torch.cat([NegativeBinomial(m[0], d).sample() for m, d in self.blocks(lend, 1, prior, seed)]).numpy()
            for name, prior in (("posterior", False), ("prior", True))
        }


# ---- scores -----------------------------------------------------------------------------------


def areas(made: np.ndarray, real: np.ndarray, seed: int) -> dict[str, float]:
    """How well made-up cells are told from real ones: area under the curve of 5-fold predictions."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.log1p(np.concatenate([made, real]).astype(np.float32))
    is_real = np.repeat([0, 1], [len(made), len(real)])
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    classifiers = {
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=500)),
        "forest": RandomForestClassifier(200, min_samples_leaf=2, random_state=seed),
    }
    found = {}
    for name, classifier in classifiers.items():
        guess = cross_val_predict(classifier, x, is_real, cv=folds, method="predict_proba")[:, 1]
        found[name] = float(roc_auc_score(is_real, guess))
    return found


def run_arm(arm: str, path: str, seed: int) -> list[Result]:
    """Both tasks of one arm in this process; "baselines" are what needs no fit."""
    warnings.simplefilter("ignore")
    adata = anndata.read_h5ad(path)
    whole = adata.X.tocsr().astype(np.float32)
    x, rows, columns = corrupted(whole, seed)
    truth = np.asarray(whole[rows, columns]).ravel()
    damaged = adata.copy()
    damaged.X = x
    everyone = split(adata.n_obs, seed, validation=0.1)
    at = split(adata.n_obs, seed, validation=0.1, test=0.3)
    real = whole[at["test"]].toarray()
    lend = np.sort(np.random.default_rng([seed, 3]).choice(at["train"], len(at["test"]), replace=False))
    began = time.perf_counter()
    if arm == "baselines":
        totals, mean = np.asarray(x.sum(1)).ravel(), np.asarray(x.mean(0)).ravel()
        share = np.asarray(x.sum(0)).ravel() / x.sum()
        guesses = {"zero": np.zeros(len(truth)), "gene mean": mean[columns],
                   "gene mean share x total": totals[rows] * share[columns]}  # fmt: skip
        lent, train = whole[lend].toarray(), whole[at["train"]]
        rate = lent.sum(1, keepdims=True) * (np.asarray(train.sum(0)).ravel() / train.sum())
        made = {("real", "training cells"): lent,
                ("mean shares", "no state"): np.random.default_rng([seed, 4]).poisson(rate)}  # fmt: skip
    elif arm == "pyrosc":
        guesses = {arm: our_means(damaged, everyone, seed)[rows, columns]}
        made = {(arm, states): cells for states, cells in our_cells(adata, at, lend, seed).items()}
    else:
        early = arm == "scvi early"
        guesses = {arm: Theirs(damaged, everyone, seed, early).means()[rows, columns]}
        made = {(arm, k): v for k, v in Theirs(adata, at, seed, early).cells(lend, seed).items()}
    seconds = time.perf_counter() - began
    found: list[Result] = [{"task": "imputation", "arm": name} | errors(g, truth) for name, g in guesses.items()]
    for (name, states), cells in made.items():
        found.append({"task": "cells", "arm": name, "states": states} | areas(cells, real, seed))
    return [r | {"seed": seed, "seconds": seconds, "n_zeroed": len(truth), "n_real": len(real)} for r in found]


# ---- report -----------------------------------------------------------------------------------


def markdown(frame: pd.DataFrame) -> list[str]:
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|---" * len(frame.columns) + "|"]
    return lines + [
        "| " + " | ".join("" if v != v else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row) + " |"
        for row in frame.itertuples(index=False)
    ]


def verdicts(imputation: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The lines that were set; those that need scvi-tools only where it ran."""
    peers = [a for a in ARMS[1:] if a in imputation.index]
    found: list[tuple[str, str, bool]] = []
    if "pyrosc" in imputation.index:
        own, plain = imputation.loc["pyrosc", "median"], imputation.loc[["gene mean", "gene mean share x total"]]
        found.append(("1. median error below both gene means'", f"{own:.3f} against {plain['median'].min():.3f}",
                      own < plain["median"].min()))  # fmt: skip
        if peers:
            other = imputation.loc[peers, "median"].min()
            found.append(("1. median error <= 1.02 x scvi-tools'", f"{own:.3f} against {other:.3f}",
                          own <= 1.02 * other))  # fmt: skip
        for line, states in ((2, "posterior"), (3, "prior")):
            for name in ("logistic", "forest") if peers else ():
                own, other = cells.loc[("pyrosc", states), name], min(cells.loc[(p, states), name] for p in peers)
                found.append((f"{line}. {states}, {name}: area <= scvi-tools' + 0.02", f"{own:.3f} against {other:.3f}",
                              own <= other + 0.02))  # fmt: skip
    for name in ("logistic", "forest"):
        real, bad = cells.loc[("real", "training cells"), name], cells.loc[("mean shares", "no state"), name]
        found.append((f"4. {name} works", f"{real:.3f} and {bad:.3f}", 0.45 <= real <= 0.55 and bad > 0.9))
    return pd.DataFrame([(a, b, "holds" if c else "fails") for a, b, c in found], columns=["line", "found", ""])


def report(rows: list[Result], note: str) -> str:
    frame = pd.DataFrame(rows)
    values = ["median", "mean", *(f"median of {size}" for size in SIZES)]
    imputation = frame[frame["task"] == "imputation"].groupby("arm", sort=False)[values].mean()
    of_cells = frame[frame["task"] == "cells"].groupby(["arm", "states"], sort=False)[["logistic", "forest"]]
    spread = of_cells.std().add_suffix(", sd")
    seconds = frame[frame["arm"].isin(ARMS)].groupby("arm", sort=False)["seconds"].median().reset_index()
    zeroed, real = int(frame["n_zeroed"].iloc[0]), int(frame["n_real"].iloc[0])
    return "\n".join([
        "# Imputation and synthetic cells on Kang", "", note, "", "## The lines", "",
        *markdown(verdicts(imputation, of_cells.mean())), "",
        f"## |guess - count| of {zeroed:,} zeroed counts, mean over seeds", "", *markdown(imputation.reset_index()), "",
        f"## Area under the curve of a classifier between made-up and {real:,} real cells, mean over seeds", "",
        *markdown(of_cells.mean().join(spread).reset_index()), "",
        "## Seconds of both fits and their answers, median", "", *markdown(seconds), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--no-peer", action="store_true", help="leave scvi-tools out")
    parser.add_argument("--peer", default=sys.executable, help="Python with pyrosc and scvi-tools")
    parser.add_argument("--cells", type=int, help="so many cells at random, for a trial")
    parser.add_argument("--prepared", action="store_true", help="the file holds the chosen genes and cells already")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.arm:
        print("RESULT " + json.dumps(run_arm(given.arm, given.path, given.seeds[0])))
        return
    arms = ["baselines", *(a for a in given.arms if a == "pyrosc" or not given.no_peer)]
    rows: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "kang.h5ad")
        adata = anndata.read_h5ad(given.path) if given.prepared else prepare(given.path)
        if given.cells:
            adata = adata[np.random.default_rng(0).permutation(adata.n_obs)[: given.cells]].copy()
        adata.write_h5ad(data)
        for seed in given.seeds:
            for arm in arms:
                python = sys.executable if arm in ("baselines", "pyrosc") else given.peer
                command = [python, __file__, data, "--arm", arm, "--seeds", str(seed)]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                line = next((t for t in done.stdout.splitlines() if t.startswith("RESULT ")), None)
                if line is None:
                    sys.exit(f"{arm}, seed {seed} failed:\n{done.stderr[-3000:]}")
                new = json.loads(line.removeprefix("RESULT "))
                rows += new
                for row in new:
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                note = (
                    f"{adata.n_obs:,} cells x {adata.n_vars:,} genes, seed(s) {', '.join(map(str, given.seeds))}; one "
                    f"thread a process, pyrosc {pyrosc.__version__}, torch {torch.__version__}"
                )
                if given.out:
                    given.out.mkdir(parents=True, exist_ok=True)
                    (given.out / "imputation.json").write_text(json.dumps({"note": note, "rows": rows}, indent=1))
                    (given.out / "imputation.md").write_text(report(rows, note))
    print(report(rows, note))


if __name__ == "__main__":
    main()
