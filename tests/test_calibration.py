"""Calibration by simulation: an exact posterior passes at the stated rate, and wrong guides of four kinds are caught."""

import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats

import pyrosc
from pyrosc import Cells, Program, ProgramError, PyroscWarning
from pyrosc.check import calibration, coverage, judged, simultaneous_band
from pyrosc.check.calibration import _gammas, ranks_of
from pyrosc.objective import KLWeight, MeanFieldELBO

from .test_refinement import two_latents

# x[n, g] ~ Poisson(library[n] w[g] z[n, k(g)]), z ~ Gamma(4, 4): the posterior is Gamma(4 + X_k, 4 + library W_k).
SHARE = torch.tensor([0.25, 0.15, 0.1, 0.3, 0.15, 0.05])
STATE = torch.tensor([0, 0, 0, 1, 1, 1])
OTHERS = torch.tensor([0.1, 0.1, 0.1, 0.5, 0.15, 0.05])  # weights of a wrong decoder


def model(cells):
    with cells.plate():
        z = pyro.sample("z", dist.Gamma(4.0, 4.0).expand([2]).to_event(1))
        rho = pyro.deterministic("rho", SHARE * z[..., STATE], event_dim=1)
        pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)


def model_of_others(cells):
    with cells.plate():
        z = pyro.sample("z", dist.Gamma(4.0, 4.0).expand([2]).to_event(1))
        rho = pyro.deterministic("rho", OTHERS * z[..., STATE], event_dim=1)
        pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)


def law(cells):
    """Shape and rate (n, 2) of the exact posterior."""
    sums = torch.stack([cells.x[:, STATE == k].sum(-1) for k in (0, 1)], -1)
    weight = torch.stack([SHARE[STATE == k].sum() for k in (0, 1)])
    return 4.0 + sums, 4.0 + cells.library * weight


def guide_of(change):
    def guide(cells):
        with cells.plate():
            pyro.sample("z", dist.Gamma(*change(*law(cells))).to_event(1))

    return guide


exact = guide_of(lambda shape, rate: (shape, rate))
narrow = guide_of(lambda shape, rate: (shape / 0.49, rate / 0.49))  # the same mean, 0.7 of the sd
wide = guide_of(lambda shape, rate: (shape * 0.49, rate * 0.49))
beside = guide_of(lambda shape, rate: (shape, 0.93 * rate))
prior_only = guide_of(lambda shape, rate: (torch.full_like(shape, 4.0), torch.full_like(rate, 4.0)))


def cells_of(total, n_cells=50, seed=0):
    draw = np.random.default_rng(seed)
    return Cells.from_counts(draw.multinomial(total, SHARE.numpy().astype(float) / SHARE.sum().item(), n_cells))


CELLS = cells_of(60)
QUIET = dict(progress=False, within=None)


def fit_of(guide, story=model, cells=CELLS):
    settings = {"n_cells": len(cells), "state": "finished", "best_epoch": 1, "kl_weight": 1.0}
    return pyrosc.Fit(Program(story, cells, guide), [], settings)


# ---- ranks and bands ----------------------------------------------------------------------------


def test_the_band_is_that_of_the_paper_and_of_brute_force():
    # Gamma for 1,000 ranks at 100 points is about 0.0026 in the table of Säilynoja et al.
    assert np.quantile(_gammas(1000, 100), 0.05) == pytest.approx(0.0026, abs=0.0004)
    at, lower, upper = simultaneous_band(200, 20)
    draw = np.random.default_rng(5)

    inside = []
    for _ in range(2000):
        share = (draw.integers(20, size=200)[:, None] < np.arange(1, 20)).mean(0)
        inside.append(((lower <= share) & (share <= upper)).all())

    np.testing.assert_allclose(at, np.arange(1, 20) / 20)
    # Four standard errors of 2,000 samples, and 0.4 % of the band itself.
    assert np.mean(inside) == pytest.approx(0.95, abs=4 * np.sqrt(0.05 * 0.95 / 2000) + 0.004)


