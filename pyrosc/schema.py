"""Schema: what a model must know of a data set besides its counts.

Gene names, the levels of each categorical column, the scaling of each continuous one,
and how deep the cells of each batch were sequenced. A Program is built from a Schema,
a Fit keeps it, and new cells are brought into its order by name.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

ROLES = ("batch", "label", "sample")


def listed(names: Any, most: int = 5) -> str:
    """Names in quotes, the first few of them."""
    names = list(names)
    text = ", ".join(f'"{n}"' for n in names[:most])
    return text + (f", ... ({len(names):,} in all)" if len(names) > most else "")


def did_you_mean(name: Any, known: Any) -> str:
    """' Did you mean "x"?' when something near is known, else nothing."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


@dataclass(frozen=True)
class Factor:
    """A categorical column: its levels in the order of their codes.

    column : name in ``obs``
    levels : values, in order; code i is level i
    kind : "text", "number" or "truth" (bool)
    counts : cells of each level in the data the schema was made from
    unlabeled : the value that means "no label", besides missing; labels only
    """

    column: str
    levels: tuple[Any, ...]
    kind: str
    counts: tuple[int, ...]
    unlabeled: Any = None

    def __len__(self) -> int:
        return len(self.levels)

    def code(self, level: Any) -> int:
        """Code of one level.

        Raises
        ------
        ValueError
            If the column has no such level.
        """
        value = plain(level)
        if type(value) is type(self.levels[0]) and value in self.levels:
            return self.levels.index(value)
        raise ValueError(
            f'"{self.column}" has no level {value!r}. Levels there: {listed(self.levels, 10)}.'
            + did_you_mean(value, self.levels)
        )


@dataclass(frozen=True)
class Covariate:
    """A continuous column and how it was standardised: (value - mean) / sd; sd 1 if it was constant."""

    column: str
    mean: float
    sd: float


