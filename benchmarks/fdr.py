"""Do calls of differential expression keep the rate that they state, on counts that no story drew?

    python benchmarks/fdr.py --out benchmarks/results              # with scvi-tools, or --no-peer

SIM-B, population: `pyrosc.simulate.bursts()`, 4,000 cells x 800 genes, populations of 500 and 100 among six types; all
15 pairs of types of each of five simulated tissues, 75 comparisons, delta from the data. Truth: log2 ratio of the
types' expected shares. The pair of the 500 and the 100 is also shown alone.

SIM-E, cell pairs: `pyrosc.simulate.shifted_groups()`, 1,000 cells x 100 genes; 30 picks of 5 + 5 cells of each of five
data sets, 150 comparisons, delta 0.5. Truth: the median, over the 25 pairs of the cells picked, of |log2 ratio| of the
cells' expected shares (which is P(|log2 ratio| > delta) > 1/2 for a random pair). Beside it, as "FDP of pairs", the
share of the 25 pairs that are within delta, mean over the genes called: what the expected proportion of this estimand
is the expectation of.

A gene is different iff its true |log2 ratio| exceeds the delta of the call; no gene is dropped. pyrosc is the story
`scvi` with ``ensemble=5`` and all defaults (NB), one fit for all comparisons of a seed; ``--law zinb`` gives both
packages extra zeros on SIM-E. Lines, fixed before the first run, for pyrosc on either data:

    rate    mean FDP at most 1.5 alpha at alpha 0.05, 0.1 and 0.2
    honest  |mean FDP - mean expected FDP| at most 0.05 at every level of expected FDP from 0.025 to 0.3 by 0.025
    power   mean power at least that of Wilcoxon's test minus 0.05, at alpha 0.05, 0.1 and 0.2

Means are over comparisons, intervals (95 %, Student's t) over seeds, as comparisons of a seed share data and fit. The
proportion of no calls is 0.

Beside: t-test (Welch) and Wilcoxon on log1p of counts per 10,000, by Benjamini-Hochberg, and |lfc| of mean counts per
10,000 above delta; scvi-tools' default run (NB), one fit: "change" with the same delta, and "vanilla", whose calls have
an expected proportion of wrong signs of at most alpha, and |lfc| of mean scales above delta. Both are about pairs of
cells, also on SIM-B. scvi-tools runs in a process of its own, of another interpreter by ``--peer``.
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
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

ALPHAS = (0.05, 0.1, 0.2)
LEVELS = tuple(round(0.025 * k, 3) for k in range(1, 13))
SIM_B, PAIR, SIM_E = "SIM-B", "SIM-B, 500 against 100", "SIM-E"
PYROSC = "pyrosc"

Rows = list[dict[str, Any]]


@dataclass
class Calls:
    """Of one method and comparison: an order of the genes by what it costs to call them.

    cost : (G,) expected FDP, or adjusted p-value, if this gene and those before it are called
    is_large : (G,) whether the gene passes the filter on its effect
    states_fdp : whether ``cost`` is an expected FDP of |lfc| > delta
    """

    cost: np.ndarray
    is_large: np.ndarray | bool = True
    states_fdp: bool = False


@dataclass
class Comparison:
    """Two groups of cells, as positions, and what is true of them.

    effects : (pairs, G) true log2 ratios, one row for the groups' means or a row for each pair of cells
    """

    one: np.ndarray
    two: np.ndarray
    effects: np.ndarray
    is_named: bool = False  # the pair of SIM-B with 500 and 100 cells


# ---- data and truth ---------------------------------------------------------------------------


def shares(mean: np.ndarray) -> np.ndarray:
    """Expected shares of genes, in the last axis, from expected counts."""
    return mean / mean.sum(-1, keepdims=True)


def pairs_of_types(data: Any) -> Iterator[Comparison]:
    kind, mean = data.obs["cell_type"].to_numpy(), data.varm["mean"]
    for one, two in combinations(mean.columns, 2):
        lfc = np.log2(shares(mean[one].to_numpy())) - np.log2(shares(mean[two].to_numpy()))
        at = np.flatnonzero(kind == one), np.flatnonzero(kind == two)
        yield Comparison(*at, lfc[None], (one, two) == ("type0", "type1"))


def picks_of_cells(data: Any, seed: int, n_picks: int = 30, n_each: int = 5) -> Iterator[Comparison]:
    draw, group = np.random.default_rng([seed, 5]), data.obs["group"].to_numpy()
    log_share = np.log2(shares(np.asarray(data.layers["mean"], dtype=float)))
    for _ in range(n_picks):
        one, two = (draw.choice(np.flatnonzero(group == g), n_each, replace=False) for g in ("group1", "group2"))
        yield Comparison(one, two, (log_share[one][:, None] - log_share[two]).reshape(n_each**2, -1))


# ---- methods ----------------------------------------------------------------------------------


def by_pyrosc(fit: Any, cells: Any, pair: Comparison, estimand: str, delta: float | None) -> tuple[Calls, float]:
    masks = [np.isin(np.arange(len(cells)), at) for at in (pair.one, pair.two)]
    table = fit.differential_expression(cells, None, *masks, estimand=estimand, delta=delta)
    cost = table["expected_fdp"].loc[list(cells.schema.genes)].to_numpy()
    return Calls(cost, states_fdp=True), table.attrs["delta"]


def by_tests(data: Any, pair: Comparison, delta: float) -> dict[str, Calls]:
    """t-test and Wilcoxon with Benjamini-Hochberg, and the same filter on the fold change of means."""
    sides = [np.asarray(data.X[at].todense(), dtype=float) for at in (pair.one, pair.two)]
    a, b = (1e4 * x / np.maximum(x.sum(1, keepdims=True), 1) for x in sides)
    with np.errstate(divide="ignore", invalid="ignore"):
        lfc = np.nan_to_num(np.log2(a.mean(0)) - np.log2(b.mean(0)), nan=0.0)
        tests = {
            "t-test": stats.ttest_ind(np.log1p(a), np.log1p(b), equal_var=False).pvalue,
            "Wilcoxon": stats.mannwhitneyu(np.log1p(a), np.log1p(b), axis=0).pvalue,
        }
    return {
        name: Calls(stats.false_discovery_control(np.nan_to_num(p, nan=1.0)), np.abs(lfc) > delta)
        for name, p in tests.items()
    }


def running_mean(false: np.ndarray) -> np.ndarray:
    """(G,) mean probability of being false of a gene and of those that are less likely to be."""
    order = np.argsort(false, kind="stable")
    found = np.empty(len(false))
    found[order] = np.cumsum(false[order]) / np.arange(1, len(false) + 1)
    return found


def by_peer(
    python: str, data: Any, pairs: list[Comparison], deltas: list[float], seed: int, law: str, epochs: int | None
) -> tuple[list[dict[str, Calls]], float]:
    """Calls of scvi-tools for each comparison, from one fit in a process of its own, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        data.write_h5ad(Path(folder) / "data.h5ad")
        asked = [{"one": p.one.tolist(), "two": p.two.tolist(), "delta": d} for p, d in zip(pairs, deltas)]
        asked_all = {"pairs": asked, "seed": seed, "law": law, "epochs": epochs}
        (Path(folder) / "asked.json").write_text(json.dumps(asked_all))
        done = subprocess.run(
            [python, __file__, "--child", folder], capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"scvi-tools failed (without it: --no-peer):\n{done.stderr[-3000:]}")
        with np.load(Path(folder) / "found.npz") as answer:
            found = dict(answer)
    calls = []
    for change, vanilla, lfc, delta in zip(found["change"], found["vanilla"], found["lfc"], deltas):
        calls.append({
            "scvi-tools change": Calls(running_mean(1 - change), states_fdp=True),
            "scvi-tools vanilla": Calls(running_mean(np.minimum(vanilla, 1 - vanilla)), np.abs(lfc) > delta),
        })  # fmt: skip
    return calls, float(found["seconds"])


