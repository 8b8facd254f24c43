"""pyrosc against scvi-tools on Kang PBMC: held-out likelihood, latent space, time and memory.

    python benchmarks/kang.py ../shared/data/kang_pbmc_ifnb.h5ad --out benchmarks/results

2,792 cells of known donor x 2,000 highly variable genes (seurat_v3), batch = donor, NB. Each seed
splits the cells 80/10/10; every arm selects its epoch on the validation tenth and is scored
once on the test tenth. Arms:

    pyrosc          pyrosc.scvi and pyrosc.fit with their defaults
    scvi default    scvi-tools SCVI(gene_likelihood="nb"), its defaults (400 epochs)
    scvi early      the same with early stopping on the validation ELBO and pyrosc's learning rate

scvi-tools does not go back to its best epoch by itself; here a callback keeps those weights in
memory for both of its arms, so that it too is scored at its best.

All are scored by one estimator of our own: log p(x) by importance sampling from each arm's own
encoder, in float64 with the same NB density (pyrosc's, tested against scipy), and the Pareto k-hat of each
cell. Arms run in processes of their own, in turn, with the same number of threads; peak
memory is that of the process. Fits 4 and 5 repeat seed 0's split with other seeds for the
clustering means (5 fits x 10 restarts of k-means).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARMS = ("pyrosc", "scvi default", "scvi early")
SPLITS = (0, 1, 2)
EXTRA_FITS = (3, 4)  # more fits of split 0, for clustering only


def prepare(path: str) -> Any:
    """Counts of 2,000 highly variable genes, as scanpy chooses them."""
    import scanpy as sc

    adata = sc.read_h5ad(path)
    adata = adata[adata.obs["donor"] != "none"].copy()
    sc.pp.highly_variable_genes(adata, n_top_genes=2000, flavor="seurat_v3")
    return adata[:, adata.var["highly_variable"]].copy()


def positions(n: int, split: int) -> dict[str, Any]:
    import numpy as np

    order = np.random.default_rng(split).permutation(n)
    tenth = n // 10
    return {
        "validation": np.sort(order[:tenth]),
        "test": np.sort(order[tenth : 2 * tenth]),
        "train": np.sort(order[2 * tenth :]),
    }


def log_joint(x: Any, z: Any, rho: Any, theta: Any) -> Any:
    """log p(x, z) of (S, n) in float64 from shares (S, n, G): NB with the observed total, N(0, I) on z."""
    import torch

    from pyrosc.distributions import NegativeBinomial

    counts = NegativeBinomial(x.sum(-1, keepdim=True) * rho, theta, validate_args=False).to_event(1)
    return counts.log_prob(x) + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)


def score(encode: Any, decode: Any, x: Any, batch: Any, n_draws: int) -> dict[str, list[float]]:
    """log p(x) and k-hat of each cell: S draws of z from N(loc, scale), all in float64."""
    import torch

    from pyrosc.check import pareto_k

    torch.manual_seed(0)
    found: dict[str, list[float]] = {"log_likelihood": [], "k_hat": []}
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(4):
            loc, scale = encode(x[rows], batch[rows])
            q = torch.distributions.Normal(loc, scale)
            z = q.sample((n_draws,))
            rho, theta = decode(z, x[rows], batch[rows])
            weights = log_joint(x[rows], z, rho, theta) - q.log_prob(z).sum(-1)
            found["log_likelihood"] += (weights.logsumexp(0) - torch.log(torch.tensor(float(n_draws)))).tolist()
            found["k_hat"] += pareto_k(weights).tolist()
    return found


def fit_pyrosc(adata: Any, at: dict[str, Any], seed: int, progress: bool) -> tuple[Any, Any, float, dict[str, Any]]:
    """(encode, decode, seconds, facts)."""
    import numpy as np
    import torch

    import pyrosc

    cells = pyrosc.Cells.from_anndata(adata, batch="donor")
    keep = np.sort(np.concatenate([at["train"], at["validation"]]))
    held_out = np.flatnonzero(np.isin(keep, at["validation"]))
    began = time.perf_counter()
    result = pyrosc.fit(pyrosc.scvi(cells, seed=seed), cells[keep], validation=held_out, seed=seed, progress=progress)
    seconds = time.perf_counter() - began
    program = result.program.copy().double()
    encoder, decoder = program.parts["encoder"], program.parts["decoder"]

    def encode(x: Any, batch: Any) -> Any:
        return encoder.moments(encoder.features(x.log1p()))

    def decode(z: Any, x: Any, batch: Any) -> Any:
        level = torch.nn.functional.one_hot(batch, cells.schema.n_batches).double()
        return decoder.out(decoder.layers(z, level)).softmax(-1), program.parts["dispersion"]()

    facts = {
        "epochs": len(result.history),
        "best_epoch": int(result.settings["best_epoch"]),
        "lr": result.settings["lr"],
    }
    return encode, decode, seconds, facts


def keep_best() -> Any:
    """A Lightning callback that keeps the weights of the epoch with the best held-out ELBO."""
    from lightning.pytorch.callbacks import Callback

    class KeepBest(Callback):
        def __init__(self) -> None:
            self.least, self.weights = float("inf"), {}

        def on_validation_epoch_end(self, trainer: Any, plan: Any) -> None:
            value = float(trainer.callback_metrics.get("elbo_validation", float("inf")))
            if value < self.least and not trainer.sanity_checking:
                self.least = value
                self.weights = {k: v.detach().clone() for k, v in plan.module.state_dict().items()}

    return KeepBest()


def fit_scvi(
    adata: Any, at: dict[str, Any], seed: int, early: bool, progress: bool
) -> tuple[Any, Any, float, dict[str, Any]]:
    import numpy as np
    import scvi
    import torch

    import pyrosc

    scvi.settings.seed = seed
    scvi.settings.verbosity = 40
    keep = np.sort(np.concatenate([at["train"], at["validation"]]))
    seen = adata[keep].copy()
    scvi.model.SCVI.setup_anndata(seen, batch_key="donor")
    model = scvi.model.SCVI(seen, gene_likelihood="nb")
    inside = np.isin(keep, at["validation"])
    indices = [np.flatnonzero(~inside), np.flatnonzero(inside)]
    lr = pyrosc.fit.__kwdefaults__["lr"] if early else 1e-3
    options: dict[str, Any] = {"early_stopping": True, "plan_kwargs": {"lr": lr}} if early else {}
    best = keep_best()
    began = time.perf_counter()
    model.train(
        accelerator="cpu", datasplitter_kwargs={"external_indexing": indices}, enable_progress_bar=progress,
        check_val_every_n_epoch=1, callbacks=[best], **options,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    model.module.load_state_dict(best.weights)
    module = model.module.eval().double()
    level = {name: i for i, name in enumerate(sorted(adata.obs["donor"].unique()))}
    coded = model.adata_manager.get_state_registry("batch").categorical_mapping
    assert [str(v) for v in coded] == sorted(map(str, level))

    def encode(x: Any, batch: Any) -> Any:
        q, _ = module.z_encoder(x.log1p())
        return q.loc, q.scale

    def decode(z: Any, x: Any, batch: Any) -> Any:
        level = batch.unsqueeze(-1).expand(*z.shape[:-1], 1)
        depth = torch.ones_like(x[:, :1]).expand(*z.shape[:-1], 1)
        shares = [module.decoder("gene", a, b, c)[0] for a, b, c in zip(z, depth, level)]
        return torch.stack(shares), module.px_r.exp()

    history = model.history["elbo_validation"]["elbo_validation"]
    facts = {
        "epochs": len(history),
        "best_epoch": int(np.asarray(history, dtype=float).argmin()) + 1,
        "lr": lr,
    }
    return encode, decode, seconds, facts


def run_arm(arm: str, data: str, split: int, seed: int, threads: int, n_draws: int) -> dict[str, Any]:
    """One fit in this process, scored."""
    import warnings

    import anndata
    import numpy as np
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    adata = anndata.read_h5ad(data)
    at = positions(adata.n_obs, split)
    if arm == "pyrosc":
        encode, decode, seconds, facts = fit_pyrosc(adata, at, seed, False)
    else:
        encode, decode, seconds, facts = fit_scvi(adata, at, seed, arm == "scvi early", False)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    x = torch.tensor(adata.X.toarray(), dtype=torch.float64)
    batch = torch.tensor(np.unique(adata.obs["donor"].astype(str), return_inverse=True)[1])
    with torch.no_grad():
        z = encode(x, batch)[0].numpy()
    result = {"arm": arm, "split": split, "seed": seed, "seconds": seconds, "peak_gb": memory, **facts}
    result |= cluster(z, adata.obs["cell_type"].astype(str).to_numpy(), adata.obs["donor"].astype(str).to_numpy())
    if split == seed:
        result |= {f"test_{k}": v for k, v in score(encode, decode, x[at["test"]], batch[at["test"]], n_draws).items()}
    return result


def cluster(z: Any, kind: Any, donor: Any) -> dict[str, float]:
    """k-means against cell types (mean of 10 restarts), and how well donors mix among 50 neighbours."""
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.neighbors import NearestNeighbors

    scores = []
    for seed in range(10):
        found = KMeans(len(set(kind)), n_init=1, random_state=seed).fit_predict(z)
        scores.append((adjusted_rand_score(kind, found), normalized_mutual_info_score(kind, found)))
    near = NearestNeighbors(n_neighbors=51).fit(z).kneighbors(z, return_distance=False)[:, 1:]
    levels, code = np.unique(donor, return_inverse=True)
    share = np.stack([(code[near] == i).mean(1) for i in range(len(levels))], -1)
    overall = np.bincount(code) / len(code)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(1).mean()
    return {
        "ari": float(np.mean([s[0] for s in scores])),
        "nmi": float(np.mean([s[1] for s in scores])),
        "donor_mixing": float(entropy / -(overall * np.log(overall)).sum()),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: means over fits, and paired differences of test log-likelihoods to pyrosc."""
    import numpy as np

    lines = [
        "| arm | test log p(x), nats a cell | pyrosc ahead by, paired (95 % interval) | k-hat > 0.7 | ARI | NMI "
        "| donor mixing | seconds a fit (median) | times pyrosc's | epochs (best) | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = {
        r["split"]: np.array(r["test_log_likelihood"]) for r in results if r["arm"] == "pyrosc" and "test_k_hat" in r
    }
    ours = np.median([r["seconds"] for r in results if r["arm"] == "pyrosc"]) if reference else float("nan")
    for arm in ARMS:
        mine = [r for r in results if r["arm"] == arm]
        scored = [r for r in mine if "test_k_hat" in r]
        if not scored:
            continue
        likelihood = np.concatenate([r["test_log_likelihood"] for r in scored])
        k_hat = np.concatenate([r["test_k_hat"] for r in scored])
        seconds = np.median([r["seconds"] for r in mine])
        versus = ""
        if arm != "pyrosc" and reference:
            ahead = np.concatenate([reference[r["split"]] - np.array(r["test_log_likelihood"]) for r in scored])
            spread = 1.96 * ahead.std(ddof=1) / np.sqrt(len(ahead))
            versus = f"{ahead.mean():+.2f} ({ahead.mean() - spread:+.2f}, {ahead.mean() + spread:+.2f})"
        ari, nmi, mixing = (np.mean([r[k] for r in mine]) for k in ("ari", "nmi", "donor_mixing"))
        sd = np.std([r["ari"] for r in mine], ddof=1) if len(mine) > 1 else float("nan")
        epochs = ", ".join(f"{r['epochs']} ({r['best_epoch']})" for r in mine)
        lines.append(
            f"| {arm} | {likelihood.mean():.2f} | {versus} | {np.mean(k_hat > 0.7):.1%} | {ari:.3f} (sd {sd:.3f}) "
            f"| {nmi:.3f} | {mixing:.3f} | {seconds:.1f} | {seconds / ours:.1f} | {epochs} "
            f"| {max(r['peak_gb'] for r in mine):.2f} |"
        )
    return "\n".join(lines)


