"""Samples by their effects: distances that hold the truth, p-values where nothing differs, "none" said where none is.

    python benchmarks/samples.py --kang kang2000.h5ad --peer PYTHON --out benchmarks/results --keep KEEP

Parts (``--part``), each row written as soon as it is there; an interrupted run goes on where it stopped:

    truth    SIM-C (`pyrosc.simulate.donors`, 8,000 cells x 1,000 genes, 8 types, 16 donors who are leaves of a tree in
             two of the types). Rank correlation of the distances of donors (120 pairs) with the true ones, by type; the
             mean distance in active types over that in null types. A seed is a simulation and its fits.
    null     p-values of the null types of the same data and fits: `Fit.sample_tests` (1,000 permutations) of 20
             covariates drawn at random, half of the donors each, and of the true first clade of either active type.
    none     donors(2000, 500, n_donors=8, n_active=0, proportions=2.0), in which donors differ in composition alone:
             whether `Fit.sample_spread` (delta=0.1 log2) has p_none > 0.95 in every type. Every fifth seed also with
             n_active=2, which has to be told: p_none < 0.05 in the active types.
    kang     Kang, 2,000 variable genes, sample = donor x condition (16), no batch. First split (two clusters) of the
             tree of samples in the monocytes against the condition; `Fit.sample_effects` of the condition within
             donors (block="donor", fdr 0.05) and of 100 permuted conditions, "among samples" (8 of the 16, no block)
             and "within donors" (swapped in some, block="donor"); permuted ones are never the condition or its mirror,
             and are judged by 200 permutations instead of 1,000. Lane equals condition in these data, so the true
             condition is a positive control of the machinery and nothing more. Beside: paired t-tests of pseudobulks
             (donors with 5 cells in both), Benjamini-Hochberg. A seed is that of the fit.

Arms of truth:

    pyrosc          pyrosc.mrvi(cells), all defaults; `Fit.sample_distances` by type
    scvi-tools      MRVI with the options that its own file calls defaults: 100 epochs, batches of 256, early stopping
                    (patience 15), gradients clipped at 40; `get_local_sample_distances`, averaged by type. (What
                    ``train()`` does without arguments is 400 epochs on these data.) Of the interpreter ``--peer``.
    pseudobulk      root mean square over genes of differences of log2 counts per million of sums by type and donor
    PCA             Euclidean distances on the first 5 components of these

Beside the p-values: the rule of MRVI's `differential_expression(sample_cov_keys=[covariate])`, chi-squared by cell, for
the same covariates, as the share of cells of a type (40 of each, at random) with p below 0.05.

A covariate drawn at random gives uniform p-values under any story, as it is itself a permutation: those p-values check
the code. The clades can fail by the story: what is true of an active type must not show in the null types, nor in the
other active type, whose tree is drawn for itself.

Lines, fixed before the first run:

    truth    rank correlation of pyrosc at least 0.8 in each active type of each seed
    null     200 or more p-values of random covariates; how many are below 0.05 within the binomial 95 % band; the same
             of the clades
    none     in at least 90 of 100 seeds none in every type; told in both active types in at least 90 % of the twins
    kang     the first split is the condition in CD14 and in CD16 monocytes; at most 10 of 100 permuted conditions of
             either kind with a gene called in either type

Seconds are of the fit, one thread, on a machine that others share. Fits are kept in KEEP, by part, seed and sizes:
empty it when the story changes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from fdr import markdown
from labels import Rows, Table, replaced
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist, squareform

PARTS = ("truth", "null", "none", "kang")
PYROSC, PEER, PSEUDOBULK, PCA = "pyrosc", "scvi-tools", "pseudobulk", "PCA"
SEEDS = {"truth": 3, "null": 3, "none": 100, "kang": 1}
N_RANDOM, N_CELLS_TESTED, N_COMPONENTS, TWIN_EVERY = 20, 40, 5, 5
N_PERMUTED, N_PERMUTED_PEER = 100, 20
AMONG, WITHIN = "among samples", "within donors"
NOWHERE, OTHER, OWN = "null types", "active types, of no part in it", "its own type (has to be told)"
MONOCYTES = ("CD14 Mono", "CD16 Mono")
# Induced by interferon in every textbook; those that are among the 2,000 genes count.
INDUCED = (
    "ISG15", "ISG20", "IFI6", "IFIT1", "IFIT2", "IFIT3", "IFITM3", "MX1", "OAS1", "LY6E", "CXCL10", "CXCL11", "IDO1",
    "TNFSF10", "RSAD2",
)  # fmt: skip

Distances = dict[str, np.ndarray]  # by type, (D, D)


# ---- data ------------------------------------------------------------------------------------------------------------


def sim_c(seed: int, given: argparse.Namespace) -> Any:
    """SIM-C with its covariates of donors: "random 0", ..., and "clade of type0", ..."""
    import pyrosc

    data = pyrosc.simulate.donors(given.cells or 8000, given.genes or 1000, seed=seed)
    del data.layers["rho"]
    names, draw = list(data.obs["donor"].cat.categories), np.random.default_rng([seed, 23])
    codes = {f"random {j}": draw.permutation(np.arange(len(names)) % 2) for j in range(N_RANDOM)}
    codes |= {f"clade of {t}": first_split(data.uns["distances"][t].to_numpy()) for t in active(data)}
    for name, code in codes.items():
        data.obs[name] = data.obs["donor"].astype(str).map(dict(zip(names, code.astype(str)))).astype("category")
    return data


def active(data: Any) -> list[str]:
    return [t for t, distance in data.uns["distances"].items() if distance.to_numpy().any()]


def first_split(distance: np.ndarray) -> np.ndarray:
    """(D,) 0 or 1, the side of the root of the tree (average linkage) of these distances."""
    tree = hierarchy.linkage(squareform(distance, checks=False), "average")
    return hierarchy.fcluster(tree, 2, "maxclust") - 1


def kang(given: argparse.Namespace) -> Any:
    """Cells of known donors, with permuted conditions of samples as columns; a file that `kang.prepare` made is taken
    as it is."""
    import anndata
    from kang import prepare

    data = anndata.read_h5ad(given.kang)
    if "highly_variable_rank" not in data.var:
        data = prepare(given.kang)
    if given.genes:
        data = data[:, np.argsort(data.var["highly_variable_rank"].to_numpy())[: given.genes]]
    obs = data.obs[["condition", "donor", "sample", "cell_type"]].astype(str)
    obs["monocytes"] = obs["cell_type"].where(obs["cell_type"].isin(MONOCYTES))
    samples = obs.drop_duplicates("sample").set_index("sample").sort_index()
    truth = (samples["condition"] == "stim").to_numpy()
    donor, draw = pd.factorize(samples["donor"])[0], np.random.default_rng(29)
    codes = {}
    for j in range(N_PERMUTED):
        for kind in (AMONG, WITHIN):
            code = truth
            while (code == truth).all() or (code != truth).all():
                code = (
                    draw.permutation(truth) if kind == AMONG else truth ^ draw.integers(2, size=donor.max() + 1)[donor]
                )
            codes[f"{kind} {j}"] = code
    level = {name: dict(zip(samples.index, np.where(code, "b", "a"))) for name, code in codes.items()}
    more = pd.DataFrame({name: obs["sample"].map(of).astype("category") for name, of in level.items()}, index=obs.index)
    obs = pd.concat([obs.astype("category"), more], axis=1)
    return anndata.AnnData(data.X.tocsr().astype(np.float32), obs=obs, var=data.var[[]])


# ---- pyrosc ----------------------------------------------------------------------------------------------------------


def fitted(data: Any, sample: str, name: str, seed: int, given: argparse.Namespace) -> tuple[Any, Any, float]:
    """The fit, its cells, and seconds that it took; kept for the next part or run."""
    import pyrosc

    cells = pyrosc.Cells.from_anndata(data, sample=sample)
    path = given.keep / f"{label(name, seed, data, given)}.fit"
    if not path.exists():
        began = time.perf_counter()
        fit = pyrosc.fit(pyrosc.mrvi(cells, seed=seed), cells, epochs=given.epochs, seed=seed, progress=False)
        path.with_suffix(".seconds").write_text(json.dumps(time.perf_counter() - began))
        fit.save(path)
    return pyrosc.load(path), cells, json.loads(path.with_suffix(".seconds").read_text())


def label(name: str, seed: int, data: Any, given: argparse.Namespace) -> str:
    return f"{name}-{seed}-{data.n_obs}x{data.n_vars}-{given.epochs or 'default'}"


@contextmanager
def decoded_once() -> Iterator[None]:
    """What a fit says of its cells, by group, is worked out for the first design and kept for the next: it does not
    depend on covariates. For one fit, its cells and one ``groupby``."""
    from pyrosc import between_samples

    held: dict[str, Any] = {}

    def once(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*given: Any) -> Any:
            if name not in held:
                held[name] = function(*given)
            return held[name]

        return ask

    with (
        mock.patch.object(between_samples, "profiles", once("profiles", between_samples.profiles)),
        mock.patch.object(between_samples.Totals, "of", once("totals", between_samples.Totals.of)),
    ):
        yield


# ---- pseudobulk ------------------------------------------------------------------------------------------------------


def pseudobulks(data: Any, sample: str, kind: str) -> np.ndarray:
    """(D, G) log2 counts per million of the cells of a type, half a count added."""
    code, inside = data.obs[sample].cat.codes.to_numpy(), (data.obs["cell_type"] == kind).to_numpy()
    sums = np.stack(
        [np.asarray(data.X[inside & (code == d)].sum(0)).ravel() for d in range(len(data.obs[sample].cat.categories))]
    )
    return np.log2(1e6 * (sums + 0.5) / (sums.sum(1, keepdims=True) + 1))


def by_pseudobulk(data: Any, sample: str, kinds: list[str], arm: str) -> Distances:
    found = {}
    for kind in kinds:
        y = pseudobulks(data, sample, kind)
        if arm == PCA:
            u, s, _ = np.linalg.svd(y - y.mean(0), full_matrices=False)
            found[kind] = squareform(pdist(u[:, :N_COMPONENTS] * s[:N_COMPONENTS]))
        else:
            found[kind] = squareform(pdist(y)) / np.sqrt(y.shape[1])
    return found


def paired_t(data: Any, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(G,) whether a gene is called at 0.05 (Benjamini and Hochberg) by paired t-tests of pseudobulks, and its log2
    fold change."""
    samples = data.obs.drop_duplicates("sample").set_index("sample").sort_index()
    y = pd.DataFrame(pseudobulks(data, "sample", kind), index=samples.index)
    n_cells = data.obs.loc[data.obs["cell_type"] == kind, "sample"].value_counts()
    y = y[(n_cells.reindex(y.index) >= 5).to_numpy()]
    by = {c: y[(samples.loc[y.index, "condition"] == c).to_numpy()] for c in ("ctrl", "stim")}
    by = {c: one.set_index(samples.loc[one.index, "donor"].astype(str).to_numpy()) for c, one in by.items()}
    both = by["ctrl"].index.intersection(by["stim"].index)
    gap = (by["stim"].loc[both] - by["ctrl"].loc[both]).to_numpy()
    p = stats.ttest_1samp(gap, 0.0).pvalue
    return stats.false_discovery_control(np.nan_to_num(p, nan=1.0)) <= 0.05, gap.mean(0)


