"""Types told from few labels, some of them wrong: how often rightly, how honestly, how fast, and what is of no type.

    python benchmarks/labels.py --prepared kang2000.h5ad --peer PYTHON --out benchmarks/results

Parts (``--part``), each unit written as soon as it is there; an interrupted run goes on where it stopped:

    simf       `pyrosc.simulate.subtle_types`, 6,000 cells x 1,500 genes, 4 types. "base" has effect 0.8, 50 seeds a
               type and 10 % of them wrong; every other changes one of these. A seed is a simulation and its fits.
    kang       Kang's types of 60 cells or more (other cells left out), 2,000 variable genes, batch = donor; 20 labels a
               type drawn at random. A seed is a draw of labels and its fits.
    unknown    the same, with each type in turn held out of the labels; its cells stay. Area under the ROC for cells of
               this type among all without a label, by 1 - p_known (`Fit.labels`) and by 1 - the largest probability.
    time       seconds of a training epoch of `scanvi` and of `scvi` on the same 3,000 cells x 2,000 genes
               (`pyrosc.simulate.tissue`), a fifth labelled, by number of types: second epochs of short fits in turn,
               median of the ratios of neighbours in time

Scores are of cells without a label: balanced accuracy; Brier, NLL (p at least 1e-6) and ECE as `pyrosc.check.labels`
has them. Arms, each in a process of its own with one thread:

    pyrosc                    pyrosc.scanvi(cells), all defaults
    pyrosc, errors told       labels=LabelPrior(errors=the share that is wrong), where some are
    pyrosc, shares learned    labels=LabelPrior(learned=True)
    scvi-tools                SCVI (NB), then SCANVI.from_scvi_model with 100 samples per label, their default epochs;
                              of the interpreter ``--peer``, left out without it
    kNN                       15 neighbours, weights 1 / distance, on the latent means of pyrosc.scvi
    logistic                  logistic regression on 20 principal components of log(1 + count per 10,000)

Lines, fixed before the first run, for "pyrosc": in "base" 0.10 ahead of kNN in balanced accuracy; nowhere behind
scvi-tools in balanced accuracy, Brier or NLL. Differences are paired by seed, intervals (95 %, Student's t) over seeds.

Seconds are of fit and probabilities, of a machine that others may share. SCVI and pyrosc.scvi see no labels: they are
fitted once for the same counts and seed, kept in OUT/labels_kept, and their seconds count wherever they are used.
"""

from __future__ import annotations

import argparse
import hashlib
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
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fdr import interval, markdown

PARTS = ("simf", "kang", "unknown", "time")
PYROSC, TOLD, LEARNED = "pyrosc", "pyrosc, errors told", "pyrosc, shares learned"
PEER, KNN, LOGISTIC = "scvi-tools", "kNN", "logistic"
ARMS = (PYROSC, TOLD, LEARNED, PEER, KNN, LOGISTIC)
BASE = {"effect": 0.8, "n_seeds": 50, "errors": 0.1}
SETTINGS = {
    "base": BASE,
    "effect=0.4": BASE | {"effect": 0.4},
    "effect=1.2": BASE | {"effect": 1.2},
    "seeds=10": BASE | {"n_seeds": 10},
    "seeds=25": BASE | {"n_seeds": 25},
    "seeds=100": BASE | {"n_seeds": 100},
    "errors=0": BASE | {"errors": 0.0},
    "errors=0.2": BASE | {"errors": 0.2},
}
SIZES = (4, 10, 25, 50)  # numbers of types whose epochs are timed
NONE = "none"  # label of a cell without one; scvi-tools needs a level for it
AHEAD = {"balanced accuracy": 1, "Brier": -1, "NLL": -1}  # sign by which more is better
BY_P, BY_PROBABILITY = "1 - p_known", "1 - probability"
LEAST_CELLS, N_LABELS = 60, 20

Rows = list[dict[str, Any]]


@dataclass
class Unit:
    """Cells that every arm is to be asked about.

    make : data, whose obs has "cell_type" and "label", made only where an arm is still missing
    """

    part: str
    setting: str
    seed: int
    arms: tuple[str, ...]
    make: Callable[[], Any]
    batch: str | None = None


# ---- data ------------------------------------------------------------------------------------------------------------


