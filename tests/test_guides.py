"""Completion: the guides that a Program makes find known posteriors at the default fit, and refuse what they cannot do."""

import math
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch.distributions import biject_to

import pyrosc
from pyrosc import Cells, Encoder, LatentLibrary, PoissonLikelihood, Prior, Program, ProgramError, PyroscWarning
from pyrosc.elbo import elbo_terms
from pyrosc.models import scvi as story
from pyrosc.training import _split

from .conftest import small


@pytest.fixture(scope="module")
def cells():
    return Cells.from_anndata(small(), batch="donor", label="cell_type")


def default_fit(program, cells, **options):
    """The default fit, without its remarks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, progress=False, **options)


def counts(n_cells, n_genes, seed=0, rate=5.0):
    return Cells.from_counts(np.random.default_rng(seed).poisson(rate, (n_cells, n_genes)))


def law_of(fit, site):
    return next(g for g in fit.program.completion.guides if g.site.name == site).law()


# ---- known posteriors, at the default fit ----------------------------------------------------------


def normal_normal(cells):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0).expand([20]).to_event(1))
    with cells.plate():
        pyro.sample("x", dist.Normal(mean, 2.0).to_event(1), obs=cells.x)


def test_normal_normal_finds_the_analytic_mean_and_sd():
    cells = counts(600, 20)
    fit = default_fit(Program(normal_normal, cells), cells)
    train = _split(cells, 0.1, 0)[0].x.double()
    precision = len(train) / 4 + 1 / 100
    mean, sd = train.sum(0) / 4 / precision, precision**-0.5

    law = law_of(fit, "mean").base_dist
    # 600 steps of 128 cells: each location is within a fraction of its posterior sd, each sd within a third; their
    # averages over twenty numbers are tighter.
    off = ((law.loc - mean) / sd).detach()
    assert off.abs().max() < 0.6
    assert off.square().mean().sqrt() < 0.25
    ratio = (law.scale / sd).detach()
    assert 0.7 < ratio.min()
    assert ratio.max() < 1.5
    assert float(ratio.log().mean().exp()) == pytest.approx(1, abs=0.2)
    # the twin that must fail: the guide was not there to begin with
    start = Program(normal_normal, cells).completion.guides[0].law().base_dist
    assert ((start.loc - mean) / sd).abs().median() > 10


@pytest.mark.parametrize("shape, rate", [(2.0, 1.0), (20.0, 3.0)])
def test_a_gamma_prior_without_data_comes_back(shape, rate):
    """The LogNormal nearest to Gamma(a, b) has mean a / b and log-sd 1 / sqrt(a); AutoNormal's bound gives half the mean."""

    def model(cells):
        level = pyro.sample("level", dist.Gamma(shape, rate).expand([40]).to_event(1))
        with cells.plate():
            pyro.sample("x", dist.Poisson(5 + 0 * level[:3]).to_event(1), obs=cells.x)

    cells = counts(600, 3)
    law = law_of(default_fit(Program(model, cells), cells), "level")

    # Forty numbers, each with the noise of one draw a step
    assert law.mean.mean().item() == pytest.approx(shape / rate, rel=0.03)
    assert law.mean.detach().numpy() == pytest.approx(shape / rate, rel=0.2)
    assert law.base_dist.scale.mean().item() == pytest.approx(shape**-0.5, rel=0.05)


def one_profile_model(cells, *, profile, library, likelihood):
    """The plainest story: one profile, a depth for each cell."""
    rho = pyro.sample("rho", profile())
    with cells.plate():
        total = pyro.sample("library", library(cells))
        pyro.sample("x", likelihood(total * rho), obs=cells.x)


def one_profile(cells, **parts):
    defaults = dict(
        profile=Prior(dist.Dirichlet, torch.ones(cells.n_genes)),
        library=Prior(dist.LogNormal, 7.0, 1.0),
        likelihood=PoissonLikelihood(),
    )
    return Program(one_profile_model, cells, **(defaults | parts))