def test_uniform_ranks_are_outside_at_the_stated_rate_and_p_is_uniform():
    draw = np.random.default_rng(1)
    table = judged({f"s{i}": draw.integers(100, size=500) for i in range(400)}, 99)

    outside = table.attrs["n_outside"]
    assert stats.binomtest(outside, 400, 0.05).pvalue > 0.001
    assert (~table["inside"]).sum() == outside
    assert table.attrs["expected_outside"] == pytest.approx(20)
    assert stats.kstest(table["p"], "uniform").pvalue > 0.001
    np.testing.assert_array_equal(table["inside"], table["p"] > 0.05)
    assert (table["deviation"] < table["limit"]).mean() > 0.96  # 98.6 % are expected


def test_shapes_are_told_apart():
    draw = np.random.default_rng(2)
    z, seen = draw.normal(size=2000), draw.normal(size=(99, 2000))

    def rank(loc, scale):
        return (loc + scale * seen < z).sum(0)

    table = judged({"right": rank(0, 1), "U": rank(0, 0.7), "dome": rank(0, 1.5), "low": rank(-0.3, 1)}, 99)

    assert list(table["shape"]) == ["-", "overconfident", "underconfident", "biased"]
    assert list(table["verdict"]) == ["calibrated", "off", "off", "off"]
    assert table.loc["low", "shift"] > 0.05
    assert table.loc["U", "spread"] > 1.1 > 0.9 > table.loc["dome", "spread"]
    share = (rank(0, 0.7)[:, None] < np.arange(1, 100)).mean(0)
    assert table.loc["U", "deviation"] == pytest.approx(np.abs(share - np.arange(1, 100) / 100).max())


def test_equal_values_are_put_at_random():
    draw = np.random.default_rng(3)

    ranks = ranks_of(np.zeros((10, 5000)), draw)

    assert stats.chisquare(np.bincount(ranks, minlength=10)).pvalue > 0.001
    assert list(ranks_of(np.array([[2.0], [1.0], [3.0], [2.5]]), draw)) == [1]


def test_ranks_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r'ranks\["z"\] must be whole numbers in 0..9.*from 0 to 12'):
        judged({"z": np.array([0, 12])}, 9)
    with pytest.raises(ValueError, match=r"must be \(n,\) whole numbers"):
        judged({"z": np.zeros((3, 2), dtype=int)}, 9)
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        simultaneous_band(100, 10, 1.5)


# ---- a posterior that is known ------------------------------------------------------------------


def test_numbers_are_those_of_the_densities_on_paper():
    fit = fit_of(narrow)
    done = calibration(fit, CELLS, n_simulations=150, n_draws=19, genes=["gene1", "gene4"], **QUIET)

    z, drawn, x = np.exp(done.truth.astype(float)), np.exp(done.draws.astype(float)), done.counts.toarray()
    every = np.concatenate([z[None], drawn])
    assert (done.names, z.shape, drawn.shape) == (["log z[0]", "log z[1]"], (150, 2), (19, 150, 2))
    np.testing.assert_array_equal(done.ranks["log z[1]"], (drawn[..., 1] < z[:, 1]).sum(0))
    share, state = SHARE.numpy().astype(float), STATE.numpy()
    by_hand = {
        "log p(x|z)": stats.poisson.logpmf(x, 60 * share * every[..., state]).sum(-1),
        "log p(z)": stats.gamma.logpdf(every, 4, scale=0.25).sum(-1),
        "|log z|^2": (np.log(every) ** 2).sum(-1),
        "log rho gene4": np.log(every[..., 1]),
    }
    shape = (4 + np.stack([x[:, state == k].sum(1) for k in (0, 1)], -1)) / 0.49
    rate = (4 + 60 * np.array([share[:3].sum(), share[3:].sum()])) / 0.49
    by_hand["density"] = stats.gamma.logpdf(every, shape, scale=1 / rate).sum(-1)
    for name, value in by_hand.items():
        found = done.density_ranks if name == "density" else done.ranks[name]
        # In float32 two draws in a thousand or so change places.
        assert (found != (value[1:] < value[0]).sum(0)).mean() < 0.03, name
    groups = np.log(every[..., 0]).reshape(20, 15, 2, 5).mean(3)
    differences = groups[:, :, 0] - groups[:, :, 1]
    assert (done.ranks["lfc gene1"] == (differences[1:] < differences[0]).sum(0)).mean() > 0.9