# ---- scvi-tools, in a process of its own -----------------------------------------------------------------------------


def by_peer(
    data: Any, sample: str, kinds: list[str], covariates: list[str], name: str, seed: int, given: argparse.Namespace
) -> dict[str, np.ndarray]:
    """What MRVI of scvi-tools says of these data: "distances" (types, D, D) in the order of ``kinds`` and of the

    samples' names, "p_values" (covariates, cells tested), "tested" their types, "seconds" of training, "epochs".

    Raises
    ------
    RuntimeError
        If the process failed, with the end of what it wrote.
    """
    path = given.keep / f"{label(name, seed, data, given)}.scvi-tools.npz"
    if not path.exists():
        draw, kind = np.random.default_rng([seed, 31]), data.obs["cell_type"].astype(str).to_numpy()
        tested = [draw.permutation(np.flatnonzero(kind == k))[:N_CELLS_TESTED] for k in kinds]
        asked = {
            "sample": sample, "kinds": kinds, "covariates": covariates, "seed": seed, "epochs": given.epochs or 100,
            "tested": np.concatenate(tested).tolist(),
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            kept = data.copy()
            kept.uns = {}
            kept.obs = kept.obs[[sample, "cell_type", *covariates]]
            kept.write_h5ad(Path(folder) / "data.h5ad")
            (Path(folder) / "asked.json").write_text(json.dumps(asked))
            done = subprocess.run(
                [given.peer, __file__, "--child", folder], capture_output=True, text=True, check=False,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            with replaced(path) as part:
                part.write_bytes((Path(folder) / "found.npz").read_bytes())
    with np.load(path) as found:
        return dict(found)


def child(folder: Path) -> None:
    import anndata
    import scvi
    import torch
    from scvi.external import MRVI

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    asked = json.loads((folder / "asked.json").read_text())
    data = anndata.read_h5ad(folder / "data.h5ad")
    scvi.settings.seed, scvi.settings.verbosity = asked["seed"], 40
    MRVI.setup_anndata(data, sample_key=asked["sample"])
    model = MRVI(data)
    began = time.perf_counter()
    # The file of MRVI has these as its defaults, but arguments of train() take their place.
    model.train(
        max_epochs=asked["epochs"], batch_size=256, train_size=0.9, early_stopping=True, early_stopping_patience=15,
        check_val_every_n_epoch=1, gradient_clip_val=40, accelerator="cpu", enable_progress_bar=False,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    table = model.get_local_sample_distances(groupby=["cell_type"], keep_cell=False)["cell_type"]
    names = sorted(map(str, data.obs[asked["sample"]].cat.categories))
    found = [table.sel(cell_type_name=k, sample_x=names, sample_y=names).values for k in asked["kinds"]]
    some = data[asked["tested"]].copy()
    p_values = [
        model.differential_expression(some, sample_cov_keys=[name])["pvalue"].values[:, 0]
        for name in asked["covariates"]
    ]
    np.savez(
        folder / "found.npz", distances=np.stack(found), p_values=np.array(p_values), seconds=seconds,
        tested=np.array(some.obs["cell_type"].astype(str), dtype=str), epochs=len(model.history["elbo_validation"]),
    )  # fmt: skip


def shares(found: dict[str, np.ndarray], j: int) -> dict[str, float]:
    """By type, the share of the cells tested whose p-value of a covariate is below 0.05."""
    below = found["p_values"][j] < 0.05
    return {str(k): float(below[found["tested"] == k].mean()) for k in np.unique(found["tested"])}


# ---- parts -----------------------------------------------------------------------------------------------------------


def truth_and_null(seed: int, given: argparse.Namespace, out: Table) -> None:
    from pyrosc import between_samples

    data = sim_c(seed, given)
    kinds, moved = list(data.uns["distances"]), active(data)
    covariates = [name for name in data.obs if name.startswith(("random ", "clade of "))]
    upper = np.triu_indices(data.obs["donor"].nunique(), 1)
    arms = [PYROSC, PSEUDOBULK, PCA] + [PEER] * bool(given.peer)
    for arm in arms:
        if "truth" in given.part and not out.has(part="truth", seed=seed, arm=arm):
            row: dict[str, Any] = {"part": "truth", "seed": seed, "arm": arm}
            if arm == PYROSC:
                fit, cells, row["seconds"] = fitted(data, "donor", "sim_c", seed, given)
                table = fit.sample_distances(cells, "cell_type")
                found = {k: between_samples.sample_matrix(table, k).to_numpy() for k in kinds}
                row["epochs"] = len(fit.history)
            elif arm == PEER:
                said = by_peer(data, "donor", kinds, covariates, "sim_c", seed, given)
                found = dict(zip(kinds, said["distances"]))
                row |= {"seconds": float(said["seconds"]), "epochs": int(said["epochs"])}
            else:
                found = by_pseudobulk(data, "donor", kinds, arm)
            true = {k: data.uns["distances"][k].to_numpy()[upper] for k in moved}
            mean = {k: float(found[k][upper].mean()) for k in kinds}
            row["spearman"] = {k: float(stats.spearmanr(found[k][upper], true[k]).statistic) for k in moved}
            row["ratio"] = np.mean([mean[k] for k in moved]) / np.mean([mean[k] for k in kinds if k not in moved])
            out.add(row)
    if "null" not in given.part:
        return
    left = [c for c in covariates if not out.has(part="null", seed=seed, arm=PYROSC, covariate=c)]
    if left:
        fit, cells, _ = fitted(data, "donor", "sim_c", seed, given)
        with decoded_once():
            for name in left:
                tests = fit.sample_tests(cells, name, "cell_type").set_index("group")["p_value"]
                row = {"part": "null", "seed": seed, "arm": PYROSC, "covariate": name, "active": moved}
                out.add(row | {"p_values": {k: float(tests[k]) for k in kinds}})
    for j, name in enumerate(covariates if given.peer else []):
        if not out.has(part="null", seed=seed, arm=PEER, covariate=name):
            said = by_peer(data, "donor", kinds, covariates, "sim_c", seed, given)
            row = {"part": "null", "seed": seed, "arm": PEER, "covariate": name, "active": moved}
            out.add(row | {"shares": shares(said, j)})


def none(seed: int, given: argparse.Namespace, out: Table) -> None:
    import pyrosc

    for n_active in (0, 2) if seed % TWIN_EVERY == 0 else (0,):
        if out.has(part="none", seed=seed, n_active=n_active):
            continue
        data = pyrosc.simulate.donors(
            given.cells or 2000, given.genes or 500, n_donors=8, n_active=n_active, proportions=2.0, seed=seed
        )
        fit, cells, seconds = fitted(data, "donor", f"none{n_active}", seed, given)
        table = fit.sample_spread(cells, "cell_type")
        row = {"part": "none", "seed": seed, "n_active": n_active, "active": active(data), "seconds": seconds}
        row["p_none"] = {str(k): float(v) for k, v in table["p_none"].items()}
        out.add(row | {"sd": {str(k): float(v) for k, v in table["sd"].items()}})


def of_kang(seed: int, given: argparse.Namespace, out: Table) -> None:
    from pyrosc import between_samples

    data = kang(given)
    samples = data.obs.drop_duplicates("sample").set_index("sample").sort_index()
    truth = (samples["condition"] == "stim").to_numpy()
    asked = ["condition"] + [f"{WITHIN} {j}" for j in range(N_PERMUTED_PEER)]
    about = {"part": "kang", "seed": seed}
    for arm in (PYROSC, PSEUDOBULK, PCA, *[PEER] * bool(given.peer)):
        if out.has(**about, what="tree", arm=arm):
            continue
        row: dict[str, Any] = about | {"what": "tree", "arm": arm}
        if arm == PYROSC:
            fit, cells, row["seconds"] = fitted(data, "sample", "kang", seed, given)
            row["epochs"] = len(fit.history)
            table = fit.sample_distances(cells, "monocytes")
            found = {k: between_samples.sample_matrix(table, k).loc[samples.index, samples.index].to_numpy()
                     for k in MONOCYTES}  # fmt: skip
        elif arm == PEER:
            said = by_peer(data, "sample", list(MONOCYTES), asked, "kang", seed, given)
            found = dict(zip(MONOCYTES, said["distances"]))
            row |= {"seconds": float(said["seconds"]), "epochs": int(said["epochs"])}
        else:
            found = by_pseudobulk(data, "sample", list(MONOCYTES), arm)
        sides = {k: first_split(d) for k, d in found.items()}
        row["agree"] = {k: int(max((s == truth).sum(), (s != truth).sum())) for k, s in sides.items()}
        out.add(row | {"n_samples": len(truth)})

    if not out.has(**about, what="pseudobulk t"):
        row = about | {"what": "pseudobulk t", "calls": {}, "known": {}, "lfc": {}}
        for k in MONOCYTES:
            called, lfc = paired_t(data, k)
            known = data.var_names.isin(INDUCED)
            row["calls"][k] = int(called.sum())
            row["known"][k] = [int((called & (lfc > 0) & known).sum()), int(known.sum())]
            row["lfc"][k] = float(lfc[known].mean())
        out.add(row)
    names = ["condition", *[f"{kind} {j}" for j in range(N_PERMUTED) for kind in (WITHIN, AMONG)]]
    left = [name for name in names if not out.has(**about, what="effects", covariate=name)]
    if left:
        fit, cells, _ = fitted(data, "sample", "kang", seed, given)
        with decoded_once():
            for name in left:
                block = None if name.startswith(AMONG) else "donor"
                n = 1000 if name == "condition" else 200
                table = fit.sample_effects(cells, name, "monocytes", block=block, n_permutations=n)
                row = about | {"what": "effects", "covariate": name}
                code = samples[name].cat.codes.to_numpy() == 1
                row["agree"] = int(max((code == truth).sum(), (code != truth).sum()))
                row["calls"] = {k: int(table[table["group"] == k]["is_de"].sum()) for k in MONOCYTES}
                if name == "condition":
                    row |= {"known": {}, "large": {}, "lfc": {}, "decoded": {}}
                    for k in MONOCYTES:
                        mine = table[table["group"] == k]
                        known = mine[mine.index.isin(INDUCED)]
                        row["known"][k] = [int((known["is_de"] & (known["lfc_mean"] > 0)).sum()), len(known)]
                        row["lfc"][k], row["decoded"][k] = map(float, known[["lfc_mean", "lfc_decoded"]].mean())
                        row["large"][k] = int((mine["is_de"] & (mine["probability"] > 0.95)).sum())
                out.add(row)
    for j, name in enumerate(asked if given.peer else []):
        if not out.has(**about, what="chi squared", covariate=name):
            said = by_peer(data, "sample", list(MONOCYTES), asked, "kang", seed, given)
            out.add(about | {"what": "chi squared", "covariate": name, "shares": shares(said, j)})


# ---- report ----------------------------------------------------------------------------------------------------------


def band(n: int) -> tuple[int, int]:
    """Binomial 95 % band of how many of n p-values are below 0.05."""
    low, high = stats.binom.ppf([0.025, 0.975], n, 0.05)
    return int(low), int(high)


def where(row: dict[str, Any], kind: str) -> str:
    """What there is to find of a covariate in a type."""
    if kind not in row["active"]:
        return NOWHERE
    return OWN if row["covariate"] == f"clade of {kind}" else OTHER


def of_kind(rows: Rows, arm: str, start: str, place: str) -> np.ndarray:
    """P-values of pyrosc, or shares of cells of the peer, for covariates of a kind in such types."""
    name = "p_values" if arm == PYROSC else "shares"
    mine = [r for r in rows if r["part"] == "null" and r["arm"] == arm and r["covariate"].startswith(start)]
    return np.array([value for r in mine for kind, value in r[name].items() if where(r, kind) == place])


def is_none(row: dict[str, Any]) -> bool:
    return all(p > 0.95 for p in row["p_none"].values())


def is_told(row: dict[str, Any]) -> bool:
    return all(row["p_none"][k] < 0.05 for k in row["active"])


def lines(rows: Rows) -> pd.DataFrame:
    found: list[tuple[str, str, str, str, str]] = []

    def add(part: str, what: str, value: str, line: str, held: bool, short: bool = False) -> None:
        found.append((part, what, value, line, ("yes" if held else "no") + " (so far)" * short))

    mine = [r for r in rows if r["part"] == "truth" and r["arm"] == PYROSC]
    if mine:
        each = [v for r in mine for v in r["spearman"].values()]
        what = f"rank correlation in active types (seeds: {len(mine)})"
        add("truth", what, f"{min(each):.3f} to {max(each):.3f}", "each >= 0.8", min(each) >= 0.8, len(mine) < 3)
    for start, what in (("random", "random covariates"), ("clade", "clades of active types")):
        p = of_kind(rows, PYROSC, start, NOWHERE)
        if len(p):
            low, high = band(len(p))
            n, short = int((p < 0.05).sum()), start == "random" and len(p) < 200
            add(
                "null",
                f"{what}: below 0.05 in null types",
                f"{n} of {len(p)}",
                f"{low} to {high}",
                low <= n <= high,
                short,
            )
    mine = [r for r in rows if r["part"] == "none" and r["n_active"] == 0]
    if mine:
        n = sum(map(is_none, mine))
        add("none", "none in every type", f"{n} of {len(mine)} seeds", ">= 90 %", n >= 0.9 * len(mine), len(mine) < 100)
    mine = [r for r in rows if r["part"] == "none" and r["n_active"]]
    if mine:
        n = sum(map(is_told, mine))
        add("none", "twin: told in both active types", f"{n} of {len(mine)} seeds", ">= 90 %", n >= 0.9 * len(mine),
            len(mine) < 20)  # fmt: skip
    for r in rows:
        if r["part"] == "kang" and r["what"] == "tree" and r["arm"] == PYROSC:
            for k, n in r["agree"].items():
                add("kang", f"first split is the condition, {k}", f"{n} of {r['n_samples']} samples", "all",
                    n == r["n_samples"])  # fmt: skip
    for kind in (AMONG, WITHIN):
        mine = permuted(rows, kind)
        if mine:
            n = sum(any(r["calls"].values()) for r in mine)
            add("kang", f"permuted {kind}: any gene called", f"{n} of {len(mine)}", "<= 10 %", n <= 0.1 * len(mine),
                len(mine) < N_PERMUTED)  # fmt: skip
    return pd.DataFrame(found, columns=["part", "what", "found", "line", "holds"])


def permuted(rows: Rows, kind: str) -> Rows:
    return [r for r in rows if r["part"] == "kang" and r["what"] == "effects" and r["covariate"].startswith(kind)]


def truths(rows: Rows) -> pd.DataFrame:
    found = []
    for arm in (PYROSC, PEER, PSEUDOBULK, PCA):
        for r in sorted((r for r in rows if r["part"] == "truth" and r["arm"] == arm), key=lambda r: r["seed"]):
            row = {"arm": arm, "seed": r["seed"]} | {f"rank correlation, {k}": v for k, v in r["spearman"].items()}
            row |= {"active / null distance": f"{r['ratio']:.2f}"}
            row |= {"seconds": f"{r['seconds']:.0f}" if "seconds" in r else "", "epochs": str(r.get("epochs", ""))}
            found.append(row)
    return pd.DataFrame(found)


def nulls(rows: Rows) -> pd.DataFrame:
    found = []
    for start in ("random", "clade"):
        for place in (NOWHERE, OTHER, OWN):
            p = of_kind(rows, PYROSC, start, place)
            if len(p):
                low, high = band(len(p))
                row = {"arm": PYROSC, "covariate": start, "in": place, "p-values": str(len(p))}
                row |= {"below 0.05": str((p < 0.05).sum()), "share": float((p < 0.05).mean()), "band": "", "KS p": ""}
                if place != OWN:
                    row |= {"band": f"{low} to {high}", "KS p": f"{stats.kstest(p, 'uniform').pvalue:.3f}"}
                found.append(row)
        for place in (NOWHERE, OTHER, OWN):
            share = of_kind(rows, PEER, start, place)
            if len(share):
                n = len(share) * N_CELLS_TESTED
                row = {"arm": f"{PEER}, chi squared", "covariate": start, "in": place, "p-values": f"{n} cells"}
                row |= {"below 0.05": f"{share.mean() * n:.0f} cells", "share": float(share.mean())}
                found.append(row | {"band": "", "KS p": ""})
    return pd.DataFrame(found)


def nones(rows: Rows) -> pd.DataFrame:
    found = []
    for n_active in (0, 2):
        mine = [r for r in rows if r["part"] == "none" and r["n_active"] == n_active]
        for group in ("null", "active"):
            inside = [(r, k) for r in mine for k in r["p_none"] if (k in r["active"]) == (group == "active")]
            if inside:
                p = np.array([r["p_none"][k] for r, k in inside])
                sd = np.array([r["sd"][k] for r, k in inside])
                found.append({
                    "active types": n_active, "seeds": len(mine), "types": f"{len(p)} {group}",
                    "p_none > 0.95": int((p > 0.95).sum()), "p_none < 0.05": int((p < 0.05).sum()),
                    "sd, log2 (median, range)": f"{np.median(sd):.3f} ({sd.min():.3f} to {sd.max():.3f})",
                    "seconds a fit (median)": f"{np.median([r['seconds'] for r in mine]):.0f}",
                })  # fmt: skip
    return pd.DataFrame(found)


def kangs(rows: Rows) -> list[str]:
    mine, text = [r for r in rows if r["part"] == "kang"], []
    trees = [
        {"arm": r["arm"], **{f"first split, {k}": f"{n} of {r['n_samples']}" for k, n in r["agree"].items()},
         "seconds": f"{r['seconds']:.0f}" if "seconds" in r else "", "epochs": str(r.get("epochs", ""))}
        for r in mine if r["what"] == "tree"
    ]  # fmt: skip
    if trees:
        text += ["Samples on the side of their condition, of 16:", "", *markdown(pd.DataFrame(trees)), ""]
    effects = []
    for r in mine:
        if r["what"] == "pseudobulk t" or (r["what"] == "effects" and r["covariate"] == "condition"):
            for k, n in r["calls"].items():
                effects.append({
                    "arm": PYROSC if r["what"] == "effects" else "pseudobulk, paired t", "type": k, "genes called": n,
                    "known, called and up": "{} of {}".format(*r["known"][k]), "their mean lfc": f"{r['lfc'][k]:.2f}",
                    "of it decoded": f"{r['decoded'][k]:.2f}" if "decoded" in r else "",
                    "called, and P(abs lfc > 0.25) > 0.95": str(r["large"][k]) if "large" in r else "",
                })  # fmt: skip
    if effects:
        text += ["The condition, within donors, at an fdr of 0.05:", "", *markdown(pd.DataFrame(effects)), ""]
    found = []
    for kind in (AMONG, WITHIN):
        runs = permuted(rows, kind)
        for k in MONOCYTES if runs else ():
            calls = np.array([r["calls"][k] for r in runs])
            with_calls = [r["agree"] for r in runs if r["calls"][k]]
            found.append({
                "permuted": kind, "type": k, "permutations": len(runs), "with a gene called": int((calls > 0).sum()),
                "most genes": int(calls.max()),
                "samples as in the condition or its mirror, where called": " ".join(map(str, sorted(with_calls))),
            })  # fmt: skip
    if found:
        text += ["Permuted conditions:", "", *markdown(pd.DataFrame(found)), ""]
    by_cell = [r for r in mine if r["what"] == "chi squared"]
    if by_cell:
        table = []
        for k in MONOCYTES:
            null = [r["shares"][k] for r in by_cell if r["covariate"] != "condition"]
            own = [r["shares"][k] for r in by_cell if r["covariate"] == "condition"]
            table.append({"type": k, "condition": f"{np.mean(own):.2f}" if own else "",
                          f"permuted within donors ({len(null)}), mean": f"{np.mean(null):.2f}" if null else "",
                          "most": f"{max(null):.2f}" if null else ""})  # fmt: skip
        text += [f"scvi-tools' chi squared, share of {N_CELLS_TESTED} cells with p below 0.05:", ""]
        text += [*markdown(pd.DataFrame(table)), ""]
    return text


def report(rows: Rows, notes: list[str]) -> str:
    text = ["# Samples by their effects", "", "Made by `benchmarks/samples.py`, which says how to read it.", ""]
    text += [*[f"- {note}" for note in notes], "", "## Lines", "", *markdown(lines(rows)), ""]
    for table, head in (
        (truths(rows), "Distances of donors, against the truth (SIM-C)"),
        (nulls(rows), "P-values on SIM-C"),
        (nones(rows), "Whether samples differ at all, beside composition"),
    ):
        if len(table):
            text += [f"## {head}", "", *markdown(table), ""]
    of_real = kangs(rows)
    return "\n".join(text + (["## Kang", "", *of_real] if of_real else []))


def machine(peer: str | None) -> str:
    import pyrosc

    own = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "pyro-ppl", "numpy", "scipy"))
    note = f"One thread of {os.cpu_count()} CPU cores that other work shared, Python {platform.python_version()}; "
    note += f"pyrosc {pyrosc.__version__}, {own}"
    if peer:
        asked = (
            "from importlib.metadata import version as v; print('scvi-tools', v('scvi-tools') + ', torch', v('torch'))"
        )
        done = subprocess.run([peer, "-c", asked], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"--peer {peer} has no scvi-tools:\n{done.stderr[-500:]}")
        note += f"; beside: {done.stdout.strip()}"
    return note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--kang", help="Kang's cells, for kang: as `kang.prepare` made them, or raw")
    parser.add_argument("--peer", help="a Python that has scvi-tools")
    parser.add_argument("--seeds", type=int, help=f"how many; 0, 1, ...; else {SEEDS}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--keep", type=Path, help="folder of fits; else samples_kept in --out")
    parser.add_argument("--cells", type=int, help=argparse.SUPPRESS)  # for a quick look
    parser.add_argument("--genes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    if "kang" in given.part and not given.kang:
        parser.error("--kang FILE is needed by the part kang")
    if not given.peer:
        print("scvi-tools is left out: --peer PYTHON", flush=True)
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.keep = given.keep or given.out / "samples_kept"
    for folder in (given.out, given.keep):
        folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(given, name) for name in ("cells", "genes", "epochs")}
    out = Table(given.out, "samples", report, sizes, machine(given.peer))
    n_seeds = {part: given.seeds or n for part, n in SEEDS.items()}
    for seed in range(max(n_seeds[part] for part in given.part)):
        if {"truth", "null"} & set(given.part) and seed < n_seeds["truth"]:
            truth_and_null(seed, given, out)
        if "kang" in given.part and seed < n_seeds["kang"]:
            of_kang(seed, given, out)
        if "none" in given.part and seed < n_seeds["none"]:
            none(seed, given, out)
    out.write()


if __name__ == "__main__":
    main()
