"""New cells mapped onto a reference: types told, a type that is new found, what of the reference moves, and how fast.

    python benchmarks/mapping.py --part sim kang lines --kang kang2000.h5ad --lines cellline_mixology_5batch.h5ad \
        --peer PYTHON --out benchmarks/results

Parts (``--part``), each row written as soon as it is there; an interrupted run goes on where it stopped:

    sim      `pyrosc.simulate.tissue`, 4,000 cells x 1,000 genes. Query: the third batch. Reference: the two others
             without the type of number (3 + 2 * seed) % 7, which is new in the query; "rare" keeps 20 cells of it there
             (no joint fit). A seed is a simulation and its fits.
    kang     Kang's types of 60 cells or more. Reference: control; query: stimulated. Batch: condition and donor, so
             that all of the query's are new. A seed is that of the fits. No type is new.
    lines    cell-line mixology, each batch in turn the query, the others the reference; 1,000 genes by variance over
             mean of log(1 + count) in the reference. A seed is that of the fits. No line is new.

The query has no column of labels, the reference all of its labels. Arms:

    none, surgery, decoder, all       pyrosc.scanvi(reference), all defaults; fit.map(query, train=arm)
    surgery, encoder sees batches     the same, the reference fitted with encoder=Encoder(covariates="first")
    joint                             one pyrosc.scanvi of reference and query, the query's labels unknown
    PCA + kNN                         20 components of log(1 + count per 10,000) of both, 15 neighbours
    scvi-tools scArches               SCVI (NB, layer norm, encoder sees batches), SCANVI.from_scvi_model, then
                                      SCANVI.load_query_data, 100 epochs, weight_decay 0; of the interpreter ``--peer``

"surgery" and "PCA + kNN" also with 10, 30 and 50 % of the genes, drawn at random, not measured in the query.

Scores: accuracy over the query's cells of known types, by the most probable type of `Fit.label_probabilities`, of the
story and by="neighbors"; area under the ROC of the new type's cells by 1 - each p-value of `Fit.labels` and by 1 - the
largest probability; share of cells of known types with p_known < 0.01; `pyrosc.mapping.drift` over the reference's
cells; mean log likelihood (200 draws) of 300 cells of the query, drawn at random, over genes measured there.

Lines, fixed before the first run: accuracy of surgery within 0.03 of joint (all genes measured) with 0 and 10 % of
genes missing; AUROC by 1 - p_known at least 0.9 on sim; drift of surgery exactly 0.

Seconds are of mapping and the story's probabilities (for joint: of the fit and these), one thread, on a machine that
others may share; "reference" are those of the reference's fit. Fits of references are kept in OUT/mapping_kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fdr import markdown
from labels import Table, machine, replaced

PARTS = ("sim", "kang", "lines")
NONE, SURGERY, DECODER, ALL = "none", "surgery", "decoder", "all"
SEEING, JOINT, KNN, PEER = "surgery, encoder sees batches", "joint", "PCA + kNN", "scvi-tools scArches"
MAPPED = (NONE, SURGERY, DECODER, ALL, SEEING)
ARMS = (*MAPPED, JOINT, KNN, PEER)
MISSING = (0.1, 0.3, 0.5)
UNKNOWN = "none"  # label of a cell without one; scvi-tools needs a level for it
RARE, LEAST_CELLS, N_GENES = 20, 60, 1000
P_VALUES = ("p_known", "p_state", "p_residual")
ACCURACY, NEIGHBORS, NEW, BELOW = "accuracy", "by neighbors", "AUROC 1 - p_known", "p_known < 0.01"
SCORES = (
    ACCURACY, NEIGHBORS, NEW, "AUROC 1 - p_state", "AUROC 1 - p_residual", "AUROC 1 - probability", BELOW,
    "drift latent", "drift expression", "log likelihood",
)  # fmt: skip

Rows = list[dict[str, Any]]
Found = dict[str, Any]


@dataclass
class Pair:
    """A reference and a query, whose obs have "batch" and "cell_type"; only the reference's types are to be used."""

    reference: Any
    query: Any

    @property
    def bare(self) -> Any:
        """The query without types."""
        query = self.query.copy()
        del query.obs["cell_type"]
        return query


@dataclass
class Unit:
    """What every arm is to be asked about; ``make`` is called only where an arm is still missing."""

    part: str
    setting: str
    seed: int
    missing: float
    arms: tuple[str, ...]
    make: Callable[[], Pair]


# ---- data ------------------------------------------------------------------------------------------------------------


