"""Effects: predicted counts, counterfactuals, differential expression, ensembles; against brute force and simulated truth."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyrosc
from pyrosc import Cells, GeneDispersion, InverseSqrtPrior, Program, ProgramError, PyroscWarning, effects

from .conftest import small


def quiet_fit(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, progress=False, **(dict(epochs=60) | options))


@pytest.fixture(scope="module")
def cells(tissue):
    return Cells.from_anndata(tissue[:160], batch="batch", label="cell_type")


@pytest.fixture(scope="module")
def fit(cells):
    return quiet_fit(pyrosc.scvi(cells, n_latent=3, n_hidden=16), cells)


@pytest.fixture(scope="module")
def ensemble(cells):
    return quiet_fit(pyrosc.scvi(cells, n_latent=3, n_hidden=16), cells, ensemble=3)


# ---- predicted counts --------------------------------------------------------------------------


def test_predicted_counts_have_the_law_of_the_story(fit, cells):
    few = cells[:5]
    drawn = fit.predict(few, 4000)

    assert drawn.shape == (4000, 5, 60)
    assert (drawn == np.round(drawn)).all()
    assert (drawn >= 0).all()
    expected = fit.expression(few, n_draws=4000).to_numpy() * few.library.numpy()
    error = drawn.std(0) / 4000**0.5
    assert (np.abs(drawn.mean(0) - expected) < 6 * error + 0.02 * expected).all()  # both are means of draws
    theta = fit.program.parts["dispersion"]().detach().numpy()
    assert (drawn.var(0) > (expected + expected**2 / theta) * 0.8).mean() > 0.95  # NB scatter, and that of z


def test_predicted_counts_follow_genes_seed_and_do(fit, cells):
    few = cells[:4]

    assert np.array_equal(fit.predict(few, 3, seed=2), fit.predict(few, 3, seed=2))
    assert not np.array_equal(fit.predict(few, 3, seed=2), fit.predict(few, 3, seed=3))
    both = fit.predict(few, 3, genes=["gene7", "gene2"])
    np.testing.assert_array_equal(both, fit.predict(few, 3)[:, :, [7, 2]])
    means = [fit.predict(cells, 50, do={"batch": level}).mean((0, 1)) for level in ("batch0", "batch1", "all")]
    assert np.abs(means[0] - means[1]).max() > 0.3
    np.testing.assert_allclose(means[2], (means[0] + means[1]) / 2, rtol=0.1, atol=0.2)


def test_predict_refuses_what_it_cannot(fit, cells):
    with pytest.raises(ValueError, match="n_draws must be a whole number"):
        fit.predict(cells, 0)
    with pytest.raises(ValueError, match="genes 'gene99' are not in this fit|genes .*gene99.* are not in this fit"):
        fit.predict(cells, 1, genes=["gene99"])
    with pytest.raises(ValueError, match="would take"):
        fit.predict(cells, 10**9)


def test_draws_of_global_sites_are_the_same_for_every_block_of_cells(cells, monkeypatch):
    program = pyrosc.scvi(cells, n_latent=3, n_hidden=8, dispersion=GeneDispersion(prior=InverseSqrtPrior(3.0)))

    def model(cells, *, prior, library, dispersion, decoder, likelihood):
        theta = dispersion()
        with cells.plate():
            pyro.sample("z", prior(cells))
            pyro.deterministic("shown", theta.expand(*theta.shape[:-1], len(cells), theta.shape[-1]), event_dim=1)
            pyro.sample("x", dist.Poisson(cells.library.expand(-1, cells.n_genes)).to_event(1), obs=cells.x)

    shown = Program(model, cells, pyrosc.models.scvi.guide, **dict(program.parts.items()))
    fit = pyrosc.Fit(shown, pd.DataFrame(), {"n_cells": 1, "state": "finished", "best_epoch": 0})
    monkeypatch.setattr("pyrosc.loading._BLOCK_VALUES", 60 * 6 * 2 * 10)

    drawn = fit.draws("shown", cells[:50], 6)

    assert np.ptp(drawn, axis=1).max() == 0.0  # over cells, in five blocks
    assert np.ptp(drawn, axis=0).min() > 0.0  # over draws


# ---- counterfactuals ---------------------------------------------------------------------------


def test_a_counterfactual_is_the_ratio_of_draws_in_two_worlds(fit, cells):
    few = cells[:6]
    table = fit.counterfactual(few, {"batch": "batch1"}, 40, seed=5, scale=1e4)
    factual = fit.draws("rho", few, 40, seed=5).astype(float)
    other = fit.draws("rho", few, 40, do={"batch": "batch1"}, seed=5).astype(float)
    lfc = np.log2(other.mean(1)) - np.log2(factual.mean(1))

    np.testing.assert_allclose(table["factual"], 1e4 * factual.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(table["counterfactual"], 1e4 * other.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(table["lfc_mean"], lfc.mean(0), atol=1e-5)
    np.testing.assert_allclose(table["lfc_sd"], lfc.std(0, ddof=1), atol=1e-5)
    np.testing.assert_allclose(table["lfc_upper"], np.quantile(lfc, 0.95, axis=0), atol=1e-5)
    np.testing.assert_allclose(table["probability"], (np.abs(lfc) > 0.25).mean(0))
    assert list(table.index) == list(cells.schema.genes)
    assert table.attrs["uncertainty"] == "z only"
    assert table.attrs["do"] == {"batch": "batch1"}


def test_a_counterfactual_of_each_cell(fit, cells):
    few = cells[:6]
    table = fit.counterfactual(few, {"batch": "batch1"}, 40, ["gene3", "gene1"], by_cell=True, seed=5)
    factual = fit.draws("rho", few, 40, seed=5)[..., [3, 1]].astype(float)
    other = fit.draws("rho", few, 40, do={"batch": "batch1"}, seed=5)[..., [3, 1]].astype(float)
    lfc = np.log2(other) - np.log2(factual)

    np.testing.assert_allclose(table["gene1"]["lfc_mean"], lfc[..., 1].mean(0), atol=1e-5)
    np.testing.assert_allclose(table["gene3"]["lfc_lower"], np.quantile(lfc[..., 0], 0.05, axis=0), atol=1e-5)
    stayed = (cells.batch[:6] == 1).numpy()
    assert stayed.any()
    assert (table["gene1"]["lfc_mean"][stayed] == 0).all()  # the world they were seen in


def test_the_average_over_levels_is_a_world_too(fit, cells):
    few = cells[:6]
    table = fit.counterfactual(few, {"batch": "all"}, 10, seed=1)
    worlds = [fit.draws("rho", few, 10, do={"batch": level}, seed=1) for level in cells.schema.batch.levels]

    np.testing.assert_allclose(table["counterfactual"], np.mean(worlds, axis=(0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(do={}), "do names no column"),
        (dict(do={"donor": "x"}), "donor"),
        (dict(do={"batch": "batch7"}), "batch7"),
        (dict(do={"batch": "batch1"}, n_draws=1), "n_draws must be a whole number of at least 2"),
        (dict(do={"batch": "batch1"}, interval=1.0), "interval must be between 0 and 1"),
        (dict(do={"batch": "batch1"}, delta=-1.0), "delta must be at least 0"),
        (dict(do={"batch": "batch1"}, pseudocount="1"), "pseudocount must be a number"),
    ],
)
def test_counterfactual_refuses_what_it_cannot(fit, cells, options, match):
    with pytest.raises(ValueError, match=match):
        fit.counterfactual(cells, **options)


def test_stories_without_shares_of_cells_are_refused():
    cells = Cells.from_anndata(small(), batch="donor", label="cell_type")

    def one_profile(cells):
        rho = pyro.sample("rho", dist.Dirichlet(torch.ones(cells.n_genes)))
        with cells.plate():
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    fit = pyrosc.Fit(Program(one_profile, cells), pd.DataFrame(), {"n_cells": 1, "state": "finished", "best_epoch": 0})
    with pytest.raises(ProgramError, match='"rho" is one for all cells'):
        fit.counterfactual(cells, {"donor": "d1"})
    with pytest.raises(ProgramError, match='"rho" is one for all cells'):
        fit.differential_expression(cells, "cell_type", "B")


# ---- differential expression -------------------------------------------------------------------


def brute(fit, cells, masks, n_draws, seed, e=0.0, **options):
    asked = masks[0] | masks[1]
    cells, masks = cells[asked], [mask[asked] for mask in masks]
    drawn = fit.draws("rho", cells, n_draws, seed=seed, **options).astype(float)
    means = [drawn[:, m].mean(1) for m in masks]
    return np.log2(means[0] + e) - np.log2(means[1] + e)


def test_the_effect_of_groups_is_that_of_their_draws(fit, cells):
    some = cells[:60]
    kind = some.obs["cell_type"].to_numpy()
    masks = kind == "type0", kind == "type1"

    table = fit.differential_expression(
        some,
        "cell_type",
        "type0",
        "type1",
        resample=False,
        residual=False,
        shrink=False,
        batches="own",
        n_draws=50,
        seed=4,
        pseudocount=1e-4,
        delta=0.5,
    )
    lfc = brute(fit, some, masks, 50, 4, 1e-4)

    table = table.loc[list(cells.schema.genes)]
    np.testing.assert_allclose(table["lfc_mean"], lfc.mean(0), atol=1e-4)
    np.testing.assert_allclose(table["lfc_sd"], lfc.std(0, ddof=1), atol=1e-4)
    np.testing.assert_allclose(table["probability"], (np.abs(lfc) > 0.5).mean(0), atol=1e-6)
    x = some.x.numpy()
    np.testing.assert_allclose(table["raw_mean1"], x[masks[0]].mean(0), rtol=1e-5)
    np.testing.assert_allclose(table["detected2"], (x[masks[1]] > 0).mean(0), rtol=1e-5)
    masked = fit.differential_expression(
        some,
        group1=masks[0],
        group2=masks[1],
        resample=False,
        residual=False,
        shrink=False,
        batches="own",
        n_draws=50,
        seed=4,
        pseudocount=1e-4,
        delta=0.5,
    )
    assert masked["lfc_mean"].equals(fit.differential_expression(
        some, "cell_type", "type0", ["type1"], resample=False, batches="own", n_draws=50, seed=4, pseudocount=1e-4,
        delta=0.5, residual=False, shrink=False,
    )["lfc_mean"])  # fmt: skip


def test_probabilities_are_those_of_effects_from_the_law_of_all_genes(ensemble, cells):
    options = dict(n_draws=60, delta=0.005, fdr=0.95, batches="own")  # effects are small after so few epochs
    table = ensemble.differential_expression(cells, "cell_type", "type0", "type1", **options)
    plain = ensemble.differential_expression(cells, "cell_type", "type0", "type1", shrink=False, **options)

    assert "lfc_shrunk" not in plain
    same = plain.loc[table.index]
    np.testing.assert_allclose(table["lfc_mean"], same["lfc_mean"])
    # Shrinking is towards 0, and does not turn a sign.
    assert (table["lfc_shrunk"] * table["lfc_mean"] >= 0).all()
    assert (table["lfc_shrunk"].abs() <= table["lfc_mean"].abs() + 1e-9).all()
    sure = (table["probability"] < 1e-9) | (table["probability"] > 1 - 1e-9)
    chance = table["probability"][~sure]
    np.testing.assert_allclose(table["log_odds"][~sure], np.log(chance) - np.log1p(-chance), atol=1e-3)
    assert len(chance) > 20
    assert np.log(table["lfc_sd"]).std() < np.log(same["lfc_sd"]).std()  # variances are moderated
    low, high = table.attrs["fdp_interval"]
    assert 0 <= low <= high <= 1


def test_shared_batches_take_their_share_of_the_draws(fit, cells):
    some = cells[:60]
    kind = some.obs["cell_type"].to_numpy()
    masks = kind == "type0", kind != "type0"

    table = fit.differential_expression(
        some, "cell_type", "type0", resample=False, residual=False, n_draws=31, seed=4, pseudocount=0.0
    )
    lfc = [brute(fit, some, masks, 16, 4 + k, do={"batch": level}) for k, level in enumerate(cells.schema.batch.levels)]
    # How batches differ is not uncertainty of their mean.
    lfc = np.concatenate([one - one.mean(0) for one in lfc]) + np.mean([one.mean(0) for one in lfc], axis=0)

    np.testing.assert_allclose(table.loc[list(cells.schema.genes), "lfc_mean"], lfc.mean(0), atol=1e-4)
    assert table.attrs["batches"] == list(cells.schema.batch.levels)
    assert set(table["group2"]) == {"rest"}


def test_every_group_against_the_rest_is_each_of_them_alone(fit, cells):
    options = dict(n_draws=20, resample=False, batches="own", seed=1)
    together = fit.differential_expression(cells, "cell_type", **options)

    for level in cells.schema.label.levels:
        alone = fit.differential_expression(cells, "cell_type", level, **options)
        mine = together[together["group1"] == level]
        np.testing.assert_allclose(mine["lfc_mean"], alone.loc[mine.index, "lfc_mean"], atol=1e-4)
        assert together.attrs["delta"][level] == pytest.approx(alone.attrs["delta"], abs=1e-3)


EDITED = pytest.mark.filterwarnings("ignore:these cells have the names of the training cells")


@EDITED
def test_what_counts_say_beyond_the_decoder_is_added(fit, cells):
    """A story that was told nothing of a group, and cannot find it in the state, misses what was done to it."""
    draw = np.random.default_rng(0)
    group = draw.uniform(size=len(cells)) < 0.5
    x = cells.x.numpy().astype(int)
    x[np.ix_(group, np.arange(10))] = draw.binomial(x[np.ix_(group, np.arange(10))], 0.4)
    changed = cells.with_counts(x)
    options = dict(group1=group, batches="own", delta=0.3, n_draws=200)
    told = fit.differential_expression(changed, **options)
    decoded = fit.differential_expression(changed, residual=False, **options)

    genes = list(cells.schema.genes)
    effect = np.where(np.arange(len(genes)) < 10, np.log2(0.4), 0.0)
    seen = cells.x.numpy().mean(0) > 0.5
    few = seen & (effect < 0)
    assert few.sum() >= 5
    assert decoded.loc[genes, "lfc_mean"][few].mean() > -0.6 > told.loc[genes, "lfc_mean"][few].mean()
    # Intervals cover what was done: 90 % of genes, with a binomial scatter of 0.045 over some 50.

    def covered(table):
        table = table.loc[genes]
        return ((table["lfc_lower"] < effect) & (effect < table["lfc_upper"])).to_numpy()

    assert covered(told)[seen].mean() > 0.75
    assert covered(decoded)[few].mean() < 0.3
    assert told.attrs["uncertainty"] == "z, cells and counts"
    np.testing.assert_allclose(
        told.loc[genes, "lfc_mean"] - told.loc[genes, "lfc_residual"], decoded.loc[genes, "lfc_mean"], atol=1e-4
    )


def test_a_law_of_counts_without_moments_is_asked_without_them(cells):
    class Shy(pyrosc.distributions.NegativeBinomial):
        @property
        def variance(self):
            raise NotImplementedError

    class ShyLikelihood(torch.nn.Module):
        def forward(self, mean, dispersion=None, hidden=None):
            return Shy(mean, dispersion).to_event(1)

    fit = quiet_fit(pyrosc.scvi(cells, n_latent=2, n_hidden=8, likelihood=ShyLikelihood()), cells, epochs=1)

    with pytest.raises(ProgramError, match="has no mean or variance.*residual=False"):
        fit.differential_expression(cells, "cell_type", "type0")
    assert len(fit.differential_expression(cells, "cell_type", "type0", residual=False)) == 60


@EDITED
def test_counts_seen_over_expected_are_those_of_the_story(fit, cells):
    """On counts that the story made itself they differ from 1 as their variance says."""
    z = []
    unit = np.searchsorted(np.unique(cells.obs["cell_type"]), cells.obs["cell_type"])
    for seed in range(20):
        made = cells.with_counts(fit.predict(cells, 1, seed=100 + seed)[0])
        # The state is read anew from the counts made, which pulls expected counts towards them: less than 1.
        totals = effects.Totals.of(fit, made, unit, seed)
        ratio, variance = totals.log_ratio(np.arange(unit.max() + 1) == 0, None)
        z.append((ratio[0] / np.sqrt(variance))[totals.expected[0, 0] > 20])
    x = cells.x.numpy()
    first = effects.Totals.of(fit, cells, unit, 0)
    np.testing.assert_allclose(first.seen[0], x[unit == 0].sum(0), rtol=1e-5)
    assert 0.75 < np.std(np.concatenate(z)) < 1.1
    # The mean of a log is below the log of the mean by half the variance: -s / 2 in these units, s about 0.3 here.
    assert -0.25 < np.mean(np.concatenate(z)) < 0.05


def test_donors_that_scatter_widen_what_counts_say():
    draw = np.random.default_rng(0)
    expected = np.full((8, 50), 400.0)
    of_donor = draw.normal(0, 0.3, (8, 50))
    totals = effects.Totals(draw.poisson(expected * np.exp(of_donor)).astype(float), expected[None], expected)
    every = np.ones(8, dtype=bool)

    ratio, alone = totals.log_ratio(every, None)
    _, known = totals.log_ratio(every, np.arange(8))

    assert np.std(ratio) > 2 * np.sqrt(alone).mean()  # counts alone would be far too sure
    assert np.sqrt(known.mean()) == pytest.approx(np.std(ratio), rel=0.3)  # 50 genes, 7 degrees each


def test_the_bayesian_bootstrap_scatters_as_cells_do(fit, cells):
    """What weighing cells adds to the variance over draws is the variance of a mean of the cells' shares."""
    kind = cells.obs["cell_type"].to_numpy()
    options = dict(batches="own", n_draws=400, pseudocount=0.0, residual=False)
    table = fit.differential_expression(cells, "cell_type", "type0", **options)
    still = fit.differential_expression(cells, "cell_type", "type0", resample=False, **options)
    # Weights Dirichlet(1, ..., 1) give a mean of n values the variance of the values over n + 1.
    drawn = fit.draws("rho", cells, 40).astype(float)

    def variance(rows):
        return (rows.var(1) / (rows.shape[1] + 1) / rows.mean(1) ** 2).mean(0) / np.log(2) ** 2

    expected = np.sqrt(variance(drawn[:, kind == "type0"]) + variance(drawn[:, kind != "type0"]))
    genes = list(cells.schema.genes)
    added = np.sqrt(np.maximum(table.loc[genes, "lfc_sd"] ** 2 - still.loc[genes, "lfc_sd"] ** 2, 0)).to_numpy()
    assert np.median(added / expected) == pytest.approx(1.0, abs=0.1)
    assert table.attrs["uncertainty"] == "z and cells"
    assert still.attrs["uncertainty"] == "z only"


