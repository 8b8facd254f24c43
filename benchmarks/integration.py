"""Batches put together: ours beside PCA, ComBat, Harmony, Seurat and scvi-tools, by the scores of scIB.

    python benchmarks/integration.py --kang kang2000.h5ad --mixology cellline_mixology_5batch.h5ad \\
        --peer PYTHON --metrics PYTHON --out benchmarks/results

``--metrics`` names a Python with scib-metrics, scanpy, scikit-misc, harmonypy and umap-learn, ``--peer`` one with
scvi-tools; ``--rscript`` an Rscript with Seurat. Arms that lack theirs are left out. Runs that are in the file are not
repeated; embeddings are kept in OUT/integration_kept. ``--table`` only writes table and pictures of what is there.

Data, one of each; a seed is of the fits alone:

    SIM-A nested  `pyrosc.simulate.tissue(seed=0)`, 4,000 cells x 1,000 genes, 8 types; its three batches are sites, and
                  each site has two runs, drawn here: Normal(0, 0.15) on log rates of all genes, half of what sites
                  differ by. The batch that methods see is the run (6). A type is missing from both runs of one site
    Kang          PBMC, batch = donor (8; cells of none left out), 2,000 genes of the file given
    mixology      five cell lines in five batches of two techniques, 2,000 genes highly variable within batches
                  (scanpy's seurat_v3 with batch_key)

Every method is given the counts of the same genes. "PCA" is log(1 + count per 10,000 of these genes) and 30 components,
"scaled" with each gene brought to unit variance (at most 10 sd); ComBat is scanpy's, on the logs, then 30 components;
Harmony is harmonypy's, on the components of either PCA; Seurat is its CCA anchors with the genes given, IntegrateData,
ScaleData and 30 components, all else as it comes. scvi-tools: SCVI(), then SCANVI.from_scvi_model, `train()` with
nothing said (ZINB, K = 10). pyrosc: `scvi` and `scanvi` with their defaults (NB, K = 10), and with K = 30.

Two tables of each data set:

    all cells   scANVI is given the labels of all cells, as in scIB: it is then told what the bio scores ask
    half        scANVI is given the labels of half the cells, and *every* method is scored on the other half alone. This
                is the comparison to read. The other methods still see no label at all

Scores are scib-metrics' own functions with its Benchmarker's choices, but for neighbours, which are exact and so need
no seed. Bio: silhouette of isolated labels (those in the fewest batches), NMI and ARI of k-means (one start, its seed),
silhouette of labels, cLISI. Batch: BRAS, iLISI, kBET per label, graph connectivity, PCR comparison (against "PCA").
Total = 0.4 mean of batch + 0.6 mean of bio, unscaled. "scaled" is the same after each score was brought to 0 to 1 over
the methods of its table (scores that are equal for all are left out). One start of k-means may end in a bad optimum
and cost a method 0.05 of its total, so "total, ten starts" takes the best of ten (scikit-learn's) in its place, for all
methods; Leiden NMI, best of ten resolutions, stands beside and counts in no total.

Seconds are of training alone (models) or of all from the logs on, in this session with one thread; SCANVI's include
those of the SCVI that it starts from. Median over seeds, lowest and highest beside.

Line, fixed before the first run (protocol 14.16): scANVI >= scVI > PCA, by unscaled total.
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

import numpy as np

SETS = ("SIM-A nested", "Kang", "mixology")
BATCH = {"SIM-A nested": "batch", "Kang": "donor", "mixology": "batch"}
COMPONENTS = 30
NONE = "none"  # of cells without a label
PCA, PCA_SCALED, COMBAT, HARMONY, HARMONY_SCALED, SEURAT = (
    "PCA", "PCA, scaled", "ComBat", "Harmony", "Harmony, scaled", "Seurat",
)  # fmt: skip
SCVI, SCANVI, SCANVI_HALF = "scvi-tools SCVI", "scvi-tools SCANVI", "scvi-tools SCANVI (half)"
OURS, OURS_SCANVI, OURS_HALF = "pyrosc scVI", "pyrosc scANVI", "pyrosc scANVI (half)"
WIDE = tuple(f"{arm}, K = 30" for arm in (OURS, OURS_SCANVI, OURS_HALF))
CLASSICAL, PEER = (PCA, PCA_SCALED, COMBAT, HARMONY, HARMONY_SCALED), (SCVI, SCANVI, SCANVI_HALF)
PYROSC = (OURS, OURS_SCANVI, OURS_HALF, *WIDE)
ARMS = (*CLASSICAL, SEURAT, *PEER, *PYROSC)
ONCE = (PCA, PCA_SCALED, COMBAT, SEURAT)  # nothing in them is drawn
ALL, HALF = "all cells", "half"
SHOWN = (PCA, COMBAT, HARMONY, SEURAT, SCVI, SCANVI_HALF, OURS, OURS_HALF)  # in pictures
BIO = ("isolated labels", "NMI", "ARI", "silhouette label", "cLISI")
MIXED = ("BRAS", "iLISI", "kBET", "graph connectivity", "PCR comparison")
STARTS = ("NMI, ten starts", "ARI, ten starts")
BESIDE = (*STARTS, "Leiden NMI")

Rows = list[dict[str, Any]]

SEURAT_CODE = """
suppressMessages(library(Seurat))
folder <- commandArgs(TRUE)[1]
counts <- as(Matrix::readMM(file.path(folder, "counts.mtx")), "CsparseMatrix")
obs <- read.csv(file.path(folder, "obs.csv"), row.names = 1)
dimnames(counts) <- list(paste0("g", seq_len(nrow(counts))), rownames(obs))
cells <- CreateSeuratObject(counts, meta.data = obs)
parts <- lapply(SplitObject(cells, split.by = "batch"), NormalizeData, verbose = FALSE)
began <- proc.time()[["elapsed"]]
anchors <- FindIntegrationAnchors(parts, anchor.features = rownames(counts), dims = 1:30, verbose = FALSE)
joined <- IntegrateData(anchors, dims = 1:30, verbose = FALSE)
joined <- RunPCA(ScaleData(joined, verbose = FALSE), npcs = 30, verbose = FALSE)
seconds <- proc.time()[["elapsed"]] - began
z <- Embeddings(joined, "pca")[rownames(obs), ]
write.table(z, file.path(folder, "z.txt"), row.names = FALSE, col.names = FALSE)
writeLines(c(as.character(seconds), as.character(packageVersion("Seurat"))), file.path(folder, "about.txt"))
"""


def slug(arm: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in arm)


def views(arm: str) -> list[str]:
    """The tables that an arm is in."""
    if arm in (SCANVI, OURS_SCANVI, WIDE[1]):
        return [ALL]
    return [HALF] if arm in (SCANVI_HALF, OURS_HALF, WIDE[2]) else [ALL, HALF]


# ---- data ------------------------------------------------------------------------------------------------------------


def nested(seed: int = 0) -> Any:
    """A simulated tissue whose batches are two runs of each of three sites."""
    import pandas as pd
    from scipy import sparse

    import pyrosc

    data = pyrosc.simulate.tissue(seed=seed)
    draw = np.random.default_rng([seed, 1])
    site = data.obs["batch"].cat.codes.to_numpy()
    run = 2 * site + draw.integers(2, size=data.n_obs)
    rho = data.layers["rho"] * np.exp(draw.normal(0, 0.15, (run.max() + 1, data.n_vars)))[run]
    rho /= rho.sum(1, keepdims=True)
    theta = data.var["dispersion"].to_numpy()
    data.X = sparse.csr_matrix(
        draw.poisson(draw.gamma(theta, data.obs["library"].to_numpy()[:, None] * rho / theta)).astype(np.float32)
    )
    data.obs["batch"] = pd.Categorical([f"site{r // 2}.run{r % 2}" for r in run])
    return data


def prepare(name: str, given: argparse.Namespace, file: Path) -> None:
    """Write counts of the genes that all methods see, with obs "batch", "cell_type" and "label" (half of them)."""
    import anndata

    if name == "SIM-A nested":
        data, genes = nested(), "all 1,000"
    elif name == "Kang":
        data = anndata.read_h5ad(given.kang)
        data = data[data.obs["donor"].astype(str) != "none"].copy()
        genes = "seurat_v3 over all cells together (kang.py), not by donor"
        if data.n_vars > 2000:
            data, genes = data[:, variable(data, BATCH[name], given.metrics)].copy(), "seurat_v3, batch_key donor"
    else:
        data = anndata.read_h5ad(given.mixology)
        data, genes = data[:, variable(data, "batch", given.metrics)].copy(), "seurat_v3, batch_key batch"
    obs = data.obs[[BATCH[name], "cell_type"]].astype(str).set_axis(["batch", "cell_type"], axis=1)
    draw = np.random.default_rng(0)
    kind = obs["cell_type"].to_numpy()
    label = kind.astype(object)
    for group in np.unique(kind):  # half of each type
        rows = draw.permutation(np.flatnonzero(kind == group))
        label[rows[: (len(rows) + 1) // 2]] = NONE
    obs["label"] = label
    made = anndata.AnnData(data.X.tocsr().astype(np.float32), obs=obs, var=data.var[[]], uns={"genes": genes})
    if given.cells:
        made = made[np.sort(draw.permutation(made.n_obs)[: given.cells])].copy()
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.parent.parent / ".gitignore").write_text("*\n")
    made.write_h5ad(file)


def variable(data: Any, batch: str, python: str) -> np.ndarray:
    """(2000,) positions of genes that vary within batches, as scanpy's seurat_v3 chooses them."""
    with tempfile.TemporaryDirectory() as folder:
        data.write_h5ad(Path(folder) / "data.h5ad")
        told(python, Path(folder), {"genes by": batch})
        return np.load(Path(folder) / "genes.npy")


