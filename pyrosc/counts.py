"""Count matrices: CSR held once, and dense blocks that remember where their counts are.

A matrix of single-cell counts is some 93 % zeros. ``CountMatrix`` keeps the rest in
compressed rows, in the smallest integers that hold them, as tensors, so that the same
gather makes a mini-batch on a CPU and on a GPU. The dense block that it makes carries
the positions of its non-zero counts, and the densities in ``distributions.py`` use
them instead of searching.
"""

from __future__ import annotations

import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

logger = logging.getLogger("pyrosc")

_PIECE = 2**20  # entries that a pass over a matrix looks at in one go
_ROOM = "pyrosc_nonzeros"  # attribute under which a dense block carries its Nonzeros


def may_look(t: Tensor) -> bool:
    """Whether looking at a number of ``t`` costs nothing; on a GPU the host would have to wait for it."""
    return t.device.type == "cpu"


class Nonzeros(NamedTuple):
    """Where a dense block (..., G) of counts is not zero.

    index : (m,) int64, ascending positions in the flattened block
    gene : (m,) int64, column of each
    count : (m,) floating, the counts, > 0
    ends : (n,) int64, where each row of the block ends in these, for n rows of G
    mask : (G,) bool or None, genes that were measured; the others say nothing
    """

    index: Tensor  # type: ignore[assignment]
    gene: Tensor
    count: Tensor  # type: ignore[assignment]
    ends: Tensor
    mask: Tensor | None = None


def carried(x: Tensor) -> Nonzeros | None:
    """The non-zero entries that ``x`` carries, if it does and was not edited since."""
    found, version = getattr(x, _ROOM, (None, None))
    return found if version == x._version else None


