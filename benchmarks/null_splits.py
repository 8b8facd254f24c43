"""What is called where nothing differs, and what is found where something does: halves of real cells, and donors.

    python benchmarks/null_splits.py ../shared/data/kang_pbmc_ifnb.h5ad --out benchmarks/results

Kang: 2,792 cells of known donor x 2,000 highly variable genes (seurat_v3), fitted with ``pyrosc.scvi``, pyrosc's
defaults, ``ensemble=5`` and ``batch="donor"``; nothing else is registered, so refits resample cells. Compared are its
control CD14 monocytes. Simulated donors: `pyrosc.simulate.tissue` with 2 types and 16 batches, which are the donors
(``batch="batch"``); they shift every gene by Normal(0, 0.3) and by Normal(0, 0.1) more in a type, in natural log. The
16 are split 8 against 8 at random, so there is no effect of the group. Compared are the cells of the first type.

An effect of known size is made by thinning: of 50 genes drawn among those seen in at least a tenth of the cells
compared, and with less than 1 % of their counts, each count in group1 is kept with probability 1/2. Shares of these
fall to half. Those of all others rise a little, which no method can tell from an effect: by the "shift" of the table,
in log2 (FTH1 and FTL are half of a monocyte's counts here; with one of them among the 50 it would be 0.2). Found is a
thinned gene, false any other. Counts of cells that are not compared are thinned only where their donor is in group1.

Parts, and the lines that are to hold (any call: at ``fdr=0.05``, default delta):

    halves      100 random halves of the monocytes, one fit: `population` calls anything in at most 10 of 100.
    power       one half of the monocytes thinned, refit, one half and draw of genes a seed: power of `population`
                within 0.1 of Wilcoxon's at equal realised FDP, 0.05 and 0.1. The model is not told of the halves, as
                where groups are chosen after a fit: that is the row of the line. Beside it a refit that has the half
                as a categorical covariate.
    donors      all 35 splits of Kang's donors 4 against 4, the fit of "halves": `donor` calls anything in at most 10 %.
    simulated   ``splits / seeds`` splits of each tissue's donors, one fit a tissue: `donor` calls anything in at most
                10 %. Then the donors of the first split's group1 are thinned, refit: power of `donor` within 0.05 of a
                moderated t on pseudobulks at equal realised FDP, 0.05 and 0.1.

Power at a realised FDP: genes in a method's own order (probability, p-value), as far down as the share of false ones
is at most that; means over seeds, differences paired by seed. Beside: the calls that each makes by itself at 0.05.
"Wilcoxon" is on log1p of counts per 10,000, Benjamini-Hochberg, among genes whose estimated |lfc| is above the delta
of pyrosc's call, with and without that filter; "pseudobulk t" on log2 counts per million of donors' sums with a
variance moderated along a trend in abundance (limma-trend: Law et al. 2014, Genome Biology 15:R29), a test of lfc = 0,
and ("delta") of |lfc| <= delta as `donor` has it. Groups of donors share no batch, so `population` is asked with
``batches="own"`` there, without donors and with them (``donor=``). Silence alone shows nothing: read both halves.

Splits of one fit share its decoder, and those of one set of cells share the cells: their rate is one of this fit and
these cells, and its interval (binomial, 95 %) is too narrow for others.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from effects import score, table
from kang import prepare
from scipy import sparse, stats

import pyrosc
from pyrosc import Cells, Fit
from pyrosc.shrinkage import moderated

PARTS = ("halves", "power", "donors", "simulated")
LEVELS = (0.05, 0.1, 0.2)
RATE = 0.05
N_THINNED = 50
KEPT = 0.5

Rows = list[dict[str, Any]]
Answer = tuple[np.ndarray, np.ndarray]  # whether genes are called (G,); positions of genes, the surest first


# ---- data ------------------------------------------------------------------------------------------------------------


def kang(path: str, n_genes: int) -> anndata.AnnData:
    """Counts of the most variable genes; a file that `kang.prepare` has made is taken as it is."""
    data = anndata.read_h5ad(path)
    if "highly_variable_rank" not in data.var:
        data = prepare(path)
    return data[:, np.sort(np.argsort(data.var["highly_variable_rank"].to_numpy())[:n_genes])].copy()


def is_monocyte(data: anndata.AnnData) -> np.ndarray:
    return ((data.obs["cell_type"] == "CD14 Mono") & (data.obs["condition"] == "ctrl")).to_numpy()


def half_of(inside: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """(N,) a random half of the cells in a mask."""
    one = np.zeros(len(inside), dtype=bool)
    one[draw.permutation(np.flatnonzero(inside))[: inside.sum() // 2]] = True
    return one


def with_effect(
    data: anndata.AnnData, compared: np.ndarray, thinned: np.ndarray, draw: np.random.Generator
) -> tuple[anndata.AnnData, np.ndarray, float]:
    """The cells with counts of some genes thinned in some of them; which genes (G,); the log2 rise of all others."""
    seen = np.asarray((data.X[compared] > 0).mean(0)).ravel()
    total = np.asarray(data.X[compared].sum(0), dtype=float).ravel()
    share = total / total.sum()
    genes = np.zeros(data.n_vars, dtype=bool)
    genes[draw.choice(np.flatnonzero((seen >= 0.1) & (share < 0.01)), N_THINNED, replace=False)] = True
    shift = -np.log2(1 - (1 - KEPT) * share[genes].sum())
    counts = sparse.coo_matrix(data.X)
    values, hit = counts.data.copy(), thinned[counts.row] & genes[counts.col]
    values[hit] = draw.binomial(values[hit].astype(int), KEPT)
    kept = sparse.csr_matrix((values, (counts.row, counts.col)), shape=counts.shape)
    kept.eliminate_zeros()
    return anndata.AnnData(kept, obs=data.obs.copy(), var=data.var.copy()), genes, float(shift)


# ---- methods ---------------------------------------------------------------------------------------------------------


def fitted(data: anndata.AnnData, given: argparse.Namespace, seed: int, **columns: Any) -> tuple[Fit, Cells, float]:
    """An ensemble with the defaults, the cells it was fitted to, and its seconds."""
    cells = Cells.from_anndata(data, **columns)
    began = time.perf_counter()
    program = pyrosc.scvi(cells, seed=seed)
    fit = pyrosc.fit(program, cells, ensemble=given.members, epochs=given.epochs, seed=seed, progress=False)
    return fit, cells, time.perf_counter() - began


def by_pyrosc(fit: Fit, cells: Cells, one: np.ndarray, two: np.ndarray, **options: Any) -> tuple[Answer, float]:
    """Calls, order, and the delta that was chosen."""
    found = fit.differential_expression(cells, group1=one, group2=two, fdr=RATE, **options)
    if "p_value" in found:  # "donor" calls by it; the table is in order of probability
        found = found.sort_values("p_value", kind="stable")
    order = pd.Index(cells.schema.genes).get_indexer(found.index)
    called = np.zeros(len(order), dtype=bool)
    called[order] = found["is_de"].to_numpy()
    return (called, order), found.attrs["delta"]


def of_p_values(p: np.ndarray, keep: np.ndarray | None = None) -> Answer:
    """Benjamini-Hochberg over all genes; those outside ``keep`` (G,) are never called."""
    p = np.nan_to_num(p, nan=1.0)
    keep = np.ones(len(p), dtype=bool) if keep is None else keep
    order = np.argsort(p, kind="stable")
    return (stats.false_discovery_control(p) <= RATE) & keep, order[keep[order]]


def by_wilcoxon(counts: np.ndarray, one: np.ndarray, two: np.ndarray, delta: float) -> dict[str, Answer]:
    scaled = 1e4 * counts / counts.sum(1, keepdims=True)
    a, b = scaled[one], scaled[two]
    p = stats.mannwhitneyu(np.log1p(a), np.log1p(b), axis=0).pvalue
    with np.errstate(divide="ignore", invalid="ignore"):
        lfc = np.nan_to_num(np.log2(a.mean(0)) - np.log2(b.mean(0)), nan=0.0)
    return {"Wilcoxon": of_p_values(p, np.abs(lfc) > delta), "Wilcoxon, no filter": of_p_values(p)}


def by_pseudobulk(
    counts: np.ndarray, donor: np.ndarray, one: np.ndarray, two: np.ndarray, delta: float
) -> dict[str, Answer]:
    """A moderated t of two samples of donors."""
    sides = []
    for mask in (one, two):
        sums = np.stack([counts[mask & (donor == d)].sum(0) for d in np.unique(donor[mask])])
        sides.append(np.log2(1e6 * (sums + 0.5) / (sums.sum(1, keepdims=True) + 1)))
    a, b = sides
    known = len(a) + len(b) - 2
    variance = (a.var(0, ddof=1) * (len(a) - 1) + b.var(0, ddof=1) * (len(b) - 1)) / known
    variance, df = moderated(variance, known, np.exp2(np.concatenate(sides).mean(0)))
    effect, se = np.abs(a.mean(0) - b.mean(0)), np.sqrt(variance * (1 / len(a) + 1 / len(b)))
    return {
        name: of_p_values(np.clip(stats.t.sf((effect - d) / se, df) + stats.t.sf((effect + d) / se, df), 0, 1))
        for name, d in (("pseudobulk t", 0.0), ("pseudobulk t, delta", delta))
    }


def of_donors(
    fit: Fit, cells: Cells, counts: np.ndarray, donor: np.ndarray, one: np.ndarray, two: np.ndarray, column: str,
    seed: int,
) -> tuple[dict[str, Answer], float]:  # fmt: skip
    """Answers of every arm to a comparison of two groups of donors, and the delta of `donor`."""
    answers: dict[str, Answer] = {}
    answers["donor"], delta = by_pyrosc(fit, cells, one, two, estimand="donor", donor=column, seed=seed)
    own = dict(batches="own", seed=seed)
    answers["population, donors known"], _ = by_pyrosc(fit, cells, one, two, donor=column, **own)
    answers["population"], of_population = by_pyrosc(fit, cells, one, two, **own)
    answers |= by_pseudobulk(counts, donor, one, two, delta) | by_wilcoxon(counts, one, two, of_population)
    return answers, delta


# ---- units -----------------------------------------------------------------------------------------------------------


def silence(part: str, answers: dict[str, Answer], **what: Any) -> Rows:
    return [{"part": part, "arm": arm, "called": int(called.sum())} | what for arm, (called, _) in answers.items()]


def strength(part: str, answers: dict[str, Answer], thinned: np.ndarray, **what: Any) -> Rows:
    rows = []
    for arm, (called, order) in answers.items():
        row = {"part": part, "arm": arm} | what | score(called, thinned)
        rows.append(row | {f"at {level}": power_at(order, thinned, level) for level in LEVELS})
    return rows


def power_at(order: np.ndarray, different: np.ndarray, level: float) -> float:
    """The share found among genes in this order, as far down as the share of false ones is at most ``level``."""
    true = different[order]
    within = np.flatnonzero(np.cumsum(~true) <= level * np.arange(1, len(true) + 1))
    return float(true[: within[-1] + 1].sum() / different.sum()) if len(within) else 0.0


class Table:
    """Rows as they come, on screen and in the folder. Parts that are not run now are kept from its last run."""

    def __init__(self, out: Path | None, parts: list[str], note: str) -> None:
        self.out = out
        self.rows: Rows = []
        self.notes: dict[str, str] = {}
        if out and (out / "null_splits.json").exists():
            held = json.loads((out / "null_splits.json").read_text())
            self.rows = [r for r in held["rows"] if r["part"].split(",")[0] not in parts]
            self.notes = {part: text for part, text in held["notes"].items() if part not in parts}
        self.notes |= dict.fromkeys(parts, note)

    def add(self, rows: Rows, began: float) -> None:
        self.rows += rows
        first = rows[0]
        unit = " ".join(f"{k} {first[k]}" for k in ("seed", "split") if k in first)
        power = ("fdp", "power", "at 0.05", "at 0.1")
        found = "; ".join(
            f"{r['arm']} {r['called']}" + ("".join(f" {r[k]:.2f}" for k in power) if "power" in r else "") for r in rows
        )
        print(f"{first['part']} {unit}: {found} ({time.perf_counter() - began:.0f} s)", flush=True)
        if self.out:
            text = json.dumps({"notes": self.notes, "rows": self.rows}, indent=1)
            (self.out / "null_splits.json").write_text(text)
            (self.out / "null_splits.md").write_text(report(self.rows, self.notes))


# ---- parts -----------------------------------------------------------------------------------------------------------


def of_kang(data: anndata.AnnData, given: argparse.Namespace, out: Table) -> None:
    """The parts "halves" and "donors", of one fit."""
    inside, donor = is_monocyte(data), data.obs["donor"].astype(str).to_numpy()
    fit, cells, seconds = fitted(data, given, 0, batch="donor")
    print(f"Kang fitted in {seconds:.0f} s", flush=True)
    cells, donor, counts = cells[inside], donor[inside], np.asarray(data.X[inside].todense(), dtype=float)
    everyone = np.ones(len(cells), dtype=bool)
    if "halves" in given.parts:
        for split in range(given.splits):
            began = time.perf_counter()
            one = half_of(everyone, np.random.default_rng(split))
            ours, delta = by_pyrosc(fit, cells, one, ~one, seed=split)
            answers = {"population": ours} | by_wilcoxon(counts, one, ~one, delta)
            out.add(silence("halves", answers, split=split, delta=delta), began)
    if "donors" in given.parts:
        names = np.unique(donor)
        pairs = [c for c in combinations(names, len(names) // 2) if names[0] in c]  # each split once
        for split, chosen in enumerate(pairs[: given.splits]):
            began = time.perf_counter()
            one = np.isin(donor, chosen)
            answers, delta = of_donors(fit, cells, counts, donor, one, ~one, "donor", split)
            out.add(silence("donors", answers, split=split, donors="/".join(chosen), delta=delta), began)


def of_power(data: anndata.AnnData, given: argparse.Namespace, out: Table, seed: int) -> None:
    """One draw of a half and of genes, fitted without and with the half as a covariate."""
    began = time.perf_counter()
    draw = np.random.default_rng([seed, 1])
    inside = is_monocyte(data)
    one = half_of(inside, draw)
    two = inside & ~one
    data, thinned, shift = with_effect(data, inside, one, draw)
    data.obs["half"] = np.where(one, "one", np.where(two, "two", "not compared"))
    answers: dict[str, Answer] = {}
    fit, cells, seconds = fitted(data, given, seed, batch="donor")
    answers["population"], delta = by_pyrosc(fit, cells, one, two, seed=seed)
    fit, cells, _ = fitted(data, given, seed, batch="donor", categorical=["half"])
    answers["population, told of the halves"], of_told = by_pyrosc(fit, cells, one, two, seed=seed)
    counts = np.asarray(data.X.todense(), dtype=float)
    answers |= by_wilcoxon(counts, one, two, delta)
    what = dict(seed=seed, shift=shift, delta=delta, delta_told=of_told, seconds=seconds)
    out.add(strength("power", answers, thinned, **what), began)


def of_tissue(given: argparse.Namespace, out: Table, seed: int) -> None:
    """One simulated tissue: splits of its donors without an effect, then one with."""
    n_genes = min(given.genes, 1000)
    data = pyrosc.simulate.tissue(given.cells, n_genes, n_types=2, n_batches=16, seed=seed)
    donor = data.obs["batch"].astype(str).to_numpy()
    inside = (data.obs["cell_type"] == "type0").to_numpy()  # the other is missing from one donor
    names = np.unique(donor)
    draw = np.random.default_rng([seed, 2])
    fit, cells, seconds = fitted(data, given, seed, batch="batch")
    print(f"simulated seed {seed} fitted in {seconds:.0f} s", flush=True)
    counts = np.asarray(data.X.todense(), dtype=float)
    chosen: list[np.ndarray] = []
    for split in range(max(given.splits // len(given.seeds), 1)):
        began = time.perf_counter()
        chosen.append(np.isin(donor, draw.choice(names, len(names) // 2, replace=False)))
        one, two = inside & chosen[-1], inside & ~chosen[-1]
        answers, delta = of_donors(fit, cells, counts, donor, one, two, "batch", split)
        out.add(silence("simulated", answers, seed=seed, split=split, delta=delta), began)
    began = time.perf_counter()
    data, thinned, shift = with_effect(data, inside, chosen[0], draw)
    fit, cells, seconds = fitted(data, given, seed, batch="batch")
    counts = np.asarray(data.X.todense(), dtype=float)
    one, two = inside & chosen[0], inside & ~chosen[0]
    answers, delta = of_donors(fit, cells, counts, donor, one, two, "batch", seed)
    what = dict(seed=seed, shift=shift, delta=delta, seconds=seconds)
    out.add(strength("simulated, with an effect", answers, thinned, **what), began)


# ---- report ----------------------------------------------------------------------------------------------------------


def of_silence(rows: pd.DataFrame) -> pd.DataFrame:
    found = []
    for arm, mine in rows.groupby("arm", sort=False):
        n, k = len(mine), int((mine["called"] > 0).sum())
        low, high = stats.binomtest(k, n).proportion_ci()
        found.append({
            "arm": arm, "splits": n, "with a call": k, "share": k / n, "from": float(low), "to": float(high),
            "median called": f"{mine['called'].median():g}", "most called": int(mine["called"].max()),
        })  # fmt: skip
    return pd.DataFrame(found)


def of_strength(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    found = []
    versus = rows[rows["arm"] == reference].set_index("seed")
    for arm, mine in rows.groupby("arm", sort=False):
        mine = mine.set_index("seed")
        row: dict[str, Any] = {"arm": arm, "seeds": len(mine)}
        for level in LEVELS:
            row[f"power at FDP {level}"] = float(mine[f"at {level}"].mean())
            ahead = mine[f"at {level}"] - versus.loc[mine.index, f"at {level}"]
            se = f"{ahead.std(ddof=1) / len(ahead) ** 0.5:.3f}" if len(ahead) > 1 else "unknown"
            row[f"ahead at {level} (se)"] = "" if arm == reference else f"{ahead.mean():+.3f} ({se})"
        row |= {f"own {k}": float(mine[k].mean()) for k in ("called", "fdp", "power")}
        found.append(row)
    return pd.DataFrame(found)


def report(rows: Rows, notes: dict[str, str]) -> str:
    frame = pd.DataFrame(rows)
    heads = {
        "halves": "Random halves of Kang's control CD14 monocytes",
        "power": "50 genes thinned in one half",
        "donors": "Kang's control CD14 monocytes, donors 4 against 4",
        "simulated": "Simulated donors, 8 against 8, no effect of the group",
        "simulated, with an effect": "Simulated donors, 50 genes thinned in one group",
    }
    lines = ["# Null splits, and power beside them", ""]
    for part, head in heads.items():
        mine = frame[frame["part"] == part]
        if not len(mine):
            continue
        note = notes[part.split(",")[0]]
        lines += [f"## {head}", "", note]
        if "power" in mine and mine["power"].notna().any():
            reference = "Wilcoxon" if part == "power" else "pseudobulk t"
            said = (
                f"Ahead of {reference}, paired by seed. All other genes rise by at most {mine['shift'].max():.3f} "
                f'(log2); delta is {mine["delta"].mean():.2f} on average. "Own" are the calls at {RATE}.'
            )
            lines += ["", said, "", *table(of_strength(mine, reference)), ""]
        else:
            lines += ["", *table(of_silence(mine)), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="kang_pbmc_ifnb.h5ad; not read by the part simulated")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="refits, and simulated tissues")
    parser.add_argument("--splits", type=int, default=100, help="random halves; of simulated donors, over all tissues")
    parser.add_argument("--members", type=int, default=5, help="refits of an ensemble")
    parser.add_argument("--genes", type=int, default=2000, help="simulated tissues have 1,000 at most")
    parser.add_argument("--cells", type=int, default=4000, help="of a simulated tissue")
    parser.add_argument("--epochs", type=int, help="of each fit; for a quick look")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    note = (
        f"{given.genes:,} genes of Kang, tissues of {given.cells:,} cells x {min(given.genes, 1000):,} genes; "
        f"ensembles of {given.members}" + (f", {given.epochs} epochs" if given.epochs else "")
        + f", one thread, {platform.machine()}, torch {torch.__version__}, pyrosc {pyrosc.__version__}."
    )  # fmt: skip
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    out = Table(given.out, given.parts, note)
    data = kang(given.file, given.genes) if set(given.parts) != {"simulated"} else None
    if data is not None and {"halves", "donors"} & set(given.parts):
        of_kang(data, given, out)
    for seed in given.seeds:
        if data is not None and "power" in given.parts:
            of_power(data, given, out, seed)
        if "simulated" in given.parts:
            of_tissue(given, out, seed)
    print(report(out.rows, out.notes))


if __name__ == "__main__":
    main()
