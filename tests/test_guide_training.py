"""Tests of guides that learn on while the story stands still."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrosc
from pyrosc import Cells
from pyrosc.errors import ProgramError, PyroscWarning
from pyrosc.guide_training import guide_weights
from pyrosc.made_up import make_up

from .test_encoders import Sum, correlated
from .test_refinement import SETTINGS, on_grid

pytestmark = pytest.mark.filterwarnings("ignore::pyrosc.PyroscWarning")


def untrained(cells):
    """A story without weights, counts by the sum of two latents, and an encoder that has learned nothing."""
    program = pyrosc.scvi(
        cells, encoder=pyrosc.FullRankEncoder(2, 32), decoder=Sum(), likelihood=pyrosc.PoissonLikelihood(),
        dispersion=None,
    )  # fmt: skip
    return pyrosc.Fit(program, [], dict(SETTINGS))


def test_a_guide_learns_the_posterior_of_cells_it_has_not_seen():
    """Against the exact log p(x) on a grid; of 30 measured cells, so that the made-up ones are what it learns from."""
    cells = correlated()
    seen, others = cells[:30], cells[30:70]
    fit = untrained(seen)
    evidence = on_grid(others)[2].numpy()

    learned = fit.train_guide(seen, steps=400, batch_size=200, lr=3e-2, progress=False)

    def gap(of):
        return (evidence - of.elbo(others, n_draws=400)).mean()

    # 0.11 are left after so few steps (0.03 of it to skewness); 400 draws of 40 cells are good for 0.01.
    assert gap(learned) < 0.25
    assert gap(fit) > 5
    said = learned.settings["guide"]
    assert said["elbo_before"] < said["elbo_after"] - 5
    assert said["elbo_after"] == pytest.approx(learned.elbo(seen, n_draws=400).mean(), abs=0.1)


def test_made_up_cells_make_up_for_measured_ones():
    """The twin: the same steps on eight measured cells alone leave others behind."""
    import pyrosc.guide_training as module

    cells = correlated()
    seen, others = cells[:8], cells[30:70]
    fit = untrained(seen)
    options = dict(steps=300, batch_size=50, lr=1e-2, progress=False)
    mixed = fit.train_guide(seen, **options)
    mix = dict(module._MIX)
    try:
        module._MIX.update(posterior=0.02, prior=0.02, measured=0.96)
        alone = fit.train_guide(seen, **options)
    finally:
        module._MIX.update(mix)

    # Seeds move the difference by some 0.1.
    assert mixed.elbo(others, n_draws=100).mean() > alone.elbo(others, n_draws=100).mean() + 0.3


@pytest.fixture(scope="module")
def careful():
    """A story with every kind of site: global dispersion, a state, a library of each cell."""
    counts = np.random.default_rng(0).poisson(2.0, (60, 20))
    cells = Cells.from_counts(counts, batch=["a", "b"] * 30)
    program = pyrosc.scvi(
        cells, n_latent=3, n_hidden=16, library=pyrosc.LatentLibrary(),
        dispersion=pyrosc.GeneDispersion(prior=pyrosc.InverseSqrtPrior(3.0)),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, epochs=4, progress=False, refine=5), cells


def test_the_story_the_fit_and_the_world_stay_as_they_were(careful, tmp_path):
    fit, cells = careful
    before, state = fit.latent(cells, 2), torch.get_rng_state()
    weights = {name: value.clone() for name, value in fit.program.state_dict().items()}

    learned = fit.train_guide(cells, steps=20, progress=False)

    assert torch.equal(state, torch.get_rng_state())
    assert len(pyro.get_param_store()) == 0
    np.testing.assert_array_equal(fit.latent(cells, 2), before)
    chosen = set(guide_weights(fit.program, cells))
    changed = {name for name, value in learned.program.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed <= chosen
    assert {name.split(".")[1] for name in changed} >= {"encoder"}
    assert any("library" in name for name in changed)  # the head that completion made
    assert not any("dispersion" in name or "decoder" in name for name in chosen)
    assert all(p.requires_grad for p in learned.program.parameters())
    assert fit.program.corrections is not None
    assert learned.program.corrections is None
    assert "refined" not in learned.settings

    learned.save(tmp_path / "a.safetensors")
    again = pyrosc.load(tmp_path / "a.safetensors")
    assert again.settings["guide"] == learned.settings["guide"]
    np.testing.assert_array_equal(again.latent(cells, 2), learned.latent(cells, 2))


def test_the_same_seed_gives_the_same_guide(careful):
    fit, cells = careful
    one, two, other = (fit.train_guide(cells, steps=3, seed=seed, progress=False).latent(cells) for seed in (0, 0, 1))

    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_members_of_an_ensemble_learn_each():
    cells = correlated()[:60]
    fit = pyrosc.fit(pyrosc.scvi(cells, n_latent=2, n_hidden=8), cells, epochs=2, ensemble=2, progress=False)

    learned = fit.train_guide(cells, steps=3, progress=False)

    for old, new in zip((fit.program, *fit.members), (learned.program, *learned.members), strict=True):
        assert not torch.equal(old.parts["encoder"].loc.weight, new.parts["encoder"].loc.weight)
        assert torch.equal(old.parts["decoder"].out.weight, new.parts["decoder"].out.weight)


@pytest.mark.parametrize("around", ["prior", "posterior"])
def test_made_up_cells_have_the_moments_of_the_story(around):
    cells = correlated()[:50].rows(torch.arange(50).repeat(200), whole=True)
    program = untrained(cells).program
    with torch.no_grad(), program.driven(0):
        nodes = make_up(program, cells, around).nodes
    z, x = nodes["z"]["value"], nodes["x"]["value"]

    if around == "prior":
        loc, variance = torch.zeros(2), torch.ones(2)
    else:
        with torch.no_grad():
            law = program.parts["encoder"].law(cells)
        loc, variance = law.loc.mean(0), (law.variance + law.loc**2).mean(0) - law.loc.mean(0) ** 2
    # 10,000 cells: means within 0.03, variances within 5 % (three standard errors).
    torch.testing.assert_close(z.mean(0), loc, atol=0.03, rtol=0)
    torch.testing.assert_close(z.var(0), variance, atol=0, rtol=0.05)
    rate = nodes["rho"]["value"] * nodes["library"]["value"]
    assert float((x - rate).mean() / (rate.mean() / x.numel()) ** 0.5) == pytest.approx(0, abs=4)


def test_what_cannot_be_trained_says_why(careful):
    fit, cells = careful
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, not 0"):
        fit.train_guide(cells, steps=0)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 5, not 4"):
        fit.train_guide(cells, batch_size=4)
    with pytest.raises(ValueError, match=r"lr must be in \(0, 1\], not 2"):
        fit.train_guide(cells, lr=2)

    vamp = pyrosc.fit(pyrosc.scvi(cells, n_hidden=8, prior=pyrosc.VampPrior(3)), cells, epochs=1, progress=False)
    with pytest.raises(ProgramError, match=r"reads weights of its guide \(.*encoder.*\), as VampPrior does"):
        vamp.train_guide(cells)

    frozen = fit.program.copy().requires_grad_(False)
    with pytest.raises(ProgramError, match="has no free weights that its sites of cells alone rest on"):
        pyrosc.Fit(frozen, [], dict(SETTINGS)).train_guide(cells)

    labelled = Cells.from_counts(np.random.default_rng(0).poisson(2.0, (20, 9)), label=["a", "b"] * 10)
    story = pyrosc.fit(pyrosc.scanvi(labelled, n_latent=2, n_hidden=8), labelled, epochs=1, progress=False)
    with pytest.raises(ProgramError, match="the guide of scanvi learns from labels, too"):
        story.train_guide(labelled)


def test_a_dirichlet_state_without_a_closed_form_learns_too():
    def model(cells, *, likelihood):
        with cells.plate():
            rho = pyro.sample("rho", dist.Dirichlet(torch.ones(cells.n_genes)))
            pyro.sample("x", likelihood(cells.library * rho), obs=cells.x)

    cells = Cells.from_counts(np.random.default_rng(0).poisson(4.0, (40, 6)))
    program = pyrosc.Program(model, cells, likelihood=pyrosc.PoissonLikelihood())
    fit = pyrosc.fit(program, cells, epochs=2, progress=False)

    learned = fit.train_guide(cells, steps=100, batch_size=60, lr=1e-2, progress=False)

    assert learned.elbo(cells, n_draws=50).mean() > fit.elbo(cells, n_draws=50).mean() + 0.5


def test_known_labels_are_not_used():
    counts = np.random.default_rng(0).poisson(2.0, (20, 9))
    cells = Cells.from_counts(counts, label=["a", "b"] * 10)
    fit = pyrosc.fit(pyrosc.scvi(cells, n_latent=2, n_hidden=8), cells, epochs=1, progress=False)
    others = Cells.from_counts(counts, label=["b", "a"] * 10)

    one, two = (fit.train_guide(c, steps=3, progress=False).latent(cells) for c in (cells, others))

    np.testing.assert_array_equal(one, two)
