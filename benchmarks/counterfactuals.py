"""Counterfactuals on Kang: the stimulated cells of a type are held out and predicted from its control cells.

    python benchmarks/counterfactuals.py ../shared/data/kang_pbmc_ifnb.h5ad --out benchmarks/results

In these data the lane is the condition, so what is called stimulation here is whatever tells the two lanes apart. The
task is to predict cells of a combination (type, lane) that no fit has seen. Nothing is said about a treatment.

Each of eight major types in turn: its stimulated cells are left out; 2,000 variable genes (seurat_v3) are chosen and
`pyrosc.scvi` (batch = donor, categorical = condition) is fitted on all other cells, with ``ensemble=5`` on resampled
specimens (a specimen is a donor under a condition). States are read from control cells of the type, decoded under
the other condition, and counts are drawn at the totals of the held-out cells (their totals and their number are all
that is used of them). Drawn counts are transformed as the data are (per 10,000 of the modelled genes, log1p) and then
averaged: the log of rho is another quantity and is never compared with these.

    control             mean of the type's control cells
    shift               that plus the mean shift of the seven other types
    pyrosc              decoded with do={"condition": "stim"}, members of the ensemble in turn
    single fit          the same of the fit that the ensemble started from
    control + effect    control plus what pyrosc predicts under one condition less what it predicts under the other
    latent shift        another fit without the condition: z plus the mean shift of z in the other types, decoded
                        (Lotfollahi et al. 2019, Nature Methods 16:715)
    half                mean of one half of the held-out cells, scored on the other

Scored over genes: R2 is scikit-learn's ``r2_score``; squared Pearson correlation stands beside, as papers report
either. Over all genes on all held-out cells; over the top 100, chosen by Wilcoxon on a half of the held-out cells
against the type's control cells and scored on the other half, each half in turn, five splits. ``half`` is a
pessimistic ceiling where cells are few.

Intervals: 90 % predictive intervals of the held-out mean. A draw takes a member of the ensemble (decoder), donors
with replacement and as many control cells of theirs as were held out (donors, cells), z of each, and counts.
The shift's are quantiles of a bootstrap with the same steps: donors with replacement for all types at once, as many
control cells of theirs as were held out, plus the shift of those donors. Judged over genes with a mean of at least 0.1
counts in the cells that were seen. Score of an interval: its width plus 20 times by how much it misses (Gneiting and
Raftery 2007).

Negative control: control cells alone, their donors split at random into two pseudo-conditions; cells of a type are
held out in one of them. There is no common effect to find, only differences of donors.

Set before any run:

1. R2 of pyrosc is not below the shift's by more than 0.02 on any type; over all genes, and over the top 100.
2. It is above the shift's by at least 0.03 on CD14 monocytes and on DC; likewise over both.
3. Its intervals cover the held-out mean of 85 to 95 % of genes, on each type.
4. Their score, averaged over types, is no worse than that of the shift's.
5. Negative control: R2 is not below control's by more than 0.02 (all genes), 3 holds, and the 90 % intervals of
   `Fit.counterfactual` leave out 0 for at most 15 % of genes.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from scipy import stats
from sklearn.metrics import r2_score

import pyrosc
from pyrosc import Cells, Fit

MAJOR = {
    "CD14 Mono": ["CD14 Mono"],
    "CD4 T": ["CD4 Naive T", "CD4 Memory T"],
    "CD16 Mono": ["CD16 Mono"],
    "B": ["B", "B Activated"],
    "CD8 T": ["CD8 T"],
    "T activated": ["T activated"],
    "NK": ["NK"],
    "DC": ["DC"],
}
AHEAD_ON = ("CD14 Mono", "DC")
ARMS = ("control", "shift", "pyrosc", "single fit", "control + effect", "latent shift", "half")
N_TOP, N_SPLITS, LEVEL = 100, 5, 0.9

Rows = list[dict[str, Any]]


def read(path: str) -> anndata.AnnData:
    """Cells of known donors, with their major type in "kind"."""
    adata = sc.read_h5ad(path)
    adata = adata[adata.obs["donor"] != "none"].copy()
    kind_of = {name: kind for kind, names in MAJOR.items() for name in names}
    adata.obs["kind"] = [kind_of.get(name, name) for name in adata.obs["cell_type"].astype(str)]
    adata.obs["donor"] = adata.obs["donor"].astype(str).to_numpy()
    adata.obs["condition"] = adata.obs["condition"].astype(str).to_numpy()
    return adata


def pseudo(adata: anndata.AnnData, seed: int) -> anndata.AnnData:
    """Control cells, with donors split at random into two conditions that differ by nothing else."""
    control = adata[adata.obs["condition"] == "ctrl"].copy()
    donors = np.random.default_rng([seed, 17]).permutation(control.obs["donor"].unique())
    first = control.obs["donor"].isin(donors[: len(donors) // 2])
    control.obs["condition"] = np.where(first, "ctrl", "stim")
    return control


def with_genes(adata: anndata.AnnData, seen: np.ndarray, n_genes: int) -> anndata.AnnData:
    """Variable genes of the cells that are seen, as scanpy chooses them."""
    if adata.n_vars <= n_genes:
        return adata
    part = adata[seen].copy()
    sc.pp.highly_variable_genes(part, n_top_genes=n_genes, flavor="seurat_v3")
    return adata[:, part.var["highly_variable"].to_numpy()].copy()


def logs(x: Any) -> np.ndarray:
    """log1p of counts per 10,000."""
    x = np.asarray(x, dtype=float)
    return np.log1p(1e4 * x / np.maximum(x.sum(1, keepdims=True), 1.0))


# ---- predictions ------------------------------------------------------------------------------


def slots(controls: Cells, targets: Cells, n_draws: int, bootstrap: bool, seed: int) -> Iterator[Cells]:
    """As many cells as there are targets: counts and donors of control cells, totals of the targets, paired at random.

    The encoder reads the counts, the story the totals and donors. With ``bootstrap`` donors are drawn with replacement
    and control cells from theirs; else every control cell comes equally often.
    """
    donors, counts = controls.obs["donor"].to_numpy(), controls.x.numpy()
    names = np.unique(donors)
    for s in range(n_draws):
        draw = np.random.default_rng([seed, s])
        if bootstrap:
            pool = np.concatenate([np.flatnonzero(donors == d) for d in draw.choice(names, len(names))])
            rows = draw.choice(pool, len(targets))
        else:
            rows = np.resize(draw.permutation(len(controls)), len(targets))
        shuffled = targets[draw.permutation(len(targets))]
        yield shuffled.with_counts(counts[rows]).do(donor=list(donors[rows]))


def predicted(fits: list[Fit], each: Iterator[Cells], condition: str) -> np.ndarray:
    """(S, G) mean over the cells of a draw of transformed counts; fits in turn."""
    do = {"condition": condition}
    return np.stack([logs(fits[s % len(fits)].predict(c, do=do, seed=s)[0]).mean(0) for s, c in enumerate(each)])


def by_latent_shift(fit: Fit, each: Iterator[Cells], shift: np.ndarray) -> np.ndarray:
    """(S, G) the same with states moved by ``shift`` (K,) and decoded by a fit that knows no condition."""
    found = []
    for s, cells in enumerate(each):
        z = torch.as_tensor(fit.latent(cells, 1, seed=s)[0] + shift, dtype=torch.float32)
        found.append(logs(fit.program.generate(cells, fixed={"z": z}, seed=s)["x"].numpy()).mean(0))
    return np.stack(found)


def mean_shift(values: np.ndarray, obs: pd.DataFrame, others: list[str], weight: np.ndarray | None = None) -> Any:
    """Mean over types of (mean of stimulated - mean of control), types alike; None if no type has both."""
    weight = np.ones(len(values)) if weight is None else weight
    shifts = []
    for kind in others:
        means = []
        for condition in ("stim", "ctrl"):
            own = ((obs["kind"] == kind) & (obs["condition"] == condition)).to_numpy() & (weight > 0)
            if own.any():
                means.append(np.average(values[own], axis=0, weights=weight[own]))
        if len(means) == 2:
            shifts.append(means[0] - means[1])
    return np.mean(shifts, 0) if shifts else None


def bootstrapped_shift(
    values: np.ndarray, obs: pd.DataFrame, kind: str, others: list[str], n_cells: int, n_draws: int, seed: int
) -> np.ndarray:
    """(S, G) predictive draws of the shift: donors for all types at once, and ``n_cells`` control cells of theirs."""
    donors = obs["donor"].to_numpy()
    control = ((obs["kind"] == kind) & (obs["condition"] == "ctrl")).to_numpy()
    # Donors with control cells of this type; where conditions share no donors, the others are drawn apart.
    here = np.unique(donors[control])
    rest = np.setdiff1d(np.unique(donors), here)
    found = []
    for s in range(n_draws):
        draw = np.random.default_rng([seed, s, 5])
        shift = None
        while shift is None:
            chosen = draw.choice(here, len(here))
            further = draw.choice(rest, len(rest)) if len(rest) else rest
            weight = pd.Series([*chosen, *further]).value_counts().reindex(donors).fillna(0).to_numpy()
            shift = mean_shift(values, obs, others, weight)
        pool = np.concatenate([np.flatnonzero(control & (donors == d)) for d in chosen])
        found.append(values[draw.choice(pool, n_cells)].mean(0) + shift)
    return np.stack(found)


# ---- scores -----------------------------------------------------------------------------------


def agreement(truth: np.ndarray, guess: np.ndarray, name: str) -> dict[str, float]:
    return {
        f"R2 {name}": float(r2_score(truth, guess)),
        f"r2 {name}": float(np.corrcoef(truth, guess)[0, 1] ** 2),
    }


def top(held: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Genes that differ most by Wilcoxon; where p is zero, by the share of pairs in order."""
    u, p = stats.mannwhitneyu(held, control, axis=0)
    size = np.abs(u / (len(held) * len(control)) - 0.5)
    return np.lexsort((-size, np.nan_to_num(p, nan=1.0)))[:N_TOP]


