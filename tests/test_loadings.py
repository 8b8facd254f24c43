"""Loadings and the linear story: densities by hand, exact posteriors of small stories, rules of sign, order and gauge."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import special, stats

import pyrosc
from pyrosc import (
    Cells,
    Encoder,
    HorseshoeLoadings,
    LinearDecoder,
    LoadingsDecoder,
    NonNegativeLoadings,
    NormalLoadings,
    Part,
    PoissonLikelihood,
    ProgramError,
    PyroscWarning,
)
from pyrosc.distributions import Poisson
from pyrosc.draws import in_front
from pyrosc.loadings import principal_loadings, varimax
from pyrosc.models import linear_scvi as story
from pyrosc.programmes import _matched, settled

from .conftest import small

LOADINGS = {
    "normal": lambda: NormalLoadings(0.5),
    "horseshoe": lambda: HorseshoeLoadings(3),
    "non-negative": NonNegativeLoadings,
}
SCALES = {"gene_scale": (30, 3), "factor_scale": (3,)}


@pytest.fixture(scope="module")
def cells():
    return Cells.from_anndata(small(), batch="donor", label="cell_type", continuous=["age"])


def tiny(cells, **options):
    return pyrosc.linear_scvi(cells, **(dict(n_latent=3, n_hidden=8) | options))


def quick(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, **(dict(epochs=3, progress=False, validation=None) | options))


# ---- the story ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOADINGS)
def test_sites_are_as_documented(cells, kind):
    program = tiny(cells, loadings=LOADINGS[kind]())
    nodes = poutine.trace(program.model).get_trace(cells).nodes
    drawn = [n for n, site in nodes.items() if site["type"] == "sample"]
    text = inspect.getdoc(story.model).split("Sites")[1]

    scales = list(SCALES) if kind == "horseshoe" else []
    assert drawn == [*scales, "loadings", "cells", "z", "library", "rho", "x"]
    assert set(re.findall(r"\w+", re.search(r"^(z, .*) :", text, re.M).group(1))) == {"z", "library", "rho", "x"}
    assert re.search(r"^loadings : \(G, K\), real", text, re.M)
    for name, shape in ({"loadings": (30, 3)} | (SCALES if scales else {})).items():
        assert tuple(nodes[name]["value"].shape) == shape
        assert nodes[name]["fn"].event_dim == len(shape)
        assert not nodes[name]["cond_indep_stack"]
    assert (nodes["loadings"]["value"] >= 0).all() == (kind == "non-negative")
    torch.testing.assert_close(nodes["rho"]["value"].sum(-1), torch.ones(120))


def test_the_model_fits_on_a_screen():
    tree = ast.parse(inspect.getsource(story.model))
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.stmt)]

    assert len(statements) - 2 <= 15  # less the def and its docstring
    assert not re.search(r"\bif\b", inspect.getsource(story.model).split('"""')[-1])


def log_prior(kind, values):
    """Log density of the loadings and their scales in float64, written out."""
    loadings = values["loadings"].double().numpy()
    if kind == "normal":
        return stats.norm(0, 0.5).logpdf(loadings).sum()
    if kind == "non-negative":
        return stats.lognorm(1.5, scale=0.05).logpdf(loadings).sum()
    gene, factor = (values[name].double().numpy() for name in SCALES)
    scale = np.sqrt((gene * factor) ** 2 / (1 + (gene * factor) ** 2))
    return (
        stats.halfcauchy.logpdf(gene).sum()
        + stats.halfcauchy(scale=3 / 27).logpdf(factor).sum()
        + stats.norm(0, scale).logpdf(loadings).sum()
    )


