"""Fragments, their presence, or more scatter: Poisson, Bernoulli and NB beside scvi-tools' PoissonVI and TF-IDF + SVD.

    python benchmarks/atac.py ../shared/data/buenrostro_bm0828_atac.h5ad --out benchmarks/results
    python benchmarks/atac.py ... --peer other/bin/python     # Python with scvi-tools; without it that arm is left out
    python benchmarks/atac.py ... --tasks held-out --data sim --seeds 0 --arms Poisson

Data: "atac", 533 sorted progenitors of human blood x 35,983 regions (Buenrostro et al. 2018); "sim", SIM-D, 1,000
cells x 5,000 regions of `pyrosc.simulate.fragments`. All arms see the same cells, one thread each. pyrosc's arms are
`poissonvi` as it is, or with `NBLikelihood` and `GeneDispersion`, or on counts cut to 0 and 1 with
`BernoulliLikelihood`, fitted as `fit` does by itself ("lr 1e-3": at a tenth of its learning rate); scvi-tools' is
POISSONVI as it is (up to 500 epochs). Runs that are in the JSON already are not run again.

held-out   Each fragment is kept with probability 1/2; arms see the kept half (Bernoulli whether there are any). Average
           precision of P(x > 0) at the entries whose kept half is 0, for whether the other half is above 0: 19 million
           entries of "atac". "total x profile" is what needs no cells' states. On "sim" also, in the regions that
           differ by how many fragments: Spearman's correlation over cells between decoded and true shares, mean over
           regions, and the root mean square error of log2 shares. "Poisson on reads" is fitted to reads of the kept
           half.
labels     All counts; k-means (7 clusters, 10 seeds) on the latents, ARI and NMI with the sorted populations; share of
           cells whose 15 nearest others name their population by majority. "TF-IDF + SVD": 30 components, each row
           to unit length, the first left out (Cusanovich et al. 2015).

Set before any run, for means over seeds:

1. held-out, atac and sim: average precision of Poisson is at least Bernoulli's.
2. held-out, sim: Spearman of Poisson is above Bernoulli's, its error below, and its error below that on reads.
3. labels: ARI of Poisson is at least scvi-tools' less 0.02, in a fifth of its seconds.
4. labels: ARI of Poisson is at least that of TF-IDF + SVD less 0.02.
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
from scipy import sparse, stats

Result = dict[str, Any]
OURS = ("Poisson", "NB", "Bernoulli")
SLOW = "Poisson, lr 1e-3"
PEER, SVD, NONE, READS = "scvi-tools PoissonVI", "TF-IDF + SVD", "total x profile", "Poisson on reads"
N_DRAWS = 25


# ---- data -------------------------------------------------------------------------------------


def read(data: str, path: str | None, seed: int) -> anndata.AnnData:
    if data == "atac":
        adata = anndata.read_h5ad(path)
        adata.X = sparse.csr_matrix(adata.X)
        return adata
    import pyrosc

    return pyrosc.simulate.fragments(1000, seed=seed)


def halves(adata: anndata.AnnData, seed: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Fragments that are kept, and the others."""
    kept, rest = adata.X.copy(), adata.X.copy()
    kept.data = np.random.default_rng([seed, 1]).binomial(adata.X.data.astype(int), 0.5).astype(np.float32)
    rest.data = adata.X.data - kept.data
    for half in (kept, rest):
        half.eliminate_zeros()
    return kept, rest


def reads_of(x: sparse.csr_matrix, seed: int) -> sparse.csr_matrix:
    """Reads as `pyrosc.simulate.fragments` has them."""
    reads = x.copy()
    reads.data = 2 * x.data - (np.random.default_rng([seed, 2]).uniform(size=len(x.data)) < 0.15)
    return reads


# ---- arms -------------------------------------------------------------------------------------