def test_donors_are_resampled_whole(tissue):
    donor = np.array([f"d{i}" for i in range(8)])[np.arange(160) % 8]
    data = tissue[:160].copy()
    data.obs["donor"] = donor
    cells = Cells.from_anndata(data, label="cell_type", sample="donor")
    fit = quiet_fit(pyrosc.scvi(cells, n_latent=3, n_hidden=16), cells)

    options = dict(n_draws=200, pseudocount=0.0, residual=False)
    drawn = fit.differential_expression(cells, "cell_type", "type0", **options)
    nameless = Cells.from_anndata(data[:, :].copy(), label="cell_type")
    del nameless.obs["donor"]
    plain = fit.differential_expression(nameless, "cell_type", "type0", **options)

    # Eight donors weighed, each of five cells of a type, scatter at least as much as the cells alone.
    assert np.median(drawn["lfc_sd"].loc[plain.index] / plain["lfc_sd"]) > 1.05


def test_pairs_of_cells_scatter_as_cells_do(fit, cells):
    table = fit.differential_expression(cells, "cell_type", "type0", "type1", estimand="cell", pseudocount=0.0)
    shares = np.log2(fit.expression(cells, do={"batch": "all"}, n_draws=50).to_numpy())
    kind = cells.obs["cell_type"].to_numpy()
    one, two = shares[kind == "type0"], shares[kind == "type1"]

    genes = list(cells.schema.genes)
    np.testing.assert_allclose(table.loc[genes, "lfc_mean"], one.mean(0) - two.mean(0), atol=0.25)
    spread = np.sqrt(one.var(0) + two.var(0))
    assert (table.loc[genes, "lfc_sd"] > 0.9 * spread).mean() > 0.9  # theirs, and that of the states


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(groupby="kind"), 'there is no column "kind"'),
        (dict(groupby="cell_type", group1="type9"), 'there is no level "type9"'),
        (dict(groupby="cell_type", group1="type0", group2=["type0", "type1"]), "cells are in both groups"),
        (dict(groupby="cell_type", group2="type0"), "group2 without group1"),
        (dict(group1=np.ones(3, dtype=bool)), "must be a mask of 160 cells"),
        (dict(group1=np.ones(160, dtype=bool)), "holds no cell"),
        (dict(groupby="cell_type", group1=np.ones(160, dtype=bool)), "masks go without groupby"),
        (dict(groupby="cell_type", estimand="pairs"), "estimand must be"),
        (dict(groupby="cell_type", estimand="donor"), "needs to know donors"),
        (dict(groupby="cell_type", batches="each"), "batches must be"),
        (dict(groupby="cell_type", donor="patient"), 'donor: there is no column "patient"'),
        (dict(groupby="cell_type", fdr=2.0), "fdr must be between 0 and 1"),
        (dict(groupby="cell_type", n_draws=1), "n_draws must be"),
    ],
)
def test_differential_expression_refuses_what_it_cannot(fit, cells, options, match):
    with pytest.raises(ValueError, match=match):
        fit.differential_expression(cells, **options)