def plain(data: Any, batch: Any, kind: Any) -> Any:
    """Counts, batch and type, and nothing else."""
    import anndata

    obs = pd.DataFrame({"batch": np.asarray(batch, str), "cell_type": np.asarray(kind, str)}, index=data.obs_names)
    return anndata.AnnData(data.X.tocsr(), obs=obs, var=data.var[[]])


def sim(seed: int, given: argparse.Namespace, *, rare: bool = False) -> Pair:
    import pyrosc

    data = pyrosc.simulate.tissue(given.cells or 4000, given.genes or 1000, seed=seed)
    data = plain(data, data.obs["batch"], data.obs["cell_type"])
    is_query = (data.obs["batch"] == "batch2").to_numpy()
    is_new = (data.obs["cell_type"] == f"type{(3 + 2 * seed) % 7}").to_numpy()
    reference, kept = ~is_query & ~is_new, is_query.copy()
    if rare:
        own = np.flatnonzero(is_query & is_new)
        kept[np.random.default_rng(seed).permutation(own)[RARE:]] = False
    return Pair(data[reference].copy(), data[kept].copy())


def kang(given: argparse.Namespace) -> Pair:
    import anndata

    data = anndata.read_h5ad(given.kang)
    kind, condition = data.obs["cell_type"].astype(str), data.obs["condition"].astype(str)
    common = (kind.map(kind.value_counts()) >= LEAST_CELLS).to_numpy()
    data = plain(data, condition + "_" + data.obs["donor"].astype(str), kind)
    control = (condition == "ctrl").to_numpy()
    return Pair(data[common & control].copy(), data[common & ~control].copy())


def lines_of(given: argparse.Namespace) -> Any:
    import anndata

    data = anndata.read_h5ad(given.lines)
    return plain(data, data.obs["batch"], data.obs["cell_type"])


def mixology(data: Any, name: str, given: argparse.Namespace) -> Pair:
    is_query = (data.obs["batch"] == name).to_numpy()
    logs = np.log1p(data.X[~is_query].toarray())
    spread = logs.var(0) / np.maximum(logs.mean(0), 1e-6)
    genes = np.sort(np.argsort(-spread)[: given.genes or N_GENES])
    return Pair(data[~is_query, genes].copy(), data[is_query, genes].copy())


def lacking(pair: Pair, missing: float, seed: int) -> Pair:
    """The pair with a share of the genes, drawn at random, not measured in the query."""
    if not missing:
        return pair
    n = pair.query.n_vars
    kept = np.random.default_rng([seed, round(100 * missing)]).permutation(n)[round(missing * n) :]
    return Pair(pair.reference, pair.query[:, np.sort(kept)].copy())


def units(given: argparse.Namespace) -> Iterator[Unit]:
    """Seed by seed, so that what is there of an unfinished run is paired."""
    mixed = lines_of(given) if "lines" in given.part else None
    for seed in range(given.seeds):
        found: list[tuple[str, str, Callable[[], Pair]]] = []
        if "sim" in given.part:
            found.append(("sim", "SIM-A", lambda seed=seed: sim(seed, given)))
        if "kang" in given.part:
            found.append(("kang", "Kang", lambda: kang(given)))
        if mixed is not None:
            for name in mixed.obs["batch"].unique():
                found.append(("lines", name, lambda name=name: mixology(mixed, name, given)))
        for part, setting, make in found:
            yield Unit(part, setting, seed, 0.0, ARMS, make)
            if part == "sim":
                arms = tuple(a for a in ARMS if a != JOINT)
                yield Unit(part, f"{setting}, rare", seed, 0.0, arms, lambda seed=seed: sim(seed, given, rare=True))
            for missing in MISSING:
                yield Unit(
                    part, setting, seed, missing, (SURGERY, KNN),
                    lambda make=make, missing=missing, seed=seed: lacking(make(), missing, seed),
                )  # fmt: skip


# ---- arms ------------------------------------------------------------------------------------------------------------


def ask(arm: str, unit: Unit, pair: Pair, given: argparse.Namespace) -> Found:
    """The query's share of types (DataFrame), seconds, and what else the arm can say."""
    if arm == PEER:
        return by_peer(unit, pair, given)
    if arm == KNN:
        return by_knn(pair, unit.seed)
    if arm == JOINT:
        return by_joint(unit, pair, given)
    return by_map(arm, unit, pair, given)