def ours(arm: str, x: sparse.csr_matrix, like: anndata.AnnData, seed: int, want: str) -> tuple[Any, float]:
    """Latents, or (decoded shares, P(x > 0)); and seconds."""
    import torch

    import pyrosc

    torch.set_num_threads(1)
    x = sparse.csr_matrix((x > 0).astype(np.float32)) if arm == "Bernoulli" else x
    data = anndata.AnnData(X=x, obs=pd.DataFrame(index=like.obs_names), var=pd.DataFrame(index=like.var_names))
    parts: dict[str, Any] = {}
    if arm == "Bernoulli":
        parts = {"likelihood": pyrosc.BernoulliLikelihood()}
    if arm == "NB":
        parts = {"likelihood": pyrosc.NBLikelihood(), "dispersion": pyrosc.GeneDispersion()}
    began = time.perf_counter()
    cells = pyrosc.Cells.from_anndata(data)
    options = {"lr": 1e-3} if arm == SLOW else {}
    fit = pyrosc.fit(pyrosc.poissonvi(cells, seed=seed, **parts), cells, seed=seed, progress=False, **options)
    if want == "latents":
        return fit.latent(cells), time.perf_counter() - began
    share = fit.accessibility(cells, factors=True, n_draws=N_DRAWS, seed=seed).to_numpy()
    mean = share * cells.library.numpy() / (2 if arm == READS else 1)
    chance = -np.expm1(-mean)
    if arm == "NB":
        theta = fit.program.parts["dispersion"]().detach().numpy()
        chance = -np.expm1(-theta * np.log1p(mean / theta))
    return (share, chance), time.perf_counter() - began