def subtle(setting: str, seed: int, given: argparse.Namespace) -> Any:
    import pyrosc

    data = pyrosc.simulate.subtle_types(given.cells or 6000, given.genes or 1500, seed=seed, **SETTINGS[setting])
    del data.layers["rho"]
    data.obs["label"] = data.obs["label"].astype(object).where(data.obs["label"].notna(), NONE)
    return data


def kang(given: argparse.Namespace) -> Any:
    """Cells of types that are not rare; a file that `kang.prepare` has made is taken as it is."""
    import anndata
    from kang import prepare

    data = anndata.read_h5ad(given.prepared)
    if "highly_variable_rank" not in data.var:
        data = prepare(given.prepared)
    if given.cells:
        data = data[np.random.default_rng(0).permutation(len(data))[: given.cells]]
    if given.genes:
        data = data[:, np.argsort(data.var["highly_variable_rank"].to_numpy())[: given.genes]]
    kind = data.obs["cell_type"].astype(str)
    obs = data.obs[["donor"]].astype(str).assign(cell_type=kind)
    common = (kind.map(kind.value_counts()) >= LEAST_CELLS).to_numpy()
    return anndata.AnnData(data.X[common].tocsr(), obs=obs[common], var=data.var[[]])


def with_labels(data: Any, seed: int, held_out: str | None = None) -> Any:
    """The data with the same labels of every type but the one held out, as many of each."""
    draw, kind = np.random.default_rng(seed), data.obs["cell_type"].to_numpy()
    label = np.full(len(kind), NONE, dtype=object)
    for name in np.unique(kind):
        chosen = draw.choice(np.flatnonzero(kind == name), N_LABELS, replace=False)
        if name != held_out:
            label[chosen] = name
    data = data.copy()
    data.obs["label"] = label
    return data


def tissue(n_types: int, given: argparse.Namespace) -> Any:
    import pyrosc

    data = pyrosc.simulate.tissue(given.cells or 3000, given.genes or 2000, n_types=n_types)
    del data.layers["rho"]
    seen = np.random.default_rng(0).permutation(len(data)) < len(data) // 5
    data.obs["label"] = np.where(seen, data.obs["cell_type"].astype(str), NONE)
    return data


def units(given: argparse.Namespace) -> Iterator[Unit]:
    """Seed by seed, so that what is there of an unfinished run is paired."""
    real = kang(given) if {"kang", "unknown"} & set(given.part) else None
    for seed in range(given.seeds):
        if "simf" in given.part:
            for name in given.settings:
                arms = tuple(a for a in ARMS if a != TOLD or SETTINGS[name]["errors"] > 0)
                yield Unit("simf", name, seed, arms, lambda name=name, seed=seed: subtle(name, seed, given))
        if "kang" in given.part:
            arms = tuple(a for a in ARMS if a != TOLD)
            yield Unit("kang", "Kang", seed, arms, lambda seed=seed: with_labels(real, seed), "donor")
        if "unknown" in given.part:
            for name in np.unique(real.obs["cell_type"]):
                make = partial(with_labels, real, seed, name)
                yield Unit("unknown", name, seed, (PYROSC, PEER), make, "donor")
    if "time" in given.part:
        for n_types in SIZES:
            yield Unit("time", str(n_types), 0, (PYROSC,), lambda n=n_types: tissue(n, given), "batch")


# ---- arms, each in a process of its own ------------------------------------------------------------------------------


