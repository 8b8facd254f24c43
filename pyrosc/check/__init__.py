"""Checks: whether to believe a Fit, and which one."""

from ..psis import pareto_k
from .compare import compare, paired, thinned_log_likelihood
from .evidence import evidence, gaps
from .importance import importance
from .labels import labels
from .predictive import pit, posterior_predictive, prior_predictive
from .sampling import PosteriorDraws, guide_error, sample_posterior

__all__ = [
    "PosteriorDraws", "compare", "evidence", "gaps", "guide_error", "importance", "labels", "paired", "pareto_k", "pit",
    "posterior_predictive", "prior_predictive", "sample_posterior", "thinned_log_likelihood",
]  # fmt: skip
