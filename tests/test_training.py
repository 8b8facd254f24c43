"""fit: what it promises of the weights it returns, its history, its arguments and its failures."""

import math
import signal
import threading
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import nn

import pyrosc
from pyrosc import Cells, FitError, NBLikelihood, Part, PoissonLikelihood, Prior, Program, PyroscWarning, ZINBLikelihood
from pyrosc.counts import nonzeros
from pyrosc.distributions import Poisson
from pyrosc.elbo import elbo_terms
from pyrosc.loading import blocks, minibatches
from pyrosc.objective import KLWeight
from pyrosc.optim import share_of_rate
from pyrosc.training import _kl_weight, default_epochs

QUICK = dict(epochs=3, progress=False, patience=None)


@pytest.fixture(scope="module")
def cells(tissue):
    return Cells.from_anndata(tissue[:200], batch="batch", label="cell_type")


def tiny(cells, **options):
    return pyrosc.scvi(cells, **(dict(n_latent=3, n_hidden=16) | options))


def quick(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, **(QUICK | options))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# ---- nothing outside changes -------------------------------------------------------------------


def test_fit_leaves_the_program_and_the_world_as_they_were(cells):
    program = tiny(cells)
    before = {k: v.clone() for k, v in program.state_dict().items()}
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what must not change
    state, validation = torch.get_rng_state(), pyro.settings.get()

    quick(program, cells)

    assert all(torch.equal(before[k], v) for k, v in program.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert pyro.settings.get() == validation
    assert len(pyro.get_param_store()) == 0


def test_the_same_seed_gives_the_same_weights_bit_for_bit(cells):
    one, other, third = (quick(tiny(cells), cells, seed=s) for s in (1, 1, 2))

    assert same(one.program, other.program)
    assert not same(one.program, third.program)
    columns = ["train_elbo", "validation_elbo", "kl_z", "reconstruction"]
    assert one.history[columns].equals(other.history[columns])


def test_interleaved_work_changes_nothing(cells, tmp_path):
    """fit, a user's SVI, Predictive, save and load in turn: each as if alone."""
    pyro.param("mine", torch.ones(2))
    alone = quick(tiny(cells, seed=1), cells)

    other = tiny(cells, seed=2)
    svi = SVI(other.model, other.guide, ClippedAdam({"lr": 1e-2}), TraceMeanField_ELBO())
    svi.step(cells.minibatch(range(50)))
    again = quick(tiny(cells, seed=1), cells)
    Predictive(poutine.uncondition(again.program.model), guide=again.program.guide, num_samples=2)(cells[:5])
    again.save(tmp_path / "a.safetensors")
    loaded = pyrosc.load(tmp_path / "a.safetensors")
    svi.step(cells.minibatch(range(50)))
    third = quick(tiny(cells, seed=1), cells)

    assert same(alone.program, again.program)
    assert same(alone.program, loaded.program)
    assert same(alone.program, third.program)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    pyro.clear_param_store()


def test_a_second_fit_leaves_the_first_alone(cells):  # row 83 of the faults
    first = quick(tiny(cells), cells)
    before = {k: v.clone() for k, v in first.program.state_dict().items()}

    quick(first.program, cells, seed=9)

    assert all(torch.equal(before[k], v) for k, v in first.program.state_dict().items())


# ---- the objective -----------------------------------------------------------------------------


def test_the_elbo_per_cell_is_traces_mean_field_elbo(cells):
    program = tiny(cells)
    part = cells[:40]
    with program.driven(3):
        expected = -TraceMeanField_ELBO().loss(program.model, program.guide, part) / 40
    with program.driven(3), torch.no_grad():
        terms = elbo_terms(program, part)

    assert float(terms.local.mean()) == pytest.approx(expected, rel=1e-5)
    q = dist.Normal(*program.parts["encoder"](part))
    torch.testing.assert_close(
        terms.local_kl["z"], torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    )


@pytest.mark.parametrize("weight", [1.0, 0.3, 1e-6])
def test_the_kl_weight_multiplies_kl_and_nothing_else(cells, weight):
    program, part, handler = tiny(cells), cells[:40], KLWeight(weight)
    with program.driven(3), torch.no_grad():
        terms = elbo_terms(program, part)
    with program.driven(3):
        weighted = TraceMeanField_ELBO().loss(handler(program.model), handler(program.guide), part)

    expected = -(terms.reconstruction.sum() - weight * terms.local_kl["z"].sum())
    assert weighted == pytest.approx(float(expected), rel=1e-5)
    assert float(handler.kl_terms(40)["z"]) == pytest.approx(float(terms.local_kl["z"].mean()), rel=1e-5)


@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("total", [1, 7, 1000])
def test_warm_up_rises_and_ends_at_one(warmup, total):
    weights = [_kl_weight(step, total, warmup) for step in range(total)]

    assert weights == sorted(weights)
    assert weights[-1] == 1
    assert weights[0] > 0
    assert warmup == 0 or total < 100 or weights[0] < 0.1


def test_the_learning_rate_rises_and_falls_to_nothing():
    rates = [share_of_rate(step, 200, "cosine") for step in range(200)]

    assert max(rates) == pytest.approx(1)
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] < 1e-3
    assert {share_of_rate(step, 200, "constant") for step in range(200)} == {1.0}
    assert share_of_rate(0, 1, "cosine") == 1.0