def ask(python: str, arm: str, unit: Unit, data: Any, given: argparse.Namespace) -> dict[str, np.ndarray]:
    """What `child` found of these cells.

    Raises
    ------
    RuntimeError
        If the process failed, with the end of what it wrote.
    """
    labelled = data.obs["label"] != NONE
    wrong = (data.obs["label"].astype(str) != data.obs["cell_type"].astype(str))[labelled].mean()
    asked = {
        "arm": arm, "part": unit.part, "seed": unit.seed, "batch": unit.batch, "errors": float(wrong),
        "epochs": given.epochs, "rounds": given.rounds, "kept": str((given.out / "labels_kept").resolve()),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data.write_h5ad(Path(folder) / "data.h5ad")
        (Path(folder) / "asked.json").write_text(json.dumps(asked))
        done = subprocess.run(
            [python, __file__, "--child", folder], capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        with np.load(Path(folder) / "found.npz") as found:
            return dict(found)


def child(folder: Path) -> None:
    import anndata
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    asked = json.loads((folder / "asked.json").read_text())
    data = anndata.read_h5ad(folder / "data.h5ad")
    if asked["part"] == "time":
        found = epochs_of(data, asked)
    else:
        found = {PEER: by_peer, KNN: by_knn, LOGISTIC: by_logistic}.get(asked["arm"], by_pyrosc)(data, asked)
        found["types"] = np.array(found["types"], dtype=str)
    np.savez(folder / "found.npz", **found)


def cells_of(data: Any, asked: dict[str, Any]) -> Any:
    import pyrosc

    return pyrosc.Cells.from_anndata(data, batch=asked["batch"], label="label", unlabeled=NONE)


def by_pyrosc(data: Any, asked: dict[str, Any]) -> dict[str, Any]:
    import pyrosc

    priors = {TOLD: {"errors": asked["errors"]}, LEARNED: {"learned": True}}
    parts = {arm: {"labels": pyrosc.LabelPrior(**belief)} for arm, belief in priors.items()}
    cells, seed = cells_of(data, asked), asked["seed"]
    began = time.perf_counter()
    program = pyrosc.scanvi(cells, seed=seed, **parts.get(asked["arm"], {}))
    fit = pyrosc.fit(program, cells, epochs=asked["epochs"], seed=seed, progress=False)
    share = fit.label_probabilities(cells)
    found = {"share": share, "types": list(share.columns), "seconds": time.perf_counter() - began}
    if asked["part"] == "unknown":
        found["p_known"] = fit.labels(cells)["p_known"]
    return found


def by_knn(data: Any, asked: dict[str, Any]) -> dict[str, Any]:
    from sklearn.neighbors import KNeighborsClassifier

    import pyrosc

    kept = kept_of(data, asked, "latent")
    if not (kept / "latent.npz").exists():
        cells, seed = cells_of(data, asked), asked["seed"]
        began = time.perf_counter()
        fit = pyrosc.fit(pyrosc.scvi(cells, seed=seed), cells, epochs=asked["epochs"], seed=seed, progress=False)
        z = fit.latent(cells)
        with replaced(kept / "latent.npz") as path, path.open("wb") as file:
            np.savez(file, z=z, seconds=time.perf_counter() - began)
    with np.load(kept / "latent.npz") as held:
        z, seconds = held["z"], float(held["seconds"])
    known = (data.obs["label"] != NONE).to_numpy()
    neighbours = KNeighborsClassifier(min(15, known.sum()), weights="distance")
    return of_features(neighbours, z, data, seconds)


def by_logistic(data: Any, asked: dict[str, Any]) -> dict[str, Any]:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    began = time.perf_counter()
    counts = np.asarray(data.X.todense(), dtype=np.float32)
    logs = np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1))
    components = PCA(20, random_state=asked["seed"]).fit_transform(logs)
    return of_features(LogisticRegression(max_iter=5000), components, data, time.perf_counter() - began)


def of_features(classifier: Any, features: np.ndarray, data: Any, seconds: float) -> dict[str, Any]:
    began = time.perf_counter()
    known = (data.obs["label"] != NONE).to_numpy()
    classifier.fit(features[known], data.obs["label"].astype(str).to_numpy()[known])
    share = classifier.predict_proba(features)
    return {"share": share, "types": classifier.classes_, "seconds": seconds + time.perf_counter() - began}


