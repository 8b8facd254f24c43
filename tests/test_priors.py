"""Priors on z: densities against ones written by hand, integrals, draws, starts, and what does not fit."""

import math
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyrosc
from pyrosc import Cells, Encoder, FlowPrior, MixturePrior, Prior, ProgramError, PyroscWarning, VampPrior


@pytest.fixture(scope="module")
def data():
    from .conftest import small

    return Cells.from_anndata(small(300, 12), batch="donor", label="cell_type", categorical=["condition"])


def program(cells, prior, n_latent=2, **parts):
    return pyrosc.scvi(cells, n_latent=n_latent, n_hidden=8, prior=prior, **parts)


def settle(part):
    """Move every learned number away from its start, so that nothing is hidden by zeros."""
    torch.manual_seed(3)
    # Three layers of exp(log scale) soon reach beyond any grid: flows are moved less.
    reach = 0.1 if isinstance(part, FlowPrior) else 0.3
    with torch.no_grad():
        for p in part.parameters():
            p.add_(reach * torch.randn_like(p))
    return part


PRIORS = {
    "normal": lambda: Prior(dist.Normal, 0.3, 1.2),
    "mixture": lambda: MixturePrior(4),
    "vamp": lambda: VampPrior(5),
    "affine flow": lambda: FlowPrior(3),
    "spline flow": lambda: FlowPrior(2, "spline"),
}


@pytest.mark.parametrize("name", PRIORS)
def test_the_density_integrates_to_one(data, name):
    prior = settle(program(data, PRIORS[name]()).parts["prior"])
    axis = torch.linspace(-14, 14, 701)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)

    with torch.no_grad():
        mass = prior().log_prob(grid).double().exp().sum() * (28 / 700) ** 2

    # A grid of step 0.04 over 14 units on either side: its error is far below what a wrong constant would give. Splines
    # have kinks, which a Riemann sum meets to first order.
    assert float(mass) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("name", PRIORS)
def test_draws_follow_the_density(data, name):
    """E_p[q / p] = 1 for a second density q with lighter tails; draws from another law would not give it."""
    prior = settle(program(data, PRIORS[name]()).parts["prior"])
    with torch.no_grad():
        law = prior(data[:1]) if name == "mixture" else prior()
        z = law.sample((40_000,)).reshape(-1, 2)
        low, centre, high = z.quantile(torch.tensor([0.25, 0.5, 0.75]), 0)
        spread = 0.3 * (high - low)
        narrow = dist.Normal(centre, spread).to_event(1)
        ratio = (narrow.log_prob(z) - prior().log_prob(z)).exp().double()

    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert abs(float(ratio.mean()) - 1) < 5 * error
    assert error < 0.05
    wrong = (narrow.log_prob(z) - dist.Normal(0.0, 3.0).expand([2]).to_event(1).log_prob(z)).exp().double()
    assert abs(float(wrong.mean()) - 1) > 10 * float(wrong.std()) / math.sqrt(len(wrong))  # the twin that must fail


def test_a_mixture_is_one_of_vectors_not_a_product_of_mixtures(data):
    locs, scales, weights = np.array([[0.0, 0.0], [3.0, 3.0]]), np.array([[1.0, 0.5], [0.3, 1.0]]), np.array([0.3, 0.7])
    prior = program(data, MixturePrior(locs=locs, scales=scales, weights=weights)).parts["prior"]
    z = torch.tensor([[0.0, 3.0], [3.0, 3.0], [-1.0, 0.5]])

    found = prior().log_prob(z).detach().numpy()

    by_hand = np.log(sum(w * stats.norm.pdf(z.numpy(), m, s).prod(1) for w, m, s in zip(weights, locs, scales)))
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)
    product = np.log(sum(w * stats.norm.pdf(z.numpy(), m, s) for w, m, s in zip(weights, locs, scales))).sum(1)
    assert abs(found - product).max() > 1  # what a sum over components within each dimension would give


def test_a_mixture_starts_like_a_standard_normal(data):
    law = program(data, MixturePrior(200), n_latent=3).parts["prior"]()

    # 200 random means: their average is within 5 / sqrt(200) sds
    assert law.mean.abs().max() < 5 * math.sqrt(0.75 / 200)
    assert law.variance.detach().numpy() == pytest.approx(1, abs=5 * 0.75 * math.sqrt(2 / 200))


