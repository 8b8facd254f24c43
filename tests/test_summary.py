"""Tests of the table of checks."""

import sys

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch

import pyrosc
from pyrosc import Cells
from pyrosc.check.summary import text
from pyrosc.errors import PyroscWarning

from .test_encoders import Sum, correlated
from .test_refinement import SETTINGS, Guess

module = sys.modules["pyrosc.check.summary"]  # the name is also that of its function

CHECKS = [
    "training", "latent use", "prior", "calibration", "coverage", "guide", "amortisation", "family", "zeros", "variance",
    "correlation",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_WORK", 1.2e6)


class Exact(torch.nn.Module):
    """z1 given a Poisson count of log rate 4 + 0.3 z1: near normal, by Newton's method; z2 is not in the counts."""

    sizes = {"n_latent": 2}  # noqa: RUF012

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, cells):
        total, z = cells.x.sum(-1, keepdim=True), torch.zeros(len(cells), 1)
        for _ in range(20):
            rate = 12 * (4 + 0.3 * z).exp()
            z = z + (0.3 * (total - rate) - z) / (1 + 0.09 * rate)
        sd = (1 + 0.09 * 12 * (4 + 0.3 * z).exp()) ** -0.5
        zero = torch.zeros_like(z)
        return torch.cat([z, zero], -1), self.scale * torch.cat([sd, zero + 1], -1)


class First(torch.nn.Module):
    def forward(self, z, cells):
        return (4 + 0.3 * z[..., :1]).exp().expand(*z.shape[:-1], cells.n_genes), None


def story(encoder, n=150):
    draw = np.random.default_rng(0)
    counts = draw.poisson(np.exp(4 + 0.3 * draw.normal(size=(n, 1))), (n, 12))
    cells = Cells.from_counts(counts, size_factor=np.ones(n))
    program = pyrosc.scvi(
        cells, encoder=encoder, decoder=First(), likelihood=pyrosc.PoissonLikelihood(), dispersion=None
    )
    return pyrosc.Fit(program, pd.DataFrame(), dict(SETTINGS)), cells


@pytest.fixture(scope="module")
def of_exact():
    fit, cells = story(Exact())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WORK", 1.2e6)
        return pyrosc.check.summary(fit, cells, show=False, progress=False)


def test_a_guide_that_is_the_posterior_passes_all_of_its_checks(of_exact):
    verdicts = of_exact["verdict"].to_dict()

    assert list(verdicts) == CHECKS
    for check in (
        "calibration",
        "coverage",
        "guide",
        "amortisation",
        "family",
        "prior",
        "training",
        "zeros",
        "variance",
    ):
        assert verdicts[check] == "ok", of_exact.loc[check].to_dict()
    assert verdicts["latent use"] == "look"  # one of the two is not in the counts


@pytest.mark.parametrize(
    ("scale", "fails"), [(0.6, ["coverage", "calibration", "guide"]), (2.0, ["coverage", "calibration"])]
)
def test_guides_that_are_too_narrow_or_too_wide_are_caught(scale, fails):
    fit, cells = story(Exact(scale))

    table = pyrosc.check.summary(fit, cells, show=False, progress=False)

    for check in fails:
        assert table.loc[check, "verdict"] != "ok"
        assert table.loc[check, "advice"]
    assert ("narrow" if scale < 1 else "wide") in table.loc["coverage", "advice"]
    assert 'fit.refine(cells, family="full") for these and importance=1000' in table.loc["coverage", "advice"]


def test_what_was_refined_is_to_be_weighed_and_not_refined_again():
    fit, cells = story(Exact(0.6))
    refined = fit.refine(cells, family="full", steps=2, moments=0, progress=False)

    table = pyrosc.check.summary(refined, cells, show=False, progress=False)

    assert table.loc["coverage", "verdict"] != "ok"  # two steps do not mend it
    assert table.loc["coverage", "advice"].startswith("the guide is too narrow: importance=1000 in fit.draws")


def test_a_guide_that_answers_the_prior_is_caught():
    fit, cells = story(Guess([0.0, 0.0], [1.0, 1.0]))

    table = pyrosc.check.summary(fit, cells, show=False, progress=False)

    assert table.loc["calibration", "verdict"] == "fails"
    assert table.loc["latent use", "verdict"] == "fails"
    assert table.loc["amortisation", "verdict"] == "fails"
    assert "log p(x|z)" in table.loc["calibration", "advice"]