def test_a_hint_is_given_only_where_it_fits(cells):
    """A prior is the right library of this story: an error elsewhere must not say otherwise."""
    with pytest.raises(ProgramError) as caught:
        one_profile(cells, profile=Prior(dist.Dirichlet, torch.ones(31))).check(cells)
    assert "LatentLibrary" not in str(caught.value)
    assert "31" in str(caught.value)


@pytest.fixture(scope="module")
def profile_fit():
    draw = np.random.default_rng(4)
    rho, total = draw.dirichlet(np.full(1000, 0.5)), draw.lognormal(7, 0.4, 600)
    with warnings.catch_warnings():  # some genes are never seen
        warnings.simplefilter("ignore", PyroscWarning)
        cells = Cells.from_counts(draw.poisson(total[:, None] * rho))
    return cells, total, default_fit(one_profile(cells), cells)


def test_one_profile_meets_its_exact_dirichlet_posterior(profile_fit):
    cells, _, fit = profile_fit
    exact = dist.Dirichlet(_split(cells, 0.1, 0)[0].x.double().sum(0) + 1)
    with torch.no_grad():
        drawn = law_of(fit, "rho").sample((4000,)).double()

    sd = exact.variance.sqrt()
    off = ((drawn.mean(0) - exact.mean) / sd).abs()
    assert off.median() < 0.3
    ratio = drawn.std(0) / sd
    assert float(ratio.median()) == pytest.approx(1, abs=0.2)
    assert ((ratio > 0.8) & (ratio < 1.25)).double().mean() > 0.8
    flat = biject_to(dist.Dirichlet(torch.ones(1000)).support)(torch.zeros(999)).double()  # the twin that must fail
    assert ((flat - exact.mean) / sd).abs().median() > 3


def test_intervals_of_a_completed_library_cover(profile_fit):
    cells, total, fit = profile_fit
    drawn = fit.draws("library", cells, 400)[..., 0]
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)

    covered = ((low < total) & (total < high)).mean()

    assert 0.85 < covered < 0.95
    narrow = np.quantile(drawn, [0.3, 0.7], axis=0)  # the twin: 40 % intervals do not
    assert ((narrow[0] < total) & (total < narrow[1])).mean() < 0.6


def test_intervals_of_a_latent_library_cover_in_scvi():
    adata = pyrosc.simulate.tissue(
        1500, 150, n_types=4, n_batches=2, depth=600, n_markers=30, effect=1.0, dispersion=50.0, seed=3
    )
    cells = Cells.from_anndata(adata, batch="batch")
    fit = default_fit(pyrosc.scvi(cells, n_latent=4, library=LatentLibrary()), cells)
    low, high = np.quantile(fit.draws("library", cells, 200)[..., 0], [0.05, 0.95], axis=0)
    truth = adata.obs["library"].to_numpy()

    # 1,500 cells: a standard error of 0.9 %. With the simulator's usual overdispersion it is about 80 %, as
    # LatentLibrary says.
    assert 0.84 < ((low < truth) & (truth < high)).mean() < 0.95


# ---- every support -------------------------------------------------------------------------------

SUPPORTS = {
    "real": (lambda: dist.Normal(2.0, 0.5), dist.Normal),
    "vector": (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.Normal),
    "matrix": (lambda: dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2), dist.Normal),
    "full normal": (lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), dist.Normal),
    "heavy": (lambda: dist.Cauchy(torch.zeros(2), 1.0).to_event(1), dist.Normal),
    "positive": (lambda: dist.Gamma(3.0, 1.0).expand([2]).to_event(1), dist.LogNormal),
    "half normal": (lambda: dist.HalfNormal(2.0), dist.LogNormal),
    "unit interval": (lambda: dist.Beta(torch.full((2,), 2.0), 3.0).to_event(1), dist.TransformedDistribution),
    "interval": (lambda: dist.Uniform(-1.0, 3.0), dist.TransformedDistribution),
    "simplex": (lambda: dist.Dirichlet(torch.full((4,), 2.0)), dist.TransformedDistribution),
    "tensor bounds": (
        lambda: dist.Uniform(torch.zeros(3), 2 * torch.ones(3)).to_event(1),
        dist.TransformedDistribution,
    ),
    "own bounds": (
        lambda: dist.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0])).to_event(1),
        dist.TransformedDistribution,
    ),
    "ordered": (
        lambda: dist.TransformedDistribution(
            dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
        ),
        dist.TransformedDistribution,
    ),
    "correlations": (lambda: dist.LKJCholesky(3, 2.0), dist.TransformedDistribution),
}