def test_a_label_selects_its_component_and_unknown_ones_none(data):
    few = data[:6]
    blank = few._copy(codes=few.codes | {"cell_type": torch.tensor([-1, 0, 1, 2, -1, 0])})
    part = settle(program(data, MixturePrior(labels=True)).parts["prior"])
    free, held = part(), part(blank)
    component = free.component_distribution

    assert part.arguments["k"] == 3
    means = component.mean.detach()
    for row, label in enumerate([-1, 0, 1, 2]):
        z = means[max(label, 0)]
        density = held.log_prob(z.expand(6, 2))[row]
        expected = free.log_prob(z) if label < 0 else component.log_prob(z)[label]
        # exp(10) to 1 leaves the other components a share of e^-10 times their density
        torch.testing.assert_close(density, expected, atol=0.05, rtol=1e-3)
    odds = part.responsibilities(means[:1].expand(6, 2), blank)
    assert odds.shape == (6, 3)
    assert (odds[[1, 5]].argmax(-1) == 0).all()
    torch.testing.assert_close(odds.sum(-1), torch.ones(6))


def test_a_mixture_on_a_trained_encoder_starts_at_its_clusters(fitted):
    _, cells, fit = fitted
    new = fit.program.replace(prior=MixturePrior(4))
    new.start(cells)
    old = fit.program.replace(prior=MixturePrior(4))
    encoded = torch.tensor(fit.latent(cells))

    started, random = (p.parts["prior"]().log_prob(encoded).mean().item() for p in (new, old))
    standard = dist.Normal(0.0, 1.0).log_prob(encoded).sum(-1).mean().item()
    assert started > standard + 0.3
    assert started > random + 0.3
    labelled = fit.program.replace(prior=MixturePrior(labels=True))
    labelled.start(cells)
    of_label = torch.stack([encoded[cells.label == c].mean(0) for c in range(4)])
    torch.testing.assert_close(labelled.parts["prior"].loc.detach(), of_label, atol=1e-4, rtol=1e-4)
    # with a sixth of the labels unknown, each component still starts at its own label
    codes = torch.where(torch.arange(len(cells)) % 6 == 0, -1, cells.label)
    some = cells._copy(codes=cells.codes | {"cell_type": codes})
    partly = fit.program.replace(prior=MixturePrior(6, labels=True))
    partly.start(some)
    near = torch.cdist(partly.parts["prior"].loc.detach()[:4], of_label).argmin(1)
    assert near.tolist() == [0, 1, 2, 3]
    assert (partly.parts["prior"].loc[4:].detach().abs().sum(1) > 0).all()


def test_vamp_is_the_average_of_the_guides_posteriors_at_its_pseudo_cells(data):
    made = program(data, VampPrior(7))
    made.start(data)
    prior, encoder = made.parts["prior"], made.parts["encoder"]
    with torch.no_grad():
        prior.logits.copy_(torch.randn(7))
        loc, scale = encoder.moments(encoder.features(prior.inputs))
        z = torch.randn(9, 2)
        of_component = stats.norm.logpdf(z[:, None].numpy(), loc.numpy(), scale.numpy()).sum(-1)
        by_hand = np.log((np.exp(of_component) * prior.logits.softmax(-1).numpy()).sum(-1))
        np.testing.assert_allclose(prior().log_prob(z).numpy(), by_hand, rtol=1e-4)
    real = {tuple(row) for row in data.log1p().numpy().round(4).tolist()}
    assert all(tuple(row) in real for row in prior.inputs.detach().numpy().round(4).tolist())


def test_vamp_reads_in_eval_mode_and_leaves_the_mode(data):
    made = program(data, VampPrior(5), dropout=0.5).train()
    made.start(data)
    prior = made.parts["prior"]

    one, other = prior().component_distribution.mean, prior().component_distribution.mean

    assert torch.equal(one, other)
    assert made.parts["encoder"].training
    assert made.parts["encoder"].layers[0].training
    one.sum().backward()
    assert made.parts["encoder"].layers[0].linear.weight.grad.abs().sum() > 0  # it learns through the encoder too


def test_vamp_learns_shares_of_the_levels_its_encoder_sees(data):
    made = program(data, VampPrior(5), encoder=Encoder(2, 8, covariates="first"))
    made.start(data)
    prior, columns = made.parts["prior"], made.parts["encoder"].covariates

    shares = columns.soften(prior.columns)
    torch.testing.assert_close(shares.sum(-1), torch.full((5,), 2.0))  # two columns
    # started at a real cell's own level
    assert (shares.max(-1).values > 0.9).all()
    prior().component_distribution.mean.sum().backward()
    assert prior.columns.grad.abs().sum() > 0