def theirs(python: str, x: sparse.csr_matrix, seed: int, want: str) -> tuple[Any, float]:
    """The same of scvi-tools, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        sparse.save_npz(Path(folder) / "x.npz", x)
        command = [python, __file__, "--in-peer", folder, "--want", want, "--seeds", str(seed)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            sys.exit(f"scvi-tools failed:\n{done.stderr[-3000:]}")
        found = np.load(Path(folder) / "found.npy")
        seconds = json.loads((Path(folder) / "seconds.json").read_text())
    if want == "latents":
        return found, seconds
    return (found, -np.expm1(-found * np.asarray(x.sum(1)))), seconds


def in_peer(folder: Path, want: str, seed: int) -> None:
    """What runs in the Python that has scvi-tools."""
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.settings.seed = seed
    x = sparse.load_npz(folder / "x.npz")
    adata = anndata.AnnData(X=sparse.csr_matrix(x))
    began = time.perf_counter()
    scvi.external.POISSONVI.setup_anndata(adata)
    model = scvi.external.POISSONVI(adata)
    model.train(enable_progress_bar=False)
    if want == "latents":
        found = model.get_latent_representation()
    else:
        found = model.get_normalized_accessibility(normalize_regions=True, n_samples=N_DRAWS, return_numpy=True)
    (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - began))
    np.save(folder / "found.npy", np.asarray(found))


def svd(x: sparse.csr_matrix, seed: int) -> tuple[np.ndarray, float]:
    """Latent semantic indexing."""
    from sklearn.decomposition import TruncatedSVD

    began = time.perf_counter()
    share = sparse.diags(1 / np.asarray(x.sum(1)).ravel()) @ x
    rare = np.log1p(x.shape[0] / np.maximum(np.asarray((x > 0).sum(0)).ravel(), 1))
    weighed = (share @ sparse.diags(rare)).tocsr()
    weighed.data = np.log1p(1e4 * weighed.data)
    z = TruncatedSVD(31, random_state=seed).fit_transform(weighed)[:, 1:]
    return z / np.linalg.norm(z, axis=1, keepdims=True), time.perf_counter() - began


# ---- scores -----------------------------------------------------------------------------------


def held_out(chance: np.ndarray, kept: sparse.csr_matrix, rest: sparse.csr_matrix) -> float:
    """Average precision at the entries whose kept half is 0."""
    from sklearn.metrics import average_precision_score

    at = (kept.toarray() == 0).ravel()
    return float(average_precision_score((rest.toarray() > 0).ravel()[at], chance.ravel()[at]))


def of_rates(share: np.ndarray, adata: anndata.AnnData) -> Result:
    """How decoded shares go with the true ones, in regions where types differ by how many fragments."""
    regions = np.flatnonzero(adata.var["kind"] == "quantitative")
    truth = adata.varm["rho"].to_numpy().T[adata.obs["cell_type"].cat.codes.to_numpy()][:, regions]
    share = share[:, regions]
    rank = [stats.spearmanr(a, b)[0] if np.ptp(a) > 0 else 0.0 for a, b in zip(share.T, truth.T)]
    return {"spearman": float(np.mean(rank)), "rmse": float(np.sqrt(np.mean(np.log2(share / truth) ** 2)))}


def of_labels(z: np.ndarray, kind: np.ndarray) -> Result:
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.neighbors import NearestNeighbors

    n = len(np.unique(kind))
    groups = [KMeans(n, n_init=10, random_state=s).fit_predict(z) for s in range(10)]
    near = NearestNeighbors(n_neighbors=16).fit(z).kneighbors(z, return_distance=False)[:, 1:]
    codes = np.unique(kind, return_inverse=True)[1]
    votes = np.stack([(codes[near] == c).sum(1) for c in range(n)], 1).argmax(1)
    return {
        "ari": float(np.mean([adjusted_rand_score(kind, g) for g in groups])),
        "nmi": float(np.mean([normalized_mutual_info_score(kind, g) for g in groups])),
        "knn": float((votes == codes).mean()),
    }


def run(task: str, data: str, arm: str, seed: int, path: str | None, peer: str | None) -> Result:
    adata = read(data, path, seed)
    if task == "labels":
        kind = adata.obs["cell_type"].astype(str).to_numpy()
        if arm == SVD:
            z, seconds = svd(adata.X, seed)
        elif arm == PEER:
            z, seconds = theirs(str(peer), adata.X, seed, "latents")
        else:
            z, seconds = ours(arm, adata.X, adata, seed, "latents")
        return of_labels(z, kind) | {"seconds": seconds}
    kept, rest = halves(adata, seed)
    if arm == NONE:
        profile = np.asarray(kept.sum(0)).ravel() + 0.1
        share = np.tile(profile / profile.sum(), (kept.shape[0], 1))
        chance, seconds = -np.expm1(-share * np.asarray(kept.sum(1))), 0.0
    elif arm == PEER:
        (share, chance), seconds = theirs(str(peer), kept, seed, "shares")
    else:
        (share, chance), seconds = ours(arm, reads_of(kept, seed) if arm == READS else kept, adata, seed, "shares")
    found = {"ap": held_out(chance, kept, rest), "seconds": seconds}
    return found | (of_rates(share, adata) if data == "sim" else {})


# ---- report -----------------------------------------------------------------------------------


def markdown(frame: pd.DataFrame) -> list[str]:
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|---" * len(frame.columns) + "|"]
    return lines + [
        "| " + " | ".join("" if v != v else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row) + " |"
        for row in frame.itertuples(index=False)
    ]


def paired(frame: pd.DataFrame, task: str, data: str, one: str, other: str, what: str) -> tuple[float, float, int]:
    """Means of two arms over the seeds that both have."""
    some = frame[(frame["task"] == task) & (frame["data"] == data)].set_index(["arm", "seed"])
    if not len(some) or what not in some:
        return np.nan, np.nan, 0
    table = some[what].unstack("arm")
    if one not in table or other not in table:
        return np.nan, np.nan, 0
    both = table[[one, other]].dropna()
    return both[one].mean(), both[other].mean(), len(both)


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    asked = [
        (
            "1. average precision, atac: Poisson >= Bernoulli",
            "held-out",
            "atac",
            "Bernoulli",
            "ap",
            lambda a, b: a >= b,
        ),
        ("1. precision, sim: Poisson >= Bernoulli", "held-out", "sim", "Bernoulli", "ap", lambda a, b: a >= b),
        ("2. Spearman: Poisson > Bernoulli", "held-out", "sim", "Bernoulli", "spearman", lambda a, b: a > b),
        ("2. error: Poisson < Bernoulli", "held-out", "sim", "Bernoulli", "rmse", lambda a, b: a < b),
        ("2. error: Poisson < Poisson on reads", "held-out", "sim", READS, "rmse", lambda a, b: a < b),
        ("3. ARI: Poisson >= scvi-tools - 0.02", "labels", "atac", PEER, "ari", lambda a, b: a >= b - 0.02),
        ("3. seconds: Poisson <= scvi-tools / 5", "labels", "atac", PEER, "seconds", lambda a, b: a <= b / 5),
        ("4. ARI: Poisson >= TF-IDF + SVD - 0.02", "labels", "atac", SVD, "ari", lambda a, b: a >= b - 0.02),
    ]
    found = []
    for line, task, data, other, what, holds in asked:
        a, b, n = paired(frame, task, data, "Poisson", other, what)
        if n:
            found.append((line, n, f"{a:.3f} against {b:.3f}", "holds" if holds(a, b) else "fails"))
    return pd.DataFrame(found, columns=["line", "seeds", "found", ""])


def report(rows: list[Result], note: str) -> str:
    frame = pd.DataFrame(rows)
    text = ["# Fragments", "", "Made by `benchmarks/atac.py`, which says how to read it.", "", note, "", "## Lines", ""]
    text += [*markdown(verdicts(frame)), ""]
    for task, data, columns in (
        ("held-out", "atac", ["ap", "seconds"]),
        ("held-out", "sim", ["ap", "spearman", "rmse", "seconds"]),
        ("labels", "atac", ["ari", "nmi", "knn", "seconds"]),
    ):
        some = frame[(frame["task"] == task) & (frame["data"] == data)]
        if not len(some):
            continue
        by = some.groupby("arm", sort=False)
        table = pd.DataFrame({"seeds": by.size()} | {c: by[c].mean() for c in columns if c in some})
        spread = {f"{c}, sd": by[c].std() for c in columns[:-1] if c in some}
        text += [f"## {task}, {data}, mean over seeds", "", *markdown(table.assign(**spread).reset_index()), ""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", help="Python with scvi-tools; none leaves it out")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=["held-out", "labels"], choices=["held-out", "labels"])
    parser.add_argument("--data", nargs="+", default=["atac", "sim"], choices=["atac", "sim"])
    parser.add_argument("--arms", nargs="+", default=[*OURS, SLOW, READS, NONE, SVD, PEER])
    parser.add_argument("--in-peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--want", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_peer:
        in_peer(given.in_peer, given.want, given.seeds[0])
        return
    warnings.simplefilter("ignore")
    import torch

    import pyrosc

    store = None if given.out is None else given.out / "atac.json"
    rows: list[Result] = json.loads(store.read_text())["rows"] if store is not None and store.exists() else []
    note = (
        f"Two CPU cores, one thread a process, other work beside; Python {sys.version.split()[0]}, pyrosc "
        f"{pyrosc.__version__}, torch {torch.__version__}; beside: scvi-tools 1.4.2."
    )
    for seed in given.seeds:
        for task in given.tasks:
            for data in given.data:
                for arm in given.arms:
                    key = {"task": task, "data": data, "arm": arm, "seed": seed}
                    if (
                        (task == "labels" and (data == "sim" or arm in (READS, NONE)))
                        or (task == "held-out" and (arm in (SVD, SLOW) or (arm == READS and data == "atac")))
                        or (arm == PEER and given.peer is None)
                        or any(all(r[k] == v for k, v in key.items()) for r in rows)
                    ):
                        continue
                    rows.append(key | run(task, data, arm, seed, given.path, given.peer))
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
                    if store is not None:
                        store.parent.mkdir(parents=True, exist_ok=True)
                        store.write_text(json.dumps({"note": note, "rows": rows}, indent=1))
                        store.with_suffix(".md").write_text(report(rows, note))
    if store is not None and rows:  # rows of other runs may have been put there by hand
        store.with_suffix(".md").write_text(report(rows, note))
    print(report(rows, note))


if __name__ == "__main__":
    main()
