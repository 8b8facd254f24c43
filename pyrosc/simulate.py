"""Simulated cells: counts with a known truth, to test stories against. Numpy only, seeded.

`tissue` draws from a law close to the stories'. `bursts` and `shifted_groups` do not; they are for comparing groups.
`subtle_types` is for labels: few and partly wrong ones, of types that differ less than other things do. `donors` is for
samples that differ in some types of cells and not in others.
`fragments` is for open chromatin: few regions open in a cell, some that differ in how much, and reads beside fragments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse


def tissue(
    n_cells: int = 4000,
    n_genes: int = 1000,
    n_types: int = 8,
    n_batches: int = 3,
    *,
    depth: float = 2500.0,
    n_markers: int = 60,
    effect: float = 0.7,
    dispersion: float = 2.0,
    seed: int = 0,
) -> anndata.AnnData:
    """A tissue of related cell types measured in batches, with negative binomial counts.

    Types are the leaves of a binary tree: each branch shifts the log rates of ``n_markers``
    genes by Normal(0, ``effect``). Within types one continuous factor moves 40 genes (at most 4 %) by Normal(0, 0.3) a
    unit. Batches shift every gene by Normal(0, 0.3), and by Normal(0, 0.1) more in each
    type; the last type is missing from the last batch if there are two or more batches.
    Base log rates are Normal(-1, 1.2), shares their softmax; totals are LogNormal around
    ``depth`` with sd 0.35, batches differing by 0, 0.3, -0.4, ...; inverse dispersions are
    LogNormal(log ``dispersion``, 1).

    Returns
    -------
    AnnData
        ``X`` CSR counts (N, G); ``obs``: "batch", "cell_type", "factor" (the continuous one) and
        "library" (expected total); ``layers["rho"]`` (N, G) true shares; ``var["dispersion"]``;
        ``varm["programmes"]`` DataFrame (G, programmes), what each adds to log rates, 0 for genes that it does not
        move: "branch1.0", ... by level and place in the tree (of 8 types branch1.0 holds types 0 to 3, branch3.5 type
        5 alone; branches without types, or with all, are left out), and "factor".
    """
    draw = np.random.default_rng(seed)
    if not 1 <= n_markers <= n_genes:
        raise ValueError(f"n_markers must be between 1 and n_genes={n_genes}, not {n_markers}")
    if not dispersion > 0:
        raise ValueError(f"dispersion must be positive, not {dispersion!r}")
    base, programmes, of_type = _related_types(draw, n_genes, n_types, n_markers, effect)
    shift = draw.normal(0, 0.3, (n_batches, n_genes)) if n_batches > 1 else np.zeros((1, n_genes))
    cross = draw.normal(0, 0.1, (n_batches, n_types, n_genes)) if n_batches > 1 else np.zeros((1, n_types, n_genes))
    inverse = draw.lognormal(np.log(dispersion), 1, n_genes)

    batch = draw.integers(n_batches, size=n_cells)
    kind = draw.integers(n_types, size=n_cells)
    if n_batches > 1 and n_types > 1:
        absent = (batch == n_batches - 1) & (kind == n_types - 1)
        kind[absent] = draw.integers(n_types - 1, size=absent.sum())
    factor = draw.normal(size=n_cells)
    logits = base + of_type[kind] + factor[:, None] * programmes["factor"] + shift[batch] + cross[batch, kind]
    rho = np.exp(logits - logits.max(1, keepdims=True))
    rho /= rho.sum(1, keepdims=True)
    offset = np.resize([0.0, 0.3, -0.4], n_batches)
    library = draw.lognormal(np.log(depth) + offset[batch], 0.35)
    counts = draw.poisson(draw.gamma(inverse, library[:, None] * rho / inverse))

    obs: dict[str, Any] = {
        "batch": pd.Categorical([f"batch{b}" for b in batch]),
        "cell_type": pd.Categorical([f"type{t}" for t in kind]),
        "factor": factor,
        "library": library,
    }
    names = [f"gene{j}" for j in range(n_genes)]
    return anndata.AnnData(
        X=sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(obs, index=[f"cell{i}" for i in range(n_cells)]),
        var=pd.DataFrame({"dispersion": inverse}, index=names),
        varm={"programmes": pd.DataFrame(programmes, index=names)},
        layers={"rho": rho.astype(np.float32)},
    )


def _related_types(
    draw: np.random.Generator, n_genes: int, n_types: int, n_markers: int, effect: float
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Base log rates (G,); shifts (G,) of branches of a tree of types and loadings of a "factor"; of types (C, G)."""
    of_factor = min(40, max(2, n_genes // 25))
    levels = max(1, int(np.ceil(np.log2(max(n_types, 2)))))
    of_type = np.zeros((n_types, n_genes))
    programmes: dict[str, np.ndarray] = {}
    for level in range(levels):
        for branch in range(2 ** (level + 1)):
            inside = [t for t in range(n_types) if t >> (levels - 1 - level) == branch]
            moved = np.zeros(n_genes)
            genes = draw.choice(n_genes, n_markers, replace=False)
            moved[genes] = draw.normal(0, effect, n_markers)
            of_type[inside] += moved
            if 0 < len(inside) < n_types:
                programmes[f"branch{level + 1}.{branch}"] = moved
    loading = np.zeros(n_genes)
    loading[draw.choice(n_genes, of_factor, replace=False)] = draw.normal(0, 0.3, of_factor)
    programmes["factor"] = loading
    return draw.normal(-1, 1.2, n_genes), programmes, of_type


def donors(
    n_cells: int = 8000,
    n_genes: int = 1000,
    n_types: int = 8,
    n_donors: int = 16,
    *,
    n_active: int = 2,
    n_module: int = 20,
    fold: float = 2.0,
    proportions: float | None = None,
    depth: float = 2500.0,
    n_markers: int = 60,
    effect: float = 0.7,
    dispersion: float = 2.0,
    seed: int = 0,
) -> anndata.AnnData:
    """Cells of many donors, who differ in some cell types as the leaves of a tree do, and in the others not at all.

    Types, base rates, the factor within types, totals and dispersions are those of `tissue`, in one batch. In each of
    the first ``n_active`` types donors are the leaves of a binary tree of its own (donors in random order), and every
    node below the root owns a module of ``n_module`` genes whose rate is ``fold`` times as high in its donors. Two
    donors differ in that type by the modules of the nodes that are over one of them alone.

    Parameters
    ----------
    n_donors : a power of 2, at least 2
    n_active : types in which donors differ, 0 to ``n_types``
    proportions : concentration of the Dirichlet that a donor's shares of types are drawn from; None for equal shares
        Small numbers, such as 2, make donors differ much in composition.

    Returns
    -------
    AnnData
        ``X`` CSR counts (N, G); ``obs``: "donor", "cell_type", "factor"; ``layers["rho"]`` (N, G) true shares;
        ``uns["distances"]``: for each type a DataFrame (D, D) of true distances of donors, the root mean square over
        genes of the difference of log2 rates; ``uns["effects"]``: for each type a DataFrame (D, G) of log2 folds.

    Raises
    ------
    ValueError
        If a size or concentration is out of range.

    Notes
    -----
    After the tree construction of Boyeau et al. 2022 (bioRxiv 2022.10.04.510898, MrVI), here on simulated cells.
    """
    _check_sizes(n_cells=n_cells, n_genes=n_genes, n_types=n_types, n_donors=n_donors, n_module=n_module)
    levels = int(n_donors).bit_length() - 1
    if n_donors < 2 or 2**levels != n_donors:
        raise ValueError(f"n_donors must be a power of 2 of at least 2, not {n_donors}: donors are leaves of a tree")
    if not 0 <= n_active <= n_types:
        raise ValueError(f"n_active must be between 0 and n_types={n_types}, not {n_active}")
    if n_module > n_genes or n_markers > n_genes:
        raise ValueError(f"n_module={n_module} and n_markers={n_markers} must be at most n_genes={n_genes:,}")
    if not fold > 0:
        raise ValueError(f"fold must be positive, not {fold!r}")
    if proportions is not None and not proportions > 0:
        raise ValueError(f"proportions must be a positive concentration or None, not {proportions!r}")
    draw = np.random.default_rng(seed)
    base, programmes, of_type = _related_types(draw, n_genes, n_types, n_markers, effect)
    inverse = draw.lognormal(np.log(dispersion), 1, n_genes)
    folds = np.zeros((n_types, n_donors, n_genes))  # log2
    for t in range(n_active):
        leaf: Any = draw.permutation(n_donors)
        for level in range(1, levels + 1):
            for node in range(2**level):
                module = draw.choice(n_genes, n_module, replace=False)
                folds[t][np.ix_(leaf >> (levels - level) == node, module)] += np.log2(fold)
    donor: Any = draw.permutation(np.arange(n_cells) % n_donors)
    if proportions is None:
        share = np.full((n_donors, n_types), 1 / n_types)
    else:
        share = draw.dirichlet(np.full(n_types, proportions), n_donors)
    kind: Any = (draw.uniform(size=(n_cells, 1)) > share[donor].cumsum(1)).sum(1).clip(max=n_types - 1)
    factor = draw.normal(size=n_cells)
    logits = base + of_type[kind] + factor[:, None] * programmes["factor"] + np.log(2) * folds[kind, donor]
    rho = np.exp(logits - logits.max(1, keepdims=True))
    rho /= rho.sum(1, keepdims=True)
    library = draw.lognormal(np.log(depth), 0.35, n_cells)
    counts = draw.poisson(draw.gamma(inverse, library[:, None] * rho / inverse))

    names = [f"donor{d:0{len(str(n_donors - 1))}d}" for d in range(n_donors)]
    types, genes = [f"type{t}" for t in range(n_types)], [f"gene{j}" for j in range(n_genes)]
    apart = [np.sqrt(((f[:, None] - f[None]) ** 2).mean(-1)) for f in folds]
    return anndata.AnnData(
        X=sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {
                "donor": pd.Categorical.from_codes(donor, dtype=pd.CategoricalDtype(names)),
                "cell_type": pd.Categorical.from_codes(kind, dtype=pd.CategoricalDtype(types)),
                "factor": factor,
            },
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame({"dispersion": inverse}, index=genes),
        layers={"rho": rho.astype(np.float32)},
        uns={
            "distances": {t: pd.DataFrame(d, index=names, columns=names) for t, d in zip(types, apart)},
            "effects": {t: pd.DataFrame(f, index=names, columns=genes) for t, f in zip(types, folds)},
        },
    )


def bursts(
    n_cells: int = 4000,
    n_genes: int = 800,
    n_types: int = 6,
    *,
    populations: Sequence[int] = (500, 100),
    effects: float = 0.3,
    capture: float = 0.08,
    seed: int = 0,
) -> anndata.AnnData:
    """Cell types whose genes are transcribed in bursts: counts are no negative binomial, and means are known.

    A promoter turns on at rate ``on`` and off at rate ``off``, and transcribes at ``rate`` while on, all in units of
    the decay of a molecule; so a cell's molecules of a gene are Poisson around ``rate`` times a Beta variable:

        active[n, g]    ~ Beta(on[g, c], off[g, c])                of late, c the type of cell n
        molecules[n, g] ~ Poisson(rate[g, c] * active[n, g])
        x[n, g]         ~ Binomial(molecules[n, g], captured[n])
        captured[n]     ~ LogNormal(log capture, 0.3), at most 1

    Log ``on``, ``off`` and ``rate`` of a gene are Normal(0, 0.8), Normal(1, 0.8) and Normal(4, 1); sds, not variances.
    In each type ``effects`` of the genes have one of the three, drawn at random, moved up or down by Uniform(0.7, 1.5).
    Each type draws its own genes, so two types differ in 1 - (1 - effects)^2 of them on average: 51 % by default.

    Parameters
    ----------
    populations : numbers of cells of the first types; the others share the rest of the cells evenly
    effects : share of the genes that a type moves, 0 to 1
    capture : median share of a cell's molecules that is counted, above 0 and at most 1

    Returns
    -------
    AnnData
        ``X`` CSR counts (N, G), cells of the types in random order; ``obs``: "cell_type" and "captured"; ``varm``:
        "on", "off", "rate" and "mean", each a DataFrame (G, types). "mean" is the expected number of molecules,
        rate on / (on + off): ``varm["mean"] / varm["mean"].sum()`` are true shares of the types, and log2 ratios of
        these the true effects between them.

    Raises
    ------
    ValueError
        If a size, share or population is out of range.

    Notes
    -----
    Reference: Zhang et al. 2019, Nature Communications 10:2611 (SymSim), whose kinetic law this is, without its library
    preparation and sequencing. The variance of molecules is their mean + rate^2 on off / ((on + off)^2 (on + off + 1)).
    """
    _check_sizes(n_cells=n_cells, n_genes=n_genes, n_types=n_types)
    sizes, others = [int(n) for n in populations], n_types - len(populations)
    if others < 0 or min(sizes, default=1) < 1:
        raise ValueError(
            f"populations must be whole numbers >= 1, at most one for each of n_types={n_types}, not "
            f"{tuple(populations)}: name fewer, or ask for more types"
        )
    rest = n_cells - sum(sizes)
    if rest < others or (others == 0 and rest > 0):
        raise ValueError(
            f"populations={tuple(populations)} leave {rest:,} of n_cells={n_cells:,} to {others} other types, which "
            f"{'is too few' if others else 'must be none'}: change populations or n_cells"
        )
    if not 0 <= effects <= 1:
        raise ValueError(f"effects is the share of genes that a type moves, between 0 and 1, not {effects!r}")
    if not 0 < capture <= 1:
        raise ValueError(f"capture is the share of molecules counted, above 0 and at most 1, not {capture!r}")
    draw = np.random.default_rng(seed)
    base = draw.normal([[0.0], [1.0], [4.0]], [[0.8], [0.8], [1.0]], (3, n_genes))
    logs = np.repeat(base[:, :, None], n_types, axis=2)  # (on, off, rate), genes, types
    for t in range(n_types):
        moved = draw.choice(n_genes, round(effects * n_genes), replace=False)
        size = draw.uniform(0.7, 1.5, len(moved)) * draw.choice([-1.0, 1.0], len(moved))
        logs[draw.integers(3, size=len(moved)), moved, t] += size
    on, off, rate = np.exp(logs)

    sizes += [rest // others + (k < rest % others) for k in range(others)]
    kind = draw.permutation(np.repeat(np.arange(n_types), sizes))
    captured = np.minimum(draw.lognormal(np.log(capture), 0.3, n_cells), 1.0)
    active = draw.beta(on.T[kind], off.T[kind])
    # A Binomial share of a Poisson number is Poisson: molecules need not be drawn.
    counts = draw.poisson(captured[:, None] * rate.T[kind] * active)

    types, genes = [f"type{t}" for t in range(n_types)], [f"gene{j}" for j in range(n_genes)]
    truth = {"on": on, "off": off, "rate": rate, "mean": rate * on / (on + off)}
    return anndata.AnnData(
        X=sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {"cell_type": pd.Categorical([types[t] for t in kind], categories=types), "captured": captured},
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(index=genes),
        varm={name: pd.DataFrame(value, index=genes, columns=types) for name, value in truth.items()},
    )


def shifted_groups(
    n_cells: int = 1000,
    n_genes: int = 100,
    *,
    shift: float = 1.0,
    extra_zeros: float = 0.3,
    seed: int = 0,
) -> anndata.AnnData:
    """Two groups of cells, half of the genes shifted between them: log-normal rates that go together, and extra zeros.

        log mean[n, g] = log base[g] + log 2 * shift[g] * (n in group2) + 0.4 * factor[g] * u[n] + sd[g] * e[n, g]
        x[n, g]        ~ Poisson(mean[n, g]), or 0 with probability ``extra_zeros``

    with u and e standard normal: log rates of a cell have covariance 0.16 factor factor' + diag(sd^2). ``base``, the
    median of group1, is Uniform(10, 60), ``factor`` Uniform(-1, 1) and ``sd``^2 Uniform(0.02, 0.06). Half of the genes
    (of an odd number one fewer) have a log2 shift of Normal(+-``shift``, 0.16), either sign as likely, the others of
    Normal(0, 0.16); 0.16 is an sd. Cells of a group differ too: log2 ratios of random pairs have an sd of about 0.6.

    Parameters
    ----------
    shift : log2 ratio, group2 over group1, about which the genes that move do so
    extra_zeros : probability of a zero that says nothing of the mean, 0 to below 1

    Returns
    -------
    AnnData
        ``X`` CSR counts (N, G); ``obs``: "group", "group1" or "group2", half of the cells each (of an odd number group2
        has one more), in random order; ``layers["mean"]`` (N, G) expected count of each cell before extra zeros, its
        rows over their sums the true shares; ``var``: "base", "shift" (log2, group2 over group1), "factor", "sd" and
        "is_shifted".

    Raises
    ------
    ValueError
        If a size, the shift or the probability is out of range.

    Notes
    -----
    Reference: Lopez, Boyeau et al. 2020, Decision-making with auto-encoding variational Bayes, NeurIPS 33, whose
    Poisson log-normal study this follows.
    """
    _check_sizes(n_cells=n_cells, n_genes=n_genes)
    if n_cells < 2:
        raise ValueError(f"n_cells must be at least 2, not {n_cells}: there is a cell in each group")
    if not np.isfinite(shift):
        raise ValueError(f"shift must be a finite log2 ratio such as 1.0, not {shift!r}")
    if not 0 <= extra_zeros < 1:
        raise ValueError(f"extra_zeros must be at least 0 and below 1, not {extra_zeros!r}: it is a probability")
    draw = np.random.default_rng(seed)
    base = draw.uniform(10, 60, n_genes)
    is_shifted = draw.permutation(n_genes) < n_genes // 2
    of_gene = draw.normal(0, 0.16, n_genes) + is_shifted * shift * draw.choice([-1.0, 1.0], n_genes)
    factor, sd = draw.uniform(-1, 1, n_genes), np.sqrt(draw.uniform(0.02, 0.06, n_genes))

    second = draw.permutation(n_cells) >= n_cells // 2
    logs = np.log(base) + np.log(2) * of_gene * second[:, None]
    logs += 0.4 * factor * draw.normal(size=(n_cells, 1)) + sd * draw.normal(size=(n_cells, n_genes))
    mean = np.exp(logs)
    counts = draw.poisson(mean) * (draw.uniform(size=mean.shape) >= extra_zeros)

    return anndata.AnnData(
        X=sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {"group": pd.Categorical(np.where(second, "group2", "group1"), categories=["group1", "group2"])},
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(
            {"base": base, "shift": of_gene, "factor": factor, "sd": sd, "is_shifted": is_shifted},
            index=[f"gene{j}" for j in range(n_genes)],
        ),
        layers={"mean": mean.astype(np.float32)},
    )


def subtle_types(
    n_cells: int = 6000,
    n_genes: int = 1500,
    n_types: int = 4,
    *,
    effect: float = 0.8,
    n_markers: int = 25,
    nuisance: float = 0.5,
    depth: float = 1500.0,
    n_seeds: int = 50,
    errors: float = 0.1,
    seed: int = 0,
) -> anndata.AnnData:
    """Cell types that few genes tell apart, under a factor that moves more, with a few labels that may be wrong.

    Each type raises the log rate of ``n_markers`` genes of its own by ``effect``; markers have about 0.3 counts a cell.
    A factor f ~ Normal(0, 1) that all types share moves a fifth of the genes by Normal(0, ``nuisance``) a unit. Counts
    are negative binomial with inverse dispersions LogNormal(log 4, 0.5) and totals LogNormal around ``depth``, sd 0.3.

    Labels are given to ``n_seeds`` cells a type, drawn from the quarter of its cells with the largest marker score (sum
    of log(1 + count per 10,000) over its markers less that over those of other types, per marker); a share ``errors``
    of them is replaced by cells of other types, those with the largest score for this one.

    Returns
    -------
    AnnData
        ``X`` CSR counts (N, G); ``obs``: "cell_type", "label" (missing for most cells), "factor"; ``var["marker_of"]``,
        empty for genes that mark no type; ``layers["rho"]`` (N, G) true shares.

    Raises
    ------
    ValueError
        If a size or share is out of range.

    Notes
    -----
    After the seed-labelling study of Xu et al. 2021 (Molecular Systems Biology 17:e9620), where seeds picked by markers
    were right in 84 to 96 %.
    """
    _check_sizes(n_cells=n_cells, n_genes=n_genes, n_types=n_types, n_markers=n_markers, n_seeds=n_seeds)
    if n_types * n_markers > n_genes:
        raise ValueError(f"{n_types} types of {n_markers} markers need {n_types * n_markers:,} genes, not {n_genes:,}")
    if not 0 <= errors < 1:
        raise ValueError(f"errors must be at least 0 and below 1, not {errors!r}: it is a share of the labels")
    if 4 * n_seeds * n_types > n_cells:
        raise ValueError(
            f"{n_seeds} labels a type come from the quarter of its cells that look most like it: "
            f"n_cells={n_cells:,} must be at least {4 * n_seeds * n_types:,}"
        )
    draw = np.random.default_rng(seed)
    kind: Any = draw.permutation(np.arange(n_cells) % n_types)
    marker_of = np.full(n_genes, -1)
    marker_of[draw.choice(n_genes, n_types * n_markers, replace=False)] = np.repeat(np.arange(n_types), n_markers)
    is_marker = marker_of >= 0
    rate = np.exp(draw.normal(-0.7, 1.0, n_genes))
    # A marker is raised in one of the types and has 0.3 counts over all.
    of_marker = draw.lognormal(np.log(0.3 / (1 + (np.exp(effect) - 1) / n_types)), 0.3, n_genes)
    rate[~is_marker] *= (depth - 0.3 * is_marker.sum()) / rate[~is_marker].sum()
    rate[is_marker] = of_marker[is_marker]
    loading = np.where(draw.uniform(size=n_genes) < 0.2, draw.normal(0, nuisance, n_genes), 0.0)
    factor = draw.normal(size=n_cells)
    logits = np.log(rate) + effect * (marker_of[None] == kind[:, None]) + factor[:, None] * loading
    rho = np.exp(logits - logits.max(1, keepdims=True))
    rho /= rho.sum(1, keepdims=True)
    library = draw.lognormal(np.log(depth), 0.3, n_cells)
    inverse = draw.lognormal(np.log(4), 0.5, n_genes)
    counts = draw.poisson(draw.gamma(inverse, library[:, None] * rho / inverse))

    logs = np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1))
    of_type = np.stack([logs[:, marker_of == t].mean(1) for t in range(n_types)], 1)
    score = of_type - (of_type.sum(1, keepdims=True) - of_type) / max(n_types - 1, 1)
    label: Any = np.full(n_cells, -1)
    for t in range(n_types):
        best = np.argsort(-score[:, t])
        own = best[kind[best] == t]
        n_wrong = round(errors * n_seeds) if n_types > 1 else 0
        wrong = [i for i in best if kind[i] != t and label[i] < 0][:n_wrong]
        right = [i for i in own[: max(n_seeds, len(own) // 4)] if label[i] < 0]
        label[draw.choice(right, min(n_seeds - n_wrong, len(right)), replace=False)] = t
        label[wrong] = t
    names = [f"type{t}" for t in range(n_types)]
    levels = pd.CategoricalDtype(names)
    return anndata.AnnData(
        X=sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical.from_codes(kind, dtype=levels),
                "label": pd.Categorical.from_codes(label, dtype=levels),
                "factor": factor,
            },
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(
            {"marker_of": np.where(is_marker, np.array(names)[marker_of], "")},
            index=[f"gene{j}" for j in range(n_genes)],
        ),
        layers={"rho": rho.astype(np.float32)},
    )


def fragments(
    n_cells: int = 2000,
    n_regions: int = 5000,
    n_types: int = 6,
    *,
    depth: float = 1000.0,
    accessible: float = 0.08,
    n_quantitative: int = 200,
    highest: float = 6.0,
    edge_losses: float = 0.15,
    seed: int = 0,
) -> anndata.AnnData:
    """Fragments of open chromatin: Poisson about a cell's total times its type's shares of regions.

        x[n, g]     ~ Poisson(library[n] * rho[c, g])              c the type of cell n
        reads[n, g] = 2 x[n, g] - Bernoulli(edge_losses)           where x is above 0
        library[n]  ~ LogNormal(log depth, 0.4)

    Three kinds of regions, by the fragments that they have in a cell of median total: ``n_quantitative`` that are open
    in every type, Uniform(0.5, ``highest``) by type; of the others a share ``accessible`` is open in each type, half of
    these in all types, LogNormal(0, 0.5) by region times one number that makes the totals come out; the rest is closed
    and shares a twentieth of the total evenly.

    Parameters
    ----------
    depth : median total of fragments
        About a fifth of n_regions or more keeps the open regions from being seen less than the quantitative ones.
    accessible : share of regions open in a type, above 0 and below 1
    n_quantitative : regions in which types differ by how many fragments, not by whether there are any
    highest : most expected fragments of those in a cell of median total
    edge_losses : probability that a region's fragments lose one read to an edge, 0 to 1

    Returns
    -------
    AnnData
        ``X`` CSR fragments (N, G), ``layers["reads"]`` likewise; ``obs``: "cell_type" and "library" (expected total);
        ``varm["rho"]``: a DataFrame (G, types) of true shares; ``var["kind"]``: "quantitative", "open" (in some type)
        or "closed". Regions are named "chr1:<start>-<end>".

    Raises
    ------
    ValueError
        If a size or share is out of range, or quantitative regions leave no fragments to the others.

    Notes
    -----
    After the reads and fragments of Martens et al. 2024 (Nature Methods 21:28). Half of the reads, rounded up, are the
    fragments again: `pyrosc.reads_to_fragments`.
    """
    _check_sizes(n_cells=n_cells, n_regions=n_regions, n_types=n_types)
    if not 0 < accessible < 1:
        raise ValueError(f"accessible is the share of regions open in a type, above 0 and below 1, not {accessible!r}")
    if not 0 <= n_quantitative < n_regions:
        raise ValueError(f"n_quantitative must be at least 0 and below n_regions={n_regions:,}, not {n_quantitative!r}")
    if not 0 <= edge_losses <= 1:
        raise ValueError(f"edge_losses is a probability, between 0 and 1, not {edge_losses!r}")
    if not highest > 0.5:
        raise ValueError(f"highest must be above 0.5 fragments, not {highest!r}")
    draw = np.random.default_rng(seed)
    order = draw.permutation(n_regions)
    quantitative, others = order[:n_quantitative], order[n_quantitative:]
    n_open = max(1, round(accessible * len(others)))
    common, rest = others[: n_open // 2], others[n_open // 2 :]
    rate = np.zeros((n_types, n_regions))
    rate[:, quantitative] = draw.uniform(0.5, highest, (n_types, n_quantitative))
    left = 0.95 * depth - rate.sum(1)
    if left.min() <= 0:
        raise ValueError(
            f"n_quantitative={n_quantitative:,} regions have up to {rate.sum(1).max():.0f} fragments of a cell, and "
            f"depth is {depth:g}: raise depth, or take fewer of them"
        )
    weight = draw.lognormal(0, 0.5, n_regions)
    for t in range(n_types):
        here = np.concatenate([common, draw.choice(rest, min(n_open - len(common), len(rest)), replace=False)])
        rate[t, here] = left[t] * weight[here] / weight[here].sum()
    is_open = (rate > 0).any(0)
    rate += 0.05 * depth / n_regions
    rho = rate / rate.sum(1, keepdims=True)

    kind = draw.permutation(np.arange(n_cells) % n_types)
    library = draw.lognormal(np.log(depth), 0.4, n_cells)
    counts = draw.poisson(library[:, None] * rho[kind])
    reads = 2 * counts - (draw.uniform(size=counts.shape) < edge_losses) * (counts > 0)

    types = [f"type{t}" for t in range(n_types)]
    names = [f"chr1:{1000 * j + 1}-{1000 * j + 500}" for j in range(n_regions)]
    what = np.where(is_open, "open", "closed").astype(object)
    what[quantitative] = "quantitative"
    return anndata.AnnData(
        X=sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {"cell_type": pd.Categorical([types[t] for t in kind], categories=types), "library": library},
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame({"kind": what}, index=names),
        varm={"rho": pd.DataFrame(rho.T, index=names, columns=types)},
        layers={"reads": sparse.csr_matrix(reads.astype(np.float32))},
    )


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1 or value != int(value):
            raise ValueError(f"{name} must be a whole number >= 1, not {value!r}")
