"""The objective: Pyro's own value and gradient, on every kind of story; path gradients with the same mean and less noise."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import ClippedAdam

import pyrosc
from pyrosc import (
    FlowPrior,
    GeneDispersion,
    InverseSqrtPrior,
    LatentLibrary,
    MixturePrior,
    PoissonLikelihood,
    Prior,
    Program,
    VampPrior,
    ZINBLikelihood,
)  # fmt: skip
from pyrosc.elbo import elbo_terms
from pyrosc.objective import MeanFieldELBO, still


@pytest.fixture(scope="module")
def cells(tissue):
    return pyrosc.Cells.from_anndata(tissue[:100], batch="batch")


def scvi(**parts):
    return lambda cells: pyrosc.scvi(cells, n_latent=3, n_hidden=8, **{k: v() for k, v in parts.items()})


def masked_and_scaled(cells):
    def model(cells, *, decoder, likelihood):
        with cells.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            with poutine.mask(mask=cells.batch == 0):
                pyro.sample("depth", dist.Normal(z.sum(-1), 1.0), obs=cells.library.squeeze(-1).log())
            rho, _ = decoder(z, cells)
            with poutine.scale(scale=0.5):
                pyro.sample("x", likelihood(cells.library * rho), obs=cells.x)
        with poutine.scale(scale=3.0):
            pyro.sample("overall", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))

    return Program(
        model, cells, pyrosc.models.scvi.guide, encoder=pyrosc.Encoder(3, 8), decoder=pyrosc.Decoder(3, 8),
        likelihood=PoissonLikelihood(),
    )  # fmt: skip


def auxiliary(cells):
    def model(cells, *, prior):
        with cells.plate():
            z = pyro.sample("z", prior(cells))
            pyro.sample("x", dist.Poisson(z.exp().sum(-1, keepdim=True).expand(-1, cells.n_genes)).to_event(1),
                        obs=cells.x)  # fmt: skip

    def guide(cells, *, encoder):
        with cells.plate():
            loc, scale = encoder(cells)
            u = pyro.sample("u", dist.Normal(loc, scale).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(0.1 * u, 0.1 * scale).to_event(1))

    return Program(model, cells, guide, prior=Prior(dist.Laplace, 0.0, 1.0), encoder=pyrosc.Encoder(2, 8))


STORIES = {
    "NB": scvi(),
    "ZINB": scvi(likelihood=ZINBLikelihood),
    "Student": scvi(prior=lambda: Prior(dist.StudentT, 5.0, 0.0, 1.0)),
    "mixture": scvi(prior=lambda: MixturePrior(3)),
    "Vamp": scvi(prior=lambda: VampPrior(4)),
    "flow": scvi(prior=FlowPrior),
    "latent library": scvi(library=LatentLibrary),
    "global site": scvi(dispersion=lambda: GeneDispersion(prior=InverseSqrtPrior(3.0))),
    "global, no closed form": scvi(dispersion=lambda: GeneDispersion(prior=Prior(dist.Gamma, 2.0, 1.0))),
    "masks and scales": masked_and_scaled,
    "auxiliary": auxiliary,
}


def value_and_gradient(program, objective, cells, seed=3):
    with program.driven(seed, train=True):
        loss = objective.differentiable_loss(program.model, program.guide, cells)
        gradients = torch.autograd.grad(loss, list(program.parameters()), allow_unused=True)
    return float(loss), [g for g in gradients if g is not None]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "mini-batch"])
@pytest.mark.parametrize("story", STORIES)
def test_value_and_gradient_are_pyros(cells, story, whole):
    program = STORIES[story](cells)
    part = cells if whole else cells.minibatch(torch.arange(17))

    theirs, expected = value_and_gradient(program, TraceMeanField_ELBO(), part)
    ours, found = value_and_gradient(program, MeanFieldELBO(path_gradients=False), part)

    assert ours == pytest.approx(theirs, rel=1e-5)  # rounding of float32 sums in another order
    assert len(found) == len(expected)
    for g, e in zip(found, expected):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-4 * float(e.abs().max()) + 1e-6)


@pytest.mark.parametrize("options", [{"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}])
def test_several_particles_are_averaged(cells, options):
    program = STORIES["Student"](cells)

    theirs = value_and_gradient(program, TraceMeanField_ELBO(max_plate_nesting=1, **options), cells)[0]
    ours = value_and_gradient(program, MeanFieldELBO(max_plate_nesting=1, **options), cells)[0]

    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("story", ["Student", "mixture", "flow", "global, no closed form", "auxiliary"])
def test_path_gradients_have_the_same_mean(cells, story):
    program, few = STORIES[story](cells), cells[:30]
    plain, path = ([], [])
    for seed in range(200):
        plain.append(torch.cat([g.flatten() for g in value_and_gradient(
            program, MeanFieldELBO(path_gradients=False), few, seed)[1]]))  # fmt: skip
        path.append(torch.cat([g.flatten() for g in value_and_gradient(program, MeanFieldELBO(), few, seed)[1]]))
    plain, path = torch.stack(plain), torch.stack(path)

    def largest(difference):
        """z of the weight that is furthest from zero, over draws."""
        error = difference.std(0) / 200**0.5
        moved = error > 1e-6 * plain.abs().max()
        assert int(moved.sum()) > 5  # else nothing was tested
        return float((difference.mean(0)[moved] / error[moved]).abs().max())

    # Hundreds of weights: beyond 6 sds by chance once in 10^6 runs.
    assert largest(path - plain) < 6.0  # by pairs of the same draws
    assert largest(path - 1.5 * plain) > 6.0  # the twin


def test_path_gradients_are_quieter_where_guide_and_prior_agree():
    """At the optimum they have no noise at all; Pyro's do."""
    loc, log_scale = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)

    def model():
        pyro.sample("z", dist.Independent(dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2, 2)), dist.Normal(torch.zeros(2, 2), 1.0)), 1))  # fmt: skip

    def guide():
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def gradients(objective):
        return torch.stack([
            torch.cat(torch.autograd.grad(objective.differentiable_loss(model, guide), [loc, log_scale]))
            for _ in range(20)
        ])  # fmt: skip

    torch.manual_seed(0)
    assert float(gradients(MeanFieldELBO()).abs().max()) < 1e-5
    assert float(gradients(MeanFieldELBO(path_gradients=False)).std(0).max()) > 0.1  # the twin


