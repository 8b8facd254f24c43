"""pyrosc against scvi-tools on a CPU: seconds an epoch, held-out ELBO against seconds, growth, memory, inference.

    python benchmarks/speed.py ../shared/data/kang_pbmc_ifnb.h5ad --out benchmarks/results
    python benchmarks/speed.py --short                 # simulated cells, a few minutes; what `make bench` runs

Parts (``--parts``), each written as soon as it is measured:

    epoch      seconds of a training epoch, NB and ZINB, batches of 128, 512 and 1,024, on Kang (2,792 cells x 2,000
               variable genes) and 50,000 simulated cells x 2,000 genes; both packages in one process, in turn
    floor      milliseconds of a step: pyrosc's, and the same matrix products with one dense pass in plain torch
    curve      held-out ELBO against seconds on Kang, until scvi-tools' default schedule (400 epochs) ends
    growth     seconds and peak memory of one epoch by number of cells and of genes; a process for each
    rest       import, latent extraction, expression, a fit of 100,000 x 2,000: seconds and peak memory

scvi-tools runs with its defaults (no validation in `epoch`, on every epoch in `curve`). Simulated counts are
gamma-Poisson with 7 % non-zeros. An epoch is timed around its mini-batches: scvi-tools' by callbacks, pyrosc's by
its own history (``cells_per_second``). Medians, and ratios of neighbours in time, because shared machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

PARTS = ("epoch", "floor", "curve", "growth", "rest")


def simulated(n_cells: int, n_genes: int, share: float = 0.07, seed: int = 0) -> Any:
    """An AnnData of gamma-Poisson counts with about this share of non-zeros, made in blocks, with two batches."""
    import anndata
    import numpy as np
    import pandas as pd
    from scipy import sparse

    draw = np.random.default_rng(seed)
    base = draw.random(n_genes) ** 3
    low, high = -12.0, 6.0
    for _ in range(40):  # the log scale that gives this share
        middle = (low + high) / 2
        zero = (1 / (1 + np.exp(middle) * base)).mean()
        low, high = (middle, high) if 1 - zero < share else (low, middle)
    blocks = []
    for start in range(0, n_cells, 5000):
        n = min(5000, n_cells - start)
        rate = draw.standard_exponential((n, n_genes), dtype=np.float32) * (np.exp(low) * base).astype(np.float32)
        blocks.append(sparse.csr_matrix(draw.poisson(rate).astype(np.float32)))
    counts = sparse.vstack(blocks, format="csr")
    empty = np.flatnonzero(counts.sum(1).A1 == 0) if hasattr(counts.sum(1), "A1") else []
    for row in empty:
        counts[row, 0] = 1
    obs = pd.DataFrame({"batch": draw.choice(["a", "b"], n_cells)}, index=[f"c{i}" for i in range(n_cells)])
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(n_genes)]))


def kang(path: str) -> Any:
    sys.path.insert(0, str(Path(__file__).parent))
    from kang import prepare

    adata = prepare(path)
    adata.obs["batch"] = adata.obs["donor"].astype(str).to_numpy()
    return adata


# ---- one epoch of each ------------------------------------------------------------------------


def our_epoch(program: Any, cells: Any, batch_size: int, n_epochs: int = 1) -> list[float]:
    """Seconds of each epoch."""
    import pyrosc

    options = dict(epochs=n_epochs, batch_size=batch_size, validation=None, progress=False, warmup=0.0)
    fit = pyrosc.fit(program, cells, **options)
    return [len(cells) / rate for rate in fit.history["cells_per_second"]]


def our_program(cells: Any, law: str) -> Any:
    import pyrosc

    return pyrosc.scvi(cells, likelihood=pyrosc.ZINBLikelihood() if law == "zinb" else pyrosc.NBLikelihood())


def their_model(adata: Any, law: str) -> Any:
    import scvi

    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    return scvi.model.SCVI(adata, gene_likelihood=law)


def their_epoch(model: Any, batch_size: int, n_epochs: int = 1) -> list[float]:
    from lightning.pytorch.callbacks import Callback

    class Clock(Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_epoch_start(self, *_: Any) -> None:
            self.began = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    clock = Clock()
    model.train(max_epochs=n_epochs, train_size=1.0, batch_size=batch_size, callbacks=[clock], **THEIR_QUIET)
    return clock.seconds


THEIR_QUIET = dict(enable_progress_bar=False, accelerator="cpu", logger=False, enable_checkpointing=False)


def epoch(adata: Any, name: str, repeats: int) -> list[dict[str, Any]]:
    import pyrosc

    cells = pyrosc.Cells.from_anndata(adata, batch="batch")
    rows = []
    for law in ("nb", "zinb"):
        program, model = our_program(cells, law), their_model(adata, law)
        for batch_size in (128, 512, 1024):
            ours, theirs = [], []
            for repeat in range(repeats + 1):  # the first is not counted
                one, other = our_epoch(program, cells, batch_size)[0], their_epoch(model, batch_size)[0]
                if repeat:
                    ours.append(one)
                    theirs.append(other)
            ratios = [b / a for a, b in zip(ours, theirs)]
            rows.append({
                "data": name, "law": law.upper(), "batch": batch_size, "pyrosc": statistics.median(ours),
                "scvi-tools": statistics.median(theirs), "ratio": statistics.median(ratios),
                "least ratio": min(ratios), "pyrosc all": ours, "scvi-tools all": theirs,
            })  # fmt: skip
            print(table(rows[-1:], EPOCH)[-1], flush=True)
    return rows


EPOCH = ("data", "law", "batch", "pyrosc", "scvi-tools", "ratio", "least ratio")


def products(n: int, g: int, h: int) -> float:
    """Seconds of the five large matrix products of a step and one dense pass, the mean of 20."""
    import torch

    first, last = torch.randn(h, g), torch.randn(g, h)
    x, hidden, top = torch.rand(n, g), torch.randn(n, h), torch.randn(n, g)
    began = time.perf_counter()
    for _ in range(20):
        torch.nn.functional.linear(x, first)
        hidden.t() @ x
        out = torch.nn.functional.linear(hidden, last)
        top @ last
        top.t() @ hidden
        out.exp_()
    return (time.perf_counter() - began) / 20


def floor(adata: Any, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of a step, and of what no implementation can leave out."""
    import pyrosc

    cells = pyrosc.Cells.from_anndata(adata, batch="batch")
    rows = []
    for n in (128, 512, 1024):
        program = our_program(cells, "nb")
        bare, step = [], []
        for repeat in range(repeats + 1):
            seconds = our_epoch(program, cells, n)[0] * n / len(cells)
            least = products(n, cells.n_genes, 128)
            if repeat:
                bare.append(least)
                step.append(seconds)
        rows.append({
            "batch": n, "step ms": 1e3 * statistics.median(step), "floor ms": 1e3 * statistics.median(bare),
            "ratio": statistics.median(a / b for a, b in zip(step, bare)),
        })  # fmt: skip
    return rows


