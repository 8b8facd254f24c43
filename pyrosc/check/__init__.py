"""Checks: whether to believe a Fit, and which one."""

from ..psis import pareto_k
from .calibration import Calibration, calibration, coverage, judged, simultaneous_band
from .compare import compare, paired, thinned_log_likelihood
from .importance import importance
from .labels import labels
from .predictive import pit, posterior_predictive, prior_predictive

__all__ = [
    "Calibration", "calibration", "compare", "coverage", "importance", "judged", "labels", "paired", "pareto_k", "pit",
    "posterior_predictive", "prior_predictive", "simultaneous_band", "thinned_log_likelihood",
]  # fmt: skip