def plain(law):
    return law.base_dist if isinstance(law, dist.Independent) else law


@pytest.mark.parametrize("name", SUPPORTS)
@pytest.mark.parametrize("where", ["global", "local"])
def test_every_support_is_guided(cells, name, where):
    prior, family = SUPPORTS[name]

    def model(cells):
        if where == "global":
            pyro.sample("a", prior())
        with cells.plate():
            if where == "local":
                pyro.sample("a", prior())
            pyro.sample("x", dist.Poisson(1.0).expand([30]).to_event(1), obs=cells.x)

    program = Program(model, cells)
    program.check(cells)
    guide, trace = program.traces(cells)
    site = guide.nodes["a"]

    assert type(plain(site["fn"])) is family
    assert site["fn"].event_shape == trace.nodes["a"]["fn"].event_shape
    assert trace.nodes["a"]["fn"].support.check(site["value"]).all()
    loss = TraceMeanField_ELBO(max_plate_nesting=1).differentiable_loss(program.model, program.guide, cells)
    assert torch.isfinite(loss)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in program.completion.parameters())
    drawn = default_fit(program, cells, epochs=2).draws("a", cells[:5], 3)
    assert drawn.shape[: 2 if where == "local" else 1] == ((3, 5) if where == "local" else (3,))


def test_the_bound_is_that_of_trace_elbo_for_every_support(cells):
    """KL terms in closed form or by draws: their mean is the same, Jacobians included."""

    def model(cells):
        for name in ("positive", "unit interval", "simplex", "interval"):
            pyro.sample(name.replace(" ", "_"), SUPPORTS[name][0]())
        with cells.plate():
            pyro.sample("depth", dist.Gamma(3.0, 1.0))
            pyro.sample("x", dist.Poisson(1.0).expand([30]).to_event(1), obs=cells.x)

    program = Program(model, cells)
    with torch.no_grad():
        one, other = (
            torch.tensor([elbo(max_plate_nesting=1).loss(program.model, program.guide, cells) for _ in range(400)])
            for elbo in (TraceMeanField_ELBO, Trace_ELBO)
        )
    error = math.hypot(one.std() / 20, other.std() / 20)
    assert abs(one.mean() - other.mean()) < 5 * error


def test_starts_are_the_priors_median_and_a_tenth_of_its_sd(cells):
    def model(cells):
        pyro.sample("a", dist.Normal(40.0, 5.0).expand([200]).to_event(1))
        pyro.sample("b", dist.LogNormal(3.0, 0.5).expand([200]).to_event(1))
        with cells.plate():
            pyro.sample("x", dist.Poisson(1.0).expand([30]).to_event(1), obs=cells.x)

    a, b = (guide.law().base_dist for guide in Program(model, cells).completion.guides)

    # From 25 draws: a median is known to 1.25 sd / 5, averaged over 200 numbers
    assert a.loc.mean().item() == pytest.approx(40, abs=0.5)
    assert a.scale.mean().item() == pytest.approx(0.5, rel=0.15)
    assert b.loc.mean().item() == pytest.approx(3, abs=0.05)
    assert b.scale.mean().item() == pytest.approx(0.05, rel=0.15)


def test_rho_dispersion_and_library_start_at_moments(cells):
    program = one_profile(cells)
    program.start(cells)
    rho = next(g for g in program.completion.guides if g.site.name == "rho")
    profile = biject_to(rho.site.support)(rho.loc.detach())

    torch.testing.assert_close(profile, (cells.x.sum(0) + 1) / (cells.x.sum() + 30), rtol=1e-3, atol=1e-6)
    guide = poutine.trace(program.guide).get_trace(cells)
    torch.testing.assert_close(guide.nodes["library"]["fn"].base_dist.loc, cells.library.log(), rtol=1e-3, atol=1e-3)


