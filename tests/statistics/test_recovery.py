"""What a fit says of a simulated tissue, against its truth; each claim with a twin that must fail."""

import numpy as np
import pytest
import torch

import pyrosc
from pyrosc import Cells

# A latent dimension more than this tissue needs is said in a warning; that is as it should be.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*latent dimensions are unused:pyrosc.PyroscWarning", "ignore:.*still rising:pyrosc.PyroscWarning"
)


@pytest.fixture(scope="module")
def truth():
    # With fewer genes one of them can hold an eighth of all counts and scatter widely; the observed
    # total then follows that gene, and no story with an observed library could find the truth.
    return pyrosc.simulate.tissue(2000, 200, n_types=4, n_batches=2, depth=1500, n_markers=40, effect=1.0, seed=0)


@pytest.fixture(scope="module")
def cells(truth):
    return Cells.from_anndata(truth, batch="batch", label="cell_type")


@pytest.fixture(scope="module")
def fit(cells):
    return pyrosc.fit(pyrosc.scvi(cells, n_latent=4), cells, progress=False)


def divergence(truth, shares):
    """Mean KL from the true shares, nats a count."""
    rho = truth.layers["rho"].astype(float)
    return float((rho * (np.log(rho) - np.log(shares))).sum(1).mean())


def test_expression_recovers_the_true_shares(truth, cells, fit):
    counts = truth.X.toarray()
    profile = np.tile(counts.sum(0) / counts.sum(), (len(cells), 1))
    plain = (counts + 0.5) / (counts + 0.5).sum(1, keepdims=True)

    found = divergence(truth, fit.expression(cells, n_draws=10).to_numpy())

    # The fitted shares lose a tenth of what one profile for all loses; the raw counts are the twin.
    assert found < 0.1 * divergence(truth, profile)
    assert not divergence(truth, plain) < 0.1 * divergence(truth, profile)


def test_dispersions_are_recovered(truth, cells, fit):
    often = truth.X.toarray().mean(0) > 2
    true = np.log(truth.var["dispersion"].to_numpy()[often])

    def error(program):
        return np.log(program.parts["dispersion"]().detach().numpy()[often]) - true

    start = pyrosc.scvi(cells, n_latent=4)
    start.start(cells)

    # A score of n counts of mean over 2 knows log dispersion to about sqrt(2 / n) times a small factor:
    # 0.03 here; 0.25 allows for the states having been estimated.
    assert np.sqrt(np.mean(error(fit.program) ** 2)) < 0.25
    assert abs(np.median(error(fit.program))) < 0.1
    # The moments it starts from count the types as noise: they must fail.
    assert not np.sqrt(np.mean(error(start) ** 2)) < 0.25
    assert np.median(error(start)) < -0.1


def coverage(fit, cells, widen=1.0):
    """Share of states drawn from the story, near where cells are, inside the guide's 90 % intervals."""
    near = torch.tensor(fit.latent(cells, n_draws=1, seed=3)[0])
    drawn = fit.program.generate(cells, fixed={"z": near}, seed=4)
    with torch.no_grad():
        loc, sd = fit.program.parts["encoder"](cells.with_counts(drawn["x"]))
    return float(((near - loc).abs() < 1.6449 * widen * sd).float().mean())


def test_intervals_cover_states_drawn_from_the_story(cells, fit):
    # 8,000 numbers: Monte Carlo error 0.004. An amortised mean-field guide may be somewhat narrow;
    # below 0.82 or above 0.96 would be wrong by more than that.
    assert 0.82 < coverage(fit, cells) < 0.96
    assert not 0.82 < coverage(fit, cells, widen=0.5) < 0.96


def test_batches_are_taken_out_of_the_state_and_types_are_not(truth, cells, fit):
    from sklearn.neighbors import NearestNeighbors

    def same(space, column):
        near = NearestNeighbors(n_neighbors=16).fit(space).kneighbors(space, return_distance=False)[:, 1:]
        code = np.asarray(column)
        return float((code[near] == code[:, None]).mean())

    batch, kind = truth.obs["batch"].to_numpy(), truth.obs["cell_type"].to_numpy()
    logged = np.log1p(truth.X.toarray() / truth.X.toarray().sum(1, keepdims=True) * 1e4)
    # Draws, not means: batches may differ by less than what is known of a cell.
    drawn = fit.latent(cells, n_draws=1)[0]

    # Half of the neighbours by chance; a type's own batch effect, which the tissue has, leaves a little more.
    assert same(drawn, batch) < 0.65
    assert same(drawn, kind) > 0.9
    assert not same(logged, batch) < 0.65  # the twin: log counts keep the batch


def test_the_held_out_elbo_prefers_the_true_likelihood(cells, fit):
    poisson = pyrosc.scvi(cells, n_latent=4, likelihood=pyrosc.PoissonLikelihood(), dispersion=None)
    wrong = pyrosc.fit(poisson, cells, epochs=15, progress=False)

    # counts of inverse dispersion around 2 and mean 10: nats by the hundred
    assert fit.history["validation_elbo"].max() > wrong.history["validation_elbo"].max() + 20
