"""Checks: whether to believe a Fit, and which one."""

from .compare import compare, paired, thinned_log_likelihood
from .importance import importance, pareto_k

__all__ = ["compare", "importance", "paired", "pareto_k", "thinned_log_likelihood"]