def child(folder: Path) -> None:
    """The peer's side: fits once, and writes (comparisons, G) arrays."""
    import anndata
    import scvi
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    asked = json.loads((folder / "asked.json").read_text())
    data = anndata.read_h5ad(folder / "data.h5ad")
    scvi.settings.seed, scvi.settings.verbosity = asked["seed"], 40
    scvi.model.SCVI.setup_anndata(data)
    model = scvi.model.SCVI(data, gene_likelihood=asked["law"])
    began = time.perf_counter()
    model.train(max_epochs=asked["epochs"], enable_progress_bar=False, accelerator="cpu")
    seconds = time.perf_counter() - began
    found: dict[str, list[np.ndarray]] = {"change": [], "vanilla": [], "lfc": []}
    for pair in asked["pairs"]:
        masks = {f"idx{k}": np.isin(np.arange(len(data)), pair[side]) for k, side in ((1, "one"), (2, "two"))}
        options = masks | {"silent": True, "all_stats": False}
        change = model.differential_expression(mode="change", delta=pair["delta"], **options).loc[data.var_names]
        vanilla = model.differential_expression(mode="vanilla", **options).loc[data.var_names]
        found["change"].append(change["proba_de"].to_numpy())
        found["vanilla"].append(vanilla["proba_m1"].to_numpy())
        found["lfc"].append(np.log2(vanilla["scale1"]) - np.log2(vanilla["scale2"]))
    np.savez(folder / "found.npz", seconds=seconds, **{name: np.stack(v) for name, v in found.items()})