# ---- held-out ELBO against seconds ------------------------------------------------------------


def curve(adata: Any, out: Path | None) -> list[dict[str, Any]]:
    """Both packages' own held-out ELBO at KL weight 1 (nats a cell) after each epoch, on the same split."""
    import numpy as np

    import pyrosc

    n = adata.n_obs
    held = np.sort(np.random.default_rng(0).permutation(n)[: n // 10])
    cells = pyrosc.Cells.from_anndata(adata, batch="batch")
    began = time.perf_counter()
    fit = pyrosc.fit(our_program(cells, "nb"), cells, validation=held, progress=False)
    total = time.perf_counter() - began
    late = total - fit.settings["seconds"]  # before the first step
    rows = [
        {"package": "pyrosc", "seconds": late + s, "elbo": e}
        for s, e in zip(fit.history["seconds"], fit.history["validation_elbo"])
    ]
    best = max(r["elbo"] for r in rows)
    print(f"pyrosc: {best:.1f} after {total:.1f} s", flush=True)

    from lightning.pytorch.callbacks import Callback

    theirs: list[dict[str, Any]] = []

    class Watch(Callback):
        def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
            found = trainer.callback_metrics.get("elbo_validation")
            if found is not None and not trainer.sanity_checking:
                theirs.append({"package": "scvi-tools", "seconds": time.perf_counter() - start, "elbo": -float(found)})

    model = their_model(adata, "nb")
    indices = [np.setdiff1d(np.arange(n), held), held, np.array([], dtype=int)]
    start = time.perf_counter()
    model.train(
        callbacks=[Watch()], check_val_every_n_epoch=1, datasplitter_kwargs={"external_indexing": indices},
        **THEIR_QUIET,
    )  # fmt: skip
    rows += theirs
    if out:
        draw_curve(rows, out / "speed_curve.png")
    return rows


def draw_curve(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in ("pyrosc", "scvi-tools"):
        mine = [r for r in rows if r["package"] == name]
        axis.plot([r["seconds"] for r in mine], [r["elbo"] for r in mine], label=name)
    axis.set(xlabel="seconds", ylabel="held-out ELBO, nats a cell", xscale="log", title="Kang PBMC, NB, defaults")
    top = max(r["elbo"] for r in rows)
    axis.set_ylim(top - 60, top + 5)
    axis.legend()
    figure.savefig(path, dpi=150)


def milestones(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """When each passes scvi-tools' best, and its own."""
    of = {name: [r for r in rows if r["package"] == name] for name in ("pyrosc", "scvi-tools")}
    target = max(r["elbo"] for r in of["scvi-tools"])
    found = []
    for name, mine in of.items():
        passed = next((r["seconds"] for r in mine if r["elbo"] >= target), None)
        found.append({
            "package": name, "best ELBO": max(r["elbo"] for r in mine), "passes scvi-tools' best at s": passed,
            "all s": mine[-1]["seconds"],
        })  # fmt: skip
    return found


# ---- in processes of their own ----------------------------------------------------------------


def child(task: str, package: str, n_cells: int, n_genes: int, path: str | None) -> None:
    """What a process of its own measures; prints one line of JSON."""
    began = time.perf_counter()
    if package == "pyrosc":
        import pyrosc
    else:
        import scvi  # noqa: F401
    found: dict[str, float] = {"import s": time.perf_counter() - began}
    if task == "import":
        print("JSON " + json.dumps(found | {"peak GB": peak()}))
        return
    import anndata

    adata = anndata.read_h5ad(path)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    found["data GB"] = (adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes) / 1e9
    found["before GB"] = peak()
    n_steps = 600 if task == "memory" else None
    if package == "pyrosc":
        began = time.perf_counter()
        cells = pyrosc.Cells.from_anndata(adata, batch="batch")
        found["read s"] = time.perf_counter() - began
        found["counts GB"] = cells._counts.nbytes / 1e9
        program = our_program(cells, "nb")
        if n_steps:
            fit = pyrosc.fit(program, cells, epochs=max(1, n_steps * 128 // len(cells)), progress=False)
            found["fit s"] = fit.settings["seconds"]
        else:
            found["epoch s"] = our_epoch(program, cells, 1024)[0]
            fit = pyrosc.fit(program, cells[:128], epochs=1, validation=None, progress=False)
        found["peak GB"] = peak()
        for name, ask in (("latent", lambda: fit.latent(cells)), ("expression", lambda: fit.expression(cells[:2000]))):
            began = time.perf_counter()
            ask()
            found[f"{name} s"] = time.perf_counter() - began
    else:
        model = their_model(adata, "nb")
        if n_steps:
            began = time.perf_counter()
            model.train(max_epochs=max(1, n_steps * 128 // n_cells), **THEIR_QUIET)
            found["fit s"] = time.perf_counter() - began
        else:
            found["epoch s"] = their_epoch(model, 1024)[0]
        found["peak GB"] = peak()
        for name, ask in (
            ("latent", lambda: model.get_latent_representation()),
            ("expression", lambda: model.get_normalized_expression(adata[:2000], n_samples=25)),
        ):
            began = time.perf_counter()
            ask()
            found[f"{name} s"] = time.perf_counter() - began
    print("JSON " + json.dumps(found | {"last peak GB": peak()}))


def peak() -> float:
    """Largest resident memory of this process so far, GB (Linux: `getrusage` would tell that of its parent)."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM"))


def apart(task: str, package: str, n_cells: int = 0, n_genes: int = 0, path: str | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if task != "import":  # made here, so that the child's memory is not that of making it
            data = kang(path) if path else simulated(n_cells, n_genes)
            path = str(Path(folder) / "data.h5ad")
            data.write_h5ad(path)
        command = [sys.executable, __file__, "--child", task, package, str(n_cells), str(n_genes), path or ""]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("JSON ")]
    if not lines:
        return {"package": package, "cells": n_cells, "genes": n_genes, "failed": ran.stderr.strip()[-300:]}
    return {"package": package, "cells": n_cells, "genes": n_genes} | json.loads(lines[-1][5:])


def growth(packages: list[str], sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    rows = []
    for n_cells, n_genes in sizes:
        for package in packages:
            rows.append(apart("epoch", package, n_cells, n_genes))
            print(rows[-1], flush=True)
    return rows


GROWTH = ("package", "cells", "genes", "data GB", "epoch s", "before GB", "peak GB", "latent s", "failed")


def rest(packages: list[str], path: str | None, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for package in packages:
        imports = [apart("import", package)["import s"] for _ in range(repeats)]
        rows.append({"package": package, "what": "import", "import s": statistics.median(imports)})
    for package in packages:
        rows.append({"what": "Kang, latent and expression"} | apart("epoch", package, path=path))
    for package in packages:
        rows.append({"what": "fit, 600 steps of 128"} | apart("memory", package, 100_000, 2000))
    return rows


REST = (
    "what", "package", "import s", "data GB", "counts GB", "before GB", "peak GB", "fit s", "latent s",
    "expression s", "failed",
)  # fmt: skip


# ---- tables -----------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    def text(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    used = [c for c in columns if any(r.get(c) is not None for r in rows)]
    lines = ["| " + " | ".join(used) + " |", "|---" * len(used) + "|"]
    return lines + ["| " + " | ".join(text(r.get(c)) for c in used) + " |" for r in rows]


TITLES = {
    "epoch": "Seconds of an epoch (medians), and ratios of neighbours in time",
    "floor": "Milliseconds of a step on Kang (NB), and of its matrix products with one dense pass in plain torch",
    "curve": "Held-out ELBO against seconds (Kang, NB, defaults of both)",
    "growth": "One epoch at batch 1,024, by size",
    "rest": "Import, inference, memory",
}


def report(found: dict[str, Any]) -> str:
    lines = ["# Speed against scvi-tools", "", found["machine"], ""]
    for part, columns in (("epoch", EPOCH), ("floor", ("batch", "step ms", "floor ms", "ratio")),
                          ("curve", ("package", "best ELBO", "passes scvi-tools' best at s", "all s")),
                          ("growth", GROWTH), ("rest", REST)):  # fmt: skip
        if part in found:
            rows = milestones(found[part]) if part == "curve" else found[part]
            lines += [f"## {TITLES[part]}", "", *table(rows, columns), ""]
            if part == "curve":
                lines += ["![held-out ELBO against seconds](speed_curve.png)", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="kang_pbmc_ifnb.h5ad")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="simulated cells, epochs and floor only")
    parser.add_argument("--child", nargs=5)
    given = parser.parse_args()
    if given.child:
        task, package, n_cells, n_genes, path = given.child
        child(task, package, int(n_cells), int(n_genes), path or None)
        return
    import torch

    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    packages = ["pyrosc"]
    try:
        import logging

        import scvi

        scvi.settings.verbosity = 40
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        packages.append("scvi-tools")
        version = f", scvi-tools {scvi.__version__}"
    except ImportError:
        version = ""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = next((t.split(":")[1].strip() for t in open("/proc/cpuinfo") if t.startswith("model name")), cpu)
    where = None if given.out is None else given.out / "speed.json"
    found: dict[str, Any] = json.loads(where.read_text()) if where and where.exists() else {}
    found["machine"] = f"{cpu}, {threads} thread(s) a process, torch {torch.__version__}{version}"

    def keep(part: str, rows: list[dict[str, Any]]) -> None:
        found[part] = rows
        if given.out and where:
            given.out.mkdir(parents=True, exist_ok=True)
            where.write_text(json.dumps(found, indent=1))
            (given.out / "speed.md").write_text(report(found))

    if given.short or given.path is None:
        adata = simulated(3000, 2000)
        print("\n".join(table(floor(adata, 3), ("batch", "step ms", "floor ms", "ratio"))))
        if len(packages) == 2:
            epoch(adata, "simulated", 3)
        return
    adata = kang(given.path)
    for part in given.parts:
        if part == "epoch":
            keep(part, epoch(adata, "Kang", given.repeats))
            keep(part, found[part] + epoch(simulated(50_000, 2000), "50,000 simulated", given.repeats))
        elif part == "floor":
            keep(part, floor(adata, given.repeats))
        elif part == "curve":
            keep(part, curve(adata, given.out))
        elif part == "growth":
            by_cells = [(10**4, 2000), (10**5, 2000), (10**6, 2000)]
            keep(part, growth(packages, by_cells + [(5000, g) for g in (1000, 2000, 5000, 10_000, 20_000)]))
        else:
            keep(part, rest(packages, given.path, given.repeats))
    print(report(found))


if __name__ == "__main__":
    main()