def test_a_gamma_prior_without_data_is_recovered(cells):
    """The analytic KL of a guide by AutoNormal would put its mean at half the truth."""

    class Silent(Part):
        def forward(self, mean):
            return Poisson(1e-8 + 0 * mean).to_event(1)

    class Scale(Part):
        def __init__(self):
            super().__init__()
            self.loc, self.log_scale = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

        def forward(self):
            return dist.LogNormal(self.loc, self.log_scale.exp()).to_event(1)

    def model(cells, *, prior, likelihood):
        rate = pyro.sample("rate", prior())
        with cells.plate():
            pyro.sample("x", likelihood(rate.expand(len(cells), cells.n_genes)), obs=0 * cells.x)

    def guide(cells, *, scale):
        pyro.sample("rate", scale())
        with cells.plate():
            pass

    few = cells[:4]
    program = Program(model, few, guide, prior=Prior(dist.Gamma, 5.0, 1.0), likelihood=Silent(), scale=Scale())
    result = pyrosc.fit(
        program, few, epochs=1500, lr=0.02, validation=None, weight_decay=0.0, progress=False, batch_size=2
    )

    # The LogNormal nearest to a Gamma has its mean exactly (set the derivative of KL by loc to zero:
    # shape = rate * mean); 5 % is the noise of the last steps.
    assert float(result.program.parts["scale"]().mean) == pytest.approx(5, rel=0.05)
    assert "kl_rate" in result.history


# ---- what comes back ---------------------------------------------------------------------------


def test_the_history_has_a_row_an_epoch(cells):
    result = quick(tiny(cells), cells)
    table = result.history

    assert table["epoch"].tolist() == [1, 2, 3]
    wanted = {
        "train_elbo",
        "validation_elbo",
        "reconstruction",
        "kl_z",
        "kl_weight",
        "lr",
        "cells_per_second",
        "active_units",
        "seconds",
        "skipped_steps",
    }
    assert wanted <= set(table)
    assert table["kl_weight"].iloc[-1] == 1
    np.testing.assert_allclose(table["reconstruction"] - table["kl_z"], table["train_elbo"], rtol=1e-5)
    assert table["train_elbo"].iloc[-1] > table["train_elbo"].iloc[0]
    assert np.isfinite(table.to_numpy(dtype=float)).all()