def test_the_exact_posterior_is_inside_its_band_at_the_stated_rate():
    fit = fit_of(exact)
    p, regions = [], []
    for seed in range(40):
        done = calibration(fit, CELLS, n_simulations=100, n_draws=19, genes=1, seed=seed, **QUIET)
        p.append(done.table["p"])
        regions.append(done.coverage(seed=seed)["p"])

    for name in ("log z[0]", "log z[1]", "log p(x|z)", "log p(z)"):
        outside = sum(one[name] <= 0.05 for one in p)
        assert stats.binom.sf(outside - 1, 40, 0.05) > 0.001, name
    independent = np.concatenate([[one["log z[0]"], one["log z[1]"]] for one in p])
    assert stats.kstest(independent, "uniform").pvalue > 0.001
    for name in ("HPD", "TARP, another", "TARP, counts"):
        outside = sum(one[name] <= 0.05 for one in regions)
        assert stats.binom.sf(outside - 1, 40, 0.05) > 0.001, name


def test_cells_chosen_by_their_total_leave_an_exact_posterior_calibrated():
    done = calibration(fit_of(exact), CELLS, n_simulations=600, n_draws=49, within=0.05, progress=False)

    total = np.asarray(done.counts.sum(1)).ravel()
    assert np.abs(np.log(total / 60)).max() <= np.log1p(0.05)
    assert done.settings["n_drawn"] > 3000  # of 600 kept: the totals of simulated cells scatter by a third
    assert done.settings["log_total_sd"] > 0.25
    assert done.table.attrs["n_outside"] <= 5  # of 26; 1.3 are expected, and they move together
    assert done.table.loc["log p(x|z)", "inside"]
    assert done.truth.mean(0) != pytest.approx(special.digamma(4) - np.log(4), abs=0.01)  # no draws of the prior, now


@pytest.mark.parametrize(
    ("guide", "story", "seen_by", "shape"),
    [
        (narrow, model, "log z[0]", "overconfident"),
        (wide, model, "log z[0]", "underconfident"),
        (beside, model, "log z[0]", "biased"),
        (exact, model_of_others, "log rho gene3", "biased"),
    ],
)
def test_wrong_guides_are_caught(guide, story, seen_by, shape):
    done = calibration(fit_of(guide, story), CELLS, n_simulations=600, n_draws=49, **QUIET)

    assert done.table.loc[seen_by, ["shape", "verdict"]].tolist() == [shape, "off"]
    assert done.table.attrs["share_below"] < 0.95
    assert "off" in set(done.coverage()["verdict"])


def test_weighed_draws_of_a_wrong_guide_are_calibrated():
    plain, weighed = (
        calibration(fit_of(wide), CELLS, n_simulations=600, n_draws=49, importance=n, **QUIET) for n in (0, 2000)
    )

    assert plain.table.loc["log z[0]", "verdict"] == "off"
    assert weighed.table["verdict"].isin(["calibrated", "small"]).all()
    with pytest.raises(ValueError, match="importance must be 0 or at least 100 draws, not 50"):
        calibration(fit_of(wide), CELLS, importance=50, **QUIET)


def test_a_guide_that_answers_the_prior_is_caught_by_what_reads_the_counts_alone():
    done = calibration(fit_of(prior_only), CELLS, n_simulations=600, n_draws=49, **QUIET)

    states = [name for name in done.table.index if "z[" in name or name in ("|log z|^2", "log p(z)")]
    assert done.table.loc[states, "verdict"].isin(["calibrated", "small"]).all()
    assert done.table.loc["log p(x|z)", "verdict"] == "off"
    regions = done.coverage()
    assert regions.loc["TARP, another", "verdict"] == "calibrated"
    assert regions.loc["TARP, counts", "verdict"] == "off"


