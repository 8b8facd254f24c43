"""Overlap of states: against densities that are known, and what a counterfactual says of it."""

import warnings

import numpy as np
import pytest
import torch
from scipy import stats

import pyrosc
from pyrosc import Cells, PyroscWarning
from pyrosc.overlap import Landmarks


def two_normals(n=2000, apart=1.0, seed=0):
    draw = np.random.default_rng(seed)
    code = draw.integers(2, size=n)
    loc = draw.normal(size=(n, 2))
    loc[:, 0] += apart * code
    return Landmarks(torch.as_tensor(loc), torch.zeros(n), {"condition": torch.as_tensor(code)})


def test_the_overlap_is_the_ratio_of_densities():
    marks = two_normals()
    z = torch.tensor([[-0.5, 0.0], [0.5, 0.3], [1.5, -0.3]], dtype=torch.float64)

    found = marks.overlap(z, "condition", 1)

    with_level = stats.norm.pdf(z[:, 0].numpy(), 1.0)
    exact = 2 * with_level / (with_level + stats.norm.pdf(z[:, 0].numpy()))
    # 50 neighbours: the standard error of a share is at most 0.07, doubled here.
    np.testing.assert_allclose(found, exact, atol=3 * 0.14)
    assert float(marks.overlap(torch.tensor([[-8.0, 0.0]], dtype=torch.float64), "condition", 1)[0]) < 0.5


def test_states_that_tell_a_level_have_an_area_above_one_half():
    # The best score is the first coordinate: an area of Phi(apart / sqrt 2).
    for apart in (0.0, 1.0, 3.0):
        found = two_normals(apart=apart).auc("condition", 1)
        assert found == pytest.approx(stats.norm.cdf(apart / 2**0.5), abs=0.05)
    alone = Landmarks(torch.zeros(10, 2), torch.zeros(10), {"condition": torch.zeros(10, dtype=torch.int64)})
    assert np.isnan(alone.auc("condition", 0))


@pytest.fixture(scope="module")
def told():
    """A fit in which one condition lacks a type, with a continuous column."""
    data = pyrosc.simulate.tissue(500, 60, n_types=2, n_batches=1, depth=600, n_markers=20, effect=1.5, seed=1)
    draw = np.random.default_rng(0)
    kind = data.obs["cell_type"].to_numpy()
    condition = np.where((kind == "type0") & (draw.uniform(size=500) < 0.5), "stim", "ctrl")
    data.obs["condition"], data.obs["age"] = condition, draw.uniform(20, 60, 500)
    cells = Cells.from_anndata(data, categorical=["condition"], continuous=["age"], label="cell_type")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(pyrosc.scvi(cells, n_latent=3, n_hidden=32), cells, progress=False), cells


def test_a_counterfactual_says_where_the_decoder_extrapolates(told):
    fit, cells = told
    seen = cells[((cells.obs["cell_type"] == "type0") & (cells.obs["condition"] == "ctrl")).to_numpy()]
    unseen = cells[(cells.obs["cell_type"] == "type1").to_numpy()]

    with pytest.warns(PyroscWarning, match=r"hardly seen with condition=\"stim\".*the decoder extrapolates"):
        far = fit.counterfactual(unseen, {"condition": "stim"}, n_draws=10).attrs["overlap"]["condition"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        near = fit.counterfactual(seen, {"condition": "stim"}, n_draws=10).attrs["overlap"]["condition"]

    assert far["without"] > 0.8
    assert near["without"] < 0.1
    assert near["median"] > 1 > far["median"]
    # States tell the condition here, as one type has none of it.
    assert near["auc"] > 0.65


def test_numbers_outside_of_what_was_seen_are_told(told):
    fit, cells = told
    with pytest.warns(PyroscWarning, match=r'"age" is set to 90, outside of what was seen \(20'):
        fit.counterfactual(cells[:50], {"age": 90.0}, n_draws=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PyroscWarning)
        table = fit.counterfactual(cells[:50], {"age": 50.0}, n_draws=10)
        every = fit.counterfactual(cells[:50], {"condition": "all"}, n_draws=10)
    assert table.attrs["overlap"]["age"]["low"] >= 20
    assert every.attrs["overlap"] == {}


def test_landmarks_are_saved_with_the_fit(told, tmp_path):
    fit, cells = told
    fit.save(tmp_path / "told.safetensors")
    again = pyrosc.load(tmp_path / "told.safetensors")

    torch.testing.assert_close(again.landmarks.loc, fit.landmarks.loc)
    assert set(again.landmarks.columns) == {"condition", "cell_type", "age"}
    for name, value in fit.landmarks.columns.items():
        torch.testing.assert_close(again.landmarks.columns[name], value)
    assert again.landmarks.auc("condition", 1) == fit.landmarks.auc("condition", 1)
    assert float(fit.landmarks.columns["age"].max()) == pytest.approx(cells.obs["age"].max())


def test_stories_without_a_state_have_no_landmarks():
    import pyro
    import pyro.distributions as dist

    data = pyrosc.simulate.tissue(80, 20, n_types=2, n_batches=2, n_markers=5, seed=1)
    cells = Cells.from_anndata(data, batch="batch")

    def one_profile(cells):
        rho = pyro.sample("rho", dist.Dirichlet(torch.ones(cells.n_genes)))
        with cells.plate():
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(pyrosc.Program(one_profile, cells), cells, epochs=2, progress=False)
    assert fit.landmarks is None
