"""The objective: Pyro's own value and gradient, on every kind of story; path gradients with the same mean and less noise."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch.utils._python_dispatch import TorchDispatchMode

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
from pyrosc.optim import FusedClippedAdam


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


# ---- what a GPU would do, on the CPU -----------------------------------------------------------


class NoLooking(TorchDispatchMode):
    """Fails on what would make the host wait for a GPU: reading a number, or a shape that depends on numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, f"a step looked at a number: {name}"
        return function(*args, **(kwargs or {}))


def blind(monkeypatch):
    for module in ("counts", "distributions", "training"):
        monkeypatch.setattr(f"pyrosc.{module}.may_look", lambda t: False)


@pytest.mark.parametrize("story", ["NB", "ZINB", "Poisson", "mixture", "latent library", "global site"])
def test_a_step_looks_at_no_number(cells, story, monkeypatch):
    stories = STORIES | {"Poisson": scvi(likelihood=PoissonLikelihood)}
    program, batch, objective = stories[story](cells), cells.minibatch(torch.arange(20)), MeanFieldELBO()
    optimizer = FusedClippedAdam(program.parameters(), lr=0.01)
    assert batch.x is not None  # gathered by the window, before the step
    expected = value_and_gradient(program, objective, batch)

    blind(monkeypatch)
    with program.driven(3, train=True), NoLooking():
        loss = objective.differentiable_loss(program.model, program.guide, batch) / batch.total
        objective.kl_terms(batch.total)
        loss.backward()
        gradients = [p.grad.clone() for p in program.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer.step(bad=1.0 - torch.isfinite(norm).float())

    assert float(loss) * batch.total == pytest.approx(expected[0], rel=1e-5)
    for g, e in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(g * batch.total, e, rtol=1e-3, atol=1e-3 * float(e.abs().max()) + 1e-6)


def test_a_step_that_looks_is_caught(cells, monkeypatch):
    program, batch = STORIES["NB"](cells), cells.minibatch(torch.arange(20))

    with program.driven(3, train=True), NoLooking(), pytest.raises(AssertionError, match="looked at a number"):
        MeanFieldELBO().differentiable_loss(program.model, program.guide, batch)  # may look, and does


def test_a_fit_that_does_not_look_is_the_same_fit(cells, monkeypatch):
    options = dict(epochs=4, batch_size=32, warmup=0.0)
    seeing = quick(STORIES["NB"](cells), cells, **options)
    blind(monkeypatch)
    unseeing = quick(STORIES["NB"](cells), cells, **options)

    assert unseeing.history["validation_elbo"].tolist() == pytest.approx(
        seeing.history["validation_elbo"].tolist(), rel=2e-3
    )


@pytest.mark.parametrize("sees", [True, False])
def test_a_step_with_a_bad_gradient_is_left_out(cells, monkeypatch, sees):
    if not sees:
        blind(monkeypatch)
    program, at = STORIES["NB"](cells), []

    def spoil(gradient):
        at.append(1)
        return gradient * float("nan") if len(at) in (5, 7) else gradient

    def hooked(cells, *, encoder):
        loc, scale = encoder(cells)
        if loc.requires_grad:
            loc.register_hook(spoil)
        with cells.plate():
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    parts = dict(program.parts.items())
    fit = quick(Program(pyrosc.models.scvi.model, cells, hooked, **parts), cells, epochs=2, batch_size=16)

    # Two runs before the first step (an estimate of its time) call the hook too.
    assert fit.settings["skipped_steps"] == 2
    assert all(bool(torch.isfinite(p).all()) for p in fit.program.parameters())


def test_ten_bad_steps_end_the_fit_also_unseen(cells, monkeypatch):
    blind(monkeypatch)

    def broken(cells, *, encoder):
        loc, scale = encoder(cells)
        if loc.requires_grad:
            loc.register_hook(lambda gradient: gradient * float("nan"))
        with cells.plate():
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    parts = dict(STORIES["NB"](cells).parts.items())
    with pytest.raises(pyrosc.FitError, match="not finite for 10 steps"):
        quick(Program(pyrosc.models.scvi.model, cells, broken, **parts), cells, epochs=4, batch_size=16)


def test_counts_that_stay_on_the_host_give_the_same_fit(cells, monkeypatch):
    near = quick(STORIES["NB"](cells), cells, epochs=2, batch_size=32)
    monkeypatch.setattr("pyrosc.training._counts_stay", lambda cells, place: True)
    far = quick(STORIES["NB"](cells), cells, epochs=2, batch_size=32)

    for a, b in zip(near.program.parameters(), far.program.parameters(), strict=True):
        assert torch.equal(a, b)
    assert near.settings["counts"] == "cpu"
    assert far.settings["counts"] == "host, moved as they are needed"