def scored(guesses: dict[str, np.ndarray], held: np.ndarray, control: np.ndarray, seed: int) -> dict[str, Any]:
    """R2 and r2 of each arm: all genes and all held-out cells; top genes by halves."""
    rows: dict[str, Any] = {arm: agreement(held.mean(0), guess, "all") for arm, guess in guesses.items()}
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in [*guesses, "half"]}
    for split in range(N_SPLITS):
        order = np.random.default_rng([seed, split, 3]).permutation(len(held))
        halves = order[: len(held) // 2], order[len(held) // 2 :]
        for one, two in (halves, halves[::-1]):
            genes, truth = top(held[one], control), held[two].mean(0)
            for arm, guess in guesses.items():
                found[arm].append(agreement(truth[genes], guess[genes], "top"))
            half = held[one].mean(0)
            found["half"].append(agreement(truth[genes], half[genes], "top") | agreement(truth, half, "all"))
    for arm, values in found.items():
        rows[arm] = rows.get(arm, {}) | {key: float(np.mean([v[key] for v in values])) for key in values[0]}
    return rows


def judged(ends: tuple[np.ndarray, np.ndarray], truth: np.ndarray, genes: np.ndarray) -> dict[str, float]:
    low, high = (end[genes] for end in ends)
    y = truth[genes]
    missed = np.maximum(low - y, 0) + np.maximum(y - high, 0)
    return {
        "coverage": float(((low <= y) & (y <= high)).mean()),
        "width": float((high - low).mean()),
        "interval score": float((high - low + 2 / (1 - LEVEL) * missed).mean()),
    }


def one_type(adata: anndata.AnnData, kind: str, task: str, seed: int, given: argparse.Namespace) -> Rows:
    """All arms for one type held out; ``task`` is "stim" or names a split of donors."""
    kind_of, condition = adata.obs["kind"].to_numpy(), adata.obs["condition"].to_numpy()
    is_held = (kind_of == kind) & (condition == "stim")
    adata = with_genes(adata, ~is_held, given.genes)
    adata.obs["specimen"] = adata.obs["donor"].astype(str) + "_" + adata.obs["condition"].astype(str)
    x = adata.X.toarray()
    values, obs = logs(x), adata.obs[["kind", "donor", "condition"]].astype(str)
    is_control = (kind_of == kind) & (condition == "ctrl")
    others = [k for k in MAJOR if k != kind]
    seen_obs, seen = obs[~is_held], values[~is_held]
    much = x[~is_held].mean(0) >= 0.1
    held, control = values[is_held], values[is_control]

    roles = dict(batch="donor", sample="specimen", label="kind")
    cells = Cells.from_anndata(adata[~is_held], categorical=["condition"], **roles)
    began = time.perf_counter()
    options = dict(seed=seed, epochs=given.epochs, progress=False)
    ensemble = pyrosc.fit(pyrosc.scvi(cells, seed=seed), cells, ensemble=given.members, **options)
    seconds = time.perf_counter() - began
    single = Fit(ensemble.program, ensemble.history, ensemble.settings)
    members = [Fit(member, ensemble.history, ensemble.settings) for member in ensemble.members]
    plain = Cells.from_anndata(adata[~is_held], **roles)
    unaware = pyrosc.fit(pyrosc.scvi(plain, seed=seed), plain, **options)

    controls, targets = cells[is_control[~is_held]], Cells.align(adata[is_held], cells.schema)
    few = max(given.draws // 4, given.members)

    def each(bootstrap: bool, n_draws: int = few) -> Iterator[Cells]:
        return slots(controls, targets, n_draws, bootstrap, seed)

    stim, ctrl = predicted(members, each(False), "stim"), predicted(members, each(False), "ctrl")
    z_shift = mean_shift(unaware.latent(plain), seen_obs, others)
    shift = mean_shift(seen, seen_obs, others)
    guesses = {
        "control": control.mean(0),
        "shift": control.mean(0) + shift,
        "pyrosc": stim.mean(0),
        "single fit": predicted([single], each(False), "stim").mean(0),
        "control + effect": control.mean(0) + stim.mean(0) - ctrl.mean(0),
        "latent shift": by_latent_shift(unaware, each(False), z_shift).mean(0),
    }
    scores = scored(guesses, held, control, seed)

    draws = predicted(members, each(True, given.draws), "stim")
    alone = predicted([single], each(True, given.draws), "stim")
    moved = bootstrapped_shift(seen, seen_obs, kind, others, len(held), given.draws, seed)
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    _, low, high = ensemble.spread(draws, LEVEL, member=np.arange(len(draws)) % len(members), least=0.0)
    truth = held.mean(0)
    intervals = {
        "pyrosc": judged((low, high), truth, much),
        "single fit": judged(tuple(np.quantile(alone, ends, axis=0)), truth, much),
        "shift": judged(tuple(np.quantile(moved, ends, axis=0)), truth, much),
    }
    table = ensemble.counterfactual(controls, {"condition": "stim"}, n_draws=50, interval=LEVEL)
    table = table.loc[list(cells.schema.genes)]
    changed = ((table["lfc_lower"] > 0) | (table["lfc_upper"] < 0)).to_numpy()[much].mean()
    facts = {
        "task": task, "type": kind, "seed": seed, "n_control": len(control), "n_held": len(held),
        "n_genes": adata.n_vars, "n_judged": int(much.sum()), "seconds": seconds, "changed": float(changed),
    }  # fmt: skip
    return [facts | {"arm": arm} | scores[arm] | intervals.get(arm, {}) for arm in ARMS]


# ---- report -----------------------------------------------------------------------------------


def markdown(frame: pd.DataFrame) -> list[str]:
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|---" * len(frame.columns) + "|"]
    for row in frame.itertuples(index=False):
        shown = ("" if v != v else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row)
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def mean_table(frame: pd.DataFrame, value: str, arms: tuple[str, ...]) -> pd.DataFrame:
    """Types by arms, averaged over seeds."""
    found = frame[frame["arm"].isin(arms)].pivot_table(index=["task", "type"], columns="arm", values=value, sort=False)
    return found[[a for a in arms if a in found]]


def lines_of(frame: pd.DataFrame) -> pd.DataFrame:
    """The lines that were set, what was found, and whether they hold."""
    found: list[tuple[str, str, bool]] = []
    real, null = frame[frame["task"] == "stim"], frame[frame["task"] != "stim"]
    with_intervals = ("pyrosc", "shift")
    for genes in ("all", "top") if len(real) else ():
        table = mean_table(real, f"R2 {genes}", ARMS).droplevel("task")
        ahead = table["pyrosc"] - table["shift"]
        worst = ahead.idxmin()
        found.append((f"1. R2 ({genes}) >= shift - 0.02 on every type", f"least {ahead[worst]:+.3f} on {worst}",
                      bool((ahead >= -0.02).all())))  # fmt: skip
        asked = ahead.reindex([k for k in AHEAD_ON if k in ahead])
        if len(asked):
            text = ", ".join(f"{k} {v:+.3f}" for k, v in asked.items())
            found.append((f"2. R2 ({genes}) >= shift + 0.03 on {' and '.join(asked.index)}", text,
                          bool((asked >= 0.03).all())))  # fmt: skip
    if len(real):
        table = mean_table(real, "coverage", with_intervals).droplevel("task")["pyrosc"]
        inside = table.between(0.85, 0.95)
        found.append(("3. coverage 85-95 % on every type", f"{table.min():.1%} to {table.max():.1%}, {inside.sum()} of "
                      f"{len(table)} inside", bool(inside.all())))  # fmt: skip
        score = mean_table(real, "interval score", with_intervals).mean()
        found.append(("4. interval score <= shift's", f"{score['pyrosc']:.3f} against {score['shift']:.3f}",
                      bool(score["pyrosc"] <= score["shift"])))  # fmt: skip
    if len(null):
        table = mean_table(null, "R2 all", ARMS)
        ahead = table["pyrosc"] - table["control"]
        found.append(("5. pseudo-conditions: R2 >= control - 0.02", f"least {ahead.min():+.3f}",
                      bool((ahead >= -0.02).all())))  # fmt: skip
        coverage = mean_table(null, "coverage", with_intervals)["pyrosc"]
        found.append(("5. pseudo-conditions: coverage 85-95 %", f"{coverage.min():.1%} to {coverage.max():.1%}",
                      bool(coverage.between(0.85, 0.95).all())))  # fmt: skip
        changed = mean_table(null, "changed", ("pyrosc",))["pyrosc"]
        found.append(("5. pseudo-conditions: at most 15 % of genes changed", f"{changed.min():.1%} to "
                      f"{changed.max():.1%}", bool((changed <= 0.15).all())))  # fmt: skip
    return pd.DataFrame([(a, b, "holds" if c else "fails") for a, b, c in found], columns=["line", "found", ""])


def report(rows: Rows, note: str) -> str:
    frame = pd.DataFrame(rows)
    text = [
        "# Kang: stimulated cells of a type, predicted from its control cells", "",
        "Lane and condition are the same split in these data: nothing here is a claim about a treatment.", "", note,
        "", "## The lines", "", *markdown(lines_of(frame)), "",
    ]  # fmt: skip
    for genes, name in (("all", "all genes"), ("top", "top 100, chosen on one half and scored on the other")):
        for value, what in ((f"R2 {genes}", "R2 (scikit-learn)"), (f"r2 {genes}", "squared Pearson correlation")):
            text += [f"## {what}, {name}", "", *markdown(mean_table(frame, value, ARMS).reset_index()), ""]
    with_intervals = ("pyrosc", "single fit", "shift")
    for value in ("coverage", "interval score", "width"):
        title = f"## {value.capitalize()} of 90 % predictive intervals of the held-out mean"
        text += [title, "", *markdown(mean_table(frame, value, with_intervals).reset_index()), ""]
    facts = frame[frame["arm"] == "pyrosc"].groupby(["task", "type"], sort=False)
    columns = ["n_control", "n_held", "n_genes", "n_judged", "changed", "seconds"]
    text += ["## Cells, and share of judged genes whose 90 % interval of log2 fold change leaves out 0", "",
             *markdown(facts[columns].mean().reset_index()), ""]  # fmt: skip
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--types", nargs="*", default=list(MAJOR), choices=list(MAJOR))
    parser.add_argument("--null-types", nargs="*", default=["CD14 Mono", "CD4 T"], choices=list(MAJOR))
    parser.add_argument("--null-splits", type=int, default=3)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--draws", type=int, default=200, help="of the held-out mean; a quarter of it for its centre")
    parser.add_argument("--epochs", type=int, help="of a fit; its default if not given")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    adata = read(given.path)
    tasks = [("stim", adata, kind, seed) for seed in given.seeds for kind in given.types]
    for split in range(given.null_splits):
        tasks += [(f"donors {split}", pseudo(adata, split), kind, given.seeds[0]) for kind in given.null_types]
    rows: Rows = []
    for task, data, kind, seed in tasks:
        rows += one_type(data, kind, task, seed, given)
        for row in rows[-len(ARMS) :]:
            shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            print(" ".join(f"{k}={v}" for k, v in shown.items() if k not in ("n_genes", "n_judged")), flush=True)
        note = (
            f"{rows[-1]['n_genes']:,} genes, seed(s) {', '.join(map(str, given.seeds))}, ensembles of {given.members}, "
            f"{given.draws} draws, one thread, pyrosc {pyrosc.__version__}, torch {torch.__version__}"
        )
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / "counterfactuals.json").write_text(json.dumps({"note": note, "rows": rows}, indent=1))
            (given.out / "counterfactuals.md").write_text(report(rows, note))
    print(report(rows, note))


if __name__ == "__main__":
    main()