def test_groups_without_a_shared_batch_are_refused_unless_asked_for(fit, cells):
    batch = cells.obs["batch"].to_numpy()

    with pytest.raises(ValueError, match="share no level"):
        fit.differential_expression(cells, group1=batch == "batch0", group2=batch == "batch1")
    table = fit.differential_expression(cells, group1=batch == "batch0", group2=batch == "batch1", batches="own")
    assert table.attrs["batches"] == "own"


# ---- calls -------------------------------------------------------------------------------------


def test_the_expected_share_of_false_calls_is_a_running_mean():
    probability = np.array([0.9, 1.0, 0.5, 0.9])

    found = effects.expected_fdp(probability)

    # in order 1.0, 0.9, 0.9, 0.5; the two of 0.9 are called together
    np.testing.assert_allclose(found, [0.2 / 3, 0.0, 0.7 / 4, 0.2 / 3])


def test_calls_by_true_probabilities_keep_the_rate():
    draw = np.random.default_rng(0)
    rates = []
    for _ in range(50):
        probability = draw.beta(0.4, 0.4, 2000)
        is_true = draw.random(2000) < probability
        called = effects.expected_fdp(probability) <= 0.1
        rates.append(1 - is_true[called].mean())
    assert np.mean(rates) == pytest.approx(0.1, abs=3 * np.std(rates) / 50**0.5 + 0.002)
    assert np.mean(effects.expected_fdp(np.ones(10))) == 0.0