@pytest.mark.parametrize("kind", LOADINGS)
def test_the_density_is_the_one_on_paper(cells, kind):
    program = tiny(cells, loadings=LOADINGS[kind]())
    with torch.no_grad():
        program.parts["decoder"].shifts.weight.normal_(0, 0.3)
        program.parts["decoder"].bias.normal_()
    program, double = program.double(), cells.to("cpu", torch.float64)
    trace = program.traces(double)[1]
    values = {n: site["value"].detach() for n, site in trace.nodes.items() if site["type"] == "sample"}
    # written out by hand, without our parts
    z, loadings = values["z"].numpy(), values["loadings"].numpy()
    columns = np.c_[np.eye(2)[cells.batch.numpy()], cells.values["age"].double().numpy()]
    weights = {n: p.detach().numpy() for n, p in program.parts["decoder"].named_parameters()}
    rho = special.softmax(z @ loadings.T + columns @ weights["shifts.weight"].T + weights["bias"], -1)
    x = cells.x.double().numpy()
    theta = program.parts["dispersion"].log_dispersion.exp().detach().numpy()
    mean = x.sum(-1, keepdims=True) * rho
    expected = (
        stats.nbinom(theta, theta / (theta + mean)).logpmf(x).sum()
        + stats.norm.logpdf(z).sum()
        + log_prior(kind, values)
    )

    assert float(trace.log_prob_sum().detach()) == pytest.approx(expected, rel=1e-9)


def test_priors_draw_what_they_say():
    """Of 40,000 draws each: sd and mean to five errors; half-Cauchy scales by their quartiles."""
    data = Cells.from_counts(np.ones((2, 400), int))
    torch.manual_seed(1)

    def drawn(part):
        made = tiny(data, loadings=part).parts["loadings"]
        with torch.no_grad():
            return torch.stack([made() for _ in range(34)]).double().numpy()

    normal, positive, sparse = (
        drawn(NormalLoadings(0.5)),
        drawn(NonNegativeLoadings(0.2, 0.5)),
        drawn(HorseshoeLoadings(20)),
    )
    n = normal.size
    assert normal.std() == pytest.approx(0.5, rel=5 / (2 * n) ** 0.5)
    assert abs(normal.mean()) < 5 * 0.5 / n**0.5
    assert np.log(positive).mean() == pytest.approx(np.log(0.2), abs=5 * 0.5 / n**0.5)
    assert np.log(positive).std() == pytest.approx(0.5, rel=5 / (2 * n) ** 0.5)
    # of the horseshoe: by numpy, with the same law. The scale is drawn once for 400 genes: 102 draws of it
    draw = np.random.default_rng(0)
    factor = np.abs(draw.standard_cauchy((20000, 1))) * 20 / 380
    scale = factor * np.abs(draw.standard_cauchy((20000, 20)))
    own = np.abs(draw.normal(size=scale.shape) * np.sqrt(scale**2 / (1 + scale**2)))
    for q in (0.25, 0.5, 0.75, 0.95):
        at = np.quantile(own, q)
        shares = (np.abs(sparse) < at).mean(1).ravel()
        assert shares.mean() == pytest.approx(q, abs=5 * shares.std() / len(shares) ** 0.5)
    assert (np.abs(normal) < np.median(own)).mean() < 0.2  # the twin: normal loadings are not sparse


def test_a_minibatch_stands_for_the_whole_and_globals_count_once(cells):
    program = tiny(cells)
    values = {n: site["value"] for n, site in program.traces(cells)[1].nodes.items() if n in {"loadings", *SCALES}}
    values["z"] = torch.zeros(30, 3)
    with torch.no_grad():
        run = poutine.trace(poutine.condition(program.model, values))
        batch, alone = run.get_trace(cells.minibatch(range(30))), run.get_trace(cells[:30])
        for trace in (batch, alone):
            trace.compute_log_prob()

    def parts(trace):
        of_all = sum(float(trace.nodes[n]["log_prob_sum"]) for n in ("loadings", *SCALES))
        return of_all, sum(float(trace.nodes[n]["log_prob_sum"]) for n in ("z", "x"))

    assert parts(batch)[0] == pytest.approx(parts(alone)[0], rel=1e-5)
    assert parts(batch)[1] == pytest.approx(parts(alone)[1] * 120 / 30, rel=1e-5)


@pytest.mark.parametrize("kind", LOADINGS)
def test_draws_in_front_are_those_one_by_one(cells, kind):
    program = tiny(cells, loadings=LOADINGS[kind]())

    assert in_front(program, cells, 7) == [7]  # all at once, after they were compared with the same draws alone


def test_size_factors_make_rates(cells):
    factors = np.linspace(0.5, 2, 120)
    data = Cells.from_counts(cells.x.numpy(), size_factor=factors)
    program = tiny(data, loadings=NormalLoadings(0.3))
    program.start(data)
    zero = poutine.condition(program.model, {"z": torch.zeros(120, 3)})
    rho = poutine.trace(zero).get_trace(data).nodes["rho"]["value"]

    torch.testing.assert_close(rho[0], (data.x.sum(0) + 0.1) / float(factors.sum()), rtol=1e-4, atol=1e-5)


