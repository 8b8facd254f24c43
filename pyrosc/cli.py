"""The command line: ``python -m pyrosc demo`` and ``python -m pyrosc fit FILE``.

Bad input prints one line to standard error and exits with status 2.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch

from . import __version__
from .cells import Cells
from .datasets import pbmc
from .errors import FitError, PyroscWarning
from .models.scvi import scvi
from .posterior import Fit
from .training import fit

_MANY_CELLS = 5_000
_INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
_said: set[str] = set()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    given = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always", PyroscWarning)
        _said.clear()
        warnings.showwarning = _remark
        try:
            return given.command(given)
        except (ValueError, TypeError, OSError, ImportError, FitError) as error:
            print(f"pyrosc: error: {error}", file=sys.stderr)
            return 2


def _remark(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, PyroscWarning) and str(message) not in _said:
        _said.add(str(message))
        print(f"note: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyrosc", description="Generative models of single-cell counts.")
    parser.add_argument("--version", action="version", version=f"pyrosc {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="scVI on 700 real blood cells, start to finish")
    demo.set_defaults(command=_demo)
    own = commands.add_parser("fit", help="scVI on the counts of an h5ad file")
    own.add_argument("file", metavar="FILE", help="an .h5ad file")
    own.add_argument("--layer", help="layer with raw counts (default: X)")
    own.add_argument("--batch", help="column of obs with the batch")
    own.add_argument("--label", help="column of obs with cell types, to compare the latent space with")
    own.add_argument(
        "--categorical", action="append", default=[], metavar="COLUMN", help="further covariate; may repeat"
    )
    own.add_argument(
        "--continuous", action="append", default=[], metavar="COLUMN", help="continuous covariate; may repeat"
    )
    own.add_argument("--genes", help="column of var that marks the genes to use, such as highly_variable")
    own.add_argument("--latent", type=int, default=10, help="latent dimensions (default: 10)")
    own.add_argument("--gene", help="the gene whose expression is shown (default: the one that tells types apart most)")
    own.set_defaults(command=_fit)
    for command, folder in ((demo, "demo"), (own, "pyrosc_fit")):
        command.add_argument(
            "--out", type=Path, default=Path(folder), help=f"folder for the results (default: {folder})"
        )
        command.add_argument(
            "--overwrite", action="store_true", default=command is demo, help="replace results that are there"
        )
        command.add_argument("--epochs", type=int, help="passes over the data (default: by its size)")
        command.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
        command.add_argument("--device", default="auto", help="auto, cpu or cuda")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _demo(given: argparse.Namespace) -> int:
    adata = pbmc()
    print(f"{adata.n_obs} blood cells x {adata.n_vars} genes, {adata.obs['cell_type'].nunique()} cell types\n")
    cells = Cells.from_anndata(adata, label="cell_type")
    return _run(given, adata, cells, n_latent=10, gene="CD79A" if "CD79A" in adata.var_names else None, key="X_scvi")


def _fit(given: argparse.Namespace) -> int:
    path = Path(given.file)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        adata = anndata.read_h5ad(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} could not be read as h5ad: {error}") from error
    cells = Cells.from_anndata(
        adata, layer=given.layer, batch=given.batch, label=given.label, genes=given.genes,
        categorical=given.categorical, continuous=given.continuous,
    )  # fmt: skip
    return _run(given, adata, cells, n_latent=given.latent, gene=given.gene, key="X_scvi")


def _run(
    given: argparse.Namespace, adata: anndata.AnnData, cells: Cells, *, n_latent: int, gene: str | None, key: str
) -> int:
    """Train scVI, say what was found, and write it; the exit status."""
    out: Path = given.out
    files = {name: out / name for name in ("fit.safetensors", "cells.h5ad", "training.png", "latent.png")}
    taken = [str(f) for f in files.values() if f.exists()]
    if taken and not given.overwrite:
        raise ValueError(f"{', '.join(taken)} would be replaced: pass --overwrite, or another --out")
    program = scvi(cells, n_latent=n_latent, seed=given.seed)
    if gene is not None:
        _check_gene(gene, cells)
    print(program.describe() + "\n")
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    result = fit(program, cells, epochs=given.epochs, seed=given.seed, device=given.device, progress=not given.quiet)
    result.save(files["fit.safetensors"], overwrite=True)
    print(f"\n{result.summary()}\n")
    z = result.latent(cells)
    if cells.schema.label is not None:
        print(_recovery(cells, z) + "\n")
    print(_expression(result, cells, gene) + "\n")
    result.write(adata, key=key, overwrite=True)
    adata.write_h5ad(files["cells.h5ad"])
    written = [files["fit.safetensors"], files["cells.h5ad"]]
    try:
        from . import plot

        figure: Any = plot.history(result).figure
        figure.savefig(files["training.png"], dpi=150)
        label = cells.schema.label or cells.schema.batch
        color = None if label is None else cells.obs[label.column]
        figure = plot.latent(z, color, title=f"{result.program.story}, latent means").figure
        figure.savefig(files["latent.png"], dpi=150)
        written += [files["training.png"], files["latent.png"]]
    except ImportError as error:
        print(f"no pictures: {error}")
    print(f"written in {time.perf_counter() - began:.0f} s (training included):")
    for file in written:
        print(f"  {file}  {file.stat().st_size / 1e6:.2f} MB")
    return _INTERRUPTED if result.settings["state"] == "interrupted" else 0


def _check_gene(gene: str, cells: Cells) -> None:
    from .schema import did_you_mean

    if gene not in cells.schema.genes:
        raise ValueError(f'there is no gene "{gene}".' + did_you_mean(gene, cells.schema.genes))


def _recovery(cells: Cells, z: np.ndarray) -> str:
    """How well k-means on the latent space finds the labels, against as many principal components of log counts."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    except ImportError:
        return 'recovery of cell types needs scikit-learn: pip install "pyrosc[demo]"'
    if len(cells) > _MANY_CELLS:  # principal components of all of a large data set would not fit into memory
        some = np.sort(np.random.default_rng(0).permutation(len(cells))[:_MANY_CELLS])
        cells, z = cells[some], z[some]
    known = (cells.label >= 0).numpy()
    truth = cells.label.numpy()[known]
    n_types, n_restarts = len(set(truth.tolist())), 10
    if n_types < 2:
        return "recovery of cell types needs at least two of them"
    x: Any = cells.x
    logged = np.log1p((x / cells.library * 1e4).numpy())
    spaces = {
        "scvi latent": z,
        f"{z.shape[1]} PCs of log counts": PCA(min(z.shape[1], min(logged.shape)), random_state=0).fit_transform(
            logged
        ),
    }
    lines = [f"recovery of {n_types} cell types by k-means (mean of {n_restarts} starts)   ARI   NMI"]
    for name, space in spaces.items():
        scores = []
        for seed in range(n_restarts):
            found = KMeans(n_types, n_init=1, random_state=seed).fit_predict(space[known])
            scores.append((adjusted_rand_score(truth, found), normalized_mutual_info_score(truth, found)))
        ari, nmi = np.mean(scores, 0)
        lines.append(f"  {name:<60}{ari:6.2f}{nmi:6.2f}")
    return "\n".join(lines)