def test_the_best_epoch_is_the_one_returned(cells):
    result = quick(tiny(cells), cells, epochs=8, lr=0.05, schedule="constant", warmup=0.2)
    at_one = result.history[result.history["kl_weight"] == 1]
    best = at_one.loc[at_one["validation_elbo"].idxmax()]
    held_out = np.random.default_rng(0).permutation(200)[:20]

    assert result.settings["best_epoch"] == best["epoch"]
    # one draw for each of 20 cells in the history, 50 here: a draw moves a cell's ELBO by some 3 nats (sd), five errors
    again = result.elbo(cells[np.sort(held_out)], n_draws=50)
    assert again.mean() == pytest.approx(best["validation_elbo"], abs=3.0)


def test_early_stopping_waits_for_weight_one(cells):
    result = quick(tiny(cells), cells, epochs=40, lr=0.1, schedule="constant", warmup=0.5, patience=1)

    assert result.settings["state"] == "stopped early"
    assert len(result.history) > 20
    assert result.history["kl_weight"].iloc[result.settings["best_epoch"] - 1] == 1


def test_settings_say_what_was_done(cells):
    result = quick(tiny(cells), cells, seed=None, validation=[0, 5, 9])
    settings = result.settings

    assert (settings["n_cells"], settings["n_held_out"]) == (197, 3)
    assert settings["state"] == "finished"
    assert settings["kl_weight"] == 1
    assert settings["weight_decay"] == pytest.approx(70 / 197)
    assert isinstance(settings["seed"], int)
    assert {"pyrosc", "torch", "pyro-ppl", "python"} <= set(settings["versions"])
    assert settings["estimate"]["seconds"] > 0
    assert settings["estimate"]["memory_gb"] > 0
    assert same(result.program, quick(tiny(cells), cells, seed=settings["seed"], validation=[0, 5, 9]).program)


def test_a_users_own_svi_reaches_the_same_elbo(cells):
    program, train = tiny(cells), cells
    ours = quick(program, train, epochs=60, lr=1e-2, schedule="constant", warmup=0.0, validation=None, weight_decay=0.0)
    theirs = program.copy()
    theirs.start(train)
    svi = SVI(theirs.model, theirs.guide, ClippedAdam({"lr": 1e-2}), TraceMeanField_ELBO())
    theirs.train()
    order = torch.Generator().manual_seed(5)
    for _ in range(60):
        for batch in minibatches(train, 128, order):
            svi.step(batch)
    theirs.eval()

    def elbo(program):
        with program.driven(0), torch.no_grad():
            return float(torch.stack([elbo_terms(program, train).local for _ in range(20)]).mean())

    assert elbo(theirs) == pytest.approx(elbo(ours.program), abs=1.0)
    assert elbo(theirs) > elbo(program) + 5


@pytest.mark.parametrize("likelihood", [NBLikelihood, ZINBLikelihood, PoissonLikelihood])
@pytest.mark.parametrize(
    "prior", [Prior(dist.Normal, 0.0, 1.0), Prior(dist.StudentT, 5.0)], ids=["analytic", "Monte Carlo"]
)
def test_any_part_trains_by_the_same_loop(cells, likelihood, prior):
    parts = dict(likelihood=likelihood(), prior=prior)
    if likelihood is PoissonLikelihood:
        parts["dispersion"] = None

    result = quick(tiny(cells, **parts), cells)

    assert result.history["train_elbo"].iloc[-1] > result.history["train_elbo"].iloc[0]


@pytest.mark.parametrize("n", [*range(1, 12), 33])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_every_number_of_cells_fits(cells, n, batch_size):  # rows 73 and 74
    result = quick(tiny(cells), cells[:n], epochs=1, batch_size=batch_size, validation=None)

    assert result.settings["state"] == "finished"


def test_minibatches_are_a_partition_in_a_seeded_order(cells):
    def rows(seed):
        return [b._rows.tolist() for b in minibatches(cells[:33], 8, torch.Generator().manual_seed(seed))]

    assert sorted(i for batch in rows(0) for i in batch) == sorted(cells[:33]._rows.tolist())
    assert [len(r) for r in rows(0)] == [7, 7, 7, 6, 6]
    assert rows(0) == rows(0) != rows(1)