def by_peer(data: Any, asked: dict[str, Any]) -> dict[str, Any]:
    import scvi
    from scvi.model import SCANVI, SCVI

    data.obs["label"] = data.obs["label"].astype(str)
    scvi.settings.seed, scvi.settings.verbosity = asked["seed"], 40
    options = {"max_epochs": asked["epochs"], "enable_progress_bar": False, "accelerator": "cpu"}
    kept = kept_of(data, asked, "scvi-tools")
    if not (kept / "seconds.json").exists():
        SCVI.setup_anndata(data, batch_key=asked["batch"])
        began = time.perf_counter()
        model = SCVI(data, gene_likelihood="nb")
        model.train(**options)
        seconds = time.perf_counter() - began
        model.save(str(kept / "model"), overwrite=True)
        with replaced(kept / "seconds.json") as path:  # last: it says that all is there
            path.write_text(json.dumps(seconds))
    seconds = json.loads((kept / "seconds.json").read_text())
    model = SCVI.load(str(kept / "model"), adata=data, accelerator="cpu")
    scvi.settings.seed = asked["seed"]  # whether the fit above was kept makes no difference then
    began = time.perf_counter()
    model = SCANVI.from_scvi_model(model, unlabeled_category=NONE, labels_key="label")
    model.train(n_samples_per_label=100, **options)
    share = model.predict(soft=True)
    seconds += time.perf_counter() - began
    return {"share": share, "types": list(map(str, share.columns)), "seconds": seconds}


