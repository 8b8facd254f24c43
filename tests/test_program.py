"""Program: what a story is bound to, what it refuses, and that it is a Pyro program like any other."""

import ast
import inspect
import re
import threading
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import nn

import pyrosc
from pyrosc import (
    Cells,
    Decoder,
    Encoder,
    NBLikelihood,
    Part,
    PoissonLikelihood,
    Prior,
    Program,
    ProgramError,
    ZINBLikelihood,
)
from pyrosc.elbo import elbo_terms
from pyrosc.models import scvi as story


@pytest.fixture
def cells(adata):
    return Cells.from_anndata(adata, batch="donor", label="cell_type", categorical=["condition"])


def tiny(cells, **options):
    return pyrosc.scvi(cells, **(dict(n_latent=3, n_hidden=8) | options))


# ---- the story of scVI -------------------------------------------------------------------------


def test_the_sites_are_as_documented(cells):
    program = tiny(cells)
    _, trace = program.traces(cells)
    documented = re.findall(r"^    (\w+) : \((n, \w+)\), (.*)$", inspect.getdoc(story.model).split("Sites")[1], re.M)
    documented = documented or re.findall(
        r"^(\w+) : \((n, \w+)\), (.*)$", inspect.getdoc(story.model).split("Sites")[1], re.M
    )
    sizes = {"n": len(cells), "K": 3, "G": 30, "1": 1}

    drawn = [name for name, site in trace.nodes.items() if site["type"] == "sample" and name != "cells"]
    assert [name for name, _, _ in documented] == drawn == ["z", "library", "rho", "x"]
    for name, shape, text in documented:
        site = trace.nodes[name]
        assert tuple(site["value"].shape) == tuple(sizes[s] for s in shape.split(", "))
        assert ("observed" in text) == (name == "x")
        assert [f.name for f in site["cond_indep_stack"]] == ["cells"]
        if "sums to 1" in text:
            torch.testing.assert_close(site["value"].sum(-1), torch.ones(len(cells)))
        if "positive" in text:
            assert (site["value"] > 0).all()


def test_the_density_is_the_one_on_paper(cells):
    program = tiny(cells)
    guide, trace = program.traces(cells)
    z = guide.nodes["z"]["value"]
    # written out by hand, without our parts
    parts = program.parts
    levels = torch.cat([nn.functional.one_hot(cells.codes[c], 2) for c in ("donor", "condition")], -1)
    hidden = nn.functional.linear(
        torch.cat([z, levels], -1), parts["decoder"].layers[0].linear.weight, parts["decoder"].layers[0].linear.bias
    )
    norm = parts["decoder"].layers[0].norm.norm
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    hidden = torch.relu(hidden * norm.weight + norm.bias)
    rho = torch.softmax(hidden @ parts["decoder"].out.weight.T + parts["decoder"].out.bias, -1)
    x = cells.x
    mean = x.sum(-1, keepdim=True) * rho
    theta = parts["dispersion"].log_dispersion.exp()
    nb = (
        torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        + theta * (theta / (theta + mean)).log() + x * (mean / (theta + mean)).log()
    )  # fmt: skip
    expected = nb.sum() + dist.Normal(0, 1).log_prob(z).sum()

    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-5, atol=1e-2)


def test_the_model_fits_on_a_screen():
    tree = ast.parse(inspect.getsource(story.model))
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.stmt)]

    assert len(statements) - 2 <= 15  # less the def and its docstring
    assert not re.search(r"\bif\b", inspect.getsource(story.model).split('"""')[-1])


def test_a_minibatch_stands_for_the_whole(cells):
    program = tiny(cells)
    batch = cells.minibatch(range(30))
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(program.model, {"z": torch.zeros(30, 3)})).get_trace(batch)
        alone = poutine.trace(poutine.condition(program.model, {"z": torch.zeros(30, 3)})).get_trace(cells[:30])

    torch.testing.assert_close(trace.log_prob_sum(), alone.log_prob_sum() * 120 / 30)