# ---- completed guides of scVI ----------------------------------------------------------------------


def test_a_completed_z_is_as_good_as_the_guide_written_by_hand(fitted):
    _, cells, _ = fitted
    by_hand = pyrosc.scvi(cells, n_latent=4, n_hidden=32)
    parts = dict(by_hand.parts.items())
    shared = Program(story.model, cells, **parts)  # features of the part "encoder"
    parts.pop("encoder")
    own = Program(story.model, cells, **parts)  # features of a network that the completion makes

    assert shared.completion.encoder is None
    assert isinstance(own.completion.encoder, Encoder)
    for epochs, margin in ((1, 0.05), (15, 0.03)):
        found = [
            default_fit(p, cells, epochs=epochs).history["validation_elbo"].iloc[-1] for p in (by_hand, shared, own)
        ]
        assert found[1:] == pytest.approx([found[0]] * 2, rel=margin)


@pytest.mark.parametrize(
    "prior",
    [lambda: pyrosc.MixturePrior(4), lambda: pyrosc.VampPrior(4), lambda: pyrosc.FlowPrior(2),
     lambda: pyrosc.FlowPrior(2, "spline"), lambda: Prior(dist.StudentT, 5.0)],
    ids=["mixture", "vamp", "flow", "spline", "student"],
)  # fmt: skip
def test_every_prior_on_z_is_completed(cells, prior, tmp_path):
    parts = dict(pyrosc.scvi(cells, n_latent=3, n_hidden=8).parts.items()) | {"prior": prior()}
    fit = default_fit(Program(story.model, cells, **parts), cells, epochs=4)
    fit.save(tmp_path / "a.safetensors")

    assert fit.history["train_elbo"].iloc[-1] > fit.history["train_elbo"].iloc[0]
    again = pyrosc.load(tmp_path / "a.safetensors", model=story.model)
    np.testing.assert_array_equal(again.latent(cells), fit.latent(cells))


def test_features_are_computed_once_in_a_run(cells):
    program = pyrosc.scvi(cells, n_latent=3, n_hidden=8, library=LatentLibrary())
    calls = []
    program.parts["encoder"].layers.register_forward_hook(lambda *_: calls.append(1))

    program.guide(cells)

    assert len(calls) == 1  # z by hand and the library by completion


def test_globals_come_first_and_locals_last(cells):
    program = pyrosc.scvi(
        cells, n_latent=3, n_hidden=8, library=LatentLibrary(),
        dispersion=pyrosc.GeneDispersion(prior=Prior(dist.LogNormal, 1.0, 1.0)),
    )  # fmt: skip
    trace = poutine.trace(program.guide).get_trace(cells)
    drawn = [n for n, s in trace.nodes.items() if s["type"] == "sample" and n != "cells"]

    assert drawn == ["dispersion", "z", "library"]
    assert program.completion.names == ["dispersion", "library"]
    assert "LogNormal (completed)  analytic" in program.describe()


def test_replacing_a_part_keeps_completed_guides_that_still_fit(cells):
    program = default_fit(pyrosc.scvi(cells, n_latent=3, n_hidden=8, library=LatentLibrary()), cells, epochs=2).program
    other = program.replace(prior=pyrosc.MixturePrior(4))
    observed = program.replace(library=pyrosc.ObservedLibrary())

    for a, b in zip(program.completion.parameters(), other.completion.parameters()):
        assert torch.equal(a, b)
        assert a is not b
    assert observed.completion.names == []
    assert observed.replace(library=LatentLibrary()).completion.names == ["library"]


