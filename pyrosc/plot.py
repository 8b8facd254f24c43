"""Pictures, by matplotlib. Each function draws on the axes it is given, or on new ones, and returns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .schema import listed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from .check.calibration import Calibration
    from .posterior import Fit


def _axes(ax: Axes | None, width: float = 5.0) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "pyrosc[plot]"') from error
    return Figure(figsize=(width, 4), layout="constrained").subplots()


def _require_table(table: Any, columns: Sequence[str], maker: str) -> None:
    missing = [c for c in columns if c not in getattr(table, "columns", ())]
    if missing:
        what = f"a {type(table).__name__}" + (f" without {listed(missing)}" if hasattr(table, "columns") else "")
        raise ValueError(f"this picture takes the table that {maker} answers, not {what}")


def _colour(i: int, of: int) -> Any:
    """Of level i, none used twice."""
    from matplotlib import colormaps

    if of <= 20:
        return colormaps["tab10" if of <= 10 else "tab20"](i)
    return colormaps["gist_ncar"]((i + 0.5) / of)


def history(fit: Fit, ax: Axes | None = None) -> Axes:
    """Training and held-out ELBO by epoch, the warm-up shaded, the best epoch marked.

    Without ``ax`` the picture belongs to a new Figure: ``history(fit).figure.savefig(...)``.
    """
    ax = _axes(ax)
    table = fit.history
    ax.plot(table["epoch"], table["train_elbo"], color="0.6", label="training")
    shown = table["train_elbo"]
    if "validation_elbo" in table:
        ax.plot(table["epoch"], table["validation_elbo"], color="C0", label="held out")
        shown = table["validation_elbo"]
    warming = table.loc[table["kl_weight"] < 1, "epoch"]
    if len(warming):
        ax.axvspan(table["epoch"].iloc[0], warming.max(), color="0.9", zorder=0, label="KL weight < 1")
    if fit.settings["best_epoch"]:
        ax.axvline(fit.settings["best_epoch"], color="C3", lw=1, ls=":", label="best epoch")
    # The first epochs would squeeze the rest into a line.
    low = np.nanquantile(shown, 0.1)
    ax.set_ylim(low - 0.3 * abs(np.nanmax(table["train_elbo"]) - low), None)
    ax.set(xlabel="epoch", ylabel="ELBO at KL weight 1, nats per cell", title=fit.program.story)
    ax.legend(frameon=False)
    return ax


def latent(z: Any, color: Any = None, ax: Axes | None = None, *, title: str = "", seed: int = 0) -> Axes:
    """Cells in two dimensions, by t-SNE of their latent means (PCA above 10,000 cells), coloured by level.

    Parameters
    ----------
    z : (N, K)
    color : (N,) levels, or None

    Notes
    -----
    A picture of neighbourhoods: distances between far groups mean nothing.
    """
    ax = _axes(ax, 5.0 if color is None else 7.0)
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError('a picture of the latent space needs scikit-learn: pip install "pyrosc[demo]"') from error
    z = np.asarray(z, dtype=float)
    by_tsne = 4 <= len(z) <= 10_000 and z.shape[1] > 2
    if by_tsne:
        flat = TSNE(perplexity=min(30, (len(z) - 1) / 3), random_state=seed, init="pca").fit_transform(z)
    elif z.shape[1] > 2:
        flat = PCA(2, random_state=seed).fit_transform(z)
    else:
        flat = np.pad(z, ((0, 0), (0, 2 - z.shape[1])))
    levels = [None] if color is None else sorted({str(v) for v in color})
    names = np.array([None] * len(z)) if color is None else np.array([str(v) for v in color])
    for i, level in enumerate(levels):
        here = names == level if level is not None else slice(None)
        shade = _colour(i, len(levels))
        ax.scatter(flat[here, 0], flat[here, 1], s=9, lw=0, color=shade, label=level)
    name = "t-SNE" if by_tsne else "PC" if z.shape[1] > 2 else "z"
    ax.set(xlabel=f"{name} 1", ylabel=f"{name} 2", xticks=[], yticks=[], title=title)
    if color is not None and len(levels) <= 30:
        ax.legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left", markerscale=2)
    return ax


def volcano(table: pd.DataFrame, ax: Axes | None = None, *, n_names: int = 10, title: str = "") -> Axes:
    """Probability of an effect against its size, for a table of `Fit.differential_expression`; calls in colour.

    Parameters
    ----------
    table : of one comparison
    n_names : how many genes are named, those of largest effect among the calls

    Raises
    ------
    ValueError
        If it is no such table, or holds several comparisons.
    """
    _require_table(table, ("is_de", "lfc_mean", "probability"), "fit.differential_expression(...)")
    pairs = table[[c for c in ("group1", "group2") if c in table]].drop_duplicates()
    if len(pairs) > 1:
        first = pairs["group1"].iloc[0]
        raise ValueError(
            f"a volcano shows one comparison, and the table holds {len(pairs)}: take one, "
            f'table[table["group1"] == {str(first)!r}]'
        )
    ax = _axes(ax)
    called = table["is_de"].to_numpy()
    for mask, colour, label in ((~called, "0.7", None), (called, "C3", f"{int(called.sum()):,} called")):
        ax.scatter(table["lfc_mean"][mask], table["probability"][mask], s=9, lw=0, color=colour, label=label)
    delta = table.attrs.get("delta")
    if isinstance(delta, float):
        for side in (-delta, delta):
            ax.axvline(side, color="0.6", lw=0.8, ls=":")
    largest = table[called].assign(size=lambda t: t["lfc_mean"].abs()).nlargest(n_names, "size")
    for gene, row in largest.iterrows():
        ax.annotate(
            str(gene), (row["lfc_mean"], row["probability"]), fontsize=7, xytext=(2, 2), textcoords="offset points"
        )
    groups = f"{table['group1'].iloc[0]} over {table['group2'].iloc[0]}" if "group1" in table else ""
    ax.set(xlabel=f"log2 fold change, {groups}".rstrip(", "), ylabel="P(|lfc| > delta)", title=title)
    if called.any():
        ax.legend(frameon=False)
    return ax


def predictive(table: pd.DataFrame, statistic: str, ax: Axes | None = None) -> Axes:
    """Observed against replicated values of a statistic, for a table of `check.posterior_predictive`.

    Bars are 90 % of the replicates; what lies off the line in colour is outside them.
    """
    _require_table(table, ("statistic", "observed", "q05", "q50", "q95"), "check.posterior_predictive(...)")
    if statistic not in set(table["statistic"]):
        raise ValueError(f'the table has no statistic "{statistic}"; it has {sorted(set(table["statistic"]))}')
    ax = _axes(ax)
    rows = table[table["statistic"] == statistic]
    outside = ((rows["observed"] < rows["q05"]) | (rows["observed"] > rows["q95"])).to_numpy()
    for mask, colour in ((~outside, "0.6"), (outside, "C3")):
        part = rows[mask]
        bars = [part["q50"] - part["q05"], part["q95"] - part["q50"]]
        ax.errorbar(part["observed"], part["q50"], yerr=bars, fmt=".", ms=4, lw=0.5, color=colour)
    low, high = rows[["observed", "q05"]].min().min(), rows[["observed", "q95"]].max().max()
    ax.plot([low, high], [low, high], color="C0", lw=0.8)
    ax.set(xlabel=f"observed {statistic}", ylabel="replicated, 90 %", title=f"{outside.mean():.0%} outside")
    return ax


def calibration(done: Calibration, scalars: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Ranks of `check.calibration`: their distribution function less that of uniform ones, the band shaded.

    Overconfident draws rise left of the middle and fall right of it, underconfident ones the other way round; a bow to
    one side is a bias.

    Parameters
    ----------
    scalars : names in ``done.ranks``; None for all of one value a simulated cell
        All of as many ranks, as the band depends on how many. Those outside it have colours and names.
    """
    from .check.calibration import ecdf, simultaneous_band

    most = max(len(rank) for rank in done.ranks.values())
    names = [n for n, rank in done.ranks.items() if len(rank) == most] if scalars is None else list(scalars)
    unknown = [n for n in names if n not in done.ranks]
    if unknown or not names:
        raise ValueError(f"scalars: there is no {unknown or 'name'}; there are {list(done.ranks)}")
    sizes = {len(done.ranks[n]) for n in names}
    if len(sizes) > 1:
        raise ValueError(f"scalars of {sorted(sizes)} ranks have bands of their own: draw them apart")
    ax = _axes(ax)
    n_draws = len(done.draws)
    at, lower, upper = simultaneous_band(sizes.pop(), n_draws + 1, done.table.attrs["level"])
    ax.fill_between(at, lower - at, upper - at, color="0.9", lw=0, label=f"{done.table.attrs['level']:.0%} band")
    outside = [n for n in names if not done.table.loc[n, "inside"]]
    for name in names:
        shade = _colour(outside.index(name), len(outside)) if name in outside else "0.6"
        style: dict[str, Any] = {"lw": 1.0, "label": name} if name in outside else {"lw": 0.7}
        ax.plot(at, ecdf(done.ranks[name], n_draws) - at, color=shade, **style)
    ax.set(xlabel="rank of the truth / draws", ylabel="distribution function less uniform")
    ax.set_title(f"{len(outside)} of {len(names)} outside")
    if len(outside) <= 10:
        ax.legend(frameon=False, fontsize=7)
    return ax