def test_networks_take_draws_in_front(cells):
    for likelihood in (NBLikelihood(), ZINBLikelihood(), PoissonLikelihood()):
        program = tiny(cells, likelihood=likelihood)
        torch.manual_seed(0)
        with pyro.plate("draws", 5, dim=-2):
            guide = poutine.trace(program.guide).get_trace(cells)
            trace = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(cells)
        trace.compute_log_prob()
        one = poutine.trace(poutine.condition(program.model, {"z": guide.nodes["z"]["value"][2]})).get_trace(cells)
        one.compute_log_prob()

        assert trace.nodes["x"]["log_prob"].shape == (5, 120)
        torch.testing.assert_close(trace.nodes["x"]["log_prob"][2], one.nodes["x"]["log_prob"], rtol=1e-4, atol=1e-3)


def test_the_decoder_sees_the_batch_and_the_encoder_does_not(cells):
    program = tiny(cells)
    encoder, decoder = program.parts["encoder"], program.parts["decoder"]
    z = torch.zeros(120, 3)

    assert not torch.allclose(decoder(z, cells)[0], decoder(z, cells.do(donor="d1"))[0])
    assert torch.equal(encoder(cells)[0], encoder(cells.do(donor="d1"))[0])
    seeing = tiny(cells, encoder=Encoder(3, 8, covariates=True)).parts["encoder"]
    assert not torch.allclose(seeing(cells)[0], seeing(cells.do(donor="d1"))[0])


def test_given_size_factors_make_rho_a_rate(adata):
    adata.obs["depth"] = adata.X.toarray().sum(1) / 10
    cells = Cells.from_anndata(adata, size_factor="depth")
    program = tiny(cells)
    program.start(cells)
    _, trace = program.traces(cells)

    torch.testing.assert_close(
        trace.nodes["library"]["value"].squeeze(-1), torch.tensor(adata.obs["depth"].to_numpy()).float()
    )
    rho = trace.nodes["rho"]["value"]
    assert (rho.sum(-1) > 2).all()  # about ten counts per unit, not one
    assert float(program.parts["decoder"].out.bias.exp().log1p().sum()) == pytest.approx(10, rel=0.05)


def test_starting_values_are_the_average_profile_and_moments(adata):
    cells = Cells.from_anndata(adata)
    program = tiny(cells)
    program.start(cells)
    x, depth = adata.X.toarray().astype(float), adata.X.toarray().sum(1, keepdims=True)
    share = x.sum(0) / depth.sum()
    excess = ((x - depth * share) ** 2).sum(0) - (depth * share).sum(0)
    moment = (share**2 * (depth**2).sum()) / excess

    bias = program.parts["decoder"].out.bias.detach().softmax(-1).numpy()
    assert bias == pytest.approx(share, rel=1e-2)
    found = program.parts["dispersion"]().detach().numpy()
    inside = (excess > 0) & (moment > 0.1) & (moment < 100)
    assert found[inside] == pytest.approx(moment[inside], rel=1e-3)


# ---- parts -------------------------------------------------------------------------------------


def test_swapping_a_prior_moves_only_its_own_term(cells):
    default = tiny(cells)
    laplace = default.replace(prior=Prior(dist.Laplace, 0.0, 1.0))
    z = torch.randn(120, 3)

    def log_joint(program):
        return poutine.trace(poutine.condition(program.model, {"z": z})).get_trace(cells).log_prob_sum()

    change = (dist.Laplace(0.0, 1.0).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)).sum()
    torch.testing.assert_close(log_joint(laplace) - log_joint(default), change, rtol=1e-4, atol=1e-2)


def test_open_priors_take_their_size_from_their_place(cells):
    program = tiny(cells, prior=Prior(dist.StudentT, 5.0))
    assert program.parts["prior"]().event_shape == (3,)
    assert program.replace(prior=Prior(dist.Laplace, 0.0, 1.0)).parts["prior"]().event_shape == (3,)
    assert Prior(dist.Normal, torch.zeros(4), torch.ones(4), size=4)().event_shape == (4,)
    assert Prior(dist.Dirichlet, torch.ones(7))().event_shape == (7,)
    with pytest.raises(ValueError, match="distribution class"):
        Prior("Normal", 0, 1)
    with pytest.raises(ValueError, match="scale"):
        Prior(dist.Normal, 0.0, -1.0)


