"""Checks: whether to believe a Fit, and which one."""

from ..psis import pareto_k
from .compare import compare, paired, thinned_log_likelihood
from .importance import importance
from .labels import labels
from .latent import c2st, latent
from .predictive import pit, posterior_predictive, prior_predictive

__all__ = [
    "c2st", "compare", "importance", "labels", "latent", "paired", "pareto_k", "pit", "posterior_predictive",
    "prior_predictive", "thinned_log_likelihood",
]  # fmt: skip