def test_the_threshold_comes_from_the_outer_effects():
    draw = np.random.default_rng(0)
    lfc = np.r_[draw.normal(0, 0.1, 800), draw.normal(2.0, 0.2, 100), draw.normal(-2.0, 0.2, 100)]

    assert effects.delta_of(lfc) == pytest.approx(1.2, abs=0.1)
    assert effects.delta_of(draw.normal(0, 0.05, 1000)) == 0.3  # its floor


def test_a_pseudocount_is_what_unseen_genes_get():
    shares = torch.tensor([[1e-3, 2e-5, 1e-5, 0.9], [1e-3, 4e-5, 1e-6, 0.9]])
    counts = np.array([5, 0, 0, 9])

    assert effects.pseudocount_of([counts], [shares]) == pytest.approx(np.quantile([4e-5, 1e-5], 0.9))
    assert effects.pseudocount_of([np.ones(4)], [shares]) == 0.0


# ---- donors ------------------------------------------------------------------------------------


def donor_table(draw, shift, n_donors, is_paired, by_donor=0.4, n_genes=150):
    """A table by donor from made-up donor means."""
    donors = np.arange(2 * n_donors) % n_donors if is_paired else np.arange(2 * n_donors)
    effect = draw.normal(0, by_donor, (2 * n_donors, n_genes))
    if is_paired:  # a donor is alike in both groups
        effect = effect / 2 + np.tile(draw.normal(0, by_donor, (n_donors, n_genes)), (2, 1))
    group = np.repeat([0, 1], n_donors)
    level = draw.normal(-8, 1.5, n_genes) + effect + np.outer(group == 0, shift)
    sums = effects.Sums(torch.tensor(2.0**level).unsqueeze(0), torch.ones(1, 2 * n_donors))
    return sums, donors, group


