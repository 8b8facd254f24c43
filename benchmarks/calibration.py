"""Are amortised posteriors calibrated? Ours, and those of the schedule that is usual today.

    python benchmarks/calibration.py --kang kang2000.h5ad --peer other/bin/python --out benchmarks/results
    python benchmarks/calibration.py ... --seeds 0 --simulations 200 --khat-cells 50 --khat-draws 500      # a small one

Data: Kang (2,792 cells x the 1,500 most variable of the file's genes as ``kang.prepare`` makes it, batch = donor) and
SIM-A (`pyrosc.simulate.tissue`, 4,000 x 1,000, three batches). Each arm fits its own story to them; then that story,
its decoder as fitted, makes up cells whose states are known, and the arm's own posterior is asked about these cells
(`pyrosc.check.calibration`: 1,000 cells x 99 draws). So no arm is judged by another's model.

    usual       in pyrosc: BatchNorm in both networks, Adam's rate 1e-3 throughout, 120 epochs of a KL warm-up of 400:
                the weight ends at 0.3, as it does where the heuristic min(400, 8e6 / N) cuts a fit of 67,000 cells
    scvi        scvi-tools itself, SCVI(gene_likelihood="nb"), its defaults cut to those 120 epochs
    scvi 400    the same with the 400 epochs that it takes for so few cells: the weight reaches 1 at the end
    default     pyrosc.scvi and pyrosc.fit with their defaults
    iwae        default, but trained on the importance-weighted bound of ten draws
    full        default, with ``encoder=FullRankEncoder()``
    refined     default, and each made-up cell's posterior refined from the encoder's start (``fit.refine``)
    refined full    the same with a covariance matrix for each cell (``family="full"``)
    guide           default, and its guide trained on for 2,000 steps, the decoder as it is (``fit.train_guide``)
    guide refined full  the same, and refined full from there
    moments         refined full, and each guess given the posterior's mean and covariance by 1,000 draws, twice: what
                    ``fit.refine(cells, family="full")`` does (``moments=1000``); the other refined arms have none
    weighed         draws of refined full by importance weights of 1,000 (``importance=1000``)
    moments weighed the same of moments: what ``fit.refine(cells, family="full")`` and ``importance=1000`` answer
    mixture         default, but for a mixture of 20 normals as the prior of states, learned with the rest
    mixture moments weighed   the mixture, refined and weighed likewise: around the posterior states are drawn where
                    cells are, and the exact posterior by p(z) is right there as far as p(z) is where cells are

Parts: "prior" (states of made-up cells are drawn from the prior), "posterior" (states where cells are), "khat"
(`pyrosc.check.importance` on 500 measured cells, 5,000 draws, so that the threshold of k-hat is 0.7), "hmc" (ratios of
the guide's sds to those of Hamiltonian Monte Carlo, `pyrosc.check.guide_error`, on 20 measured cells). The control,
a story whose posterior is known and taken as its guide, says what a perfect guide scores.

Made-up cells whose total is further than 2 % from the library that the story knows are drawn again, for all arms:
measured cells, on which encoders are trained, have counts that add up to it.

Success, fixed before the run: of default, iwae and refined at least 95 % of scalars deviate less than 0.05, and TARP
less than 0.03, around the prior and around the posterior; of refined, fewer than 5 % of cells have k-hat above 0.7; the
usual schedule fails all of these; the control is outside its 95 % bands as often as that says. (Of 1,000 cells a
perfect guide has a TARP deviation above 0.03 in one run of three, 2 exp(-2 n 0.03^2), and above 0.05 in one of 70: the
control says how often the larger of two is; ``--simulations 4000`` tells.)
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
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

ARMS = (
    "usual", "scvi", "scvi 400", "default", "iwae", "full", "refined", "refined full", "weighed", "guide",
    "guide refined full", "moments", "moments weighed", "mixture", "mixture moments weighed",
)  # fmt: skip
REFINED = {
    "refined": "normal",
    "refined full": "full",
    "weighed": "full",
    "guide refined full": "full",
    "moments": "full",
    "moments weighed": "full",
    "mixture moments weighed": "full",
}
MOMENTS = {"moments": 1000, "moments weighed": 1000, "mixture moments weighed": 1000}
WEIGHED = ("weighed", "moments weighed", "mixture moments weighed")
MIXTURES = ("mixture", "mixture moments weighed")
GUIDE_STEPS = {"guide": 2000, "guide refined full": 2000}
PEERS = {"scvi": 120, "scvi 400": 400}  # epochs
PARTS = ("prior", "posterior", "khat", "hmc")
EPOCHS, WARMUP = 120, 400
WITHIN = 0.02
ROUNDS = 300
HMC_CELLS = 20
FITS: dict[Any, Any] = {}  # the last, for arms that share it


# ---- in the Python of scvi-tools, without pyrosc -----------------------------------------------


class Theirs:
    """A trained SCVI: draws of its prior, its counts and its encoder, as its own modules make them."""

    def __init__(self, folder: Path, epochs: int, seed: int) -> None:
        import anndata
        import pandas as pd
        import scvi
        import torch

        torch.set_num_threads(1)
        scvi.settings.seed = seed
        self.torch = torch
        self.x = sparse.csr_matrix(sparse.load_npz(folder / "x.npz"))
        codes = np.load(folder / "batch.npy")
        adata = anndata.AnnData(self.x, obs=pd.DataFrame({"batch": pd.Categorical([f"b{c:03d}" for c in codes])}))
        adata.obs_names = adata.obs_names.astype(str)
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        model = scvi.model.SCVI(adata, n_latent=10, gene_likelihood="nb")
        model.train(max_epochs=epochs, plan_kwargs={"n_epochs_kl_warmup": WARMUP}, accelerator="cpu",
                    enable_progress_bar=False)  # fmt: skip
        self.module = model.module.eval()
        self.batch = torch.as_tensor(codes).long()[:, None]
        self.library = torch.as_tensor(np.asarray(self.x.sum(1)).ravel()).float()[:, None]

    def encoded(self, x: Any, batch: Any) -> Any:
        """Their q(z | x)."""
        return self.module.inference(x=x, batch_index=batch)["qz"]

    def decoded(self, z: Any, library: Any, batch: Any) -> Any:
        """Their p(x | z); z (..., n, K)."""
        shape = z.shape[:-1]
        batch, library = (v.expand(*shape, 1).reshape(-1, 1) for v in (batch, library.log()))
        return self.module.generative(z=z.reshape(-1, z.shape[-1]), library=library, batch_index=batch)["px"]

    def seen(self, rows: np.ndarray) -> Any:
        return self.torch.as_tensor(self.x[rows].toarray()).float()

    def simulated(self, draw: np.random.Generator, around: str, n: int) -> tuple[np.ndarray, Any, Any]:
        """Rows, states and counts of n made-up cells whose total is near the library."""
        torch, kept = self.torch, ([], [], [])
        for _ in range(ROUNDS):
            rows = draw.integers(len(self.library), size=400)
            z = torch.randn(400, 10)
            if around == "posterior":
                z = self.encoded(self.seen(rows), self.batch[rows]).sample()
            x = self.decoded(z, self.library[rows], self.batch[rows]).sample()
            ratio = (x.sum(-1) / self.library[rows, 0]).log().abs()
            near = np.flatnonzero((ratio <= np.log1p(WITHIN)).numpy())
            for pieces, value in zip(kept, (rows, z, x)):
                pieces.append(value[near])
            if sum(map(len, kept[0])) >= n:
                return np.concatenate(kept[0])[:n], torch.cat(kept[1])[:n], torch.cat(kept[2])[:n]
        raise SystemExit(f"after {400 * ROUNDS} made-up cells too few have a total near their library")

    def values(self, z: Any, x: Any, rows: np.ndarray, law: Any, genes: np.ndarray) -> dict[str, Any]:
        """log densities (S, n) of draws z (S, n, K), and log rho (S, n, genes)."""
        normal = self.torch.distributions.Normal(0.0, 1.0)
        px = self.decoded(z, self.library[rows], self.batch[rows])
        counts = px.log_prob(x.expand(*z.shape[:-1], -1).reshape(-1, x.shape[-1])).sum(-1)
        return {
            "log p(x|z)": counts.reshape(z.shape[:-1]), "log p(z)": normal.log_prob(z).sum(-1),
            "log q": law.log_prob(z).sum(-1), "log rho": px.scale[:, genes].log().reshape(*z.shape[:-1], -1),
        }  # fmt: skip

    def ranked(self, draw: np.random.Generator, around: str, n: int, n_draws: int, genes: np.ndarray) -> dict[str, Any]:
        """Scalars (1 + S, n) of the truth and of draws, the truth first."""
        rows, truth, x = self.simulated(draw, around, n)
        parts: dict[str, list[Any]] = {}
        for here in np.array_split(np.arange(n), max(1, n * (n_draws + 1) * x.shape[1] // 2**22)):
            law = self.encoded(x[here], self.batch[rows[here]])
            z = self.torch.cat([truth[here][None], law.sample((n_draws,))])
            for name, value in ({"z": z} | self.values(z, x[here], rows[here], law, genes)).items():
                parts.setdefault(name, []).append(value)
        found = {name: self.torch.cat(pieces, 1).numpy() for name, pieces in parts.items()}
        return found | {"x": sparse.csr_matrix(x.numpy())}

    def weights(self, rows: np.ndarray, n_draws: int) -> np.ndarray:
        """(S, n) log importance weights of measured cells, each at its own total."""
        found = []
        for row in rows:
            x, here = self.seen(np.array([row])), np.array([row])
            law = self.encoded(x, self.batch[here])
            pieces = []
            for size in [1000] * (n_draws // 1000) + [n_draws % 1000] * (n_draws % 1000 > 0):
                z = law.sample((size,))
                v = self.values(z, x, here, law, np.array([0]))
                pieces.append((v["log p(x|z)"] + v["log p(z)"] - v["log q"])[:, 0])
            found.append(self.torch.cat(pieces).numpy())
        return np.stack(found, -1)


def in_peer(folder: Path) -> None:
    """What runs in the Python that has scvi-tools."""
    asked = json.loads((folder / "asked.json").read_text())
    began = time.perf_counter()
    theirs = Theirs(folder, asked["epochs"], asked["seed"])
    seconds = time.perf_counter() - began
    with theirs.torch.no_grad():
        for part in asked["parts"]:
            draw = np.random.default_rng([asked["seed"], PARTS.index(part)])
            if part == "khat":
                np.save(folder / "khat.npy", theirs.weights(np.array(asked["khat"]), asked["khat_draws"]))
                continue
            found = theirs.ranked(draw, part, asked["simulations"], asked["draws"], np.array(asked["genes"]))
            sparse.save_npz(folder / f"{part}_x.npz", found.pop("x"))
            np.savez(folder / f"{part}.npz", **{name.replace("|", " "): value for name, value in found.items()})
    (folder / "seconds.json").write_text(json.dumps(seconds))


def from_peer(asked: dict[str, Any], x: sparse.csr_matrix, batch: np.ndarray, names: list[str], python: str) -> Any:
    """part -> Calibration, or k-hat of cells; and seconds of the fit."""
    from pyrosc.check import pareto_k

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sparse.save_npz(folder / "x.npz", x)
        np.save(folder / "batch.npy", batch)
        (folder / "asked.json").write_text(json.dumps(asked))
        done = subprocess.run(
            [python, __file__, "--in-peer", name], capture_output=True, text=True, check=False,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"scvi-tools failed (without it leave out --peer):\n{done.stderr[-3000:]}")
        found: dict[str, Any] = {}
        for part in asked["parts"]:
            if part == "khat":
                import torch

                found[part] = pareto_k(torch.from_numpy(np.load(folder / "khat.npy")).double()).numpy()
                continue
            with np.load(folder / f"{part}.npz") as file:
                values = {key: file[key].astype(float) for key in file.files}
            found[part] = as_calibration(values, sparse.load_npz(folder / f"{part}_x.npz"), names, asked, part)
        return found, json.loads((folder / "seconds.json").read_text())


def as_calibration(
    values: dict[str, np.ndarray], x: sparse.csr_matrix, names: list[str], asked: dict[str, Any], part: str
) -> Any:
    """Their numbers, judged by our functions: the scalars of `pyrosc.check.calibration`."""
    from pyrosc.check import Calibration, judged
    from pyrosc.check.calibration import ranks_of

    draw = np.random.default_rng([asked["seed"], 9])
    z, shares = values["z"], values["log rho"]
    along = np.random.default_rng([asked["seed"], 11]).normal(size=(z.shape[-1], 10))
    along /= np.linalg.norm(along, axis=0)
    scalars = {f"z[{k}]": z[..., k] for k in range(z.shape[-1])} | {"|z|^2": (z**2).sum(-1)}
    scalars |= {f"u{i}.z": z @ along[:, i] for i in range(10)}
    scalars |= {"log p(x|z)": values["log p(x z)"], "log p(z)": values["log p(z)"]}
    scalars |= {f"log rho {name}": shares[..., g] for g, name in enumerate(names)}
    groups = shares.shape[1] // 10
    halves = shares[:, : 10 * groups, :5].reshape(len(shares), groups, 2, 5, -1).mean(3)
    ranks = {name: ranks_of(value, draw) for name, value in scalars.items()}
    for g, name in enumerate(names[:5]):
        ranks[f"lfc {name}"] = ranks_of(halves[:, :, 0, g] - halves[:, :, 1, g], draw)
    settings = {"story": "scvi-tools", "around": part, "n_simulations": x.shape[0], "n_draws": len(z) - 1}
    table = judged(ranks, len(z) - 1)
    states = [f"z[{k}]" for k in range(z.shape[-1])]
    density = ranks_of(values["log q"], draw)
    return Calibration(ranks, table, states, z[0], z[1:], density, x, settings)


# ---- in ours ------------------------------------------------------------------------------------


def ours(arm: str, cells: Any, seed: int) -> Any:
    """The fit of an arm; None where this pyrosc has no such arm yet."""
    import pyrosc
    from pyrosc.objective import KLWeight, MeanFieldELBO

    class Rising(MeanFieldELBO):
        """KL terms weigh what epoch / 400 says, beside the fit's own weight of 1."""

        def __init__(self, steps: float) -> None:
            super().__init__(max_plate_nesting=1)
            self.steps, self.done = steps, -2  # two runs go before the first step

        def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
            epoch = max(self.done, 0) // self.steps
            self.done += 1
            weight = KLWeight(min(1.0, epoch / WARMUP), keep=False)
            return super().differentiable_loss(weight(model), weight(guide), *args, **kwargs)

    options: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    if arm == "usual":
        parts = {"encoder": pyrosc.Encoder(norm="batch"), "decoder": pyrosc.Decoder(norm="batch")}
        options = dict(epochs=EPOCHS, warmup=0.0, lr=1e-3, schedule="constant", weight_decay=0.0, validation=None,
                       patience=None, objective=Rising(-(-len(cells) // 128)))  # fmt: skip
    if arm == "iwae":
        options = {"objective": "iwae", "k": 10}
    if arm == "full":
        parts = {"encoder": pyrosc.FullRankEncoder()}
    if arm in MIXTURES:
        parts = {"prior": pyrosc.MixturePrior(20)}
    kind = "mixture" if arm in MIXTURES else "default" if arm in REFINED or arm in GUIDE_STEPS else arm
    if (kind, id(cells.schema), seed) not in FITS:
        FITS.clear()
        FITS[kind, id(cells.schema), seed] = pyrosc.fit(
            pyrosc.scvi(cells, seed=seed, **parts), cells, seed=seed, progress=False, **options
        )
    fit = FITS[kind, id(cells.schema), seed]
    if arm in GUIDE_STEPS:
        key = "guide", id(cells.schema), seed
        if key not in FITS:
            FITS[key] = fit.train_guide(cells, steps=GUIDE_STEPS[arm], seed=seed, progress=False)
        fit = FITS[key]
    if arm in REFINED:  # calibration refines the cells that it makes up, as these settings say
        settings = fit.settings | {"refined": {"family": REFINED[arm], "steps": 150, "moments": MOMENTS.get(arm, 0)}}
        fit = pyrosc.Fit(fit.program, fit.history, settings, (), fit.landmarks, fit.examples)
    return fit


def scores(done: Any, keep: bool) -> dict[str, Any]:
    table, regions = done.table, done.coverage()
    row: dict[str, Any] = {
        "below": table.attrs["share_below"], "outside": table.attrs["n_outside"], "scalars": len(table),
        "median deviation": float(table["deviation"].median()), "worst": str(table["deviation"].idxmax()),
        "worst deviation": float(table["deviation"].max()), "spread": float(table["spread"].median()),
        "off": {str(name): round(float(v), 3) for name, v in table["deviation"].items() if v >= table["limit"][name]},
        "tarp": float(regions.loc[["TARP, another", "TARP, counts"], "deviation"].max()),
        "hpd deviation": float(regions.loc["HPD", "deviation"]), "hpd area": float(regions.loc["HPD", "area"]),
        "hpd 50": float(regions.loc["HPD", "50%"]), "hpd 90": float(regions.loc["HPD", "90%"]),
        "n drawn": done.settings.get("n_drawn"),
    }  # fmt: skip
    if keep:
        from pyrosc.check.calibration import ecdf

        points = np.arange(1, len(done.draws) + 1) / (len(done.draws) + 1)
        row["curves"] = {
            name: (ecdf(rank, len(done.draws)) - points).round(3).tolist()
            for name, rank in done.ranks.items() if len(rank) == len(done.truth)
        }  # fmt: skip
    return row


def of_khat(k: np.ndarray, n_draws: int) -> dict[str, float]:
    from pyrosc.psis import k_threshold

    limit = k_threshold(n_draws)
    return {"khat": float(np.mean(k)), "khat above": float(np.mean(~(k <= limit))), "limit": limit}


# ---- the control --------------------------------------------------------------------------------


def control(n_runs: int, simulations: int, draws: int) -> dict[str, Any]:
    """x ~ Poisson(library w z), z ~ Gamma(4, 4): the guide is the posterior, Gamma(4 + X, 4 + library W)."""
    import pyro
    import pyro.distributions as dist
    import torch

    import pyrosc
    from pyrosc.check import calibration

    share, state = torch.tensor([0.25, 0.15, 0.1, 0.3, 0.15, 0.05]), torch.tensor([0, 0, 0, 1, 1, 1])

    def model(cells: Any) -> None:
        with cells.plate():
            z = pyro.sample("z", dist.Gamma(4.0, 4.0).expand([2]).to_event(1))
            rho = pyro.deterministic("rho", share * z[..., state], event_dim=1)
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    def guide(cells: Any) -> None:
        sums = torch.stack([cells.x[:, state == k].sum(-1) for k in (0, 1)], -1)
        weight = torch.stack([share[state == k].sum() for k in (0, 1)])
        with cells.plate():
            pyro.sample("z", dist.Gamma(4.0 + sums, 4.0 + cells.library * weight).to_event(1))

    counts = np.random.default_rng(0).multinomial(200, share.double().numpy() / float(share.sum()), 50)
    cells = pyrosc.Cells.from_counts(counts)
    settings = {"n_cells": 50, "state": "finished", "best_epoch": 1, "kl_weight": 1.0}
    fit = pyrosc.Fit(pyrosc.Program(model, cells, guide), [], settings)
    inside, below, tarp = [], [], []
    for seed in range(n_runs):
        done = calibration(fit, cells, n_simulations=simulations, n_draws=draws, seed=seed, progress=False)
        inside.append(done.table["inside"].to_numpy())
        below.append(done.table.attrs["share_below"])
        tarp.append(done.coverage().loc[["TARP, another", "TARP, counts"], "deviation"].max())
    names = list(done.table.index)
    of_scalar = np.mean(inside, 0)
    # z[0] and z[1] of a run are independent: their rate is binomial.
    pair = np.array(inside)[:, :2]
    return {
        "runs": n_runs, "inside": float(np.mean(inside)), "least inside": float(of_scalar.min()),
        "states inside": int(pair.sum()), "states": int(pair.size),
        "all inside": float(np.mean([all(row) for row in inside])), "scalars": len(names),
        "below": float(np.mean(below)), "runs that pass": float(np.mean(np.array(below) >= 0.95)),
        "tarp": float(np.mean(tarp)), "tarp below .03": float(np.mean(np.array(tarp) < 0.03)),
        "tarp below .05": float(np.mean(np.array(tarp) < 0.05)),
    }  # fmt: skip


# ---- data, tables, pictures ----------------------------------------------------------------------


def kang(path: str, n_genes: int) -> Any:
    import anndata

    adata = anndata.read_h5ad(path)
    if "highly_variable_rank" in adata.var:
        order = np.argsort(adata.var["highly_variable_rank"].to_numpy(), kind="stable")
    else:  # of those there
        x = sparse.csr_matrix(adata.X)
        mean = np.asarray(x.mean(0)).ravel()
        fano = (np.asarray(x.power(2).mean(0)).ravel() - mean**2) / np.maximum(mean, 1e-12)
        order = np.argsort(-fano, kind="stable")
    adata = adata[:, np.sort(order[:n_genes])].copy()
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()


def report(found: dict[str, Any]) -> str:
    import pandas as pd

    lines = [
        "# Calibration",
        "",
        "Made by `benchmarks/calibration.py`, which says how to read it.",
        "",
        found["machine"],
        "",
    ]
    frame = pd.DataFrame(found["rows"])

    def number(group: pd.DataFrame, name: str) -> str:
        v = group[name].dropna()
        return "" if not len(v) else f"{v.mean():.3f}" + (f" ± {v.std():.3f}" if len(v) > 1 else "")

    for part in ("prior", "posterior"):
        here = frame[frame["part"] == part] if len(frame) else frame
        if not len(here):
            continue
        columns = ["below", "outside", "scalars", "median deviation", "tarp", "hpd 50", "hpd 90", "spread"]
        lines += [f"## Around the {part}", "", "| data | arm | seeds | " + " | ".join(columns) + " |"]
        lines.append("|---" * (len(columns) + 3) + "|")
        for (data, arm), group in here.groupby(["data", "arm"], sort=False):
            lines.append(f"| {data} | {arm} | {len(group)} | " + " | ".join(number(group, c) for c in columns) + " |")
        lines.append("")
    here = frame[frame["part"] == "khat"] if len(frame) else frame
    if len(here):
        lines += [
            "## Importance weights of measured cells",
            "",
            "| data | arm | seeds | mean k-hat | above the limit |",
        ]
        lines.append("|---|---|---|---|---|")
        for (data, arm), group in here.groupby(["data", "arm"], sort=False):
            lines.append(f"| {data} | {arm} | {len(group)} | {number(group, 'khat')} | {number(group, 'khat above')} |")
        lines.append("")
    here = frame[frame["part"] == "hmc"] if len(frame) else frame
    if len(here):
        columns = ["sd ratio within", "sd ratio", "mean error", "cells"]
        heads = "ratio of sds in 0.8 to 1.25, share | median ratio | mean error, sds | cells"
        lines += ["## Beside Hamiltonian Monte Carlo", "", f"| data | arm | seeds | {heads} |", "|---" * 7 + "|"]
        for (data, arm), group in here.groupby(["data", "arm"], sort=False):
            lines.append(f"| {data} | {arm} | {len(group)} | " + " | ".join(number(group, c) for c in columns) + " |")
        lines.append("")
    if found.get("control"):
        c = found["control"]
        lines += [
            "## Control: the exact posterior", "",
            f"{c['runs']} runs, {c['scalars']} scalars: {c['inside']:.3f} inside their 95 % bands (the least of a "
            f"scalar {c['least inside']:.3f}; of the two states {c['states inside']} of {c['states']}). "
            f"{c['below']:.3f} below the limit, {c['runs that pass']:.3f} of runs pass the line of 95 %. "
            f"The larger TARP deviation is {c['tarp']:.3f} on average, below 0.03 in {c['tarp below .03']:.3f} of runs "
            f"and below 0.05 in {c['tarp below .05']:.3f}.", "",
        ]  # fmt: skip
    return "\n".join(lines)


def picture(found: dict[str, Any], where: Path) -> None:
    from matplotlib.figure import Figure

    from pyrosc.check import simultaneous_band

    shown = [row for row in found["rows"] if "curves" in row and row["part"] == "prior"]
    if not shown:
        return
    sets = list(dict.fromkeys(row["data"] for row in shown))
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in shown)]
    figure = Figure(figsize=(2.6 * len(arms), 2.6 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), len(arms), squeeze=False, sharex=True, sharey=True)
    for row in shown:
        ax = axes[sets.index(row["data"])][arms.index(row["arm"])]
        n_points = len(next(iter(row["curves"].values()))) + 1
        at, lower, upper = simultaneous_band(row["simulations"], n_points)
        ax.fill_between(at, lower - at, upper - at, color="0.85", lw=0)
        for name, curve in row["curves"].items():
            kind = 0 if name.startswith(("z[", "u", "|")) else 1 if "rho" in name else 3
            ax.plot(at, curve, lw=0.6, color=f"C{kind}")
        ax.set_title(f"{row['data']}, {row['arm']}", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("rank of the truth", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("distribution less uniform", fontsize=8)
    figure.savefig(where, dpi=150)


def run(data: str, arm: str, seed: int, parts: list[str], adata: Any, batch: str, given: Any) -> list[dict[str, Any]]:
    import pyrosc
    from pyrosc.check import calibration, guide_error, importance

    cells = pyrosc.Cells.from_anndata(adata, batch=batch)
    asked = np.sort(np.random.default_rng(seed).permutation(len(cells))[: given.khat_cells])
    key = {"data": data, "arm": arm, "seed": seed, "simulations": given.simulations, "draws": given.draws}
    rows = []
    if arm in PEERS:
        from pyrosc.check.calibration import _genes

        fit = pyrosc.Fit(pyrosc.scvi(cells), [], {"n_cells": len(cells), "state": "finished", "best_epoch": 1})
        at, names = _genes(fit, cells, 20)
        question = {
            "epochs": min(PEERS[arm], given.epochs or PEERS[arm]), "seed": seed, "parts": parts,
            "simulations": given.simulations, "draws": given.draws, "genes": [int(i) for i in at],
            "khat": [int(i) for i in asked], "khat_draws": given.khat_draws,
        }  # fmt: skip
        x: Any = sparse.csr_matrix(adata.X).astype(np.float32)
        found, seconds = from_peer(question, x, cells.batch.numpy(), names, given.peer)
        for part in parts:
            made = of_khat(found[part], given.khat_draws) if part == "khat" else scores(found[part], seed == 0)
            rows.append(key | {"part": part, "seconds of fit": seconds} | made)
        return rows
    began = time.perf_counter()
    fit = ours(arm, cells, seed)
    seconds = time.perf_counter() - began
    for part in parts:
        began = time.perf_counter()
        if part == "khat":
            some = cells[asked]
            judge = (
                fit.refine(some, family=REFINED[arm], moments=MOMENTS.get(arm, 0), progress=False)
                if arm in REFINED
                else fit
            )
            made = of_khat(importance(judge, some, given.khat_draws, seed=seed)["k_hat"].to_numpy(), given.khat_draws)
        elif part == "hmc":
            some = cells[asked[:HMC_CELLS]]
            judge = (
                fit.refine(some, family=REFINED[arm], moments=MOMENTS.get(arm, 0), progress=False)
                if arm in REFINED
                else fit
            )
            found = guide_error(judge, some, seed=seed, progress=False)
            sure = found[found["is_judged"]]
            made = {
                "sd ratio within": found.attrs["share"], "cells": int(sure.index.get_level_values(0).nunique()),
                "mean error": float(sure["mean_error"].abs().mean()), "sd ratio": float(sure["sd_ratio"].median()),
            }  # fmt: skip
        else:
            done = calibration(
                fit, cells, around=part, n_simulations=given.simulations, n_draws=given.draws, within=WITHIN,
                refined=arm in REFINED, importance=1000 if arm in WEIGHED else 0, seed=seed, progress=False,
            )  # fmt: skip
            made = scores(done, seed == 0)
        took = {"seconds of fit": seconds, "seconds": time.perf_counter() - began}
        rows.append(key | {"part": part} | took | made)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kang", help="h5ad of Kang's variable genes; without it SIM-A alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", help="Python with scvi-tools; without it its arms are left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--sets", nargs="+", default=["Kang", "SIM-A"], choices=["Kang", "SIM-A"])
    parser.add_argument("--genes", type=int, default=1500, help="of Kang")
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=99)
    parser.add_argument("--khat-cells", type=int, default=500)
    parser.add_argument("--khat-draws", type=int, default=5000)
    parser.add_argument("--controls", type=int, default=100, help="runs of the exact posterior; 0 for none")
    parser.add_argument("--epochs", type=int, help="at most so many of scvi-tools, for a quick look")
    parser.add_argument("--table", action="store_true", help="only write the table and the picture of what is there")
    parser.add_argument("--in-peer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_peer:
        in_peer(given.in_peer)
        return
    import torch

    import pyrosc

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = None if given.out is None else given.out / "calibration.json"
    found: dict[str, Any] = json.loads(where.read_text()) if where and where.exists() else {"rows": []}
    found["machine"] = f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}"

    def keep() -> None:
        if where is None:
            return
        where.parent.mkdir(parents=True, exist_ok=True)
        beside = where.with_suffix(".part")
        beside.write_text(json.dumps(found))
        beside.replace(where)
        (where.parent / "calibration.md").write_text(report(found) + "\n")

    if not given.table:
        if given.controls and (found.get("control") or {}).get("runs", 0) < given.controls:
            found["control"] = control(given.controls, given.simulations, given.draws)
            keep()
        sets: dict[str, Any] = {}
        if given.kang and "Kang" in given.sets:
            sets["Kang"] = (kang(given.kang, given.genes), "donor")
        if "SIM-A" in given.sets:
            sets["SIM-A"] = (pyrosc.simulate.tissue(seed=0), "batch")
        for seed in given.seeds:
            for data, (adata, batch) in sets.items():
                for arm in given.arms:
                    if arm in PEERS and not given.peer:
                        continue
                    there = {r["part"] for r in found["rows"] if (r["data"], r["arm"], r["seed"]) == (data, arm, seed)}
                    parts = [
                        p
                        for p in given.parts
                        if p not in there
                        and not (p == "hmc" and arm in PEERS)
                        and not (p in ("khat", "hmc") and arm in WEIGHED)
                    ]
                    if not parts:
                        continue
                    began = time.perf_counter()
                    rows = run(data, arm, seed, parts, adata, batch, given)
                    found["rows"] += rows
                    for row in rows:
                        print({k: v for k, v in row.items() if k not in ("curves", "off")}, flush=True)
                    print(f"{data}, {arm}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
                    keep()
    if given.out:
        keep()
        picture(found, given.out / "calibration.png")
    print(report(found))


if __name__ == "__main__":
    main()
