"""Samples: the stories are those on paper, effects are found where they are, and tests keep their level."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats

import pyrosc
import pyrosc.mapping
from pyrosc import Cells, PyroscWarning, simulate
from pyrosc.between_samples import Design, _orders, _residual, _t, permanova, terms_of
from pyrosc.elbo import elbo_terms
from pyrosc.errors import ProgramError


def _fit(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)  # unused latents, an end too early: they are short fits
        return pyrosc.fit(program, cells, progress=False, **options)


def _donors(seed=0):
    """Eight donors who differ in type0; type3 is not found in the first four of them, who are "young"."""
    adata = simulate.donors(
        1600, 200, 4, 8, n_active=1, n_module=15, fold=3.0, depth=1000, n_markers=20, effect=1.5, seed=seed
    )
    number = adata.obs["donor"].cat.codes.to_numpy()
    adata = adata[~((adata.obs["cell_type"] == "type3") & (number < 4)).to_numpy()].copy()
    number = adata.obs["donor"].cat.codes.to_numpy()
    adata.obs["age_group"] = np.where(number < 4, "young", "old")
    adata.obs["pair"] = [f"p{d % 4}" for d in number]
    adata.obs["age"] = 20.0 + 7 * number
    return adata


@pytest.fixture(scope="module")
def fitted():
    adata = _donors()
    cells = Cells.from_anndata(adata, sample="donor")
    return adata, cells, _fit(pyrosc.mrvi(cells, n_latent=5, n_hidden=64), cells, epochs=80, warmup=0.3)


@pytest.fixture
def few():
    adata = simulate.donors(40, 12, 2, 4, n_markers=3, n_module=2)
    return Cells.from_anndata(adata, sample="donor")


# ---- the stories ----------------------------------------------------------------------------


@pytest.mark.parametrize("story", [pyrosc.mrvi, pyrosc.shifted_samples])
def test_sites_have_the_shapes_that_are_documented(story, few):
    program = story(few, n_latent=3)
    drawn = program.generate(few)

    shapes = {name: tuple(value.shape) for name, value in drawn.items()}
    m, k = (6, 20) if story is pyrosc.mrvi else (1, 3)
    wanted = {"effect_sd": (m,), "sample_effect": (4, m, k), "u": (40, 3), "rho": (40, 12), "x": (40, 12),
              "library": (40, 1), "z": (40, 23) if story is pyrosc.mrvi else (40, 3)}  # fmt: skip
    if story is pyrosc.mrvi:
        wanted |= {"directions": (20, 12), "archetypes": (40, 6)}
    assert shapes == wanted


def _normal(x, sd=1.0):
    return float(stats.norm.logpdf(np.asarray(x, dtype=float), 0.0, np.asarray(sd, dtype=float)).sum())


@pytest.mark.parametrize("story", [pyrosc.mrvi, pyrosc.shifted_samples])
def test_the_density_is_the_one_on_paper(story, few):
    program = story(few, n_latent=3, n_hidden=8)
    program.start(few)  # inverse dispersions from moments
    with program.driven(0), torch.no_grad():
        trace = poutine.trace(program.model).get_trace(few.with_counts(few.x))
        drawn = program.generate(few, seed=3)
        fixed = {k: drawn[k] for k in ("effect_sd", "sample_effect", "u", "directions") if k in drawn}
        trace = poutine.trace(poutine.condition(program.model, data=fixed)).get_trace(few)
        found = float(trace.log_prob_sum())
        decoder, theta = program.parts["decoder"], program.parts["dispersion"].log_dispersion.exp().numpy()

    tau, effect, u = (fixed[k].double().numpy() for k in ("effect_sd", "sample_effect", "u"))
    codes = few.sample.numpy()
    by_hand = float(stats.halfnorm.logpdf(tau).sum()) + _normal(effect, tau[None, :, None]) + _normal(u)
    with torch.no_grad():
        if story is pyrosc.mrvi:
            V = fixed["directions"].double().numpy()
            by_hand += _normal(V, 0.3)
            shares = program.parts["archetypes"](fixed["u"]).double().numpy()
            shift = np.einsum("nm,nmk->nk", shares, (effect - effect.mean(0))[codes])
            hidden = decoder.layers(fixed["u"], None)
            logits = decoder.out(hidden).double().numpy() + shift @ V
        else:
            z = torch.as_tensor(u + effect[codes, 0]).float()
            logits = decoder.out(decoder.layers(z, None)).double().numpy()
    rho = np.exp(logits - logits.max(1, keepdims=True))
    mean = few.library.double().numpy() * rho / rho.sum(1, keepdims=True)
    by_hand += float(stats.nbinom.logpmf(few.x.numpy(), theta, theta / (theta + mean)).sum())

    assert found == pytest.approx(by_hand, rel=1e-5)  # float32 sums of 40 x 12 terms


def test_a_state_of_shifted_samples_scatters_about_the_effect_of_its_sample(few):
    program = pyrosc.shifted_samples(few, n_latent=2)
    effect = torch.tensor([[[3.0, 0.0]], [[-3.0, 1.0]], [[0.0, 0.0]], [[1.0, 1.0]]])

    z = np.stack([program.generate(few, fixed={"sample_effect": effect}, seed=s)["z"].numpy() for s in range(200)])

    for d in range(4):
        own = z[:, few.sample.numpy() == d].reshape(-1, 2)
        error = 4 / math.sqrt(len(own))  # four standard errors of a mean, and more than that of an sd
        assert own.mean(0) == pytest.approx(effect[d, 0].numpy(), abs=error)
        assert own.std(0) == pytest.approx(np.ones(2), abs=error)


def test_global_sites_count_once_for_all_mini_batches(few):
    program = pyrosc.mrvi(few, n_latent=3)
    with program.driven(0), torch.no_grad():
        whole = poutine.trace(program.guide).get_trace(few)

        def density(cells):
            guide = poutine.trace(poutine.replay(program.guide, trace=_globals(whole))).get_trace(cells)
            trace = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(cells)
            trace.compute_log_prob()
            names = ("effect_sd", "sample_effect", "directions")
            return sum(float(trace.nodes[name]["log_prob_sum"]) for name in names)

        parts = [density(few.minibatch(np.arange(i, i + 10))) for i in range(0, 40, 10)]
        everything = density(few)
    assert parts == pytest.approx([everything] * 4, rel=1e-6)


def _globals(trace):
    kept = poutine.Trace()
    for name in ("effect_sd", "sample_effect", "directions"):
        kept.add_node(name, **trace.nodes[name])
    return kept


def test_effects_of_shifted_samples_are_the_exact_posterior_given_the_states():
    """Given states, an effect has a normal posterior; the guide's ends there, but for what states are unsure of."""
    adata = simulate.donors(800, 40, 3, 4, n_active=0, proportions=1.5, depth=3000, n_markers=15)
    cells = Cells.from_anndata(adata, sample="donor")
    fit = _fit(pyrosc.shifted_samples(cells, n_latent=3, n_hidden=32), cells, epochs=150, warmup=0.3, validation=None)
    guide = fit.program.parts["posterior"]
    with fit.program.driven(0), torch.no_grad():
        loc, _ = fit.program.parts["encoder"](cells.running())
        precision = float((-2 * guide.sd_loc + 2 * guide.sd_log_scale.exp() ** 2).exp())  # E of 1 / sd^2

        for d in range(4):
            own = loc[cells.sample == d]
            posterior = len(own) + precision
            expected = own.sum(0) / posterior
            sd = posterior**-0.5
            # Adam's last steps scatter by a part of an sd: the rate falls to zero.
            assert guide.loc[d, 0].numpy() == pytest.approx(expected.numpy(), abs=2 * sd)
            # Adam remembers the first, large gradients for 1,000 steps, so that sds are late; the prior's is 0.3.
            assert guide.log_scale[d, 0].exp().numpy() == pytest.approx(np.full(3, sd), rel=0.25)
    # composition is in the effect: it goes with the donors' shares of types
    share = pd.crosstab(adata.obs["donor"], adata.obs["cell_type"], normalize="index").to_numpy()
    z = fit.latent(cells)
    centres = np.stack(
        [z[(adata.obs["cell_type"] == t).to_numpy()].mean(0) for t in adata.obs["cell_type"].cat.categories]
    )
    assert np.corrcoef((share @ centres).ravel(), guide.loc[:, 0].detach().numpy().ravel())[0, 1] > 0.95


