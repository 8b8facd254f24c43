"""Tests of guides that are more than independent normals."""

from functools import cache

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyrosc
from pyrosc import Cells
from pyrosc.draws import draw_guide
from pyrosc.elbo import still
from pyrosc.encoders import FullRankNormal, state_law

COUNTS = np.random.default_rng(0).poisson(2.0, (40, 15))
KINDS = [pyrosc.FullRankEncoder, pyrosc.FlowEncoder]


def law_of(encoder):
    cells = Cells.from_counts(COUNTS)
    program = pyrosc.scvi(cells, encoder=encoder)
    return program, cells, program.parts["encoder"].law(cells)


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_independent_normals(kind):
    program, cells, law = law_of(kind(3, 16))
    loc, scale = program.parts["encoder"](cells)
    z = law.sample((5,))

    if kind is pyrosc.FlowEncoder:  # two reversals and identities
        expected = dist.Normal(loc, scale).to_event(1).log_prob(z)
    else:
        expected = dist.Normal(law.loc, law.scale_tril.diagonal(dim1=-2, dim2=-1)).to_event(1).log_prob(z)

    torch.testing.assert_close(law.log_prob(z), expected, rtol=1e-4, atol=1e-4)


def test_a_full_covariance_is_that_of_its_draws():
    program, cells, _ = law_of(pyrosc.FullRankEncoder(3, 16))
    encoder = program.parts["encoder"]
    torch.nn.init.normal_(encoder.lower.bias)
    law = encoder.law(cells)

    z = law.sample((20_000,))

    # 20,000 draws: errors of correlations are near 1 / sqrt(20,000) = 0.007
    for i in range(3):
        found = np.corrcoef(z[:, i].T.numpy())
        cov = (law.scale_tril[i] @ law.scale_tril[i].T).detach()
        sd = cov.diagonal().sqrt()
        np.testing.assert_allclose(found, (cov / sd / sd[:, None]).numpy(), atol=0.035)
        np.testing.assert_allclose(encoder(cells)[1][i].detach(), sd, rtol=1e-4)


def test_kl_from_independent_normals_is_that_between_normals():
    tril = torch.randn(4, 3, 3, dtype=torch.float64).tril() * 0.3
    tril.diagonal(dim1=-2, dim2=-1).exp_()
    q = FullRankNormal(torch.randn(4, 3, dtype=torch.float64), scale_tril=tril)
    p = dist.Normal(torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5)
    full = torch.distributions.MultivariateNormal(p.loc, scale_tril=torch.diag(p.scale))

    expected = kl_divergence(torch.distributions.MultivariateNormal(q.loc, scale_tril=q.scale_tril), full)

    torch.testing.assert_close(kl_divergence(q, p.to_event(1)), expected)
    torch.testing.assert_close(kl_divergence(q, p.expand([4, 3]).to_event(1)), expected)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, dist.Laplace(p.loc, p.scale).to_event(1))


def test_held_still_it_is_the_same_law_without_gradients():
    q = FullRankNormal(torch.zeros(2, 3, requires_grad=True), scale_tril=torch.eye(3).expand(2, 3, 3))
    z = torch.randn(2, 3)

    assert not still(q).log_prob(z).requires_grad
    torch.testing.assert_close(still(q).log_prob(z), q.log_prob(z).detach())


def correlated(seed=0):
    """Counts of two latents that only their sum moves: given the counts they are anticorrelated."""
    draw = np.random.default_rng(seed)
    z = draw.normal(size=(600, 2))
    return Cells.from_counts(
        draw.poisson(np.exp(1.0 + 0.7 * z.sum(1, keepdims=True)), (600, 12)), size_factor=np.ones(600)
    )


class Sum(torch.nn.Module):
    """Decodes z to exp(1 + 0.7 (z1 + z2)), the truth."""

    def forward(self, z, cells):
        return (1.0 + 0.7 * z.sum(-1, keepdim=True)).exp().expand(*z.shape[:-1], cells.n_genes), None


@cache
def fitted(kind):
    cells = correlated()
    program = pyrosc.scvi(
        cells, encoder=kind(2, 32, dropout=0.0), decoder=Sum(), likelihood=pyrosc.PoissonLikelihood(), dispersion=None
    )
    return pyrosc.fit(program, cells, epochs=100, validation=None, progress=False), cells


@pytest.mark.parametrize("kind", KINDS)
def test_latents_that_depend_on_each_other_are_guided_as_that(kind):
    """Only the sum s is in the counts. Its posterior precision is near 1/2 + 12 genes x 0.49 x the mean count e."""
    fit, cells = fitted(kind)
    twin, _ = fitted(pyrosc.Encoder)
    of_sum = (0.5 + 12 * 0.49 * np.e) ** -0.5

    z, z_twin = (f.latent(cells, 400) for f in (fit, twin))

    # Given s the difference of two N(0, 1) is N(0, 2): sd(z1)^2 = 1/2 + sd(s)^2 / 4. A tenth for what training leaves.
    assert np.median(z.std(0)) == pytest.approx((0.5 + of_sum**2 / 4) ** 0.5, rel=0.1)
    assert np.median(z.sum(-1).std(0)) == pytest.approx(of_sum, rel=0.1)
    # The best independent normals have the precisions of z1 with z2 known.
    assert np.median(z_twin.std(0)) == pytest.approx((1 + 12 * 0.49 * np.e) ** -0.5, rel=0.1)
    assert fit.elbo(cells, n_draws=20).mean() > twin.elbo(cells, n_draws=20).mean() + 1.0


@pytest.mark.filterwarnings("ignore::pyrosc.PyroscWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_fits_of_it_answer_and_are_kept(kind, tmp_path):
    cells = Cells.from_counts(COUNTS)
    prior = pyrosc.VampPrior(5)
    fit = pyrosc.fit(pyrosc.scvi(cells, encoder=kind(3, 16), prior=prior), cells, epochs=2, progress=False)
    fit.save(tmp_path / "a.safetensors")

    again = pyrosc.load(tmp_path / "a.safetensors")

    np.testing.assert_array_equal(again.latent(cells, 3), fit.latent(cells, 3))
    assert fit.latent_sd(cells).shape == (40, 3)
    assert np.isfinite(pyrosc.check.importance(fit, cells, n_draws=200)["ess"]).all()
    assert again.program.parts["encoder"].arguments == fit.program.parts["encoder"].arguments


def test_an_encoder_of_ones_own_may_answer_numbers_or_a_law():
    class Own(torch.nn.Module):
        def forward(self, cells):
            return torch.zeros(len(cells), 2), torch.ones(len(cells), 2)

    class Known(Own):
        def law(self, cells):
            return dist.Laplace(*self(cells)).to_event(1)

    cells = Cells.from_counts(COUNTS)

    assert type(state_law(Own(), cells).base_dist) is dist.Normal
    assert type(state_law(Known(), cells).base_dist) is dist.Laplace


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_one_number_is_refused(kind):
    with pytest.raises(ValueError, match="n_latent of at least 2, not 1"):
        kind(1)


def test_draws_in_front_are_those_of_the_flow():
    program, cells, _ = law_of(pyrosc.FlowEncoder(3, 16))
    with program.driven(0), torch.no_grad():
        node = draw_guide(program, cells, 7).nodes["z"]

    assert node["value"].shape == (7, 40, 3)
    assert node["fn"].log_prob(node["value"]).shape == (7, 40)