def test_covariates_can_be_left_out_and_a_poisson_law_put_in(cells):
    program = tiny(cells, decoder=LoadingsDecoder(covariates=False), likelihood=PoissonLikelihood(), dispersion=None)

    assert [n for n, _ in program.parts["decoder"].named_parameters()] == ["bias"]
    assert np.isfinite(quick(program, cells).elbo(cells)).all()


# ---- posteriors -----------------------------------------------------------------------------


class Width(Part):
    """One factor."""

    @property
    def sizes(self):
        return {"n_latent": 1}


def known_state(cells, *, loadings, width):
    """Poisson rates with a known score of each cell, so that genes are apart but for their prior."""
    weights = loadings()
    with cells.plate():
        mean = pyro.deterministic("mean", (0.7 + cells.values["score"].unsqueeze(-1) * weights.squeeze(-1)).exp(), 1)
        pyro.sample("x", Poisson(mean).to_event(1), obs=cells.x)


def known_data(truth, n_cells=250, seed=0):
    draw = np.random.default_rng(seed)
    score = draw.normal(size=n_cells)
    score = (score - score.mean()) / score.std()
    x = draw.poisson(np.exp(0.7 + score[:, None] * truth))
    obs = pd.DataFrame({"score": score}, index=[f"c{i}" for i in range(n_cells)])
    import anndata

    data = Cells.from_anndata(
        anndata.AnnData(X=x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(len(truth))])),
        continuous=["score"],
    )
    score = data.values["score"].double().numpy()
    grid = np.linspace(-1.5, 1.5, 2001)
    log_likelihood = x.T @ np.outer(score, grid) - np.exp(0.7 + np.outer(score, grid)).sum(0)
    return data, grid, log_likelihood


def of_grid(grid, log_density):
    """Means and sds of densities (G, points) on a grid."""
    weight = special.softmax(log_density, -1)
    mean = weight @ grid
    return mean, np.sqrt(weight @ grid**2 - mean**2)


def fitted_moments(data, loadings, **options):
    program = pyrosc.Program(known_state, data, loadings=loadings, width=Width())
    fit = quick(program, data, epochs=200, **options)
    drawn = fit.draws("loadings", data[:1], 4000)[..., 0]
    return fit, drawn.mean(0), drawn.std(0)


TRUTH = np.r_[0.6, -0.4, 0.25, np.zeros(9)]


def test_the_posterior_under_a_normal_is_the_exact_one():
    data, grid, log_likelihood = known_data(TRUTH)
    mean, sd = of_grid(grid, log_likelihood + stats.norm(0, 0.1).logpdf(grid))
    _, found, spread = fitted_moments(data, NormalLoadings(0.1))

    # a gradient of mini-batches leaves a tenth of a posterior sd or so, and sds within 20 %; 4,000 draws add 0.02
    assert (np.abs(found - mean) / sd).max() < 0.35
    assert spread / sd == pytest.approx(np.ones(12), abs=0.25)
    # the twin: under a wide prior the large effects are elsewhere
    wide, _ = of_grid(grid, log_likelihood + stats.norm(0, 2.0).logpdf(grid))
    assert (np.abs(found - wide) / sd).max() > 1


def test_positive_loadings_are_those_of_a_log_normal():
    data, grid, log_likelihood = known_data(np.abs(TRUTH))
    mean, _ = of_grid(grid, log_likelihood + stats.lognorm(1.5, scale=0.05).logpdf(grid))
    _, found, _ = fitted_moments(data, NonNegativeLoadings())

    # near 0 the posterior is no log-normal: means to half a standard error of the data
    error = 1 / np.sqrt(250 * np.exp(0.7))
    assert np.abs(found - mean).max() < 0.5 * error


