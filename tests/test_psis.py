"""Smoothed importance weights: their tails, and draws that they carry to a posterior known by a grid."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrosc
from pyrosc import Cells, PoissonLikelihood, Program, ProgramError, PyroscWarning, psis
from pyrosc.draws import WIDTHS, Importance, draw_guide, log_weight, propose, resampled, shared_out


def test_smoothed_weights_keep_their_order_and_vary_less():
    draw = torch.Generator().manual_seed(1)
    raw = -0.6 * torch.rand(1000, 200, generator=draw, dtype=torch.float64).log()  # u^-0.6, mean 2.5

    log, k = psis.smoothed(raw)
    log = log + raw.max(0).values  # the constant of each column

    n_tail = psis.tail_size(1000)
    order = raw.argsort(0)
    torch.testing.assert_close(log.gather(0, order[:-n_tail]), raw.gather(0, order[:-n_tail]))
    assert (log.gather(0, order).diff(dim=0) >= -1e-9).all()
    assert (log.max(0).values <= raw.max(0).values + 1e-9).all()
    plain, less = (w.exp().mean(0) for w in (raw, log))
    assert less.std() < 0.8 * plain.std()
    assert less.mean() == pytest.approx(2.5, rel=0.05)  # and are as right on average
    assert k.shape == (200,)


# ---- draws that are carried to the posterior ---------------------------------------------------


class Slopes(nn.Module):
    """rho (n, 3) = softmax(slopes z)."""

    def forward(self, z, cells):
        logits = z @ torch.stack([z.new_tensor([1.0]), z.new_tensor([-1.0]), z.new_tensor([0.3])], 1)
        return logits.softmax(-1), None


class Askew(nn.Module):
    """A guide that is off: too wide, and beside the state."""

    def __init__(self, loc, scale):
        super().__init__()
        self.register_buffer("loc", torch.as_tensor(loc))
        self.register_buffer("scale", torch.as_tensor(scale))

    def forward(self, cells):
        ones = torch.ones(len(cells), 1)
        return self.loc * ones, self.scale * ones


def one_state(cells, *, encoder, decoder, likelihood):
    with cells.plate():
        z = pyro.sample("z", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))
        rho, _ = decoder(z, cells)
        rho = pyro.deterministic("rho", rho, event_dim=1)
        pyro.sample("x", likelihood(cells.library * rho), obs=cells.x)


def beside(cells, *, encoder, decoder, likelihood):
    loc, scale = encoder(cells)
    with cells.plate():
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def story(loc, scale):
    cells = Cells.from_counts(np.array([[4, 1, 2], [0, 5, 1], [2, 2, 2], [1, 0, 1]]))
    parts = dict(encoder=Askew(loc, scale), decoder=Slopes(), likelihood=PoissonLikelihood())
    return Program(one_state, cells, guide=beside, **parts), cells


def exact(cells):
    """Posterior mean and sd of z by a grid of 4,001 points."""
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    rho = (grid[:, None] * torch.tensor([1.0, -1.0, 0.3], dtype=torch.float64)).softmax(-1)
    x = torch.as_tensor(cells.x.numpy(), dtype=torch.float64)
    mean = cells.library.double()[:, None] * rho  # (n, grid, 3)
    log_p = dist.Poisson(mean).log_prob(x[:, None]).sum(-1) - grid**2 / 2
    weight = log_p.softmax(-1)
    centre = (weight * grid).sum(-1)
    return centre, ((weight * (grid - centre[:, None]) ** 2).sum(-1)).sqrt()


def test_weighed_draws_are_of_the_posterior_where_the_guide_is_not():
    program, cells = story(0.4, 1.2)
    centre, sd = exact(cells)
    done = Importance(5000)

    with program.driven(0), torch.no_grad():
        z = resampled(program.eval(), cells, 2000, done).nodes["z"]["value"].squeeze(-1).double()

    # Means of 2,000 draws out of 5,000 proposals, of which some thousand are effective: error below 0.04 sd.
    assert (done.n_cells, done.n_unweighted) == (4, 0)
    assert z.shape == (2000, 4)
    torch.testing.assert_close(z.mean(0), centre, atol=0.15 * float(sd.max()), rtol=0)
    torch.testing.assert_close(z.std(0), sd, rtol=0.1, atol=0)
    assert (0.4 - centre).abs().max() > 0.4  # the guide was far from it


def test_draws_of_a_guide_that_is_too_narrow_are_mended_by_wider_ones():
    """Half as wide as the posterior: no draw of its own reaches the tails, whatever the weights."""
    cells = story(0.0, 1.0)[1][:1]
    centre, sd = exact(cells)
    narrow, _ = story(float(centre), 0.5 * float(sd))
    done = Importance(6000)

    with narrow.driven(0), torch.no_grad():
        z = resampled(narrow.eval(), cells, 2000, done).nodes["z"]["value"].squeeze(-1).double()
        alone, k = psis.smoothed(log_weight(narrow, guide := draw_guide(narrow, cells, 6000), cells, 6000))
    own = guide.nodes["z"]["value"].squeeze(-1).double()
    weight = alone.softmax(0)
    mean = (weight * own).sum(0)

    assert done.n_unweighted == 0
    torch.testing.assert_close(z.std(0), sd, rtol=0.1, atol=0)  # 2,000 draws of some thousand: 4 %
    assert float((weight * (own - mean) ** 2).sum(0).sqrt()) < 0.9 * float(sd)  # the twin, without wider ones
    assert float(k) > 0.5


def test_weights_of_proposals_have_the_evidence_for_a_mean():
    program, cells = story(0.3, 0.7)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    rho = (grid[:, None] * torch.tensor([1.0, -1.0, 0.3], dtype=torch.float64)).softmax(-1)
    law = dist.Poisson(cells.library.double()[:, None] * rho)
    log_p = law.log_prob(cells.x.double()[:, None]).sum(-1) + dist.Normal(0.0, 1.0).log_prob(grid)
    evidence = log_p.logsumexp(-1) + torch.log(grid[1] - grid[0])

    with program.driven(0), torch.no_grad():
        found = propose(program.eval(), cells, shared_out(9000), 500)

    assert found.log_weight.shape == (9000, 4)
    estimate = found.log_weight.double().logsumexp(0) - np.log(9000)
    torch.testing.assert_close(estimate, evidence, atol=0.1, rtol=0)  # weights vary by about their mean: 0.02
    assert found.standard["z"].shape == (9000, 4, 1)
    assert float(found.standard["z"][:3000].std()) == pytest.approx(1.0, rel=0.05)
    assert float(found.standard["z"][-3000:].std()) == pytest.approx(WIDTHS[-1], rel=0.05)
    assert shared_out(10, 6) == [6, 2, 2]
    assert shared_out(10, 20) == [10, 0, 0]


def test_cells_whose_weights_cannot_be_relied_on_keep_the_draws_of_the_guide():
    program, cells = story(-3.0, 0.2)  # far from all of them
    done = Importance(1000)

    with program.driven(0), torch.no_grad():
        z = resampled(program.eval(), cells, 200, done).nodes["z"]["value"]

    assert done.n_unweighted == 4
    assert z.mean() == pytest.approx(-3.0, abs=0.03)  # 0.2 / sqrt(800), four errors


def fitted(loc, scale):
    program, cells = story(loc, scale)
    settings = {"n_cells": 4, "state": "finished", "best_epoch": 1, "kl_weight": 1.0}
    return pyrosc.Fit(program, [], settings), cells


def test_weights_that_are_all_alike_are_left_as_they_are():
    log, k = psis.smoothed(torch.zeros(200, 2))

    assert torch.equal(log, torch.zeros(200, 2, dtype=torch.float64))
    assert (k < 0).all()
    rounded = psis.pareto_k(-1234.5 + 1e-13 * torch.rand(200, 2, dtype=torch.float64).round())
    assert (rounded < 0).all()


def test_effects_of_weighed_draws_are_those_of_the_posterior():
    groups = dict(group1=np.array([True, False, True, True]), group2=np.array([False, True, False, False]))
    options = groups | dict(n_draws=400, resample=False, residual=False, delta=0.3, pseudocount=0.0)
    (off, cells), (right, _) = fitted(0.4, 1.2), fitted(0.0, 1.0)

    plain = off.differential_expression(cells, **options)
    weighed = off.differential_expression(cells, importance=5000, **options)
    also = right.differential_expression(cells, importance=5000, **options)

    assert weighed.attrs["n_unweighted"] == 0
    assert "n_unweighted" not in plain.attrs
    # Two guides, one posterior; 400 draws.
    together = np.stack([t.loc[list(cells.schema.genes), "lfc_mean"] for t in (weighed, also, plain)])
    assert np.abs(together[0] - together[1]).max() < 0.15
    assert np.abs(together[2] - together[1]).max() > 0.5


def test_effects_say_where_weights_cannot_be_relied_on():
    fit, cells = fitted(-3.0, 0.2)
    mask = np.array([True, False, True, True])

    with pytest.warns(PyroscWarning, match=r"cannot be relied on in 4 of 4 cells.*all cells keep the guide's"):
        table = fit.differential_expression(cells, group1=mask, importance=1000)

    assert table.attrs["n_unweighted"] == 4
    with pytest.raises(ValueError, match="importance must be 0 or at least 100 draws, not 50"):
        fit.differential_expression(cells, group1=mask, importance=50)


def test_stories_with_global_sites_are_not_weighed_cell_by_cell(cells_of_tissue):
    cells = cells_of_tissue
    prior = pyrosc.Prior(dist.LogNormal, 0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(pyrosc.scvi(cells, dispersion=pyrosc.GeneDispersion(prior)), cells, epochs=2, progress=False)

    with pytest.raises(ProgramError, match="global sites, whose draws cannot be weighed"):
        fit.differential_expression(cells, "cell_type", "type0", "type1", importance=200)


@pytest.fixture
def cells_of_tissue(tissue):
    return Cells.from_anndata(tissue[:60], label="cell_type")