def test_coverage_is_the_share_of_truths_in_regions_of_that_mass():
    regions = coverage(fit_of(narrow), CELLS, levels=[0.5, 0.9], n_simulations=800, n_draws=99, **QUIET)

    # Two normals of 0.7 of their sd: the region of mass a is that of squared radius 0.49 q, chi squared of 2.
    for level in (0.5, 0.9):
        expected = stats.chi2.cdf(0.49 * stats.chi2.ppf(level, 2), 2)
        assert regions.loc["HPD", f"{100 * level:g}%"] == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(800))
    dense = regions.loc["HPD"]
    assert dense["shape"] == "overconfident"
    assert dense["lower"] < dense["area"] < dense["upper"] < 0
    share, at = np.array(regions.attrs["ecp"]["HPD"]), np.array(regions.attrs["at"])
    assert dense["deviation"] == pytest.approx(np.abs(share - at).max())
    assert dense["area"] == pytest.approx((share - at).mean())
    with pytest.raises(ValueError, match="levels must be between 0 and 1, not 1.5"):
        coverage(fit_of(narrow), CELLS, levels=[1.5])


# ---- other stories ------------------------------------------------------------------------------


def shared(cells):
    speed = pyro.sample("speed", dist.LogNormal(0.0, 1.0))
    with cells.plate():
        z = pyro.sample("z", dist.Gamma(4.0, 4.0).expand([2]).to_event(1))
        rho = SHARE * z[..., STATE] * speed.unsqueeze(-1)
        pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)


def shared_guide_of(reads):
    def guide(cells):
        speed = pyro.sample("speed", dist.LogNormal(0.0, 1.0))
        shape, rate = law(cells)
        rate = 4.0 + (rate - 4.0) * (speed.unsqueeze(-1) if reads else 1.0)
        with cells.plate():
            pyro.sample("z", dist.Gamma(shape, rate).to_event(1))

    return guide


def test_sites_of_all_cells_are_held_at_one_draw_in_story_and_guide():
    right, wrong = (fit_of(shared_guide_of(reads), shared) for reads in (True, False))

    found = [calibration(f, CELLS, n_simulations=400, n_draws=49, seed=3, **QUIET) for f in (right, wrong)]

    assert found[0].table.attrs["n_outside"] <= 4
    assert found[1].table.loc["log z[0]", "verdict"] == "off"
    assert found[0].names == ["log z[0]", "log z[1]"]
    assert found[0].settings["left_out"] == ['genes: the story has no site "rho"']


SHAPES, BITS = torch.tensor([2.0, 12.0]), torch.tensor([0.3, 0.7])


def summed(cells):
    with cells.plate():
        y = pyro.sample("y", dist.Categorical(BITS), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Gamma(SHAPES[y], 4.0))
        pyro.sample("x", dist.Poisson(cells.library * z.unsqueeze(-1) * SHARE).to_event(1), obs=cells.x)


def mixture_of(bits):
    def guide(cells):
        sums, rate = cells.x.sum(-1, keepdim=True), 4.0 + cells.library
        shape = SHAPES + sums
        log = bits.log() + SHAPES * np.log(4.0) - SHAPES.lgamma() + shape.lgamma() - shape * rate.log()
        with cells.plate():
            laws = dist.Gamma(shape, rate.expand_as(shape))
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=log), laws))

    return guide


def test_discrete_sites_are_summed_out():
    cells = cells_of(6)
    right = calibration(fit_of(mixture_of(BITS), summed, cells), cells, n_simulations=500, n_draws=49, **QUIET)
    wrong = calibration(fit_of(mixture_of(BITS.flip(0)), summed, cells), cells, n_simulations=500, n_draws=49, **QUIET)

    assert list(right.table.index) == ["log z", "log p(x|z)", "log p(z)"]
    assert right.table["inside"].all()
    assert (wrong.table["verdict"] == "off").any()
    # log p(z) is that of the mixture: its ranks among those of all draws, by hand.
    z = np.exp(np.concatenate([right.truth[None], right.draws])[..., 0].astype(float))
    log = np.logaddexp(
        np.log(0.3) + stats.gamma.logpdf(z, 2, scale=0.25), np.log(0.7) + stats.gamma.logpdf(z, 12, scale=0.25)
    )
    assert (right.ranks["log p(z)"] != (log[1:] < log[0]).sum(0)).mean() < 0.03


