"""The marginal likelihood between bounds, and what the guide loses of it.

    python benchmarks/evidence.py --kang kang2000.h5ad --out benchmarks/results

Kang (2,792 cells of known donor, the 1,500 genes of highest rank among the 2,000 of ``kang.prepare``, batch = donor).
For each of five seeds 50 cells are held out and the rest are fitted with defaults. SIM-M: 50 cells with the columns and
totals of fitted ones, their states drawn from the prior and their counts from the decoder, so that both bounds are
known. Beside them the 50 held-out cells, of which only lower ones are. Nats a cell:

    ELBO, IWAE-10, -100, -5000     5,000 draws of the guide
    AIS                            16 chains of 500 steps from a Student t about the guide, 3 leapfrogs on average
    BDMC                           the same chains backwards from the true state (SIM-M alone)
    family gap                     AIS - ELBO of a normal guide refined for the cell alone (`Fit.refine`)
    amortisation gap               that ELBO - the encoder's

A cell's IWAE may lie above its AIS by luck where k-hat is above 0.7, as its largest weight then carries it: in means
over chains and draws both are below log p(x). One seed takes some 13 minutes of one core.

Lines, fixed before the run: mean AIS and mean BDMC of each seed's 50 cells within 0.2 nats; IWAE rises with its number
of draws (groups are nested, so this holds by construction unless the code is wrong); both gaps are reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch

import pyrosc
from pyrosc import Cells
from pyrosc.check import evidence, gaps

SETS = ("SIM-M", "held out")
BOUNDS = ("elbo", "iwae_10", "iwae_100", "iwae_5000", "ais", "bdmc")
NAMES = {
    "elbo": "ELBO", "iwae_10": "IWAE-10", "iwae_100": "IWAE-100", "iwae_5000": "IWAE-5000", "ais": "AIS",
    "bdmc": "BDMC", "gap": "BDMC - AIS", "family_gap": "family gap", "amortisation_gap": "amortisation gap",
    "elbo_full": "ELBO, refined, full covariance", "elbo_normal": "ELBO, refined, normal",
}  # fmt: skip
APART = 0.2  # nats


def prepared(path: Path, n_genes: int) -> Any:
    data = anndata.read_h5ad(path)
    data = data[data.obs["donor"] != "none"]
    rank = data.var["highly_variable_rank"].to_numpy(dtype=float)
    return data[:, np.sort(np.argsort(rank, kind="stable")[:n_genes])].copy()


def fitted(cells: Cells, n_cells: int, seed: int, file: Path) -> tuple[Any, Cells, Cells]:
    """The fit of a seed (kept in a file), n of its cells, and n held out."""
    order = np.random.default_rng(seed).permutation(len(cells))
    held, rest = cells[np.sort(order[:n_cells])], cells[np.sort(order[n_cells:])]
    if file.exists():
        fit = pyrosc.load(file)
    else:
        fit = pyrosc.fit(pyrosc.scvi(rest, seed=seed), rest, seed=seed, progress=False)
        fit.save(file)
    return fit, cells[np.sort(order[n_cells : 2 * n_cells])], held


def run(fit: Any, cells: Cells, name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = dict(
        n_draws=given.draws, n_chains=given.chains, n_steps=given.steps, n_leapfrogs=given.leapfrogs,
        simulate=name == "SIM-M", seed=seed, progress=given.progress,
    )  # fmt: skip
    began = time.perf_counter()
    if hasattr(fit, "refine"):
        table = gaps(fit, cells, families=("normal", "full"), n_elbo=300, **options)
    else:
        table = evidence(fit, cells, **options)
    print(seed, name, table.attrs["text"], flush=True)
    return {
        "seed": seed, "set": name, "seconds": round(time.perf_counter() - began, 1),
        "acceptance": round(table.attrs["acceptance"], 3), "mean": table.attrs["mean"], "se": table.attrs["se"],
        "cells": {k: [round(float(v), 3) for v in column] for k, column in table.items()},
    }  # fmt: skip


def lines(rows: list[dict[str, Any]]) -> list[str]:
    simulated = [r for r in rows if r["set"] == "SIM-M"]
    found = []
    if simulated:
        apart = [abs(r["mean"]["gap"]) for r in simulated]
        ok = sum(a <= APART for a in apart)
        each = np.abs(np.concatenate([r["cells"]["gap"] for r in simulated]))
        found.append(
            f"- AIS and BDMC within {APART:g} nats (means of a seed's cells): {ok} of {len(apart)} seeds "
            f"(apart by {', '.join(f'{a:.3f}' for a in apart)}); of single cells {np.mean(each <= APART):.0%}, median "
            f"{np.median(each):.3f}, largest {each.max():.2f}: {'met' if ok == len(apart) else 'missed'}."
        )
    keys = sorted((k for k in rows[0]["cells"] if k.startswith("iwae")), key=lambda k: int(k[5:]))
    rises = [np.diff([r["cells"][k] for k in ("elbo", *keys)], axis=0).min() >= -1e-3 for r in rows]
    found.append(f"- IWAE rises with draws in every cell: {sum(rises)} of {len(rows)} runs.")
    if all("family_gap" in r["mean"] for r in rows):
        for name in dict.fromkeys(r["set"] for r in rows):
            of = [r["mean"] for r in rows if r["set"] == name]
            told = [f"{NAMES[k]} {np.mean([m[k] for m in of]):.2f}" for k in ("family_gap", "amortisation_gap")]
            found.append(f"- {name}: {', '.join(told)} nats a cell.")
    else:
        found.append("- Gaps: not told, as this version has no `Fit.refine`.")
    return found


def page(rows: list[dict[str, Any]], given: argparse.Namespace) -> str:
    keys = [k for k in (*BOUNDS, "gap", "elbo_normal", "elbo_full", "family_gap", "amortisation_gap")
            if any(k in r["mean"] for r in rows)]  # fmt: skip
    text = [
        "# The marginal likelihood between bounds", "",
        "Made by `benchmarks/evidence.py`, which says how to read it. Means over cells in nats, then over "
        f"{len({r['seed'] for r in rows})} seed(s) (sd between them). One thread, torch {torch.__version__}.", "",
        "| | " + " | ".join(dict.fromkeys(r["set"] for r in rows)) + " |",
        "|---|" + "---|" * len({r["set"] for r in rows}),
    ]  # fmt: skip
    for key in keys:
        line = [NAMES[key]]
        for name in dict.fromkeys(r["set"] for r in rows):
            values = [r["mean"][key] for r in rows if r["set"] == name and key in r["mean"]]
            sd = f" ({np.std(values, ddof=1):.2f})" if len(values) > 1 else ""
            line.append(f"{np.mean(values):.2f}{sd}" if values else "")
        text.append("| " + " | ".join(line) + " |")
    frame = pd.DataFrame([{"set": r["set"], "k": k} for r in rows for k in r["cells"]["k_hat"]])
    for name, of in frame.groupby("set", sort=False):
        text.append(f"\n{name}: k-hat above 0.7 in {(of['k'] > 0.7).mean():.0%} of cells.")
    seconds = [r["seconds"] for r in rows]
    text += ["", *lines(rows), "", f"{given.chains} chains, {given.steps} steps; {np.median(seconds):.0f} s a run "
             f"of {given.cells} cells (median)."]  # fmt: skip
    return "\n".join(text) + "\n"


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["set"] for r in rows))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for ax, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names):
        of = [r["cells"] for r in rows if r["set"] == name]
        keys = [k for k in ("elbo", "elbo_normal", "elbo_full", *BOUNDS[1:]) if k in of[0] and k != "ais"]
        apart = [np.concatenate([np.subtract(c[k], c["ais"]) for c in of]) for k in keys]
        ax.boxplot(apart, whis=(5, 95), showfliers=False, widths=0.6)
        ax.axhline(0, color="C0", lw=0.8)
        labels = [NAMES[k].replace("ELBO, refined, ", "refined,\n") for k in keys]
        ax.set_xticks(range(1, len(keys) + 1), labels, rotation=45, ha="right")
        ax.set_yscale("symlog", linthresh=1.0)
        ax.set(title=name, ylabel="bound - AIS, nats")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kang", type=Path, required=True, help="2,000 genes, as kang.prepare makes it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--genes", type=int, default=1500)
    parser.add_argument("--cells", type=int, default=50)
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--leapfrogs", type=int, default=3)
    parser.add_argument("--fits", type=Path, help="folder to keep the fits in; the output folder if left out")
    parser.add_argument("--progress", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", pyrosc.PyroscWarning)
    given.out.mkdir(parents=True, exist_ok=True)
    fits = given.fits or given.out
    fits.mkdir(parents=True, exist_ok=True)
    file = given.out / "evidence.json"
    asked = {k: getattr(given, k) for k in ("genes", "cells", "draws", "chains", "steps", "leapfrogs")}
    made = json.loads(file.read_text()) if file.exists() else {"asked": asked, "runs": []}
    if made["asked"] != asked:
        parser.error(f"{file} was made with {made['asked']}; use another --out")
    rows = made["runs"]
    cells = Cells.from_anndata(prepared(given.kang, given.genes), batch="donor")
    for seed in given.seeds:
        wanted = [name for name in given.sets if (seed, name) not in {(r["seed"], r["set"]) for r in rows}]
        if not wanted:
            continue
        fit, like, held = fitted(cells, given.cells, seed, fits / f"evidence_{seed}.safetensors")
        for name in wanted:
            rows.append(run(fit, like if name == "SIM-M" else held, name, seed, given))
            machine = f"{platform.processor() or platform.machine()}, one thread"
            made |= {"machine": machine, "pyrosc": pyrosc.__version__, "runs": rows}
            file.write_text(json.dumps(made, indent=1))
    rows = sorted(rows, key=lambda r: (SETS.index(r["set"]), r["seed"]))
    (given.out / "evidence.md").write_text(page(rows, given))
    picture(rows, given.out / "evidence.png")
    print(page(rows, given))


if __name__ == "__main__":
    main()
