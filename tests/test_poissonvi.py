"""PoissonVI: the sites, density and moments on paper, a mini-batch for the whole, and a truth that is found."""

import math
import warnings

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy import stats

import pyrosc
from pyrosc import (
    BernoulliLikelihood,
    Cells,
    GeneDispersion,
    NBLikelihood,
    ProgramError,
    PyroscWarning,
    RegionDecoder,
    poissonvi,
)
from pyrosc.distributions import Poisson


@pytest.fixture(scope="module")
def atac():
    adata = pyrosc.simulate.fragments(800, 400, n_types=3, depth=150.0, n_quantitative=30, highest=3.0, seed=3)
    adata = adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()
    adata.obs["donor"] = np.resize(["a", "b"], 800)
    return adata


@pytest.fixture(scope="module")
def cells(atac):
    return Cells.from_anndata(atac, batch="donor", label="cell_type")


@pytest.fixture(scope="module")
def fitted(cells):
    return quick(poissonvi(cells), cells, epochs=40)


def quick(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, **(dict(epochs=2, progress=False) | options))


def test_sites_are_as_documented(cells):
    program = poissonvi(cells, n_latent=3, n_hidden=8)
    nodes = poutine.trace(program.model).get_trace(cells).nodes

    sites = {name: tuple(site["value"].shape) for name, site in nodes.items() if site["type"] == "sample"}
    del sites["cells"]  # the plate
    n, g = len(cells), cells.n_genes
    assert sites == {"z": (n, 3), "library": (n, 1), "rho": (n, g), "x": (n, g)}
    torch.testing.assert_close(nodes["rho"]["value"].sum(-1), torch.ones(n))
    assert torch.equal(nodes["library"]["value"], cells.library)
    for site in sites:
        assert f"{site} : (n" in pyrosc.models.poissonvi.model.__doc__


def test_sizes_are_the_published_ones(cells):
    program = poissonvi(cells)
    hidden = math.isqrt(cells.n_genes)
    decoder = program.parts["decoder"]

    assert isinstance(decoder, RegionDecoder)
    assert (decoder.arguments["n_hidden"], decoder.arguments["n_latent"]) == (hidden, math.isqrt(hidden))
    assert decoder.arguments["n_layers"] == program.parts["encoder"].arguments["n_layers"] == 2
    # 35,983 regions have 189 and 13
    assert (math.isqrt(35_983), math.isqrt(189)) == (189, 13)


def test_the_density_is_the_one_on_paper(cells):
    program = poissonvi(cells, n_latent=3, n_hidden=8).double()
    some = cells[:7].to("cpu", torch.float64)
    z = torch.randn(7, 3, dtype=torch.float64)
    decoder = program.parts["decoder"]
    state = {name: value.detach().numpy() for name, value in decoder.state_dict().items()}

    # Two layers by hand: linear, LayerNorm, ReLU; donors as one-hot beside z
    hidden = np.concatenate([z.numpy(), np.eye(2)[some.batch.numpy()]], 1)
    for i in range(2):
        hidden = hidden @ state[f"layers.{i}.linear.weight"].T + state[f"layers.{i}.linear.bias"]
        hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
        hidden = np.maximum(hidden * state[f"layers.{i}.norm.norm.weight"] + state[f"layers.{i}.norm.norm.bias"], 0)
    logits = hidden @ state["out.weight"].T + state["out.bias"]
    rho = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    x = some.x.numpy()
    by_hand = stats.poisson.logpmf(x, x.sum(1, keepdims=True) * rho).sum() + stats.norm.logpdf(z.numpy()).sum()

    with program.driven(0), torch.no_grad():
        trace = poutine.trace(poutine.condition(program.model, {"z": z})).get_trace(some)
    assert float(trace.log_prob_sum()) == pytest.approx(by_hand, rel=1e-10)


def test_draws_have_the_moments_of_poisson(cells):
    program = poissonvi(cells, n_latent=3, n_hidden=8)
    one = cells[:1]
    z = torch.randn(1, 3)
    with program.driven(0), torch.no_grad():
        trace = poutine.trace(poutine.condition(program.model, {"z": z})).get_trace(one.without_counts())
    mean = (one.library * trace.nodes["rho"]["value"])[0].numpy()
    drawn = trace.nodes["x"]["fn"].sample((4000,))[:, 0].numpy()

    assert np.abs((drawn.mean(0) - mean) / np.sqrt(mean / 4000)).max() < 5  # five standard errors, 400 regions
    assert abs(((drawn - mean) ** 2 / mean).mean() - 1) < 0.02  # variance over mean, 1.6 million numbers
    total = drawn.sum(1)
    assert abs(total.mean() - float(one.library)) < 5 * math.sqrt(float(one.library) / 4000)


def test_a_mini_batch_stands_for_the_whole(cells):
    program = poissonvi(cells, n_latent=3, n_hidden=8)
    z = torch.randn(len(cells), 3)
    found = []
    with program.driven(0), torch.no_grad():
        for rows in (np.arange(0, 400), np.arange(400, 800)):
            part = cells.minibatch(rows)
            trace = poutine.trace(poutine.condition(program.model, {"z": z[rows]})).get_trace(part)
            found.append(float(trace.log_prob_sum()))
        whole = float(poutine.trace(poutine.condition(program.model, {"z": z})).get_trace(cells).log_prob_sum())
    assert np.mean(found) == pytest.approx(whole, rel=1e-5)  # each counts twice; rounding of float32


