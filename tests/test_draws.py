"""Draws: all at once where a story allows it, one by one where it would be wrong."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrosc
from pyrosc import BatchDispersion, Cells, GeneDispersion, LatentLibrary, Prior, Program
from pyrosc.draws import draw_guide, in_front, log_weight

from .conftest import small


@pytest.fixture(scope="module")
def cells():
    return Cells.from_anndata(small(), batch="donor", label="cell_type")


def unfitted(program):
    return pyrosc.Fit(program, pd.DataFrame(), {"n_cells": 1, "state": "finished", "best_epoch": 0})


def by_batch(pick):
    def model(cells):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0).expand([2, 30]).to_event(2))
        with cells.plate():
            rho = pyro.deterministic("rho", pick(effect, cells.batch).softmax(-1), event_dim=1)
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    return model


@pytest.mark.parametrize(
    "parts",
    [
        dict(),
        dict(dispersion=GeneDispersion(Prior(dist.LogNormal, 1.0, 1.0))),
        dict(dispersion=BatchDispersion(pyrosc.TrendPrior()), library=LatentLibrary()),
    ],
)
def test_stories_of_the_package_are_drawn_at_once(cells, parts):
    program = pyrosc.scvi(cells, n_latent=3, n_hidden=8, **parts)

    assert in_front(program, cells, 40) == [40]
    # and the weights have the law of those drawn one by one
    with program.driven(0), torch.no_grad():
        few = cells[:8]
        once = log_weight(program, draw_guide(program, few, 600), few, 600)
        each = torch.cat([log_weight(program, draw_guide(program, few), few) for _ in range(600)])
    error = (once.var(0) / 600 + each.var(0) / 600).sqrt()
    assert ((once.mean(0) - each.mean(0)).abs() < 5 * error).all()


def test_draws_are_not_taken_for_cells(cells):
    """A scalar global, (S, 1) in front, would broadcast over S cells."""

    class Scalar(pyrosc.Part):
        def forward(self):
            return pyro.sample("theta", dist.Gamma(2.0, 1.0))

        def at(self, value, cells, hidden=None):
            return value

    program = pyrosc.scvi(cells, n_latent=3, n_hidden=8, dispersion=Scalar())
    for n in (1, 3, 5, 7, 25):
        assert in_front(program, cells[:n], 25) == [None] * 25
    assert unfitted(program).expression(cells[:3], n_draws=7).shape == (3, 30)
    assert unfitted(program).draws("theta", cells[:3], 7).shape == (7,)


def test_a_computed_global_is_repeated(cells):
    def model(cells):
        pyro.deterministic("effect", torch.ones(3, 4))
        with cells.plate():
            pyro.sample("x", dist.Poisson(1.0).expand([30]).to_event(1), obs=cells.x)

    assert unfitted(Program(model, cells)).draws("effect", cells, 5).shape == (5, 3, 4)


@pytest.mark.parametrize(
    "pick", [lambda e, b: e[b], lambda e, b: e[..., b, :]], ids=["effect[batch]", "effect[..., batch, :]"]
)
def test_a_story_that_indexes_a_global_by_cell_is_run_draw_by_draw(cells, pick):
    program = Program(by_batch(pick), cells)

    assert in_front(program, cells, 6) == [None] * 6
    table = unfitted(program).expression(cells[:9], n_draws=50)
    drawn = unfitted(program).draws("rho", cells[:9], 50)
    assert drawn.shape == (50, 9, 30)
    np.testing.assert_allclose(table.to_numpy(), drawn.mean(0), rtol=1e-4, atol=1e-6)
    # cells of one batch share each draw of the effect
    same = cells.batch[:9].numpy() == int(cells.batch[0])
    assert np.ptp(drawn[:, :9][:, same], axis=1).max() < 1e-6
    assert np.ptp(drawn, axis=0).max() > 0.01


def test_a_long_call_says_how_long_and_how_much(tissue, monkeypatch, caplog):
    from pyrosc import draws, loading

    cells = pyrosc.Cells.from_anndata(tissue[:50])
    program = pyrosc.scvi(cells, n_latent=2, n_hidden=8).eval()
    monkeypatch.setattr(loading, "_BLOCK_VALUES", 60 * 10 * 5)  # blocks of few cells
    monkeypatch.setattr(draws, "_LONG", 0.0)
    with caplog.at_level("INFO", logger="pyrosc"):
        list(draws.by_draws(program, cells, [[cells]], 5, 0, lambda block, trace, n: trace.nodes["rho"]["value"]))

    assert "50 cells in blocks of 5: about" in caplog.text
    assert caplog.text.count("at a time") == 1