def test_replace_keeps_the_weights_of_the_other_parts(cells):
    program = tiny(cells)
    other = program.replace(likelihood=ZINBLikelihood())

    for name in ("encoder", "decoder", "dispersion"):
        for a, b in zip(program.parts[name].parameters(), other.parts[name].parameters()):
            assert torch.equal(a, b)
            assert a is not b
    assert isinstance(program.parts["likelihood"], NBLikelihood)


def test_parts_handed_in_are_copied(cells):
    decoder = Decoder(3, 8)
    one, other = tiny(cells, decoder=decoder), tiny(cells, decoder=decoder)

    assert not list(decoder.parameters())
    assert one.parts["decoder"] is not other.parts["decoder"]


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator(cells):
    state = torch.get_rng_state()
    one, other, third = tiny(cells, seed=3), tiny(cells, seed=3), tiny(cells, seed=4)

    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), third.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_part_may_have_any_name(cells):
    def model(cells, *, half, values, type):
        with cells.plate():
            z = pyro.sample("z", half())
            pyro.sample("x", type(values.exp() * (1 + 0 * z.sum(-1, keepdim=True))), obs=cells.x)

    def guide(cells, *, half):
        with cells.plate():
            pyro.sample("z", half())

    class Values(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(30))

        def exp(self):
            return self.weight.exp()

    program = Program(
        model, cells, guide, half=Prior(dist.Normal, 0.0, 1.0, size=2), values=Values(), type=PoissonLikelihood()
    )

    assert set(program.parts) == {"half", "values", "type"}
    assert [n for n, _ in program.named_parameters()] == ["parts.values.weight"]
    assert torch.isfinite(elbo_terms(program, cells).local).all()


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(piror=Prior(dist.Normal, 0.0, 1.0)), 'no part "piror".*Did you mean "prior"'),
        (dict(n_laten=4), 'no part "n_laten".*Did you mean "n_latent"'),
        (dict(prior="normal"), 'part "prior" must be an nn.Module, not str'),
        (dict(decoder=Decoder(4)), 'n_latent is .* in part "decoder".* in part "encoder"|n_latent is .* in part'),
        (dict(library=pyrosc.GivenLibrary()), "needs size factors"),
    ],
)
def test_parts_that_do_not_fit_are_explained(cells, change, says):
    with pytest.raises(ProgramError, match=says):
        tiny(cells, **change)


def test_replacing_a_size_says_what_else_must_be_replaced(cells):
    zinb = tiny(cells, likelihood=ZINBLikelihood())

    with pytest.raises(
        ProgramError, match='"likelihood" was built for n_hidden=8, which is now 16: replace it as well'
    ):
        zinb.replace(decoder=Decoder(3, 16))
    zinb.replace(decoder=Decoder(3, 16), likelihood=ZINBLikelihood()).check(cells)
    with pytest.raises(ProgramError, match='"prior" was built for n_latent=3, which is now 5'):
        zinb.replace(encoder=Encoder(5, 8), decoder=Decoder(5, 8))
    wider = zinb.replace(encoder=Encoder(5, 8), decoder=Decoder(5, 8), prior=Prior(dist.Normal, 0.0, 1.0))
    assert wider.parts["prior"]().event_shape == (5,)


def test_a_missing_part_is_named(cells):
    with pytest.raises(ProgramError, match='asks for .*"decoder".*Given: "prior"'):
        Program(story.model, cells, story.guide, prior=Prior(dist.Normal, 0.0, 1.0))


def test_nb_without_a_dispersion_is_refused_and_poisson_is_not(cells):
    with pytest.raises(ProgramError, match="NBLikelihood needs a dispersion.*PoissonLikelihood"):
        tiny(cells, dispersion=None).check(cells)
    tiny(cells, dispersion=None, likelihood=PoissonLikelihood()).check(cells)


def test_one_gene_has_no_shares():  # row 10 of the faults
    cells = Cells.from_counts([[1], [2]])

    with pytest.raises(ProgramError, match="shares of a single gene are always 1"):
        tiny(cells)