def machine(threads: int) -> str:
    from importlib import metadata

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        model = next(
            (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), model
        )
    names = ("pyrosc", "scvi-tools", "torch", "pyro-ppl", "scanpy")
    return f"{model}, {threads} thread(s) of {os.cpu_count()}; " + ", ".join(
        f"{n} {metadata.version(n)}" for n in names
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--split", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(
            "RESULT " + json.dumps(run_arm(given.arm, given.file, given.split, given.seed, given.threads, given.draws))
        )
        return
    given.out.mkdir(parents=True, exist_ok=True)
    # Arms that are not run now are kept from the last run in this folder.
    held = json.loads((given.out / "kang.json").read_text())["results"] if (given.out / "kang.json").exists() else []
    results: list[dict[str, Any]] = [r for r in held if r["arm"] not in given.arms]
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "kang.h5ad")
        prepare(given.file).write_h5ad(data)
        for split, seed in [(s, s) for s in SPLITS] + [(0, s) for s in EXTRA_FITS]:
            for arm in given.arms:
                command = [sys.executable, __file__, data, "--arm", arm, "--split", str(split), "--seed", str(seed)]
                command += ["--threads", str(given.threads), "--draws", str(given.draws)]
                environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                line = next((t for t in done.stdout.splitlines() if t.startswith("RESULT ")), None)
                if line is None:
                    sys.exit(f"{arm}, split {split}, seed {seed} failed:\n{done.stderr[-3000:]}")
                results.append(json.loads(line.removeprefix("RESULT ")))
                shown = {k: v for k, v in results[-1].items() if not k.startswith("test_")}
                print(shown, flush=True)
                (given.out / "kang.json").write_text(
                    json.dumps({"machine": machine(given.threads), "results": results})
                )
    text = f"# Kang PBMC: pyrosc against scvi-tools\n\n{machine(given.threads)}\n\n{table(results)}\n"
    (given.out / "kang.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