@pytest.mark.parametrize("is_paired", [True, False])
def test_donors_without_an_effect_are_left_in_peace(is_paired, monkeypatch):
    draw = np.random.default_rng(0)
    monkeypatch.setattr(effects, "finished", lambda table, *a: table.assign(is_de=table["expected_fdp"] <= 0.05))
    monkeypatch.setattr(effects, "_counts_of", lambda cells, mask: (np.ones(150),))
    null, found, p_values = [], [], []
    for _ in range(60):
        for shift, kept in ((np.zeros(150), null), (np.r_[np.full(20, 2.5), np.zeros(130)], found)):
            sums, donors, group = donor_table(draw, shift, 6, is_paired)
            masks = group == 0, group == 1
            pair = effects.Comparison(("a", "b"), masks)
            table = effects._by_donor(None, None, pair, sums, list(masks), donors, donors, 0.5, 0.0, 0.05, 0.9)
            kept.append(table["is_de"].to_numpy())
            if not shift.any():
                p_values.append(effects._by_donor(
                    None, None, pair, sums, list(masks), donors, donors, 0.0, 0.0, 0.05, 0.9)["p_value"].to_numpy())  # fmt: skip
            else:
                assert table["lfc_mean"][:20].mean() == pytest.approx(2.5, abs=0.5)

    assert np.mean([k.any() for k in null]) <= 0.1
    found = np.stack(found)
    assert found[:, :20].mean() > 0.9
    assert found[:, 20:].sum() / found.sum() <= 0.05
    assert stats.kstest(np.concatenate(p_values)[::7], "uniform").pvalue > 0.001


def one_table(sums, donors, group, obs=None, design=(), pair_of=None):
    class Some:
        pass

    some = Some()
    some.obs = obs
    pair = effects.Comparison(("a", "b"), (group == 0, group == 1))
    return effects._by_donor(
        None, some, pair, sums, [group == 0, group == 1], donors, donors, 0.0, 0.0, 0.05, 0.9, design
    )