# ---- what model and guide must agree on --------------------------------------------------------


def simple(cells, model=None, guide=None, **parts):
    def own_model(cells, *, likelihood):
        with cells.plate():
            total = pyro.sample("library", dist.Gamma(2.0, 0.01).expand([1]).to_event(1))
            pyro.sample("x", likelihood((total / 30).expand(-1, 30)), obs=cells.x)

    def own_guide(cells):
        with cells.plate():
            pyro.sample("library", dist.LogNormal(torch.zeros(len(cells), 1), 1.0).to_event(1))

    return Program(model or own_model, cells, guide or own_guide, **({"likelihood": PoissonLikelihood()} | parts))


def test_a_story_of_ones_own_is_checked_and_sound(cells):
    simple(cells).check(cells.minibatch(range(10)))


def test_a_site_of_the_guide_that_the_model_lacks_is_named(cells):
    def guide(cells):
        with cells.plate():
            pyro.sample("depth", dist.LogNormal(torch.zeros(len(cells), 1), 1.0).to_event(1))

    with pytest.raises(
        ProgramError, match='guide draws "depth" but the model does not. Model: library, x. Guide: depth'
    ):
        simple(cells, guide=guide).check(cells)


def test_a_guide_beyond_the_support_is_named(cells):
    def guide(cells):
        with cells.plate():
            pyro.sample("library", dist.Normal(torch.full((len(cells), 1), 100.0), 0.1).to_event(1))

    with pytest.raises(
        ProgramError, match=r'site "library": the guide \(Normal, all reals\).*Gamma, positive.*LogNormal'
    ):
        simple(cells, guide=guide).check(cells)


def test_a_site_of_the_wrong_width_is_named(cells):  # row 70 of the faults
    def model(cells, *, profile, likelihood):
        rho = pyro.sample("rho", profile())
        with cells.plate():
            pyro.sample("x", likelihood(cells.library * rho), obs=cells.x)

    def guide(cells, *, profile):
        pyro.sample("rho", profile())
        with cells.plate():
            pass

    program = Program(
        model, cells, guide, profile=Prior(dist.Dirichlet, torch.ones(29)), likelihood=PoissonLikelihood()
    )

    with pytest.raises(ProgramError, match='site "x": the story gives 29 genes, the data have 30.*"rho"'):
        program.check(cells)


def test_a_forgotten_plate_is_named(cells):
    def model(cells, *, likelihood):
        total = pyro.sample("library", dist.Gamma(2.0, 0.01).expand([len(cells), 1]).to_event(1))
        with cells.plate():
            pyro.sample("x", likelihood((total / 30).expand(-1, 30)), obs=cells.x)

    def nowhere(cells, *, likelihood):
        pyro.sample("x", likelihood(cells.library.expand(-1, 30) / 30), obs=cells.x)

    def guide(cells):
        pyro.sample("library", dist.LogNormal(torch.zeros(len(cells), 1), 1.0).to_event(1))

    with pytest.raises(ProgramError, match=r'the guide draws "library" for each cell, but outside.*cells\.plate'):
        simple(cells, model, guide).check(cells)
    with pytest.raises(ProgramError, match=r'the model draws "library" for each cell, but outside.*cells\.plate'):
        simple(cells, model).check(cells)
    with pytest.raises(ProgramError, match="draws nothing in the plate of cells"):
        Program(nowhere, cells, likelihood=PoissonLikelihood())


def test_pyro_param_and_a_forgotten_obs_are_named(cells):
    def by_param(cells, *, likelihood):
        rate = pyro.param("rate", torch.ones(30))
        with cells.plate():
            total = pyro.sample("library", dist.Gamma(2.0, 0.01).expand([1]).to_event(1))
            pyro.sample("x", likelihood(total * rate), obs=cells.x)

    def unobserved(cells, *, likelihood):
        with cells.plate():
            total = pyro.sample("library", dist.Gamma(2.0, 0.01).expand([1]).to_event(1))
            pyro.sample("x", likelihood((total / 30).expand(-1, 30)))

    with pytest.raises(ProgramError, match='the model makes a parameter "rate" by pyro.param.*Hand it over as a part'):
        simple(cells, by_param).check(cells)
    pyro.clear_param_store()
    with pytest.raises(ProgramError, match=r"observe it, pyro.sample\(.*obs=cells.x"):
        simple(cells, unobserved).check(cells)


