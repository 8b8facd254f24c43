"""Tests of guesses that are refined cell by cell."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrosc
from pyrosc import Cells
from pyrosc.corrections import Corrections, cell_keys, corrected
from pyrosc.draws import draw_guide
from pyrosc.encoders import FullRankNormal
from pyrosc.errors import ProgramError, PyroscWarning

from .test_encoders import Sum, correlated

# Both cores may be busy with other tests; few cells and few steps.
SETTINGS = {"n_cells": 1, "state": "finished", "best_epoch": 1, "kl_weight": 1.0, "versions": {}}


class Guess(torch.nn.Module):
    """An encoder that says the same of every cell."""

    sizes = {"n_latent": 2}  # noqa: RUF012

    def __init__(self, loc, scale):
        super().__init__()
        self.loc, self.scale = torch.nn.Parameter(torch.tensor(loc)), torch.nn.Parameter(torch.tensor(scale))

    def forward(self, cells):
        return self.loc.expand(len(cells), -1), self.scale.expand(len(cells), -1)


def two_latents(scale=0.3):
    """Counts see the sum of two latents; the encoder knows nothing."""
    cells = correlated()[:25]
    program = pyrosc.scvi(
        cells, encoder=Guess([0.3, -0.3], [scale, scale]), decoder=Sum(), likelihood=pyrosc.PoissonLikelihood(),
        dispersion=None,
    )  # fmt: skip
    return pyrosc.Fit(program, [], dict(SETTINGS)), cells


def on_grid(cells):
    """Posterior moments of z by sums over a fine grid, and log p(x)."""
    at = torch.linspace(-4, 4, 401, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1)
    rate = (1.0 + 0.7 * z.sum(-1)).exp()
    x = cells.x.double()
    log = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + torch.stack(
        [(row.sum() * rate.log() - 12 * rate - torch.lgamma(row + 1).sum()) for row in x]
    )
    weight = (log - log.flatten(1).max(1).values[:, None, None]).exp()
    total = weight.sum((1, 2), keepdim=True)
    mean = (weight[..., None] * z / total[..., None]).sum((1, 2))
    second = torch.einsum("nij,ija,ijb->nab", weight / total, z, z)
    evidence = log.flatten(1).logsumexp(1) + 2 * torch.log(at[1] - at[0])
    return mean, second - mean[:, :, None] * mean[:, None, :], evidence


def test_a_full_covariance_comes_out_as_the_posterior_has_it():
    fit, cells = two_latents()
    mean, covariance, evidence = on_grid(cells)

    better = fit.refine(cells, family="full", steps=200, progress=False)
    z = torch.as_tensor(better.latent(cells, 4000)).double()
    centred = z - z.mean(0)
    found = torch.einsum("sna,snb->nab", centred, centred) / len(z)

    # A posterior sd is near 0.7 and the error of 4,000 draws near 0.01; the posterior is a little skewed, the guess not.
    assert (z.mean(0) - mean).abs().mean() < 0.05
    assert (found - covariance).abs().mean() < 0.05
    gap = evidence.numpy() - better.elbo(cells, n_draws=1000)
    assert gap.mean() < 0.03
    assert gap.min() > -0.05
    assert fit.elbo(cells, n_draws=50).mean() < evidence.mean() - 5  # as it was


@pytest.mark.parametrize("family", ["full", "normal"])
def test_moments_are_those_of_the_posterior_where_the_highest_elbo_has_others(family):
    """Of independent normals the best is far too narrow for two latents whose sum alone is seen."""
    fit, cells = two_latents()
    mean, covariance, _ = on_grid(cells)
    exact = covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    by_elbo, by_moments = (fit.refine(cells, family=family, steps=200, moments=n, progress=False) for n in (0, 3000))

    error, before = (
        (torch.as_tensor(f.latent_sd(cells)).double() / exact - 1).abs().mean() for f in (by_moments, by_elbo)
    )
    if family == "full":  # a normal posterior: nothing to mend, and 3,000 draws, a third effective, are good for 3 %
        assert error < 0.03
        assert ((torch.as_tensor(by_moments.latent(cells)).double() - mean).abs() / exact).mean() < 0.06
    else:  # cells whose weights cannot be relied on stay as they are
        assert before > 0.5
        assert error < 0.75 * before
    assert by_moments.settings["refined"]["moments"] == 3000


@pytest.mark.filterwarnings("ignore::pyrosc.PyroscWarning")
def test_moments_of_stories_with_sites_of_all_cells(careful):
    fit, cells = careful
    better = fit.refine(cells[:10], family="full", steps=60, moments=200, progress=False)

    assert better.elbo(cells[:10], n_draws=50).mean() > fit.elbo(cells[:10], n_draws=50).mean()
    with pytest.raises(ValueError, match="moments must be 0 or at least 100 draws, not 50"):
        fit.refine(cells, moments=50)


def test_independent_normals_come_out_as_narrow_as_the_best_of_them_are():
    """The family gap: 1/2 log of the product of variances over the determinant, for a normal posterior."""
    fit, cells = two_latents()
    _, covariance, evidence = on_grid(cells)

    better = fit.refine(cells, steps=200, n_draws=4, progress=False)

    precision = torch.linalg.inv(covariance)
    best = precision.diagonal(dim1=-2, dim2=-1) ** -0.5
    torch.testing.assert_close(torch.as_tensor(better.latent_sd(cells)).double(), best, rtol=0.15, atol=0)
    gap = (evidence - torch.as_tensor(better.elbo(cells, n_draws=400))).mean()
    expected = 0.5 * (best.square().log().sum(-1).neg() - torch.logdet(precision)).neg().mean().abs()
    assert float(gap) == pytest.approx(float(expected), rel=0.15)


def test_a_refined_guess_is_at_its_best_a_draw_more_does_not_help():
    fit, cells = two_latents()
    short, long = (fit.refine(cells, steps=n, lr=0.3, progress=False) for n in (100, 300))

    a, b = (f.elbo(cells, n_draws=200).mean() for f in (short, long))

    assert abs(a - b) < 0.05  # nats
    assert short.settings["refined"]["elbo_before"] < short.settings["refined"]["elbo_after"]
    assert short.settings["refined"]["elbo_after"] == pytest.approx(a, abs=0.1)


@pytest.fixture(scope="module")
def careful():
    """A story with every kind of site: global dispersion, a state, a library of each cell."""
    counts = np.random.default_rng(0).poisson(2.0, (50, 20))
    cells = Cells.from_counts(counts, batch=["a", "b"] * 25)
    program = pyrosc.scvi(
        cells, n_latent=3, n_hidden=16, library=pyrosc.LatentLibrary(),
        dispersion=pyrosc.GeneDispersion(prior=pyrosc.InverseSqrtPrior(3.0)),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, epochs=4, progress=False), cells


@pytest.mark.parametrize("family", ["normal", "full"])
def test_every_site_of_a_cell_is_refined_and_kept_in_files(careful, family, tmp_path):
    fit, cells = careful
    better = fit.refine(cells[:10], family=family, steps=60, progress=False)
    better.save(tmp_path / "a.safetensors")
    again = pyrosc.load(tmp_path / "a.safetensors")

    assert set(better.program.corrections.sizes) == {"z", "library"}
    assert better.elbo(cells[:10], n_draws=50).mean() > fit.elbo(cells[:10], n_draws=50).mean() + 0.1
    np.testing.assert_array_equal(again.latent(cells[:10], 3), better.latent(cells[:10], 3))
    assert not np.array_equal(better.latent(cells[:10]), fit.latent(cells[:10]))
    assert again.settings["refined"] == better.settings["refined"]


def test_a_refined_cell_is_known_wherever_it_stands(careful):
    fit, cells = careful
    better = fit.refine(cells[:10], steps=20, progress=False)
    others = cells[[3, 7, 1]]

    # Products of three rows and of ten are summed in another order on some processors.
    np.testing.assert_allclose(better.latent(others), better.latent(cells[:10])[[3, 7, 1]], atol=1e-6)
    with pytest.warns(PyroscWarning, match="were not refined"):
        z = better.latent(cells)
    np.testing.assert_allclose(z[10:], fit.latent(cells)[10:], atol=1e-6)
    np.testing.assert_allclose(z[:10], better.latent(cells[:10]), atol=1e-5)


def test_refining_more_cells_keeps_those_before(careful):
    fit, cells = careful
    first = fit.refine(cells[:10], steps=20, progress=False)

    both = first.refine(cells[10:20], steps=20, progress=False)

    assert len(both.program.corrections) == 20
    np.testing.assert_allclose(both.latent(cells[:10]), first.latent(cells[:10]), atol=1e-6)


def test_the_fit_that_was_refined_and_the_world_stay_as_they_were(careful):
    fit, cells = careful
    before, state = fit.latent(cells, 2), torch.get_rng_state()
    weights = {name: value.clone() for name, value in fit.program.state_dict().items()}

    better = fit.refine(cells[:10], steps=5, progress=False)

    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(fit.latent(cells, 2), before)
    for name, value in better.program.state_dict().items():
        if not name.startswith("corrections."):
            assert torch.equal(value, weights[name])
    assert all(p.requires_grad for p in better.program.parameters())
    assert len(pyro.get_param_store()) == 0


def test_another_part_or_another_fit_begins_without_corrections(careful):
    fit, cells = careful
    better = fit.refine(cells[:10], steps=5, progress=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        assert pyrosc.fit(better.program, cells, epochs=1, progress=False).program.corrections is None
    assert better.program.replace(prior=pyrosc.MixturePrior(3)).corrections is None
    assert better.program.copy().corrections is not None


@pytest.mark.filterwarnings("ignore::pyrosc.PyroscWarning")
def test_a_fit_may_refine_its_cells_at_the_end():
    cells = correlated()[:100]
    fit = pyrosc.fit(pyrosc.scvi(cells, n_latent=2, n_hidden=8), cells, epochs=2, refine=10, progress=False)

    assert fit.settings["refined"]["cells"] == 100
    with pytest.raises(ValueError, match="refine must be 0 for none, or a whole number of steps"):
        pyrosc.fit(fit.program, cells, refine=True)


@pytest.mark.filterwarnings("ignore::pyrosc.PyroscWarning")
def test_stories_that_sum_over_labels_are_refined_too():
    counts = np.random.default_rng(0).poisson(2.0, (40, 12))
    cells = Cells.from_counts(counts, label=["a", "b", "?", "?"] * 10, unlabeled="?")
    fit = pyrosc.fit(pyrosc.scanvi(cells, n_latent=2, n_hidden=8), cells, epochs=2, progress=False)

    better = fit.refine(cells, steps=60, progress=False)

    assert set(better.program.corrections.sizes) == {"z", "u"}
    assert better.elbo(cells, n_draws=50).mean() > fit.elbo(cells, n_draws=50).mean() + 0.05


@pytest.mark.filterwarnings("ignore::pyrosc.PyroscWarning")
def test_members_of_an_ensemble_are_refined_each():
    cells = correlated()[:60]
    fit = pyrosc.fit(pyrosc.scvi(cells, n_latent=2, n_hidden=8), cells, epochs=2, ensemble=2, progress=False)

    better = fit.refine(cells, steps=5, progress=False)

    assert [m.corrections is not None for m in better.members] == [True, True]


def test_cells_are_known_by_counts_totals_and_columns():
    counts = np.random.default_rng(0).poisson(2.0, (6, 9))
    counts[5] = counts[0]
    cells = Cells.from_counts(counts, batch=list("aabbab"))
    keys = cell_keys(cells)

    assert len(set(keys.tolist())) == 6  # the last has the counts of the first in another batch
    assert cell_keys(cells[[5, 2]]).tolist() == [keys[5], keys[2]]
    assert cell_keys(cells.do(batch="a"))[5] == keys[0]
    assert cell_keys(cells.to("cpu", torch.float64)).tolist() == keys.tolist()


@pytest.mark.parametrize(
    "law",
    [
        dist.Normal(torch.randn(4, 3), torch.rand(4, 3) + 0.5).to_event(1),
        dist.LogNormal(torch.randn(4, 3), torch.rand(4, 3) + 0.5).to_event(1),
        dist.TransformedDistribution(
            dist.Normal(torch.randn(4, 3), torch.rand(4, 3) + 0.5), torch.distributions.transforms.SigmoidTransform()
        ).to_event(1),
        FullRankNormal(torch.randn(4, 3), scale_tril=torch.eye(3).expand(4, 3, 3)),
    ],
)
def test_a_correction_is_in_units_of_the_guide_on_the_real_line(law):
    shift, log_scale = torch.tensor([[1.0, 0.0, -1.0]]).expand(4, 3), torch.full((4, 3), 0.5).log()
    torch.manual_seed(0)
    plain = law.sample((40_000,))
    found = corrected(law, 1, shift, log_scale, None).sample((40_000,))
    if isinstance(law, FullRankNormal) or type(law.base_dist) is dist.Normal:
        to_line = lambda v: v  # noqa: E731
    elif type(law.base_dist) is dist.LogNormal:
        to_line = torch.log
    else:
        to_line = torch.logit

    sd = to_line(plain).std(0)

    # 40,000 draws: means within 0.025 sd, sds within 2 %.
    torch.testing.assert_close((to_line(found).mean(0) - to_line(plain).mean(0)) / sd, shift, atol=0.03, rtol=0)
    torch.testing.assert_close(to_line(found).std(0) / sd, torch.full((4, 3), 0.5), atol=0.01, rtol=0)


def test_corrections_of_nothing_change_nothing(careful):
    fit, cells = careful
    program = fit.program.copy()
    program.corrections = Corrections({"z": 3, "library": 1}, "full", 50)
    program.corrections.keys = cell_keys(cells)
    program.corrections = program.corrections.sorted()
    with torch.no_grad(), program.driven(0):
        with_zero = draw_guide(program, cells).nodes["z"]["value"]
    with torch.no_grad(), fit.program.driven(0):
        without = draw_guide(fit.program, cells).nodes["z"]["value"]

    torch.testing.assert_close(with_zero, without)


def test_what_cannot_be_refined_says_why(careful):
    fit, cells = careful
    with pytest.raises(ValueError, match="family must be one of"):
        fit.refine(cells, family="flow")
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, not 0"):
        fit.refine(cells, steps=0)

    def model(cells, *, likelihood):
        with cells.plate():
            z = pyro.sample("z", dist.Gamma(2.0, 2.0).expand([1]).to_event(1))
            pyro.sample("x", likelihood(cells.library * z / cells.n_genes), obs=cells.x)

    def guide(cells, *, encoder):
        with cells.plate():
            loc, scale = encoder(cells)
            pyro.sample("z", dist.Gamma(loc.exp(), scale).to_event(1))

    own = pyrosc.Program(model, cells, guide, encoder=pyrosc.Encoder(1, 8), likelihood=pyrosc.PoissonLikelihood())
    with pytest.raises(ProgramError, match='"z" is drawn from Gamma, which is no normal nor made from one'):
        pyrosc.Fit(own, [], dict(SETTINGS)).refine(cells, progress=False)


@pytest.mark.filterwarnings("ignore::pyrosc.PyroscWarning")
def test_a_refined_reference_is_mapped_on_without_its_corrections(careful):
    _, cells = careful
    fit = pyrosc.fit(pyrosc.scvi(cells, n_latent=3, n_hidden=16), cells, epochs=2, progress=False)
    query = Cells.from_counts(np.random.default_rng(1).poisson(2.0, (12, 20)), batch=["c"] * 12)

    mapped = fit.refine(cells[:10], steps=5, progress=False).map(query, epochs=1, progress=False)

    np.testing.assert_array_equal(mapped.latent(cells), fit.latent(cells))
    assert "refined" not in mapped.settings


@pytest.mark.filterwarnings("ignore::pyrosc.PyroscWarning")
def test_sites_of_one_number_a_cell_are_refined():
    """Sites without an event dimension, one positive and one real, guided by completion."""

    def model(cells, *, likelihood):
        with cells.plate():
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            shift = pyro.sample("shift", dist.Normal(0.0, 0.1))
            mean = rate * shift.exp()
            pyro.sample("x", likelihood(mean.unsqueeze(-1).expand(*mean.shape, cells.n_genes)), obs=cells.x)

    cells = Cells.from_counts(np.random.default_rng(0).poisson(2.0, (20, 6)))
    program = pyrosc.Program(model, cells, likelihood=pyrosc.PoissonLikelihood())
    fit = pyrosc.fit(program, cells, epochs=2, progress=False)

    better = fit.refine(cells, progress=False)

    assert better.program.corrections.sizes == {"rate": 1, "shift": 1}
    # The posterior of log rate is near normal; the prior and a sum of six counts say how narrow.
    found = better.draws("rate", cells, 2000)
    total = cells.x.sum(-1).numpy()
    assert np.median(np.log(found).std(0) * total**0.5) == pytest.approx(1.0, rel=0.15)
    assert better.elbo(cells, n_draws=50).mean() > fit.elbo(cells, n_draws=50).mean() + 0.5
