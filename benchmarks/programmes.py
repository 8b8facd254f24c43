"""Are factors of a linear decoder the gene programmes that were put in, and what does a linear decoder cost?

    python benchmarks/programmes.py --seeds 3 --out benchmarks/results

`pyrosc.simulate.tissue` (4,000 cells x 1,000 genes, 8 types in 3 batches) has 15 programmes: 14 branches of the tree of
types, 60 genes each, and a continuous factor within types, 40 genes (``varm["programmes"]``). Every arm has 15 factors.
Scores:

    auprc          average precision of a programme's genes by absolute loading (posterior mean, relative to the median
                   gene), one factor for one programme by the assignment that is best in total; mean over programmes.
                   A programme that has no factor left, or one at random, has about 0.06.
    auprc factor   that of the continuous factor alone
    log p(x)       nats a cell of 500 other cells, importance-weighted with 100 draws
    loss           of log p(x), against scvi with its network, per cent
    used           factors that add at least a fifth of what the strongest does to log shares

Seven contrasts tell eight types apart, and one more dimension holds the continuous factor: under N(0, I) states there
is room for 8 factors, one for each of 15 programmes is not to be had, and programmes of sister branches fall on two
sides of one factor. A perfect score of the 8 and chance for the others would be about 0.5.

Arms:

    network                   pyrosc.scvi, for its log p(x)
    point                     pyrosc.scvi(decoder=LinearDecoder()): loadings are weights, as in LDVAE
    point, sure start         the same from an encoder that is sure of its states, as linear_scvi starts from
    normal                    linear_scvi(loadings=NormalLoadings(1.0))
    horseshoe                 linear_scvi: the default, HorseshoeLoadings()
    horseshoe, mixture        linear_scvi(prior=MixturePrior(20)): states of cells in groups
    non-negative              linear_scvi(loadings=NonNegativeLoadings())
    start                     what linear_scvi starts from: components of residuals, turned by varimax; not fitted
    nmf                       scikit-learn's NMF of log(1 + counts per 10,000)

All fits take 1,200 steps and all training cells. Rows are added to programmes.json as they come; an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

import pyrosc
from pyrosc import Cells, LinearDecoder, MixturePrior, NonNegativeLoadings, NormalLoadings
from pyrosc.loadings import principal_loadings

K = 15
ARMS = (
    "network", "point", "point, sure start", "normal", "horseshoe", "horseshoe, mixture", "non-negative", "start",
    "nmf",
)  # fmt: skip
SCORES = ("auprc", "auprc factor", "log p(x)", "loss", "used")


def precision(score: np.ndarray, truth: np.ndarray) -> float:
    """Average precision of the true genes in order of score."""
    hit = truth[np.argsort(-score, kind="stable")]
    return float((np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean())


def matched(loadings: np.ndarray, programmes: np.ndarray) -> np.ndarray:
    """(M,) average precision of programmes by the factors of the best assignment; without one, their share of genes."""
    truth = programmes != 0
    size = np.abs(loadings - np.median(loadings, 0))
    table = np.array(
        [[precision(size[:, k], truth[:, m]) for k in range(size.shape[1])] for m in range(truth.shape[1])]
    )
    found = truth.mean(0)
    rows, columns = linear_sum_assignment(-table)
    found[rows] = table[rows, columns]
    return found


def program(arm: str, cells: Cells) -> Any:
    if arm == "network":
        return pyrosc.scvi(cells, n_latent=K)
    if arm.startswith("point"):
        made = pyrosc.scvi(cells, n_latent=K, decoder=LinearDecoder())
        if "sure" in arm:
            torch.nn.init.constant_(made.parts["encoder"].log_variance.bias, 2 * math.log(0.14))  # type: ignore[union-attr, arg-type]
        return made
    parts: dict[str, Any] = {
        "normal": {"loadings": NormalLoadings(1.0)},
        "horseshoe": {},
        "horseshoe, mixture": {"prior": MixturePrior(20)},
        "non-negative": {"loadings": NonNegativeLoadings()},
    }[arm]
    return pyrosc.linear_scvi(cells, n_latent=K, **parts)


def run(arm: str, seed: int, n_cells: int) -> dict[str, Any]:
    adata = pyrosc.simulate.tissue(n_cells + 500, 1000, seed=seed)
    truth = adata.varm["programmes"].to_numpy()
    cells = Cells.from_anndata(adata, batch="batch")
    train, test = cells[np.arange(n_cells)], cells[np.arange(n_cells, n_cells + 500)]
    began, fit = time.perf_counter(), None
    if arm == "start":
        torch.manual_seed(seed)
        loadings = principal_loadings(train, K).numpy()
    elif arm == "nmf":
        from sklearn.decomposition import NMF

        x = train.x.numpy()  # type: ignore[union-attr]
        logs = np.log1p(1e4 * x / x.sum(1, keepdims=True))
        loadings = NMF(K, init="nndsvda", max_iter=400, random_state=seed).fit(logs).components_.T
    else:
        epochs = max(1, round(1200 / math.ceil(n_cells / 128)))
        fit = pyrosc.fit(program(arm, train), train, epochs=epochs, validation=None, seed=seed, progress=False)
        decoder: Any = fit.program.parts["decoder"]
        if arm == "network":
            loadings = np.zeros((1000, 0))
        elif arm.startswith("point"):
            loadings = decoder.loadings.detach().numpy()
        else:
            loadings = fit.draws("loadings", test[:2], 200).mean(0)
    row: dict[str, Any] = {"seconds": time.perf_counter() - began}
    if arm != "network":
        found = matched(loadings, truth)
        row |= {"auprc": float(found.mean()), "auprc factor": float(found[-1])}
        row |= {f"auprc {name}": float(value) for name, value in zip(adata.varm["programmes"].columns, found)}
    if fit is not None:
        row["log p(x)"] = float(fit.log_likelihood(test, 100).mean())
    if fit is not None and arm != "network":
        strength = np.sqrt(((loadings - np.median(loadings, 0)) ** 2).sum(0)) * fit.latent(train).std(0)
        row["used"] = int((strength > 0.2 * strength.max()).sum())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", type=int, default=4000)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "programmes.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    warnings.simplefilter("ignore", pyrosc.PyroscWarning)
    torch.set_num_threads(1)
    for seed in range(given.seeds):
        for arm in given.arms:
            key = f"{seed} {arm}"
            if rows.get(key, {}).get("cells") != given.cells:
                rows[key] = run(arm, seed, given.cells) | {"cells": given.cells}
                print(key, {k: v for k, v in rows[key].items() if k in SCORES}, flush=True)
                path.write_text(json.dumps(rows, indent=1))
    (given.out / "programmes.md").write_text(table(rows))


def table(rows: dict[str, Any]) -> str:
    lines = [
        "# Programmes by linear decoders",
        "",
        "Made by `benchmarks/programmes.py`, which says how to read it. Means over seeds and standard deviations.",
        f"Two CPU cores, one thread, Python {platform.python_version()}, torch {torch.__version__}, "
        f"pyrosc {pyrosc.__version__}.",
        "",
        "| arm | seeds | " + " | ".join(SCORES) + " | seconds |",
        "|---|---|" + "---|" * (len(SCORES) + 1),
    ]
    for key, row in rows.items():
        full = rows.get(f"{key.split(' ', 1)[0]} network", {}).get("log p(x)")
        if full is not None and "log p(x)" in row:
            row["loss"] = 100 * (full - row["log p(x)"]) / abs(full)
    for arm in ARMS:
        found = [row for key, row in rows.items() if key.split(" ", 1)[1] == arm]
        if found:
            told = [_told([row[name] for row in found if name in row], name) for name in SCORES]
            seconds = np.median([row["seconds"] for row in found])
            lines.append(f"| {arm} | {len(found)} | " + " | ".join(told) + f" | {seconds:.0f} |")
    gains = [
        rows[f"{s} {arm}"]["auprc"] - rows[f"{s} point"]["auprc"]
        for arm in ("horseshoe",)
        for s in range(100)
        if f"{s} {arm}" in rows and f"{s} point" in rows
    ]
    if gains:
        lines += ["", f"Horseshoe less point, AUPRC seed by seed: {', '.join(f'{g:+.3f}' for g in gains)}."]
    return "\n".join(lines) + "\n"


def _told(values: list[float], name: str) -> str:
    if not values:
        return ""
    digits = {"log p(x)": 1, "loss": 2, "used": 1}.get(name, 3)
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