def test_an_anndata_or_a_class_in_the_wrong_place_is_explained(cells, adata):
    with pytest.raises(TypeError, match="expected Cells, not AnnData.*from_anndata"):
        pyrosc.scvi(adata)
    with pytest.raises(ProgramError, match=r"call it: likelihood=NBLikelihood\(\)"):
        tiny(cells, likelihood=NBLikelihood)
    with pytest.raises(ProgramError, match=r"pyrosc\.Prior\(dist\.Normal"):
        tiny(cells, prior=dist.Normal(0.0, 1.0))


def test_the_mean_field_condition_is_an_error_that_names_both_sites(cells):
    def model(cells, *, likelihood):
        with cells.plate():
            u = pyro.sample("u", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            v = pyro.sample("v", dist.Normal(u, 1.0).to_event(1))
            pyro.sample("x", likelihood(v.exp().expand(-1, 30)), obs=cells.x)

    def against(cells):
        with cells.plate():
            v = pyro.sample("v", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))
            pyro.sample("u", dist.Normal(v, 1.0).to_event(1))

    def along(cells):
        with cells.plate():
            pyro.sample("v", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))
            pyro.sample("u", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))

    with pytest.raises(ProgramError, match='model draws "v" from "u", but the guide draws "u" from "v"'):
        simple(cells, model, against).check(cells)
    simple(cells, model, along).check(cells)  # another order, but no dependence: harmless


# ---- a Pyro program like any other --------------------------------------------------------------


def test_trace_condition_and_do_work(cells):
    program = tiny(cells)
    z = torch.ones(120, 3)

    conditioned = poutine.trace(pyro.condition(program.model, {"z": z})).get_trace(cells)
    done = poutine.trace(pyro.do(program.model, {"z": z})).get_trace(cells)

    assert torch.equal(conditioned.nodes["z"]["value"], z)
    torch.testing.assert_close(done.nodes["rho"]["value"], conditioned.nodes["rho"]["value"])


def test_predictive_draws_counts(cells):
    program = tiny(cells)
    predictive = Predictive(
        poutine.uncondition(program.model), guide=program.guide, num_samples=4, return_sites=["x", "rho"]
    )

    drawn = predictive(cells)

    assert drawn["x"].shape == drawn["rho"].shape == (4, 120, 30)
    assert not torch.equal(drawn["x"][0], cells.x)


def test_render_model_and_describe_show_the_graph(cells):
    program = tiny(cells)
    graph = pyro.render_model(program.model, model_args=(cells,))
    text = program.describe()

    assert "cells" in graph.source
    assert re.search(r"^z +cells +n \| 3 +Normal +Normal +analytic$", text, re.M)
    assert re.search(r"^x +cells +n \| 30 +NegativeBinomial +observed$", text, re.M)
    assert "rho <- z" in text
    assert "donor (2)" in text
    mixed = program.replace(prior=Prior(dist.StudentT, 5.0)).describe()
    assert re.search(r"^z +cells +n \| 3 +StudentT +Normal +Monte Carlo$", mixed, re.M)


def test_nuts_runs_on_a_few_cells_with_the_decoder_fixed(cells):
    program = tiny(cells)
    program.requires_grad_(False)
    few = cells[:3]

    mcmc = MCMC(NUTS(program.model), num_samples=30, warmup_steps=20, disable_progbar=True)
    mcmc.run(few)

    assert mcmc.get_samples()["z"].shape == (30, 3, 3)


def test_a_users_own_svi_trains_it_and_the_store_stays_empty(cells):
    program = tiny(cells)
    program.start(cells)
    before = [p.detach().clone() for p in program.parameters()]
    svi = SVI(program.model, program.guide, ClippedAdam({"lr": 1e-2}), TraceMeanField_ELBO())
    program.train()

    losses = [svi.step(cells.minibatch(torch.randint(120, (40,)))) / 120 for _ in range(60)]

    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(not torch.equal(a, b) for a, b in zip(before, program.parameters()))
    assert len(pyro.get_param_store()) == 0