def _telling_gene(cells: Cells) -> str:
    """The gene whose share differs most between types (as roots, types weighed by size), else between cells."""
    sums = cells.gene_sums()
    if cells.schema.label is None:
        mean = sums.counts / len(cells)
        return cells.schema.genes[int((sums.squares / len(cells) - mean**2).div(mean + 0.1).argmax())]
    overall = (sums.counts / sums.counts.sum()).sqrt()
    apart = torch.zeros_like(overall)
    for kind in range(cells.schema.n_labels):
        counts = cells[(cells.label == kind)].gene_sums().counts
        apart += (cells.label == kind).double().mean() * ((counts / counts.sum().clamp(min=1)).sqrt() - overall) ** 2
    return cells.schema.genes[int(apart.argmax())]


def _expression(result: Fit, cells: Cells, gene: str | None) -> str:
    """One gene in a few cells, with its uncertainty."""
    if gene is None:
        gene = _telling_gene(cells)
    # One cell of each of the commonest types, where there are types.
    at = np.linspace(0, len(cells) - 1, 5).astype(int)
    if cells.schema.label is not None:
        kinds = np.argsort(cells.schema.label.counts)[::-1][:5]
        at = np.array([int((cells.label == int(kind)).nonzero()[0]) for kind in kinds])
    shown = cells[at]
    table = result.expression(shown, gene, n_draws=200, scale=1e4, interval=0.9)[gene]
    labels = [""] * len(shown) if cells.schema.label is None else shown.obs[cells.schema.label.column].astype(str)
    lines = [f"{gene}, expected counts per 10,000, with 90 % intervals (given the weights)"]
    for name, label, row in zip(shown.names, labels, table.itertuples(index=False)):
        lines.append(f"  {name:<22}{label:<22}{row.mean:8.2f}   [{row.lower:.2f}, {row.upper:.2f}]")
    return "\n".join(lines)