def test_vamp_follows_the_encoder_that_replaces_the_one_it_knew(data):
    made = program(data, VampPrior(5))
    made.start(data)
    other = made.replace(encoder=Encoder(2, 16))

    assert other.parts["prior"].encoder is other.parts["encoder"]
    assert made.parts["prior"].encoder is made.parts["encoder"]
    assert made.copy().parts["prior"].encoder is not made.parts["encoder"]
    torch.testing.assert_close(other.parts["prior"].inputs, made.parts["prior"].inputs)
    with pytest.raises(ProgramError, match="sees other columns.*replace prior="):
        made.replace(encoder=Encoder(2, 8, covariates="first"))


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_a_flow_starts_as_the_standard_normal(data, kind):
    law = program(data, FlowPrior(3, kind), n_latent=3).parts["prior"]()
    z = torch.randn(50, 3)

    # Pyro's splines keep bins and slopes 1e-3 above zero, which costs a few thousandths.
    torch.testing.assert_close(law.log_prob(z), dist.Normal(0.0, 1.0).log_prob(z).sum(-1), atol=2e-2, rtol=0)


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_a_flow_can_be_fitted_after_the_rest_and_leaves_the_decoder(fitted, kind):
    _, cells, fit = fitted
    frozen = fit.program.copy()
    for p in frozen.parameters():
        p.requires_grad_(False)
    program = frozen.replace(prior=FlowPrior(3, kind))
    result = pyrosc.fit(program, cells, epochs=30, progress=False, weight_decay=0.0, warmup=0.0, patience=None)

    assert result.elbo(cells, n_draws=20).mean() > fit.elbo(cells, n_draws=20).mean() + 0.1
    for name in ("decoder", "encoder", "dispersion"):
        for a, b in zip(fit.program.parts[name].parameters(), result.program.parts[name].parameters()):
            assert torch.equal(a, b)
    result.program.copy()  # a trained flow remembers a graph, which a copy must forget


def test_frozen_norms_keep_their_statistics(data):
    """What is frozen stays: running means, and no dropout, while a new prior is fitted."""
    made = pyrosc.scvi(
        data, n_latent=2, n_hidden=8, encoder=Encoder(2, 8, norm="batch"), decoder=pyrosc.Decoder(2, 8, norm="batch")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        first = pyrosc.fit(made, data, epochs=2, progress=False).program
        for p in first.parameters():
            p.requires_grad_(False)
        second = pyrosc.fit(first.replace(prior=FlowPrior(2)), data, epochs=2, progress=False).program

    for name, value in first.state_dict().items():
        if "prior" not in name:
            assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda c: MixturePrior(0), "k must be a whole number of at least 1, not 0"),
        (lambda c: MixturePrior(3, learned=False), "not learned needs its numbers"),
        (lambda c: MixturePrior(3, locs=[[0.0, 0.0]]), r"locs must have shape \(k, K\) with k=3"),
        (lambda c: MixturePrior(locs=[[0.0, 0.0]], scales=[[1.0, -1.0]]), "scales must be positive"),
        (lambda c: program(c, MixturePrior(locs=[[0.0] * 3], scales=[[1.0] * 3])), "3 columns, z has n_latent=2"),
        (lambda c: program(c, MixturePrior(2, labels=True)), "k=2 components for 3 labels"),
        (
            lambda c: program(c, Prior(dist.Normal, torch.zeros(7), torch.ones(7))),
            r"shape \(7,\), the networks take n_latent=2",
        ),
        (lambda c: FlowPrior(kind="planar"), 'kind must be "affine" or "spline"'),
        (lambda c: FlowPrior(0), "n_layers must be a whole number"),
        (lambda c: program(c, FlowPrior(), n_latent=1), "at least two"),
        (lambda c: VampPrior(-1), "k must be a whole number"),
        (
            lambda c: program(c, VampPrior(3), encoder=torch.nn.Linear(2, 2)),
            r"features\(\) and moments\(\); found Linear",
        ),
        (lambda c: pyrosc.Program(unlabelled_story, c, prior=FlowPrior()), "does not know how wide z is"),
    ],
)
def test_what_does_not_fit_is_explained(data, make, says):
    with pytest.raises(ValueError, match=says):
        make(data)


def unlabelled_story(cells, *, prior):
    prior(cells)


def test_labels_that_are_not_there_are_asked_for():
    from .conftest import small

    cells = Cells.from_anndata(small(40, 12))
    with pytest.raises(ProgramError, match=r"needs a label column: Cells.from_anndata\(adata, label="):
        program(cells, MixturePrior(labels=True))


def test_a_fixed_mixture_stays(data):
    prior = MixturePrior(locs=[[0.0, 0.0], [2.0, 2.0]], scales=[[1.0, 1.0], [1.0, 1.0]], learned=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(program(data, prior), data, epochs=2, progress=False)

    assert fit.program.parts["prior"].loc.tolist() == [[0.0, 0.0], [2.0, 2.0]]


def test_a_class_of_torch_itself_is_refused_by_name():
    with pytest.raises(ValueError, match="Prior takes pyro.distributions.Normal; this Normal is torch's own"):
        pyrosc.Prior(torch.distributions.Normal, 0.0, 1.0)