def test_two_programs_under_svi_never_meet(cells):
    def train(programs):
        svis = [SVI(p.model, p.guide, ClippedAdam({"lr": 1e-2}), TraceMeanField_ELBO()) for p in programs]
        generators = [torch.Generator().manual_seed(i) for i in range(len(programs))]
        for step in range(10):
            for svi, generator in zip(svis, generators):
                torch.manual_seed(step)
                svi.step(cells.minibatch(torch.randint(120, (40,), generator=generator)))

    alone, first, second = tiny(cells, seed=1), tiny(cells, seed=1), tiny(cells, seed=2)
    train([alone])
    train([first, second])

    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), first.parameters()))


def test_a_program_is_in_eval_mode(cells):
    program = tiny(cells)

    assert not any(module.training for module in program.modules())


def test_generate_draws_from_the_prior_and_pins_what_is_fixed(cells):
    program = tiny(cells)
    drawn = program.generate(cells, fixed={"z": torch.zeros(120, 3)}, seed=1)
    made_up = program.generate(7, seed=1)

    assert drawn["z"].abs().sum() == 0
    torch.testing.assert_close(drawn["library"], cells.library)
    assert (drawn["x"] >= 0).all()
    with pytest.raises(ValueError, match='fixed= names "zz"'):
        program.generate(cells, fixed={"zz": torch.zeros(1)})
    assert torch.equal(drawn["x"], program.generate(cells, fixed={"z": torch.zeros(120, 3)}, seed=1)["x"])
    assert made_up["x"].shape == (7, 30)
    mean = program.generate(5000, seed=2)["x"].sum(-1).mean()
    # totals of made-up cells follow the schema: 5 standard errors of their mean
    assert abs(float(mean) - float(cells.library.mean())) < 5 * float(cells.library.std()) / 5000**0.5 + 1.0


def test_wrong_values_to_pin_are_explained(cells):
    program = tiny(cells)

    drawn = program.generate(cells, fixed={"z": torch.zeros(120, 3).numpy()})
    assert torch.equal(drawn["z"], torch.zeros(120, 3))
    for arguments, says in (
        (dict(cells=0), "at least 1, not 0"),
        (dict(cells="many"), "a number of cells"),
        (dict(cells=cells, fixed={"zz": torch.zeros(1)}), 'names "zz", not a site of scvi.*Did you mean "z"'),
        (
            dict(cells=cells, fixed={"z": torch.zeros(120, 4)}),
            r'fixed\["z"\] has shape \(120, 4\), the site \(120, 3\)',
        ),
    ):
        with pytest.raises(ValueError, match=says):
            program.generate(**arguments)


def test_a_program_in_double_precision_goes_on_in_it(cells, tmp_path):
    program = tiny(cells, library=pyrosc.LatentLibrary()).double()
    other = program.replace(
        prior=pyrosc.VampPrior(3), dispersion=pyrosc.GeneDispersion(Prior(dist.LogNormal, 0.0, 1.0))
    )

    assert {p.dtype for p in other.parameters()} == {torch.float64}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pyrosc.PyroscWarning)
        fit = pyrosc.fit(other, cells, epochs=2, progress=False)
    assert {p.dtype for p in fit.program.parameters()} == {torch.float64}
    assert other.describe()
    assert other.generate(5)["x"].shape == (5, 30)
    assert fit.elbo(cells).dtype == fit.latent(cells).dtype == "float64"
    fit.save(tmp_path / "a.safetensors")
    again = pyrosc.load(tmp_path / "a.safetensors")
    assert (again.elbo(cells[:5]) == fit.elbo(cells[:5])).all()


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(library=Prior(dist.LogNormal, 7.0, 1.0)), r"for a prior on it, library=LatentLibrary\(7.0, 1.0\)"),
        (dict(dispersion=Prior(dist.LogNormal, 1.0, 1.0)), r"dispersion=GeneDispersion\(prior=Prior"),
        (dict(prior=Prior(dist.Normal, 0.0, 1.0, size=7)), r"shape \(7,\), the networks take n_latent=3"),
    ],
)
def test_common_slips_get_a_hint(cells, change, says):
    with pytest.raises(ProgramError, match=says):
        tiny(cells, **change)


