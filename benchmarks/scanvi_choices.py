"""Why scANVI's defaults are what they are: one thing changed at a time, on simulated subtle types.

    python benchmarks/scanvi_choices.py --seeds 2 --out benchmarks/results

`pyrosc.simulate.subtle_types` (6,000 cells x 1,500 genes, 4 types, 50 labels each, a tenth of them wrong). Scores are
of cells without a label, as `pyrosc.check.labels` has them. Arms:

    default            pyrosc.scanvi: weight 20, up to 256 labelled cells a step
    weight 1, 10, 50   of known labels in training
    32, 128 labelled   at most so many labelled cells a step
    collapsed          scvi with one normal a type for the prior of z and the same classifier term, by the
                       responsibilities of that prior: no networks for types
    from scvi          start= a fit of pyrosc.scvi

Rows are added to scanvi_choices.json as they come; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrosc
from pyrosc import Cells, Classifier, LabelPrior, Part, training
from pyrosc.check.labels import reliability
from pyrosc.models import scvi

SCORES = ("balanced_accuracy", "brier", "nll", "ece")


class TypePrior(Part):
    """One normal a type, given what is known of a cell's type; and the classifier that it implies."""

    def __init__(self, weight: float = 20.0) -> None:
        super().__init__(weight=weight)
        self.labels = LabelPrior()

    def build(self, schema: Any, sizes: Any, parts: Any) -> None:
        self.labels.build(schema, sizes, parts)
        shape = len(self.labels.types), sizes["n_latent"]
        self.loc = nn.Parameter(0.75**0.5 * torch.randn(shape))
        self.log_scale = nn.Parameter(torch.full(shape, 0.5).log())
        self.register_buffer("share", torch.ones(()))

    def start(self, cells: Cells) -> None:
        self.share.copy_((cells.label >= 0).float().mean())

    @property
    def components(self) -> Any:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)

    def log_odds(self, z: torch.Tensor) -> torch.Tensor:
        return self.components.log_prob(z.unsqueeze(-2))

    def responsibilities(self, z: torch.Tensor, cells: Cells) -> torch.Tensor:
        return self.log_odds(z).softmax(-1)

    def forward(self, cells: Cells) -> Any:
        share = self.labels(cells)
        return dist.MixtureSameFamily(share, self.components.expand(share.logits.shape))


def collapsed_guide(cells: Cells, *, encoder: Any, prior: Any) -> None:
    with cells.plate():
        loc, scale = encoder(cells)
        z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
        evidence = prior.labels.evidence(cells)
        told = (prior.log_odds(z).log_softmax(-1) + evidence).logsumexp(-1)
        known = (evidence != 0).any(-1)
        pyro.factor("known", -prior.arguments["weight"] / prior.share * told.where(known, 0.0), has_rsample=False)


def program(arm: str, cells: Cells) -> Any:
    if arm.startswith("weight"):
        return pyrosc.scanvi(cells, classifier=Classifier(weight=float(arm.split()[1])))
    if arm == "collapsed":
        parts = dict(pyrosc.scvi(cells).parts.items()) | {"prior": TypePrior()}
        return pyrosc.Program(scvi.model, cells, collapsed_guide, **parts)
    if arm == "from scvi":
        return pyrosc.scanvi(cells, start=pyrosc.fit(pyrosc.scvi(cells), cells, progress=False))
    return pyrosc.scanvi(cells)


ARMS = (
    "default", "weight 1", "weight 10", "weight 50", "32 labelled", "128 labelled", "collapsed", "from scvi",
)  # fmt: skip


def run(arm: str, seed: int) -> dict[str, Any]:
    adata = pyrosc.simulate.subtle_types(seed=seed)
    cells = Cells.from_anndata(adata, label="label")
    truth, hidden = adata.obs["cell_type"].cat.codes.to_numpy(), adata.obs["label"].isna().to_numpy()
    usual = training._LABELLED
    training._LABELLED = int(arm.split()[0]) if arm.endswith("labelled") else usual
    began = time.perf_counter()
    try:
        fit = pyrosc.fit(program(arm, cells), cells, progress=False)
    finally:
        training._LABELLED = usual
    share = fit.label_probabilities(cells[hidden]).to_numpy()
    table = reliability(share, truth[hidden], 0.95, 10, 0)
    return {name: table.attrs[name] for name in SCORES} | {"seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "scanvi_choices.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    warnings.simplefilter("ignore", pyrosc.PyroscWarning)
    torch.set_num_threads(1)
    for seed in range(given.seeds):
        for arm in given.arms:
            key = f"{seed} {arm}"
            if key not in rows:
                rows[key] = run(arm, seed)
                print(key, rows[key], flush=True)
                path.write_text(json.dumps(rows, indent=1))
    lines = [
        "# scANVI's defaults",
        "",
        "Made by `benchmarks/scanvi_choices.py`, which says how to read it.",
        f"{platform.processor() or platform.machine()}, one thread, Python {platform.python_version()}, "
        f"torch {torch.__version__}, pyrosc {pyrosc.__version__}.",
        "",
        "| arm | seeds | " + " | ".join(name.replace("_", " ") for name in SCORES) + " | seconds |",
        "|---|---|" + "---|" * (len(SCORES) + 1),
    ]
    for arm in ARMS:
        found = [row for key, row in rows.items() if key.split(" ", 1)[1] == arm]
        if found:
            means = [f"{np.mean([row[name] for row in found]):.3f}" for name in SCORES]
            lines.append(f"| {arm} | {len(found)} | " + " | ".join(means)
                         + f" | {np.median([row['seconds'] for row in found]):.0f} |")  # fmt: skip
    (given.out / "scanvi_choices.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
