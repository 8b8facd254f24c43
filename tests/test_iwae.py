"""Tests of the importance-weighted bound as an objective."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyrosc
from pyrosc import Cells
from pyrosc.draws import draw_guide, log_weight
from pyrosc.objective import IWAE

COUNTS = np.random.default_rng(0).poisson(2.0, (30, 8))


def story(cells, **parts):
    return pyrosc.scvi(cells, n_latent=2, n_hidden=6, dropout=0.0, **parts).to(torch.float64)


def double(cells):
    return cells.to("cpu", torch.float64)


def test_the_bound_is_the_log_mean_of_weights():
    cells = double(Cells.from_counts(COUNTS))
    program = story(cells, library=pyrosc.LatentLibrary())

    with program.driven(3), torch.no_grad():
        loss, kls, reconstruction = IWAE(7).loss(program, cells, 1.0)
    with program.driven(3), torch.no_grad():
        weights = log_weight(program, draw_guide(program, cells, 7), cells, 7)

    assert float(loss) == pytest.approx(-float((weights.logsumexp(0) - np.log(7)).mean()), abs=1e-9)
    assert float(reconstruction) - sum(map(float, kls.values())) == pytest.approx(float(weights.mean()), abs=1e-9)


def test_global_sites_are_drawn_once_and_count_as_in_an_elbo():
    """The same bound, with draws of the state written out one after the other."""
    cells = double(Cells.from_counts(COUNTS))
    program = story(cells, dispersion=pyrosc.GeneDispersion(prior=pyrosc.Prior(dist.LogNormal, 0.0, 1.0)))
    rows = cells.rows(torch.arange(30).repeat(5), whole=True)

    with program.driven(3), torch.no_grad():
        loss, kls, _ = IWAE(5).loss(program, cells, 1.0)
    with program.driven(3), torch.no_grad():
        weights = log_weight(program, draw_guide(program, rows), rows).reshape(5, 30)
    bound = float((weights.logsumexp(0) - np.log(5)).mean()) - float(kls["dispersion"])

    assert float(loss) == pytest.approx(-bound, abs=1e-9)
    assert float(kls["dispersion"]) > 0


@pytest.mark.parametrize(
    ("prior", "weight"),
    [
        (pyrosc.Prior(dist.Normal, 0.0, 1.0), 1.0),
        (pyrosc.Prior(dist.Normal, 0.0, 1.0), 0.4),
        (pyrosc.MixturePrior(3), 1.0),
    ],
)
def test_gradients_have_the_mean_of_plain_ones_and_less_noise(prior, weight, monkeypatch):
    cells = double(Cells.from_counts(COUNTS[:10]))
    program = story(cells, prior=prior)
    names = ("encoder.loc.bias", "encoder.log_variance.bias", "decoder.out.bias")
    chosen = [p for n, p in program.parts.named_parameters() if n in names]
    assert len(chosen) == 3

    def gradients(n=500):
        found = []
        with program.driven(0):
            for _ in range(n):
                loss = IWAE(4).loss(program, cells, weight)[0]
                found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)]))
        return torch.stack(found)

    doubly = gradients()
    monkeypatch.setattr("pyrosc.objective.still", lambda law: law)
    plain = gradients()

    # The same draws in both: the error of a mean is that of differences, which have heavy tails, so five of them.
    difference = doubly - plain
    assert (difference.mean(0).abs() < 5 * difference.std(0) / len(plain) ** 0.5 + 1e-9).all()
    if weight == 1.0:
        assert float((doubly.var(0)[-4:] / plain.var(0)[-4:]).mean()) < 1.0  # those of the guide, the last part


def test_another_exponent_of_shares_is_seen_to_be_wrong(monkeypatch):
    """The twin: gradients of the guide by w instead of w^2 have another mean."""
    cells = double(Cells.from_counts(COUNTS[:10]))
    program = story(cells)
    chosen = [p for n, p in program.parts.named_parameters() if n == "encoder.log_variance.bias"]

    def gradients(n=250):
        with program.driven(0):
            return torch.stack([torch.autograd.grad(IWAE(4).loss(program, cells, 1.0)[0], chosen)[0] for _ in range(n)])

    right = gradients()
    monkeypatch.setattr("pyrosc.objective._weigh_gradient", lambda *a: None)
    wrong = gradients()

    error = (right.var(0) / len(right) + wrong.var(0) / len(wrong)).sqrt()
    assert ((right.mean(0) - wrong.mean(0)).abs() > 4 * error).any()


@pytest.mark.filterwarnings("ignore::pyrosc.PyroscWarning")
def test_a_guide_trained_by_it_is_wider_and_its_weights_are_more_even():
    """Two latents of which counts see the sum: the ELBO makes independent normals narrow, this bound less so."""
    from .test_encoders import Sum, correlated

    cells = correlated()
    parts = dict(encoder=pyrosc.Encoder(2, 32, dropout=0.0), decoder=Sum(), likelihood=pyrosc.PoissonLikelihood())
    program = pyrosc.scvi(cells, dispersion=None, **parts)
    options = dict(epochs=25, progress=False, seed=1)

    elbo, iwae = (
        pyrosc.fit(program, cells, **options),
        pyrosc.fit(program, cells, objective="iwae", k=10, **options),
    )

    assert np.median(iwae.latent_sd(cells)) > 1.2 * np.median(elbo.latent_sd(cells))
    ess = [pyrosc.check.importance(f, cells, n_draws=500)["ess"].median() for f in (iwae, elbo)]
    assert ess[0] > 1.5 * ess[1]
    assert iwae.settings["objective"] == "IWAE(10)"
    history = iwae.history
    assert (history["train_iwae"][-5:] > history["train_elbo"][-5:]).all()
    assert (history["validation_iwae"] > history["validation_elbo"]).all()
    assert iwae.settings["best_epoch"] == 1 + int(np.argmax(np.where(history["kl_weight"] == 1, history["validation_iwae"], -np.inf)))  # fmt: skip


def test_what_cannot_be_an_objective_is_refused():
    cells = Cells.from_counts(COUNTS, label=["a", "b"] * 15)
    with pytest.raises(ValueError, match="objective must be None, \"iwae\" or a pyro.infer.ELBO, not 'vimco'"):
        pyrosc.fit(pyrosc.scvi(cells), cells, objective="vimco")
    with pytest.raises(ValueError, match="k must be a whole number of at least 2, not 1"):
        pyrosc.fit(pyrosc.scvi(cells), cells, objective="iwae", k=1)
    with pytest.raises(ValueError, match='k=5 is of objective="iwae" alone'):
        pyrosc.fit(pyrosc.scvi(cells), cells, k=5)
    with pytest.raises(ValueError, match="a bound of its own; leave objective=None"):
        pyrosc.fit(pyrosc.scanvi(cells), cells, objective="iwae")
