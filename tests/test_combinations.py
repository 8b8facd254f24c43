"""Every part with every other: one loop fits them, one file holds them, and the sites are those documented."""

import inspect
import itertools
import random
import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
from pyro import poutine

import pyrosc
from pyrosc import Cells, PyroscWarning
from pyrosc.models import scvi as story

from .conftest import small

PARTS = {
    "prior": {
        "normal": lambda: pyrosc.Prior(dist.Normal, 0.0, 1.0),
        "laplace": lambda: pyrosc.Prior(dist.Laplace, 0.0, 1.0),
        "mixture": lambda: pyrosc.MixturePrior(3),
        "labels": lambda: pyrosc.MixturePrior(labels=True),
        "vamp": lambda: pyrosc.VampPrior(4),
        "affine": lambda: pyrosc.FlowPrior(2),
        "spline": lambda: pyrosc.FlowPrior(2, "spline"),
    },
    "library": {"observed": pyrosc.ObservedLibrary, "latent": pyrosc.LatentLibrary},
    "dispersion": {
        "gene": pyrosc.GeneDispersion,
        "gene prior": lambda: pyrosc.GeneDispersion(pyrosc.Prior(dist.LogNormal, 1.0, 1.0)),
        "inverse": lambda: pyrosc.GeneDispersion(pyrosc.InverseSqrtPrior()),
        "batch": pyrosc.BatchDispersion,
        "batch trend": lambda: pyrosc.BatchDispersion(pyrosc.TrendPrior()),
        "label": pyrosc.LabelDispersion,
        "cell": pyrosc.CellDispersion,
    },
    "likelihood": {
        "nb": pyrosc.NBLikelihood,
        "zinb": pyrosc.ZINBLikelihood,
        "poisson": pyrosc.PoissonLikelihood,
    },
    "networks": {
        "first": dict(covariates="first"),
        "deep": dict(covariates="deep"),
        "norm": dict(covariates="norm"),
        "embedded": dict(covariates="first", embedding=1),
        "batch norm": dict(covariates="deep", norm="batch"),
        "linear": None,
    },
}


def is_possible(choice):
    """A linear decoder has no hidden layer for a dispersion of cells to read; Poisson counts have none."""
    chosen = dict(choice)
    return not (
        (chosen.get("networks") == "linear" and chosen.get("dispersion") == "cell")
        or (chosen.get("likelihood") == "poisson" and chosen.get("dispersion", "gene") != "gene")
    )


def pairs_of(combination):
    return set(itertools.combinations(sorted(combination.items()), 2))


def pairwise():
    """A few combinations in which every possible pair of choices occurs."""
    draw = random.Random(0)  # noqa: S311
    names = list(PARTS)
    missing = {
        pair
        for a, b in itertools.combinations(sorted(names), 2)
        for pair in itertools.product([(a, x) for x in PARTS[a]], [(b, y) for y in PARTS[b]])
        if is_possible(pair)
    }
    while missing:
        best = None
        for _ in range(60):
            combination = {n: draw.choice(list(PARTS[n])) for n in names}
            first = draw.choice(sorted(missing))
            combination |= dict(first)
            if is_possible(combination.items()):
                gain = len(pairs_of(combination) & missing)
                if best is None or gain > best[0]:
                    best = gain, combination
        if best is not None:
            missing -= pairs_of(best[1])
            yield best[1]


def full_slice():
    """Every prior x library x dispersion x likelihood, with one kind of networks."""
    names = ("prior", "library", "dispersion", "likelihood")
    for chosen in itertools.product(*(PARTS[n] for n in names)):
        combination = dict(zip(names, chosen)) | {"networks": "first"}
        if is_possible(combination.items()):
            yield combination


@pytest.fixture(scope="module")
def cells():
    adata = small(90, 16, seed=2)
    return Cells.from_anndata(adata, batch="donor", label="cell_type", categorical=["condition"], continuous=["age"])


def build(cells, combination):
    options = PARTS["networks"][combination["networks"]]
    parts = {n: PARTS[n][combination[n]]() for n in ("prior", "library", "dispersion", "likelihood")}
    if combination["likelihood"] == "poisson":
        parts["dispersion"] = None
    parts["encoder"] = pyrosc.Encoder(3, 8, **(options or {}))
    parts["decoder"] = pyrosc.LinearDecoder(3) if options is None else pyrosc.Decoder(3, 8, **options)
    return pyrosc.scvi(cells, **parts)


def documented():
    text = inspect.getdoc(story.model).split("Sites")[1]
    return dict(re.findall(r"^(\w+) : \((n, \w+)\)", text, re.M))


def check(cells, combination, path):
    program = build(cells, combination)
    if combination["networks"] == "norm":  # shifts start at nothing; here as if learned
        for name, p in program.named_parameters():
            if ".shift." in name:
                p.data.normal_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(program, cells, epochs=8, lr=5e-3, batch_size=16, progress=False, warmup=0.0, validation=None)

    # the loss falls (means of two epochs: a single one is noisy), and nothing is left in Pyro's store
    elbo = fit.history["train_elbo"]
    assert elbo.iloc[-2:].mean() > elbo.iloc[:2].mean()
    assert not list(pyro.get_param_store())

    # sites as documented
    trace = poutine.trace(fit.program.model).get_trace(cells)
    sizes = {"n": 90, "K": 3, "G": 16, "1": 1}
    for name, shape in documented().items():
        assert tuple(trace.nodes[name]["value"].shape) == tuple(sizes[s] for s in shape.split(", "))
    assert ("dispersion" in trace.nodes) == (
        combination["dispersion"] in ("gene prior", "inverse", "batch trend") and combination["likelihood"] != "poisson"
    )
    assert trace.nodes["library"]["is_observed"] == (combination["library"] == "observed")

    # the batch changes rho
    few = cells[:6]
    shares = [fit.expression(few, do={"donor": d}, n_draws=2).to_numpy() for d in ("d1", "d2")]
    assert np.abs(shares[0] - shares[1]).max() > 1e-6
    assert shares[0].sum(1) == pytest.approx(1, abs=1e-4)

    # the file gives equal answers
    fit.save(path)
    again = pyrosc.load(path)
    np.testing.assert_array_equal(again.elbo(few), fit.elbo(few))
    np.testing.assert_array_equal(again.latent(few), fit.latent(few))
    weights = fit.log_likelihood(few, 5)
    assert np.isfinite(weights).all()
    np.testing.assert_array_equal(again.log_likelihood(few, 5), weights)
    assert again.program.describe() == fit.program.describe()


@pytest.mark.parametrize("combination", pairwise(), ids=lambda c: "+".join(c.values()))
def test_every_pair_of_parts_fits_and_is_kept(cells, combination, tmp_path):
    check(cells, combination, tmp_path / "a.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("combination", full_slice(), ids=lambda c: "+".join(c.values()))
def test_a_full_slice_fits_and_is_kept(cells, combination, tmp_path):
    check(cells, combination, tmp_path / "a.safetensors")


def test_the_pairwise_set_covers_every_pair():
    combinations = list(pairwise())
    covered = set().union(*(pairs_of(c) for c in combinations))
    possible = {
        pair
        for a, b in itertools.combinations(sorted(PARTS), 2)
        for pair in itertools.product([(a, x) for x in PARTS[a]], [(b, y) for y in PARTS[b]])
        if is_possible(pair)
    }

    assert possible <= covered
    assert len(combinations) < 100
    assert covered - possible == set()
