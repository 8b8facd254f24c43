"""Why MrVI is told as it is: one thing changed at a time, on simulated donors and on Kang.

    python benchmarks/mrvi_choices.py --seeds 2 --kang kang2000.h5ad --out benchmarks/results

Data: SIM-C (`pyrosc.simulate.donors`, 8,000 cells x 1,000 genes, 8 types, 16 donors), "trees", in which donors differ
in two types, and "none", in which they differ in their shares of types alone (proportions=2.0); and Kang's 16 samples,
donor x condition, of the genes in the file. Arms:

    default            pyrosc.mrvi
    plain encoder      encoder=Encoder(): it reads counts as they are, with what the sample has in all cells
    warm-up 0.3        the KL weight rises over 0.3 of the steps, as in other stories, instead of 0.6
    fast effects       effects and directions guided as other global sites are, at ten times the learning rate
    network            effects in the state and 20 dimensions more, decoded by the network: no directions, so that what
                       a unit of an effect does to genes has no prior
    network, shared    effects in the dimensions of the state itself, decoded by the network

Scores: of "trees" the rank correlation with the true distances of donors in each of the two types (one fit a tissue),
and of all the largest "sd" of `Fit.sample_spread` over types in which donors do not differ, which should be near 0; of
Kang, how many of 16 samples the first split of the tree in CD14 monocytes puts on the side of their condition, and the
area under the curve with which states u of these cells tell the condition (logistic regression, five-fold). The mean
held-out ELBO is beside: it does not choose between arms.

Rows are added to mrvi_choices.json as they come; an interrupted run goes on where it stopped.
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
import pyro
import torch
from scipy import stats
from scipy.cluster import hierarchy
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from torch import nn

import pyrosc
from pyrosc import Cells, SampleEffects
from pyrosc.models import mrvi

MONOCYTES = "CD14 Mono"
N_OWN = 20


def networked(
    cells: Cells, *, effects: Any, prior: Any, archetypes: Any, library: Any, dispersion: Any, decoder: Any,
    likelihood: Any,
) -> None:  # fmt: skip
    """`models.mrvi` with effects on the state, which the network decodes: z = (u, 0) + shift."""
    theta, effect = dispersion(), effects()
    with cells.plate():
        u = pyro.sample("u", prior(cells))
        shares = pyro.deterministic("archetypes", archetypes(u), event_dim=1)
        shift = effects.at(effect, shares, cells)
        wide = nn.functional.pad(u, (0, shift.shape[-1] - u.shape[-1]))
        z = pyro.deterministic("z", wide + shift, event_dim=1)
        total = library(cells)
        rho, hidden = decoder(z, cells)
        rho = pyro.deterministic("rho", rho, event_dim=1)
        counts = likelihood(total * rho, dispersion.at(theta, cells, hidden), hidden)
        pyro.sample("x", counts, obs=cells.x)


def just_u(cells: Cells, *, encoder: Any) -> None:
    """A guide of states alone; the Program completes it for effects and directions."""
    with cells.plate():
        loc, scale = encoder(cells)
        pyro.sample("u", pyro.distributions.Normal(loc, scale).to_event(1))


class Widened(nn.Module):
    """A decoder of more numbers than the encoder gives."""

    def __init__(self, n_in: int) -> None:
        super().__init__()
        self.n_in, self.own = n_in, pyrosc.Decoder(n_in)

    def build(self, schema: Any, sizes: Any, parts: Any) -> None:
        self.own.build(schema, {"n_latent": self.n_in}, parts)

    def start(self, cells: Cells) -> None:
        self.own.start(cells)

    def forward(self, z: Any, cells: Cells) -> Any:
        return self.own(z, cells)


def program_of(arm: str, cells: Cells) -> pyrosc.Program:
    if arm == "plain encoder":
        return pyrosc.mrvi(cells, encoder=pyrosc.Encoder())
    usual = dict(pyrosc.mrvi(cells).parts.items())
    if arm == "fast effects":
        usual.pop("posterior")
        return pyrosc.Program(mrvi.model, cells, just_u, **usual)
    if arm.startswith("network"):
        usual.pop("directions")
        wide = 10 if arm.endswith("shared") else 10 + N_OWN
        usual |= {"effects": SampleEffects(6, wide), "posterior": pyrosc.SampleNormal(), "decoder": Widened(wide)}
        return pyrosc.Program(networked, cells, mrvi.guide, **usual)
    return pyrosc.mrvi(cells)


ARMS = ("default", "plain encoder", "warm-up 0.3", "fast effects", "network", "network, shared")


def fitted(arm: str, cells: Cells) -> tuple[pyrosc.Fit, float]:
    program, began = program_of(arm, cells), time.perf_counter()
    epochs = pyrosc.training.default_epochs(round(0.9 * len(cells)), 128, 600, pyrosc.SampleNormal.steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pyrosc.PyroscWarning)
        fit = pyrosc.fit(program, cells, epochs=epochs, warmup=0.3 if "0.3" in arm else 0.6, progress=False)
    return fit, time.perf_counter() - began


def on_donors(arm: str, data: str, seed: int) -> dict[str, Any]:
    adata = (
        pyrosc.simulate.donors(seed=seed)
        if data == "trees"
        else pyrosc.simulate.donors(n_active=0, proportions=2.0, seed=seed)
    )
    cells = Cells.from_anndata(adata, sample="donor")
    fit, seconds = fitted(arm, cells)
    spread = fit.sample_spread(cells, "cell_type", n_draws=25, most=50)["sd"]
    active = ["type0", "type1"] if data == "trees" else []
    row: dict[str, Any] = {"sd_of_none": float(spread.drop(active).max()), "seconds": seconds}
    if active:
        far = fit.sample_distances(cells[cells.obs["cell_type"].isin(active).to_numpy()], "cell_type", most=50)
        pairs = np.triu_indices(16, 1)
        row["rank"] = [
            float(stats.spearmanr(pyrosc.sample_matrix(far, t).to_numpy()[pairs],
                                  adata.uns["distances"][t].to_numpy()[pairs])[0]) for t in active
        ]  # fmt: skip
    return row | {"elbo": float(fit.history["validation_elbo"].iloc[-1])}


def on_kang(arm: str, path: str) -> dict[str, Any]:
    adata = anndata.read_h5ad(path)
    adata = adata[(adata.obs["donor"] != "none").to_numpy()].copy()
    cells = Cells.from_anndata(adata, sample="sample")
    fit, seconds = fitted(arm, cells)
    own = cells[(cells.obs["cell_type"] == MONOCYTES).to_numpy()]
    tree, names = pyrosc.sample_tree(fit.sample_distances(own))
    cut = hierarchy.fcluster(tree, 2, "maxclust") == 1
    is_stim = np.array([str(name).endswith("stim") for name in names])
    agree = int(max((cut == is_stim).sum(), (cut != is_stim).sum()))
    told = (own.obs["condition"] == "stim").to_numpy()
    u = fit.latent(own, site="u")
    chance = cross_val_predict(LogisticRegression(max_iter=500), u, told, cv=5, method="predict_proba")[:, 1]
    return {
        "split": agree, "auc": float(roc_auc_score(told, chance)), "seconds": seconds,
        "elbo": float(fit.history["validation_elbo"].iloc[-1]),
    }  # fmt: skip


def written(rows: list[dict[str, Any]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "mrvi_choices.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "# Choices of MrVI",
        "",
        "Made by `benchmarks/mrvi_choices.py`, which says how to read it.",
        "",
        f"- One thread of 2 CPU cores that other work shared, Python {platform.python_version()}; pyrosc "
        f"{pyrosc.__version__}, torch {torch.__version__}",
        "",
        "| arm | rank correlation in types that differ | largest sd where none do, trees | the same, none | "
        "Kang: first split, of 16 | Kang: AUC of condition from u | held-out ELBO: trees, none, Kang |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        own = [r for r in rows if r["arm"] == arm]
        if not own:
            continue
        trees, none, kang = ([r for r in own if r["data"] == d] for d in ("trees", "none", "kang"))
        cells = [
            "; ".join(", ".join(f"{v:.2f}" for v in r["rank"]) for r in trees),
            ", ".join(f"{r['sd_of_none']:.3f}" for r in trees),
            ", ".join(f"{r['sd_of_none']:.3f}" for r in none),
            ", ".join(str(r["split"]) for r in kang),
            ", ".join(f"{r['auc']:.2f}" for r in kang),
            "; ".join(", ".join(f"{r['elbo']:.1f}" for r in group) for group in (trees, none, kang) if group),
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    (out / "mrvi_choices.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kang", help="Kang's cells, some thousand genes, with sample, donor, condition, cell_type")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    held = given.out / "mrvi_choices.json"
    rows = json.loads(held.read_text()) if held.exists() else []
    wanted = [("kang", 0)] * bool(given.kang) + [(d, s) for s in range(given.seeds) for d in ("trees", "none")]
    for data, seed in wanted:
        for arm in given.arms:
            if any((r["arm"], r["data"], r["seed"]) == (arm, data, seed) for r in rows):
                continue
            row = on_kang(arm, given.kang) if data == "kang" else on_donors(arm, data, seed)
            rows.append({"arm": arm, "data": data, "seed": seed} | row)
            print(rows[-1], flush=True)
            written(rows, given.out)


if __name__ == "__main__":
    main()
