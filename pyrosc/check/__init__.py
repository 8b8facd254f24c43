"""Checks: whether to believe a Fit."""

from .importance import importance, pareto_k

__all__ = ["importance", "pareto_k"]