def test_blocks_are_whole_data_sets_in_order(cells):
    found = list(blocks(cells, per_cell=10**5))

    assert torch.equal(torch.cat([b.library for b in found]), cells.library)
    assert all(b.total == len(b) for b in found)
    assert len(found) > 1


@pytest.mark.parametrize("window", [1, 3_000, 10**9])
def test_minibatches_cut_from_a_window_are_those_gathered_alone(cells, monkeypatch, window):
    monkeypatch.setattr("pyrosc.loading._WINDOW", window)
    some = cells[50:150].do(batch=cells.schema.batch.levels[0])
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))

    found = list(minibatches(some, 7, torch.Generator().manual_seed(1)))

    assert sum(map(len, found)) == 100
    for batch, rows in zip(found, order.tensor_split(15), strict=True):
        alone = some.minibatch(rows)
        assert batch.total == alone.total == 100
        assert torch.equal(batch.x, alone.x)
        assert torch.equal(batch.log1p(), alone.log1p())
        assert torch.equal(batch.library, alone.library)
        assert torch.equal(batch.batch, alone.batch)
        for mine, theirs in zip(nonzeros(batch.x)[:4], nonzeros(alone.x.clone())[:4]):
            assert torch.equal(mine, theirs)


def test_epochs_follow_the_number_of_cells():
    assert default_epochs(10**6, 128) == 10
    assert default_epochs(100, 128) == 100
    assert default_epochs(2_200, 128) == 67  # of 18 steps each
    assert default_epochs(2_200, 128, steps=600) == 33
    assert default_epochs(20_000, 128) == default_epochs(100_000, 128) == 20
    assert default_epochs(130_000, 128) == 15


# ---- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(validation=0), "validation must be a share in"),  # row 61
        (dict(validation=1.0), "validation must be a share in"),
        (dict(validation=0.001), "leaves none on one side; pass validation=None"),
        (dict(batch_size=0), "batch_size must be a whole number of at least 1, not 0"),  # row 62
        (dict(batch_size=-5), "batch_size"),
        (dict(epochs=0), "epochs must be a whole number of at least 1, not 0"),  # row 63
        (dict(epochs=2.5), "epochs"),
        (dict(lr=1e6), r"lr must be in \(0, 1\], not 1000000"),  # row 66
        (dict(lr=math.nan), "lr must be"),
        (dict(lr=0), "lr must be"),
        (dict(lr="1e-3"), "lr must be a number, not '1e-3'"),
        (dict(lr=-1), "lr must be"),
        (dict(validation=[3, 200]), "there is no cell 200; there are 200"),  # row 67
        (dict(validation=[3, 7, 3]), "names cell 3 twice"),
        (dict(validation=[1.0, 2.0]), "whole positions"),
        (dict(validation=list(range(200))), "both sides need some"),
        (dict(seed=1.5), "seed must be a whole number"),  # row 68
        (dict(seed=-1), "seed must be a whole number"),
        (dict(device="gpu"), 'device must be "auto", "cpu", "cuda"'),
        (dict(warmup=1.0), r"warmup must be in \[0, 1\)"),
        (dict(patience=0), "patience"),
        (dict(weight_decay=-1), "weight_decay"),
        (dict(clip_norm=0), "clip_norm"),
        (dict(schedule="cosin"), 'schedule must be "cosine" or "constant"'),
    ],
)
def test_wrong_arguments_are_explained(cells, options, says):
    with pytest.raises(ValueError, match=says):
        quick(tiny(cells), cells, **options)


def test_a_large_seed_is_accepted(cells):  # row 68
    assert quick(tiny(cells), cells, seed=2**40, epochs=1).settings["seed"] == 2**40


def test_a_misspelt_argument_is_named(cells):  # row 64
    with pytest.raises(TypeError, match="no argument 'epoch'.*Did you mean \"epochs\""):
        pyrosc.fit(tiny(cells), cells, epoch=3)