def test_stories_say_what_samples_they_need(few):
    plain = Cells.from_counts(np.ones((4, 3), dtype=int))
    one = Cells.from_counts(np.ones((4, 3), dtype=int), sample=["a"] * 4)

    with pytest.raises(ProgramError, match="needs a sample column"):
        pyrosc.mrvi(plain)
    with pytest.raises(ProgramError, match="has one sample.*pyrosc.scvi"):
        pyrosc.mrvi(one)
    with pytest.raises(ProgramError, match=r"SampleEffects\(1, None\)"):
        pyrosc.shifted_samples(few, effects=pyrosc.SampleEffects(2, None))
    with pytest.raises(ProgramError, match="FullRankEncoder has a law of its own"):
        pyrosc.shifted_samples(few, encoder=pyrosc.FullRankEncoder(2))
    with pytest.raises(ProgramError, match='give the part "effects" n_effect='):
        pyrosc.mrvi(few, effects=pyrosc.SampleEffects(2, None))
    with pytest.raises(ValueError, match="n_archetypes must be a whole number"):
        pyrosc.SampleEffects(0)
    with pytest.raises(ValueError, match="scale must be a positive number"):
        pyrosc.SampleEffects(scale=-1.0)
    with pytest.raises(TypeError, match="expected Cells"):
        pyrosc.mrvi(simulate.donors(20, 12, 2, 2, n_markers=3, n_module=2))


