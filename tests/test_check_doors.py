"""What every check says to what it cannot take."""

import numpy as np
import pytest

import pyrosc
from pyrosc import Cells, check

CELLS = Cells.from_counts(np.random.default_rng(0).poisson(2.0, (30, 6)))


@pytest.mark.parametrize(
    "name",
    [
        "calibration", "coverage", "evidence", "gaps", "guide_error", "importance", "importance_by_gene", "labels", "latent",
        "pit", "posterior_predictive", "sample_posterior", "summary",
    ],
)  # fmt: skip
def test_cells_in_the_place_of_a_fit_are_refused(name):
    with pytest.raises(TypeError, match=r"expected a Fit first, as pyrosc.fit\(...\) answers, not Cells"):
        getattr(check, name)(CELLS, CELLS)


def test_a_folder_that_is_not_there_is_told_before_the_work():
    settings = {"n_cells": 30, "state": "finished", "best_epoch": 1}
    fit = pyrosc.Fit(pyrosc.scvi(CELLS, n_latent=2, n_hidden=4), [], settings)
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere to keep ranks in"):
        check.calibration(fit, CELLS, resume="nowhere/ranks.npz", progress=False)