def test_a_misspelt_story_or_part_lists_what_there_is():  # row 65
    with pytest.raises(AttributeError, match='no "scvii". Did you mean "scvi".*"NBLikelihood"'):
        pyrosc.scvii  # noqa: B018


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_is_an_error_not_a_fallback(cells):  # row 69
    with pytest.raises(ValueError, match=r"this torch \(.*\) finds no CUDA"):
        quick(tiny(cells), cells, device="cuda")


def test_a_minibatch_cannot_be_fitted(cells):
    with pytest.raises(ValueError, match="whole data set"):
        quick(tiny(cells), cells.minibatch(range(10)))


def test_an_anndata_is_brought_into_order(cells, tissue):
    assert same(quick(tiny(cells), tissue[:200].copy()).program, quick(tiny(cells), cells).program)


def test_what_is_no_program_is_refused(cells):
    with pytest.raises(TypeError, match="takes a Program first"):
        pyrosc.fit(cells, cells)


# ---- when it goes wrong ------------------------------------------------------------------------


class Breaks(Part):
    """A likelihood whose mean of gene g3 becomes zero after some calls."""

    def __init__(self, after):
        super().__init__()
        self.after, self.calls = after, 0

    def forward(self, mean, dispersion=None, hidden=None):
        self.calls += self.training
        if self.calls > self.after:
            mean = mean * (torch.arange(mean.shape[-1]) != 3)
        return Poisson(mean).to_event(1)


def test_a_loss_that_is_not_finite_names_site_cell_gene_and_keeps_the_last_good_state(cells):  # row 71
    program = tiny(cells, likelihood=Breaks(12), dispersion=None)

    with pytest.raises(FitError, match=r'the loss became (inf|nan) at step \d+.*"x", for \d+ of \d+ cells \(first: cell "cell\d+", gene "gene3", count \d+ where the mean is 0.*Lower lr \(now 0.01\)') as error:  # fmt: skip
        quick(program, cells, epochs=30, lr=0.01, warmup=0.0)

    last = error.value.fit
    assert last.settings["state"] == "failed"
    assert len(last.history) >= 1
    assert np.isfinite(last.latent(cells)).all()


class Explodes(Part):
    """A likelihood whose gradient, not its value, is infinite for some calls."""

    def __init__(self, calls):
        super().__init__()
        self.bad, self.calls = calls, 0

    def forward(self, mean, dispersion=None, hidden=None):
        self.calls += self.training
        if self.training and self.calls in self.bad:
            mean = mean + 0 * (mean.detach() - mean).abs().add(0).sqrt()  # d sqrt(0) is infinite
        return Poisson(mean).to_event(1)


def test_a_single_infinite_gradient_is_skipped_and_counted(cells):  # row 72
    program = tiny(cells, likelihood=Explodes({9}), dispersion=None)

    with pytest.warns(PyroscWarning, match="1 steps were skipped"):
        result = pyrosc.fit(program, cells, epochs=6, progress=False)

    assert result.settings["skipped_steps"] == 1
    assert result.history["skipped_steps"].sum() == 1
    assert all(torch.isfinite(p).all() for p in result.program.parameters())


def test_ten_infinite_gradients_in_a_row_stop_the_fit(cells):  # row 72
    program = tiny(cells, likelihood=Explodes(set(range(5, 100))), dispersion=None)

    with pytest.raises(FitError, match="gradient was not finite for 10 steps"):
        quick(program, cells, epochs=20)


