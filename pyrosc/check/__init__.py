"""Checks: whether to believe a Fit, and which one."""

from ..psis import pareto_k
from .compare import compare, paired, thinned_log_likelihood
from .importance import importance, importance_by_gene
from .labels import labels
from .predictive import pit, posterior_predictive, prior_predictive

__all__ = [
    "compare", "importance", "importance_by_gene", "labels", "paired", "pareto_k", "pit", "posterior_predictive",
    "prior_predictive", "thinned_log_likelihood",
]  # fmt: skip
