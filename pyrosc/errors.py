"""What pyrosc raises and warns with, beyond Python's own ValueError and TypeError."""

from typing import Any


class ProgramError(ValueError):
    """The parts of a program, or its model and its guide, disagree."""


class FitError(RuntimeError):
    """Fitting failed.

    Attributes
    ----------
    fit : Fit or None
        The last good state, with ``settings["state"] == "failed"``.
    """

    fit: Any = None


class PyroscWarning(UserWarning):
    """A result stands but may surprise. One warning a call; silence by this category."""
