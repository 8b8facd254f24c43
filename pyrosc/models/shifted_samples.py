"""Shifted samples: every cell of a sample is moved by the same effect, a plain hierarchy.

    effect_sd        ~ HalfNormal(1)                                (1,)       how much samples differ
    sample_effect[d] ~ Normal(0, effect_sd)                         (D, 1, K)  effect of sample d
    u[n]             ~ Normal(0, I)                                 (N, K)     state of cell n within its sample
    z[n]             = u[n] + sample_effect[d(n)]                   (N, K)     state
    library, rho, x  as in `models.scvi`

so that z[n] given the effects is Normal(sample_effect[d(n)], I). Given the states z, counts say nothing more of the
effects: an effect is the mean state of the sample's cells, drawn towards 0. It therefore holds *composition* as much as
state: a donor with more B cells has an effect towards B cells though no cell of it differs. For what differs within
cells of a kind use `mrvi`.

The guide draws the effects first and then u about what the encoder reads of the counts, less the effect:
q(u | x, effect) = Normal(m(log1p x) - sample_effect[d], s(log1p x)).
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
from torch import nn

from ..cells import Cells
from ..dispersions import GeneDispersion
from ..errors import ProgramError
from ..libraries import GivenLibrary, ObservedLibrary
from ..likelihoods import NBLikelihood
from ..networks import Decoder, Encoder
from ..priors import Prior
from ..program import Program, require_cells
from ..samples import SampleEffects, SampleNormal


def model(
    cells: Cells, *, effects: Any, prior: Any, library: Any, dispersion: Any, decoder: Any, likelihood: Any
) -> None:
    """Say how the counts of these cells came about.

    Parts
    -----
    effects : effects of samples, of one archetype
    prior : cells -> distribution of a cell's state within its sample, event shape (K,)
    library, dispersion, decoder, likelihood : as in `models.scvi`

    Sites
    -----
    effect_sd : (1,), positive
        Sd of the effects, in units of the state.
    sample_effect : (D, 1, K), real
        Effect of a sample.
    u : (n, K), real, plate "cells"
        State of a cell within its sample.
    z : (n, K), real, plate "cells"
        State of a cell.
    library, rho, x : as in `models.scvi`
    """
    theta, effect = dispersion(), effects()
    with cells.plate():
        u = pyro.sample("u", prior(cells))
        z = pyro.deterministic("z", u + effects.at(effect, None, cells), event_dim=1)
        total = library(cells)
        rho, hidden = decoder(z, cells)
        rho = pyro.deterministic("rho", rho, event_dim=1)
        counts = likelihood(total * rho, dispersion.at(theta, cells, hidden), hidden)
        pyro.sample("x", counts, obs=cells.x)


def guide(cells: Cells, *, posterior: Any, effects: Any, encoder: Any) -> None:
    """Guess the effects of samples, and each cell's state from its counts, less the effect.

    Parts
    -----
    posterior : draws the effects
    effects : the model's, for the shift of each cell
    encoder : cells -> mean and standard deviation of a cell's state, each (n, K)
    """
    effect = posterior()
    with cells.plate():
        loc, scale = encoder(cells)
        pyro.sample("u", dist.Normal(loc - effects.at(effect, None, cells), scale).to_event(1))


def shifted_samples(
    cells: Cells,
    *,
    n_latent: int = 10,
    n_hidden: int = 128,
    n_layers: int = 1,
    dropout: float = 0.1,
    seed: int = 0,
    **parts: nn.Module | None,
) -> Program:
    """One effect a sample, a standard normal prior, observed library and NB counts; any part can be replaced.

    Parameters
    ----------
    cells : with ``sample=``; two samples or more
    n_latent, n_hidden, n_layers, dropout : as `scvi`
    seed : of the starting weights
    **parts : ``effects=SampleEffects(1, None, scale)``, ``posterior=``, and those of `scvi`; ``prior=`` is that of u

    Returns
    -------
    Program

    Raises
    ------
    ProgramError
        If there are not two samples, a part is unknown, or parts do not fit together.

    >>> cells = Cells.from_counts([[1, 0, 2], [0, 3, 1]] * 2, sample=["a", "a", "b", "b"])
    >>> shifted_samples(cells, n_latent=2).parts["effects"]
    SampleEffects(n_archetypes=1, n_effect=None, scale=1.0, centred=False)
    """
    require_cells(cells)
    encoder = parts.get("encoder")
    if hasattr(encoder, "law"):
        raise ProgramError(
            f'part "encoder": the guide of shifted_samples takes a mean and sd off which effects are subtracted, and '
            f"{type(encoder).__name__} has a law of its own: pass Encoder(...), or take mrvi"
        )
    n_latent = getattr(encoder, "sizes", {}).get("n_latent", n_latent) if encoder is not None else n_latent
    defaults: dict[str, Any] = dict(
        effects=SampleEffects(1, None, centred=False),
        prior=Prior(dist.Normal, 0.0, 1.0),
        library=ObservedLibrary() if cells.schema.size_factor is None else GivenLibrary(),
        dispersion=GeneDispersion(),
        decoder=Decoder(n_latent, n_hidden, n_layers),
        likelihood=NBLikelihood(),
        posterior=SampleNormal(),
        encoder=Encoder(n_latent, n_hidden, n_layers, dropout),
    )
    program = Program(model, cells, guide, seed=seed, **(defaults | parts))
    if getattr(program.parts["effects"], "sizes", {}).get("n_archetypes") != 1:
        raise ProgramError("shifted_samples moves all cells of a sample alike: give it effects=SampleEffects(1, None)")
    return program