def horseshoe_by_quadrature(grid, log_likelihood, spread):
    """Exact moments of one factor's loadings: integrals over each gene's scale and loading, and the common scale."""
    points = np.linspace(np.log(1e-5), np.log(5), 120)  # log of the scale of a loading
    step = grid[1] - grid[0]
    top = log_likelihood.max(1, keepdims=True)
    moments = []
    for s in np.exp(points):
        # of a density narrower than the grid, the likelihood at 0
        weight = stats.norm(0, s).pdf(grid) * step if s > 3 * step else (np.abs(grid) < step / 2) * 1.0
        like = np.exp(log_likelihood - top) * weight
        moments.append([like.sum(1), like @ grid, like @ grid**2])
    table = np.array(moments)  # (points, 3, G)
    genes = np.linspace(-12, 12, 81)  # log gene scale
    of_gene = stats.halfcauchy.pdf(np.exp(genes)) * np.exp(genes)
    factors = np.linspace(np.log(1e-4), np.log(10), 80)
    log_weight, means = [], []
    for factor in np.exp(factors):
        scale = np.exp(genes) * factor
        place = (np.log(np.sqrt(scale**2 / (1 + scale**2))) - points[0]) / (points[1] - points[0])
        place = np.clip(place, 0, len(points) - 1.001)
        low, part = place.astype(int), (place % 1)[:, None, None]
        value = np.tensordot(of_gene, (1 - part) * table[low] + part * table[low + 1], 1)  # (3, G)
        log_weight.append(np.log(value[0]).sum() + stats.halfcauchy(scale=spread).logpdf(factor) + np.log(factor))
        means.append(value[1:] / value[0])
    weight = special.softmax(log_weight)
    first, second = np.tensordot(weight, np.array(means), 1)
    centre = float(weight @ factors)
    return first, np.sqrt(second - first**2), (centre, float(weight @ (factors - centre) ** 2) ** 0.5)


def test_the_horseshoe_is_near_its_exact_posterior_and_its_scales_do_not_collapse():
    data, grid, log_likelihood = known_data(TRUTH)
    mean, sd, (centre, width) = horseshoe_by_quadrature(grid, log_likelihood, 2 / 10)
    fit, found, spread = fitted_moments(data, HorseshoeLoadings(2))
    error = 1 / np.sqrt(250 * np.exp(0.7))

    assert np.abs(found[:3] - mean[:3]).max() < 0.35 * error
    assert spread[:3] / sd[:3] == pytest.approx(np.ones(3), abs=0.25)
    assert np.abs(found[3:]).max() < 1.5 * error
    assert np.abs(found[3:] - mean[3:]).max() < 0.5 * error
    # the exact posterior of the common scale is skewed; a log-normal is somewhere in its bulk
    assert abs(float(np.log(fit.draws("factor_scale", data[:1], 1000)).mean()) - centre) < 2 * width
    assert (
        fit.draws("gene_scale", data[:1], 1000)[:, :3].mean()
        > 2 * fit.draws("gene_scale", data[:1], 1000)[:, 3:].mean()
    )
    # the twin: without a prior genes that do not move are as unsure as those that do
    _, flat = of_grid(grid, log_likelihood)
    assert spread[3:].mean() < 0.8 * flat[3:].mean()
    assert spread[:3].mean() > 0.8 * flat[:3].mean()


def planted(n_cells=500, n_genes=100, seed=0, n_factors=3):
    """Counts from three sparse programmes with normal scores; (cells, loadings)."""
    draw = np.random.default_rng(seed)
    truth = np.zeros((n_genes, n_factors))
    for k in range(n_factors):
        truth[draw.choice(n_genes, 15, replace=False), k] = draw.choice([-1, 1], 15) * draw.uniform(0.4, 1.0, 15)
    z = draw.normal(size=(n_cells, n_factors))
    rho = special.softmax(draw.normal(0, 0.7, n_genes) + z @ truth.T, -1)
    mean = draw.lognormal(np.log(1000), 0.3, (n_cells, 1)) * rho
    return Cells.from_counts(draw.poisson(draw.gamma(5.0, mean / 5.0))), truth, z