def test_shares_and_types_are_found_and_a_fit_without_types_finds_neither(atac, cells, fitted):
    rho = atac.varm["rho"].to_numpy().T
    kind = atac.obs["cell_type"].cat.codes.to_numpy()
    decoded = fitted.expression(cells, n_draws=5).to_numpy()
    by_type = np.stack([decoded[kind == t].mean(0) for t in range(3)])
    quantitative = (atac.var["kind"] == "quantitative").to_numpy()

    # 270 cells a type and up to 3 fragments each: log shares are known to some 5 %, and nets smooth
    error = np.abs(np.log2(by_type / rho))[:, quantitative]
    assert np.median(error) < 0.25
    flat = decoded.mean(0)  # the twin: one profile
    assert np.median(np.abs(np.log2(flat / rho))[:, quantitative]) > 2 * np.median(error)
    z = fitted.latent(cells)
    centres = np.stack([z[kind == t].mean(0) for t in range(3)])
    nearest = ((z[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == kind).mean() > 0.95
    shuffled = np.random.default_rng(0).permutation(kind)
    centres = np.stack([z[shuffled == t].mean(0) for t in range(3)])
    assert (((z[:, None] - centres) ** 2).sum(-1).argmin(1) == shuffled).mean() < 0.6


def test_other_laws_are_parts(atac, cells):
    nb = poissonvi(cells, n_latent=3, n_hidden=8, likelihood=NBLikelihood(), dispersion=GeneDispersion())
    assert quick(nb, cells).latent(cells).shape == (800, 3)
    with pytest.raises(ProgramError, match="needs a dispersion"):
        quick(poissonvi(cells, n_latent=3, n_hidden=8, likelihood=NBLikelihood()), cells)
    presence = cells.with_counts((cells.x > 0).float())
    fit = quick(poissonvi(presence, n_latent=3, n_hidden=8, likelihood=BernoulliLikelihood()), presence)
    drawn = fit.predict(presence[:20], n_draws=3)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert isinstance(quick(nb.replace(likelihood=pyrosc.PoissonLikelihood(), dispersion=None), cells), pyrosc.Fit)


def test_size_factors_make_rho_a_rate():
    adata = pyrosc.simulate.fragments(100, 60, n_types=2, depth=50.0, n_quantitative=5, seed=0)
    adata = adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()
    adata.obs["size"] = adata.obs["library"] / 50
    cells = Cells.from_anndata(adata, size_factor="size")
    fit = quick(poissonvi(cells, n_latent=2, n_hidden=8), cells)

    assert fit.expression(cells[:2]).attrs["unit"] == "rate per unit of size factor"
    with pytest.raises(ProgramError, match="no share"):
        fit.accessibility(cells[:2])


def test_a_fit_is_saved_and_comes_back(cells, fitted, tmp_path):
    path = tmp_path / "a.safetensors"
    fitted.save(path)
    again = pyrosc.load(path)

    assert again.program.story == "poissonvi"
    np.testing.assert_array_equal(again.latent(cells), fitted.latent(cells))
    assert again.accessibility(cells[:3]).equals(fitted.accessibility(cells[:3]))


def test_the_rest_of_thinned_fragments_is_predicted(cells):
    fit = quick(poissonvi(cells, n_latent=3, n_hidden=8), cells.thin(0.5)[0])
    law = Poisson(torch.tensor([1.0, 2.0]), exposure=torch.tensor([3.0])).rest_given(torch.tensor([0.0, 5.0]), 0.5)
    torch.testing.assert_close(law.mean, torch.tensor([3.0, 6.0]))
    assert pyrosc.check.thinned_log_likelihood(fit, cells[:50]).shape == (50,)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda c: poissonvi(c, n_hidden=0), ValueError, "n_hidden must be a whole number"),
        (lambda c: poissonvi(c, n_latent=2.5), ValueError, "n_latent must be a whole number"),
        (lambda c: poissonvi(c, encodr=1), ProgramError, "encodr"),
        (lambda c: poissonvi("cells"), TypeError, "expected Cells"),
    ],
)
def test_what_is_wrong_is_named(cells, call, error, text):
    with pytest.raises(error, match=text):
        call(cells)


def test_new_cells_are_mapped_with_the_factors_of_the_reference(atac, cells, fitted):
    query = atac[:60].copy()
    query.obs["donor"] = "c"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        mapped = fitted.map(query, epochs=1, progress=False)

    was, now = (f.program.parts["decoder"] for f in (fitted, mapped))
    assert torch.equal(was.profile, now.profile)
    assert torch.equal(was.factors, now.factors)
    assert mapped.accessibility(query).shape == (60, cells.n_genes)
    np.testing.assert_array_equal(mapped.latent(cells), fitted.latent(cells))
