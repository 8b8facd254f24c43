"""Fragments: whether counts of open chromatin are of fragments, of reads or of presence, and from one to the other.

A fragment is cut out of open chromatin and sequenced from both ends. So counts of reads are mostly even, and their even
numbers say nothing of biology, while counts of fragments fall off from one (Martens et al. 2024, Nature Methods 21:28).
"""

from __future__ import annotations

import warnings
from typing import Any

import anndata
import numpy as np
from scipy import sparse

from .cells import Cells
from .errors import PyroscWarning
from .likelihoods import BernoulliLikelihood
from .reading import remedy_of, where_of

KINDS = ("fragments", "reads", "presence")
_EVEN = 0.6  # share of even numbers among non-zero counts from which they look like reads


def count_kind(data: Any, *, layer: str | None = None) -> str:
    """What counts (N, G) of open chromatin look like: "fragments", "reads" or "presence".

    "presence" if none is above 1. "reads" if there are more twos than ones, and more than 60 % of the non-zero counts
    are even: the two ends of a fragment are counted each, and few are lost at edges of regions. "fragments" otherwise:
    also where there are more twos than ones because regions are wide or cells were merged, as odd and even numbers
    are then about as common.

    Parameters
    ----------
    data : Cells, AnnData, or a matrix (N, G), dense or sparse
    layer : of an AnnData; None for X

    Raises
    ------
    ValueError
        If nothing was counted, or there is no such layer.
    TypeError
        If this is no matrix of numbers.

    >>> count_kind([[0, 1, 1, 2], [1, 0, 3, 1]]), count_kind([[0, 2, 2, 4], [2, 1, 4, 2]]), count_kind([[0, 1, 1]])
    ('fragments', 'reads', 'presence')
    """
    return _kind_of(_non_zero(data, layer))


def _kind_of(values: np.ndarray) -> str:
    if not len(values):
        raise ValueError("there are no counts above 0, so nothing tells fragments from reads")
    if values.max() <= 1:
        return "presence"
    ones, twos = int((values == 1).sum()), int((values == 2).sum())
    return "reads" if twos > ones and (values % 2 == 0).mean() > _EVEN else "fragments"


def _non_zero(data: Any, layer: str | None = None) -> np.ndarray:
    """Non-zero values."""
    if isinstance(data, Cells):
        values = np.asarray(data._own_counts().data)
    else:
        matrix = _matrix(data, layer)
        values = np.asarray(matrix.data if sparse.issparse(matrix) else matrix).ravel()
    if values.dtype.kind not in "buif":
        raise TypeError(f"counts must be numbers, not {values.dtype}")
    return values[values != 0]


def _matrix(data: Any, layer: str | None) -> Any:
    if not isinstance(data, anndata.AnnData):
        if layer is not None:
            raise ValueError("layer= is for an AnnData; a matrix has none")
        return data if sparse.issparse(data) else np.asarray(data)
    if layer is not None and layer not in data.layers:
        raise ValueError(f'no layer "{layer}" in adata.layers. Layers there: {", ".join(data.layers) or "none"}.')
    matrix = data.X if layer is None else data.layers[layer]
    if matrix is None:
        raise ValueError(f"{where_of(layer)} is empty (None). {remedy_of(data, layer)}")
    return matrix if sparse.issparse(matrix) else np.asarray(matrix)


def reads_to_fragments(data: Any, *, layer: str | None = None, check: bool = True) -> Any:
    """Counts of fragments from counts of reads: half of each, rounded up. A new object; the one given stays as it is.

    A fragment whose other end fell outside the region has one read there, and counts as one fragment.

    Parameters
    ----------
    data : AnnData, or a matrix (N, G), dense or sparse
    layer : of an AnnData, to be converted; None for X. Others stay.
    check : whether to refuse counts that do not look like reads (`count_kind`)
        Half of fragment counts are no counts of anything.

    Returns
    -------
    AnnData or matrix
        As was given, with counts of fragments.

    Raises
    ------
    ValueError
        If values are negative or not whole, or with ``check`` look like fragments or presence.

    >>> reads_to_fragments([[0, 1, 2], [2, 4, 4]])
    array([[0, 1, 1],
           [1, 2, 2]])
    """
    if isinstance(data, Cells):
        raise TypeError("Cells hold totals of their counts too: convert the AnnData or matrix, then make Cells of it")
    matrix = _matrix(data, layer)
    values = np.asarray(matrix.data if sparse.issparse(matrix) else matrix)
    where = where_of(layer) if isinstance(data, anndata.AnnData) else "the matrix"
    if values.dtype.kind not in "buif":
        raise TypeError(f"{where} must hold numbers, not {values.dtype}")
    wrong = ~((values >= 0) & (values == np.floor(values)) & np.isfinite(values))
    if wrong.any():
        raise ValueError(
            f"{where} must hold whole numbers of reads >= 0, but {int(wrong.sum()):,} of {values.size:,} values looked "
            f"at are not (first: {values[wrong][0]})"
        )
    if check:
        found = values[values != 0]
        kind = _kind_of(found)
        if kind != "reads":
            raise ValueError(
                f"{where} looks like {kind}, not reads: {_told(found)}. Counts of fragments are used as they are; "
                "if these are reads all the same, pass check=False"
            )
    half = _halved(values)
    if sparse.issparse(matrix):
        new = matrix.copy()
        new.data = half
    else:
        new = half
    if not isinstance(data, anndata.AnnData):
        return new
    made = data.to_memory() if data.isbacked else data.copy()
    if layer is None:
        made.X = new
    else:
        made.layers[layer] = new
    return made


def _halved(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        return np.ceil(values / 2).astype(values.dtype)
    return values.astype(np.int8) if values.dtype.kind == "b" else values // 2 + values % 2


def _told(values: np.ndarray) -> str:
    """The numbers that `count_kind` goes by."""
    ones, twos = int((values == 1).sum()), int((values == 2).sum())
    return f"{ones:,} ones, {twos:,} twos, {100 * (values % 2 == 0).mean():.0f} % even, at most {values.max():g}"


def check_fragments(cells: Cells, likelihood: Any) -> None:
    """Refuse counts that the likelihood is not for, and warn of reads."""
    if not len(cells) or not cells.has_counts:
        return
    kind, is_presence = count_kind(cells), isinstance(likelihood, BernoulliLikelihood)
    if kind == "presence" and not is_presence:
        raise ValueError(
            "these counts are all 0 or 1: cut to presence? A Poisson law says how many fragments there are. Read the "
            "layer with counts of fragments, Cells.from_anndata(adata, layer=...); where there is none, "
            "pass likelihood=BernoulliLikelihood()"
        )
    if kind != "presence" and is_presence:
        raise ValueError(
            "BernoulliLikelihood is for counts of 0 and 1, and these go further: PoissonLikelihood() uses them as they "
            "are; to see what is lost without, cut them first, adata.X = (adata.X > 0).astype('float32')"
        )
    if kind == "reads":
        warnings.warn(
            "these counts look like reads, not fragments: more are even than odd, as both ends of a fragment were "
            "counted, and a Poisson law takes that for signal. Convert them first: pyrosc.reads_to_fragments(adata)",
            PyroscWarning, stacklevel=3,
        )  # fmt: skip