def precision(score, truth):
    hit = truth[np.argsort(-score, kind="stable")]
    return float((np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean())


def best_precision(loadings, truth):
    """Each programme's average precision by the factor that suits it best."""
    return [max(precision(np.abs(w), t != 0) for w in loadings.T) for t in truth.T]


@pytest.fixture(scope="module")
def recovered():
    cells, truth, z = planted(seed=1)
    program = pyrosc.linear_scvi(cells, n_latent=5, n_hidden=32)
    return cells, truth, z, quick(program, cells, epochs=100)


def test_programmes_that_were_planted_are_found_and_no_others(recovered):
    cells, truth, z, fit = recovered
    table = fit.loadings()
    mean = table.xs("mean", axis=1, level=1).to_numpy()
    strength = np.array(table.attrs["strength"])

    assert min(best_precision(mean[:, :3], truth)) > 0.9
    assert strength[3:].max() < 0.35 * strength[2]
    # scores of cells are those that were drawn, up to noise of the counts
    scores = fit.factors(cells).to_numpy()
    for k in range(3):
        at = int(np.argmax([precision(np.abs(w), truth[:, k] != 0) for w in mean.T]))
        assert abs(np.corrcoef(scores[:, at], z[:, k])[0, 1]) > 0.9
    # the twin: the same space seen from another angle shows no programme
    turn = stats.ortho_group(3, seed=0).rvs()
    assert min(best_precision(mean[:, :3] @ turn, truth)) < 0.75


def covered(fit, truth, interval=0.9):
    """Whether intervals hold the planted loadings (programmes, G), factors matched and turned by correlation."""
    table = fit.loadings(interval=interval)
    mean, lower, upper = (table.xs(n, axis=1, level=1).to_numpy() for n in ("mean", "lower", "upper"))
    alike = (mean / np.linalg.norm(mean, axis=0)).T @ truth
    inside = []
    for k in range(truth.shape[1]):
        at = int(np.argmax(np.abs(alike[:, k])))
        ends = np.sort(np.sign(alike[at, k]) * np.stack([lower[:, at], upper[:, at]]), 0)
        inside.append((ends[0] <= truth[:, k]) & (truth[:, k] <= ends[1]))
    return np.array(inside)


def test_intervals_hold_genes_that_no_programme_moves(recovered):
    _, truth, _, fit = recovered
    inside = covered(fit, truth)

    # 3 x 60 or so: nine tenths less five standard errors. Of genes that move they are too narrow, as is documented
    still = (truth == 0).all(1)
    assert inside[:, still].mean() > 0.9 - 5 * (0.9 * 0.1 / (3 * still.sum())) ** 0.5
    # the twin: intervals of half the probability hold clearly less
    assert covered(fit, truth, 0.3)[:, still].mean() < 0.6


@pytest.mark.slow
def test_refits_cover_what_was_planted():
    cells, truth, _ = planted(seed=1)
    program = pyrosc.linear_scvi(cells, n_latent=5, n_hidden=32)
    alone, refits = (covered(quick(program, cells, epochs=150, ensemble=m), truth)[:, :] for m in (0, 4))
    moved = (truth != 0).T

    # of 45 loadings: nine tenths less three standard errors; measured 0.91, without refits 0.49
    assert refits[moved].mean() > 0.9 - 3 * (0.9 * 0.1 / 45) ** 0.5
    assert alone[moved].mean() < refits[moved].mean()


# ---- where training starts ------------------------------------------------------------------


def test_varimax_is_a_rotation_to_simple_columns():
    draw = np.random.default_rng(0)
    simple = torch.tensor(np.where(draw.uniform(size=(200, 4)) < 0.1, draw.choice([-1.0, 1.0], (200, 4)), 0.0))
    turned = simple @ torch.tensor(stats.ortho_group(4, seed=1).rvs())
    found = varimax(turned)

    torch.testing.assert_close(found @ found.T, simple @ simple.T)
    alike = (found / found.norm(dim=0)).T @ (simple / simple.norm(dim=0))
    assert (alike.abs().max(0).values > 0.97).all()
    before = (turned / turned.norm(dim=0)).T @ (simple / simple.norm(dim=0))
    assert (before.abs().max(0).values < 0.97).any()


def test_components_span_the_planted_programmes():
    cells, truth, _ = planted(1500)
    torch.manual_seed(0)
    found = principal_loadings(cells, 3).double().numpy()
    basis = np.linalg.qr(found - found.mean(0))[0]
    rest = truth - truth.mean(0)

    share = ((basis.T @ rest) ** 2).sum(0) / (rest**2).sum(0)
    assert (share > 0.85).all()
    assert np.sqrt((found**2).sum()) == pytest.approx(np.sqrt((truth**2).sum()), rel=0.25)


def test_batches_are_no_components(cells):
    draw = np.random.default_rng(0)
    batch = np.arange(400) % 2
    mean = 10 * np.exp(0.8 * batch[:, None] * draw.normal(size=40))
    adata = small(400, 40, donor=[f"d{b}" for b in batch])
    adata.X = draw.poisson(mean).astype(np.float32)
    sizes = []
    for column in ("donor", None):
        torch.manual_seed(0)
        sizes.append(float(principal_loadings(Cells.from_anndata(adata, batch=column), 1).norm()))

    assert sizes[0] < 0.3 * sizes[1]


def test_guides_of_loadings_start_at_the_components(cells):
    for part, positive in ((NormalLoadings(), False), (NonNegativeLoadings(), True)):
        program = tiny(cells, loadings=part)
        torch.manual_seed(3)
        program.start(cells)
        guide = program.completion.sites["loadings"]
        torch.manual_seed(3)
        expected = principal_loadings(cells, 3)

        value = (guide.loc * guide.unit).exp() if positive else guide.loc * guide.unit
        if positive:
            expected = (expected * expected.pow(3).sum(0).sign()).clamp(min=0.01)
        torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_encoder_starts_sure_of_its_states(cells):
    _, scale = tiny(cells).parts["encoder"](cells)

    assert float(scale.detach().median()) == pytest.approx(0.14, rel=0.5)
    given = tiny(cells, encoder=Encoder(3, 8)).parts["encoder"]
    assert float(given(cells)[1].detach().median()) > 0.5  # an encoder that is handed in is left as it is


# ---- asking ---------------------------------------------------------------------------------


def set_loadings(fit, loc, scale=1e-4):
    """A fit whose guide of loadings is given."""
    made = copy.copy(fit)
    made.program = fit.program.copy()
    guide = made.program.completion.sites["loadings"]
    with torch.no_grad():
        guide.loc.copy_(torch.as_tensor(loc) / guide.unit)
        guide.log_scale.fill_(float(np.log(scale)))
    return made


@pytest.fixture(scope="module")
def plain(cells):
    return quick(tiny(cells, loadings=NormalLoadings()), cells)


def test_sign_order_and_constant_go_by_the_rules(plain, cells):
    draw = np.random.default_rng(0)
    loc = draw.normal(0, 0.1, (30, 3)) * np.array([1.0, 4.0, 2.0]) + np.array([0.3, -0.7, 0.0])
    fit = set_loadings(plain, loc)
    table = fit.loadings(n_draws=50)
    mean = table.xs("mean", axis=1, level=1).to_numpy()

    own = loc - np.median(loc, 0)
    sign = np.where((own**3).sum(0) < 0, -1, 1)
    assert table.attrs["place"] == [1, 2, 0]
    assert table.attrs["sign"] == [int(sign[k]) for k in (1, 2, 0)]
    np.testing.assert_allclose(mean, (own * sign)[:, [1, 2, 0]], atol=1e-3)
    assert ((mean**3).sum(0) > 0).all()
    assert table.attrs["strength"] == pytest.approx(np.sqrt((own**2).mean(0))[[1, 2, 0]], abs=1e-3)
    assert list(table.index) == list(cells.schema.genes)
    assert list(table.columns.unique("factor")) == ["factor1", "factor2", "factor3"]
    # turning a factor of the story around, or adding a constant to it, changes nothing that is told
    other = set_loadings(plain, loc * np.array([1, -1, -1]) + np.array([0.0, 2.0, 1.0]))
    pd.testing.assert_frame_equal(other.loadings(n_draws=50), table, atol=1e-3, check_exact=False)


def test_factors_of_cells_go_with_the_loadings(plain, cells):
    fit = set_loadings(plain, np.random.default_rng(1).normal(0, 0.3, (30, 3)))
    table, scores = fit.loadings(n_draws=20), fit.factors(cells, n_draws=20)
    mean = table.xs("mean", axis=1, level=1).to_numpy()
    z = fit.latent(cells)

    np.testing.assert_allclose(scores, z[:, table.attrs["place"]] * table.attrs["sign"], rtol=1e-5, atol=1e-6)
    told = scores.to_numpy() @ mean.T
    guide = fit.program.completion.sites["loadings"]
    own = z @ (guide.unit * guide.loc).detach().numpy().T
    rest = told - own  # one constant a cell, which the softmax takes away
    np.testing.assert_allclose(rest, rest.mean(1, keepdims=True) + np.zeros(30), atol=5e-3)
    assert list(scores.index) == list(cells.names)


def test_intervals_are_those_of_the_guide(plain):
    loc = np.random.default_rng(2).normal(0, 1.0, (30, 3))
    table = set_loadings(plain, loc, 0.05).loadings(n_draws=4000, interval=0.8)

    # genes beside the median one are held to it, others have the guide's sd and a little of that of the median
    assert np.median(table.xs("sd", axis=1, level=1)) == pytest.approx(0.05, rel=0.2)
    width = (table.xs("upper", axis=1, level=1) - table.xs("lower", axis=1, level=1)).to_numpy()
    own = 2 * stats.norm.ppf(0.9) * table.xs("sd", axis=1, level=1).to_numpy()
    assert width == pytest.approx(own, rel=0.15)
    assert width.mean() == pytest.approx(own.mean(), rel=0.02)


def test_top_genes_are_the_largest(plain):
    loc = np.random.default_rng(3).normal(0, 0.5, (30, 3))
    fit = set_loadings(plain, loc)
    top, table = fit.top_genes(4, n_draws=20), fit.loadings(n_draws=20)

    assert top.index.names == ["factor", "rank"]
    assert len(top) == 12
    for name in ("factor1", "factor2", "factor3"):
        own = table[name]["mean"].abs()
        assert list(top.loc[name]["gene"]) == list(own.sort_values(ascending=False).index[:4])
        assert list(top.loc[name].index) == [1, 2, 3, 4]
    assert len(fit.top_genes(100, n_draws=20)) == 90  # as many as there are


def test_the_scale_of_states_counts_for_the_order(cells, plain):
    """Half the loadings on twice the state are the same factor: order goes by both."""
    program = tiny(cells, loadings=NormalLoadings(), prior=pyrosc.Prior(dist.Normal, torch.zeros(3),
                   torch.tensor([10.0, 1.0, 1.0])))  # fmt: skip
    fit = quick(program, cells, epochs=1)
    loc = np.random.default_rng(0).normal(0, 1, (30, 3)) * np.array([0.2, 1.0, 0.5])
    found = settled(set_loadings(fit, loc), 20, 0)

    assert list(found.place) == [0, 1, 2]
    assert list(settled(set_loadings(plain, loc), 20, 0).place) == [1, 2, 0]


def test_priors_without_a_closed_variance_are_drawn_from(cells):
    fit = quick(tiny(cells, prior=pyrosc.FlowPrior(2), loadings=NormalLoadings()), cells, epochs=1)

    assert np.isfinite(fit.loadings(n_draws=10).attrs["strength"]).all()


def test_factors_of_refits_are_matched():
    draw = np.random.default_rng(0)
    first = draw.normal(size=(10, 40, 3))
    base = draw.normal(size=(40, 3)) * 10
    member = np.repeat([0, 1], 5)
    draws = base + first
    turned = draws.copy()
    turned[member == 1] = draws[member == 1][:, :, [2, 0, 1]] * np.array([-1, 1, -1])

    np.testing.assert_allclose(_matched(turned, member), draws)


def test_refits_widen_intervals(cells):
    fit = quick(tiny(cells, loadings=NormalLoadings()), cells, epochs=4, ensemble=2)
    table = fit.loadings(n_draws=40)
    alone = copy.copy(fit)
    alone.members = ()

    assert table.attrs["uncertainty"].endswith("and refits")
    assert "refits" not in alone.loadings(n_draws=40).attrs["uncertainty"]
    sd = table.xs("sd", axis=1, level=1).to_numpy().mean()
    assert sd > alone.loadings(n_draws=40).xs("sd", axis=1, level=1).to_numpy().mean()


def test_asking_is_seeded_and_leaves_everything_as_it_was(plain, cells):
    state = torch.get_rng_state()
    weights = {n: v.clone() for n, v in plain.program.state_dict().items()}
    one, other, third = (plain.loadings(n_draws=30, seed=s) for s in (1, 1, 2))

    pd.testing.assert_frame_equal(one, other)
    assert not one.equals(third)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[n]) for n, v in plain.program.state_dict().items())


