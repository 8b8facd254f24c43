"""Tests of the posterior of a cell's own numbers."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrosc
from pyrosc import Cells
from pyrosc.cell_posterior import CellPosterior
from pyrosc.draws import draw_guide, log_weight
from pyrosc.errors import ProgramError

COUNTS = np.random.default_rng(0).poisson(3.0, (6, 12))


def careful(cells):
    return pyrosc.scvi(
        cells, n_latent=3, n_hidden=8, library=pyrosc.LatentLibrary(),
        dispersion=pyrosc.GeneDispersion(prior=pyrosc.InverseSqrtPrior(3.0)),
    )  # fmt: skip


def summed_by_model(cells):
    def model(cells, *, decoder):
        with cells.plate():
            y = pyro.sample("y", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(2.0 * y.unsqueeze(-1) - 1.0, 0.7).expand([*y.shape, 2]).to_event(1))
            rho, _ = decoder(z, cells)
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    return pyrosc.Program(
        model, cells, pyrosc.models.scvi.guide, encoder=pyrosc.Encoder(2, 8), decoder=pyrosc.Decoder(2, 8)
    )


@pytest.mark.parametrize("story", [careful, lambda cells: pyrosc.scvi(cells, n_latent=3, n_hidden=8)])
def test_its_densities_are_those_of_the_weights_of_draws(story):
    cells = Cells.from_counts(COUNTS)
    program = story(cells).eval()

    with program.driven(3), torch.no_grad():
        posterior = CellPosterior(program, cells, seed=5)
        trace = draw_guide(program, posterior.cells, shared=posterior._shared())
        v = posterior._packed(trace)
        prior, likelihood = posterior.log_joint(v)
        found = prior + likelihood - posterior.log_guide(v)
        expected = log_weight(program, trace, posterior.cells)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_a_density_is_the_one_on_paper():
    """Normal state, log-normal library: density of z and of log library, and of counts."""
    cells = Cells.from_counts(COUNTS)
    program = careful(cells).to(torch.float64)
    cells = cells.to("cpu", torch.float64)
    v = torch.randn(2, 6, 4, dtype=torch.float64)
    v[..., 3] += 3.5

    with program.driven(0), torch.no_grad():
        posterior = CellPosterior(program, cells, 2)
        prior, likelihood = posterior.log_joint(v)
        z, total = v[..., :3], v[..., 3:].exp()
        rho, _ = program.parts["decoder"](z, cells)
        dispersion = posterior._nodes["dispersion"]["value"]
        library = program.parts["library"]
        law = posterior._run(program.model, posterior.values(v)).nodes["library"]["fn"].base_dist

    on_paper = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    on_paper = on_paper + dist.Normal(law.loc[:6, 0], law.scale[:6, 0]).log_prob(v[..., 3])
    mean = total * rho
    counts = dist.NegativeBinomial(dispersion, probs=mean / (mean + dispersion)).log_prob(cells.x).sum(-1)
    assert library is not None
    torch.testing.assert_close(prior, on_paper)
    torch.testing.assert_close(likelihood, counts, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    cells = Cells.from_counts(COUNTS)
    program = careful(cells).to(torch.float64)
    v = torch.randn(1, 6, 4, dtype=torch.float64) * 0.3 + torch.tensor([0.0, 0.0, 0.0, 3.5])

    with program.driven(0):
        posterior = CellPosterior(program, cells.to("cpu", torch.float64))
        assert torch.autograd.gradcheck(lambda v: sum(posterior.log_joint(v)), v.requires_grad_())


@pytest.mark.parametrize("by", ["model", "guide"])
def test_discrete_sites_are_summed_out(by):
    """The same density, term by term, with y set to each of its values."""
    cells = Cells.from_counts(COUNTS, label=["a", "b", "a", "?", "?", "b"], unlabeled="?") if by == "guide" else (
        Cells.from_counts(COUNTS)
    )  # fmt: skip
    program = pyrosc.scanvi(cells, n_latent=2, n_hidden=8) if by == "guide" else summed_by_model(cells)

    with program.driven(0), torch.no_grad():
        posterior = CellPosterior(program, cells)
        v = torch.randn(1, 6, posterior.size)
        found = sum(posterior.log_joint(v))[0]
        values = posterior.values(v)
        terms = []
        for y in (0, 1):
            fixed = values | {"y": torch.full((6,), y if by == "guide" else float(y))}
            trace = pyro.poutine.trace(pyro.poutine.condition(program.model, data=fixed)).get_trace(cells)
            trace.compute_log_prob()
            terms.append(sum(s["log_prob"] for n, s in trace.nodes.items() if "log_prob" in s and n != "cells"))

    torch.testing.assert_close(found, torch.stack(terms).logsumexp(0), rtol=1e-5, atol=1e-4)


def test_copies_of_a_cell_stand_for_themselves():
    cells = Cells.from_counts(COUNTS)
    program = careful(cells)
    with program.driven(0), torch.no_grad():
        one, three = CellPosterior(program, cells, seed=1), CellPosterior(program, cells, 3, seed=1)
        v = three.draw()
        alone = [one.log_joint(v[c : c + 1])[1][0] for c in range(3)]
        together = three.log_joint(v)[1]

    assert v.shape == (3, 6, 4)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-4)


def test_a_story_without_numbers_of_cells_is_refused():
    def model(cells):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with cells.plate():
            pyro.sample("x", dist.Poisson(rate).expand([cells.n_genes]).to_event(1), obs=cells.x)

    cells = Cells.from_counts(COUNTS)
    program = pyrosc.Program(model, cells)
    with program.driven(0), pytest.raises(ProgramError, match="draws nothing continuous for each cell"):
        CellPosterior(program, cells)
