"""Pyro probabilistic programs for single-cell counts."""

from typing import Any

from .between_samples import sample_matrix, sample_tree
from .cells import Cells
from .dispersions import (
    BatchDispersion,
    CellDispersion,
    GeneDispersion,
    InverseSqrtPrior,
    LabelDispersion,
    NoDispersion,
    TrendPrior,
)
from .encoders import FlowEncoder, FullRankEncoder
from .errors import FitError, ProgramError, PyroscWarning
from .fragments import count_kind, reads_to_fragments
from .labels import Classifier, LabelPrior, TypeNormal
from .libraries import GivenLibrary, LatentLibrary, ObservedLibrary
from .likelihoods import BernoulliLikelihood, NBLikelihood, PoissonLikelihood, ZINBLikelihood
from .loadings import HorseshoeLoadings, NonNegativeLoadings, NormalLoadings
from .models.linear_scvi import linear_scvi
from .models.mrvi import mrvi
from .models.poissonvi import poissonvi
from .models.scanvi import scanvi
from .models.scvi import scvi
from .models.shifted_samples import shifted_samples
from .networks import Decoder, Encoder, LinearDecoder, LoadingsDecoder
from .parts import Part
from .posterior import Fit
from .priors import FlowPrior, MixturePrior, Prior, VampPrior
from .program import Program
from .regions import RegionDecoder
from .samples import Archetypes, Directions, SampleEffects, SampleEncoder, SampleNormal
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
    "scanvi",
    "mrvi",
    "shifted_samples",
    "linear_scvi",
    "poissonvi",
    "Program",
    "Part",
    "Prior",
    "MixturePrior",
    "VampPrior",
    "FlowPrior",
    "Encoder",
    "FullRankEncoder",
    "FlowEncoder",
    "Decoder",
    "LinearDecoder",
    "NormalLoadings",
    "HorseshoeLoadings",
    "NonNegativeLoadings",
    "LoadingsDecoder",
    "RegionDecoder",
    "ObservedLibrary",
    "LatentLibrary",
    "GivenLibrary",
    "GeneDispersion",
    "BatchDispersion",
    "LabelDispersion",
    "CellDispersion",
    "NoDispersion",
    "InverseSqrtPrior",
    "TrendPrior",
    "LabelPrior",
    "Classifier",
    "TypeNormal",
    "SampleEffects",
    "Directions",
    "Archetypes",
    "SampleEncoder",
    "SampleNormal",
    "NBLikelihood",
    "ZINBLikelihood",
    "PoissonLikelihood",
    "BernoulliLikelihood",
    "count_kind",
    "reads_to_fragments",
    "fit",
    "Fit",
    "load",
    "sample_matrix",
    "sample_tree",
    "check",
    "datasets",
    "simulate",
    "ProgramError",
    "FitError",
    "PyroscWarning",
]


def __getattr__(name: str) -> Any:
    """``pyrosc.plot`` when it is asked for (it wants matplotlib); else an error with what there is."""
    if name == "plot":
        import importlib

        return importlib.import_module(".plot", __name__)
    from .schema import did_you_mean, listed

    raise AttributeError(f'pyrosc has no "{name}".{did_you_mean(name, __all__)} There are: {listed(__all__, 100)}.')