class Interrupts(Part):
    """Presses Ctrl-C at a call."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, mean, dispersion=None, hidden=None):
        self.calls += self.training
        if self.training and self.calls in self.at:
            signal.raise_signal(signal.SIGINT)
        return Poisson(mean).to_event(1)


def test_ctrl_c_gives_back_the_fit_so_far(cells):  # row 75
    handler = signal.getsignal(signal.SIGINT)

    result = quick(tiny(cells, likelihood=Interrupts({14}), dispersion=None), cells, epochs=50, warmup=0.0)

    assert result.settings["state"] == "interrupted"
    assert 1 <= len(result.history) < 50
    assert np.isfinite(result.latent(cells)).all()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_raises(cells):  # row 75
    class Twice(Interrupts):
        def forward(self, mean, dispersion=None, hidden=None):
            if self.training and self.calls + 1 in self.at:
                signal.raise_signal(signal.SIGINT)
            return super().forward(mean)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        quick(tiny(cells, likelihood=Twice({10}), dispersion=None), cells, epochs=50)
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_early_interrupt_is_said_not_to_be_a_posterior(cells):
    with pytest.warns(PyroscWarning, match="ended at KL weight 0"):
        result = pyrosc.fit(
            tiny(cells, likelihood=Interrupts({8}), dispersion=None), cells, epochs=50, warmup=0.9, progress=False
        )
    with pytest.warns(PyroscWarning, match="before its warm-up was over"):
        result.latent(cells)


def test_fit_works_away_from_the_main_thread(cells):
    found = []
    thread = threading.Thread(target=lambda: found.append(quick(tiny(cells), cells)))
    thread.start()
    thread.join()

    assert same(found[0].program, quick(tiny(cells), cells).program)


def test_unused_latents_are_said(tissue):  # row 92
    noise = np.random.default_rng(0).poisson(2.0, (300, 20))  # no structure to find
    cells = Cells.from_counts(noise)

    with pytest.warns(PyroscWarning, match="posterior collapse|latent dimensions are unused"):
        result = pyrosc.fit(pyrosc.scvi(cells, n_latent=5, n_hidden=8), cells, epochs=60, lr=0.02, progress=False)

    assert result.history["active_units"].iloc[-1] < 5


def test_a_frozen_program_has_nothing_to_fit_and_frozen_parts_stay(cells):
    program = tiny(cells)
    program.parts["decoder"].requires_grad_(False)
    before = [p.clone() for p in program.parts["decoder"].parameters()]
    result = quick(program, cells)

    assert all(torch.equal(a, b) for a, b in zip(before, result.program.parts["decoder"].parameters()))
    program.requires_grad_(False)
    with pytest.raises(ValueError, match="every weight is frozen"):
        quick(program, cells)


def test_validation_of_torch_stays_as_the_user_set_it(cells):
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        quick(tiny(cells), cells, epochs=1)
        assert torch.distributions.Distribution._validate_args is False
    finally:
        torch.distributions.Distribution.set_default_validate_args(True)


def test_only_weights_of_linear_layers_are_drawn_to_zero(cells):
    free, held = (quick(tiny(cells), cells, epochs=40, warmup=0.0, weight_decay=w).program for w in (0.0, 5.0))

    def size(program, name):
        return float(dict(program.named_parameters())[name].abs().mean())

    assert size(held, "parts.decoder.out.weight") < 0.6 * size(free, "parts.decoder.out.weight")
    for name in ("parts.decoder.out.bias", "parts.encoder.layers.0.norm.norm.weight"):
        assert size(held, name) > 0.7 * size(free, name)


def test_an_elbo_still_rising_is_said(cells):  # row 93
    with pytest.warns(PyroscWarning, match="still rising by .* nats a cell and epoch"):
        pyrosc.fit(tiny(cells), cells, epochs=5, lr=1e-3, schedule="constant", warmup=0.0, progress=False)


def test_too_little_memory_is_said_before_the_first_step(cells, monkeypatch):
    monkeypatch.setattr("pyrosc.counts.available_memory", lambda: 1000)

    with pytest.raises(ValueError, match=r"training would take .* GB are free\. Lower batch_size"):
        quick(tiny(cells), cells)


def test_the_bar_shows_loss_and_time_left(cells, capsys):
    quick(tiny(cells), cells, progress=True)
    shown = capsys.readouterr().err

    assert "elbo=" in shown
    assert "epoch/s" in shown or "s/epoch" in shown
    assert "GB" in shown
    quick(tiny(cells), cells)
    assert capsys.readouterr().err == ""
