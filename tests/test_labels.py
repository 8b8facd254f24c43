"""Labels: the sum over types is Pyro's, evidence is what was said, and types that are known of few are found in all."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger

import pyrosc
from pyrosc import Cells, Classifier, LabelPrior, PyroscWarning, simulate
from pyrosc.annotation import strangeness
from pyrosc.check.labels import reliability
from pyrosc.elbo import elbo_terms
from pyrosc.errors import ProgramError
from pyrosc.models import scvi


def _labelled(n_cells=300, n_genes=80, n_types=3, share=0.3, seed=0, **of_cells):
    adata = simulate.tissue(n_cells, n_genes, n_types, 2, n_markers=20, seed=seed)
    known = np.random.default_rng(seed).uniform(size=n_cells) < share
    adata.obs["label"] = np.where(known, adata.obs["cell_type"].astype(str), None)
    return adata, Cells.from_anndata(adata, batch="batch", label="label", **of_cells)


def _fit(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)  # unused latents, an end too early: they are short fits
        return pyrosc.fit(program, cells, progress=False, **options)


@pytest.fixture(scope="module")
def fitted():
    adata, cells = _labelled(1200, 300, 4, 0.2)
    return adata, cells, _fit(pyrosc.scanvi(cells), cells, epochs=25)


# ---- the bound ------------------------------------------------------------------------------


@pytest.mark.parametrize("known", ["some", "none", "all"])
def test_the_sum_over_types_is_pyro_s_of_enumeration(known):
    _, cells = _labelled(60, 30)
    if known == "none":
        cells = cells.without_labels()
    if known == "all":
        cells = cells[np.flatnonzero(cells.label.numpy() >= 0)]
    program = pyrosc.scanvi(cells, n_latent=3, n_hidden=16)
    with program.driven(0), torch.no_grad(), _Noise(z=torch.randn(len(cells), 3), u=torch.randn(3, len(cells), 3)):
        pyros = TraceEnum_ELBO(max_plate_nesting=1).loss(
            program.model, config_enumerate(program.guide, "parallel"), cells
        )
        ours = elbo_terms(program, cells)
        # Pyro's takes log q - log p of u at the draw, ours its closed form.
        nodes = poutine.trace(poutine.enum(program.guide, first_available_dim=-2)).get_trace(cells).nodes
        q, u = nodes["y"]["fn"].log_prob(nodes["y"]["value"]).exp(), nodes["u"]
        at_draw = u["fn"].log_prob(u["value"]) - dist.Normal(0.0, 1.0).log_prob(u["value"]).sum(-1)
    bound = ours.local + ours.local_kl["u"] - (q * at_draw).sum(0) + ours.side

    assert float(bound.sum()) == pytest.approx(-pyros, rel=1e-6, abs=1e-3)  # rounding of sums of 60 x 500 nats


class _Noise(Messenger):
    """Draws of normal sites from given standard normal numbers."""

    def __init__(self, **noise):
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg):
        if msg["name"] in self.noise and msg["value"] is None:
            law = msg["fn"].base_dist
            msg["value"] = law.loc + law.scale * self.noise[msg["name"]]


def test_a_known_label_is_taken_for_certain_and_its_bound_is_that_of_its_type():
    _, cells = _labelled(60, 30, share=1.0)
    program = pyrosc.scanvi(cells, n_latent=3, n_hidden=16)
    with program.driven(0), torch.no_grad():
        terms = elbo_terms(program, cells)
        q = poutine.trace(program.guide).get_trace(cells).nodes["y"]["fn"].probs
    assert torch.allclose(q, torch.nn.functional.one_hot(cells.label, 3).float(), atol=1e-12)
    assert float(terms.local_kl["y"].abs().max()) < 1e-6


def test_the_factor_of_the_classifier_is_in_training_alone():
    _, cells = _labelled(60, 30)
    light, heavy = (
        pyrosc.scanvi(cells, n_latent=3, n_hidden=16, classifier=Classifier(weight=w)) for w in (1.0, 100.0)
    )
    with light.driven(0), torch.no_grad():
        one = elbo_terms(light, cells)
    with heavy.driven(0), torch.no_grad():
        two = elbo_terms(heavy, cells)
    assert torch.equal(one.local, two.local)
    assert torch.allclose(100 * one.side, two.side)
    known = cells.label >= 0
    assert float(one.side[~known].abs().max()) < 1e-5
    assert float(one.side[known].max()) < 0


def test_labelled_cells_alone_are_asked_for_the_factor(fitted):
    from pyrosc.training import _Run

    _, cells, fit = fitted
    given = {n: fit.settings[n] for n in ("epochs", "batch_size", "lr", "global_lr", "schedule", "warmup", "seed")}
    run = _Run(fit.program.copy(), cells, None, given)
    with run.program.driven(0):
        run._find_labelled()
    assert run.labelled is not None
    assert bool((run.labelled.label >= 0).all())
    # What it gives on average is the mean over all cells of the factor.
    with run.program.driven(0), torch.no_grad():
        sides = torch.stack([run._side() for _ in range(200)])
        whole = torch.stack([elbo_terms(run.program, cells).side.mean() for _ in range(50)])
    error = (sides.var() / len(sides) + whole.var() / len(whole)).sqrt()
    assert abs(float(sides.mean() - whole.mean())) < 4 * float(error)


def test_a_factor_of_every_cell_is_asked_of_every_cell_and_history_keeps_it_apart():
    _, cells = _labelled(200, 30)

    def guide(cells, *, encoder):
        with cells.plate():
            loc, scale = encoder(cells)
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            pyro.factor("far", z.square().sum(-1), has_rsample=False)

    parts = {"prior": pyrosc.Prior(dist.Normal, 0.0, 1.0), "encoder": pyrosc.Encoder(2, 16)}
    parts |= {"decoder": pyrosc.Decoder(2, 16), "dispersion": pyrosc.GeneDispersion()}
    program = pyrosc.Program(
        scvi.model, cells, guide, library=pyrosc.ObservedLibrary(), likelihood=pyrosc.NBLikelihood(), **parts
    )
    fit = _fit(program, cells, epochs=30, validation=None)
    plain = _fit(pyrosc.scvi(cells, n_latent=2, n_hidden=16), cells, epochs=30, validation=None)
    assert np.square(fit.latent(cells)).sum() < 0.5 * np.square(plain.latent(cells)).sum()
    last = fit.history.iloc[-1]
    assert last["factors"] < 0
    assert last["train_elbo"] == pytest.approx(last["reconstruction"] - last["kl_z"], rel=1e-5)
    assert last["train_elbo"] == pytest.approx(fit.elbo(cells, n_draws=10).mean(), rel=0.02)


# ---- what labels say ------------------------------------------------------------------------


def test_evidence_of_labels_errors_and_groups_is_a_table():
    labels = LabelPrior({"a": 3.0}, errors=0.1, groups={"ab": ["a", "b"]})
    levels = ["a", "b", "ab", None, "c"]
    cells = Cells.from_counts(np.ones((10, 3), int), label=levels * 2)
    program = pyrosc.scanvi(cells, n_latent=2, labels=labels)
    part = program.parts["labels"]
    assert part.types == ["a", "b", "c"]
    cells = cells[:4]
    seen = part.evidence(cells).exp()
    expected = [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.9, 0.9, 0.05], [1.0, 1.0, 1.0]]
    np.testing.assert_allclose(seen, expected, atol=1e-6)
    prior = np.array([3.0, 1.0, 1.0]) * np.array(expected)
    np.testing.assert_allclose(part(cells).probs, prior / prior.sum(1, keepdims=True), atol=1e-6)


def test_cells_of_a_group_are_told_apart_within_it():
    adata = simulate.tissue(1200, 300, 4, 2, n_markers=60, seed=0)
    kind = adata.obs["cell_type"].astype(str).to_numpy()
    coarse = np.where(np.isin(kind, ["type0", "type1"]), "either", kind)
    known = np.random.default_rng(1).uniform(size=len(kind)) < 0.05
    adata.obs["label"] = np.where(known, kind, coarse)
    cells = Cells.from_anndata(adata, batch="batch", label="label")
    labels = LabelPrior(groups={"either": ["type0", "type1"]})
    fit = _fit(pyrosc.scanvi(cells, labels=labels), cells, epochs=25)
    found = fit.label_probabilities(cells)
    assert list(found.columns) == ["type0", "type1", "type2", "type3"]
    right = found.columns[found.to_numpy().argmax(1)] == kind
    assert right[~known & (coarse == "either")].mean() > 0.9


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LabelPrior(errors=1.0), "errors must be at least 0 and below 1"),
        (lambda: LabelPrior(["a"]), "weights takes types by name"),
        (lambda: LabelPrior({"a": 0.0}), r'weights\["a"\] must be a positive number'),
        (lambda: LabelPrior(groups={"ab": "a"}), r'groups\["ab"\] must be a list of types'),
        (lambda: Classifier(weight=-1.0), "weight must be a number of nats"),
        (lambda: Classifier(n_hidden=0), "n_hidden must be a whole number"),
    ],
)
def test_arguments_of_parts_are_checked(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_story_of_labels_asks_for_them():
    x = np.ones((5, 4), int)
    with pytest.raises(ProgramError, match="scanvi needs a label column"):
        pyrosc.scanvi(Cells.from_counts(x))
    with pytest.raises(ProgramError, match="has no label; without labels use pyrosc.scvi"):
        pyrosc.scanvi(Cells.from_counts(x, label=[None] * 5))
    with pytest.raises(ProgramError, match="has one label"):
        pyrosc.scanvi(Cells.from_counts(x, label=["a", None, "a", "a", None]))
    with pytest.raises(ProgramError, match='weights names "B", not among "a", "b"'):
        pyrosc.scanvi(Cells.from_counts(x, label=["a", "a", "b", "b", None]), labels=LabelPrior({"B": 1.0}))


def test_a_label_of_one_cell_is_warned_of_by_name():
    with pytest.warns(PyroscWarning, match=r'a single cell in "c"'):
        Cells.from_counts(np.ones((5, 4), int), label=["a", "a", "b", "b", "c"])


# ---- recovery -------------------------------------------------------------------------------


def test_types_of_unlabelled_cells_are_found(fitted):
    adata, cells, fit = fitted
    kind = adata.obs["cell_type"].astype(str).to_numpy()
    hidden = cells.label.numpy() < 0
    for by in ("story", "neighbors"):
        found = fit.label_probabilities(cells, by=by)
        assert list(found.index) == list(cells.names)
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
        assert (found.columns[found.to_numpy().argmax(1)] == kind)[hidden].mean() > 0.9
    # The twin: labels that mean nothing are not found again.
    wrong = adata.copy()
    wrong.obs["label"] = np.where(hidden, None, np.random.default_rng(0).permutation(kind))
    other = Cells.from_anndata(wrong, batch="batch", label="label")
    lost = _fit(pyrosc.scanvi(other), other, epochs=10).label_probabilities(other)
    assert (lost.columns[lost.to_numpy().argmax(1)] == kind)[hidden].mean() < 0.6


def test_answers_do_not_use_the_labels_of_the_cells(fitted):
    _, cells, fit = fitted
    some = cells[:50]
    pd.testing.assert_frame_equal(fit.label_probabilities(some), fit.label_probabilities(some.without_labels()))


def test_shares_of_types_are_learned_though_labels_are_even():
    adata = simulate.tissue(2000, 300, 3, 1, n_markers=60, seed=3)
    kind = adata.obs["cell_type"].astype(str).to_numpy()
    draw = np.random.default_rng(0)
    keep = np.concatenate([np.flatnonzero(kind == "type0"), draw.choice(np.flatnonzero(kind != "type0"), 250, False)])
    adata, kind = adata[np.sort(keep)].copy(), kind[np.sort(keep)]
    label = np.full(len(kind), None, dtype=object)
    for level in np.unique(kind):
        label[draw.choice(np.flatnonzero(kind == level), 20, replace=False)] = level
    adata.obs["label"] = label
    cells = Cells.from_anndata(adata, label="label")
    fit = _fit(pyrosc.scanvi(cells, labels=LabelPrior(learned=True)), cells, epochs=40)
    shares = fit.program.parts["labels"].log_weights.softmax(-1).detach().numpy()
    truth = pd.Series(kind[pd.isna(label)]).value_counts(normalize=True).sort_index()
    assert truth.iloc[0] > 0.6
    np.testing.assert_allclose(shares, truth, atol=0.04)


def test_the_responsibilities_of_a_prior_and_an_enumerated_site_answer_too(fitted):
    _, cells, _ = fitted
    prior = pyrosc.MixturePrior(labels=True)
    fit = _fit(pyrosc.scvi(cells, prior=prior), cells, epochs=2)
    found = fit.label_probabilities(cells[:60], n_draws=400).to_numpy()
    z = torch.from_numpy(fit.latent(cells[:60], 400))
    expected = fit.program.parts["prior"].responsibilities(z, cells[:60].without_labels()).mean(0).detach()
    np.testing.assert_allclose(found, expected, atol=0.08)  # of 400 draws each

    def model(cells, *, prior, decoder, likelihood, dispersion):
        theta = dispersion()
        with cells.plate():
            logits = torch.zeros(4).index_fill(0, torch.tensor(0), 0.5)
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            centre = torch.eye(4, 2)[y]
            z = pyro.sample("z", dist.Normal(centre, 0.5).to_event(1))
            rho, hidden = decoder(z, cells)
            rho = pyro.deterministic("rho", rho, event_dim=1)
            pyro.sample("x", likelihood(cells.library * rho, dispersion.at(theta, cells, hidden), hidden), obs=cells.x)

    few = cells[:60]
    program = pyrosc.Program(
        model, few, scvi.guide, prior=pyrosc.Prior(dist.Normal, 0.0, 1.0), encoder=pyrosc.Encoder(2, 16),
        decoder=pyrosc.Decoder(2, 16), likelihood=pyrosc.NBLikelihood(), dispersion=pyrosc.GeneDispersion(),
    )  # fmt: skip
    made = _fit(program, few, epochs=2, validation=None)
    share = made.label_probabilities(few, n_draws=400).to_numpy()
    z = torch.from_numpy(made.latent(few, 400)).unsqueeze(-2)
    logs = dist.Normal(torch.eye(4, 2), 0.5).log_prob(z).sum(-1) + torch.tensor([0.5, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(share, logs.softmax(-1).mean(0), atol=0.08)  # of 400 draws each


# ---- unknown cells, calibration -------------------------------------------------------------


def test_distance_to_types_is_mahalanobis():
    draw = np.random.default_rng(0)
    examples = torch.tensor(draw.normal(size=(4000, 3)) * [1.0, 2.0, 0.5])
    label = torch.arange(4000) % 2
    examples[label == 1] += 10
    z = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [10.0, 14.0, 10.0]])
    found, own = strangeness(z, examples, label)
    np.testing.assert_allclose(found, [0.0, 4.0, 4.0], atol=0.25)
    # Of examples it is chi-squared: mean 3 (sd of the mean of 4,000: 0.04).
    assert float(own.mean()) == pytest.approx(3.0, abs=0.16)


def test_a_type_that_is_not_known_is_told_by_its_state_or_by_what_is_left():
    adata = simulate.tissue(1600, 300, 4, 1, n_markers=60, seed=5)
    kind = adata.obs["cell_type"].astype(str).to_numpy()
    known = np.flatnonzero(kind != "type2")
    ref, new = known[: len(known) // 2], np.sort([*known[len(known) // 2 :], *np.flatnonzero(kind == "type2")])
    adata.obs["label"] = kind
    cells = Cells.from_anndata(adata[ref].copy(), label="label")
    fit = _fit(pyrosc.scanvi(cells), cells, epochs=30)
    table = fit.labels(adata[new].copy(), novelty=0.01)
    strange = kind[new] == "type2"
    rank = table["p_known"].rank().to_numpy()
    auc = 1 - (rank[strange].sum() - strange.sum() * (strange.sum() + 1) / 2) / (strange.sum() * (~strange).sum())
    assert auc > 0.9
    assert (table["label"] == "unknown")[strange].mean() > 0.5 > 0.1 > (table["label"] == "unknown")[~strange].mean()
    # Without the strange ones, and from the same law, the p-values are near uniform.
    sound = fit.labels(adata[new[~strange]].copy())
    assert (sound["p_known"] < 0.05).mean() < 0.12
    assert (fit.labels(adata[new[:30]].copy())["p_residual"] == 1).all()


def test_labels_below_a_threshold_are_unknown(fitted):
    _, cells, fit = fitted
    table = fit.labels(cells, threshold=0.9)
    assert ((table["label"] == "unknown") == (table["probability"] < 0.9)).all()
    assert (fit.labels(cells)["label"] != "unknown").all()
    for name in ("threshold", "novelty"):
        with pytest.raises(ValueError, match=f"{name} must be above 0 and at most 1"):
            fit.labels(cells, **{name: 1.5})


def test_reliability_of_right_and_of_too_sure_probabilities():
    draw = np.random.default_rng(0)
    share = draw.dirichlet([0.6, 0.6, 0.6], 20_000)
    truth = (draw.uniform(size=(20_000, 1)) > share.cumsum(1)).sum(1)
    right = reliability(share, truth, 0.95, 10, 0)
    assert right.attrs["ece"] < 0.02
    assert right.attrs["ece"] < 3 * right.attrs["ece_if_calibrated"]
    assert ((right["lower"] <= right["probability"]) & (right["probability"] <= right["upper"])).mean() > 0.7
    sure = share**3 / (share**3).sum(1, keepdims=True)
    wrong = reliability(sure, truth, 0.95, 10, 0)
    assert wrong.attrs["ece"] > 0.08
    assert wrong.attrs["nll"] > right.attrs["nll"]
    assert wrong.attrs["accuracy"] == right.attrs["accuracy"]
    expected = ((sure - np.eye(3)[truth]) ** 2).sum(1).mean()
    assert wrong.attrs["brier"] == pytest.approx(expected)
    above = share.max(1) >= right.attrs["threshold"]
    assert (share.argmax(1) == truth)[above].mean() == pytest.approx(0.95, abs=0.005)


def test_a_threshold_cuts_where_probabilities_differ():
    share = np.array([[1.0, 0.0]] * 10 + [[0.6, 0.4]] * 10)
    truth = np.array([0, 1] * 5 + [0] * 10)
    table = reliability(share, truth, 0.7, 5, 0)
    assert table.attrs["threshold"] == 0.6  # at 1.0 half are right, though the first of them in order is
    assert table.attrs["named"] == 1.0
    assert np.isnan(reliability(share, 1 - truth, 0.95, 5, 0).attrs["threshold"])


@pytest.mark.parametrize("levels", [(1, 2, 3), (True, False)], ids=["numbers", "truths"])
def test_labels_that_are_no_text_come_back_as_they_were(levels, tmp_path):
    draw = np.random.default_rng(0)
    label = draw.choice(levels, 80)
    cells = Cells.from_counts(draw.poisson(2, (80, 20)), label=label)
    labels = LabelPrior({levels[0]: 2.0}, groups={3: [1, 2]} if 3 in levels else None)
    fit = _fit(pyrosc.scanvi(cells, n_latent=2, n_hidden=8, labels=labels), cells, epochs=1)
    fit.save(tmp_path / "fit.safetensors")
    back = pyrosc.load(tmp_path / "fit.safetensors")
    pd.testing.assert_frame_equal(back.labels(cells), fit.labels(cells))
    assert list(back.label_probabilities(cells).columns) == ([1, 2] if 3 in levels else [False, True])
    assert type(back.labels(cells)["label"].iloc[0]) is type(levels[0])


def test_novelty_wants_labelled_cells_to_set_beside():
    draw = np.random.default_rng(0)
    label = np.full(80, None, dtype=object)
    label[:4] = ["a", "b", "a", "b"]
    cells = Cells.from_counts(draw.poisson(2, (80, 20)), label=label)
    fit = _fit(pyrosc.scanvi(cells, n_latent=2, n_hidden=8), cells, epochs=1)
    assert fit.labels(cells)["p_known"].isna().all()
    with pytest.raises(ProgramError, match="fewer than 20"):
        fit.labels(cells, novelty=0.01)


def test_check_and_temperature_read_labels_of_held_out_cells(fitted):
    adata, cells, fit = fitted
    held = adata[cells.label.numpy() < 0].copy()
    held.obs["label"] = held.obs["cell_type"].astype(str)
    before = pyrosc.check.labels(fit, held)
    cooler = fit.with_temperature(held)
    after = pyrosc.check.labels(cooler, held)
    assert after.attrs["nll"] <= before.attrs["nll"] + 1e-6
    assert "label_temperature" not in fit.settings
    assert cooler.settings["label_temperature"] != 1
    held.obs["label"] = None
    with pytest.raises(ValueError, match="nothing to compare"):
        pyrosc.check.labels(fit, held)
    with pytest.raises(ValueError, match="0 of these cells have a label"):
        fit.with_temperature(held)


# ---- as any other story ---------------------------------------------------------------------


def test_scanvi_starts_from_a_fit_of_scvi(fitted):
    _, cells, _ = fitted
    base = _fit(pyrosc.scvi(cells), cells, epochs=2)
    made = pyrosc.scanvi(cells, start=base)
    for name in ("encoder", "decoder", "dispersion"):
        for one, two in zip(made.parts[name].parameters(), base.program.parts[name].parameters()):
            assert torch.equal(one, two)
            assert one is not two
    with pytest.raises(ValueError, match="other genes"):
        pyrosc.scanvi(Cells.from_counts(np.ones((4, 5), int), label=["a", "b", "b", "a"]), start=base)
    with pytest.raises(TypeError, match="start takes a Fit"):
        pyrosc.scanvi(cells, start=base.program)


def test_a_fit_of_labels_is_saved_and_asked_as_others(fitted, tmp_path):
    _, cells, fit = fitted
    fit.save(tmp_path / "fit.safetensors")
    back = pyrosc.load(tmp_path / "fit.safetensors")
    pd.testing.assert_frame_equal(back.labels(cells[:60]), fit.labels(cells[:60]))
    assert back.expression(cells[:3]).shape == (3, cells.n_genes)
    assert np.isfinite(back.log_likelihood(cells[:20], 200)).all()
    table = back.differential_expression(cells, "cell_type", "type0", "type1")
    assert table["is_de"].any()
    bound, likelihood = fit.elbo(cells[:100], n_draws=20).mean(), fit.log_likelihood(cells[:100], 500).mean()
    assert bound < likelihood


def test_an_ensemble_averages_types(fitted):
    _, cells, _ = fitted
    fit = _fit(pyrosc.scanvi(cells), cells, epochs=8, ensemble=2)
    found = fit.label_probabilities(cells[:20], n_draws=10)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


def test_a_story_without_types_says_so():
    cells = Cells.from_counts(np.random.default_rng(0).poisson(2, (60, 20)))
    fit = _fit(pyrosc.scvi(cells, n_latent=2), cells, epochs=1, validation=None)
    with pytest.raises(ProgramError, match="was fitted without labels"):
        fit.label_probabilities(cells)


def test_the_user_s_own_objective_is_refused(fitted):
    _, cells, _ = fitted
    with pytest.raises(ValueError, match='sums out "y"'):
        _fit(pyrosc.scanvi(cells), cells, objective=pyro.infer.TraceMeanField_ELBO())
