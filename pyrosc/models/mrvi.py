"""MrVI: samples (donors, donors x conditions) change the expression of a cell, some kinds of cells more than others.

    effect_sd[m]        ~ HalfNormal(1)                        (M,)       how much samples differ in archetype m
    sample_effect[d, m] ~ Normal(0, effect_sd[m])              (D, M, K)  where sample d moves archetype m
    directions[k, g]    ~ Normal(0, 0.3)                       (K, G)     what a unit of effect k does to gene g
    u[n]          ~ Normal(0, I)                               (N, L)     state of cell n, free of its sample
    archetypes[n] = softmax(net(u[n]))                         (N, M)     its shares of the archetypes
    shift[n]      = sum_m archetypes[n, m] sample_effect[d(n), m]          (N, K)     where its sample moves it
    library[n]    = total count of cell n                      (N, 1)
    rho[n]        = softmax(decoder(u[n], batch[n]) + shift[n] directions) (N, G)     expected shares
    x[n, g]       ~ NegativeBinomial(library[n] rho[n, g], theta[g])       (N, G)     counts seen

d(n) is the sample of cell n; effects are taken about their mean over samples. z[n] = (u[n], shift[n]) is the state of
the cell in its sample, and what the cell would be in another sample is its u with that sample's effects. The guide is
q(u | x, d) = Normal(m(y), s(y)), for y[n] = log1p x[n] less what sample d(n) has more of in all its cells, and a
mean-field normal of effects and directions.

After Boyeau et al. 2022 (bioRxiv 2022.10.04.510898, MrVI), whose effects of samples come from an attention network, as
points, and are decoded by weights without a prior. Here the attention is a cell's shares of a few archetypes, and
effects and their directions are sites with a posterior, so that "no effect" can be concluded.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ..cells import Cells
from ..dispersions import GeneDispersion
from ..encoders import state_law
from ..libraries import GivenLibrary, ObservedLibrary
from ..likelihoods import NBLikelihood
from ..networks import Decoder
from ..priors import Prior
from ..program import Program, require_cells
from ..samples import Archetypes, Directions, SampleEffects, SampleEncoder, SampleNormal


def model(
    cells: Cells, *, effects: Any, directions: Any, prior: Any, archetypes: Any, library: Any, dispersion: Any,
    decoder: Any, likelihood: Any,
) -> None:  # fmt: skip
    """Say how the counts of these cells came about.

    Parts
    -----
    effects : effects of samples by archetype, and how far each cell is moved
    directions : what that does to each gene
    prior : cells -> distribution of a cell's state, event shape (L,)
    archetypes : state -> shares of the archetypes
    library, dispersion, decoder, likelihood : as in `models.scvi`

    Sites
    -----
    effect_sd : (M,), positive
        Sd of the effects of samples in an archetype.
    sample_effect : (D, M, K), real
        Effects of a sample on cells of an archetype.
    directions : (K, G), real
        Change of the log share of each gene by a unit of effect.
    u : (n, L), real, plate "cells"
        State of a cell, whatever its sample.
    archetypes : (n, M), sums to 1, plate "cells"
        Shares of the archetypes in a cell.
    z : (n, L + K), real, plate "cells"
        State of a cell in its sample: u, and where the sample moves it.
    library, rho, x : as in `models.scvi`
    """
    theta, effect, direction = dispersion(), effects(), directions()
    with cells.plate():
        u = pyro.sample("u", prior(cells))
        shares = pyro.deterministic("archetypes", archetypes(u), event_dim=1)
        shift = effects.at(effect, shares, cells)
        pyro.deterministic("z", torch.cat([u, shift], -1), event_dim=1)
        total = library(cells)
        rho, hidden = decoder(u, cells, directions.decoded(shift, direction))
        rho = pyro.deterministic("rho", rho, event_dim=1)
        counts = likelihood(total * rho, dispersion.at(theta, cells, hidden), hidden)
        pyro.sample("x", counts, obs=cells.x)


def guide(cells: Cells, *, posterior: Any, encoder: Any) -> None:
    """Guess the effects of samples, and each cell's state from its counts.

    Parts
    -----
    posterior : draws effects and directions
    encoder : cells -> law of a cell's state, event shape (L,); or its mean and standard deviation, each (n, L)
    """
    posterior()
    with cells.plate():
        pyro.sample("u", state_law(encoder, cells))


def mrvi(
    cells: Cells,
    *,
    n_latent: int = 10,
    n_hidden: int = 128,
    n_layers: int = 1,
    dropout: float = 0.1,
    seed: int = 0,
    **parts: nn.Module | None,
) -> Program:
    """MrVI with six archetypes, a standard normal prior, observed library and NB counts; any part can be replaced.

    Use it to ask which samples are alike, in which cells, and what covariates of samples do. `shifted_samples` is the
    story with one effect a sample.

    Parameters
    ----------
    cells : with ``sample=``, the unit that is compared: donor, or donor x condition; two samples or more
        A nuisance that crosses samples goes to ``batch=``.
    n_latent : L, width of the state u
    n_hidden, n_layers, dropout : as `scvi`
    seed : of the starting weights
    **parts : ``effects=SampleEffects(6, 20)``, ``directions=``, ``archetypes=``, ``posterior=``, and those of
        `scvi`; ``prior=`` is that of u: ``prior=MixturePrior(20)`` expects groups of cells

    Returns
    -------
    Program

    Raises
    ------
    ProgramError
        If there are not two samples, a part is unknown, or parts do not fit together.

    >>> cells = Cells.from_counts([[1, 0, 2], [0, 3, 1]] * 2, sample=["a", "a", "b", "b"])
    >>> mrvi(cells, n_latent=2, effects=SampleEffects(3)).parts["effects"]
    SampleEffects(n_archetypes=3, n_effect=20, scale=1.0)
    """
    require_cells(cells)
    encoder = parts.get("encoder")
    n_latent = getattr(encoder, "sizes", {}).get("n_latent", n_latent) if encoder is not None else n_latent
    defaults: dict[str, Any] = dict(
        effects=SampleEffects(),
        directions=Directions(),
        prior=Prior(dist.Normal, 0.0, 1.0),
        archetypes=Archetypes(),
        library=ObservedLibrary() if cells.schema.size_factor is None else GivenLibrary(),
        dispersion=GeneDispersion(),
        decoder=Decoder(n_latent, n_hidden, n_layers),
        likelihood=NBLikelihood(),
        posterior=SampleNormal(),
        encoder=SampleEncoder(n_latent, n_hidden, n_layers, dropout),
    )
    return Program(model, cells, guide, seed=seed, **(defaults | parts))