def test_a_users_own_svi_trains_completed_guides(cells):
    program = one_profile(cells).train()
    start = [p.clone() for p in program.completion.parameters()]
    svi = SVI(program.model, program.guide, pyro.optim.ClippedAdam({"lr": 0.01}), TraceMeanField_ELBO())
    with pyro.validation_enabled(True):
        losses = [svi.step(cells) for _ in range(40)]

    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert not any(torch.equal(a, b) for a, b in zip(start, program.completion.parameters()))
    assert not list(pyro.get_param_store())


def test_other_plates_become_mean_field_batch_shape(cells):
    def model(cells):
        with pyro.plate("programmes", 4):
            weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with cells.plate():
            with pyro.plate("programmes ", 4, dim=-2):
                use = pyro.sample("use", dist.Gamma(2.0, 1.0))
            pyro.sample(
                "x",
                dist.Poisson(1 + (weight.unsqueeze(-1) * use).sum(-2).exp().unsqueeze(-1))
                .expand([len(cells), 30])
                .to_event(1),
                obs=cells.x,
            )

    program = Program(model, cells)
    guide, trace = program.traces(cells)

    assert program.n_plates == 2
    assert guide.nodes["weight"]["fn"].batch_shape == trace.nodes["weight"]["fn"].batch_shape == (4,)
    assert guide.nodes["use"]["fn"].batch_shape == trace.nodes["use"]["fn"].batch_shape == (4, 120)
    for site in ("weight", "use"):
        plates = [{f.name for f in t.nodes[site]["cond_indep_stack"]} for t in (guide, trace)]
        assert plates[0] == plates[1]
    with pyro.validation_enabled(True):
        terms = elbo_terms(program, cells)
    assert terms.local_kl["use"].shape == (120,)
    fit = default_fit(program, cells, epochs=3)
    assert fit.draws("use", cells[:7], 5).shape == (5, 7, 4)
    assert fit.log_likelihood(cells[:7], 20).shape == (7,)


# ---- what cannot be completed ---------------------------------------------------------------------


def periodic(cells):
    pyro.sample("phase", dist.VonMises(0.0, 1.0))


def dependent(cells):
    top = pyro.sample("top", dist.Gamma(2.0, 1.0))
    pyro.sample("part", dist.Uniform(0.0, top))


def discrete(cells):
    pyro.sample("kind", dist.Categorical(torch.ones(3)))


def masked(cells):
    with cells.plate(), poutine.mask(mask=torch.tensor(False)):
        pyro.sample("depth", dist.Gamma(2.0, 1.0))


def scaled(cells):
    with cells.plate(), poutine.scale(scale=0.5):
        pyro.sample("depth", dist.Gamma(2.0, 1.0))


def global_enumerated(cells):
    pyro.sample("kind", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})


def sequential(cells):
    with cells.plate():
        pyro.sample("kind", dist.Categorical(torch.ones(3)), infer={"enumerate": "sequential"})


def endless(cells):
    with cells.plate():
        pyro.sample("kind", dist.Poisson(1.0), infer={"enumerate": "parallel"})


def enumerated_in_plates(cells):
    with cells.plate(), pyro.plate("genes", 4, dim=-2):
        pyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})


