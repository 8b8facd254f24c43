"""Reading AnnData: its counts and its names, checked, or an error that says what to do.

What stands here looks at an AnnData on behalf of ``Cells.from_anndata`` and ``Cells.align``:
which matrix holds the counts, whether names can tell cells and genes apart, which genes were
chosen, and where the genes of a fit are. Nothing is written to it. What is odd but accepted
goes into ``notes``, which ``cells.py`` makes into one warning.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

import anndata
import numpy as np
import pandas as pd

from .counts import CountMatrix, logger, read_counts
from .schema import column_of, did_you_mean, listed

_BARCODE = re.compile(r"[ACGT]{10,}([-_.]\w+)?$")
_REGION = re.compile(r"[\w.]+[:_-]\d+[-_]\d+$")


def where_of(layer: str | None) -> str:
    return "adata.X" if layer is None else f'adata.layers["{layer}"]'


def remedy_of(adata: anndata.AnnData, layer: str | None) -> str:
    others = [name for name in adata.layers if name != layer]
    return (
        "Name the layer with raw counts: Cells.from_anndata(adata, layer=...)"
        + (f"; layers there: {listed(others)}" if others else " (there are no other layers)")
        + ("; adata.raw holds a matrix too." if adata.raw is not None else ".")
    )


def read_layer(adata: anndata.AnnData, layer: str | None, notes: list[str]) -> CountMatrix:
    where = where_of(layer)
    if layer is not None and layer not in adata.layers:
        raise ValueError(
            f'no layer "{layer}" in adata.layers. Layers there: {listed(adata.layers) or "none"}.'
            + did_you_mean(layer, adata.layers)
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ValueError(f"adata.X is empty (None). {remedy_of(adata, layer)}")
    began = time.perf_counter()
    try:
        counts = read_counts(matrix, where, adata.obs_names, adata.var_names, remedy_of(adata, layer), notes)
    except OSError as error:
        raise ValueError(f"could not read the counts of {adata.filename}: {error}") from error
    if adata.isbacked and layer is None:
        seconds = time.perf_counter() - began
        logger.info(
            "read %s into memory: %.1f MB of counts in %.1f s, %.0f MB a second; the file is not needed again",
            adata.filename, counts.nbytes / 1e6, seconds, counts.nbytes / 1e6 / seconds,
        )  # fmt: skip
    return counts


def check_names(adata: anndata.AnnData, notes: list[str]) -> None:
    """Enough cells and genes, with names that tell genes apart and are not barcodes."""
    n, g = adata.shape
    if not n or not g:
        raise ValueError(f"adata has {n:,} cells and {g:,} genes; at least one of each is needed")
    for index, what in ((adata.var_names, "gene"), (adata.obs_names, "cell")):
        if index.is_unique:
            continue
        repeated = listed(dict.fromkeys(index[index.duplicated()]))
        if what == "gene":
            raise ValueError(
                f"{index.duplicated().sum():,} gene names repeat ({repeated}). "
                "Make them unique first: adata.var_names_make_unique()"
            )
        notes.append(f"{index.duplicated().sum():,} cell names repeat ({repeated}); results cannot be joined by name")
    looked = list(map(str, adata.var_names[:200]))
    if sum(bool(_BARCODE.match(name)) for name in looked) > 0.5 * len(looked):
        raise ValueError(
            f"the columns look like cells, not genes ({listed(looked, 3)}): {n:,} rows x {g:,} columns. "
            "Cells are rows here: pass adata.T"
        )
    if "feature_types" in adata.var:
        kinds = adata.var["feature_types"].astype(str).value_counts()
        if len(kinds) > 1:
            what = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
            notes.append(f'adata.var["feature_types"] mixes {what}; one story sees them all alike. Choose with genes=')


def are_regions(names: Any) -> bool:
    """Whether most names are of regions of a genome, such as "chr1:10-510": many of them are the rule."""
    looked = [str(name) for name in names[:200]]
    return sum(bool(_REGION.match(name)) for name in looked) > 0.5 * len(looked)


def chosen_genes(adata: anndata.AnnData, genes: Any) -> np.ndarray:
    """Positions (in the order of adata for a mask, in the order asked for by names)."""
    if isinstance(genes, str):
        if genes not in adata.var:
            raise ValueError(
                f'genes="{genes}": no such column in adata.var. '
                f"Columns there: {listed(adata.var.columns, 20) or 'none'}." + did_you_mean(genes, adata.var.columns)
            )
        genes = adata.var[genes]
    genes = np.asarray(genes)
    if genes.dtype == bool:
        if len(genes) != adata.n_vars:
            raise ValueError(f"genes= is a mask of {len(genes):,} for {adata.n_vars:,} genes")
        at = np.flatnonzero(genes)
    else:
        at = adata.var_names.get_indexer(genes.astype(str))
        if (at < 0).any():
            raise ValueError(f"genes= names {listed(genes[at < 0])}, not in adata.var_names." + did_you_mean(
                genes[at < 0][0], adata.var_names))  # fmt: skip
        if len(set(at)) < len(at):
            raise ValueError("genes= names a gene twice; name each once")
    if not len(at):
        raise ValueError("genes= chooses no gene")
    return at


def places(
    here: np.ndarray, wanted: Iterable[str], missing: str, notes: list[str]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Where each wanted gene is among those here (-1: nowhere), and the mask of those that are."""
    wanted = np.asarray(list(wanted))
    place = pd.Index(here).get_indexer(wanted)
    absent = place < 0
    extra = len(here) - int((~absent).sum())
    if extra:
        logger.info("%d genes that the fit does not know are left out", extra)
    if not absent.any():
        return place, None
    share = absent.mean()
    text = f"{absent.sum():,} of {len(wanted):,} genes of the fit are missing here ({listed(wanted[absent])})."
    if share > 0.5:
        cause = _mismatch(here, wanted)
        raise ValueError(f"{text} Genes of the fit: {listed(wanted, 3)}; here: {listed(here, 3)}. {cause}")
    if missing == "error" or (missing == "zero" and share >= 0.05):
        raise ValueError(
            text + (' Fewer than 5 % may be taken as not measured: Cells.align(adata, fit.schema, missing="zero").'
                    if share < 0.05 else " That is too many to go without; count them, or fit on the genes both have.")
        )  # fmt: skip
    text += " They are taken as not measured"
    if missing == "mask":
        logger.info("%s", text)
    else:
        notes.append(text)
    return place, ~absent


