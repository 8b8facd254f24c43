"""Pyro probabilistic programs for single-cell counts."""

from .cells import Cells
from .dispersions import GeneDispersion, NoDispersion
from .errors import FitError, ProgramError, PyroscWarning
from .libraries import GivenLibrary, ObservedLibrary
from .likelihoods import NBLikelihood, PoissonLikelihood, ZINBLikelihood
from .models.scvi import scvi
from .networks import Decoder, Encoder
from .parts import Part
from .posterior import Fit
from .priors import Prior
from .program import Program
from .schema import Schema
from .store import load
from .training import fit

# isort: split
from . import check, datasets, simulate

__version__ = "0.1.0"

# In the order a reader meets them.
__all__ = [  # noqa: RUF022
    "Cells",
    "Schema",
    "scvi",
    "Program",
    "Part",
    "Prior",
    "Encoder",
    "Decoder",
    "GeneDispersion",
    "NoDispersion",
    "ObservedLibrary",
    "GivenLibrary",
    "NBLikelihood",
    "ZINBLikelihood",
    "PoissonLikelihood",
    "fit",
    "Fit",
    "load",
    "check",
    "datasets",
    "simulate",
    "ProgramError",
    "FitError",
    "PyroscWarning",
]