# ---- what came of it --------------------------------------------------------------------------


def score(calls: Calls, pair: Comparison, delta: float, level: float) -> dict[str, float]:
    """Called genes at a level, against the truth."""
    called = (calls.cost <= level) & calls.is_large
    different = np.median(np.abs(pair.effects), axis=0) > delta
    within = (np.abs(pair.effects) <= delta).mean(0)
    n = max(int(called.sum()), 1)
    expected = float(calls.cost[called].max(initial=0.0)) if calls.states_fdp else float("nan")
    return {
        "called": int(called.sum()), "fdp": float((called & ~different).sum() / n),
        "fdp of pairs": float(within[called].sum() / n), "expected": expected,
        "power": float((called & different).sum() / max(different.sum(), 1)), "different": int(different.sum()),
    }  # fmt: skip


def one_seed(name: str, seed: int, given: argparse.Namespace) -> tuple[Rows, str]:
    """Means over the comparisons of one simulated data set, by method and level; what it cost."""
    import pyrosc

    law = given.law if name == SIM_E else "nb"
    if name == SIM_B:
        data = pyrosc.simulate.bursts(seed=seed)
        pairs, estimand, delta = list(pairs_of_types(data)), "population", None
    else:
        data = pyrosc.simulate.shifted_groups(seed=seed)
        pairs, estimand, delta = list(picks_of_cells(data, seed)), "cell", 0.5
    pairs = pairs[: given.comparisons]
    cells = pyrosc.Cells.from_anndata(data)
    likelihood = pyrosc.ZINBLikelihood() if law == "zinb" else pyrosc.NBLikelihood()
    began = time.perf_counter()
    program = pyrosc.scvi(cells, seed=seed, likelihood=likelihood)
    fit = pyrosc.fit(program, cells, seed=seed, ensemble=given.members, progress=False)
    fitted = time.perf_counter() - began
    found = [by_pyrosc(fit, cells, pair, estimand, delta) for pair in pairs]
    deltas, tables = [d for _, d in found], time.perf_counter() - began - fitted
    note = f"{name} seed {seed} ({law}): fit {fitted:.0f} s, {len(pairs)} tables {tables:.0f} s"
    methods = [{PYROSC: calls} | by_tests(data, pair, d) for (calls, d), pair in zip(found, pairs)]
    if given.peer:
        theirs, seconds = by_peer(given.peer, data, pairs, deltas, seed, law, given.peer_epochs)
        methods = [a | b for a, b in zip(methods, theirs)]
        note += f", scvi-tools' fit {seconds:.0f} s"
    rows = []
    for pair, each, d in zip(pairs, methods, deltas):
        for method, calls in each.items():
            for level in LEVELS:
                row = {"method": method, "level": level, "delta": d} | score(calls, pair, d, level)
                rows += [{"data": label} | row for label in [name] + [PAIR] * pair.is_named]
    means = pd.DataFrame(rows).groupby(["data", "method", "level"], sort=False)
    frame = means.mean().assign(comparisons=means.size(), seed=seed).reset_index()
    return frame.to_dict("records"), note


def interval(by_seed: pd.Series) -> tuple[float, float]:
    """95 % for the mean of what seeds found."""
    n = len(by_seed)
    reach = stats.t.ppf(0.975, n - 1) * by_seed.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return by_seed.mean() - reach, by_seed.mean() + reach


