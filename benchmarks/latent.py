"""Is the latent space used, and is its prior the law of the states that cells have?

    python benchmarks/latent.py --out benchmarks/results [--kang kang2000.h5ad] [--peer PYTHON]

SIM-A (`pyrosc.simulate.tissue`, another one for each seed: 4,000 cells x 1,000 genes, 8 types, 3 batches) and, if its
file is given (2,000 genes, as ``kang.prepare`` makes it), Kang; K = 20, of which SIM-A needs some 8 at most. Seven
tenths of the cells are fitted, the rest asked. Arms: N(0, I); a mixture of 20; VampPrior of 50; a flow; a flow and a
mixture fitted afterwards to the fit of N(0, I), its encoder and decoder frozen; and scvi-tools with its defaults, where
``--peer`` names a Python that has it.

    active        latents whose posterior mean varies over cells by more than 0.01
    I > 0.1       latents of more than 0.1 nats of information about the cell (scale-free)
    I, KL(q, p)   nats, of all latents together (`pyrosc.check.latent`)
    AUC z         a classifier told one draw of each cell's state from a draw of the prior (`pyrosc.check.c2st`)
    AUC counts    the same of counts (log1p of shares of 10,000, 20 principal components of both): cells made up from
                  the prior, with the batches and totals of the cells asked, from those cells
    AUC counts, q the same for cells made up from states of these cells: what the prior cannot mend
    ELBO, log p   held-out, nats a cell (10 draws; 200 importance draws)

scvi-tools' SCVI runs its 400 epochs and is taken as it ends; ours takes its best epoch by held-out cells.

Lines, fixed before the run: AUC (z and counts) closer to 0.5 than that of N(0, I); ELBO not worse (mean difference
over seeds not below zero by two standard errors); 6 to 10 active latents. Runs that are in the file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

SEEDS = (0, 1, 2, 3, 4)
WIDTH = 20
PRIORS = ("N(0, I)", "mixture 20", "Vamp 50", "flow", "flow afterwards", "mixture afterwards")
AFTERWARDS = ("flow afterwards", "mixture afterwards")
PEER = "scvi-tools"
ELBO_DRAWS, DRAWS = 10, 200


def split(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(n)
    cut = int(0.7 * n)
    return np.sort(order[:cut]), np.sort(order[cut:])


def components(real: Any, made: Any) -> tuple[np.ndarray, np.ndarray]:
    """20 principal components of log1p shares of 10,000, of both together."""
    from sklearn.decomposition import PCA

    both = np.concatenate([np.asarray(v.todense()) if hasattr(v, "todense") else np.asarray(v) for v in (real, made)])
    shares = 1e4 * both / np.maximum(both.sum(1, keepdims=True), 1)
    flat = PCA(20, random_state=0).fit_transform(np.log1p(shares))
    return flat[: real.shape[0]], flat[real.shape[0] :]


def told_apart(real: Any, made: Any, states: Any, seed: int) -> dict[str, float]:
    from pyrosc import check

    return {
        "AUC counts": check.c2st(*components(real, made), seed=seed)[0],
        "AUC counts, q": check.c2st(*components(real, states), seed=seed)[0],
    }


# ---- pyrosc -----------------------------------------------------------------------------------


def fitted(arm: str, cells: Any, seed: int, before: dict[str, Any]) -> Any:
    import pyrosc

    priors: dict[str, Any] = {
        "mixture 20": lambda: pyrosc.MixturePrior(20), "Vamp 50": lambda: pyrosc.VampPrior(50),
        "flow": lambda: pyrosc.FlowPrior(),
    }  # fmt: skip
    if arm in AFTERWARDS:
        program = before["N(0, I)"].program.copy()
        program.requires_grad_(False)
        program = program.replace(prior=pyrosc.FlowPrior() if arm == "flow afterwards" else pyrosc.MixturePrior(20))
    else:
        parts = {"prior": priors[arm]()} if arm in priors else {}
        program = pyrosc.scvi(cells, n_latent=WIDTH, seed=seed, **parts)
    return pyrosc.fit(program, cells, seed=seed, progress=False)


def run_prior(arm: str, data: Any, batch: str, seed: int, before: dict[str, Any]) -> dict[str, Any]:
    import torch

    import pyrosc
    from pyrosc import Cells, check

    train, test = split(data.n_obs, seed)
    cells, asked = (Cells.from_anndata(data[rows].copy(), batch=batch) for rows in (train, test))
    asked = Cells.align(data[test].copy(), cells.schema)
    began = time.perf_counter()
    fit = before[arm] = fitted(arm, cells, seed, before)
    seconds = time.perf_counter() - began
    table = check.latent(fit, asked, seed=seed)
    made = fit.program.generate(asked, seed=seed)["x"].numpy()
    z = torch.as_tensor(fit.latent(asked, 1, seed=seed)[0])
    states = fit.program.generate(asked, fixed={"z": z}, seed=seed)["x"].numpy()
    return {
        "active": table.attrs["n_active"], "I > 0.1": int((table["information"] > 0.1).sum()),
        "I": table.attrs["information"], "KL(q, p)": table.attrs["kl_aggregate"], "KL": table.attrs["kl"],
        "AUC z": table.attrs["auc"],
        **told_apart(data.X[test], made, states, seed),
        "ELBO": float(fit.elbo(asked, n_draws=ELBO_DRAWS).mean()),
        "log p(x)": float(fit.log_likelihood(asked, DRAWS).mean()),
        "epochs": len(fit.history), "seconds": seconds, "version": pyrosc.__version__,
    }  # fmt: skip


# ---- scvi-tools -------------------------------------------------------------------------------


def run_peer(python: str, data: Any, batch: str, seed: int) -> dict[str, Any]:
    """A process with scvi-tools fits and draws; densities and classifiers are ours."""
    import torch
    from torch.distributions import Independent, Normal

    from pyrosc import check
    from pyrosc.check.latent import _densities, _mixture

    _, test = split(data.n_obs, seed)
    with tempfile.TemporaryDirectory() as folder:
        data.write_h5ad(Path(folder) / "data.h5ad")
        command = [python, __file__, "--as-peer", folder, "--batch", batch, "--seeds", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
        if done.returncode:
            sys.exit(f"{PEER}, seed {seed} failed:\n{done.stderr[-3000:]}")
        held = dict(np.load(Path(folder) / "found.npz"))
    torch.manual_seed(seed)
    law = Independent(Normal(torch.tensor(held["loc"]), torch.tensor(held["scale"])), 1)
    z = law.sample((1,))
    prior = Independent(Normal(torch.zeros_like(z[0]), torch.ones_like(z[0])), 1)
    (own, own_k), (mixed, mixed_k) = _densities([law], z), _mixture([law], z)
    auc, _ = check.c2st(z[0].numpy(), torch.randn_like(z[0]).numpy(), seed=seed)
    return {
        "active": int((held["loc"].var(0) > 0.01).sum()), "I > 0.1": int(((own_k - mixed_k).mean((0, 1)) > 0.1).sum()),
        "I": float((own - mixed).mean()), "KL(q, p)": float((mixed - prior.log_prob(z)).mean()),
        "KL": float((own - prior.log_prob(z)).mean()), "AUC z": auc,
        **told_apart(data.X[test], held["made"], held["states"], seed),
        "ELBO": float(held["elbo"].mean()), "log p(x)": float(held["log_likelihood"].mean()),
        "epochs": int(held["epochs"]), "seconds": float(held["seconds"]), "version": str(held["version"]),
    }  # fmt: skip


def as_peer(folder: Path, batch: str, seed: int) -> None:
    """In a Python with scvi-tools: fit its SCVI with its defaults, and leave draws and densities in a file."""
    import anndata
    import scvi
    import torch
    from torch.distributions import Normal

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    scvi.settings.seed = seed
    data = anndata.read_h5ad(folder / "data.h5ad")
    train, test = split(data.n_obs, seed)
    seen = data[train].copy()
    scvi.model.SCVI.setup_anndata(seen, batch_key=batch)
    model = scvi.model.SCVI(seen, n_latent=WIDTH, gene_likelihood="nb")
    began = time.perf_counter()
    model.train(accelerator="cpu", enable_progress_bar=False)
    seconds = time.perf_counter() - began
    module = model.module.eval()
    levels = [str(v) for v in model.adata_manager.get_state_registry("batch").categorical_mapping]
    code = torch.tensor([levels.index(str(v)) for v in data.obs[batch].to_numpy()[test]]).unsqueeze(-1)
    x = torch.tensor(data.X[test].toarray())
    total = x.sum(-1, keepdim=True)
    theta = module.px_r.exp()

    def mean_of(z: Any) -> Any:
        return total * module.decoder("gene", z, torch.ones_like(total), code)[0]

    def log_joint(z: Any) -> Any:
        mean, d = mean_of(z).double() + 1e-8, theta.double()
        value = x.double()
        log_p = (
            torch.lgamma(value + d) - torch.lgamma(d) - torch.lgamma(value + 1)
            + d * (torch.log(d) - torch.log(d + mean)) + value * (torch.log(mean) - torch.log(d + mean))
        )  # fmt: skip
        return log_p.sum(-1) + Normal(0.0, 1.0).log_prob(z.double()).sum(-1)

    def counts(z: Any) -> Any:
        return torch.poisson(torch.distributions.Gamma(theta, theta / (mean_of(z) + 1e-8)).sample())

    with torch.no_grad():
        q, _ = module.z_encoder(torch.log1p(x))
        weights = []
        for _ in range(DRAWS):
            z = q.sample()
            weights.append(log_joint(z) - q.log_prob(z).double().sum(-1))
        weights = torch.stack(weights)
        np.savez(
            folder / "found.npz", loc=q.loc.numpy(), scale=q.scale.numpy(), made=counts(torch.randn_like(q.loc)),
            states=counts(q.sample()), elbo=weights[:ELBO_DRAWS].mean(0), seconds=seconds,
            log_likelihood=weights.logsumexp(0) - math.log(DRAWS), version=scvi.__version__,
            epochs=len(model.history["elbo_train"]),
        )  # fmt: skip


# ---- tables -----------------------------------------------------------------------------------

COLUMNS = ("active", "I > 0.1", "I", "KL(q, p)", "AUC z", "AUC counts", "AUC counts, q", "ELBO", "log p(x)", "seconds")


def report(runs: list[dict[str, Any]], note: str) -> str:
    import pandas as pd

    frame = pd.DataFrame(runs)
    arms = [arm for arm in (*PRIORS, PEER) if arm in set(frame["arm"])]
    lines = ["# The latent space and its prior", "", note, ""]
    for data in frame["data"].unique():
        of = frame[frame["data"] == data].set_index(["arm", "seed"])
        lines += [f"## {data}", "", "| arm | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
        here = [arm for arm in arms if arm in of.index]
        for arm in here:
            rows = of.loc[arm]
            cells = []
            for c in COLUMNS:
                digits = 3 if c.startswith("AUC") else 1 if c in ("active", "I > 0.1", "seconds") else 2
                cells.append(
                    f"{rows[c].mean():.{digits}f}" + (f" (sd {rows[c].std():.{digits}f})" if len(rows) > 1 else "")
                )
            lines.append(f"| {arm} | {len(rows)} | " + " | ".join(cells) + " |")
        lines += ["", "Differences from N(0, I) by seed, mean (standard error); and the lines.", ""]
        lines += ["| arm | AUC z | AUC counts | ELBO | log p(x) | closer to .5 | ELBO not worse | 6 to 10 active |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        base = of.loc["N(0, I)"]
        for arm in here:
            rows = of.loc[arm]
            common = rows.index.intersection(base.index)

            def apart(c: str, rows: Any = rows, common: Any = common, base: Any = base) -> tuple[float, float]:
                d = (rows.loc[common, c] - base.loc[common, c]).to_numpy(dtype=float)
                return d.mean(), d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else float("nan")

            found = {c: apart(c) for c in ("AUC z", "AUC counts", "ELBO", "log p(x)")}
            said = [f"{m:+.3f} ({se:.3f})" for m, se in found.values()]
            nearer = all(
                (abs(rows.loc[common, c] - 0.5).mean() < abs(base.loc[common, c] - 0.5).mean())
                for c in ("AUC z", "AUC counts")
            )
            m, se = found["ELBO"]
            active = 6 <= rows["active"].mean() <= 10
            verdicts = ["yes" if nearer else "no", "no" if m < -2 * se else "yes"]
            if arm == "N(0, I)" or len(common) < 2:
                verdicts = ["", ""] if arm == "N(0, I)" else ["one seed", "one seed"]
            lines.append(f"| {arm} | " + " | ".join([*said, *verdicts, "yes" if active else "no"]) + " |")
        lines.append("")
    return "\n".join(lines)


def picture(runs: list[dict[str, Any]], file: Path) -> None:
    import pandas as pd
    from matplotlib.figure import Figure

    frame = pd.DataFrame(runs)
    arms = [arm for arm in (*PRIORS, PEER) if arm in set(frame["arm"])]
    sets = list(frame["data"].unique())
    figure = Figure(figsize=(12, 3.2 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), 4, squeeze=False)
    for row, data in zip(axes, sets):
        of = frame[frame["data"] == data]
        for ax, (column, target) in zip(row, (("AUC z", 0.5), ("AUC counts", 0.5), ("active", None), ("ELBO", None))):
            for i, arm in enumerate(arms):
                here = of[of["arm"] == arm]
                values = here[column].to_numpy(dtype=float)
                if column == "ELBO":  # tissues differ by more than arms
                    base = of[of["arm"] == "N(0, I)"].set_index("seed")[column]
                    values = values - base.reindex(here["seed"]).to_numpy(dtype=float)
                ax.plot(np.full(len(values), i), values, "o", ms=4, alpha=0.6, color=f"C{i}")
                ax.plot([i - 0.3, i + 0.3], [np.nanmean(values)] * 2, color=f"C{i}")
            if target is not None:
                ax.axhline(target, color="0.6", lw=0.8, ls=":")
            if column == "active":
                ax.axhspan(6, 10, color="0.93", zorder=0)
            title = f"{column} less that of N(0, I)" if column == "ELBO" else column
            ax.set(title=f"{data}: {title}", xticks=range(len(arms)))
            ax.set_xticklabels(arms, rotation=40, ha="right", fontsize=7)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--kang", type=Path)
    parser.add_argument("--sets", nargs="+", default=["SIM-A", "Kang"], choices=["SIM-A", "Kang"])
    parser.add_argument("--peer", help="a Python with scvi-tools")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", default=[*PRIORS, PEER], choices=[*PRIORS, PEER])
    parser.add_argument("--table", action="store_true", help="only write the table of the runs that are there")
    parser.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_peer:
        as_peer(given.as_peer, given.batch, given.seeds[0])
        return
    import anndata
    import torch

    import pyrosc

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "latent.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []

    def todo(name: str, seed: int) -> list[str]:
        done = {r["arm"] for r in runs if (r["data"], r["seed"]) == (name, seed)}
        left = [arm for arm in given.arms if arm not in done and (arm != PEER or given.peer)]
        if not set(AFTERWARDS).isdisjoint(left) and "N(0, I)" not in left:
            left.insert(0, "N(0, I)")  # what it starts from
        return left

    for seed in [] if given.table else given.seeds:
        for name in given.sets:
            if (name == "Kang" and given.kang is None) or not (left := todo(name, seed)):
                continue
            if name == "Kang":
                data, batch = anndata.read_h5ad(given.kang), "donor"
                data = data[data.obs["donor"] != "none"].copy()
            else:
                data, batch = pyrosc.simulate.tissue(seed=seed), "batch"
            before: dict[str, Any] = {}
            for arm in left:
                row = (
                    run_peer(given.peer, data, batch, seed)
                    if arm == PEER
                    else run_prior(arm, data, batch, seed, before)
                )
                runs = [r for r in runs if (r["data"], r["seed"], r["arm"]) != (name, seed, arm)]
                runs.append({"data": name, "seed": seed, "arm": arm} | row)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in runs[-1].items()}, flush=True)
                file.write_text(json.dumps({"torch": torch.__version__, "runs": runs}, indent=1))
    runs.sort(key=lambda r: (r["data"] != "SIM-A", r["seed"]))
    note = f"K = {WIDTH}; mean over seeds and standard deviation between them; one thread, torch {torch.__version__}."
    text = report(runs, f"Made by `benchmarks/latent.py`, which says what each column is. {note}")
    (given.out / "latent.md").write_text(text)
    picture(runs, given.out / "latent.png")
    print(text)


if __name__ == "__main__":
    main()
