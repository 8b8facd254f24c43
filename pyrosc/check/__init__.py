"""Checks: whether to believe a Fit, and which one."""

from ..psis import pareto_k
from .calibration import Calibration, calibration, coverage, judged, simultaneous_band
from .compare import compare, paired, thinned_log_likelihood
from .evidence import evidence, gaps
from .importance import importance, importance_by_gene
from .labels import labels
from .predictive import pit, posterior_predictive, prior_predictive
from .sampling import PosteriorDraws, guide_error, sample_posterior

__all__ = [
    "Calibration", "PosteriorDraws", "calibration", "compare", "coverage", "evidence", "gaps", "guide_error",
    "importance", "importance_by_gene", "judged", "labels", "paired", "pareto_k", "pit", "posterior_predictive",
    "prior_predictive", "sample_posterior", "simultaneous_band", "thinned_log_likelihood",
]  # fmt: skip