def test_states_of_cells_take_the_place_of_the_prior():
    found = [
        calibration(fit_of(exact, cells=cells), cells, around=around, n_simulations=n, n_draws=49, **QUIET)
        for cells, around, n in ((CELLS, "prior", 400), (CELLS, "posterior", 400), (cells_of(6), "posterior", 1000))
    ]

    # Cells are all alike, with states near 1. Of 30 counts each state is known to 0.17 of itself; of the prior to 0.5.
    assert found[1].truth.std(0).max() < 0.3 < found[0].truth.std(0).min()
    assert found[1].settings["around"] == "posterior"
    assert found[1].table.loc[["log z[0]", "log z[1]"], "deviation"].max() < 0.08  # 0.079 is the limit for 400
    # Of 3 counts the prior still says much, and the guide knows nothing of the mixture that took its place: 0.08 off.
    assert found[2].table.loc["log p(z)", "verdict"] == "off"


def test_a_latent_library_is_ranked_and_its_cells_have_totals_of_their_own(tissue):
    cells = Cells.from_anndata(tissue[:200], batch="batch", label="cell_type")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        program = pyrosc.scvi(cells, n_latent=2, n_hidden=16, library=pyrosc.LatentLibrary())
        fit = pyrosc.fit(program, cells, epochs=3, progress=False)

    done = calibration(
        fit, cells, n_simulations=40, n_draws=9, genes=["gene3"], groups=("cell_type", "type0", "type1"), progress=False
    )

    assert done.names == ["z[0]", "z[1]", "log library"]
    assert done.settings["library"] == "that of the simulated counts"
    assert done.settings["within"] is None
    assert {"log library", "log rho gene3", "lfc gene3", "u9.z"} <= set(done.ranks)
    assert len(done.ranks["lfc gene3"]) == 4


def test_every_story_of_ours_is_simulated(tissue):
    few = tissue[:80].copy()
    few.obs["kind"] = few.obs["cell_type"].astype(str).where(np.arange(80) % 2 == 0, "unknown")
    few.obs["donor"] = [f"d{i % 4}" for i in range(80)]
    cells = Cells.from_anndata(few, batch="batch", label="kind", unlabeled="unknown", sample="donor")
    dispersion = pyrosc.GeneDispersion(pyrosc.Prior(dist.LogNormal, 0.0, 1.0))
    for program in (
        pyrosc.scanvi(cells, n_latent=2, n_hidden=8),
        pyrosc.mrvi(cells, n_latent=2, n_hidden=8),
        pyrosc.scvi(cells, n_latent=2, n_hidden=8, dispersion=dispersion),
        pyrosc.linear_scvi(cells, n_latent=2),
    ):
        fit = fit_of_program(program, cells)
        for around in ("prior", "posterior"):
            done = calibration(
                fit, cells, around=around, n_simulations=20, n_draws=9, genes=2, within=0.5, progress=False
            )
            assert np.isfinite(done.draws).all()
            assert {"log p(x|z)", "log p(z)", "|z|^2" if "z[0]" in done.names else "|u|^2"} <= set(done.ranks)


def fit_of_program(program, cells):
    settings = {"n_cells": len(cells), "state": "finished", "best_epoch": 1, "kl_weight": 1.0}
    return pyrosc.Fit(program, [], settings)


class PartialKL(MeanFieldELBO):
    """The ELBO with KL terms at 0.3: posteriors that are too narrow."""

    def differentiable_loss(self, model, guide, *args, **kwargs):
        weight = KLWeight(0.3, keep=False)
        return super().differentiable_loss(weight(model), weight(guide), *args, **kwargs)