def in_place(cells):
    with cells.plate():
        kind = pyro.sample("kind", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        rate = torch.ones(len(cells))
        rate[kind == 1] = 2.0
        pyro.sample("x", dist.Poisson(rate.unsqueeze(-1).expand(-1, 30)).to_event(1), obs=cells.x)


def bound_by_cell(cells):
    with cells.plate():
        pyro.sample("depth", dist.Uniform(0.0, cells.library).to_event(1))


def no_plate(cells):
    pyro.sample("x", dist.Poisson(1.0).expand([len(cells), 30]).to_event(2), obs=cells.x)


def no_event_dim(cells):
    with cells.plate():
        pyro.deterministic("rho", torch.ones(len(cells), 30) / 30)


def no_to_event(cells):
    with cells.plate():
        pyro.sample("z", dist.Normal(torch.zeros(7), 1.0))


def forgot_obs(cells):
    with cells.plate():
        pyro.sample("x", dist.Poisson(1.0).expand([30]).to_event(1))


@pytest.mark.parametrize(
    "model, says",
    [
        (periodic, '"phase" is left out by the guide.*VonMises is periodic'),
        (dependent, '"part".*the support of Uniform depends on another site'),
        (discrete, '"kind".*Categorical is discrete.*"enumerate": "parallel"'),
        (masked, '"depth".*mask or scale handler'),
        (scaled, '"depth".*mask or scale handler'),
        (global_enumerated, '"kind" is to be enumerated, but is one for all cells'),
        (forgot_obs, 'draws "x" although there are counts: observe it'),
        (sequential, '"kind".*enumerate="sequential" is not known here'),
        (endless, '"kind".*Poisson has no finite list of values'),
        (enumerated_in_plates, '"kind" is to be enumerated, but stands in plates'),
        (in_place, r'cannot take all values of "kind" at once.*table\[site\].*no assignment in place'),
        (bound_by_cell, '"depth".*the support of Uniform differs from cell to cell'),
        (no_plate, "draws nothing in the plate of cells.*`with cells.plate"),
        (no_event_dim, r'"rho" is computed for each cell: .*event_dim=1'),
        (no_to_event, r"The numbers of one cell are one event: distribution.to_event\(1\)"),
    ],
)
def test_what_cannot_be_completed_is_refused_by_name(cells, model, says):
    with pytest.raises(ProgramError, match=says):
        Program(model, cells)


def test_a_support_that_moves_with_learned_numbers_is_refused(cells):
    class Top(pyrosc.Part):
        def __init__(self):
            super().__init__()
            self.top = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self):
            return self.top.exp()

    def model(cells, *, top):
        pyro.sample("part", dist.Uniform(0.0, top()))
        with cells.plate():
            pyro.sample("x", dist.Poisson(1.0).expand([30]).to_event(1), obs=cells.x)

    with pytest.raises(ProgramError, match='"part".*the support of Uniform moves with learned numbers'):
        Program(model, cells, top=Top())


def test_an_encoder_that_cannot_read_for_completed_sites_is_refused(cells):
    parts = dict(pyrosc.scvi(cells, n_latent=3, n_hidden=8).parts.items()) | {"encoder": torch.nn.Linear(30, 3)}

    with pytest.raises(ProgramError, match=r'"encoder" \(Linear\) is to guide .*"?z"?.*no features'):
        Program(story.model, cells, **parts)


def test_an_encoder_that_nothing_reads_is_refused(cells):
    with pytest.raises(ProgramError, match='no part "encoder" is used by normal_normal'):
        Program(normal_normal, counts(20, 20), encoder=Encoder(3))


# ---- what the story must not do --------------------------------------------------------------------


def test_a_story_that_reads_the_counts_twice_is_refused(cells):
    def totals(cells):
        with cells.plate():
            total = pyro.deterministic("library", cells.x.sum(-1, keepdim=True), event_dim=1)
            pyro.sample("x", dist.Poisson(total / 30).expand([len(cells), 30]).to_event(1), obs=cells.x)

    def means(cells):
        with cells.plate():
            pyro.sample("x", dist.Poisson(cells.x.mean(0) + 0.1).to_event(1), obs=cells.x)

    def fair(cells):
        with cells.plate():
            pyro.sample("x", dist.Poisson(cells.library / 30).expand([len(cells), 30]).to_event(1), obs=cells.x)

    with pytest.raises(ProgramError, match='reads cells.x to make "library".*use cells.library'):
        Program(totals, cells).check(cells)
    with pytest.raises(ProgramError, match='reads cells.x to make "x"'):
        Program(means, cells).check(cells)
    Program(fair, cells).check(cells)


