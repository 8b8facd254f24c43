"""Are doublets, unseen types, soup and scrambled cells found, and are sound cells left in peace?

    python benchmarks/outliers.py --kang kang2000.h5ad --out benchmarks/results

SIM-A (`pyrosc.simulate.tissue`, one for each seed: 4,000 cells x 1,000 genes, 8 types, 3 batches) and, if its file is
given (2,000 genes, as ``kang.prepare`` makes it), Kang. Seven tenths of the cells are fitted, thinned by half; of the
rest (at most 600 on SIM-A) all are asked, with a quarter as many strange ones of one kind, a fifth of what is asked:

    doublets         sums of two cells of different types in one batch (a donor, on Kang)
    shallow doublets the same, each count kept with probability 1/2: their totals say nothing
    ambient          each count kept with probability 0.7, and Poisson counts of the batch's mean profile for the rest
    permuted         counts of a cell dealt out to the genes at random
    unseen           a second fit without the cells of one type, another for each seed; the cells of that type

Area under the curve of telling them from sound cells: by `Fit.outliers` ("p", and each of its parts), by raw
-log p(x) of the kept counts (20 importance draws), by total counts and genes seen; and the same within tenths of the
total, where depth cannot help ("given total": mean over tenths, by pairs). What is called at ``fdr=0.1``, and how many
of those are sound.

Sound cells alone: those held out, and cells that the fit makes up from their states and totals, which are sound by
construction (on Kang a held-out "sound" cell may be a doublet of one donor, which its barcodes cannot show). Every call
there is false, so that the false discovery rate at 0.1 is the share of sets with any call; each of 100 random sets of
200 of the cells is one.

Lines, fixed before the run: area for doublets at least 0.1 above that of totals; the false discovery rate at 0.1 held
on sound cells. Runs that are in the file are not repeated.
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
from effects import table
from scipy import sparse, stats

import pyrosc
from pyrosc import Cells
from pyrosc.outliers import judged, scored

SEEDS = (0, 1, 2, 3, 4)
KINDS = ("doublets", "shallow doublets", "ambient", "permuted", "unseen")
SCORES = ("p", "p_counts", "p_genes", "p_state", "p_total", "-log p(x)", "total", "genes seen")
UNSEEN = {
    "SIM-A": ("type2", "type0", "type5", "type1", "type3"), "Kang": ("NK", "B", "CD8 T", "CD16 Mono", "DC"),
}  # fmt: skip
DRAWS = 20
FDR = 0.1


def area(score: np.ndarray, is_strange: np.ndarray) -> float:
    rank = stats.rankdata(score)
    n = int(is_strange.sum())
    return float((rank[is_strange].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def area_given(score: np.ndarray, is_strange: np.ndarray, tenth: np.ndarray) -> float:
    """Mean of areas within tenths of the total, weighted by pairs; nan where none has both kinds."""
    found, pairs = [], []
    for t in np.unique(tenth):
        here = tenth == t
        n = int(is_strange[here].sum())
        if 0 < n < here.sum():
            found.append(area(score[here], is_strange[here]))
            pairs.append(n * (int(here.sum()) - n))
    return float(np.average(found, weights=pairs)) if found else float("nan")


def asked_of(fit: Any, x: Any, obs: pd.DataFrame, var: pd.DataFrame) -> pd.DataFrame:
    """Scores of each cell by itself, and what others would judge it by."""
    obs = obs.copy()
    obs.index = [f"asked{i}" for i in range(len(obs))]
    cells = Cells.align(anndata.AnnData(x, obs=obs, var=var), fit.schema)
    found = scored(fit, cells, 0.5, DRAWS, 0)
    found["-log p(x)"] = -fit.log_likelihood(cells.thin(0.5, seed=0)[0], DRAWS)
    found["total"] = np.asarray(x.sum(1)).ravel()
    found["genes seen"] = np.asarray((x > 0).sum(1)).ravel()
    return found


def told(kind: str, scores: pd.DataFrame, is_strange: np.ndarray) -> dict[str, Any]:
    found = judged(scores, FDR)
    found[["-log p(x)", "total", "genes seen"]] = scores[["-log p(x)", "total", "genes seen"]]
    tenth = pd.qcut(scores["total"], 10, labels=False, duplicates="drop").to_numpy()
    row: dict[str, Any] = {"strange": kind, "n": int(is_strange.sum()), "n_sound": int((~is_strange).sum())}
    for name in SCORES:
        value = found[name].to_numpy() * (-1 if name.startswith("p") else 1)
        row[name] = area(value, is_strange)
        row[f"{name} given total"] = area_given(value, is_strange, tenth)
    called = found["is_outlier"].to_numpy()
    row["called"], row["called, sound"] = int(called.sum()), int((called & ~is_strange).sum())
    low = found["p"].to_numpy() < 0.05
    row["tenths"] = [
        {
            "sound": int((~is_strange)[tenth == t].sum()),
            "sound p < .05": int((low & ~is_strange)[tenth == t].sum()),
            "called": int(called[tenth == t].sum()), "called, sound": int((called & ~is_strange)[tenth == t].sum()),
        }
        for t in range(10)
    ]  # fmt: skip
    return row


def of_sound(which: str, scores: pd.DataFrame, seed: int) -> dict[str, Any]:
    found = judged(scores, FDR)
    draw = np.random.default_rng([seed, 1])
    sets = []
    for _ in range(100):
        chosen = scores.iloc[draw.permutation(len(scores))[:200]]
        chosen.attrs = scores.attrs
        sets.append(bool(judged(chosen, FDR)["is_outlier"].any()))
    return {
        "sound": which, "n": len(found), "p < .05": float((found["p"] < 0.05).mean()),
        "p < .005": float((found["p"] < 0.005).mean()), "called": int(found["is_outlier"].sum()),
        "sets with a call": float(np.mean(sets)),
    }  # fmt: skip


def strange_cells(
    data: Any, rows: np.ndarray, batch: str, train: np.ndarray, n: int, draw: np.random.Generator
) -> dict[str, tuple[Any, np.ndarray]]:
    """Counts of strange cells by kind, and the row that each has its columns of."""
    x = sparse.csr_matrix(data.X)
    kind, place = (data.obs[c].astype(str).to_numpy() for c in ("cell_type", batch))
    one, two = draw.choice(rows, 50 * n), draw.choice(rows, 50 * n)
    pairs = (kind[one] != kind[two]) & (place[one] == place[two])
    one, two = one[pairs][:n], two[pairs][:n]
    both = (x[one] + x[two]).tocsr()

    def thinned(counts: Any, share: float) -> Any:
        kept = counts.copy()
        kept.data = draw.binomial(kept.data.astype(int), share).astype(np.float32)
        kept.eliminate_zeros()
        return kept

    some = draw.choice(rows, n, replace=False)
    profiles = {}
    for level in np.unique(place):
        mean = np.asarray(x[train[place[train] == level]].sum(0)).ravel()
        profiles[level] = mean / mean.sum()
    soup = np.stack([draw.poisson(0.3 * x[i].sum() * profiles[place[i]]) for i in some])
    ambient = (thinned(x[some], 0.7) + sparse.csr_matrix(soup.astype(np.float32))).tocsr()
    dense = x[some].toarray()
    permuted = sparse.csr_matrix(np.stack([draw.permutation(row) for row in dense]))
    return {
        "doublets": (both, one), "shallow doublets": (thinned(both, 0.5), one), "ambient": (ambient, some),
        "permuted": (permuted, some),
    }  # fmt: skip


def made_up(fit: Any, x: Any, obs: pd.DataFrame, var: pd.DataFrame, seed: int) -> Any:
    """Counts of the story for states read from the kept half of these cells, at their totals."""
    obs = obs.copy()
    obs.index = [f"like{i}" for i in range(len(obs))]
    cells = Cells.align(anndata.AnnData(x, obs=obs, var=var), fit.schema)
    z = fit.latent(cells.thin(0.5, seed=seed)[0], 1, seed=seed)[0]
    return sparse.csr_matrix(fit.program.generate(cells, fixed={"z": torch.as_tensor(z)}, seed=seed)["x"].numpy())


def one_run(name: str, data: Any, batch: str, seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    order = draw.permutation(data.n_obs)
    cut = int(0.7 * data.n_obs)
    train, test = np.sort(order[:cut]), np.sort(order[cut:])
    if len(test) > 1000:
        test = np.sort(draw.choice(test, 600, replace=False))
    x, kind = sparse.csr_matrix(data.X), data.obs["cell_type"].astype(str).to_numpy()

    def fitted(rows: np.ndarray) -> Any:
        cells = Cells.from_anndata(data[rows].copy(), batch=batch).thin(0.5, seed=seed)[0]
        return pyrosc.fit(pyrosc.scvi(cells, seed=seed), cells, seed=seed, progress=False)

    began = time.perf_counter()
    fit = fitted(train)
    strange = strange_cells(data, test, batch, train, len(test) // 4, draw)
    made = made_up(fit, x[test], data.obs.iloc[test], data.var, seed)
    parts = [x[test], made, *(counts for counts, _ in strange.values())]
    rows = np.concatenate([test, test, *(of for _, of in strange.values())])
    every = asked_of(fit, sparse.vstack(parts).tocsr(), data.obs.iloc[rows], data.var)
    ends = np.cumsum([part.shape[0] for part in parts])
    pieces = [every.iloc[start:end] for start, end in zip([0, *ends[:-1]], ends)]

    def together(chosen: list[pd.DataFrame]) -> pd.DataFrame:
        joined = pd.concat(chosen)
        joined.attrs = every.attrs
        return joined

    result: dict[str, Any] = {"data": name, "seed": seed, "strange": [], "sound": []}
    for which, piece in zip(("held out", "made up"), pieces[:2]):
        result["sound"].append(of_sound(which, together([piece]), seed))
    for what, piece in zip(strange, pieces[2:]):
        scores = together([pieces[0], piece])
        result["strange"].append(told(what, scores, np.arange(len(scores)) >= len(test)))
    unseen = UNSEEN[name][seed % len(UNSEEN[name])]
    fit = fitted(train[kind[train] != unseen])
    scores = asked_of(fit, x[test], data.obs.iloc[test], data.var)
    result["strange"].append(told("unseen", scores, kind[test] == unseen) | {"type": unseen})
    return result | {"seconds": time.perf_counter() - began}


# ---- tables -----------------------------------------------------------------------------------


def spread(values: Any) -> str:
    values = np.asarray(values, dtype=float)
    sd = f" (sd {values.std(ddof=1):.3f})" if len(values) > 1 else ""
    return f"{values.mean():.3f}{sd}"


def report(runs: list[dict[str, Any]], note: str) -> str:
    strange = pd.DataFrame([{"data": r["data"], "seed": r["seed"]} | row for r in runs for row in r["strange"]])
    sound = pd.DataFrame([{"data": r["data"], "seed": r["seed"]} | row for r in runs for row in r["sound"]])
    lines = ["# Outliers", "", note, ""]
    order = [(d, k) for d in strange["data"].unique() for k in KINDS]
    groups = {key: strange[(strange["data"] == key[0]) & (strange["strange"] == key[1])] for key in order}
    for title, suffix in (("Areas under the curve", ""), ("The same given the total", " given total")):
        names = [n for n in SCORES if not (suffix and n == "total")]
        rows = [
            {"data": d, "strange": k, "seeds": len(of)} | {n: spread(of[f"{n}{suffix}"]) for n in names}
            for (d, k), of in groups.items()
        ]
        lines += [f"## {title}", "", *table(pd.DataFrame(rows)), ""]
    rows = []
    for (d, k), of in groups.items():
        false = of["called, sound"] / of["called"].clip(lower=1)
        rows.append({
            "data": d, "strange": k, "strange cells": int(of["n"].sum()), "called": int(of["called"].sum()),
            "called, sound": int(of["called, sound"].sum()), "false discovery rate, mean over seeds": spread(false),
            "found": spread((of["called"] - of["called, sound"]) / of["n"]),
        })  # fmt: skip
    lines += [f"## Calls at fdr = {FDR}", "", *table(pd.DataFrame(rows)), ""]
    rows = []
    for (d, s), of in sound.groupby(["data", "sound"], sort=False):
        rows.append({
            "data": d, "sound cells": s, "seeds": len(of), "n": int(of["n"].sum()), "p < .05": spread(of["p < .05"]),
            "p < .005": spread(of["p < .005"]), "called": int(of["called"].sum()),
            "sets of 200 with a call": spread(of["sets with a call"]),
        })  # fmt: skip
    lines += ["## Sound cells alone", "", *table(pd.DataFrame(rows)), ""]
    rows = []
    for (d, k), of in groups.items():
        if k in ("doublets", "unseen"):
            summed = [{n: sum(t[i][n] for t in of["tenths"]) for n in of["tenths"].iloc[0][0]} for i in range(10)]
            rows.append(
                {"data": d, "strange": k, "what": "share of sound cells with p < .05"}
                | {str(i + 1): f"{t['sound p < .05'] / max(t['sound'], 1):.3f}" for i, t in enumerate(summed)}
            )
            rows.append(
                {"data": d, "strange": k, "what": "called (of them sound)"}
                | {str(i + 1): f"{t['called']} ({t['called, sound']})" for i, t in enumerate(summed)}
            )
    lines += ["## By tenths of the total, shallowest first", "", *table(pd.DataFrame(rows)), ""]
    lines += ["## Lines", ""]
    for d in strange["data"].unique():
        of = groups[d, "doublets"]
        ahead = of["p"] - of["total"]
        verdict = "held" if ahead.mean() >= 0.1 else "missed"
        lines.append(f"- {d}: area for doublets is {spread(ahead)} above that of totals (line: 0.1): {verdict}.")
        for s in ("held out", "made up"):
            rate = sound[(sound["data"] == d) & (sound["sound"] == s)]["sets with a call"]
            verdict = "held" if rate.mean() <= FDR else "missed"
            lines.append(f"- {d}, sound cells {s}: {spread(rate)} of sets have a call (line: {FDR}): {verdict}.")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kang", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="only write the table of the runs that are there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "outliers.json"
    held = json.loads(file.read_text()) if file.exists() else {}
    runs: list[dict[str, Any]] = held["runs"] if isinstance(held, dict) and "runs" in held else []
    kang = None
    if given.kang:
        kang = anndata.read_h5ad(given.kang)
        kang = kang[kang.obs["donor"] != "none"].copy()
    for seed in [] if given.table else given.seeds:
        for name in ("Kang", "SIM-A"):
            if (name == "Kang" and kang is None) or any((r["data"], r["seed"]) == (name, seed) for r in runs):
                continue
            data, batch = (kang, "donor") if name == "Kang" else (pyrosc.simulate.tissue(seed=seed), "batch")
            runs.append(one_run(name, data, batch, seed))
            last = {row["strange"]: (round(row["p"], 3), round(row["total"], 3)) for row in runs[-1]["strange"]}
            print(name, seed, f"{runs[-1]['seconds']:.0f} s", last, flush=True)
            file.write_text(json.dumps({"torch": torch.__version__, "runs": runs}, indent=1))
    runs.sort(key=lambda r: (r["data"], r["seed"]))
    note = f"{DRAWS} draws; mean over seeds and standard deviation between them; one thread, torch {torch.__version__}."
    text = report(runs, f"Made by `benchmarks/outliers.py`, which says what each column is. {note}")
    (given.out / "outliers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