@dataclass(frozen=True)
class Schema:
    """Genes, columns and depth of a data set.

    genes : G names
    batch, label, sample : Factor or None
    categorical, continuous : further columns
    size_factor : column of given size factors, or None
    layer : layer that held the counts, or None for X
    log_library_mean, log_library_sd : (B,) mean and sd of log total counts by batch
    """

    genes: tuple[str, ...]
    batch: Factor | None = None
    label: Factor | None = None
    sample: Factor | None = None
    categorical: tuple[Factor, ...] = ()
    continuous: tuple[Covariate, ...] = ()
    size_factor: str | None = None
    layer: str | None = None
    log_library_mean: tuple[float, ...] = ()
    log_library_sd: tuple[float, ...] = ()
    _by_column: dict[str, Factor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        factors = [f for f in (self.batch, self.label, self.sample, *self.categorical) if f]
        object.__setattr__(self, "_by_column", {f.column: f for f in factors})

    @property
    def n_genes(self) -> int:
        return len(self.genes)

    @property
    def n_batches(self) -> int:
        """Levels of the batch column; 1 without one."""
        return len(self.batch) if self.batch else 1

    @property
    def n_labels(self) -> int:
        return len(self.label) if self.label else 0

    @property
    def n_samples(self) -> int:
        return len(self.sample) if self.sample else 0

    @property
    def factors(self) -> dict[str, Factor]:
        """Every categorical column by name, batch first."""
        return self._by_column

    def factor(self, name: str) -> Factor | None:
        """The categorical column of this name; "batch", "label" and "sample" stand for the one in that role."""
        if name in self._by_column:
            return self._by_column[name]
        return getattr(self, name) if name in ROLES else None

    def covariate(self, name: str) -> Covariate | None:
        """The continuous column of this name."""
        return next((c for c in self.continuous if c.column == name), None)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings."""
        return {k: v for k, v in asdict(self).items() if k != "_by_column"}

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> Schema:
        """The schema that ``to_json`` wrote."""

        def factor(d: dict[str, Any] | None) -> Factor | None:
            if not d:
                return None
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
            return Factor(**fields)

        held = {k: tuple(v) if isinstance(v, list) else v for k, v in held.items()}
        for role in ROLES:
            held[role] = factor(held[role])
        held["categorical"] = tuple(factor(d) for d in held["categorical"])
        held["continuous"] = tuple(Covariate(**d) for d in held["continuous"])
        return cls(**held)


def plain(value: Any) -> Any:
    """A numpy scalar as Python's own; whole floats as int, so that 1.0 and 1 are one level."""
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _kind(levels: list[Any], column: str) -> str:
    kinds = {"truth" if isinstance(v, bool) else "number" if isinstance(v, (int, float)) else "text" for v in levels}
    if len(kinds) > 1:
        raise ValueError(
            f'obs["{column}"] mixes {" and ".join(sorted(kinds))} values ({listed(levels)}). '
            f'Make them one kind: adata.obs["{column}"] = adata.obs["{column}"].astype(str).'
        )
    return kinds.pop()


def _sorted(values: Any) -> list[Any]:
    values = [plain(v) for v in values]
    return sorted(values, key=lambda v: (str(type(v)), v)) if len({type(v) for v in values}) > 1 else sorted(values)


def column_of(obs: pd.DataFrame, name: str, role: str) -> pd.Series:
    """A column by name, or an error that lists the columns."""
    if not isinstance(name, str):
        raise TypeError(f"{role} takes the name of a column of adata.obs, not {type(name).__name__}")
    if name not in obs.columns:
        raise ValueError(
            f'no column "{name}" in adata.obs ({role}="{name}"). Columns there: '
            f"{listed(sorted(map(str, obs.columns)), 20) or 'none'}." + did_you_mean(name, obs.columns)
        )
    column = obs[name]
    if isinstance(column, pd.DataFrame):
        raise ValueError(f'adata.obs has {column.shape[1]} columns named "{name}"; keep one')
    return column


def factor_of(obs: pd.DataFrame, name: str, role: str, unlabeled: Any, notes: list[str]) -> tuple[Factor, np.ndarray]:
    """A categorical column as (Factor, codes (N,)); labels may be missing (code -1), others may not."""
    column = column_of(obs, name, role)
    values = np.asarray(column.astype(object))
    missing = np.asarray(pd.isna(column))
    unlabeled = None if unlabeled is None or pd.isna(unlabeled) else plain(unlabeled)
    if role == "label":
        if unlabeled is not None:
            missing = missing | (values == unlabeled)
    elif missing.any():
        raise ValueError(
            f'obs["{name}"] ({role}) is missing for {missing.sum():,} of {len(obs):,} cells '
            f'(first: cell "{obs.index[int(missing.argmax())]}"). Give them a level of their own: '
            f'adata.obs["{name}"] = adata.obs["{name}"].astype("category").cat.add_categories("unknown")'
            '.fillna("unknown"), or leave them out.'
        )
    seen = pd.unique(values[~missing])
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        fractions = sum(not float(v).is_integer() for v in seen)
        if fractions or (len(seen) == len(obs) and len(obs) > 2):
            raise ValueError(
                f'obs["{name}"] ({role}) looks continuous: {len(seen):,} values in {len(obs):,} cells '
                f"({listed(seen[:3])}). Pass it as continuous=[...], or turn it into text if these are levels."
            )
    levels = _sorted(seen)
    if any(isinstance(v, str) and not v for v in levels):
        first = obs.index[(values == "").argmax()]
        raise ValueError(f'obs["{name}"] ({role}) has an empty level "" (first: cell "{first}"); give it a name')
    kind = _kind(levels, name) if levels else "text"
    place = {level: i for i, level in enumerate(levels)}
    codes = np.array([-1 if gone else place[plain(v)] for v, gone in zip(values, missing)], dtype=np.int64)
    counts = np.bincount(codes[codes >= 0], minlength=len(levels))
    if len(levels) > 1000:
        notes.append(
            f'obs["{name}"] ({role}) has {len(levels):,} levels: {128 * len(levels):,} weights for each layer of 128 '
            "that sees it. Is it a column of identifiers?"
        )
    rare = [level for level, n in zip(levels, counts) if n <= (1 if role == "label" else 2)]
    if rare and role in ("batch", "label") and len(levels) > 1:
        how = "a single cell" if role == "label" else "one or two cells"
        notes.append(f'obs["{name}"] ({role}): {how} in {listed(rare)}; what is said of them rests on little')
    return Factor(
        name, tuple(levels), kind, tuple(int(n) for n in counts), unlabeled if role == "label" else None
    ), codes


def recode(factor: Factor, column: pd.Series, role: str) -> np.ndarray:
    """Codes (N,) of a column of new cells in the levels of a known Factor; labels and samples may be new (-1)."""
    values = [None if gone else plain(v) for v, gone in zip(np.asarray(column.astype(object)), pd.isna(column))]
    place = {(type(level), level): i for i, level in enumerate(factor.levels)}
    codes = np.array([place.get((type(v), v), -1) for v in values], dtype=np.int64)
    if role in ("label", "sample") or (codes >= 0).all():
        return codes
    strange = list(dict.fromkeys(v for v, c in zip(values, codes) if c < 0))
    n = int((codes < 0).sum())
    if {str(v) for v in strange} <= {str(level) for level in factor.levels}:
        raise ValueError(
            f'obs["{factor.column}"]: training had {factor.kind} levels {listed(map(repr, factor.levels))}, here are '
            f"{listed(map(repr, strange))}. They read alike but are of another type: cast with "
            f'adata.obs["{factor.column}"].astype({"str" if factor.kind == "text" else "int"}).'
        )
    raise ValueError(
        f'obs["{factor.column}"] ({role}) has {"missing values" if strange == [None] else "levels"} that training did '
        f"not: {listed(strange)} for {n:,} of {len(values):,} cells. Known: {listed(factor.levels, 10)}. "
        f"Either name the known level that is nearest in obs, or average over the known ones "
        f'(expression(..., do={{"{factor.column}": "all"}}) after setting any), or give them weights of their own: '
        "fit.map(these cells), or fit again with them."
    )


def grown(schema: Schema, obs: pd.DataFrame) -> tuple[Schema, dict[str, list[Any]]]:
    """The schema with levels of batch, sample and categorical columns that ``obs`` has and it has not, after its own.

    Returns
    -------
    Schema, dict
        The moments of log totals of new batches are left at those of all; and the new levels by column.

    Raises
    ------
    ValueError
        If a column is missing, has missing values, or levels of another type.
    """
    changed: dict[str, Any] = {}
    new: dict[str, list[Any]] = {}

    def longer(factor: Factor, role: str) -> Factor:
        if role == "sample" and factor.column not in obs.columns:
            return factor
        found, _ = factor_of(obs, factor.column, role, None, [])
        more = [level for level in found.levels if level not in factor.levels]
        if more and found.kind != factor.kind:
            raise ValueError(
                f'obs["{factor.column}"] ({role}) has {found.kind} levels ({listed(found.levels, 3)}), the fit has '
                f"{factor.kind} ones ({listed(factor.levels, 3)}): cast the column"
            )
        if more:
            new[factor.column] = more
        return replace(factor, levels=(*factor.levels, *more), counts=(*factor.counts, *(0 for _ in more)))

    for role in ("batch", "sample"):
        factor = getattr(schema, role)
        if factor is not None and (role == "sample" or factor.column in obs.columns):
            changed[role] = longer(factor, role)
    further = [longer(f, "categorical") if f.column in obs.columns else f for f in schema.categorical]
    changed["categorical"] = tuple(further)
    n_more = len(changed["batch"]) - len(schema.batch) if schema.batch and "batch" in changed else 0
    for name in ("log_library_mean", "log_library_sd"):
        own = getattr(schema, name)
        changed[name] = (*own, *([float(np.mean(own))] * n_more))
    return replace(schema, **changed), new


def covariate_of(obs: pd.DataFrame, name: str, notes: list[str]) -> tuple[Covariate, np.ndarray]:
    """A continuous column as (Covariate, standardised values (N,))."""
    values = numbers_of(obs, name, "continuous")
    mean, sd = float(values.mean()), float(values.std())
    if not sd > 1e-12 * max(1.0, abs(mean)):
        notes.append(f'obs["{name}"] (continuous) is {mean:g} in every cell: its effect is the prior\'s')
        sd = 1.0
    return Covariate(name, mean, sd), (values - mean) / sd


def numbers_of(obs: pd.DataFrame, name: str, role: str) -> np.ndarray:
    """A column as finite float64 numbers (N,)."""
    column = column_of(obs, name, role)
    if not pd.api.types.is_numeric_dtype(column):
        column = column.infer_objects()
    if not pd.api.types.is_numeric_dtype(column):
        try:
            values = column.astype(object).where(column.notna(), math.nan).astype(float).to_numpy()
            text = any(isinstance(v, str) for v in column)
        except (TypeError, ValueError):
            text = True
        if text:
            first = next((v for v in column if isinstance(v, str)), column.iloc[0])
            raise ValueError(
                f'obs["{name}"] ({role}) must hold numbers, found {first!r}. Categorical? Pass it as '
                f'categorical=["{name}"].'
            )
    else:
        values = column.astype(float).to_numpy(dtype=np.float64, na_value=np.nan)
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(
            f'obs["{name}"] ({role}) is missing or not finite for {bad.sum():,} of {len(obs):,} cells (first: cell '
            f'"{obs.index[int(bad.argmax())]}"). Fill it (adata.obs["{name}"].fillna(...)) or leave those cells out.'
        )
    return values


def layout_notes(schema: Schema, codes: dict[str, np.ndarray]) -> list[str]:
    """What cannot be told apart among batch, label, sample and the other columns.

    Raises
    ------
    ValueError
        If a sample is in two levels of a categorical column: a sample is one specimen
        under one condition.
    """
    notes: list[str] = []
    factors = schema.factors
    if schema.sample:
        of_sample = codes[schema.sample.column]
        for other in schema.categorical:
            table = _table(of_sample, codes[other.column], len(schema.sample), len(other))
            split = np.flatnonzero((table > 0).sum(1) > 1)
            if len(split):
                first = schema.sample.levels[split[0]]
                where = [other.levels[j] for j in np.flatnonzero(table[split[0]])]
                raise ValueError(
                    f'sample="{schema.sample.column}": {len(split)} of {len(schema.sample)} samples '
                    f"({listed(schema.sample.levels[i] for i in split)}) occur in more than one level of "
                    f'"{other.column}" ("{first}" in {listed(where)}). A sample is one specimen under one condition: '
                    f'make a column of both, adata.obs["sample"] = adata.obs["{schema.sample.column}"].astype(str) + '
                    f'"_" + adata.obs["{other.column}"].astype(str).'
                )
    if schema.batch is None or len(schema.batch) < 2:
        return notes
    for name, other in factors.items():
        if other is schema.batch or len(other) < 2:
            continue
        table = _table(codes[schema.batch.column], codes[name], len(schema.batch), len(other))
        once = ((table > 0).sum(1) <= 1).all()
        if once and ((table > 0).sum(0) <= 1).all():
            frame = pd.DataFrame(table, index=list(schema.batch.levels), columns=list(other.levels))
            shown = frame.iloc[:6, :6].to_string()
            notes.append(
                f'"{schema.batch.column}" (batch) and "{name}" are the same split of the cells, so their effects '
                f"cannot be told apart:\n{shown}"
            )
        elif once and other in schema.categorical:
            notes.append(
                f'every level of "{schema.batch.column}" (batch) lies within one level of "{name}", so what differs '
                f'between levels of "{name}" can as well be put down to batches; name a batch that crosses it, or '
                "leave one out"
            )
    return notes


def _table(rows: np.ndarray, columns: np.ndarray, n_rows: int, n_columns: int) -> np.ndarray:
    known = (rows >= 0) & (columns >= 0)
    flat = np.bincount(rows[known] * n_columns + columns[known], minlength=n_rows * n_columns)
    return flat.reshape(n_rows, n_columns)


def library_moments(library: np.ndarray, batch: np.ndarray, n_batches: int) -> dict[str, tuple[float, ...]]:
    """Mean and sd of log total counts by batch, over cells with counts; sd at least 0.01."""
    means, sds = [], []
    for b in range(n_batches):
        of_batch = library[(batch == b) & (library > 0)]
        logs = np.log(of_batch if len(of_batch) else library[library > 0])
        means.append(float(logs.mean()) if len(logs) else 0.0)
        sds.append(max(float(logs.std()), 0.01) if len(logs) else 1.0)
    return {"log_library_mean": tuple(means), "log_library_sd": tuple(sds)}