def lines(frame: pd.DataFrame) -> pd.DataFrame:
    """What pyrosc had to keep, on either data."""
    found = []
    for name in (SIM_B, SIM_E):
        here = frame[frame["data"] == name]
        if here.empty:
            continue
        mean = here.groupby(["method", "level"])[["fdp", "fdp of pairs", "expected", "power"]].mean()
        ours = mean.loc[PYROSC]
        for alpha in ALPHAS:
            by_seed = here[(here["method"] == PYROSC) & (here["level"] == alpha)]
            low, high = interval(by_seed["fdp"])
            fdp, power = ours.loc[alpha, "fdp"], ours.loc[alpha, "power"]
            least = mean.loc[("Wilcoxon", alpha), "power"] - 0.05
            found += [
                (name, f"rate {alpha}", f"{fdp:.3f} ({low:.3f} to {high:.3f})", f"<= {1.5 * alpha:.3f}",
                 fdp <= 1.5 * alpha),
                (name, f"power {alpha}", f"{power:.3f}", f">= {least:.3f}", power >= least),
            ]  # fmt: skip
        gap = (ours["fdp"] - ours["expected"]).abs()
        found.append((name, "honest", f"{gap.max():.3f} (at {gap.idxmax()})", "<= 0.050", gap.max() <= 0.05))
        if name == SIM_E:
            gap = (ours["fdp of pairs"] - ours["expected"]).abs()
            found.append((name, "honest, of pairs", f"{gap.max():.3f} (at {gap.idxmax()})", "beside", ""))
    table = pd.DataFrame(found, columns=["data", "what", "found", "line", "holds"])
    return table.assign(holds=table["holds"].map({True: "yes", False: "no", "": ""}))


def markdown(frame: pd.DataFrame) -> list[str]:
    found = ["| " + " | ".join(map(str, frame.columns)) + " |", "|---" * len(frame.columns) + "|"]
    return found + [
        "| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row) + " |"
        for row in frame.itertuples(index=False)
    ]


def report(frame: pd.DataFrame, notes: list[str]) -> str:
    text = ["# False discoveries on simulated cells", "", "One thread, " + "; ".join(notes), "", "## Lines", ""]
    text += markdown(lines(frame))
    for name in frame["data"].unique():
        here, rows = frame[frame["data"] == name], []
        of_pairs = ["fdp of pairs"] * (name == SIM_E)
        for (alpha, method), by_seed in here[here["level"].isin(ALPHAS)].groupby(["level", "method"], sort=False):
            low, high = interval(by_seed["fdp"])
            row = {"alpha": alpha, "method": method, "fdp": by_seed["fdp"].mean(), "low": low, "high": high}
            kept = ["expected", "power", "called", "different", "delta"]
            rows.append(row | {column: by_seed[column].mean() for column in kept + of_pairs})
        one = here[(here["method"] == PYROSC) & (here["level"] == ALPHAS[0])]
        text += ["", f"## {name} (comparisons: {one['comparisons'].sum()}, seeds: {len(one)})", ""]
        text += markdown(pd.DataFrame(rows).sort_values("alpha", kind="stable"))
        curve = here[here["method"].isin([PYROSC, "scvi-tools change"])].groupby(["method", "level"], sort=False)
        text += ["", "Mean expected and realised FDP by level:", ""]
        text += markdown(curve[["expected", "fdp"] + of_pairs].mean().reset_index())
    return "\n".join([*text, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", nargs="+", choices=[SIM_B, SIM_E], default=[SIM_B, SIM_E])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--comparisons", type=int, help="of each seed at most; all of them by default")
    parser.add_argument("--law", choices=["nb", "zinb"], default="nb", help="of counts on SIM-E, in both packages")
    parser.add_argument("--peer", default=sys.executable, help="a Python that has scvi-tools")
    parser.add_argument("--no-peer", dest="peer", action="store_const", const=None)
    parser.add_argument("--peer-epochs", type=int, help="scvi-tools' default unless given")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: Rows = []
    notes: list[str] = []
    for seed in given.seeds:
        for name in given.data:
            more, note = one_seed(name, seed, given)
            rows += more
            notes.append(note)
        frame = pd.DataFrame(rows)
        text = report(frame, [f"torch {torch.__version__}", *notes])
        print(text, flush=True)
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / "fdr.json").write_text(
                json.dumps({"notes": notes, "rows": json.loads(frame.to_json(orient="records"))})
            )
            (given.out / "fdr.md").write_text(text)


if __name__ == "__main__":
    main()
