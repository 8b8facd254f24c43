"""PoissonVI: counts of fragments in regions of open chromatin come from a low-dimensional state.

    z[n]       ~ Normal(0, I)                                        (N, K)  state of cell n
    library[n] = total of fragments of cell n                        (N, 1)  taken as known
    rho[n]     = softmax(decoder(z[n], batch[n]) + factor)           (N, G)  expected shares of regions
    x[n, g]    ~ Poisson(library[n] rho[n, g])                       (N, G)  fragments seen

factor[g] is what region g has in all cells (how wide it is, how well it is cut and mapped): the decoder's last bias.
The guide is q(z | x) = Normal(m(log1p x), s(log1p x)), from one encoder for all cells. x are fragments, not reads: a
fragment gives two reads (`pyrosc.reads_to_fragments`).

References: Martens et al. 2024, Nature Methods 21:28 (PoissonVI); Ashuach et al. 2022, Cell Reports Methods 2:100182
(PeakVI: its sizes, and region factors).
"""

from __future__ import annotations

import math
from typing import Any

import pyro
from torch import nn

from ..cells import Cells
from ..dispersions import NoDispersion
from ..fragments import check_fragments
from ..libraries import GivenLibrary, ObservedLibrary
from ..likelihoods import PoissonLikelihood
from ..networks import Encoder
from ..priors import Prior
from ..program import Program, require_cells
from ..regions import RegionDecoder
from .scvi import guide

__all__ = ["guide", "model", "poissonvi"]


def model(cells: Cells, *, prior: Any, library: Any, dispersion: Any, decoder: Any, likelihood: Any) -> None:
    """Say how the fragments of these cells came about.

    Parts
    -----
    prior : cells -> distribution of a cell's state, event shape (K,)
    library : cells -> expected total of fragments (n, 1)
    dispersion : none for Poisson fragments
    decoder : state and covariates -> shares of regions, and a hidden layer
    likelihood : shares, dispersion, hidden layer, and totals as ``exposure=`` -> distribution of fragments

    Sites
    -----
    z : (n, K), real, plate "cells"
        State of a cell.
    library : (n, 1), positive, fragments per cell, plate "cells"
        Expected total of a cell; its observed total by default. With given size factors, those.
    rho : (n, G), sums to 1, plate "cells"
        Expected share of a cell's fragments that falls on each region. With given size factors a rate.
    x : (n, G), whole numbers, plate "cells", observed
        Fragments; drawn instead when ``cells.x`` is None.
    """
    theta = dispersion()
    with cells.plate():
        z = pyro.sample("z", prior(cells))
        total = library(cells)
        rho, hidden = decoder(z, cells)
        rho = pyro.deterministic("rho", rho, event_dim=1)
        # Shares and totals stay apart: their product would be another dense block.
        fragments = likelihood(rho, dispersion.at(theta, cells, hidden), hidden, exposure=total)
        pyro.sample("x", fragments, obs=cells.x)


def poissonvi(
    cells: Cells,
    *,
    n_latent: int | None = None,
    n_hidden: int | None = None,
    n_layers: int = 2,
    dropout: float = 0.1,
    seed: int = 0,
    **parts: nn.Module | None,
) -> Program:
    """PoissonVI with a standard normal prior, observed totals and Poisson fragments; any part can be replaced.

    Parameters
    ----------
    cells : of fragments, not of reads and not cut to 0 and 1
    n_latent : K; None for the square root of n_hidden, rounded down
    n_hidden : width of the hidden layers; None for the square root of the number of regions, rounded down
    n_layers : of encoder and decoder
    dropout : in the encoder only
    seed : of the starting weights
    **parts : ``prior=``, ``library=``, ``decoder=``, ``likelihood=``, ``encoder=``, ``dispersion=``
        ``likelihood=NBLikelihood(), dispersion=GeneDispersion()`` lets fragments scatter more;
        ``likelihood=BernoulliLikelihood()`` is for data that were cut to 0 and 1.

    Returns
    -------
    Program

    Raises
    ------
    ProgramError
        If a part is unknown, or parts do not fit together.
    ValueError
        If the counts are 0 and 1 only, or are not but the likelihood says so.

    Warns
    -----
    PyroscWarning
        If the counts look like reads.

    Notes
    -----
    Sizes, layers and dropout are the published ones. Activations are ReLU here, LeakyReLU there, and what differs in
    training is in ``fit``: a learning rate of 1e-2 that falls to zero, 1e-4 and constant there, 1,200 steps, up to 500
    epochs there (how they compare: benchmarks/results/atac.md). A step holds three dense blocks of the mini-batch
    beside the weights: counts, their logs, and shares, which is all that decoder and likelihood hold. Weights, two
    copies, gradients and two moments take 24 bytes a weight: 1,000 cells x 200,000 regions with these sizes, 179
    million weights, were fitted in 5.1 GB, 4.3 of them for weights.

    >>> cells = Cells.from_counts([[1, 0, 2, 1], [0, 3, 1, 0]])
    >>> program = poissonvi(cells, n_latent=2, n_hidden=8)
    >>> program.parts["likelihood"]
    PoissonLikelihood()
    """
    require_cells(cells)
    check_fragments(cells, parts.get("likelihood"))
    n_hidden = math.isqrt(cells.n_genes) if n_hidden is None else n_hidden
    if n_latent is None:
        n_latent = math.isqrt(n_hidden) if isinstance(n_hidden, int) and n_hidden > 0 else 1
    encoder = parts.get("encoder")
    n_latent = getattr(encoder, "sizes", {}).get("n_latent", n_latent) if encoder is not None else n_latent
    defaults: dict[str, Any] = dict(
        prior=Prior(pyro.distributions.Normal, 0.0, 1.0),
        library=ObservedLibrary() if cells.schema.size_factor is None else GivenLibrary(),
        dispersion=NoDispersion(),
        decoder=RegionDecoder(n_latent, n_hidden, n_layers),
        likelihood=PoissonLikelihood(),
        encoder=Encoder(n_latent, n_hidden, n_layers, dropout),
    )
    return Program(model, cells, guide, seed=seed, **(defaults | parts))