def test_parts_can_be_swapped_and_a_file_keeps_them(few, tmp_path):
    program = pyrosc.mrvi(few, n_latent=3, prior=pyrosc.MixturePrior(4), effects=pyrosc.SampleEffects(2, 5, 0.5))
    fit = _fit(program, few, epochs=2)
    fit.save(tmp_path / "m.safetensors")
    again = pyrosc.load(tmp_path / "m.safetensors")

    assert again.program.parts["effects"].arguments == fit.program.parts["effects"].arguments
    np.testing.assert_array_equal(again.sample_states(few, 3), fit.sample_states(few, 3))
    assert len(fit.history) == 2
    assert not any(name.startswith("program") for name in pyro.get_param_store())


def test_a_fit_takes_as_many_steps_as_effects_need(few, monkeypatch):
    asked = []
    monkeypatch.setattr("pyrosc.training.default_epochs", lambda *n, **named: asked.append([*n, *named.values()]) or 1)
    effects, plain = (_fit(story(few, n_latent=2), few) for story in (pyrosc.mrvi, pyrosc.scvi))

    assert [numbers[-1] for numbers in asked] == [2000, 1200]
    assert [fit.settings["warmup"] for fit in (effects, plain)] == [0.6, 0.3]


def test_the_encoder_reads_counts_less_what_the_sample_has(few):
    program = pyrosc.mrvi(few, n_latent=3)
    encoder = program.parts["encoder"]
    program.start(few)
    logs = few.x.log1p()
    means = torch.stack([logs[few.sample == d].mean(0) for d in range(4)])
    by_hand = logs - (means - means.mean(0))[few.sample]
    with torch.no_grad():
        features = encoder.features(by_hand)

        torch.testing.assert_close(encoder.read(few), features, rtol=1e-4, atol=1e-4)
        stranger = few[:5].do(donor="donor1")
        stranger.codes["donor"][:] = -1
        torch.testing.assert_close(encoder.read(stranger), encoder.features(logs[:5]), rtol=1e-4, atol=1e-4)


# ---- what is found --------------------------------------------------------------------------