def nonzeros(x: Tensor) -> Nonzeros:
    """The non-zero entries of ``x`` (..., G): carried by it, else searched for."""
    found = carried(x)
    if found is not None:
        return found
    flat = x.reshape(-1)
    index = flat.nonzero().squeeze(-1)
    n_genes = x.shape[-1]
    ends = torch.searchsorted(index, torch.arange(1, flat.numel() // max(n_genes, 1) + 1, device=x.device) * n_genes)
    return Nonzeros(index, index % n_genes, flat[index], ends)


def carry(x: Tensor, found: Nonzeros) -> Tensor:
    """Hand ``x`` its non-zero entries; they stay with this very tensor."""
    setattr(x, _ROOM, (found, x._version))
    return x


class CountMatrix:
    """Counts (N, G) in compressed rows, as tensors on one device.

    Parameters
    ----------
    indptr : (N + 1,) int64, where each row starts
    indices : (nnz,) int32, genes, ascending within a row, none twice
    data : (nnz,) uint8, int16 or int32, counts > 0
    n_genes : G
    """

    def __init__(self, indptr: Tensor, indices: Tensor, data: Tensor, n_genes: int) -> None:
        self.indptr, self.indices, self.data, self.n_genes = indptr, indices, data, n_genes

    @classmethod
    def from_arrays(cls, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_genes: int) -> CountMatrix:
        """From checked CSR arrays (sorted, no duplicates, whole numbers > 0); copies them."""
        most = int(data.max(initial=0))
        small = np.uint8 if most < 2**8 else np.int16 if most < 2**15 else np.int32
        return cls(
            torch.from_numpy(np.array(indptr, dtype=np.int64)),
            torch.from_numpy(np.array(indices, dtype=np.int32)),
            torch.from_numpy(np.array(data, dtype=small)),
            int(n_genes),
        )

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def nnz(self) -> int:
        """How many counts are not zero."""
        return len(self.data)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.indptr, self.indices, self.data))

    def to(self, device: torch.device | str) -> CountMatrix:
        """The same matrix elsewhere; towards a GPU by way of pinned memory, so that the host need not wait."""
        parts = [self.indptr, self.indices, self.data]
        if torch.device(device).type == "cuda" and parts[0].device.type == "cpu":
            parts = [t.pin_memory() for t in parts]
        indptr, indices, data = (t.to(device, non_blocking=True) for t in parts)
        return CountMatrix(indptr, indices, data, self.n_genes)

    def _entries(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(position in ``data``, row in the block, lengths) of every entry of these rows, in order."""
        start = self.indptr[rows]
        length = self.indptr[rows + 1] - start
        end = length.cumsum(0)
        total = int(end[-1]) if len(rows) else 0
        row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), length, output_size=total)
        at = torch.arange(total, device=rows.device) + (start - (end - length))[row]
        return at, row, length

    def take(self, rows: Tensor) -> CountMatrix:
        """The matrix of these rows, in this order; gathered piece by piece, at little more memory than it holds."""
        indptr = torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(self.indptr[rows + 1] - self.indptr[rows], 0, out=indptr[1:])
        indices, data = self.indices.new_empty(int(indptr[-1])), self.data.new_empty(int(indptr[-1]))
        size = max(1, int(_PIECE * len(self) / max(self.nnz, 1)))
        for start in range(0, len(rows), size):
            at, _, _ = self._entries(rows[start : start + size])
            here = slice(int(indptr[start]), int(indptr[min(start + size, len(rows))]))
            indices[here], data[here] = self.indices[at], self.data[at]
        return CountMatrix(indptr, indices, data, self.n_genes)

    def dense(self, rows: Tensor, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
        """Rows as a dense block (n, G) that carries its non-zero entries."""
        at, row, length = self._entries(rows)
        gene = self.indices[at].long()
        index = row * self.n_genes + gene
        count = self.data[at].to(dtype)
        x = torch.zeros(len(rows), self.n_genes, dtype=dtype, device=self.data.device)
        x.view(-1).index_copy_(0, index, count)
        return carry(x, Nonzeros(index, gene, count, length.cumsum(0), mask))

    def window(
        self, rows: Tensor, dtype: torch.dtype, cuts: Sequence[int], mask: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Rows as dense blocks, ``cuts[i]`` to ``cuts[i + 1]`` of them: as `dense`, but gathered in one go."""
        at, row, length = self._entries(rows)
        gene = self.indices[at].long()
        index = row.mul_(self.n_genes).add_(gene)
        count = self.data[at].to(dtype)
        ends = length.cumsum(0)
        bounds = torch.cat([ends.new_zeros(1), ends])[list(cuts)].tolist()
        for first, last, low, high in zip(cuts, cuts[1:], bounds, bounds[1:], strict=False):
            here = index[low:high] - first * self.n_genes
            x = torch.zeros(last - first, self.n_genes, dtype=dtype, device=self.data.device)
            x.view(-1).index_copy_(0, here, count[low:high])
            yield carry(x, Nonzeros(here, gene[low:high], count[low:high], ends[first:last] - low, mask))

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(row, gene, count) of every entry in order, some millions at a time, so that passes stay small."""
        start = 0
        while start < len(self):
            end = int(torch.searchsorted(self.indptr, self.indptr[start] + _PIECE, right=True)) - 1
            end = min(max(end, start + 1), len(self))
            low, high = int(self.indptr[start]), int(self.indptr[end])
            row = torch.repeat_interleave(
                torch.arange(start, end, device=self.data.device),
                self.indptr[start : end + 1].diff(),
                output_size=high - low,
            )
            yield row, self.indices[low:high], self.data[low:high]
            start = end

    def totals(self) -> Tensor:
        """(N,) float64 total count of each row."""
        sums = torch.zeros(len(self), dtype=torch.float64, device=self.data.device)
        for row, _, count in self.pieces():
            sums.index_add_(0, row, count.double())
        return sums

    def seen(self) -> Tensor:
        """(G,) int64, in how many rows each gene has counts."""
        found = torch.zeros(self.n_genes, dtype=torch.int64, device=self.data.device)
        for _, gene, _ in self.pieces():
            found += torch.bincount(gene, minlength=self.n_genes)
        return found

    def select(self, genes: np.ndarray) -> CountMatrix:
        """The matrix of these genes (positions, each once), in this order; -1 makes a column of zeros."""
        place = np.full(self.n_genes, -1, dtype=np.int32)
        place[genes[genes >= 0]] = np.flatnonzero(genes >= 0)
        moved = torch.from_numpy(place)
        lengths = torch.zeros(len(self), dtype=torch.int64)
        indices, data = [], []
        for row, gene, count in self.pieces():
            new = moved[gene.long()]
            keep = new >= 0
            row, new, count = row[keep], new[keep], count[keep]
            order = (row * len(genes) + new).argsort()
            lengths += torch.bincount(row, minlength=len(self))
            indices.append(new[order])
            data.append(count[order])
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return CountMatrix(indptr, torch.cat(indices), torch.cat(data), len(genes))

    def fingerprint(self) -> str:
        """A checksum of every stored value and place."""
        crc = 0
        for part in (self.indptr, self.indices, self.data):
            crc = zlib.crc32(part.cpu().numpy().data, crc)
        return f"{crc:08x}"


# ---- reading: any matrix of counts, checked once ------------------------------------------------

_BLOCK = 10_000_000  # values looked at in one go


def available_memory() -> int:
    """Bytes that could be had now without swapping."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return sys.maxsize


def require_memory(n_bytes: int, what: str, remedy: str) -> None:
    """Refuse what would take more than 80 % of the memory that is free."""
    free = available_memory()
    if n_bytes > 0.8 * free:
        raise ValueError(f"{what} would take {n_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. {remedy}")


def read_counts(
    matrix: Any, where: str, cells: Sequence[Any], genes: Sequence[Any], remedy: str, notes: list[str]
) -> CountMatrix:
    """Check a matrix (N, G) of counts and hold it as a CountMatrix; the matrix is left as it was.

    Parameters
    ----------
    matrix : numpy array or memmap, scipy csr or csc (matrix or array), or anndata's backed ones
    where : its name as the user knows it, for errors
    cells, genes : names of rows and columns
    remedy : what to do if these are not counts
    notes : gets remarks on what is odd but accepted

    Raises
    ------
    ValueError
        If a value is missing, infinite, negative or not whole, or too large for float32.
    TypeError
        If this is no matrix of real numbers in memory.
    """
    dtype = _dtype_of(matrix, where)
    if sparse.issparse(matrix):
        csr = _canonical(matrix, where)
    else:
        csr = _from_rows(matrix, where, cells, genes, remedy)
    _check(csr.data, where, remedy, lambda k: _place(csr, k, cells, genes))
    most = float(csr.data.max(initial=0))
    if dtype == np.float16 and most > 2048:
        raise ValueError(
            f"{where} is float16 and holds {most:.0f}: float16 has already rounded counts above 2,048. "
            "Read the data again in another type."
        )
    if most > 2**24:
        row, gene = _place(csr, int(csr.data.argmax()), cells, genes)
        raise ValueError(
            f'{where} holds {most:.0f} (cell "{row}", gene "{gene}"): float32 cannot hold whole numbers above 2**24. '
            f"Are these counts? {remedy}"
        )
    if most > 1e6:
        notes.append(f"{where} holds counts up to {most:.0f}; likelihoods are good to about 1e-6 of themselves there")
    if dtype == np.bool_:
        notes.append(f"{where} is True/False: presence or absence? Counts of 0 and 1 are what these stories see")
    if not csr.data.all():
        csr.eliminate_zeros()  # csr.data is private by now: _canonical copies what it must
    return CountMatrix.from_arrays(csr.indptr, csr.indices, csr.data, csr.shape[1])


def _dtype_of(matrix: Any, where: str) -> np.dtype:
    """The numeric type of a matrix that can be read; the others are refused by kind."""
    kind = type(matrix).__module__.split(".")[0]
    remedies = {
        "dask": f"Bring it into memory first: {where} = {where}.compute()",
        "cupy": f"Bring it to the host first: {where} = {where}.get()",
        "cupyx": f"Bring it to the host first: {where} = {where}.get()",
        "awkward": "Make a rectangular matrix first: scipy.sparse.csr_matrix(...)",
    }
    if kind in remedies:
        raise TypeError(f"{where} is a {kind} array, which is not read here. {remedies[kind]}")
    if getattr(matrix, "format", "csr") not in ("csr", "csc"):
        raise TypeError(
            f'{where} is a sparse matrix in "{matrix.format}" format; convert it: {where} = {where}.tocsr()'
        )
    dtype = getattr(matrix, "dtype", None)
    if dtype is None or getattr(matrix, "ndim", 2) != 2:
        raise TypeError(f"{where} must be a matrix (cells x genes) of counts, not {type(matrix).__name__}")
    dtype = np.dtype(dtype)
    if dtype.kind not in "biuf":
        first = ""
        if dtype.kind == "O" and getattr(matrix, "size", 0):
            first = f"; its first element is {type(np.asarray(matrix).flat[0]).__name__}"
        raise TypeError(f"{where} has dtype {dtype}{first}. Convert it to numbers: {where} = {where}.astype('float32')")
    return dtype


def _canonical(matrix: Any, where: str) -> sparse.csr_matrix:
    """CSR with sorted rows, no duplicates, and data of its own (sums are taken in a wide type)."""
    if matrix.format == "csc":
        size = matrix.nnz * (matrix.dtype.itemsize + matrix.indices.itemsize)
        require_memory(
            size, f"a copy of {where} by rows (it is stored by columns)", f"Store it by rows: {where}.tocsr()"
        )
        logger.info("%s is stored by columns; a private copy by rows takes %.1f MB", where, size / 1e6)
    wide = np.float64 if matrix.dtype.kind == "f" else np.int64
    shared = type(matrix)((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape, copy=False)
    csr = sparse.csr_matrix(shared.tocsr()) if matrix.format == "csc" else sparse.csr_matrix(shared)
    native = csr.data.dtype.newbyteorder("=")
    if not csr.has_canonical_format:
        csr = sparse.csr_matrix((csr.data.astype(wide), csr.indices, csr.indptr), shape=csr.shape, copy=True)
        csr.sum_duplicates()
    elif not csr.data.all() or csr.data.dtype != native:
        csr = sparse.csr_matrix((csr.data.astype(native), csr.indices, csr.indptr), shape=csr.shape, copy=True)
    return csr


def _from_rows(matrix: Any, where: str, cells: Sequence[Any], genes: Sequence[Any], remedy: str) -> sparse.csr_matrix:
    """CSR of a dense or backed matrix, read and checked in blocks of rows."""
    n, g = matrix.shape
    step = max(1, _BLOCK // max(g, 1))
    parts = []
    for start in range(0, n, step):
        rows = matrix[start : start + step]
        if sparse.issparse(rows):
            parts.append(_canonical(rows, where))
            continue
        rows = np.ascontiguousarray(rows)
        rows = rows.astype(rows.dtype.newbyteorder("="), copy=False)

        def place(k: int, at: int = start) -> tuple[Any, Any]:
            return cells[at + k // g], genes[k % g]

        _check(rows.reshape(-1), where, remedy, place, of=n * g)
        # Checked first: a float16 or complex detour inside scipy would hide what was there.
        parts.append(sparse.csr_matrix(rows if rows.dtype != np.float16 else rows.astype(np.float32)))
    return sparse.vstack(parts, format="csr") if parts else sparse.csr_matrix((n, g))


def _place(csr: sparse.csr_matrix, k: int, cells: Sequence[Any], genes: Sequence[Any]) -> tuple[Any, Any]:
    """Names of the cell and gene of stored value k."""
    return cells[int(np.searchsorted(csr.indptr, k, side="right")) - 1], genes[int(csr.indices[k])]


def _check(
    values: np.ndarray, where: str, remedy: str, place: Callable[[int], tuple[Any, Any]], of: int | None = None
) -> None:
    """Every value is finite, >= 0 and whole, or an error that says how many are not and where the first is."""
    if values.dtype.kind in "bu":
        return
    bad: dict[str, int] = {}
    first = None
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        with np.errstate(invalid="ignore"):
            fine = (block >= 0) & (block == np.rint(block)) & (block < np.inf)
        if fine.all():
            continue
        if first is None:
            first = start + int((~fine).argmax())
        wrong = block[~fine]
        for kind, found in (
            ("missing (NaN)", np.isnan(wrong)),
            ("infinite", np.isinf(wrong)),
            ("negative", (wrong < 0) & np.isfinite(wrong)),
            ("not whole", (wrong >= 0) & np.isfinite(wrong)),
        ):
            if found.any():
                bad[kind] = bad.get(kind, 0) + int(found.sum())
    if first is None:
        return
    cell, gene = place(first)
    cause = (
        "Fill or drop them, or take the raw counts."
        if "missing (NaN)" in bad or "infinite" in bad
        else "Scaled data?"
        if "negative" in bad
        else "Log-normalised data? (Ambient-corrected or estimated counts: round them.)"
    )
    what = " and ".join(f"{n:,} {kind}" for kind, n in bad.items())
    raise ValueError(
        f"{where} must hold whole numbers >= 0, but of {of or len(values):,} values looked at {what} "
        f'(first: {values[first]}, cell "{cell}", gene "{gene}"). {cause} {remedy}'
    )
