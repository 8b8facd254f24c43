"""Loadings: how much each latent factor moves each gene, with a posterior. Each makes the global site ``loadings``.

A story with a linear decoder has log shares z W' + offsets: row g of W (G, K) says by how much a unit of each factor
moves the log share of gene g. Called as ``loadings()``, before the plate.

    NormalLoadings        W_gk ~ Normal(0, sd)                          all genes move a little
    HorseshoeLoadings     W_gk ~ Normal(0, scale of gene g in k)        few genes move, the others not at all
    NonNegativeLoadings   log W_gk ~ Normal(log median, sd)             factors only raise genes

z ~ N(0, I) and Normal loadings look the same from every angle: (z R, W R) has the density of (z, W) for every rotation
R, so that single factors mean nothing and only the space they span does. The other two have an angle of their own.
Order and signs of factors stay open (of `NonNegativeLoadings` the order alone); `Fit.loadings` fixes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .cells import Cells
from .dispersions import moments
from .errors import ProgramError
from .parts import Part, positive
from .schema import Schema


class _Loadings(Part):
    """What loadings have in common: their shape (G, K), from the genes and the width of z."""

    zero: Tensor  # (G, K)

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent",)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        if "n_latent" not in sizes:
            raise ProgramError(
                f"{type(self).__name__} does not know how many factors there are: hand the story an encoder"
            )
        self.register_buffer("zero", torch.zeros(schema.n_genes, sizes["n_latent"]), persistent=False)


class NormalLoadings(_Loadings):
    """W_gk ~ Normal(0, sd), independent.

    Parameters
    ----------
    sd : positive, in natural logs of the share per unit of z; at 1 a factor may well move a gene threefold

    Notes
    -----
    Every rotation of factors is as good as another, and the posterior that is found is at one of them: the one that
    training started at (`principal_loadings`), more or less.
    """

    def __init__(self, sd: float = 1.0) -> None:
        super().__init__(sd=positive("sd", sd))

    def forward(self) -> Tensor:
        return pyro.sample("loadings", dist.Normal(self.zero, self.arguments["sd"]).to_event(2))


class NonNegativeLoadings(_Loadings):
    """log W_gk ~ Normal(log median, sd), independent: a factor raises genes, most of them hardly, and lowers none.

    Shares sum to 1, so the other genes fall where some rise. z keeps both signs.

    Parameters
    ----------
    median : positive, in natural logs of the share per unit of z; by default a loading is in 0.003 to 1 with 95 %
    sd : positive, of the logarithm of a loading

    Notes
    -----
    Not an exponential, for which the log-normal guide of a loading near 0 has no sd to end at.
    """

    def __init__(self, median: float = 0.05, sd: float = 1.5) -> None:
        super().__init__(median=positive("median", median), sd=positive("sd", sd))

    def forward(self) -> Tensor:
        a = self.arguments
        law = dist.LogNormal(self.zero + math.log(a["median"]), torch.full_like(self.zero, a["sd"]))
        return pyro.sample("loadings", law.to_event(2))


class HorseshoeLoadings(_Loadings):
    """Few genes move, the others hardly: the regularised horseshoe, with a scale of its own for each factor.

        W_gk          ~ Normal(0, s_gk),  1 / s_gk^2 = 1 / (t_k l_gk)^2 + 1 / slab^2
        gene_scale    ~ HalfCauchy(1)                       l  (G, K)  which genes a factor moves
        factor_scale  ~ HalfCauchy(n / (G - n) slab)        t  (K,)    how far the others are from 0; all, if unused

    Parameters
    ----------
    n_expected : n, genes that a factor is expected to move, at least 1 and fewer than all; None takes 5 %
    slab : positive, in natural logs of the share per unit of z: sd of a loading that nothing shrinks

    Notes
    -----
    After Piironen and Vehtari 2017 (Electronic Journal of Statistics 11:5018), but for two things. Their scale of the
    half-Cauchy is n / (G - n) times the standard error of a coefficient, here times ``slab``, which is larger: its
    tails are such that some thousand loadings overrule either, and a tenth of it made little difference on simulated
    tissue. And their slab may have a prior: here it is a number, as one for each factor shrank until it stood for all
    loadings alike, and the prior was a normal.
    W is drawn given its scales and guided by a normal of its own. Written as a standard normal times its scale, which
    is usual, fewer factors were found (4 against 8 on simulated tissue, both without the start below).
    """

    def __init__(self, n_expected: int | None = None, slab: float = 1.0) -> None:
        if n_expected is not None and (isinstance(n_expected, bool) or not hasattr(n_expected, "__index__")):
            raise ValueError(f"n_expected is a number of genes, such as 50, not {n_expected!r}")
        if n_expected is not None and n_expected < 1:
            raise ValueError(f"n_expected must be at least 1 gene, not {n_expected}")
        super().__init__(n_expected=n_expected, slab=positive("slab", slab))

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        super().build(schema, sizes, parts)
        n = self.arguments["n_expected"]
        if n is not None and n >= schema.n_genes:
            raise ProgramError(
                f"n_expected={n:,} genes are expected to move with a factor, of {schema.n_genes:,}: a sparse prior "
                "is for fewer. Give a smaller number, or loadings=NormalLoadings()"
            )
        n = max(0.05 * schema.n_genes, 1.0) if n is None else n
        # Of one or two genes nearly all are expected to move.
        self.spread = float(n / max(schema.n_genes - n, 0.1)) * self.arguments["slab"]

    def forward(self) -> Tensor:
        ones = torch.ones_like(self.zero)
        gene = pyro.sample("gene_scale", dist.HalfCauchy(ones).to_event(2))
        factor = pyro.sample("factor_scale", dist.HalfCauchy(self.spread * ones[0]).to_event(1))
        # Bounds that single draws of half-Cauchy scales may pass, and squares in float32 must not.
        free = (gene * factor.unsqueeze(-2)).clamp(1e-8, 1e8)
        scale = (free.pow(-2) + self.arguments["slab"] ** -2).rsqrt()
        return pyro.sample("loadings", dist.Normal(torch.zeros_like(scale), scale).to_event(2))


# ---- where loadings start -------------------------------------------------------------------

_START_NUMBERS = 8_000_000  # counts that a start looks at, at most: cells x genes
_START_CELLS = 4000


def principal_loadings(cells: Cells, n_latent: int) -> Tensor:
    """(G, K) loadings to start from: principal components of Pearson residuals, turned by varimax.

    Residuals are of counts around the profile of the cell's batch, scaled by depth, with the scatter that moments give;
    of up to 4,000 cells drawn at random. Components are taken back to log shares, genes of few counts drawn to 0.
    Varimax (Kaiser 1958, Psychometrika 23:187) is a rotation: under N(0, sd) loadings it costs nothing, and under a
    sparse prior it is nearer to where the posterior is.
    """
    n = min(len(cells), _START_CELLS, max(_START_NUMBERS // cells.n_genes, 2))
    some = cells.rows(torch.randperm(len(cells))[:n].to(cells.device), whole=True)
    x = some.x.double()  # type: ignore[union-attr]
    depth = x.sum(-1, keepdim=True)
    mean = torch.zeros_like(x)
    for b in some.batch.unique():
        own = some.batch == b
        mean[own] = depth[own] * (x[own].sum(0) + 0.1) / depth[own].sum().clamp(min=1)
    spread = mean + mean**2 / moments(cells).exp()
    _, size, right = torch.linalg.svd((x - mean) / spread.sqrt(), full_matrices=False)
    k = min(n_latent, len(size))
    weight = (mean**2 / spread).mean(0)  # information on the log share of a gene in a cell
    found = x.new_zeros(cells.n_genes, n_latent)
    found[:, :k] = right[:k].T * size[:k] / n**0.5 * (weight.sqrt() / (weight + 0.05)).unsqueeze(-1)
    return varimax(found).float()


def varimax(loadings: Tensor, n_iterations: int = 1000) -> Tensor:
    """Loadings (G, K) turned so that the variance of their squares over genes is largest, by alternating SVDs."""
    turn = torch.eye(loadings.shape[1], dtype=loadings.dtype, device=loadings.device)
    before = 0.0
    for _ in range(n_iterations):
        turned = loadings @ turn
        target = loadings.T @ (turned**3 - turned * turned.square().mean(0))
        one, size, other = torch.linalg.svd(target)
        turn = one @ other
        if float(size.sum()) <= before * (1 + 1e-9):
            break
        before = float(size.sum())
    return loadings @ turn