def test_plates_of_other_sizes_and_handlers_on_one_side_are_named(cells):
    def model(cells):
        with cells.plate():
            pyro.sample("depth", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(1.0).expand([30]).to_event(1), obs=cells.x)

    def other_size(cells):
        with pyro.plate("cells", 1000, subsample=torch.arange(len(cells)), dim=-1):
            pyro.sample("depth", dist.LogNormal(0.0, 1.0))

    def annealed(cells):
        with cells.plate(), poutine.scale(scale=0.5):
            pyro.sample("depth", dist.LogNormal(0.0, 1.0))

    with pytest.raises(
        ProgramError, match='"depth" counts 8.33333 times in the guide and 1 times in the model.*plates differ in size'
    ):
        Program(model, cells, other_size).check(cells)
    with pytest.raises(ProgramError, match='"depth" counts 0.5 times in the guide.*a scale handler is around one'):
        Program(model, cells, annealed).check(cells)


def test_a_guide_without_gradients_is_refused(cells):
    def model(cells):
        with cells.plate():
            kind = pyro.sample("kind", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Poisson(1.0 + kind.unsqueeze(-1)).expand([len(cells), 30]).to_event(1), obs=cells.x)

    def guide(cells):
        with cells.plate():
            pyro.sample("kind", dist.Categorical(torch.ones(len(cells), 2)))

    with pytest.raises(ProgramError, match='"kind": the guide draws it from Categorical, through which no gradient'):
        Program(model, cells, guide).check(cells)


def test_a_guide_wider_than_the_prior_is_refused(cells):
    def story_with(prior):
        def model(cells):
            with cells.plate():
                pyro.sample("share", prior)
                pyro.sample("x", dist.Poisson(1.0).expand([30]).to_event(1), obs=cells.x)

        return model

    def guide_with(law):
        def guide(cells):
            with cells.plate():
                pyro.sample("share", law)

        return guide

    for prior, law, says in (
        (dist.Beta(2.0, 2.0), dist.LogNormal(-1.0, 0.1), "LogNormal, positive.*Beta, between 0 and 1"),
        (dist.Uniform(0.0, 5.0), dist.Normal(2.0, 0.1), "Normal, all reals.*Uniform, between 0 and 5"),
    ):
        with pytest.raises(ProgramError, match=says):
            Program(story_with(prior), cells, guide_with(law)).check(cells)
    Program(story_with(dist.Gamma(2.0, 1.0)), cells, guide_with(dist.Uniform(0.5, 2.0))).check(cells)


def test_the_mean_field_check_is_silent_on_harmless_orders(cells):
    """Model a -> b -> c, guide b, c, then a from c: KL(q(c) || p(c | b)) is right, as b does not depend on c."""

    def model(cells):
        with cells.plate():
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("c", dist.Normal(b, 1.0))
            pyro.sample("x", dist.Poisson(1.0).expand([30]).to_event(1), obs=cells.x)

    def guide(cells):
        with cells.plate():
            pyro.sample("b", dist.Normal(torch.zeros(len(cells)), 1.0))
            c = pyro.sample("c", dist.Normal(torch.zeros(len(cells)), 1.0))
            pyro.sample("a", dist.Normal(c, 1.0))

    Program(model, cells, guide).check(cells)


def test_what_is_observed_of_all_cells_counts_once(cells):
    def model(cells):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("measured", dist.Normal(mean, 0.1), obs=torch.tensor(30.0))
        with cells.plate():
            pyro.sample("x", dist.Poisson(2.0 + 0 * mean).expand([30]).to_event(1), obs=cells.x)

    program = Program(model, cells)
    with program.driven(0), torch.no_grad():
        terms = elbo_terms(program, cells)
        loss = TraceMeanField_ELBO(max_plate_nesting=1)
        whole = -torch.tensor([loss.loss(program.model, program.guide, cells) for _ in range(50)]).mean()
        ours = torch.stack([t.local.sum() + t.global_observed - sum(t.global_kl.values())
                            for t in (elbo_terms(program, cells) for _ in range(50))]).mean()  # fmt: skip

    by_hand = dist.Poisson(2.0).log_prob(cells.x).sum(1)
    torch.testing.assert_close(terms.local, by_hand, rtol=1e-4, atol=1e-3)
    assert float(terms.global_observed) < -1000
    assert float(ours) == pytest.approx(float(whole), rel=0.05)


# ---- discrete sites that are summed out --------------------------------------------------------------


