"""Linear scVI: log shares of genes are linear in a cell's state, so that each latent factor is a list of genes.

    W[g, k]    ~ prior of loadings                                 (G, K)  what a unit of factor k does to gene g
    z[n]       ~ Normal(0, I)                                      (N, K)  state of cell n
    library[n] = total count of cell n                             (N, 1)  taken as known
    rho[n]     = softmax(W z[n] + V c[n] + b)                      (N, G)  expected shares
    x[n, g]    ~ NegativeBinomial(library[n] rho[n, g], theta[g])  (N, G)  counts seen

c are batch and other columns; V, b and theta are estimates without a prior. The guide is q(z | x) q(W): the encoder of
`models.scvi`, and what the Program completes for the global sites, a normal (log-normal) for each number.

References: Svensson et al. 2020, Bioinformatics 36:3418 (LDVAE, with W an estimate); Piironen and Vehtari 2017,
Electronic Journal of Statistics 11:5018 (the regularised horseshoe).
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
from torch import nn

from ..cells import Cells
from ..dispersions import GeneDispersion
from ..libraries import GivenLibrary, ObservedLibrary
from ..likelihoods import NBLikelihood
from ..loadings import HorseshoeLoadings
from ..networks import Encoder, LoadingsDecoder
from ..priors import Prior
from ..program import Program, require_cells
from .scvi import guide

_SURE = 0.14  # sd of a state given its counts, at the start


def model(
    cells: Cells, *, prior: Any, loadings: Any, library: Any, dispersion: Any, decoder: Any, likelihood: Any
) -> None:
    """Say how the counts of these cells came about.

    Parts
    -----
    loadings : -> what each factor does to each gene, (G, K), one for all cells
    decoder : state, covariates and loadings -> shares of genes
    prior, library, dispersion, likelihood : as in `models.scvi`

    Sites
    -----
    loadings : (G, K), real
        Change of the log share of a gene per unit of each factor, up to a constant for each factor.
    z, library, rho, x : as in `models.scvi`
    """
    theta = dispersion()
    weights = loadings()
    with cells.plate():
        z = pyro.sample("z", prior(cells))
        total = library(cells)
        rho = pyro.deterministic("rho", decoder(z, cells, weights), event_dim=1)
        counts = likelihood(total * rho, dispersion.at(theta, cells))
        pyro.sample("x", counts, obs=cells.x)


def linear_scvi(
    cells: Cells,
    *,
    n_latent: int = 10,
    n_hidden: int = 128,
    n_layers: int = 1,
    dropout: float = 0.1,
    seed: int = 0,
    **parts: nn.Module | None,
) -> Program:
    """Linear scVI with a sparse prior on loadings and the other parts of `scvi`; any part can be replaced.

    Parameters
    ----------
    n_latent : K, number of factors; those that are not needed end near 0
    n_hidden, n_layers, dropout : of the encoder
    seed : of the starting weights
    **parts : ``loadings=`` and those of `scvi` (``decoder=LoadingsDecoder()``); a likelihood or dispersion that reads
        a hidden layer has none here

    Returns
    -------
    Program

    Raises
    ------
    ProgramError
        If a part is unknown, or parts do not fit together.

    Notes
    -----
    Training starts from principal components turned by varimax (`loadings.principal_loadings`), and from an encoder
    that is sure of its states: with one as vague as the prior, factors were switched off before they had been learned
    (of 8 that are in simulated tissue 3 were left; benchmarks/programmes.py).

    >>> cells = Cells.from_counts([[1, 0, 2], [0, 3, 1]])
    >>> linear_scvi(cells, n_latent=2, loadings=HorseshoeLoadings(n_expected=1)).completion.names
    ['gene_scale', 'factor_scale', 'loadings']
    """
    require_cells(cells)
    encoder = parts.get("encoder")
    n_latent = getattr(encoder, "sizes", {}).get("n_latent", n_latent) if encoder is not None else n_latent
    defaults: dict[str, Any] = dict(
        prior=Prior(dist.Normal, 0.0, 1.0),
        loadings=HorseshoeLoadings(),
        library=ObservedLibrary() if cells.schema.size_factor is None else GivenLibrary(),
        dispersion=GeneDispersion(),
        decoder=LoadingsDecoder(),
        likelihood=NBLikelihood(),
        encoder=Encoder(n_latent, n_hidden, n_layers, dropout),
    )
    program = Program(model, cells, guide, seed=seed, **(defaults | parts))
    if encoder is None:
        own: Any = program.parts["encoder"]
        nn.init.constant_(own.log_variance.bias, 2 * math.log(_SURE))
    return program
