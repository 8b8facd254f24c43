"""Dispersions: how much counts scatter beyond Poisson noise.

A dispersion is asked twice: ``dispersion()`` before the plate, where a sampled one makes
its global site, and ``dispersion.at(value, cells, hidden)`` inside, for the cells at hand.
The variance of a count is mean + mean^2 / dispersion.

    GeneDispersion    (G,)     one number a gene
    BatchDispersion   (B, G)   one a gene and batch
    LabelDispersion   (C, G)   one a gene and label
    CellDispersion    (n, G)   one a gene and cell, from the decoder's hidden layer
    NoDispersion      none     for Poisson counts

The first three are point estimates, or with ``prior=`` a sampled site ``dispersion``; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from torch import Tensor, nn

from .cells import Cells
from .errors import ProgramError
from .parts import Part
from .priors import Prior
from .schema import Schema


def moments(cells: Cells) -> Tensor:
    """(G,) log dispersion by moments around one profile scaled by depth, within log 0.1 and log 100.

    The scatter holds what differences between cells add, so it is too low where cells differ.
    """
    sums = cells.gene_sums()
    depth = cells.depth.double()
    share = sums.counts / depth.sum()
    # sum (x - l m)^2 = sum (l m) + sum (l m)^2 / dispersion under one profile m
    scatter = sums.squares - 2 * share * sums.by_depth + share**2 * (depth**2).sum()
    excess = scatter - share * depth.sum()
    moment = share**2 * (depth**2).sum() / excess.clamp(min=1e-12)
    moment = torch.where(excess > 0, moment, torch.full_like(moment, torch.inf)).clamp(0.1, 100.0)
    return torch.where(sums.counts > 0, moment.log(), torch.zeros_like(moment))


class GeneDispersion(Part):
    """One number a gene, (G,).

    Parameters
    ----------
    prior : distribution of positive numbers, one a gene; None for an estimate without a prior
        ``Prior(dist.LogNormal, 1.0, 1.0)``, `InverseSqrtPrior`, `TrendPrior`, or any part that answers
        a distribution over (G,). The dispersion is then the global site ``dispersion``.

    Notes
    -----
    Before the first fit it is set by moments around one profile scaled by depth. Those
    hold what the cells' differences add, so it starts too low and rises in training.
    """

    prior: Any

    def __init__(self, prior: nn.Module | None = None) -> None:
        if prior is not None and not isinstance(prior, nn.Module):
            raise ValueError(f"prior must be a part, such as Prior(dist.LogNormal, 1.0, 1.0), not {prior!r}")
        super().__init__(prior=prior)
        self.prior = prior

    def _levels(self, schema: Schema) -> int | None:
        """How many rows there are; None for one vector."""
        return None

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        self.n_levels, n_genes = self._levels(schema), schema.n_genes
        shape = (n_genes,) if self.n_levels is None else (self.n_levels, n_genes)
        if self.prior is None:
            self.log_dispersion = nn.Parameter(torch.zeros(shape))
            return
        if isinstance(self.prior, Prior) and self.prior.size is None and self.prior.n_given == 1:
            self.prior.take(n_genes)
        elif hasattr(self.prior, "build"):
            self.prior.build(schema, sizes, parts)
        made = self.prior()
        if tuple(made.event_shape) != (n_genes,):
            raise ProgramError(
                f'site "dispersion": its prior draws {tuple(made.event_shape)} numbers, but there are {n_genes:,} genes'
            )
        if not bool((made.sample() > 0).all()):
            raise ProgramError(
                'site "dispersion" must be positive: give a prior such as Prior(dist.LogNormal, 1.0, 1.0)'
            )

    def start(self, cells: Cells) -> None:
        if self.prior is None:
            with torch.no_grad():
                self.log_dispersion.copy_(moments(cells).expand_as(self.log_dispersion))
        elif hasattr(self.prior, "start"):
            self.prior.start(cells)

    def forward(self) -> Tensor:
        if self.prior is None:
            return self.log_dispersion.exp()
        law = self.prior()
        return pyro.sample("dispersion", law if self.n_levels is None else law.expand([self.n_levels]).to_event(1))

    def at(self, value: Tensor, cells: Cells, hidden: Tensor | None = None) -> Tensor:
        """The dispersion of these cells: the same for all, (G,)."""
        return value


def _of_level(value: Tensor, codes: Tensor) -> Tensor:
    """Rows (..., n, G) of levels (..., L, G) by code; -1 takes the geometric mean of all levels.

    A draw in front of the cell plate comes as (S, 1, L, G), and (S, n, G) is wanted.
    """
    if value.dim() > 2:
        value = value.squeeze(-3)
    if bool((codes < 0).any()):
        value = torch.cat([value, value.log().mean(-2, keepdim=True).exp()], -2)
        codes = torch.where(codes < 0, value.shape[-2] - 1, codes)
    return value.index_select(-2, codes)


class BatchDispersion(GeneDispersion):
    """One number a gene and batch, (B, G). Parameters as `GeneDispersion`; the prior is the same for every batch."""

    def _levels(self, schema: Schema) -> int:
        if schema.batch is None:
            raise ProgramError("BatchDispersion needs a batch column: Cells.from_anndata(adata, batch=...)")
        return schema.n_batches

    def at(self, value: Tensor, cells: Cells, hidden: Tensor | None = None) -> Tensor:
        """(n, G), by the batch of each cell."""
        return _of_level(value, cells.batch)


class LabelDispersion(GeneDispersion):
    """One number a gene and label, (C, G). Parameters as `GeneDispersion`.

    Cells without a label take the geometric mean over labels.
    """

    def _levels(self, schema: Schema) -> int:
        if schema.label is None:
            raise ProgramError("LabelDispersion needs a label column: Cells.from_anndata(adata, label=...)")
        return schema.n_labels

    def at(self, value: Tensor, cells: Cells, hidden: Tensor | None = None) -> Tensor:
        """(n, G), by the label of each cell."""
        return _of_level(value, cells.label)


class CellDispersion(Part):
    """One number a gene and cell, (n, G): exp of a linear map of the decoder's hidden layer.

    The variant of the first deep count models (Eraslan et al. 2019, Nature Communications 10:390), with G times as
    many weights as `GeneDispersion`. It has no prior: a sampled number for every count could not be learned.
    """

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_hidden",)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        if "n_hidden" not in sizes:
            raise ProgramError(
                "CellDispersion is read from a decoder's hidden layer, and this story's has none: use GeneDispersion()"
            )
        self.head = nn.Linear(sizes["n_hidden"], schema.n_genes)

    def start(self, cells: Cells) -> None:
        with torch.no_grad():
            self.head.bias.copy_(moments(cells))

    def forward(self) -> None:
        return None

    def at(self, value: None, cells: Cells, hidden: Tensor | None = None) -> Tensor:
        """(..., n, G), from the hidden layer."""
        if hidden is None:
            raise ProgramError("CellDispersion needs the decoder's hidden layer: dispersion.at(value, cells, hidden)")
        return self.head(hidden).exp()


class NoDispersion(Part):
    """None, for likelihoods without one (Poisson)."""

    def forward(self) -> None:
        return None

    def at(self, value: Any, cells: Cells, hidden: Tensor | None = None) -> None:
        return None


# ---- priors of dispersions ------------------------------------------------------------------


class InverseSqrtPrior(Part):
    """1 / sqrt(dispersion) ~ Exponential(rate), one a gene: departure from Poisson noise is penalised.

    1 / sqrt(dispersion) is the coefficient of variation of the rate beyond Poisson noise; its prior mean is
    1 / rate. The density falls to nothing at dispersion 0, so that rare genes do not run away.

    Parameters
    ----------
    rate : positive; 3 expects coefficients of variation around a third
    """

    rate: Tensor  # (G,)

    def __init__(self, rate: float = 3.0) -> None:
        if not rate > 0:
            raise ValueError(f"rate must be positive, not {rate!r}")
        super().__init__(rate=rate)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        self.register_buffer("rate", torch.full((schema.n_genes,), float(self.arguments["rate"])))

    def forward(self, cells: Cells | None = None) -> Any:
        power = transforms.PowerTransform(torch.full_like(self.rate, -2.0))
        return dist.TransformedDistribution(dist.Exponential(self.rate), [power]).to_event(1)


class TrendPrior(Part):
    """log dispersion_g ~ Normal(a + b log mean_g, sd): genes of like expression scatter alike.

    mean_g is the gene's mean count in the training cells. a and b start at a least-squares line through moment
    estimates and are learned with the rest (empirical Bayes).

    Parameters
    ----------
    sd : of log dispersion around the trend; None starts at the scatter of moment estimates and learns it
    """

    log_mean: Tensor  # (G,)

    def __init__(self, sd: float | None = None) -> None:
        if sd is not None and not sd > 0:
            raise ValueError(f"sd must be positive, not {sd!r}")
        super().__init__(sd=sd)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        sd = self.arguments["sd"]
        self.intercept, self.slope = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        log_sd = torch.tensor(1.0 if sd is None else float(sd)).log()
        self.log_sd = nn.Parameter(log_sd, requires_grad=sd is None)
        self.register_buffer("log_mean", torch.zeros(schema.n_genes))

    def start(self, cells: Cells) -> None:
        sums = cells.gene_sums()
        log_mean = ((sums.counts + 0.1) / len(cells)).log()
        found = moments(cells)
        seen = sums.counts > 0
        apart = log_mean[seen] - log_mean[seen].mean()
        slope = (apart * found[seen]).sum() / (apart**2).sum().clamp(min=1e-9)
        intercept = found[seen].mean() - slope * log_mean[seen].mean()
        rest = found[seen] - intercept - slope * log_mean[seen]
        with torch.no_grad():
            self.log_mean.copy_(log_mean)
            self.slope.copy_(slope)
            self.intercept.copy_(intercept)
            if self.arguments["sd"] is None:
                self.log_sd.copy_(rest.std(correction=0).clamp(0.1, 3.0).log())

    def forward(self, cells: Cells | None = None) -> Any:
        trend = self.intercept + self.slope * self.log_mean
        return dist.LogNormal(trend, self.log_sd.exp()).to_event(1)