def test_what_is_held_still_and_what_is_not():
    loc = torch.zeros(3, requires_grad=True)
    value = torch.ones(3)

    for law in (
        dist.Normal(loc, 1.0), dist.LogNormal(loc, 1.0), dist.Normal(loc, 1.0).to_event(1),
        dist.Normal(loc, 1.0).mask(torch.tensor([True, False, True])),
        dist.TransformedDistribution(dist.Normal(loc, 1.0), [dist.transforms.ExpTransform()]),
    ):  # fmt: skip
        assert not still(law).log_prob(value).requires_grad
        assert torch.equal(still(law).log_prob(value), law.log_prob(value))
    assert still(dist.StudentT(3.0, loc, 1.0)).log_prob(value).requires_grad


def test_a_users_own_svi_trains_with_it(cells):
    program = STORIES["mixture"](cells)
    pyro.clear_param_store()
    svi = SVI(program.model, program.guide, ClippedAdam({"lr": 1e-2}), MeanFieldELBO())
    program.train()

    losses = [svi.step(cells) for _ in range(30)]

    assert losses[-1] < losses[0]
    pyro.clear_param_store()


def test_masks_and_scales_reach_the_elbo_of_cells(cells):
    program = masked_and_scaled(cells)
    with program.driven(3):
        expected = -TraceMeanField_ELBO().loss(program.model, program.guide, cells)
    with program.driven(3), torch.no_grad():
        terms = elbo_terms(program, cells)
    with program.driven(3), torch.no_grad():
        part = elbo_terms(program, cells.minibatch(torch.arange(len(cells))))

    assert float(terms.local.sum() + terms.global_observed) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(part.local, terms.local)


# ---- as an argument of fit ---------------------------------------------------------------------


def quick(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pyrosc.PyroscWarning)
        return pyrosc.fit(program, cells, progress=False, **options)


@pytest.mark.parametrize("weight_by", [{"warmup": 0.0}, {"warmup": 0.5}])
def test_fit_with_pyros_own_objective_agrees(cells, weight_by):
    options = dict(epochs=3, batch_size=32, **weight_by)
    ours = quick(STORIES["NB"](cells), cells, **options)
    theirs = quick(STORIES["NB"](cells), cells, objective=TraceMeanField_ELBO(), **options)

    # Nine steps apart by rounding, which Adam's first steps enlarge.
    for column in ("train_elbo", "kl_z", "reconstruction", "kl_weight"):
        assert ours.history[column].tolist() == pytest.approx(theirs.history[column].tolist(), rel=2e-3)
    assert (ours.settings["objective"], theirs.settings["objective"]) == ("MeanFieldELBO", "TraceMeanField_ELBO")


def test_any_other_objective_with_a_gradient_is_taken(cells):
    fit = quick(STORIES["Student"](cells), cells, objective=Trace_ELBO(), epochs=2)

    assert fit.settings["objective"] == "Trace_ELBO"
    assert torch.isfinite(torch.tensor(fit.history["train_elbo"].to_numpy())).all()


def test_objectives_that_cannot_be_used_are_refused(cells):
    program = STORIES["NB"](cells)

    with pytest.raises(ValueError, match="objective must be a pyro.infer.ELBO"):
        quick(program, cells, objective=TraceMeanField_ELBO)
    with pytest.raises(ValueError, match="RenyiELBO has no differentiable_loss"):
        quick(program, cells, objective=RenyiELBO())