def kept_of(what: str, unit: Unit, pair: Pair, given: argparse.Namespace) -> Path:
    """The folder of what was fitted to these counts, types and batches of a reference, with this seed."""
    data = pair.reference
    mark = hashlib.sha256(json.dumps([what, unit.seed, given.epochs, list(data.shape), *data.var_names]).encode())
    for values in (data.X.data, data.X.indices, data.X.indptr):
        mark.update(np.ascontiguousarray(values).tobytes())
    mark.update("\n".join([*data.obs["batch"].astype(str), *data.obs["cell_type"].astype(str)]).encode())
    folder = (given.out / "mapping_kept").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder / f"{what}-{mark.hexdigest()[:16]}"


def fitted(cells: Any, unit: Unit, given: argparse.Namespace, **parts: Any) -> Any:
    import pyrosc

    program = pyrosc.scanvi(cells, seed=unit.seed, **parts)
    return pyrosc.fit(program, cells, epochs=given.epochs, seed=unit.seed, progress=False)


def reference_of(arm: str, unit: Unit, pair: Pair, given: argparse.Namespace) -> tuple[Any, float]:
    """Fit to the reference, and the seconds it took, now or in an earlier run."""
    import pyrosc

    sees = arm == SEEING
    path = kept_of("seeing" if sees else "blind", unit, pair, given)
    if not path.with_suffix(".json").exists():
        cells = pyrosc.Cells.from_anndata(pair.reference, batch="batch", label="cell_type")
        began = time.perf_counter()
        fit = fitted(cells, unit, given, **({"encoder": pyrosc.Encoder(covariates="first")} if sees else {}))
        seconds = time.perf_counter() - began
        fit.save(path, overwrite=True)
        with replaced(path.with_suffix(".json")) as part:  # last: it says that all is there
            part.write_text(json.dumps(seconds))
    return pyrosc.load(path), json.loads(path.with_suffix(".json").read_text())


def by_map(arm: str, unit: Unit, pair: Pair, given: argparse.Namespace) -> Found:
    from pyrosc.mapping import drift

    fit, of_reference = reference_of(arm, unit, pair, given)
    train, query = SURGERY if arm == SEEING else arm, pair.bare
    began = time.perf_counter()
    mapped = fit.map(query, train, seed=unit.seed, epochs=given.epochs, progress=False)
    share = mapped.label_probabilities(query)
    seconds = time.perf_counter() - began
    moved = drift(fit, mapped, pair.reference)
    found = {"share": share, "seconds": seconds, "reference seconds": of_reference}
    return found | {f"drift {name}": value for name, value in moved.items()} | of_fit(mapped, query, unit.seed)


def by_joint(unit: Unit, pair: Pair, given: argparse.Namespace) -> Found:
    import anndata

    import pyrosc

    both = anndata.concat([pair.reference, pair.query])
    both.obs["cell_type"] = [*pair.reference.obs["cell_type"].astype(str), *[UNKNOWN] * len(pair.query)]
    query = both[len(pair.reference) :].copy()
    cells = pyrosc.Cells.from_anndata(both, batch="batch", label="cell_type", unlabeled=UNKNOWN)
    began = time.perf_counter()
    fit = fitted(cells, unit, given)
    share = fit.label_probabilities(query)
    return {"share": share, "seconds": time.perf_counter() - began} | of_fit(fit, query, unit.seed)


def of_fit(fit: Any, query: Any, seed: int) -> Found:
    """What a pyrosc fit says of the query besides probabilities of types."""
    from pyrosc.errors import ProgramError

    some = np.sort(np.random.default_rng(seed).permutation(len(query))[:300])
    found: Found = {"log likelihood": float(fit.log_likelihood(query[some].copy(), 200).mean())}
    try:
        found |= {"p": fit.labels(query)[list(P_VALUES)], "neighbors": fit.label_probabilities(query, by="neighbors")}
    except ProgramError as error:  # after "all" the only examples are the query's, and these have no labels
        print(f"no p-values and neighbours: {error}", flush=True)
    return found


def by_knn(pair: Pair, seed: int) -> Found:
    import anndata
    from sklearn.decomposition import PCA
    from sklearn.neighbors import KNeighborsClassifier

    began = time.perf_counter()
    both = anndata.concat([pair.reference, pair.query], join="inner")
    counts = np.asarray(both.X.todense(), dtype=np.float32)
    logs = np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1))
    components, n = PCA(20, random_state=seed).fit_transform(logs), len(pair.reference)
    neighbours = KNeighborsClassifier(15).fit(components[:n], pair.reference.obs["cell_type"].astype(str))
    share = pd.DataFrame(neighbours.predict_proba(components[n:]), columns=neighbours.classes_)
    return {"share": share, "seconds": time.perf_counter() - began}