@pytest.mark.parametrize("is_paired", [True, False])
def test_donors_are_compared_by_least_squares(is_paired, monkeypatch):
    """The t of two samples, that of pairs, and least squares with a covariate, before variances are moderated."""
    monkeypatch.setattr(effects, "finished", lambda table, *a: table)
    monkeypatch.setattr(effects, "_counts_of", lambda cells, mask: (np.ones(150),))
    monkeypatch.setattr(effects, "moderated", lambda v, df, *a: (v, np.full_like(v, df)))
    sums, donors, group = donor_table(np.random.default_rng(3), np.zeros(150), 6, is_paired)
    y = np.log2(sums.shares[0].numpy())
    age = np.random.default_rng(4).uniform(20, 80, 12)
    sex = np.array(["f", "m"])[np.arange(12) // 3 % 2]
    obs = pd.DataFrame({"age": age, "sex": sex})

    plain = one_table(sums, donors, group)
    adjusted = one_table(sums, donors, group, obs, ["age"])

    test = stats.ttest_rel if is_paired else stats.ttest_ind
    exact = test(y[group == 0], y[group == 1], axis=0)
    np.testing.assert_allclose(plain["t"], exact.statistic, rtol=1e-6)
    np.testing.assert_allclose(plain["p_value"], exact.pvalue, rtol=1e-6)
    around = pd.get_dummies(donors).to_numpy(float) if is_paired else np.ones((12, 1))
    terms = np.column_stack([group == 0, age, around]).astype(float)
    by_hand, rest, *_ = np.linalg.lstsq(terms, y, rcond=None)
    np.testing.assert_allclose(adjusted["lfc_mean"], by_hand[0], rtol=1e-6)
    free = 12 - np.linalg.matrix_rank(terms)
    np.testing.assert_allclose(
        adjusted["lfc_sd"], np.sqrt(rest / free * np.linalg.pinv(terms.T @ terms)[0, 0]), rtol=1e-6
    )
    assert (adjusted["df"] == free).all()
    both = one_table(sums, donors, group, obs, ["age", "sex"])
    assert (both["df"] <= free).all()


def test_designs_that_leave_no_effect_are_refused(monkeypatch):
    monkeypatch.setattr(effects, "_counts_of", lambda cells, mask: (np.ones(150),))
    sums, donors, group = donor_table(np.random.default_rng(3), np.zeros(150), 6, False)
    obs = pd.DataFrame({"arm": np.array(["x", "y"])[group], "id": [f"i{i}" for i in range(12)]})
    with pytest.raises(ValueError, match='design: the groups can be told by "arm"'):
        one_table(sums, donors, group, obs, ["arm"])
    with pytest.raises(ValueError, match="design: the groups can be told by|degrees of freedom"):
        one_table(sums, donors, group, obs, ["id"])
    with pytest.raises(ValueError, match='design: there is no column "agee"'):
        one_table(sums, donors, group, obs.assign(age=1.0), ["agee"])
    two = np.concatenate([donors, donors])
    mixed = pd.DataFrame({"arm": np.array(["x", "y"])[np.arange(24) % 2]})
    double = effects.Sums(torch.cat([sums.shares] * 2, 1), torch.ones(1, 24))
    order = np.argsort(two, kind="stable")
    with pytest.raises(ValueError, match='design: "arm" has 2 levels within one donor and group'):
        one_table(
            effects.Sums(double.shares[:, order], double.weights), two[order], np.concatenate([group, group])[order],
            mixed, ["arm"],
        )  # fmt: skip


def test_a_design_is_for_donors(fit, cells):
    with pytest.raises(ValueError, match='design is for estimand="donor", not'):
        fit.differential_expression(cells, "cell_type", "type0", design=["batch"])
    with pytest.raises(TypeError, match=r'design=\["batch"\]'):
        fit.differential_expression(cells, "cell_type", "type0", design="batch")


def test_too_few_donors_are_refused(tissue):
    data = tissue[:80].copy()
    data.obs["donor"] = np.array(["a", "b"])[np.arange(80) % 2]
    cells = Cells.from_anndata(data, label="cell_type", sample="donor")
    fit = quiet_fit(pyrosc.scvi(cells, n_latent=2, n_hidden=8), cells, epochs=2)

    with pytest.raises(ValueError, match="needs three donors in both groups"):
        fit.differential_expression(cells, "cell_type", "type0", estimand="donor")


def test_donors_are_compared_within_themselves(tissue):
    data = tissue[:240].copy()
    data.obs["donor"] = np.array(["a", "b", "c", "d"])[np.arange(240) % 4]
    cells = Cells.from_anndata(data, label="cell_type", sample="donor")
    fit = quiet_fit(pyrosc.scvi(cells, n_latent=3, n_hidden=16), cells)

    options = dict(estimand="donor", pseudocount=0.0, n_draws=10, residual=False)
    table = fit.differential_expression(cells, "cell_type", "type0", "type1", **options)

    two = cells[cells.obs["cell_type"].isin(["type0", "type1"]).to_numpy()]
    shares = fit.draws("rho", two, 10).mean(0)
    kind, donor = two.obs["cell_type"].to_numpy(), two.obs["donor"].to_numpy()
    lfc = np.stack([
        np.log2(shares[(kind == "type0") & (donor == d)].mean(0)) - np.log2(shares[(kind == "type1") & (donor == d)].mean(0))
        for d in "abcd"
    ])  # fmt: skip
    np.testing.assert_allclose(table.loc[list(cells.schema.genes), "lfc_mean"], lfc.mean(0), atol=0.02)
    assert table.attrs["uncertainty"] == "donors"
    assert (table["df"] >= 3).all()
    named = Cells.from_anndata(data, label="cell_type")  # a column of obs does as well
    again = fit.differential_expression(named, "cell_type", "type0", "type1", donor="donor", **options)
    np.testing.assert_allclose(again["lfc_mean"], table.loc[again.index, "lfc_mean"], atol=1e-6)


# ---- ensembles ---------------------------------------------------------------------------------


def test_an_ensemble_is_refits_from_the_fit(ensemble, fit, cells):
    assert len(ensemble.members) == ensemble.settings["ensemble"] == 3
    assert ensemble.settings["resampled"] == "cells"
    for a, b in zip(ensemble.program.parameters(), fit.program.parameters(), strict=True):
        assert torch.equal(a, b)  # the fit itself is the same
    one, two = (dict(m.named_parameters()) for m in ensemble.members[:2])
    assert not torch.equal(one["parts.decoder.out.weight"], two["parts.decoder.out.weight"])
    assert np.array_equal(ensemble.latent(cells), fit.latent(cells))


def test_an_ensemble_is_less_sure(ensemble, fit, cells):
    options = dict(resample=False, residual=False, delta=0.3)
    one = fit.differential_expression(cells, "cell_type", "type0", **options)
    many = ensemble.differential_expression(cells, "cell_type", "type0", **options)

    assert np.median(many["lfc_sd"] / one.loc[many.index, "lfc_sd"]) > 2
    assert many.attrs["uncertainty"] == "z and decoder"
    narrow = fit.expression(cells[:20], interval=0.9).xs("sd", axis=1, level=1)
    wide = ensemble.expression(cells[:20], interval=0.9).xs("sd", axis=1, level=1)
    assert np.median(wide / narrow) > 1.0
    assert (ensemble.expression(cells[:20], interval=0.9).xs("lower", axis=1, level=1) >= 0).all(axis=None)


def test_members_answer_in_blocks_of_any_size(ensemble, cells, monkeypatch):
    whole = ensemble.expression(cells[:30], n_draws=7)
    means = []
    for m, member in enumerate(ensemble.members):
        alone = pyrosc.Fit(member, ensemble.history, ensemble.settings)
        seed = int(np.random.SeedSequence([0, m]).generate_state(1)[0])
        means.append((3, 2, 2)[m] * alone.expression(cells[:30], n_draws=(3, 2, 2)[m], seed=seed).to_numpy())
    np.testing.assert_allclose(whole.to_numpy(), sum(means) / 7, rtol=1e-4)

    monkeypatch.setattr("pyrosc.loading._BLOCK_VALUES", 60 * 50)  # blocks of 8 and of 12 cells
    blocks = ensemble.expression(cells[:30], n_draws=7)
    assert blocks.shape == whole.shape
    np.testing.assert_allclose(blocks.to_numpy(), whole.to_numpy(), rtol=1.0)  # other draws of the same cells
    assert list(blocks.index) == list(whole.index)


def test_an_ensemble_is_one_file(ensemble, cells, tmp_path):
    ensemble.save(tmp_path / "e.safetensors")
    again = pyrosc.load(tmp_path / "e.safetensors")

    assert len(again.members) == 3
    assert again.expression(cells[:5], interval=0.9).equals(ensemble.expression(cells[:5], interval=0.9))
    assert len(again.to("cpu").members) == 3


def test_a_quantity_of_an_ensemble_has_rubins_law():
    draw = np.random.default_rng(0)
    member = np.repeat(np.arange(5), 200)
    draws = draw.normal(0, 1, (1000, 400)) + draw.normal(0, 2, (5, 400))[member]

    mean, sd, df = effects.t_law(draws, member)

    means = np.stack([draws[member == m].mean(0) for m in range(5)])
    within = np.mean([draws[member == m].var(0, ddof=1) for m in range(5)], axis=0)
    between = 1.2 * (means.var(0, ddof=1) - within / 200)
    np.testing.assert_allclose(sd, np.sqrt(within + between))
    np.testing.assert_allclose(df, 4 * (1 + within / between) ** 2)
    np.testing.assert_allclose(mean, means.mean(0))
    # It covers the centre that members scatter around, where their own draws do not.
    covers = np.abs(mean) < stats.t.ppf(0.95, df) * np.sqrt(between / 5 + within / 1000)
    assert covers.mean() > 0.85
    assert (np.abs(mean) < 1.64 * np.sqrt(within / 1000)).mean() < 0.3


def test_ensembles_of_one_and_too_few_draws_are_refused(ensemble, cells):
    with pytest.raises(ValueError, match="ensemble must be 0 for none"):
        pyrosc.fit(ensemble.program, cells, ensemble=1)
    with pytest.raises(ValueError, match="n_draws=2 is below the 3 refits"):
        ensemble.expression(cells, n_draws=2)


def test_an_ensemble_resamples_whole_donors(tissue, monkeypatch):
    data = tissue[:120].copy()
    data.obs["donor"] = np.array(["a", "b", "c", "d"])[np.arange(120) % 4]
    cells = Cells.from_anndata(data, sample="donor")
    trained = []
    prepare = pyrosc.training._Run.prepare
    monkeypatch.setattr(pyrosc.training._Run, "prepare", lambda run: (trained.append(run.train.names), prepare(run))[1])

    fit = quiet_fit(pyrosc.scvi(cells, n_latent=2, n_hidden=8), cells, epochs=2, ensemble=4)

    assert fit.settings["resampled"] == "donor"
    own = {d: sorted(n for n in trained[0] if cells.obs.loc[n, "donor"] == d) for d in "abcd"}
    assert len(trained) == 5
    for names in trained[1:]:
        times = pd.Series(names).value_counts()
        for mine in own.values():  # all cells of a donor, as often as it was drawn
            assert len({times.get(n, 0) for n in mine}) == 1
        assert set(names) <= set(trained[0])  # held-out cells stay out
    assert any(len(set(names)) < len(set(trained[0])) for names in trained[1:])


def test_an_ensemble_that_is_interrupted_keeps_what_it_has(cells, fit, monkeypatch):
    class Interrupted:
        settings = {"state": "interrupted"}  # noqa: RUF012

    for n_done, n_kept in ((0, 0), (1, 0), (2, 2)):
        done = iter([fit] * n_done + [Interrupted])
        first = pyrosc.Fit(fit.program, fit.history, dict(fit.settings))
        monkeypatch.setattr(pyrosc.training, "fit", lambda *a, done=done, **k: next(done))
        with pytest.warns(PyroscWarning, match=f"interrupted in refit {n_done + 1} of 3"):
            pyrosc.training._refit(first, cells, 3, 0.1, None, None, "cpu", False)
        assert len(first.members) == first.settings["ensemble"] == n_kept


def test_ensembles_answer_about_pairs_of_cells_and_batches(ensemble, cells, monkeypatch):
    monkeypatch.setattr(effects, "_PAIRS", 60)  # fewer than the cells of a group, as in large data

    pairs = ensemble.differential_expression(cells, "cell_type", "type0", "type1", estimand="cell")

    assert np.isfinite(pairs["lfc_sd"]).all()
    few = ensemble.differential_expression(cells, "cell_type", "type0", n_draws=5)  # takes at least one of each refit
    assert np.isfinite(few["lfc_sd"]).all()
    assert ensemble.predict(cells[:3], 1).shape == (1, 3, 60)  # fewer than refits: of one at random


def test_effects_that_differ_between_batches_are_averaged():
    lfc = np.concatenate([np.full((50, 3), 0.8), np.full((50, 3), -1.4)]) + 0.01 * np.arange(100)[:, None]

    found = effects.about_their_mean(lfc, [50, 50])

    np.testing.assert_allclose(found.mean(0), lfc.mean(0))
    assert found.std() < 0.2


def test_each_comparison_has_the_batches_that_its_groups_share(fit, tissue):
    data = tissue[:160].copy()
    kind, batch = data.obs["cell_type"].to_numpy(), data.obs["batch"].to_numpy()
    # type0 is in one batch, type1 in the other: they share none, and each shares one with the rest.
    keep = ~((kind == "type0") & (batch == "batch0")) & ~((kind == "type1") & (batch == "batch1"))
    cells = Cells.from_anndata(data[keep].copy(), batch="batch", label="cell_type")

    table = fit.differential_expression(cells, "cell_type", n_draws=20)

    assert table.attrs["batches"]["type0"] == ["batch1"]
    assert table.attrs["batches"]["type2"] == ["batch0", "batch1"]
    with pytest.raises(ValueError, match=r'type0 \(in "batch1"\) and type1 \(in "batch0"\) share no level of "batch"'):
        fit.differential_expression(cells, "cell_type", "type0", "type1")


def test_masks_with_names_are_brought_into_order(fit, cells):
    mask = pd.Series(cells.obs["cell_type"].to_numpy() == "type0", index=cells.names)
    options = dict(n_draws=20, delta=0.3)
    straight = fit.differential_expression(cells, group1=mask.to_numpy(), **options)
    shuffled = fit.differential_expression(cells, group1=mask.sample(frac=1, random_state=0), **options)

    assert straight.equals(shuffled)
    with pytest.raises(ValueError, match="group1 is a Series whose index is not the names"):
        fit.differential_expression(cells, group1=mask.rename(index=lambda n: n + "x"))
    with pytest.raises(ValueError, match="name a column to group by"):
        fit.differential_expression(cells)


def test_columns_that_the_decoder_does_not_read_are_refused(fit, cells):
    with pytest.raises(ValueError, match='scvi does not decode by "cell_type", so setting it changes nothing'):
        fit.counterfactual(cells, {"cell_type": "type1"})
    with pytest.raises(ValueError, match='does not decode by "cell_type"'):
        fit.variance_explained(cells, "cell_type")


@pytest.mark.parametrize("told", [True, False])
def test_donors_are_no_witnesses_of_a_condition_that_only_they_carry(told):
    """Six donors differ, three under each condition, and the condition does nothing: whatever the decoder was told."""
    draw = np.random.default_rng(0)
    n_genes, called = 60, []
    for seed in range(2):
        base = draw.normal(-4, 1, n_genes)
        donor = draw.integers(6, size=420)
        rate = np.exp(base + draw.normal(0, 0.4, (6, n_genes)))
        rho = (rate / rate.sum(1, keepdims=True))[donor]
        x = draw.poisson(draw.gamma(3.0, 800 * rho / 3.0))
        obs = pd.DataFrame({"donor": [f"d{d}" for d in donor], "condition": np.array(["a", "b"])[donor // 3]})
        obs.index = [f"cell{i}" for i in range(420)]
        data = anndata.AnnData(x.astype(np.float32), obs=obs)
        cells = Cells.from_anndata(data, categorical=["condition"] if told else [])
        fit = quiet_fit(pyrosc.scvi(cells, n_latent=2, n_hidden=32, seed=seed), cells, epochs=40)
        table = fit.differential_expression(
            cells, "condition", "a", "b", estimand="donor", donor="donor", delta=0.1, n_draws=20
        )
        called.append(int(table["is_de"].sum()))
        # Means of three donors a side, sd 0.4 in log: 0.4 * sqrt(2 / 3) / log 2 = 0.47, drawn together over genes.
        assert table["lfc_sd"].median() == pytest.approx(0.47, rel=0.4)
    assert sum(called) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_intervals_cover_and_calls_keep_their_rate_where_those_of_what_is_decoded_do_not(seed):
    data = pyrosc.simulate.tissue(1500, 300, n_types=4, n_batches=1, seed=seed)
    cells = Cells.from_anndata(data, label="cell_type")
    fit = quiet_fit(pyrosc.scvi(cells), cells, epochs=None, ensemble=5)
    single = pyrosc.Fit(fit.program, fit.history, fit.settings)
    kind, rho = data.obs["cell_type"].to_numpy(), data.layers["rho"]

    plain = dict(residual=False, shrink=False)
    arms = {"ensemble": (fit, {}), "single": (single, {}), "decoded": (single, plain)}
    covered, false = ({name: [] for name in arms} for _ in range(2))
    for one, two in (("type0", "type1"), ("type2", "type3"), ("type1", "type2")):
        truth = np.log2(rho[kind == one].mean(0)) - np.log2(rho[kind == two].mean(0))
        for name, (asked, options) in arms.items():
            table = asked.differential_expression(cells, "cell_type", one, two, resample=False, fdr=0.1, **options)
            table = table.loc[list(cells.schema.genes)]
            covered[name].append((table["lfc_lower"] < truth) & (truth < table["lfc_upper"]))
            is_false = np.abs(truth) <= table.attrs["delta"]
            false[name].append(is_false[table["is_de"].to_numpy()].mean())

    # 900 genes in three pairs of one fit: they err together, so that the band is that of the promise.
    for name in ("ensemble", "single"):
        assert 0.83 <= np.mean(covered[name]) <= 0.96
        assert np.mean(false[name]) <= 0.15
    assert np.mean(covered["decoded"]) < 0.5  # (that a flat prior calls too many: test_shrinkage)


# ---- how much a column explains ----------------------------------------------------------------


def test_the_variance_that_a_column_explains_is_that_of_its_worlds(fit, cells):
    some = cells[:30]
    table = fit.variance_explained(some, "batch", n_draws=3, seed=2)

    levels = list(cells.schema.batch.levels)
    logs = np.log2([fit.draws("rho", some, 3, do={"batch": level}, seed=2) for level in levels])  # (L, S, N, G)
    of_batch = logs.var(0).mean(1)  # (S, G)
    of_state = logs.mean(0).var(1)
    share = (of_batch / (of_batch + of_state)).mean(0)
    table = table.loc[list(cells.schema.genes)]
    np.testing.assert_allclose(table["share"], share, atol=1e-3)
    np.testing.assert_allclose(table["sd_column"], np.sqrt(of_batch.mean(0)), rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(table["sd_state"], np.sqrt(of_state.mean(0)), rtol=1e-2, atol=1e-3)
    assert ((table["lower"] <= table["share"]) & (table["share"] <= table["upper"])).all()


def test_a_batch_that_shifts_some_genes_explains_those():
    data = pyrosc.simulate.tissue(400, 60, n_types=3, n_batches=2, depth=900, n_markers=20, effect=1.0, seed=5)
    draw = np.random.default_rng(0)
    x = np.asarray(data.X.todense()).astype(int)
    second = (data.obs["batch"] == "batch1").to_numpy()
    x[np.ix_(second, np.arange(10))] = draw.binomial(x[np.ix_(second, np.arange(10))], 0.1)
    data.X = x.astype(np.float32)
    cells = Cells.from_anndata(data, batch="batch", label="cell_type")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(pyrosc.scvi(cells, n_latent=4), cells, progress=False)

    table = fit.variance_explained(cells)

    # Half of a log2 fold change of 3.3 is the sd over two levels.
    few = table.loc[[f"gene{i}" for i in range(10)]]
    rest = table.drop(few.index)
    assert few["sd_column"].median() == pytest.approx(np.log2(10) / 2, rel=0.35)
    assert few["share"].median() > 2 * rest["share"].median()


def test_a_column_that_cannot_explain_is_refused(fit, cells):
    with pytest.raises(
        ValueError, match='column: "donor" is not one of this fit\'s. Categorical: "batch", "cell_type"'
    ):
        fit.variance_explained(cells, "donor")


# ---- as scanpy has it --------------------------------------------------------------------------


def test_a_table_of_effects_is_laid_out_for_scanpy(fit, cells, tissue):
    scanpy = pytest.importorskip("scanpy")
    data = tissue[:160].copy()
    table = fit.differential_expression(cells, "cell_type", n_draws=20)

    written = fit.write(data, effects=table)

    assert written == ['uns["rank_genes_groups"]']
    assert "X_pyrosc" not in data.obsm
    frame = scanpy.get.rank_genes_groups_df(data, "type1")
    mine = table[table["group1"] == "type1"]
    assert list(frame["names"]) == list(mine.index)
    np.testing.assert_allclose(frame["logfoldchanges"], mine["lfc_mean"], rtol=1e-5)
    np.testing.assert_allclose(frame["pvals_adj"], mine["expected_fdp"])
    np.testing.assert_allclose(frame["pct_nz_group"], mine["detected1"])
    assert data.uns["rank_genes_groups"]["params"]["groupby"] == "cell_type"
    assert data.uns["rank_genes_groups"]["params"]["reference"] == "rest"
    import matplotlib as mpl

    mpl.use("Agg")
    scanpy.pl.rank_genes_groups(data, show=False)
    scanpy.pl.rank_genes_groups_dotplot(data, n_genes=2, show=False)


def test_write_refuses_what_is_no_table_of_effects(fit, cells, tissue):
    data = tissue[:160].copy()
    with pytest.raises(ValueError, match="effects must be a table from differential_expression"):
        fit.write(data, effects=pd.DataFrame({"lfc_mean": [1.0]}))
    table = fit.differential_expression(cells, "cell_type", "type0", n_draws=20)
    with pytest.raises(ValueError, match="effects: 20 genes are not in adata"):
        fit.write(data[:, 20:].copy(), effects=table)
    fit.write(data, effects=table)
    with pytest.raises(ValueError, match=r'uns\["rank_genes_groups"\] is there already'):
        fit.write(data, effects=table)
    assert fit.write(data, effects=table, key="mine") == ['uns["mine"]']