def test_latents_that_depend_on_each_other_are_a_gap_of_the_family():
    cells = correlated()[:100]
    program = pyrosc.scvi(
        cells, encoder=Guess([0.0, 0.0], [0.3, 0.3]), decoder=Sum(), likelihood=pyrosc.PoissonLikelihood(),
        dispersion=None,
    )  # fmt: skip
    fit = pyrosc.Fit(program, pd.DataFrame(), dict(SETTINGS))

    table = pyrosc.check.summary(fit, cells, show=False, progress=False)

    # log p(x) is 1.19 nats above the best independent normals and 0.02 above the best normals, by a grid.
    assert table.loc["family", "value"] == pytest.approx(1.17, abs=0.2)
    assert table.loc["amortisation", "verdict"] == "fails"


def test_counts_that_scatter_more_than_the_story_says_are_caught():
    fit, _ = story(Exact())
    draw = np.random.default_rng(1)
    wide = Cells.from_counts(draw.negative_binomial(3, 3 / (3 + 60), (150, 12)), size_factor=np.ones(150))

    table = pyrosc.check.summary(fit, wide, show=False, progress=False)

    assert table.loc["variance", "verdict"] == "fails"
    assert "Dispersion" in table.loc["variance", "advice"]


def test_a_fit_that_ended_before_its_warm_up_is_told():
    fit, cells = story(Exact())
    fit.settings["kl_weight"] = 0.3

    with pytest.warns(PyroscWarning, match="ended at KL weight 0.30"):
        table = pyrosc.check.summary(fit, cells, show=False, progress=False)

    assert table.loc["training", "verdict"] == "fails"
    assert "too narrow" in table.loc["training", "advice"]


def test_the_table_is_printed_with_advice_for_what_is_not_well(of_exact, capsys):
    fit, cells = story(Exact(0.6))

    table = pyrosc.check.summary(fit, cells, progress=False)

    printed = capsys.readouterr().out
    assert printed.strip() == text(table).strip()
    assert printed.splitlines()[0].split()[0] == "check"
    assert "coverage: the guide is too narrow" in printed
    assert "zeros:" not in printed
    assert len(text(of_exact).splitlines()) < len(printed.splitlines())


def test_what_cannot_be_run_says_why_and_the_rest_is_there():
    """A story whose guide is a gamma: refinement has nothing to refine."""
    import pyro

    def model(cells, *, likelihood):
        with cells.plate():
            z = pyro.sample("z", dist.Gamma(2.0, 2.0).expand([1]).to_event(1))
            pyro.sample("x", likelihood(5 * z.expand(*z.shape[:-1], cells.n_genes)), obs=cells.x)

    def guide(cells):
        with cells.plate():
            total = cells.x.sum(-1, keepdim=True)
            pyro.sample("z", dist.Gamma(2.0 + total, 2.0 + 5.0 * cells.n_genes).to_event(1))

    draw = np.random.default_rng(0)
    cells = Cells.from_counts(draw.poisson(5 * np.maximum(draw.gamma(2, 0.5, (60, 1)), 0.3), (60, 8)))
    program = pyrosc.Program(model, cells, guide, likelihood=pyrosc.PoissonLikelihood())
    fit = pyrosc.Fit(program, pd.DataFrame(), dict(SETTINGS))

    table = pyrosc.check.summary(fit, cells, show=False, progress=False)

    assert table.loc["gaps", "verdict"] == "not run"
    assert "Gamma" in table.loc["gaps", "advice"]
    assert table.loc["calibration", "verdict"] == "ok"  # the posterior itself


def test_the_caller_s_world_is_left_alone():
    fit, cells = story(Exact())
    state = torch.get_rng_state()

    first = pyrosc.check.summary(fit, cells, show=False, progress=False, seed=3)
    again = pyrosc.check.summary(fit, cells, show=False, progress=False, seed=3)

    assert torch.equal(state, torch.get_rng_state())
    assert first.drop(columns="seconds").equals(again.drop(columns="seconds"))


def test_too_few_cells_are_refused():
    fit, cells = story(Exact())
    with pytest.raises(ValueError, match="at least 20, not 5"):
        pyrosc.check.summary(fit, cells[:5])