# ---- processes -------------------------------------------------------------------------------------------------------


def told(python: str, folder: Path, asked: dict[str, Any]) -> None:
    """Run `child` in a process of that Python, with one thread.

    Raises
    ------
    RuntimeError
        If it failed, with the end of what it wrote.
    """
    (folder / "asked.json").write_text(json.dumps(asked))
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    one["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    # Every number of cells is compiled anew, which takes longer than the scores do: what was compiled is kept.
    one |= {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [python, __file__, "--child", str(folder)], capture_output=True, text=True, check=False, env=os.environ | one
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def child(folder: Path) -> None:
    warnings.simplefilter("ignore")
    asked = json.loads((folder / "asked.json").read_text())
    if "genes by" in asked:
        import anndata
        import scanpy

        data = anndata.read_h5ad(folder / "data.h5ad")
        scanpy.pp.highly_variable_genes(data, n_top_genes=2000, flavor="seurat_v3", batch_key=asked["genes by"])
        np.save(folder / "genes.npy", np.flatnonzero(data.var["highly_variable"]))
    elif "score" in asked:
        score(folder, asked)
    elif "map" in asked:
        for arm in asked["map"]:
            plane(folder, arm, asked["seed"])
    elif set(asked["arms"]) <= set(CLASSICAL):
        by_components(folder, asked)
    else:
        (by_peer if set(asked["arms"]) <= set(PEER) else by_pyrosc)(folder, asked)


def keep(folder: Path, arm: str, seed: int, z: Any, seconds: float, version: str) -> None:
    part = folder / "part.npz"
    np.savez(part, z=np.asarray(z, dtype=np.float32), seconds=seconds, version=version)
    part.replace(folder / f"{slug(arm)}-{seed}.npz")


def kept(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    with np.load(folder / f"{slug(arm)}-{seed}.npz") as found:
        return dict(found)


# ---- methods ---------------------------------------------------------------------------------------------------------


def by_components(folder: Path, asked: dict[str, Any]) -> None:
    import anndata
    import harmonypy
    import scanpy

    plain = anndata.read_h5ad(folder / "data.h5ad")
    scanpy.pp.normalize_total(plain, target_sum=1e4)
    scanpy.pp.log1p(plain)
    plain.X = plain.X.toarray()
    for arm in asked["arms"]:
        began, data, version = time.perf_counter(), plain.copy(), f"scanpy {scanpy.__version__}"
        if arm == COMBAT:
            scanpy.pp.combat(data, key="batch")
        if arm in (PCA_SCALED, HARMONY_SCALED):
            scanpy.pp.scale(data, max_value=10)
        scanpy.pp.pca(data, n_comps=COMPONENTS, random_state=0)
        z = data.obsm["X_pca"]
        if arm in (HARMONY, HARMONY_SCALED):
            found = harmonypy.run_harmony(z, data.obs, "batch", random_state=asked["seed"], verbose=False, ncores=1)
            z = np.asarray(found.Z_corr)
            z = z if len(z) == data.n_obs else z.T
            version = f"harmonypy {harmonypy.__version__}"
        keep(folder, arm, asked["seed"], z, time.perf_counter() - began, version)


def by_seurat(folder: Path, rscript: str, seed: int) -> None:
    import anndata
    from scipy.io import mmwrite

    data = anndata.read_h5ad(folder / "data.h5ad")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        mmwrite(work / "counts.mtx", data.X.T.tocoo())
        data.obs.reset_index(drop=True).rename(lambda i: f"c{i}").to_csv(work / "obs.csv")
        (work / "code.R").write_text(SEURAT_CODE)
        done = subprocess.run(
            [rscript, str(work / "code.R"), name], capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        seconds, version = (work / "about.txt").read_text().split()
        keep(folder, SEURAT, seed, np.loadtxt(work / "z.txt"), float(seconds), f"Seurat {version}")


def by_peer(folder: Path, asked: dict[str, Any]) -> None:
    import anndata
    import scvi
    import torch

    torch.set_num_threads(1)
    seed, version = asked["seed"], f"scvi-tools {scvi.__version__}"
    options = {"max_epochs": asked["epochs"], "enable_progress_bar": False, "accelerator": "cpu"}
    data = anndata.read_h5ad(folder / "data.h5ad")
    scvi.settings.verbosity = 40
    model_at = folder / f"scvi-tools-{seed}"
    if not (folder / f"{slug(SCVI)}-{seed}.npz").exists():
        scvi.settings.seed = seed
        scvi.model.SCVI.setup_anndata(data, batch_key="batch")
        model = scvi.model.SCVI(data)
        began = time.perf_counter()
        model.train(**options)
        seconds = time.perf_counter() - began
        model.save(str(model_at), overwrite=True)
        keep(folder, SCVI, seed, model.get_latent_representation(), seconds, version)
    before = float(kept(folder, SCVI, seed)["seconds"])
    for arm, column in ((SCANVI, "cell_type"), (SCANVI_HALF, "label")):
        if arm not in asked["arms"]:
            continue
        scvi.settings.seed = seed
        model = scvi.model.SCVI.load(str(model_at), adata=data.copy(), accelerator="cpu")
        model = scvi.model.SCANVI.from_scvi_model(model, unlabeled_category=NONE, labels_key=column)
        began = time.perf_counter()
        model.train(**options)
        seconds = before + time.perf_counter() - began
        keep(folder, arm, seed, model.get_latent_representation(), seconds, version)


def by_pyrosc(folder: Path, asked: dict[str, Any]) -> None:
    import anndata
    import torch

    import pyrosc

    torch.set_num_threads(1)
    data, seed = anndata.read_h5ad(folder / "data.h5ad"), asked["seed"]
    for arm in asked["arms"]:
        size = {"n_latent": 30} if arm in WIDE else {}
        if arm in (OURS, WIDE[0]):
            cells = pyrosc.Cells.from_anndata(data, batch="batch")
            program = pyrosc.scvi(cells, seed=seed, **size)
        else:
            column = "label" if arm in (OURS_HALF, WIDE[2]) else "cell_type"
            cells = pyrosc.Cells.from_anndata(data, batch="batch", label=column, unlabeled=NONE)
            program = pyrosc.scanvi(cells, seed=seed, **size)
        began = time.perf_counter()
        fit = pyrosc.fit(program, cells, epochs=asked["epochs"], seed=seed, progress=False)
        seconds = time.perf_counter() - began
        keep(folder, arm, seed, fit.latent(cells), seconds, f"pyrosc {pyrosc.__version__}")


# ---- scores and pictures ---------------------------------------------------------------------------------------------


def score(folder: Path, asked: dict[str, Any]) -> None:
    """In a Python with scib-metrics: one file of scores an embedding and table."""
    import anndata
    import scib_metrics as scib
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.neighbors import NearestNeighbors

    obs = anndata.read_h5ad(folder / "data.h5ad", backed="r").obs
    for arm, seed, view in asked["score"]:
        rows = np.flatnonzero(obs["label"] == NONE) if view == HALF else np.arange(len(obs))
        batch, kind = (obs[c].astype(str).to_numpy()[rows] for c in ("batch", "cell_type"))
        z, before = kept(folder, arm, seed)["z"][rows], kept(folder, PCA, asked["first"])["z"][rows]
        # A cell is the first of its own neighbours, as scib-metrics' own functions leave it.
        distances, indices = NearestNeighbors(n_neighbors=min(90, len(z)), algorithm="brute").fit(z).kneighbors(z)
        near = NeighborsResults(indices=indices, distances=distances)
        clusters = scib.nmi_ari_cluster_labels_kmeans(z, kind)
        few, some, many = (near.subset_neighbors(n=n) for n in (15, 50, min(90, len(z))))
        found = {
            "isolated labels": scib.isolated_labels(z, kind, batch), "NMI": clusters["nmi"], "ARI": clusters["ari"],
            "silhouette label": scib.silhouette_label(z, kind), "cLISI": scib.clisi_knn(many, kind),
            "BRAS": scib.bras(z, kind, batch), "iLISI": scib.ilisi_knn(many, batch),
            "kBET": scib.kbet_per_label(some, batch, kind), "graph connectivity": scib.graph_connectivity(few, kind),
            "PCR comparison": scib.pcr_comparison(before, z, batch, categorical=True),
            "Leiden NMI": scib.nmi_ari_cluster_labels_leiden(few, kind)["nmi"],
        }  # fmt: skip
        best = KMeans(len(np.unique(kind)), n_init=10, random_state=0).fit_predict(z)
        found["NMI, ten starts"] = normalized_mutual_info_score(kind, best)
        found["ARI, ten starts"] = adjusted_rand_score(kind, best)
        found = {name: float(value) for name, value in found.items()}
        found["scib-metrics"] = scib.__version__
        (folder / f"{slug(arm)}-{seed}-{slug(view)}.json").write_text(json.dumps(found))


def plane(folder: Path, arm: str, seed: int) -> None:
    import umap

    z = kept(folder, arm, seed)["z"]
    xy = umap.UMAP(n_neighbors=15, min_dist=0.3, random_state=0).fit_transform(z)
    np.save(folder / f"{slug(arm)}-umap.npy", xy.astype(np.float32))


def picture(name: str, folder: Path, file: Path) -> None:
    """Panels coloured by batch above, by type below; a palette keeps the file small."""
    import io

    import anndata
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image

    arms = [arm for arm in SHOWN if (folder / f"{slug(arm)}-umap.npy").exists()]
    if not arms:
        return
    obs = anndata.read_h5ad(folder / "data.h5ad", backed="r").obs
    order = np.random.default_rng(0).permutation(len(obs))
    figure = Figure(figsize=(1.75 * len(arms) + 1.6, 3.9), layout="constrained")
    axes = figure.subplots(2, len(arms), squeeze=False)
    for row, column in zip(axes, ("batch", "cell_type")):
        levels, code = np.unique(obs[column].astype(str), return_inverse=True)
        palette = np.array([matplotlib.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))])
        for ax, arm in zip(row, arms):
            xy = np.load(folder / f"{slug(arm)}-umap.npy")[order]
            ax.scatter(*xy.T, c=palette[code[order] % 20], s=1.5, lw=0)
            ax.set(xticks=[], yticks=[])
            if column == "batch":
                ax.set_title(arm.replace("scvi-tools ", "scvi-tools\n").replace("pyrosc ", "pyrosc\n"), fontsize=8)
        for i, level in enumerate(levels):
            row[-1].plot([], [], "o", ms=4, color=palette[i % 20], label=level)
        row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=6, frameon=False)
        row[0].set_ylabel(column.replace("cell_type", "type"))
    figure.suptitle(f"{name}, UMAP", fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        file, optimize=True
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def totals(rows: Rows) -> Any:
    """A frame with batch, bio and total of every run."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    frame["batch"], frame["bio"] = frame[list(MIXED)].mean(axis=1), frame[list(BIO)].mean(axis=1)
    frame["total"] = 0.4 * frame["batch"] + 0.6 * frame["bio"]
    better = [*(c for c in BIO if c not in ("NMI", "ARI")), *STARTS]
    frame["total, ten starts"] = 0.4 * frame["batch"] + 0.6 * frame[better].mean(axis=1)
    return frame


def scaled(medians: Any) -> Any:
    """Totals of methods (rows) whose scores were each brought to 0 to 1 over these methods."""
    low, high = medians.min(), medians.max()
    ratio = (medians - low) / (high - low)  # nan, and so left out, where all are equal
    return 0.4 * ratio[list(MIXED)].mean(axis=1) + 0.6 * ratio[list(BIO)].mean(axis=1)


def middle(values: Any, digits: int = 3) -> str:
    found = f"{values.median():.{digits}f}"
    return found if len(values) < 2 else f"{found} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def table(frame: Any) -> list[str]:
    arms = [arm for arm in ARMS if arm in set(frame["arm"])]
    medians = frame.groupby("arm")[[*BIO, *MIXED, *BESIDE]].median().loc[arms]
    of_scaled = scaled(medians)
    columns = (
        "method",
        "seeds",
        "total",
        "batch",
        "bio",
        "scaled",
        "total, ten starts",
        *BIO,
        *MIXED,
        *BESIDE,
        "seconds",
    )
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for arm in sorted(arms, key=lambda arm: -frame.loc[frame["arm"] == arm, "total"].median()):
        of = frame[frame["arm"] == arm]
        cells = [arm, str(len(of)), *(middle(of[c]) for c in ("total", "batch", "bio")), f"{of_scaled[arm]:.3f}"]
        cells.append(middle(of["total, ten starts"]))
        cells += [f"{medians.loc[arm, c]:.3f}" for c in (*BIO, *MIXED, *BESIDE)]
        lines.append("| " + " | ".join([*cells, middle(of["seconds"], 1 if of["seconds"].median() < 10 else 0)]) + " |")
    return lines


def verdicts(frame: Any) -> list[str]:
    """What the line says of every table, for the default width."""
    lines = ["| data | scored on | scANVI | scVI | PCA | PCA, scaled | scANVI >= scVI | scVI > both PCA |"]
    lines.append("|---" * 8 + "|")
    for name in SETS:
        for view, semi in ((ALL, OURS_SCANVI), (HALF, OURS_HALF)):
            of = frame[(frame["data"] == name) & (frame["scored on"] == view)].groupby("arm")["total"].median()
            if not {semi, OURS, PCA, PCA_SCALED} <= set(of.index):
                continue
            found = [of[arm] for arm in (semi, OURS, PCA, PCA_SCALED)]
            held = ("yes" if found[0] >= found[1] else "no", "yes" if found[1] > max(found[2:]) else "no")
            lines.append(f"| {name} | {view} | " + " | ".join([*(f"{v:.3f}" for v in found), *held]) + " |")
    return lines


def report(rows: Rows, notes: list[str], about: dict[str, str]) -> str:
    frame = totals(rows)
    text = ["# Integration", "", "Made by `benchmarks/integration.py`, which says what each method and score is.", ""]
    text += [*[f"- {note}" for note in notes], "", "## Lines", "", *verdicts(frame), ""]
    for name in SETS:
        here = frame[frame["data"] == name]
        if here.empty:
            continue
        text += [f"## {name}", "", about.get(name, ""), ""]
        for view, words in (
            (HALF, "Labels of half the cells given to scANVI, all methods scored on the other half"),
            (ALL, "All cells, all their labels given to scANVI (as scIB does: it is told what the bio scores ask)"),
        ):
            of = here[here["scored on"] == view]
            if len(of):
                text += [f"{words}:", "", *table(of), ""]
        text += [f"[UMAP](integration_{slug(name).lower()}.png), first seed, all cells.", ""]
    return "\n".join(text)


# ---- the run ---------------------------------------------------------------------------------------------------------


class Runs:
    """Rows as they come, in integration.json; those of earlier runs there are kept."""

    def __init__(self, out: Path) -> None:
        self.out, self.file = out, out / "integration.json"
        held = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.rows: Rows = held.get("rows", [])
        self.about: dict[str, str] = held.get("about", {})
        self.failed: dict[str, str] = held.get("failed", {})

    def folder(self, name: str) -> Path:
        return self.out / "integration_kept" / slug(name)

    def has(self, name: str, arm: str, seed: int, view: str) -> bool:
        what = (name, arm, seed, view)
        return any((r["data"], r["arm"], r["seed"], r["scored on"]) == what for r in self.rows)

    def save(self) -> None:
        self.rows.sort(key=lambda r: (SETS.index(r["data"]), r["scored on"], ARMS.index(r["arm"]), r["seed"]))
        held = {"about": self.about, "failed": self.failed, "rows": self.rows}
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(held, indent=1))
        part.replace(self.file)

    def collect(self, name: str, python: str, first: int) -> None:
        """Score the embeddings of this data set that have no scores yet."""
        folder, asked = self.folder(name), []
        for file in sorted(folder.glob("*-*.npz")):
            mark, _, seed = file.stem.rpartition("-")
            arm = next(arm for arm in ARMS if slug(arm) == mark)
            asked += [(arm, int(seed), view) for view in views(arm) if not self.has(name, arm, int(seed), view)]
        if not asked:
            return
        try:
            told(python, folder, {"score": asked, "first": first})
        finally:  # what was scored before a failure counts
            for arm, seed, view in asked:
                file = folder / f"{slug(arm)}-{seed}-{slug(view)}.json"
                if not file.exists():
                    continue
                with np.load(folder / f"{slug(arm)}-{seed}.npz") as found:
                    about = {"seconds": float(found["seconds"]), "version": str(found["version"])}
                row = {"data": name, "scored on": view, "arm": arm, "seed": seed} | json.loads(file.read_text()) | about
                self.rows.append(row)
                of = totals([row]).iloc[0]
                print(
                    f"{name}; {view}; {arm}; seed {seed}: total {of['total']:.3f} (batch {of['batch']:.3f}, bio "
                    f"{of['bio']:.3f}), {of['seconds']:.0f} s",
                    flush=True,
                )
            self.save()

    def write(self) -> None:
        if not self.rows:
            return
        import torch

        versions = sorted({row["version"] for row in self.rows} | {f"torch {torch.__version__}"})
        versions += sorted({f"scib-metrics {row['scib-metrics']}" for row in self.rows})
        notes = [f"2 shared CPU cores, one thread a process. {', '.join(versions)}."]
        notes += [f"{what} did not run: {why}" for what, why in self.failed.items()]
        self.file.with_suffix(".md").write_text(report(self.rows, notes, self.about))
        for name in SETS:
            picture(name, self.folder(name), self.out / f"integration_{slug(name).lower()}.png")


def embed(runs: Runs, name: str, arms: list[str], seed: int, given: argparse.Namespace) -> None:
    """Run the methods of one data set and seed that are missing, each family in a process of its own."""
    folder = runs.folder(name)
    for family, python in (
        (CLASSICAL, given.metrics), ((SEURAT,), given.rscript), (PYROSC, sys.executable), (PEER, given.peer),
    ):  # fmt: skip
        left = [a for a in family if a in arms and not (folder / f"{slug(a)}-{seed}.npz").exists()]
        left = [a for a in left if a not in ONCE or seed == given.seeds[0]]
        if not left or not python:
            continue
        try:
            if family == (SEURAT,):
                by_seurat(folder, python, seed)
            else:
                told(python, folder, {"arms": left, "seed": seed, "epochs": given.epochs})
            runs.failed.pop(f"{name}, {left[0]}", None)
        except RuntimeError as error:
            runs.failed[f"{name}, {left[0]}"] = " ".join(str(error).split())[-250:]
            print(f"{name}, {left} failed:\n{error}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kang", type=Path, help="Kang's counts, 2,000 genes or more")
    parser.add_argument("--mixology", type=Path)
    parser.add_argument("--peer", help="a Python with scvi-tools")
    parser.add_argument("--metrics", help="a Python with scib-metrics, scanpy, scikit-misc, harmonypy and umap-learn")
    parser.add_argument("--rscript", help="an Rscript with Seurat")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--table", action="store_true", help="only write table and pictures of what is there")
    parser.add_argument("--cells", type=int, help=argparse.SUPPRESS)  # for a quick look
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    warnings.simplefilter("ignore")
    runs = Runs(given.out)
    if given.table:
        runs.write()
        return
    if not given.metrics:
        parser.error("--metrics PYTHON is needed: it chooses genes, runs PCA, ComBat and Harmony, and scores")
    given.out.mkdir(parents=True, exist_ok=True)
    files = {"Kang": given.kang, "mixology": given.mixology}
    for seed in given.seeds:
        for name in given.sets:
            if name in files and files[name] is None:
                continue
            folder = runs.folder(name)
            if not (folder / "data.h5ad").exists():
                prepare(name, given, folder / "data.h5ad")
            import anndata

            data = anndata.read_h5ad(folder / "data.h5ad", backed="r")
            runs.about[name] = (
                f"{data.n_obs:,} cells x {data.n_vars:,} genes ({data.uns['genes']}), "
                f"{data.obs['batch'].nunique()} batches, {data.obs['cell_type'].nunique()} types."
            )
            embed(runs, name, given.arms, seed, given)
            runs.collect(name, given.metrics, given.seeds[0])
            shown = [a for a in SHOWN if (folder / f"{slug(a)}-{given.seeds[0]}.npz").exists()]
            shown = [a for a in shown if not (folder / f"{slug(a)}-umap.npy").exists()]
            if shown:
                told(given.metrics, folder, {"map": shown, "seed": given.seeds[0]})
            runs.write()


if __name__ == "__main__":
    main()
