"""Checks: whether to believe a Fit, and which one."""

from ..psis import pareto_k
from .calibration import Calibration, calibration, coverage, judged, simultaneous_band
from .compare import compare, paired, thinned_log_likelihood
from .evidence import evidence, gaps
from .importance import importance, importance_by_gene
from .labels import labels
from .latent import c2st, latent
from .predictive import pit, posterior_predictive, prior_predictive
from .sampling import PosteriorDraws, guide_error, sample_posterior
from .summary import summary

__all__ = [
    "Calibration", "PosteriorDraws", "c2st", "calibration", "compare", "coverage", "evidence", "gaps", "guide_error",
    "importance", "importance_by_gene", "judged", "labels", "latent", "paired", "pareto_k", "pit",
    "posterior_predictive", "prior_predictive", "sample_posterior", "simultaneous_band", "summary",
    "thinned_log_likelihood",
]  # fmt: skip
