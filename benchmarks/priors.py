"""Every prior x likelihood x library: which predicts counts it has not seen, and what it does to the latent space.

    python benchmarks/priors.py ../shared/data/kang_pbmc_ifnb.h5ad --out benchmarks/results

Kang PBMC (2,792 cells of known donor x 2,000 variable genes, batch = donor) and SIM-A (`pyrosc.simulate.tissue()`,
4,000 x 1,000, three batches). For each of five seeds, cells are split 80/20, and both sides thinned by one half; a
story is fitted to the kept counts of the training cells (a tenth of them held out for the choice of the epoch), reads
the kept counts of the test cells, and is scored on their dropped ones: `pyrosc.check.thinned_log_likelihood`, nats a
cell, 50 draws. Active units: latents whose posterior mean varies over test cells by more than 0.01. Mixing: entropy of
batches among the 30 nearest test cells in latent space, over that of the batches at hand (1 is perfect).

Differences between likelihoods, libraries and priors are paired over cells and seeds; on Kang clustered by donor
(a donor's cells of all seeds are one unit), on SIM-A by seed. SIM-A is one simulated data set: its intervals are about
splits and starting weights. ``--epochs`` fits longer than the default, into a table of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from kang import prepare
from sklearn.neighbors import NearestNeighbors

import pyrosc
from pyrosc.check import paired, thinned_log_likelihood

SEEDS = (0, 1, 2, 3, 4)
PRIORS: dict[str, Any] = {
    "N(0, I)": lambda: None,
    "mixture 20": lambda: pyrosc.MixturePrior(20),
    "Vamp 50": lambda: pyrosc.VampPrior(50),
    "flow": lambda: pyrosc.FlowPrior(),
}
LIKELIHOODS: dict[str, Any] = {
    "NB": pyrosc.NBLikelihood,
    "ZINB": pyrosc.ZINBLikelihood,
    "Poisson": pyrosc.PoissonLikelihood,
}
LIBRARIES: dict[str, Any] = {"observed": pyrosc.ObservedLibrary, "latent": pyrosc.LatentLibrary}


def mixing(z: np.ndarray, batch: np.ndarray, n_neighbors: int = 30) -> float:
    near = NearestNeighbors(n_neighbors=n_neighbors + 1).fit(z).kneighbors(z, return_distance=False)[:, 1:]
    codes = np.unique(batch, return_inverse=True)[1]

    def entropy(counts: np.ndarray) -> np.ndarray:
        share = counts / counts.sum(-1, keepdims=True)
        return -(share * np.log(np.maximum(share, 1e-12))).sum(-1)

    counts = np.stack([(codes[near] == b).sum(1) for b in range(codes.max() + 1)], -1)
    return float(entropy(counts).mean() / entropy(np.bincount(codes)))


def run(
    cells: pyrosc.Cells,
    batch: str,
    unit: str | None,
    seed: int,
    prior: str,
    likelihood: str,
    library: str,
    epochs: int | None,
) -> dict[str, Any]:
    train, test = cells.split(0.8, 0.2, seed=seed)
    kept, _ = train.thin(0.5, seed=seed)
    parts = {"likelihood": LIKELIHOODS[likelihood](), "library": LIBRARIES[library]()}
    if PRIORS[prior]() is not None:
        parts["prior"] = PRIORS[prior]()
    if likelihood == "Poisson":
        parts["dispersion"] = None
    began = time.perf_counter()
    fit = pyrosc.fit(pyrosc.scvi(kept, seed=seed, **parts), kept, seed=seed, epochs=epochs, progress=False)
    seconds = time.perf_counter() - began
    score = thinned_log_likelihood(fit, test, 50, seed=seed)
    z = fit.latent(test.thin(0.5, seed=seed)[0])
    return {
        "seed": seed, "prior": prior, "likelihood": likelihood, "library": library,
        "score": score.tolist(), "units": [str(v) for v in test.obs[unit]] if unit else [str(seed)] * len(test),
        "epochs": len(fit.history), "active": int((z.var(0) > 0.01).sum()),
        "mixing": mixing(z, test.obs[batch].to_numpy()), "seconds": seconds,
    }  # fmt: skip


def difference(rows: list[dict[str, Any]], one: dict[str, str], other: dict[str, str]) -> tuple[float, ...]:
    """Mean of one - other over everything else, paired; (mean, se, lower, upper)."""
    keys = [k for k in ("seed", "prior", "likelihood", "library") if k not in one]
    of = [
        {tuple(r[k] for k in keys): r for r in rows if all(r[k] == v for k, v in side.items())} for side in (one, other)
    ]
    common = sorted(of[0].keys() & of[1].keys())
    apart = np.concatenate([np.subtract(of[0][k]["score"], of[1][k]["score"]) for k in common])
    units = np.concatenate([of[0][k]["units"] for k in common])
    return paired(apart, units)


def table(rows: list[dict[str, Any]], title: str) -> str:
    lines = [f"## {title}", "", "| library | likelihood | prior | score | active units | mixing | seconds | seeds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    frame = pd.DataFrame(rows)
    frame["mean"] = [float(np.mean(s)) for s in frame["score"]]
    for library in LIBRARIES:
        for likelihood in LIKELIHOODS:
            for prior in PRIORS:
                of = frame[(frame.library == library) & (frame.likelihood == likelihood) & (frame.prior == prior)]
                if not len(of):
                    continue
                sd = of["mean"].std() if len(of) > 1 else float("nan")
                lines.append(
                    f"| {library} | {likelihood} | {prior} | {of['mean'].mean():.2f} (sd {sd:.2f}) | "
                    f"{of['active'].mean():.1f} | {of['mixing'].mean():.3f} | {of['seconds'].median():.1f} | "
                    f"{len(of)} |"
                )
    lines += ["", "| difference, nats a cell | mean | se | 95 % interval |", "|---|---|---|---|"]

    def line(name: str, one: dict[str, str], other: dict[str, str]) -> None:
        if not all(any(all(r[k] == v for k, v in side.items()) for r in rows) for side in (one, other)):
            return
        mean, se, lower, upper = difference(rows, one, other)
        lines.append(f"| {name} | {mean:+.2f} | {se:.2f} | {lower:+.2f} to {upper:+.2f} |")

    for library in LIBRARIES:
        at = {"library": library}
        line(f"NB - Poisson, {library}", at | {"likelihood": "NB"}, at | {"likelihood": "Poisson"})
        line(f"ZINB - NB, {library}", at | {"likelihood": "ZINB"}, at | {"likelihood": "NB"})
    line("latent - observed library, NB", {"library": "latent", "likelihood": "NB"},
         {"library": "observed", "likelihood": "NB"})  # fmt: skip
    for library in LIBRARIES:
        for likelihood in LIKELIHOODS:
            at = {"library": library, "likelihood": likelihood}
            for prior in list(PRIORS)[1:]:
                line(f"{prior} - N(0, I), {likelihood}, {library}", at | {"prior": prior}, at | {"prior": "N(0, I)"})
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="kang_pbmc_ifnb.h5ad")
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--sets", nargs="+", default=["kang", "sim"], choices=["kang", "sim"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--epochs", type=int, default=None, help="at most so many, instead of fit's default")
    parser.add_argument("--priors", nargs="+", default=list(PRIORS), choices=list(PRIORS))
    parser.add_argument("--likelihoods", nargs="+", default=list(LIKELIHOODS), choices=list(LIKELIHOODS))
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--table", action="store_true", help="only write the table of the runs that are there")
    options = parser.parse_args()
    warnings.simplefilter("ignore", pyrosc.PyroscWarning)
    torch.set_num_threads(1)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    texts = []
    for name in options.sets:
        suffix = "" if options.epochs is None else f"_{options.epochs}"
        file = out / f"priors_{name}{suffix}.json"
        rows = json.loads(file.read_text())["runs"] if file.exists() else []
        done = {(r["seed"], r["prior"], r["likelihood"], r["library"]) for r in rows}
        if not options.table:
            if name == "kang":
                cells, batch, unit = pyrosc.Cells.from_anndata(prepare(options.data), batch="donor"), "donor", "donor"
            else:
                cells, batch, unit = pyrosc.Cells.from_anndata(pyrosc.simulate.tissue(), batch="batch"), "batch", None
            for seed in options.seeds:
                for library in options.libraries:
                    for likelihood in options.likelihoods:
                        for prior in options.priors:
                            if (seed, prior, likelihood, library) in done:
                                continue
                            rows.append(run(cells, batch, unit, seed, prior, likelihood, library, options.epochs))
                            rows[-1]["score"] = [round(v, 2) for v in rows[-1]["score"]]
                            last = {k: v for k, v in rows[-1].items() if k not in ("score", "units")}
                            print(last | {"score": float(np.mean(rows[-1]["score"]))}, flush=True)
                            machine = f"{platform.processor() or platform.machine()}, one thread"
                            made = {"machine": machine, "pyrosc": pyrosc.__version__, "runs": rows}
                            file.write_text(json.dumps(made))
        texts.append(table(rows, {"kang": "Kang PBMC", "sim": "SIM-A"}[name]))
    if options.table:
        text = "# Priors, likelihoods and libraries\n\nMade by `benchmarks/priors.py`, which says how to read it.\n\n"
        (out / f"priors{suffix}.md").write_text(text + "\n\n".join(texts) + "\n")
    print("\n\n".join(texts))


if __name__ == "__main__":
    main()