@pytest.mark.parametrize("kind", LOADINGS)
def test_a_file_keeps_loadings(cells, kind, tmp_path):
    fit = quick(tiny(cells, loadings=LOADINGS[kind]()), cells)
    fit.save(tmp_path / "fit.safetensors")
    again = pyrosc.load(tmp_path / "fit.safetensors")

    pd.testing.assert_frame_equal(again.loadings(n_draws=20), fit.loadings(n_draws=20))
    np.testing.assert_array_equal(again.latent(cells), fit.latent(cells))
    assert again.program.parts["loadings"].arguments == fit.program.parts["loadings"].arguments


def test_a_new_batch_is_mapped_and_loadings_stay(cells):
    fit = quick(tiny(cells), cells)
    adata = small(40, seed=5, donor=["d9"] * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        mapped = fit.map(Cells.from_anndata(adata, batch="donor", continuous=["age"]), epochs=2, progress=False)

    was, now = (f.program.completion.sites["loadings"].loc for f in (fit, mapped))
    assert torch.equal(was, now)
    old, new = (f.program.parts["decoder"].shifts.weight for f in (fit, mapped))
    assert new.shape[1] == old.shape[1] + 1


def test_other_verbs_take_the_story(recovered):
    cells, _, _, fit = recovered
    few = cells[:6]

    np.testing.assert_allclose(fit.expression(few, n_draws=5).sum(1), 1, rtol=1e-4)
    assert fit.predict(few, 2).shape == (2, 6, 100)
    assert np.isfinite(fit.log_likelihood(few, 20)).all()


# ---- refusals -------------------------------------------------------------------------------


def test_stories_without_loadings_are_told(cells):
    network = quick(pyrosc.scvi(cells, n_latent=3, n_hidden=8), cells, epochs=1)
    linear = quick(pyrosc.scvi(cells, n_latent=3, n_hidden=8, decoder=LinearDecoder()), cells, epochs=1)
    for ask in (network.loadings, network.top_genes, lambda: network.factors(cells)):
        with pytest.raises(ProgramError, match=r'scvi has no site "loadings".*pyrosc\.linear_scvi'):
            ask()
    with pytest.raises(ProgramError, match="LinearDecoder has weights, without a posterior"):
        linear.loadings()


def test_loadings_of_another_shape_are_told(cells):
    def flat(cells):
        pyro.sample("loadings", dist.Normal(torch.zeros(cells.n_genes), 1.0).to_event(1))
        with cells.plate():
            pyro.sample("x", Poisson(torch.ones(len(cells), cells.n_genes)).to_event(1), obs=cells.x)

    fit = quick(pyrosc.Program(flat, cells), cells, epochs=1)
    with pytest.raises(ProgramError, match=r"must be one for all cells, of shape \(genes, factors\) = \(30, K\)"):
        fit.loadings()


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: NormalLoadings(0.0), "sd must be a positive number"),
        (lambda: NormalLoadings("wide"), "sd must be a positive number"),
        (lambda: NonNegativeLoadings(-1.0), "median must be a positive number"),
        (lambda: HorseshoeLoadings(0), "n_expected must be at least 1 gene"),
        (lambda: HorseshoeLoadings(2.5), "n_expected is a number of genes"),
        (lambda: HorseshoeLoadings(slab=float("inf")), "slab must be a positive number"),
        (lambda: LoadingsDecoder(covariates="first"), "covariates must be True or False"),
    ],
)
def test_arguments_of_parts_are_checked(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_parts_that_do_not_fit_are_explained(cells, plain):
    with pytest.raises(ProgramError, match="n_expected=30 genes are expected to move with a factor, of 30"):
        tiny(cells, loadings=HorseshoeLoadings(30))
    with pytest.raises(ProgramError, match="does not know how many factors"):
        pyrosc.Program(known_state, cells, loadings=NormalLoadings(), width=NormalLoadings())
    with pytest.raises(ProgramError, match='no part "loading"'):
        tiny(cells, loading=NormalLoadings())
    with pytest.raises(ValueError, match="interval must be between 0 and 1"):
        plain.loadings(interval=1.5)
    with pytest.raises(ValueError, match="n_draws must be a whole number of at least 2"):
        plain.loadings(n_draws=1)
    with pytest.raises(ValueError, match="n must be a whole number of at least 1"):
        plain.top_genes(0)
