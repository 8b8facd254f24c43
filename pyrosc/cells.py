"""Cells: counts and covariates of single cells, checked once, read from AnnData here only.

    cells = Cells.from_anndata(adata, batch="donor", label="cell_type")
    cells[cells.obs["cell_type"] == "B"]      a data set of its own
    cells.minibatch(rows)                     some rows, which know how many cells there are in all
    cells.do(condition="stim")                the same cells under an intervention

A story sees ``cells.x`` (only to observe it), ``cells.batch`` and the like, ``cells.n_genes``
and ``cells.plate()``. It never sees AnnData, and the caller's AnnData never changes.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import pyro
import torch
from scipy import sparse
from torch import Tensor

from .counts import CountMatrix, carry, logger, nonzeros, read_counts, require_memory
from .errors import PyroscWarning
from .reading import are_regions, check_names, chosen_genes, known_column, places, read_layer, remedy_of, where_of
from .schema import (
    ROLES,
    Factor,
    Schema,
    covariate_of,
    did_you_mean,
    factor_of,
    layout_notes,
    library_moments,
    listed,
    numbers_of,
    recode,
)

_MANY_GENES = 10_000


class GeneSums(NamedTuple):
    """Sums over cells, (G,): of counts, of their squares, and of counts times depth."""

    counts: Tensor
    squares: Tensor
    by_depth: Tensor


class Cells:
    """Counts and covariates of N cells, in one order.

    Made by `from_anndata`, `from_counts` or `align`; read-only. Rows keep their order
    and names under ``cells[...]``.

    Attributes
    ----------
    schema : Schema
        Genes, levels and scalings, shared by every subset.
    obs : DataFrame (N, ...)
        A copy of the annotation of these cells.
    total : int
        The number of cells that the plate stands for: N, except in a mini-batch.
    batch, label, sample : (N,) int64 tensors
        Codes of the levels. Label and sample are -1 where unknown (new levels in new data too), and asking for
        one without such a column is an error; batch is 0 throughout without one.
    library : (N, 1) tensor
        Observed total count over the genes held; kept when counts are taken away.
    size_factor : (N, 1) tensor or None
        Given size factors.
    gene_mask : (G,) bool tensor or None
        Genes that were measured in these cells; None means all.
    fill : (N, genes not measured) tensor or None
        What log(1 + count) of these would be on average, for encoders; None for zeros.
    kept : float
        Share of each count that `thin` left; 1 for counts as they were measured.
    """

    schema: Schema
    total: int
    library: Tensor
    size_factor: Tensor | None
    gene_mask: Tensor | None
    fill: Tensor | None

    def __init__(
        self,
        schema: Schema,
        counts: CountMatrix | None,
        library: Tensor,
        codes: dict[str, Tensor],
        values: dict[str, Tensor],
        size_factor: Tensor | None = None,
        obs: pd.DataFrame | None = None,
        gene_mask: Tensor | None = None,
    ) -> None:
        self.schema, self._counts, self.library = schema, counts, library
        self.codes, self.values, self.size_factor = codes, values, size_factor
        self._obs, self.gene_mask = obs, gene_mask
        self._rows: Tensor | None = None  # rows of _counts that are ours, None for all
        self._is_away = False  # whether _counts stayed on the host while the rest is elsewhere
        self._x: Tensor | None = None
        self._plate: Any = None
        self._running = False
        self._memo: dict[Any, Any] | None = None
        self.kept = 1.0
        self.fill = None
        self.dtype = torch.float32
        self.total = len(library)

    # ---- made from ------------------------------------------------------------------------

    @classmethod
    def from_anndata(
        cls,
        adata: anndata.AnnData,
        *,
        layer: str | None = None,
        batch: str | None = None,
        label: str | None = None,
        unlabeled: Any = None,
        sample: str | None = None,
        categorical: Sequence[str] = (),
        continuous: Sequence[str] = (),
        size_factor: str | None = None,
        genes: Any = None,
    ) -> Cells:
        """Check and hold the counts and covariates of ``adata``, which stays as it is.

        Parameters
        ----------
        layer : name in ``adata.layers`` that holds raw counts; None for ``adata.X``
        batch : column of the experimental batch (a nuisance the decoder adjusts for)
        label : column of known cell types; missing means unlabelled
        unlabeled : a value of that column that also means unlabelled
        sample : column of the specimen (donor and condition, say) a cell came from
        categorical, continuous : further covariates; continuous ones are standardised
        size_factor : column of positive size factors; stories then model rates, not shares
        genes : names, a mask (G,), or a boolean column of ``adata.var``; None for all

        Raises
        ------
        ValueError
            If counts are missing, negative, not whole or too large, a cell has none, names
            repeat, or a column is missing or unfit: the text says which, where, and what to do.
        TypeError
            If ``adata`` or its matrix is of a kind that is not read.

        Warns
        -----
        PyroscWarning
            Once, with all that is odd but accepted.

        Notes
        -----
        Counts are held as one compressed private copy in the smallest integers that fit,
        about 5 bytes a non-zero count. A backed file is read into memory here, so it may go
        away afterwards.
        """
        if not isinstance(adata, anndata.AnnData):
            remedy = (
                "read it first, anndata.read_h5ad(path)"
                if isinstance(adata, (str, Path))
                else "for a matrix use Cells.from_counts"
            )
            raise TypeError(f"expected an AnnData, not {type(adata).__name__}; {remedy}")
        notes: list[str] = []
        check_names(adata, notes)
        counts = read_layer(adata, layer, notes)
        names = np.asarray(adata.var_names.astype(str))
        if genes is not None:
            chosen = chosen_genes(adata, genes)
            names, counts = names[chosen], counts.select(chosen)
        if len(names) > _MANY_GENES and not are_regions(names):
            remedy = (
                'Select some first (scanpy.pp.highly_variable_genes, then genes="highly_variable"); '
                "to keep depth from all genes, pass their total as size_factor= (rho is then a rate)"
            )
            notes.append(
                f"{len(names):,} genes: each layer of 128 that meets them holds {128 * len(names):,} weights, "
                f"and a step costs about {len(names) / 2000:.0f} times that of 2,000 genes. {remedy}"
            )
        library = counts.totals().numpy()
        if not library.any():
            raise ValueError(f"{where_of(layer)} is zero everywhere. {remedy_of(adata, layer)}")
        empty = np.flatnonzero(library == 0)
        if len(empty):
            raise ValueError(
                f"{len(empty):,} of {len(library):,} cells have no counts ({listed(adata.obs_names[empty])}). "
                "Leave them out first: scanpy.pp.filter_cells(adata, min_counts=1)"
                + (" on the chosen genes" if genes is not None else "")
                + "."
            )
        unseen = int((counts.seen() == 0).sum())
        if unseen:
            notes.append(f"{unseen:,} of {len(names):,} genes are never seen here; what is said of them is the prior")
        cells = cls._with_columns(
            adata.obs, counts, library, names, notes, layer,
            batch=batch, label=label, unlabeled=unlabeled, sample=sample,
            categorical=categorical, continuous=continuous, size_factor=size_factor,
        )  # fmt: skip
        _say(notes)
        return cells

    @classmethod
    def from_counts(
        cls,
        x: Any,
        *,
        genes: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        unlabeled: Any = None,
        size_factor: Sequence[float] | None = None,
        **columns: Sequence[Any],
    ) -> Cells:
        """The same from a matrix (N, G) and columns of length N.

        ``batch=``, ``label=`` and ``sample=`` take those roles; any other column is
        continuous if it holds floating-point numbers and categorical if not.

        >>> cells = Cells.from_counts([[1, 0, 2], [0, 3, 1]], age=[30.0, 50.0])
        >>> cells.n_genes, cells.library.squeeze(-1).tolist()
        (3, [3.0, 4.0])
        """
        if isinstance(x, Tensor):
            x = x.detach().cpu().numpy()
        elif not (sparse.issparse(x) or hasattr(x, "dtype")):
            x = np.asarray(x)
        if getattr(x, "ndim", 2) != 2:
            raise ValueError(f"x must be a matrix (cells x genes), not of shape {x.shape}")
        if sparse.issparse(x) and x.format not in ("csr", "csc"):
            raise TypeError(f'x is a sparse matrix in "{x.format}" format; convert it: x.tocsr()')
        n, g = x.shape
        obs = pd.DataFrame(index=[f"cell{i}" for i in range(n)] if names is None else [str(v) for v in names])
        given = columns if size_factor is None else columns | {"size_factor": size_factor}
        for name, column in given.items():
            if len(column) != n:
                raise ValueError(f"column {name}= has {len(column):,} values for {n:,} cells")
            obs[name] = column.numpy() if isinstance(column, Tensor) else np.asarray(column)
        if genes is not None and len(genes) != g:
            raise ValueError(f"genes= has {len(genes):,} names for {g:,} columns of x")
        var = pd.DataFrame(index=[f"gene{j}" for j in range(g)] if genes is None else [str(v) for v in genes])
        others = [c for c in columns if c not in ROLES]
        floats = [c for c in others if obs[c].dtype.kind == "f"]
        return cls.from_anndata(
            anndata.AnnData(X=x, obs=obs, var=var),
            unlabeled=unlabeled,
            size_factor=None if size_factor is None else "size_factor",
            categorical=[c for c in others if c not in floats],
            continuous=floats,
            **{role: role if role in columns else None for role in ROLES},
        )

    @classmethod
    def empty(cls, schema: Schema) -> Cells:
        """No cells, but a schema: enough to build a Program."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            schema, None, torch.zeros(0, 1), dict.fromkeys(schema.factors, none),
            {c.column: torch.zeros(0) for c in schema.continuous},
            torch.zeros(0, 1) if schema.size_factor else None, pd.DataFrame(),
        )  # fmt: skip

    @classmethod
    def blank(cls, schema: Schema, n_cells: int, *, seed: int = 0) -> Cells:
        """Made-up cells without counts: levels drawn as often as they were seen, depth from the schema."""
        draw = np.random.default_rng(seed)
        codes, obs = {}, pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
        for name, factor in schema.factors.items():
            seen = np.maximum(np.array(factor.counts, dtype=float), 1e-9)
            codes[name] = draw.choice(len(factor), size=n_cells, p=seen / seen.sum())
            obs[name] = np.array(factor.levels, dtype=object)[codes[name]]
        values = {c.column: draw.standard_normal(n_cells) for c in schema.continuous}
        for c in schema.continuous:
            obs[c.column] = values[c.column] * c.sd + c.mean
        batch = codes[schema.batch.column] if schema.batch else np.zeros(n_cells, dtype=np.int64)
        noise = draw.standard_normal(n_cells)
        library = np.exp(np.array(schema.log_library_mean)[batch] + np.array(schema.log_library_sd)[batch] * noise)
        factors = np.ones(n_cells) if schema.size_factor else None
        none = CountMatrix(torch.zeros(n_cells + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32),
                           torch.zeros(0, dtype=torch.uint8), schema.n_genes)  # fmt: skip
        return cls._hold(schema, none, library, codes, values, factors, obs).without_counts()

    @classmethod
    def _with_columns(
        cls, obs: pd.DataFrame, counts: CountMatrix, library: np.ndarray, names: np.ndarray,
        notes: list[str], layer: str | None, *, batch: Any, label: Any, unlabeled: Any, sample: Any,
        categorical: Any, continuous: Any, size_factor: Any,
    ) -> Cells:  # fmt: skip
        for argument, given in (("categorical", categorical), ("continuous", continuous)):
            if isinstance(given, str):
                raise TypeError(f'{argument} takes a list of columns: {argument}=["{given}"]')
        codes: dict[str, np.ndarray] = {}
        roles: dict[str, Factor | None] = dict.fromkeys(ROLES)
        for role, name in (("batch", batch), ("label", label), ("sample", sample)):
            if name is not None:
                roles[role], found = factor_of(obs, name, role, unlabeled, notes)
                if (codes.get(name, found) != found).any():
                    raise ValueError(f'"{name}" cannot be label= with missing values and {role}= too')
                codes[name] = found
        if unlabeled is not None and label is None:
            raise ValueError(f"unlabeled={unlabeled!r} needs label=, the column it is found in")
        further = []
        for name in categorical:
            if name in codes:
                raise ValueError(f'"{name}" is in categorical= and has a role already; name it once')
            factor, codes[name] = factor_of(obs, name, "categorical", None, notes)
            further.append(factor)
        values, scalings = {}, []
        for name in continuous:
            scaling, values[name] = covariate_of(obs, name, notes)
            scalings.append(scaling)
        factors = None
        if size_factor is not None:
            factors = numbers_of(obs, size_factor, "size_factor")
            if (factors <= 0).any():
                first = int((factors <= 0).argmax())
                raise ValueError(
                    f'obs["{size_factor}"] (size_factor) must be positive, but is {factors[first]:g} in cell '
                    f'"{obs.index[first]}" ({(factors <= 0).sum():,} such cells)'
                )
        n_batches = len(roles["batch"]) if roles["batch"] else 1
        if roles["batch"] and n_batches == 1:
            logger.info('"%s" has one level: there is no batch to adjust for', batch)
        in_batch = codes[batch] if batch is not None else np.zeros(len(obs), dtype=np.int64)
        moments: dict[str, Any] = library_moments(library, in_batch, n_batches)
        schema = Schema(
            genes=tuple(map(str, names)), batch=roles["batch"], label=roles["label"], sample=roles["sample"],
            categorical=tuple(further), continuous=tuple(scalings), size_factor=size_factor, layer=layer, **moments,
        )  # fmt: skip
        notes += layout_notes(schema, codes)
        return cls._hold(schema, counts, library, codes, values, factors, obs)

    @classmethod
    def _hold(
        cls, schema: Schema, counts: CountMatrix, library: np.ndarray, codes: dict[str, np.ndarray],
        values: dict[str, np.ndarray], factors: np.ndarray | None, obs: pd.DataFrame, mask: np.ndarray | None = None,
    ) -> Cells:  # fmt: skip
        def column(a: np.ndarray) -> Tensor:
            return torch.tensor(a, dtype=torch.float32).unsqueeze(-1)

        obs = obs.copy()
        obs.index = obs.index.astype(str)

        return cls(
            schema, counts, column(library), {k: torch.from_numpy(v) for k, v in codes.items()},
            {k: torch.tensor(v, dtype=torch.float32) for k, v in values.items()},
            None if factors is None else column(factors), obs, None if mask is None else torch.from_numpy(mask),
        )  # fmt: skip

    # ---- brought into a known order --------------------------------------------------------

    @classmethod
    def align(cls, data: anndata.AnnData | Cells, schema: Schema, *, missing: str = "error") -> Cells:
        """New cells in the order and coding of ``schema``: genes by name, levels by value.

        Extra genes are left out. Cells without counts are let through with a warning: what is
        drawn for them is the prior.

        Parameters
        ----------
        missing : "error", or "zero" to fill genes that the new cells lack
            They must be fewer than 5 %, say nothing in likelihoods (``gene_mask``), and the
            encoder reads a zero for them. "mask" takes up to half, for `Fit.map`, which fills in what encoders read.

        Raises
        ------
        ValueError
            If genes, columns or levels that the schema needs are not there.
        """
        if missing not in ("error", "zero", "mask"):
            raise ValueError(f'missing must be "error", "zero" or "mask", not {missing!r}')
        notes: list[str] = []
        if isinstance(data, Cells):
            if data.schema is schema or data.schema == schema:
                return data
            obs, counts, genes = data._decoded_obs(), data._own_counts(), np.asarray(data.schema.genes)
        elif isinstance(data, anndata.AnnData):
            check_names(data, notes)
            layer = schema.layer
            counts, genes, obs = read_layer(data, layer, notes), np.asarray(data.var_names.astype(str)), data.obs
        else:
            raise TypeError(f"expected Cells or an AnnData, not {type(data).__name__}")
        place, mask = places(genes, schema.genes, missing, notes)
        aligned = counts.select(place)
        library = aligned.totals().numpy()
        if isinstance(data, Cells):
            if len(genes) == schema.n_genes and mask is None:  # the same genes: a library that was kept stays
                library = data.library.squeeze(-1).double().cpu().numpy()
            if data.gene_mask is not None:
                measured = (place >= 0) & data.gene_mask.cpu().numpy()[place]
                mask = measured if mask is None else mask & measured
        empty = np.flatnonzero(library == 0)
        if len(empty):
            notes.append(
                f"{len(empty):,} cells have no counts in these genes ({listed(obs.index[empty])}): "
                "what is drawn for them is the prior"
            )
        codes = {}
        for name, factor in schema.factors.items():
            role = next((r for r in ROLES if getattr(schema, r) is factor), "categorical")
            if role in ("label", "sample") and name not in obs.columns:
                codes[name] = np.full(len(obs), -1, dtype=np.int64)
                continue
            codes[name] = recode(factor, known_column(obs, name, role, factor.levels), role)
        values = {c.column: (numbers_of(obs, c.column, "continuous") - c.mean) / c.sd for c in schema.continuous}
        factors = numbers_of(obs, schema.size_factor, "size_factor") if schema.size_factor else None
        _say(notes)
        return cls._hold(schema, aligned, library, codes, values, factors, obs, mask)._copy(
            kept=data.kept if isinstance(data, Cells) else 1.0
        )

    def _decoded_obs(self) -> pd.DataFrame:
        """``obs`` with the columns of the schema as they now are (after ``do`` too)."""
        obs = self.obs.copy()
        for name, factor in self.schema.factors.items():
            levels = np.array([*factor.levels, None], dtype=object)
            obs[name] = levels[self.codes[name].cpu().numpy()]
        for c in self.schema.continuous:
            obs[c.column] = self.values[c.column].double().cpu().numpy() * c.sd + c.mean
        if self.schema.size_factor and self.size_factor is not None:
            obs[self.schema.size_factor] = self.size_factor.squeeze(-1).double().cpu().numpy()
        return obs

    def _own_counts(self) -> CountMatrix:
        if self._counts is None:
            raise ValueError("these cells hold no counts (without_counts); nothing can be computed from them")
        held = self._counts.to("cpu")
        return held if self._rows is None else held.take(self._rows.cpu())

    # ---- what a story sees -----------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.library)

    def __repr__(self) -> str:
        columns = [f"{r}={getattr(self.schema, r).column!r}" for r in ROLES if getattr(self.schema, r)]
        columns += [repr(f.column) for f in self.schema.categorical] + [repr(c.column) for c in self.schema.continuous]
        of = f" of {self.total:,}" if self.total != len(self) else ""
        return f"Cells({len(self):,}{of} cells x {self.n_genes:,} genes" + "".join(f", {c}" for c in columns) + ")"

    @property
    def is_running(self) -> bool:
        """Whether these are the cells of one run of a model or guide."""
        return self._running

    @property
    def n_genes(self) -> int:
        return self.schema.n_genes

    @property
    def device(self) -> torch.device:
        return self.library.device

    @property
    def obs(self) -> pd.DataFrame:
        """Annotation of these cells, in order."""
        if self._obs is None:
            raise ValueError("a mini-batch has no obs; take it from the whole data set")
        return self._obs

    @property
    def names(self) -> pd.Index:
        """Names of the cells, in order."""
        return self.obs.index

    def _code(self, role: str) -> Tensor:
        factor = getattr(self.schema, role)
        if factor is not None:
            return self.codes[factor.column]
        return torch.zeros(len(self), dtype=torch.int64, device=self.device)

    @property
    def batch(self) -> Tensor:
        return self._code("batch")

    @property
    def label(self) -> Tensor:
        self._asked("label")
        return self._code("label")

    @property
    def sample(self) -> Tensor:
        self._asked("sample")
        codes = self._code("sample")
        # Not while training: its samples are those of the schema, and the check would make a GPU wait.
        if self._running and not torch.is_grad_enabled() and bool((codes < 0).any()):
            raise ValueError(
                f"{int((codes < 0).sum()):,} of these cells are of a sample that training did not have, and the story "
                "reads cells.sample: name a known one, cells.do(sample=...), or fit again with these cells"
            )
        return codes

    def _asked(self, role: str) -> None:
        if getattr(self.schema, role) is None:
            raise ValueError(f"these cells have no {role} column: Cells.from_anndata(adata, {role}=...)")

    @property
    def depth(self) -> Tensor:
        """(N, 1) what multiplies rho: the given size factor, else the library."""
        return self.library if self.size_factor is None else self.size_factor

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix of counts behind these cells."""
        return 0 if self._counts is None else self._counts.nbytes

    @property
    def counts_per_cell(self) -> float:
        """Non-zero counts of a row, on average over the matrix behind these cells."""
        return self._counts.nnz / max(len(self._counts), 1) if self._counts is not None else float(self.n_genes)

    @property
    def has_counts(self) -> bool:
        """Whether there are counts to observe; if not, a story draws them."""
        return self._counts is not None or self._x is not None

    @property
    def x(self) -> Tensor | None:
        """(N, G) counts as a dense tensor that carries its non-zero entries, or None without counts.

        Made when first asked for, if it fits into memory, and kept.
        """
        if self._x is None and self._counts is not None:
            rows = self._rows
            if rows is None:
                rows = torch.arange(len(self), device=self.device)
            if self._obs is not None:
                size = torch.finfo(self.dtype).bits // 8
                require_memory(
                    len(self) * self.n_genes * size, "the dense counts of these cells",
                    "Take fewer cells at a time: cells[:1000].",
                )  # fmt: skip
            counts, rows = self._gathered(rows)
            self._x = counts.dense(rows, self.dtype, self.gene_mask)
        return self._x

    def _gathered(self, rows: Tensor) -> tuple[CountMatrix, Tensor]:
        """A matrix on these cells' device that holds the rows asked for, and where in it they are."""
        counts: Any = self._counts
        if not self._is_away:
            return counts, rows
        return counts.take(rows.cpu()).to(self.device), torch.arange(len(rows), device=self.device)

    def log1p(self) -> Tensor:
        """(N, G) log(1 + counts), what encoders read; carries its non-zero entries, as ``x`` does.

        Raises
        ------
        ValueError
            If there are no counts.
        """
        x = self.x
        if x is None:
            raise ValueError("these cells hold no counts, so there is nothing to encode; pass cells with counts")
        found = nonzeros(x)
        logs = found.count.log1p()
        out = torch.zeros_like(x)
        out.view(-1).index_copy_(0, found.index, logs)
        if self.fill is not None and self.gene_mask is not None:
            out[:, ~self.gene_mask] = self.fill
            return out
        return carry(out, found._replace(count=logs, mask=None))

    def gene_sums(self) -> GeneSums:
        """Per gene, (G,) float64: sums over these cells that starting values are made from."""
        held = self._own_counts()
        depth = self.depth.squeeze(-1).double().cpu()
        sums = [torch.zeros(self.n_genes, dtype=torch.float64) for _ in GeneSums._fields]
        for row, gene, count in held.pieces():
            gene, count = gene.long(), count.double()
            for total, term in zip(sums, (count, count**2, depth[row] * count)):
                total.index_add_(0, gene, term)
        return GeneSums(*(t.to(self.device) for t in sums))

    def plate(self) -> Any:
        """The plate "cells" over these rows, dim -1: n of ``total`` cells count total / n times.

        Within one run of a Program's model or guide it is one plate, however often it is opened.
        """
        if self._plate is not None:
            return self._plate
        rows = None if self.total == len(self) else torch.arange(len(self), device=self.device)
        plate = pyro.plate("cells", self.total, subsample=rows, dim=-1)
        if self._running:
            self._plate = plate
        return plate

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make()`` gives, computed once in a run of model or guide for this key."""
        if self._memo is None:
            return make()
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    # ---- other cells from these ------------------------------------------------------------

    def _copy(self, **changes: Any) -> Cells:
        new = copy.copy(self)
        new.__dict__.update({"_memo": None} | changes)
        return new

    def running(self) -> Cells:
        """The same cells for one run of a model or guide: they remember their plate, and share the dense counts."""
        _ = self.x
        return self._copy(_running=True, _plate=None, _memo={})

    def rows(self, rows: Tensor, *, whole: bool) -> Cells:
        """These rows without annotation: a mini-batch (``whole=False`` keeps the total), or a block of its own."""
        changes: dict[str, Any] = {
            "library": self.library.index_select(0, rows),
            "codes": {k: v.index_select(0, rows) for k, v in self.codes.items()},
            "values": {k: v.index_select(0, rows) for k, v in self.values.items()},
            "_rows": rows if self._rows is None else self._rows.index_select(0, rows),
            "_x": None,
            "_obs": None,
        }
        for name in ("size_factor", "fill"):
            value = getattr(self, name)
            changes[name] = None if value is None else value.index_select(0, rows)
        if whole:
            changes["total"] = len(rows)
        if self._counts is None and self._x is not None:
            changes["_x"] = self._x.index_select(0, rows)
        return self._copy(**changes)

    def minibatches(self, rows: Tensor, cuts: Sequence[int]) -> Iterator[Cells]:
        """Consecutive mini-batches ``rows[cuts[i]:cuts[i + 1]]``, gathered in one go and cut apart."""
        taken: Any = self.rows(rows, whole=False)
        if self._counts is None:
            blocks: Any = (None if taken._x is None else taken._x[a:b] for a, b in pairwise(cuts))
        else:
            counts, at = self._gathered(taken._rows)
            blocks = counts.window(at, self.dtype, cuts, self.gene_mask)
        for (first, last), x in zip(pairwise(cuts), blocks):
            here = slice(first, last)
            yield taken._copy(
                library=taken.library[here], size_factor=None if taken.size_factor is None else taken.size_factor[here],
                fill=None if taken.fill is None else taken.fill[here],
                codes={k: v[here] for k, v in taken.codes.items()},
                values={k: v[here] for k, v in taken.values.items()}, _rows=taken._rows[here], _x=x,
            )  # fmt: skip

    def minibatch(self, rows: Any) -> Cells:
        """The rows of one training step, which still know the total of the whole."""
        return self.rows(torch.as_tensor(self._positions(rows), device=self.device), whole=False)

    def __getitem__(self, index: Any) -> Cells:
        """A data set of its own, by positions, a slice, a mask (N,) or names; in the order asked for.

        Raises
        ------
        ValueError
            If a position, a name or the length of a mask does not fit.
        """
        rows = self._positions(index)
        at = torch.as_tensor(rows, device=self.device)
        return self.rows(at, whole=True)._copy(_obs=None if self._obs is None else self._obs.iloc[rows])

    def _positions(self, index: Any) -> np.ndarray:
        n = len(self)
        if isinstance(index, Tensor):
            index = index.detach().cpu().numpy()
        if isinstance(index, slice):
            return np.arange(n)[index]
        if isinstance(index, (str, int, np.integer)):
            index = [index]
        if isinstance(index, pd.Series) and index.dtype == bool and self._obs is not None:
            if len(index) == n and not index.index.equals(self.names):
                raise ValueError("the mask's index is not that of these cells; mask.to_numpy() if the order is right")
        index = np.asarray(index)
        if index.ndim != 1:
            raise ValueError(f"cells[...] takes positions, a mask or names in one dimension, not {index.ndim}")
        if not len(index):
            return np.zeros(0, dtype=np.int64)
        if index.dtype == bool:
            if len(index) != n:
                raise ValueError(f"the mask has {len(index):,} values for {n:,} cells")
            return np.flatnonzero(index)
        if index.dtype.kind in "iu":
            outside = (index < -n) | (index >= n)
            if outside.any():
                raise ValueError(f"no cell {index[outside.argmax()]}: there are {n:,} cells")
            return np.where(index < 0, index + n, index).astype(np.int64)
        if index.dtype.kind in "OUST":
            names = self.names
            if not names.is_unique:
                raise ValueError("cell names repeat, so cells cannot be chosen by name; use positions or a mask")
            at = names.get_indexer(index)
            if (at < 0).any():
                wrong = index[at < 0]
                raise ValueError(f"no cell named {listed(wrong)}." + did_you_mean(wrong[0], names))
            return at.astype(np.int64)
        raise ValueError(f"cells[...] takes positions, a mask or names, not {index.dtype}")

    def split(self, *fractions: float, seed: int = 0) -> list[Cells]:
        """Disjoint random parts with these shares of the cells, each in the order of the whole.

        >>> cells = Cells.from_counts(np.eye(10, dtype=int))
        >>> [len(part) for part in cells.split(0.8, 0.2)]
        [8, 2]
        """
        if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
            raise ValueError(f"fractions must be positive and sum to at most 1, not {fractions}")
        ends = np.rint(np.cumsum(fractions) * len(self)).astype(int)
        sizes = np.diff([0, *ends])
        if (sizes == 0).any():
            raise ValueError(f"{len(self):,} cells are too few for parts of {fractions}")
        order = np.random.default_rng(seed).permutation(len(self))
        return [self[np.sort(order[start:end])] for start, end in zip([0, *ends], ends)]

    def do(self, **columns: Any) -> Cells:
        """The same cells under an intervention: columns set to a level, or to one a cell.

        Names are those of columns; "batch", "label" and "sample" stand for the column in
        that role. Continuous ones are given in their own units. Counts, and so what an
        encoder reads, stay as observed.

        Raises
        ------
        ValueError
            If there is no such column or level.
        """
        codes, values, obs = dict(self.codes), dict(self.values), self._obs
        obs = None if obs is None else obs.copy()
        for name, level in columns.items():
            levels = [level] * len(self) if np.ndim(level) == 0 else list(level)
            if len(levels) != len(self):
                raise ValueError(f"do({name}=...) has {len(levels):,} levels for {len(self):,} cells")
            factor, covariate = self.schema.factor(name), self.schema.covariate(name)
            if factor is not None:
                known = {v: factor.code(v) for v in dict.fromkeys(levels)}
                found = torch.tensor([known[v] for v in levels], dtype=torch.int64, device=self.device)
                codes[factor.column], column = found, factor.column
            elif covariate is not None:
                try:
                    given = np.asarray(levels, dtype=float)
                except (TypeError, ValueError):
                    given = np.array([np.nan])
                if not np.isfinite(given).all():
                    raise ValueError(f'do: "{name}" is continuous and takes numbers, not {level!r}')
                number = (given - covariate.mean) / covariate.sd
                values[name], column = torch.tensor(number, dtype=self.library.dtype, device=self.device), name
            else:
                known_names = [*self.schema.factors, *(c.column for c in self.schema.continuous)]
                raise ValueError(
                    f'do: no covariate "{name}". There are: {listed(known_names) or "none"}.'
                    + did_you_mean(name, known_names)
                )
            if obs is not None:
                obs[column] = levels
        return self._copy(codes=codes, values=values, _obs=obs)

    def thin(self, fraction: float, *, seed: int = 0) -> tuple[Cells, Cells]:
        """Each count kept with probability ``fraction``: (kept, the rest), which add up to these cells.

        Their ``kept`` says which share they hold, and the moments of log totals in their schema are their own.
        Independent parts of Poisson counts; `check.compare` uses the one to predict the other.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1, not {fraction}")
        held = self._own_counts()
        data = held.data.numpy()
        kept = np.random.default_rng(seed).binomial(data.astype(np.int64), fraction)
        parts = []
        for part, share in ((kept, fraction), (data - kept, 1 - fraction)):
            csr = sparse.csr_matrix(
                (part, held.indices.numpy(), held.indptr.numpy()), shape=(len(held), self.n_genes), copy=True
            )
            csr.eliminate_zeros()
            parts.append(self.with_counts(csr)._with_own_library()._copy(kept=self.kept * share))
        return parts[0], parts[1]

    def _with_own_library(self) -> Cells:
        """With the totals of these counts as library, and their moments in the schema."""
        totals = self._own_counts().totals()
        moments: dict[str, Any] = library_moments(totals.numpy(), self.batch.cpu().numpy(), self.schema.n_batches)
        return self._copy(library=totals.to(self.library).unsqueeze(-1), schema=replace(self.schema, **moments))

    def without_labels(self) -> Cells:
        """The same cells with every label unknown; their annotation in ``obs`` stays."""
        self._asked("label")
        column = self.schema.label.column  # type: ignore[union-attr]
        return self._copy(codes=self.codes | {column: torch.full_like(self.codes[column], -1)})

    def without_counts(self) -> Cells:
        """The same cells with counts to be drawn; their library stays."""
        return self._copy(_counts=None, _rows=None, _x=None)

    def with_counts(self, x: Any) -> Cells:
        """The same cells with other counts (N, G); their library stays."""
        if isinstance(x, Tensor):
            x = x.detach().cpu().numpy()
        if x.shape != (len(self), self.n_genes):
            raise ValueError(f"x has shape {tuple(x.shape)} for {len(self):,} cells x {self.n_genes:,} genes")
        names: Any = range(len(self)) if self._obs is None else self.names
        counts = read_counts(x, "x", names, self.schema.genes, "Pass whole counts.", [])
        return self._copy(_counts=counts.to(self.device), _rows=None, _x=None, kept=1.0)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, *, keep_counts: bool = False) -> Cells:
        """The same cells on another device, with dense values in another floating type.

        With ``keep_counts`` the matrix of counts stays where it is, and its rows follow when they are asked for.
        """
        dtype = dtype or self.dtype

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, dtype if t.is_floating_point() else None)

        return self._copy(
            dtype=dtype, library=move(self.library), size_factor=move(self.size_factor), fill=move(self.fill),
            codes={k: move(v) for k, v in self.codes.items()}, values={k: move(v) for k, v in self.values.items()},
            gene_mask=move(self.gene_mask), _rows=move(self._rows),
            _counts=self._counts if self._counts is None or keep_counts else self._counts.to(device),
            _is_away=keep_counts,
            _x=None if self._counts is not None or self._x is None else self._x.to(device, dtype),
        )  # fmt: skip

    def fingerprint(self) -> dict[str, Any]:
        """Checksums of names and counts, by which a Fit knows its training data again."""
        names = "\n".join(map(str, self.names)).encode()
        return {"cells": len(self), "names": f"{zlib.crc32(names):08x}", "counts": self._own_counts().fingerprint()}


def _say(notes: list[str]) -> None:
    if notes:
        warnings.warn("; ".join(notes), PyroscWarning, stacklevel=3)
