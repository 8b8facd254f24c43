"""scVI: a cell's counts come from a low-dimensional state, decoded to shares of genes.

    z[n]       ~ Normal(0, I)                                   (N, K)  state of cell n
    library[n] = total count of cell n                          (N, 1)  taken as known
    rho[n]     = softmax(decoder(z[n], batch[n]))               (N, G)  expected shares
    x[n, g]    ~ NegativeBinomial(library[n] rho[n, g], theta[g])  (N, G)  counts seen

theta, the inverse dispersion, is one number a gene: variance mean + mean^2 / theta. The
guide is q(z | x) = Normal(m(log1p x), s(log1p x)), from one encoder for all cells.

References: Lopez et al. 2018, Nature Methods 15:1053 (the model, with zero inflation and
a latent library as parts); Svensson 2020, Nature Biotechnology 38:147 (why UMI counts need
no zero inflation).
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
from torch import nn

from ..cells import Cells
from ..dispersions import GeneDispersion
from ..encoders import state_law
from ..libraries import GivenLibrary, ObservedLibrary
from ..likelihoods import NBLikelihood
from ..networks import Decoder, Encoder
from ..priors import Prior
from ..program import Program, require_cells


def model(cells: Cells, *, prior: Any, library: Any, dispersion: Any, decoder: Any, likelihood: Any) -> None:
    """Say how the counts of these cells came about.

    Parts
    -----
    prior : cells -> distribution of a cell's state, event shape (K,)
    library : cells -> expected total counts (n, 1)
    dispersion : inverse dispersion, by gene or finer
    decoder : state and covariates -> shares of genes, and a hidden layer
    likelihood : mean, dispersion, hidden layer -> distribution of counts

    Sites
    -----
    z : (n, K), real, plate "cells"
        State of a cell.
    library : (n, 1), positive, counts per cell, plate "cells"
        Expected total of a cell; its observed total by default. With given size factors, those.
    rho : (n, G), sums to 1, plate "cells"
        Expected share of a cell's counts that falls on each gene. With given size factors
        a rate: expected counts per unit of size factor.
    x : (n, G), whole numbers, plate "cells", observed
        Counts; drawn instead when ``cells.x`` is None.
    """
    theta = dispersion()
    with cells.plate():
        z = pyro.sample("z", prior(cells))
        total = library(cells)
        rho, hidden = decoder(z, cells)
        rho = pyro.deterministic("rho", rho, event_dim=1)
        counts = likelihood(total * rho, dispersion.at(theta, cells, hidden), hidden)
        pyro.sample("x", counts, obs=cells.x)


def guide(cells: Cells, *, encoder: Any) -> None:
    """Guess each cell's state from its counts.

    Parts
    -----
    encoder : cells -> law of a cell's state, event shape (K,); or its mean and standard deviation, each (n, K)
    """
    with cells.plate():
        pyro.sample("z", state_law(encoder, cells))


def scvi(
    cells: Cells,
    *,
    n_latent: int = 10,
    n_hidden: int = 128,
    n_layers: int = 1,
    dropout: float = 0.1,
    seed: int = 0,
    **parts: nn.Module | None,
) -> Program:
    """scVI with a standard normal prior, observed library and NB counts; any part can be replaced.

    Parameters
    ----------
    n_latent : K, width of the state
    n_hidden, n_layers : of encoder and decoder
    dropout : in the encoder only
    seed : of the starting weights
    **parts : ``prior=``, ``library=``, ``dispersion=``, ``decoder=``, ``likelihood=``, ``encoder=``
        ``dispersion=None`` for a likelihood without one.

    Returns
    -------
    Program

    Raises
    ------
    ProgramError
        If a part is unknown, or parts do not fit together.

    >>> cells = Cells.from_counts([[1, 0, 2], [0, 3, 1]])
    >>> program = scvi(cells, n_latent=2, prior=Prior(dist.Laplace, 0.0, 1.0))
    >>> program.parts["prior"]
    Prior(Laplace, 0, 1, size=2)
    """
    require_cells(cells)
    encoder = parts.get("encoder")
    n_latent = getattr(encoder, "sizes", {}).get("n_latent", n_latent) if encoder is not None else n_latent
    defaults: dict[str, Any] = dict(
        prior=Prior(dist.Normal, 0.0, 1.0),
        library=ObservedLibrary() if cells.schema.size_factor is None else GivenLibrary(),
        dispersion=GeneDispersion(),
        decoder=Decoder(n_latent, n_hidden, n_layers),
        likelihood=NBLikelihood(),
        encoder=Encoder(n_latent, n_hidden, n_layers, dropout),
    )
    return Program(model, cells, guide, seed=seed, **(defaults | parts))