def by_peer(unit: Unit, pair: Pair, given: argparse.Namespace) -> Found:
    """What `child` found, in a process of its own.

    Raises
    ------
    RuntimeError
        If the process failed, with the end of what it wrote.
    """
    kept = str(kept_of("scvi-tools", unit, pair, given))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair.reference.write_h5ad(folder / "reference.h5ad")
        pair.bare.write_h5ad(folder / "query.h5ad")
        (folder / "asked.json").write_text(json.dumps({"seed": unit.seed, "epochs": given.epochs, "kept": kept}))
        done = subprocess.run(
            [given.peer, __file__, "--child", name], capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return {"share": pd.read_csv(folder / "share.csv", index_col=0)} | json.loads(
            (folder / "found.json").read_text()
        )


def child(folder: Path) -> None:
    import anndata
    import scvi
    import torch
    from scvi.model import SCANVI, SCVI

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    asked = json.loads((folder / "asked.json").read_text())
    kept = Path(asked["kept"])
    options = {"enable_progress_bar": False, "accelerator": "cpu"}
    scvi.settings.verbosity = 40
    if not kept.with_suffix(".json").exists():
        data = anndata.read_h5ad(folder / "reference.h5ad")
        data.obs["cell_type"] = data.obs["cell_type"].astype(str)
        scvi.settings.seed = asked["seed"]
        SCVI.setup_anndata(data, batch_key="batch")
        began = time.perf_counter()
        model = SCVI(
            data, gene_likelihood="nb", use_layer_norm="both", use_batch_norm="none", encode_covariates=True,
        )  # fmt: skip
        model.train(max_epochs=asked["epochs"], **options)
        model = SCANVI.from_scvi_model(model, unlabeled_category=UNKNOWN, labels_key="cell_type")
        model.train(max_epochs=asked["epochs"], n_samples_per_label=100, **options)
        seconds = time.perf_counter() - began
        model.save(str(kept), overwrite=True)
        with replaced(kept.with_suffix(".json")) as part:
            part.write_text(json.dumps(seconds))
    query = anndata.read_h5ad(folder / "query.h5ad")
    query.obs["cell_type"] = UNKNOWN
    scvi.settings.seed = asked["seed"]
    began = time.perf_counter()
    SCANVI.prepare_query_anndata(query, str(kept))
    model = SCANVI.load_query_data(query, str(kept), accelerator="cpu")
    model.train(max_epochs=asked["epochs"] or 100, plan_kwargs={"weight_decay": 0.0}, **options)
    share = model.predict(soft=True)
    seconds = time.perf_counter() - began
    share.to_csv(folder / "share.csv")
    of_reference = json.loads(kept.with_suffix(".json").read_text())
    (folder / "found.json").write_text(json.dumps({"seconds": seconds, "reference seconds": of_reference}))


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores(pair: Pair, found: Found) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    kind = pair.query.obs["cell_type"].astype(str).to_numpy()
    known = np.isin(kind, pair.reference.obs["cell_type"].astype(str).unique())
    row: dict[str, Any] = {"cells": len(kind), "new": int((~known).sum())}
    for name, source in ((ACCURACY, "share"), (NEIGHBORS, "neighbors")):
        if source in found:
            told = found[source].columns.to_numpy().astype(str)[found[source].to_numpy().argmax(1)]
            row[name] = float((told == kind)[known].mean())
    sure = {"probability": found["share"].to_numpy().max(1)}
    if "p" in found:
        sure |= {name: found["p"][name].to_numpy() for name in P_VALUES}
        row[BELOW] = float((sure["p_known"] < 0.01)[known].mean())
    if not known.all():
        row |= {f"AUROC 1 - {name}": float(roc_auc_score(~known, -value)) for name, value in sure.items()}
    numbers = ("drift latent", "drift expression", "log likelihood", "seconds", "reference seconds")
    return row | {name: float(found[name]) for name in numbers if name in found}


# ---- report ----------------------------------------------------------------------------------------------------------


def lines(frame: pd.DataFrame) -> pd.DataFrame:
    """What surgery had to keep."""
    found: list[tuple[str, ...]] = []
    for arm in (SURGERY, SEEING):
        mine = frame[frame["arm"] == arm]
        for setting, own in mine.groupby("setting", sort=False):
            upper = frame[(frame["arm"] == JOINT) & (frame["setting"] == setting)].set_index("seed")[ACCURACY]
            for missing, some in own[own["missing"] <= 0.1].groupby("missing"):
                gap = (some.set_index("seed")[ACCURACY] - upper).dropna()
                if len(gap):
                    what = f"accuracy less that of joint, {missing:.0%} of genes missing"
                    held = "yes" if gap.mean() >= -0.03 else "no"
                    found.append((setting, arm, what, str(len(gap)), f"{gap.mean():+.3f}", ">= -0.030", held))
            area = own[own["missing"] == 0].get(NEW, pd.Series(dtype=float)).dropna()
            if len(area):
                held = "yes" if area.mean() >= 0.9 else "no"
                found.append((setting, arm, NEW, str(len(area)), f"{area.mean():.3f}", ">= 0.900", held))
            moved = own[["drift latent", "drift expression"]].max(axis=1)
            held = "yes" if (moved == 0).all() else "no"
            n = str(own["seed"].nunique())
            found.append((setting, arm, "drift of the reference, largest", n, f"{moved.max():.2g}", "0", held))
    return pd.DataFrame(found, columns=["setting", "arm", "what", "seeds", "found", "line", "holds"])


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, of settings, arms and shares of missing genes."""
    rows = []
    for (setting, missing, arm), mine in frame.groupby(["setting", "missing", "arm"], sort=False):
        row = {"setting": setting, "missing": f"{missing:.0%}", "arm": arm, "seeds": len(mine)}
        for name in SCORES:
            value = mine[name].mean() if name in mine else np.nan
            if name in frame and frame[name].notna().any():
                form = ".2g" if name.startswith("drift") else ".1f" if name == "log likelihood" else ".3f"
                row[name] = "" if np.isnan(value) else format(value, form)
        for name in ("seconds", "reference seconds"):
            value = mine[name].median() if name in mine else np.nan
            row[f"{name} (median)"] = "" if np.isnan(value) else f"{value:.1f}"
        rows.append(row)
    return pd.DataFrame(rows)


def report(rows: Rows, notes: list[str]) -> str:
    text = ["# Mapping onto a reference", "", "Made by `benchmarks/mapping.py`, which says how to read it.", ""]
    text += [*[f"- {note}" for note in notes], ""]
    places = (list(PARTS), list(dict.fromkeys(r["setting"] for r in sorted(rows, key=lambda r: r["setting"]))))

    def order(r: dict[str, Any]) -> tuple[Any, ...]:
        place = places[0].index(r["part"]), places[1].index(r["setting"])
        return *place, r["missing"], ARMS.index(r["arm"]), r["seed"]

    frame = pd.DataFrame(sorted(rows, key=order))
    kept = lines(frame) if "drift latent" in frame else ()
    if len(kept):
        text += ["## Lines", "", *markdown(kept), ""]
    heads = {"sim": "Simulated tissue, one type new in the query", "kang": "Kang", "lines": "Cell lines"}
    for part, head in heads.items():
        mine = frame[frame["part"] == part]
        if len(mine):
            text += [f"## {head}", "", *markdown(means(mine)), ""]
    mine = frame[frame["part"] == "lines"]
    if len(mine):
        arms = mine.groupby(["missing", "arm"], sort=False)[[ACCURACY]].agg(["mean", "min"]).reset_index()
        arms.columns = ["missing", "arm", "accuracy, mean over queries", "worst"]
        text += ["Over all queries:", "", *markdown(arms.assign(missing=arms["missing"].map("{:.0%}".format))), ""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--kang", help="Kang's cells, as `kang.prepare` made them")
    parser.add_argument("--lines", help="the file of cell-line mixology")
    parser.add_argument("--peer", help="a Python that has scvi-tools")
    parser.add_argument("--seeds", type=int, default=3, help="how many; 0, 1, ...")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cells", type=int, help=argparse.SUPPRESS)  # of sim, for a quick look
    parser.add_argument("--genes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    for part in ("kang", "lines"):
        if part in given.part and not getattr(given, part):
            parser.error(f"--{part} FILE is needed by the part {part}")
    import torch

    torch.set_num_threads(1)
    if PEER in given.arms and not given.peer:
        print("scvi-tools is left out: --peer PYTHON", flush=True)
    warnings.simplefilter("ignore")
    given.out.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(given, name) for name in ("cells", "genes", "epochs")}
    out = Table(given.out, "mapping", report, sizes, machine(given.peer))
    for unit in units(given):
        about = {"part": unit.part, "setting": unit.setting, "missing": unit.missing, "seed": unit.seed}
        arms = [a for a in unit.arms if a in given.arms and (a != PEER or given.peer)]
        arms = [a for a in arms if not out.has(**about, arm=a)]
        pair = unit.make() if arms else None
        for arm in arms:
            what = about | {"arm": arm}
            row = what | scores(pair, ask(arm, unit, pair, given))
            out.add(row)
    out.write()


if __name__ == "__main__":
    main()