def _mismatch(here: np.ndarray, wanted: np.ndarray) -> str:
    """The likely reason why names of genes do not meet."""

    def overlap(change: Any) -> float:
        return len({change(g) for g in here} & {change(g) for g in wanted}) / max(len(wanted), 1)

    if overlap(lambda g: g.split(".")[0]) > 0.5:
        return 'They differ by a version suffix: adata.var_names = adata.var_names.str.split(".").str[0].'
    if overlap(str.upper) > 0.5:
        return "They differ in upper and lower case: mouse and human symbols? Map them to one species first."
    ensembl = [np.mean([bool(re.match(r"ENS[A-Z]*G\d+", g)) for g in names]) > 0.5 for names in (here, wanted)]
    if ensembl[0] != ensembl[1]:
        return "One side has Ensembl ids, the other symbols: set adata.var_names to the kind that the fit has."
    return "Are these cells of the same species and assay?"


def known_column(obs: pd.DataFrame, name: str, role: str, levels: Any) -> pd.Series:
    if name not in obs.columns:
        raise ValueError(
            f'the fit knows {role} "{name}", which is not in adata.obs. Known levels: {listed(levels, 10)}. '
            f'Either set it (adata.obs["{name}"] = the level that is nearest), average over the known ones '
            f'(set any, then expression(..., do={{"{name}": "all"}})), or fit again without it.'
        )
    return column_of(obs, name, role)