def test_a_kl_weight_that_never_rises_is_caught():
    draw = np.random.default_rng(0)
    loadings, z = draw.normal(0, 0.7, (2, 40)), draw.normal(size=(1500, 2))
    rho = special.softmax(z @ loadings + draw.normal(0, 0.5, 40), axis=1)
    cells = Cells.from_counts(np.stack([draw.multinomial(200, share) for share in rho]))
    parts = dict(likelihood=pyrosc.PoissonLikelihood(), dispersion=None)
    found, regions = [], []
    for objective in (None, PartialKL(max_plate_nesting=1)):
        program = pyrosc.scvi(cells, n_latent=2, n_hidden=32, **parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PyroscWarning)
            fit = pyrosc.fit(program, cells, epochs=30, objective=objective, progress=False)
        done = calibration(fit, cells, n_simulations=400, n_draws=49, genes=10, progress=False)
        found.append(done.table)
        regions.append(done.coverage())

    usual, partial = found
    # An encoder of 1,350 cells is no exact posterior; at a weight of 0.3 regions are 0.55 as wide as they should be.
    assert (partial.loc["z[0]":"u9.z", "verdict"] == "off").all()
    assert (partial["shape"] == "overconfident").mean() > 0.9
    assert usual["deviation"].median() < 0.5 * partial["deviation"].median()
    assert regions[0].loc["HPD", "90%"] > regions[1].loc["HPD", "90%"] + 0.3


class Refinable(pyrosc.Fit):
    """A narrow guide that refinement sets right; it keeps how many cells it was asked to refine, and how."""

    def refine(self, cells, **options):
        self.asked = [*getattr(self, "asked", []), (len(cells), len(set(cells.names)), options)]
        return fit_of(exact)


def test_the_guess_of_simulated_cells_is_refined_where_the_fit_was():
    plain = fit_of(narrow)
    fit = Refinable(plain.program, [], plain.settings)
    refined = Refinable(plain.program, [], plain.settings | {"refined": {"family": "full", "steps": 20, "cells": 9}})

    before, after, also = (
        calibration(f, CELLS, n_simulations=250, n_draws=49, refined=how, **QUIET)
        for f, how in ((fit, None), (fit, True), (refined, None))
    )

    assert before.table.loc["log z[0]", "verdict"] == "off"
    assert after.table.loc["log z[0]", "verdict"] == also.table.loc["log z[0]", "verdict"] == "calibrated"
    assert [a[:2] for a in fit.asked] == [(100, 100), (100, 100), (50, 50)]
    assert refined.asked[0][2] == {"seed": 0, "progress": False, "family": "full", "steps": 20}
    assert (before.settings["refined"], also.settings["refined"]) == (False, True)


def test_a_fit_that_was_refined_is_calibrated_as_that():
    """The real thing: independent normals far too narrow, refined with a full covariance on cells never seen before."""
    fit, cells = two_latents()
    options = dict(n_simulations=80, n_draws=49, genes=2, progress=False)
    before = calibration(fit, cells, **options)
    after = calibration(fit.refine(cells[:5], family="full", steps=100, progress=False), cells, **options)

    covered = [done.coverage([0.9]).loc["HPD", "90%"] for done in (before, after)]

    assert covered[0] < 0.5
    # 80 cells: four errors of 0.034, and the posterior is a little skewed
    assert covered[1] > 0.9 - 4 * (0.9 * 0.1 / 80) ** 0.5
    assert after.settings["refined"]
    assert not before.settings["refined"]