def epochs_of(data: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """(rounds,) seconds of an epoch of either story. What comes first in a round alternates; the first is not kept."""
    import pyrosc

    cells = cells_of(data, asked)
    programs = {"scanvi": pyrosc.scanvi(cells), "scvi": pyrosc.scvi(cells)}
    found: dict[str, list[float]] = {name: [] for name in programs}
    for r in range(asked["rounds"] + 1):
        for name in sorted(programs, reverse=bool(r % 2)):
            fit = pyrosc.fit(programs[name], cells, epochs=2, validation=None, progress=False)
            found[name].append(len(cells) / fit.history["cells_per_second"].iloc[-1])
    return {name: seconds[1:] for name, seconds in found.items()}


def kept_of(data: Any, asked: dict[str, Any], what: str) -> Path:
    """The folder of what was made of these counts, batches, seed and epochs, labels aside."""
    mark = hashlib.sha256(json.dumps([what, asked["seed"], asked["epochs"], list(data.shape)]).encode())
    for values in (data.X.data, data.X.indices, data.X.indptr):
        mark.update(np.ascontiguousarray(values).tobytes())
    if asked["batch"]:
        mark.update("\n".join(data.obs[asked["batch"]].astype(str)).encode())
    folder = Path(asked["kept"]) / f"{what}-{mark.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / ".gitignore").write_text("*\n")
    return folder


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, that takes the place of ``path`` once all is written."""
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores(unit: Unit, data: Any, found: dict[str, np.ndarray]) -> dict[str, Any]:
    if unit.part == "time":
        one, two = found["scanvi"], found["scvi"]
        return {"scanvi": float(np.median(one)), "scvi": float(np.median(two)), "rounds": len(one)} | {
            "ratio": float(np.median(one / two)), "from": float(np.quantile(one / two, 0.25)),
            "to": float(np.quantile(one / two, 0.75)),
        }  # fmt: skip
    from sklearn.metrics import roc_auc_score

    from pyrosc.check.labels import reliability

    unlabelled = (data.obs["label"] == NONE).to_numpy()
    kind, share = data.obs["cell_type"].astype(str).to_numpy()[unlabelled], found["share"][unlabelled]
    row = {"seconds": float(found["seconds"]), "cells": len(kind)}
    if unit.part == "unknown":
        is_new = kind == unit.setting
        row |= {"of the type": int(is_new.sum()), BY_PROBABILITY: float(roc_auc_score(is_new, -share.max(1)))}
        if "p_known" in found:
            row[BY_P] = float(roc_auc_score(is_new, -found["p_known"][unlabelled]))
        return row
    types = found["types"].tolist()
    share = share.astype(float) / share.sum(1, keepdims=True)
    truth = np.array([types.index(name) for name in kind])
    of = reliability(share, truth, accuracy=0.95, n_bins=10, seed=0).attrs
    return row | {
        "balanced accuracy": of["balanced_accuracy"], "Brier": of["brier"], "NLL": of["nll"], "ECE": of["ece"],
        "ECE by chance": of["ece_if_calibrated"],
    }  # fmt: skip


# ---- report ----------------------------------------------------------------------------------------------------------


def ahead(frame: pd.DataFrame, one: str, two: str, score: str) -> pd.Series:
    """By how much one arm is better than another, by seed; empty where they share none."""
    by_seed = [frame[frame["arm"] == arm].set_index("seed")[score] for arm in (one, two)]
    return (AHEAD[score] * (by_seed[0] - by_seed[1])).dropna()


def said(by_seed: pd.Series) -> str:
    if len(by_seed) < 2:
        return f"{by_seed.mean():+.3f}"
    low, high = interval(by_seed)
    return f"{by_seed.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def lines(frame: pd.DataFrame) -> pd.DataFrame:
    """What "pyrosc" had to keep."""
    found = []
    for setting, mine in frame.groupby("setting", sort=False):
        if setting == "base" and len(gap := ahead(mine, PYROSC, KNN, "balanced accuracy")):
            held = "yes" if gap.mean() >= 0.1 else "no"
            found.append((setting, "ahead of kNN, balanced accuracy", len(gap), said(gap), ">= 0.100", held))
        for score in AHEAD:
            gap = ahead(mine, PYROSC, PEER, score)
            if len(gap):
                held = "yes"
                if gap.mean() < 0:
                    held = "no, interval holds 0" if len(gap) > 1 and interval(gap)[1] >= 0 else "no"
                found.append((setting, f"not behind scvi-tools, {score}", len(gap), said(gap), ">= 0", held))
    return pd.DataFrame(found, columns=["setting", "what", "seeds", "ahead by", "line", "holds"])


def means(frame: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (setting, arm), mine in frame.groupby(["setting", "arm"], sort=False):
        row = {"setting": setting, "arm": arm, "seeds": len(mine)}
        row |= {name: float(mine[name].mean()) for name in (*AHEAD, "ECE", "ECE by chance")}
        rows.append(row | {"seconds (median)": f"{mine['seconds'].median():.0f}"})
    return pd.DataFrame(rows)


def differences(frame: pd.DataFrame) -> pd.DataFrame:
    pairs = [(arm, PEER) for arm in (PYROSC, TOLD, LEARNED)]
    pairs += [(PYROSC, KNN), (PYROSC, LOGISTIC), (TOLD, PYROSC), (LEARNED, PYROSC)]
    rows = []
    for setting, mine in frame.groupby("setting", sort=False):
        for one, two in pairs:
            gaps = {score: ahead(mine, one, two, score) for score in AHEAD}
            n = len(gaps["NLL"])
            if n:
                row = {"setting": setting, "arm": one, "ahead of": two, "seeds": n}
                rows.append(row | {score: said(gap) for score, gap in gaps.items()})
    return pd.DataFrame(rows)


def unknowns(frame: pd.DataFrame) -> pd.DataFrame:
    """By type held out, means over seeds; below, the median over types and the worst."""
    columns = {
        f"{arm}: {score}": mine.groupby("setting")[score].mean()
        for arm, mine in frame.groupby("arm", sort=False)
        for score in (BY_P, BY_PROBABILITY)
        if score in mine and mine[score].notna().any()
    }
    table = pd.DataFrame(columns)
    extra = {
        "median": {name: f"{of.median():.3f}" for name, of in table.items()},
        "worst": {name: f"{of.min():.3f} ({of.idxmin()})" for name, of in table.items()},
    }
    sizes = frame.groupby("setting")["of the type"].first()
    seeds = frame.groupby("setting")["seed"].nunique()
    table.insert(0, "seeds", seeds.map(str))
    table.insert(0, "cells", sizes.map("{:.0f}".format))
    return pd.concat([table, pd.DataFrame(extra).T]).fillna("").rename_axis("held out").reset_index()


def times(frame: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "types": row["setting"], "scanvi, s": row["scanvi"], "scvi, s": row["scvi"],
            "ratio (quartiles)": f"{row['ratio']:.2f} ({row['from']:.2f} to {row['to']:.2f})",
            "rounds": f"{row['rounds']:.0f}",
        }
        for _, row in frame.iterrows()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def report(rows: Rows, notes: list[str]) -> str:
    text = ["# Types from labels", "", "Made by `benchmarks/labels.py`, which says how to read it.", ""]
    text += [*[f"- {note}" for note in notes], ""]
    order = {name: i for i, name in enumerate([*SETTINGS, "Kang", *ARMS, *map(str, SIZES)])}
    frame = pd.DataFrame(sorted(rows, key=lambda r: (order.get(r["setting"], 0), order[r["arm"]], r["seed"])))
    told = frame[frame["part"].isin(["simf", "kang"])]
    if len(told):
        text += ["## Lines", "", *markdown(lines(told)), ""]
    for part, head in (("simf", "Simulated subtle types"), ("kang", "Kang")):
        mine = frame[frame["part"] == part]
        if len(mine):
            text += [f"## {head}", "", *markdown(means(mine)), ""]
            text += ["Ahead by, paired by seed (above 0 is better, also in Brier and NLL):", ""]
            text += [*markdown(differences(mine)), ""]
    mine = frame[frame["part"] == "unknown"]
    if len(mine):
        seconds = mine.groupby("arm", sort=False)["seconds"].median()
        text += ["## A type held out of the labels: area under the ROC of its cells", "", *markdown(unknowns(mine)), ""]
        text += ["Median seconds: " + ", ".join(f"{arm} {s:.0f}" for arm, s in seconds.items()) + ".", ""]
    mine = frame[frame["part"] == "time"]
    if len(mine):
        text += ["## Seconds of an epoch, scanvi against scvi", "", *markdown(times(mine)), ""]
    return "\n".join(text)


class Table:
    """Rows as they come, on screen and as NAME.json and NAME.md in a folder; those of earlier runs there are kept."""

    def __init__(
        self, out: Path, name: str, report: Callable[[Rows, list[str]], str], sizes: dict[str, int | None], note: str
    ) -> None:
        self.file, self.report, self.sizes = out / f"{name}.json", report, sizes
        self.rows: Rows = []
        self.notes: list[str] = []
        if self.file.exists():
            held = json.loads(self.file.read_text())
            if held["sizes"] != sizes:
                sys.exit(f"{self.file} was made with {held['sizes']}, not {sizes}: choose another --out")
            self.rows, self.notes = held["rows"], held["notes"]
        self.notes += [note] * (note not in self.notes)

    def has(self, **what: Any) -> bool:
        return any(all(row[name] == value for name, value in what.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print("; ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
        with replaced(self.file) as path:
            path.write_text(json.dumps({"sizes": self.sizes, "notes": self.notes, "rows": self.rows}, indent=1))
        self.write()

    def write(self) -> None:
        if self.rows:
            self.file.with_suffix(".md").write_text(self.report(self.rows, self.notes))


def machine(peer: str | None) -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    import pyrosc

    own = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "pyro-ppl", "scikit-learn", "numpy"))
    note = f"{model}, one thread of {os.cpu_count()}, Python {platform.python_version()}; "
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
    parser.add_argument("--prepared", help="Kang's cells, for kang and unknown: as `kang.prepare` made them, or raw")
    parser.add_argument("--peer", help="a Python that has scvi-tools")
    parser.add_argument("--seeds", type=int, default=5, help="how many; 0, 1, ...")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="of simf")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rounds", type=int, default=15, help="of time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cells", type=int, help=argparse.SUPPRESS)  # for a quick look
    parser.add_argument("--genes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    if not given.prepared and {"kang", "unknown"} & set(given.part):
        parser.error("--prepared FILE is needed by the parts kang and unknown")
    if PEER in given.arms and not given.peer and given.part != ["time"]:
        print("scvi-tools is left out: --peer PYTHON", flush=True)
    warnings.simplefilter("ignore")
    given.out.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(given, name) for name in ("cells", "genes", "epochs")}
    out = Table(given.out, "labels", report, sizes, machine(given.peer))
    failed = []
    for unit in units(given):
        about = {"part": unit.part, "setting": unit.setting, "seed": unit.seed}
        arms = [a for a in unit.arms if a in given.arms and (a != PEER or given.peer) and not out.has(**about, arm=a)]
        data = unit.make() if arms else None
        for arm in arms:
            what = about | {"arm": arm}
            try:
                found = ask(given.peer if arm == PEER else sys.executable, arm, unit, data, given)
            except RuntimeError as error:
                failed.append(what)
                print(f"{what} failed:\n{error}", file=sys.stderr, flush=True)
                continue
            out.add(what | scores(unit, data, found))
    out.write()
    if failed:
        sys.exit(f"{len(failed)} failed, and are run again by the same command: {failed}")


if __name__ == "__main__":
    main()