def test_samples_differ_where_they_do_and_nowhere_else(fitted):
    adata, cells, fit = fitted
    table = fit.sample_spread(cells, "cell_type")
    far = fit.sample_distances(cells, "cell_type")
    truth = adata.uns["distances"]["type0"]

    own = pyrosc.sample_matrix(far, "type0").loc[truth.index, truth.columns].to_numpy()
    pairs = np.triu_indices(8, 1)
    assert table.loc["type0", "p_none"] < 0.05
    assert (table.loc[["type1", "type2", "type3"], "p_none"] > 0.95).all()
    assert stats.spearmanr(own[pairs], truth.to_numpy()[pairs])[0] > 0.8
    assert own[pairs].mean() == pytest.approx(truth.to_numpy()[pairs].mean(), rel=0.25)
    by_group = far.groupby("group")["normalized"].mean()
    assert by_group["type0"] > 3 > by_group.drop("type0").max()


@pytest.mark.slow
def test_nothing_is_found_where_donors_are_shuffled_among_cells(fitted):
    adata, _, _ = fitted
    shuffled = adata.copy()
    shuffled.obs["donor"] = np.random.default_rng(0).permutation(adata.obs["donor"].to_numpy())
    cells = Cells.from_anndata(shuffled, sample="donor")
    fit = _fit(pyrosc.mrvi(cells, n_latent=5, n_hidden=64), cells, epochs=80, warmup=0.3)

    assert (fit.sample_spread(cells, "cell_type")["p_none"] > 0.95).all()