# ---- going on, and what is refused --------------------------------------------------------------


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    fit, file = fit_of(exact), tmp_path / "ranks.npz"
    options = dict(n_simulations=250, n_draws=19, genes=2, seed=4, **QUIET)
    whole = calibration(fit, CELLS, **options)
    simulation = sys.modules["pyrosc.check.calibration"]._Simulation
    piece, seen = simulation.piece, []

    def stops(self, c, size):
        seen.append(c)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return piece(self, c, size)

    monkeypatch.setattr(simulation, "piece", stops)
    with pytest.raises(KeyboardInterrupt):
        calibration(fit, CELLS, resume=file, **options)
    resumed = calibration(fit, CELLS, resume=file, **options)
    again = calibration(fit, CELLS, resume=file, **options)

    assert seen == [0, 1, 2, 2]
    for done in (resumed, again):
        assert list(done.ranks) == list(whole.ranks)
        assert all(np.array_equal(done.ranks[name], whole.ranks[name]) for name in whole.ranks)
        np.testing.assert_array_equal(done.draws, whole.draws)
        assert (done.counts != whole.counts).nnz == 0
    assert [p.name for p in tmp_path.iterdir()] == ["ranks.npz"]
    with pytest.raises(ValueError, match="holds ranks of something else: seed was 4, is 5"):
        calibration(fit, CELLS, resume=file, **(options | {"seed": 5}))
    with pytest.raises(ValueError, match="something else: cells was"):
        calibration(fit, cells_of(60, seed=1), resume=file, **options)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no ranks of calibration"):
        calibration(fit, CELLS, resume=file, **options)


def test_the_same_seed_gives_the_same_ranks_and_nothing_outside_changes():
    fit, before = fit_of(exact), torch.random.get_rng_state()
    options = dict(n_simulations=40, n_draws=9, **QUIET)
    one, two, other = (calibration(fit, CELLS, seed=seed, **options) for seed in (1, 1, 2))

    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(one.truth, two.truth)
    assert not np.array_equal(one.truth, other.truth)
    assert repr(one).startswith("Calibration(test_calibration, around the prior: 40 cells x 9 draws, 26 scalars")


def observes(cells):
    with cells.plate():
        z = pyro.sample("z", dist.Gamma(4.0, 4.0).expand([2]).to_event(1))
        pyro.sample("protein", dist.Normal(z[..., 0], 1.0), obs=torch.zeros(len(cells)))
        pyro.sample("x", dist.Poisson(cells.library * SHARE * z[..., STATE]).to_event(1), obs=cells.x)


def test_what_cannot_be_simulated_is_refused():
    fit = fit_of(exact)
    for options, said in (
        (dict(around="data"), 'around must be "prior" or "posterior"'),
        (dict(n_simulations=5), "n_simulations must be a whole number of at least 20"),
        (dict(n_draws=3), "n_draws must be a whole number of at least 9"),
        (dict(genes=["gone"]), "genes gone are not in this fit|gone"),
        (dict(genes=0), "genes must be names, or how many"),
        (dict(groups=("kind", "a", "b")), 'groups: there is no column "kind"'),
        (dict(groups=(np.ones(3, bool), np.ones(3, bool))), "groups must be"),
        (dict(within=-1.0), "within must be a positive share"),
        (dict(within=1e-9), "within=1e-09: of"),
        (dict(level=2), "level must be between"),
        (dict(seed=-1), "seed must be a whole number"),
    ):
        with pytest.raises(ValueError, match=said):
            calibration(fit, cells_of(40_001), progress=False, **({"n_simulations": 20} | options))
    with pytest.raises(ProgramError, match='observes "?protein"? besides the counts'):
        calibration(fit_of(exact, observes), CELLS, **QUIET)
    with pytest.raises(TypeError, match="expected a Fit first"):
        calibration(fit.program, CELLS)


def test_the_picture_shows_the_band_and_names_what_is_outside():
    pytest.importorskip("matplotlib")
    done = calibration(fit_of(narrow), CELLS, n_simulations=400, n_draws=49, genes=2, **QUIET)

    ax = pyrosc.plot.calibration(done)
    one = pyrosc.plot.calibration(done, ["log z[0]"])

    n_single = sum(len(rank) == 400 for rank in done.ranks.values())
    assert len(ax.lines) == n_single
    assert "outside" in ax.get_title()
    share = (done.ranks["log z[0]"][:, None] < np.arange(1, 50)).mean(0)
    np.testing.assert_allclose(one.lines[0].get_ydata(), share - np.arange(1, 50) / 50)
    with pytest.raises(ValueError, match="draw them apart"):
        pyrosc.plot.calibration(done, ["log z[0]", next(n for n in done.ranks if n.startswith("lfc"))])
    with pytest.raises(ValueError, match="there is no"):
        pyrosc.plot.calibration(done, ["q"])