def two_kinds(cells, *, rates):
    """Each cell is of one of two kinds; a scale of its own on top."""
    with cells.plate():
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        depth = pyro.sample("depth", dist.Gamma(20.0, 20.0))
        pull = pyro.sample("pull", dist.Normal(torch.tensor([-1.0, 1.0])[kind], 1.0))
        rate = rates()[kind] * depth.unsqueeze(-1) * (0.1 * pull).exp().unsqueeze(-1)
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)


class Rates(pyrosc.Part):
    def __init__(self):
        super().__init__()
        self.log_rate = torch.nn.Parameter(torch.stack([torch.zeros(8), torch.linspace(-1, 2, 8)]))

    def forward(self):
        return self.log_rate.exp()


@pytest.fixture(scope="module")
def kinds():
    draw = np.random.default_rng(0)
    kind = (draw.random(400) < 0.7).astype(int)
    rate = np.stack([np.full(8, 1.0), np.exp(np.linspace(-1, 2, 8))])[kind]
    cells = Cells.from_counts(draw.poisson(rate * draw.gamma(20, 1 / 20, 400)[:, None]) + (np.arange(8) == 0))
    return kind, cells


def test_the_bound_of_an_enumerated_story_is_trace_enum_elbos(kinds):
    _, cells = kinds
    few = cells[:30]
    program = Program(two_kinds, few, rates=Rates())
    assert program.enumerated == ["kind"]
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    with torch.no_grad():
        ours = torch.tensor([elbo_terms(program, few).local.sum() for _ in range(300)])
        theirs = torch.tensor([-elbo.loss(program.model, program.guide, few) for _ in range(300)])

    error = math.hypot(ours.std() / 300**0.5, theirs.std() / 300**0.5)
    assert abs(ours.mean() - theirs.mean()) < 5 * error


def test_an_enumerated_story_is_fitted_and_finds_the_kinds(kinds):
    kind, cells = kinds
    program = Program(two_kinds, cells, rates=Rates())
    fit = default_fit(program, cells, epochs=60)

    drawn = fit.draws("kind", cells, 50)
    assert drawn.shape == (50, 400)
    called = drawn.mean(0) > 0.5
    assert (called == kind).mean() > 0.9
    assert fit.history["train_elbo"].iloc[-1] > fit.history["train_elbo"].iloc[0]
    assert fit.log_likelihood(cells[:50], 200).mean() > fit.elbo(cells[:50], n_draws=50).mean()
    with pytest.raises(ProgramError, match='sums out "kind", which Pyro\'s Predictive'):
        fit.predictive(3)
    assert "summed out" in next(line for line in program.describe().splitlines() if line.startswith("kind"))


def test_draws_of_a_summed_out_site_follow_its_exact_law(kinds):
    _, cells = kinds
    program = Program(two_kinds, cells, rates=Rates())
    fit = pyrosc.Fit(program, pd.DataFrame(), {"n_cells": 1, "state": "finished", "best_epoch": 0})
    few = cells[:3]

    found = fit.draws("kind", few, 4000).mean(0)

    # p(kind | x) averaged over draws of the guide, by hand
    with fit.program.driven(5), torch.no_grad():
        guide = poutine.trace(program.guide).get_trace
        odds = []
        for _ in range(1500):
            nodes = guide(few).nodes
            depth, pull = nodes["depth"]["value"].numpy(), nodes["pull"]["value"].numpy()
            table = []
            for k in (0, 1):
                rate = Rates()().detach().numpy()[k] * depth[:, None] * np.exp(0.1 * pull)[:, None]
                log = np.log([0.3, 0.7][k]) + stats.norm.logpdf(pull, [-1, 1][k], 1)
                table.append(log + stats.poisson.logpmf(few.x.numpy(), rate).sum(1))
            odds.append(1 / (1 + np.exp(table[0] - table[1])))
    assert found == pytest.approx(np.mean(odds, 0), abs=5 * (0.5 / 4000**0.5 + 0.5 / 1500**0.5))