def test_a_cell_in_its_own_sample_is_the_cell_as_it_is(fitted):
    _, cells, fit = fitted
    some = cells[:7]
    everywhere = fit.sample_states(some, 4, seed=2)

    own = np.stack([everywhere[:, i, int(d)] for i, d in enumerate(some.sample)], 1)
    np.testing.assert_allclose(own, fit.latent(some, 4, seed=2), rtol=1e-5, atol=1e-6)
    moved = fit.draws("z", some, 4, do={"donor": fit.schema.sample.levels[5]}, seed=2)
    np.testing.assert_allclose(everywhere[:, :, 5], moved, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(fit.latent(some, site="u").shape, (7, 5))
    assert fit.latent_sd(some).shape == fit.latent(some).shape == (7, 25)


def test_distances_are_those_of_the_decoded_cells(fitted):
    _, cells, fit = fitted
    some = cells[np.flatnonzero((cells.obs["cell_type"] == "type0").to_numpy())[:9]]
    names = list(fit.schema.sample.levels)
    table = fit.sample_distances(some, n_draws=6, seed=1)
    row = table[(table["sample1"] == names[1]) & (table["sample2"] == names[4])].iloc[0]
    logs = [np.log2(fit.draws("rho", some, 6, do={"donor": names[d]}, seed=1)) for d in (1, 4)]
    each = np.sqrt((((logs[0] - logs[1]).mean(1)) ** 2).mean(-1))

    assert row["distance"] == pytest.approx(each.mean(), rel=1e-4)
    assert row["sd"] == pytest.approx(each.std(ddof=1), rel=1e-3)
    by_cell = fit.sample_distances(some, by_cell=True, n_draws=6, seed=1)
    alone = np.sqrt(((logs[0] - logs[1]) ** 2).mean(-1)).mean(0)
    np.testing.assert_allclose(by_cell[(names[1], names[4])], alone, rtol=1e-4)
    state = fit.sample_distances(some, of="state", by_cell=True, n_draws=6, seed=1)
    z = fit.sample_states(some, 6, seed=1)
    np.testing.assert_allclose(
        state[(names[0], names[7])], np.linalg.norm(z[:, :, 0] - z[:, :, 7], axis=-1).mean(0), rtol=1e-4
    )


def test_a_tree_is_scipys(fitted):
    _, cells, fit = fitted
    table = fit.sample_distances(cells, "cell_type", n_draws=5, most=20)
    square = pyrosc.sample_matrix(table, "type0")
    tree, names = pyrosc.sample_tree(table, "type0")

    assert (square.to_numpy() == square.to_numpy().T).all()
    assert (np.diag(square) == 0).all()
    assert names == list(fit.schema.sample.levels)
    assert tree.shape == (7, 4)
    with pytest.raises(ValueError, match="several groups: name one"):
        pyrosc.sample_matrix(table)
    with pytest.raises(ValueError, match="not in the table"):
        pyrosc.sample_tree(table, "type9")


def test_effects_of_a_covariate_cover_the_truth_and_calls_are_of_genes_that_move(fitted):
    adata, cells, fit = fitted
    some = cells[np.flatnonzero((cells.obs["cell_type"] != "type3").to_numpy())]  # which the young have not
    table = fit.sample_effects(some, "age_group", "cell_type", n_permutations=200)
    effects = adata.uns["effects"]["type0"]
    young = [f"donor{d}" for d in range(4)]
    truth = effects.loc[young].mean() - effects.drop(young).mean()

    own = table[table["group"] == "type0"].join(truth.rename("truth"))
    inside = (own["lfc_lower"] <= own["truth"]) & (own["truth"] <= own["lfc_upper"])
    # 200 genes at 90 %: sd 0.021, three of them. Above it as a rule: intervals are about the donors these are drawn
    # from, and hold how they differ in other ways than by age.
    assert inside.mean() >= 0.837
    called = own[own["is_de"]]
    assert (called["truth"].abs() > 0.3).all()
    assert (table["contrast"] == "age_group: young").all()
    assert np.corrcoef(own["lfc_mean"], own["truth"])[0, 1] > 0.8
    assert not table[table["group"].isin(["type1", "type2"])]["is_de"].any()


def test_a_gene_asked_for_has_the_answer_it_has_among_all(fitted):
    _, cells, fit = fitted
    some = cells[np.flatnonzero((cells.obs["cell_type"] == "type0").to_numpy())]
    every = fit.sample_effects(some, "age", n_permutations=50)
    one = fit.sample_effects(some, "age", n_permutations=50, genes=["gene7"])

    pd.testing.assert_frame_equal(one, every.loc[["gene7"]])


def test_effects_in_each_cell_are_regressions_of_what_is_decoded(fitted):
    _, cells, fit = fitted
    some = cells[:40]  # all donors are among them
    table = fit.sample_effects(some, "age", by_cell=True, genes=["gene3"], n_draws=5, seed=4)
    log = np.stack([
        np.log2(fit.draws("rho", some, 5, do={"donor": d}, seed=4)[..., 3]) for d in fit.schema.sample.levels
    ], -1)  # fmt: skip
    ages = 20.0 + 7 * np.arange(8)
    slope = log @ (ages - ages.mean()) / ((ages - ages.mean()) ** 2).sum()

    np.testing.assert_allclose(table[("age", "gene3", "lfc_mean")], slope.mean(0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(table[("age", "gene3", "lfc_sd")], slope.std(0, ddof=1), rtol=1e-3, atol=1e-6)


def test_more_cells_of_a_type_are_found_where_they_are(fitted):
    _, cells, fit = fitted
    table = fit.differential_abundance(cells, "age_group", "young", "old", n_permutations=200)
    allowed = fit.admissible_samples(cells)
    is_three = (cells.obs["cell_type"] == "type3").to_numpy()
    young = [f"donor{d}" for d in range(4)]

    assert table["lfc"][is_three].median() < -3  # no cell of type3 is from the young
    assert abs(table["lfc"][~is_three].median()) < 1
    assert table["p_value"][is_three].max() <= 0.06  # the split is one of 35, and its mirror
    assert allowed.loc[is_three, young].to_numpy().mean() < 0.1
    assert allowed.loc[is_three].drop(columns=young).to_numpy().mean() > 0.85
    assert allowed.loc[~is_three].to_numpy().mean() > 0.85


def test_mapping_new_donors_leaves_what_is_said_of_the_others():
    adata = simulate.donors(400, 60, 3, 4, n_active=1, n_module=8, n_markers=10)
    is_new = (adata.obs["donor"] == "donor3").to_numpy()
    cells = Cells.from_anndata(adata[~is_new].copy(), sample="donor")
    fit = _fit(pyrosc.mrvi(cells, n_latent=3), cells, epochs=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        found = fit.map(adata[is_new].copy(), epochs=3, progress=False)

    # Products over four donors are summed in another order than those over three on some processors.
    assert max(pyrosc.mapping.drift(fit, found, cells).values()) < 1e-6
    moved = found.program.parts["posterior"].loc.detach()
    assert moved.shape[0] == 4
    assert float(moved[3].abs().max()) > 0  # the new donor's own effects are learned
    assert np.isfinite(found.latent(adata[is_new].copy())).all()


# ---- the tests are tests ----------------------------------------------------------------------


def test_the_ratio_of_one_gene_is_that_of_an_analysis_of_variance():
    draw = np.random.default_rng(0)
    y, group = draw.normal(size=(12, 1)), np.repeat([0.0, 1.0, 2.0], 4)
    x = np.stack([group == 1, group == 2], 1).astype(float)

    found = permanova(y, x, np.ones((12, 1)), np.zeros(12), 50, 0)

    assert found["f"] == pytest.approx(stats.f_oneway(y[:4, 0], y[4:8, 0], y[8:, 0]).statistic, rel=1e-9)


@pytest.mark.parametrize("effect", [0.0, 0.8])
def test_p_values_of_samples_keep_their_level(effect):
    """Twelve samples, 40 genes that go together; a covariate beside another one. With an effect they are small."""
    draw = np.random.default_rng(1)
    p = []
    for i in range(200):
        x, age = draw.permutation([0.0, 1.0] * 6), draw.normal(size=12)
        y = draw.normal(size=(12, 3)) @ draw.normal(size=(3, 40)) + draw.normal(size=(12, 40))
        y += effect * x[:, None] * draw.normal(size=40) * 2 + age[:, None]
        p.append(permanova(y, x[:, None], np.stack([np.ones(12), age], 1), np.zeros(12), 99, i)["p_value"])
    rejected = int((np.array(p) <= 0.05).sum())

    if effect:
        assert rejected > 100
    else:
        low, high = stats.binom.ppf([0.0005, 0.9995], 200, 0.05)
        assert low <= rejected <= high
        assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_slopes_are_those_of_least_squares():
    draw = np.random.default_rng(2)
    fixed = np.column_stack([np.ones(10), draw.normal(size=10)])
    x, y = draw.normal(size=10), draw.normal(size=(10, 30))
    slope, error, df = _t(y, x, _residual(fixed), 7, np.ones(30))
    by_hand = np.linalg.lstsq(np.column_stack([x, fixed]), y, rcond=None)[0][0]

    np.testing.assert_allclose(slope, by_hand, rtol=1e-9)
    assert (error > 0).all()
    assert (df >= 7).all()


def test_samples_are_exchanged_within_blocks_alone():
    block = np.array([0, 1, 0, 2, 1, 2, 2])
    orders = _orders(block, 100, 0)

    assert (block[orders] == block).all()
    assert (np.sort(orders, 1) == np.arange(7)).all()
    assert len(np.unique(orders, axis=0)) > 10


def test_pairs_are_compared_within_their_block(fitted):
    _, cells, fit = fitted
    some = cells[np.flatnonzero((cells.obs["cell_type"] != "type3").to_numpy())]  # which one of each pair has not
    own = fit.sample_tests(some, "age_group", "cell_type", block="pair", n_permutations=99)

    assert list(own["group"]) == ["type0", "type1", "type2"]
    assert (own["p_value"] >= 1 / 16).all()  # four pairs have 16 orders, of which two are as they are but for the sign
    with pytest.warns(PyroscWarning, match=r'left out.*"type3" \(columns of "age_group".*its 4 samples'):
        every = fit.sample_tests(cells, "age_group", "cell_type", n_permutations=20)
    assert list(every["group"]) == ["type0", "type1", "type2"]


def test_donors_under_two_conditions_are_named_where_one_is_asked_for(fitted):
    """Row 56 of the faults: nesting is assumed, and does not hold."""
    adata, _, fit = fitted
    adata = adata.copy()
    is_in = adata.obs["donor"].isin(["donor2", "donor6"]).to_numpy()
    adata.obs["condition"] = np.where(is_in & (np.arange(len(adata)) % 2 == 0), "stim", "ctrl")
    cells = Cells.from_anndata(adata, sample="donor")

    with pytest.raises(ValueError, match='in 2 of 8 samples \\("donor2", "donor6"\\).*make a column of both'):
        fit.sample_tests(cells, "condition")


@pytest.mark.parametrize(
    ("design", "what"),
    [
        ("stage", 'no column "stage"'),
        ("cell_type", 'has 3 values in sample "donor0"'),
        ("~ age * age_group", "Sums of columns are known"),
        ("age + age", "names a column twice"),
        ("", "names no column"),
        ("constant", "in every sample, so it explains nothing"),
        (["age", "older"], "cannot be told apart"),
        ("gone", "is missing for sample"),
    ],
)
def test_a_design_that_cannot_be_judged_is_refused(fitted, design, what):
    adata, _, fit = fitted
    adata = adata.copy()
    adata.obs["constant"], adata.obs["older"] = "a", adata.obs["age"] + 10
    adata.obs["gone"] = np.where(adata.obs["donor"] == "donor2", None, "here")
    cells = Cells.from_anndata(adata, sample="donor")

    with pytest.raises(ValueError, match=what):
        fit.sample_effects(cells, design)


def test_terms_are_read_as_formulas_have_them():
    assert terms_of("~ 1 + condition + age") == ["condition", "age"] == terms_of(["condition", "age"])
    assert terms_of("condition") == ["condition"]


def test_a_design_needs_samples_to_judge_by(fitted):
    adata, cells, fit = fitted
    few = cells[np.flatnonzero(np.isin(adata.obs["donor"], ["donor0", "donor5"]))]

    with pytest.raises(ValueError, match="2 samples with cells enough"):
        Design(fit.schema.sample, few, "age", None)
    with pytest.raises(ValueError, match=r"no group can be judged.*lower least= \(now 30\)"):
        fit.sample_effects(cells[:60], "age_group", "cell_type", least=30)
    with pytest.raises(ValueError, match="two of each at least"):
        fit.differential_abundance(few, "age_group", "young")


def test_other_stories_say_that_they_do_not_read_samples(few):
    fit = _fit(pyrosc.scvi(few, n_latent=2), few, epochs=2)

    with pytest.raises(ProgramError, match='does not decode by "donor".*pyrosc.mrvi'):
        fit.sample_distances(few)
    plain = Cells.from_counts(few.x.int().numpy())
    without = _fit(pyrosc.scvi(plain, n_latent=2), plain, epochs=2)
    with pytest.raises(ProgramError, match="has no samples"):
        without.sample_states(plain)
    with pytest.raises(ProgramError, match="has no samples"):
        without.admissible_samples(plain)


def test_cells_of_an_unknown_sample_are_told_so(fitted):
    adata, _, fit = fitted
    other = adata[:20].copy()
    other.obs["donor"] = "somebody"

    with pytest.raises(ValueError, match="of a sample that training did not have"):
        fit.latent(other)
    assert np.isfinite(fit.latent(other, site="u")).all()  # a state without its sample can be told


def test_terms_of_the_bound_are_finite_and_the_state_is_watched(few):
    program = pyrosc.mrvi(few, n_latent=3)
    with program.driven(0), torch.no_grad():
        terms = elbo_terms(program, few)

    assert program.state_site == "u"
    assert terms.z_mean.shape == (40, 3)
    assert set(terms.global_kl) == {"effect_sd", "sample_effect", "directions"}
    assert set(terms.local_kl) == {"u"}