def test_parts_that_were_made_wrongly_are_explained(cells):
    class Unmade(nn.Module):
        def __init__(self):
            pass

    class NoCells(Part):
        def forward(self):
            return dist.Normal(0.0, 1.0).expand([3]).to_event(1)

    with pytest.raises(ProgramError, match=r"does not call super\(\).__init__\(\)"):
        tiny(cells, likelihood=Unmade())
    with pytest.raises(ProgramError, match=r'"def forward\(self, cells=None\)"'):
        tiny(cells, prior=NoCells())
    with pytest.raises(ValueError, match="argument m of a part is an array.*register_buffer"):
        Part(m=torch.zeros(4))


def test_no_dispersion_can_be_said_as_none_later_too(cells):
    poisson = tiny(cells).replace(likelihood=PoissonLikelihood(), dispersion=None)

    assert isinstance(poisson.parts["dispersion"], pyrosc.NoDispersion)


def test_a_story_that_reads_samples_wants_known_ones(cells, adata):
    def model(cells):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0).expand([2, 30]).to_event(2))
        with cells.plate():
            rho = pyro.deterministic("rho", effect[cells.sample].softmax(-1), event_dim=1)
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    with pytest.raises(ProgramError, match=r"no sample column: Cells.from_anndata\(adata, sample="):
        Program(model, cells)
    of_donors = Cells.from_anndata(adata, sample="donor")
    fit = pyrosc.fit(Program(model, of_donors), of_donors, epochs=1, progress=False)
    assert fit.expression(of_donors[:3], n_draws=2).attrs["uncertainty"] == "z and global sites"
    new = adata[:5].copy()
    new.obs["donor"] = "d9"
    with pytest.raises(ValueError, match="5 of these cells are of a sample that training did not have"):
        fit.expression(new)


def test_the_schema_alone_builds_a_program(cells):
    program = tiny(Cells.empty(cells.schema), seed=5)

    assert all(torch.equal(a, b) for a, b in zip(program.parameters(), tiny(cells, seed=5).parameters()))


def test_another_thread_is_refused(cells):
    program, seen = tiny(cells), []

    def other():
        try:
            program.generate(3)
        except RuntimeError as error:
            seen.append(str(error))

    with program.driven(0):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    assert "not thread-safe" in seen[0]


def test_parts_of_ones_own_need_only_be_modules(cells):
    class Halves(nn.Module):
        def forward(self, mean, dispersion=None, hidden=None):
            return pyrosc.distributions.NegativeBinomial(mean, torch.tensor(0.5)).to_event(1)

    program = tiny(cells, likelihood=Halves(), dispersion=None)
    program.check(cells)

    assert torch.isfinite(elbo_terms(program, cells).local).all()
    assert "Halves()" in program.describe()
    assert isinstance(program.parts["encoder"], Part)


def test_only_new_parts_are_started_from_data(cells):
    program = tiny(cells)
    program.start(cells)
    with torch.no_grad():
        program.parts["decoder"].out.bias.add_(1.0)
    moved = program.parts["decoder"].out.bias.clone()

    other = program.replace(dispersion=pyrosc.GeneDispersion())
    other.start(cells)

    assert torch.equal(other.parts["decoder"].out.bias, moved)
    torch.testing.assert_close(other.parts["dispersion"](), program.parts["dispersion"]())


def test_a_trained_part_keeps_its_weights_in_another_program_over_the_same_data(cells):
    one = tiny(cells, seed=1)
    other = tiny(cells, seed=2, decoder=one.parts["decoder"])
    elsewhere = pyrosc.scvi(Cells.from_counts(cells.x[:, :20]), n_latent=3, n_hidden=8, decoder=one.parts["decoder"])

    assert torch.equal(other.parts["decoder"].out.weight, one.parts["decoder"].out.weight)
    assert elsewhere.parts["decoder"].out.weight.shape == (20, 8)
