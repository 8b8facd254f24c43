"""scANVI: a cell's state comes from its type and from how it varies within the type; some types are known.

    y[n]       ~ Categorical(weights), or given its label          (N,)    type of cell n
    u[n]       ~ Normal(0, I)                                      (N, K)  variation within the type
    z[n]       ~ Normal(f(u[n], y[n]), s(u[n], y[n]))              (N, K)  state
    library[n] = total count of cell n                             (N, 1)
    rho[n]     = softmax(decoder(z[n], batch[n]))                  (N, G)  expected shares
    x[n, g]    ~ NegativeBinomial(library[n] rho[n, g], theta[g])  (N, G)  counts seen

The guide is q(z | x) q(y | z) q(u | z, y). Counts depend on the type through z alone, so that the sum over types,

    ELBO = E_q(z|x)[ log p(x | z) - log q(z | x)
                     + sum_y q(y | z) { E_q(u|z,y) log p(z | u, y) - KL(q(u | z, y), p(u)) + log p(y) - log q(y | z) } ]

is exact and meets small networks only. A label that is known is what the prior of y says, log p(y) = 0 at it, and
q(y | z) has no choice: labelled and unlabelled cells are one story. What is maximised besides is `Classifier`'s.

References: Xu, Lopez, Mehlman et al. 2021, Molecular Systems Biology 17:e9620; Kingma et al. 2014, NeurIPS 27 (M1+M2).
There p(y) of labelled cells is in the bound too, a constant less per cell.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
from torch import nn

from ..cells import Cells
from ..dispersions import GeneDispersion
from ..encoders import state_law
from ..errors import ProgramError
from ..labels import Classifier, LabelPrior, TypeNormal
from ..libraries import GivenLibrary, ObservedLibrary
from ..likelihoods import NBLikelihood
from ..networks import Decoder, Encoder
from ..priors import Prior
from ..program import Program, require_cells


def model(
    cells: Cells, *, labels: Any, prior: Any, state: Any, library: Any, dispersion: Any, decoder: Any, likelihood: Any
) -> None:
    """Say how the counts of these cells came about.

    Parts
    -----
    labels : cells -> distribution of a cell's type, given its label if it has one
    prior : cells -> distribution of variation within a type, event shape (K,)
    state : variation and type -> mean and standard deviation of the state, each (..., n, K)
    library, dispersion, decoder, likelihood : as in `models.scvi`

    Sites
    -----
    y : (n,), 0, ..., C - 1, plate "cells"
        Type of a cell. Drawn by the guide, and summed over in objectives.
    u : (n, K), real, plate "cells"
        Variation within the type.
    z, library, rho, x : as in `models.scvi`
    """
    theta = dispersion()
    with cells.plate():
        y = pyro.sample("y", labels(cells))
        u = pyro.sample("u", prior(cells))
        loc, scale = state(u, y)
        z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
        total = library(cells)
        rho, hidden = decoder(z, cells)
        rho = pyro.deterministic("rho", rho, event_dim=1)
        counts = likelihood(total * rho, dispersion.at(theta, cells, hidden), hidden)
        pyro.sample("x", counts, obs=cells.x)


def guide(cells: Cells, *, encoder: Any, labels: Any, classifier: Any, within: Any) -> None:
    """Guess each cell's state from its counts, its type from the state, and its place within the type.

    Parts
    -----
    encoder : cells -> law of a cell's state, event shape (K,); or its mean and standard deviation, each (n, K)
    labels : the model's, for what is known of a cell's type
    classifier : state -> log odds of types (..., n, C)
    within : state and type -> mean and standard deviation of variation within it, each (..., n, K)
    """
    with cells.plate():
        z = pyro.sample("z", state_law(encoder, cells))
        logits, seen = classifier(z), labels.evidence(cells)
        y = pyro.sample("y", classifier.law(logits, seen), infer={"enumerate": "parallel"})
        loc, scale = within(z, y)
        pyro.sample("u", dist.Normal(loc, scale).to_event(1))
        pyro.factor("known", -classifier.term(logits, seen), has_rsample=False)


def scanvi(
    cells: Cells,
    *,
    n_latent: int = 10,
    n_hidden: int = 128,
    n_layers: int = 1,
    dropout: float = 0.1,
    start: Any = None,
    seed: int = 0,
    **parts: nn.Module | None,
) -> Program:
    """scANVI with a standard normal prior, observed library and NB counts; any part can be replaced.

    Parameters
    ----------
    cells : with ``label=``, known for some of them; at least one label of two types
    n_latent, n_hidden, n_layers, dropout : as `scvi`; widths of encoder and decoder
    start : Fit of `scvi` on the same genes and columns, whose trained parts (encoder, decoder, ...) are the start
        None starts from nothing, which told simulated types better (one tissue: benchmarks/results/scanvi_choices.md)
    seed : of the starting weights
    **parts : ``labels=``, ``classifier=``, ``state=``, ``within=``, and those of `scvi`; ``prior=`` is that of u

    Returns
    -------
    Program

    Raises
    ------
    ValueError
        If ``start`` was fitted to other genes or columns.
    ProgramError
        If there is no label, a part is unknown, or parts do not fit together.

    >>> cells = Cells.from_counts([[1, 0, 2], [0, 3, 1]] * 3, label=["B", "NK", "B", "NK", None, None])
    >>> scanvi(cells, n_latent=2, labels=LabelPrior(errors=0.1)).guided_sums
    ['y']
    """
    require_cells(cells)
    label = cells.schema.label
    if label is None:
        raise ProgramError("scanvi needs a label column: Cells.from_anndata(adata, label=..., unlabeled=...)")
    if len(label) < 2:
        raise ProgramError(
            f'scanvi tells types apart, and "{label.column}" has {"no label" if not len(label) else "one label"}; '
            "without labels use pyrosc.scvi(cells)"
        )
    from_start = _started(start, cells) if start is not None else {}
    encoder = parts.get("encoder", from_start.get("encoder"))
    n_latent = getattr(encoder, "sizes", {}).get("n_latent", n_latent) if encoder is not None else n_latent
    defaults: dict[str, Any] = dict(
        labels=LabelPrior(),
        prior=Prior(dist.Normal, 0.0, 1.0),
        state=TypeNormal(),
        library=ObservedLibrary() if cells.schema.size_factor is None else GivenLibrary(),
        dispersion=GeneDispersion(),
        decoder=Decoder(n_latent, n_hidden, n_layers),
        likelihood=NBLikelihood(),
        encoder=Encoder(n_latent, n_hidden, n_layers, dropout),
        classifier=Classifier(),
        within=TypeNormal(),
    )
    program = Program(model, cells, guide, seed=seed, **(defaults | from_start | parts))
    made: Any = program.parts["labels"]
    if len(made.types) < 2:
        raise ProgramError(f'scanvi tells types apart, and all labels of "{label.column}" but one are groups')
    for name in from_start.keys() - parts.keys():
        program.parts[name].load_state_dict(from_start[name].state_dict())
        program.parts[name].__dict__["started"] = True
    return program


def _started(fit: Any, cells: Cells) -> dict[str, nn.Module]:
    """Parts of a fit that this story has too, but for the prior, which was that of z."""
    if not isinstance(getattr(fit, "program", None), Program):
        raise TypeError(f"start takes a Fit, such as pyrosc.fit(pyrosc.scvi(cells), cells), not {type(fit).__name__}")
    now, schema = cells.schema, fit.schema

    def columns(s: Any) -> Any:
        return [None if f is None else (f.column, f.levels) for f in (s.batch, *s.categorical)]

    for what, own, theirs in (
        ("genes", now.genes, schema.genes),
        ("batches or categorical columns", columns(now), columns(schema)),
        ("continuous columns, or scalings of them,", now.continuous, schema.continuous),
        ("size factors", now.size_factor, schema.size_factor),
    ):
        if own != theirs:
            raise ValueError(
                f"start was fitted to other {what} than these cells have: read them with the columns of the fit and "
                "genes=list(fit.schema.genes), or fit pyrosc.scvi to these cells"
            )
    names = ("library", "dispersion", "decoder", "likelihood", "encoder")
    return {name: fit.program.parts[name] for name in names if name in fit.program.parts}
