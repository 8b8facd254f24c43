"""fit: stochastic variational inference of any Program, in nats per cell.

The objective is Pyro's ``TraceMeanField_ELBO`` in a leaner form (`objective`), divided by the number of cells, the
optimiser Pyro's ``ClippedAdam`` used as a torch optimiser, in its fused form (`optim`). Warm-up of the KL terms is a
messenger around model and guide and always ends at weight 1; early stopping looks only at epochs at weight 1.
"""

from __future__ import annotations

import math
import numbers
import platform
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from types import FrameType
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor
from tqdm.auto import tqdm

from .cells import Cells
from .counts import logger, may_look, require_memory
from .elbo import elbo_terms, side_terms
from .errors import FitError, PyroscWarning
from .guides import is_computed
from .isolation import checked_seed
from .loading import blocks, minibatches, n_batches_of
from .objective import IWAE, KLWeight, MeanFieldELBO
from .optim import FusedClippedAdam, share_of_rate
from .overlap import Landmarks
from .parts import whole
from .posterior import Fit
from .program import Program
from .schema import did_you_mean, listed

_PRIOR_PRECISION = 70.0  # of each weight: Normal(0, 0.12)
# Completed guides of global sites begin far from where they end: with Adam's usual memory of 1,000 squared gradients
# the first, large ones hold back all later steps (sds ended 2 to 5 times too wide, with 20 they are within 20 %).
_GLOBAL_BETAS = (0.9, 0.95)
# Steps of a fit, by default. After 600 SIM-A is 6 nats a cell short and its effects between types come out at 0.6 of
# their size, though the end of the schedule looks settled; Kang has all it gets (benchmarks/results/steps.md).
_STEPS = 1200
# With a prior that is learned, or whose KL term is noisy otherwise: Poisson counts on SIM-A left VampPrior 7.7 and a
# flow 5.0 nats a cell behind N(0, I) after 600 steps, 0.45 and 3.1 with this (benchmarks/results/priors_steps.md).
_LEARNED_STEPS = 1500
# With global sites no held-out cells end a fit, and small data are overfitted by more: on 560 cells of PBMC 1,200 steps
# (240 epochs) cost 15 nats a held-out cell. So 600, and up to 1,200 as far as 60 epochs go.
_GLOBAL_STEPS, _GLOBAL_EPOCHS = 600, 60
_LABELLED = 256  # most labelled cells of a step, of whom the guide's factors are asked
_CHECKED = 2**20  # dense values of a block on which model and guide are checked, by way of a dozen copies
_WARMUP = 0.3  # of the steps
_SKIPS = 10  # steps in a row whose gradient is not finite
_DEAD = 0.01  # variance over cells of a latent's posterior mean, below which it says nothing (Burda et al. 2016)


def fit(
    program: Program,
    cells: Cells | anndata.AnnData,
    *,
    epochs: int | None = None,
    batch_size: int = 128,
    lr: float = 1e-2,
    global_lr: float | None = None,
    schedule: str = "cosine",
    warmup: float | None = None,
    validation: float | Sequence[int] | None = 0.1,
    patience: int | None = 15,
    weight_decay: float | None = None,
    clip_norm: float = 10.0,
    objective: ELBO | str | None = None,
    k: int | None = None,
    ensemble: int = 0,
    refine: int = 0,
    seed: int | None = 0,
    device: str | torch.device = "auto",
    progress: bool = True,
    **unknown: Any,
) -> Fit:
    """Train a copy of ``program`` on ``cells``; the Program itself is unchanged.

    Parameters
    ----------
    cells : Cells, or an AnnData that is brought into the order of the Program's schema
    epochs : passes over the training cells; None takes 1,200 steps, 1,500 where a KL term is Monte Carlo, in 20 to 100
        Of more than 100,000 cells at least 10 epochs, or as many as make 2 million cells.
        With global sites 600 steps, or up to 1,200 as far as 60 epochs go: no held-out cells end such a fit.
    batch_size : most cells of a step
    lr : learning rate at its height, in (0, 1]
    global_lr : that of completed guides of global sites, in (0, 1]; None takes 10 lr
        One number has to travel its whole way in as many steps as networks need for a refinement.
    schedule : "cosine" (rises over the first 5 % of the steps, then falls to zero) or "constant"
    warmup : fraction of the steps, in [0, 1), over which the KL weight rises to 1
        None takes 0.3, or what a part of the story asks for (`SampleNormal`: 0.6)
    validation : share of cells held out, or their positions; None for none
        Held-out cells choose the best epoch and are never trained on. With global sites the last epoch
        is taken, as a choice by held-out cells would shift their posterior.
    patience : epochs at KL weight 1 without a better held-out ELBO before stopping; None for never
        Not used with global sites.
    weight_decay : L2 penalty on the weights of linear layers and on nothing else, in nats per cell
        None takes 70 / N: what a Normal(0, 0.12) prior on each weight costs, 1 / (0.12^2 N). Of 0, 7, 70
        and 700 / N it had the best held-out ELBO on two of three data sets (benchmarks/README.md).
    clip_norm : bound on each element of the gradient, in nats per cell (ClippedAdam's clamp)
    objective : any ``pyro.infer.ELBO`` with a ``differentiable_loss``; None takes `MeanFieldELBO`
        Such as ``TraceMeanField_ELBO()``, which ours equals but for speed and noise. "iwae" is the importance-weighted
        bound of each cell by ``k`` draws (`IWAE`): a guide that is wide where it cannot be right, whose draws can be
        reweighed (``importance=``); a step takes longer, and held-out cells are judged by that bound. A guide trained
        so is no best guess by itself: ask for its draws with weights.
    k : draws a cell of ``objective="iwae"``, at least 2; None for 10
    ensemble : number of refits on resampled donors (``sample=``; cells where they are not known), 0 for none
        Each starts from the fit and runs half as many epochs. Intervals of expression and of effects then hold the
        uncertainty of the decoder; without refits they hold that of the state alone, and are too narrow.
    refine : steps by which the guide of each training cell is refined at the end (`Fit.refine`), 0 for none
    seed : of the split, the order and the draws; None draws one and keeps it in ``settings``
    device : "auto" (CUDA where there is one), or a torch device
    progress : whether to show a bar

    Returns
    -------
    Fit
        With the weights of the best epoch. ``history`` has a row an epoch: ``train_elbo`` and
        ``validation_elbo`` (nats per cell at KL weight 1), ``reconstruction``, ``kl_<site>``,
        ``kl_weight``, ``lr``, ``cells_per_second``, ``active_units`` (latents whose posterior mean
        varies over cells by more than 0.01), ``seconds``, ``skipped_steps``; with "iwae" ``train_iwae`` and
        ``validation_iwae``; ``factors``, what factors of the
        guide add to the objective, such as the log probability of known labels, where it has some.

    Raises
    ------
    ValueError
        If an argument is out of range.
    ProgramError
        If model and guide disagree; found before the first step.
    FitError
        If the loss stops being finite; ``error.fit`` holds the last good state.

    Warns
    -----
    PyroscWarning
        After the fit, if latents are unused or the held-out ELBO was still rising.

    Notes
    -----
    Ctrl-C finishes the step and returns the Fit so far, its state "interrupted"; a second one
    raises. The same seed, machine and thread count give the same weights bit for bit.
    """
    if unknown:
        known = list(fit.__kwdefaults__ or ())
        name = next(iter(unknown))
        raise TypeError(f"fit() has no argument {name!r}." + did_you_mean(name, known))
    if not isinstance(program, Program):
        raise TypeError(f"fit() takes a Program first, such as pyrosc.scvi(cells), not {type(program).__name__}")
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else checked_seed(seed)
    if warmup is None:
        warmup = max((float(getattr(part, "warmup", 0.0)) for part in program.parts.values()), default=0.0) or _WARMUP
    if global_lr is None:
        global_lr = min(10 * lr, 1.0) if isinstance(lr, numbers.Real) else lr
    _check_arguments(epochs, batch_size, lr, global_lr, schedule, warmup, patience, weight_decay, clip_norm, ensemble)
    if isinstance(refine, bool) or not hasattr(refine, "__index__") or refine < 0:
        raise ValueError(f"refine must be 0 for none, or a whole number of steps, such as 300, not {refine!r}")
    bound = _objective(objective, k, program)
    place = _device(device)
    if not isinstance(cells, Cells):
        cells = Cells.align(cells, program.schema)
    if cells.total != len(cells):
        raise ValueError("fit takes a whole data set, not a mini-batch")
    cells = Cells.align(cells, program.schema)
    if not cells.has_counts:
        raise ValueError("these cells hold no counts to fit")
    train, held_out = _split(cells, validation, seed)
    if epochs is None:
        own = max((int(getattr(part, "steps", 0)) for part in program.parts.values()), default=0)
        if own:  # a part may know better
            epochs = default_epochs(len(train), batch_size, 600, own)
        elif program.has_globals:
            within = _GLOBAL_EPOCHS * n_batches_of(len(train), batch_size)
            epochs = default_epochs(len(train), batch_size, 600, min(_STEPS, max(_GLOBAL_STEPS, within)))
        else:
            steps = _LEARNED_STEPS if program.has_monte_carlo else _STEPS
            epochs = default_epochs(len(train), batch_size, steps=steps)
    if weight_decay is None:
        weight_decay = _PRIOR_PRECISION / len(train)
    held: Any = validation
    given = {
        "epochs": int(epochs), "batch_size": int(batch_size), "lr": float(lr),
        "global_lr": float(global_lr), "schedule": schedule, "warmup": float(warmup),
        "validation": None if held is None else float(held) if np.ndim(held) == 0 else [int(i) for i in held],
        "patience": None if patience is None else int(patience), "weight_decay": float(weight_decay),
        "clip_norm": float(clip_norm), "seed": seed,
    }  # fmt: skip
    dtype, stay = program.dtype, _counts_stay(cells, place)
    fresh = program.copy().to(place)
    fresh.corrections = None  # of cells that were refined: weights will be others
    run = _Run(
        fresh,
        train.to(place, dtype, keep_counts=stay),
        None if held_out is None else held_out.to(place, dtype, keep_counts=stay),
        given, bound,
    )  # fmt: skip
    if not any(p.requires_grad for p in run.program.parameters()):
        raise ValueError("every weight is frozen (requires_grad=False), so there is nothing to fit")
    run.settings |= {
        "device": str(place),
        "counts": "host, moved as they are needed" if stay else str(place),
        "kept": cells.kept,
        "fingerprint": cells.fingerprint(),
        "versions": versions(),
    }
    with _interrupts() as interrupted, run.program.driven(seed, train=True):
        try:
            run.prepare()
            run.loop(progress, interrupted)
        except torch.cuda.OutOfMemoryError as error:
            failure = FitError(
                f"the GPU ran out of memory with batch_size={batch_size} (estimated need "
                f"{run.settings['estimate']['memory_gb']:.1f} GB): halve batch_size"
            )
            failure.fit = run.result("failed")
            raise failure from error
    result = run.result(run.state)
    result.landmarks, result.examples = Landmarks.of(result, cells, seed), Landmarks.of_labels(result, cells, seed)
    _remarks(result, run)
    if ensemble and run.state != "interrupted":
        _refit(result, cells, ensemble, validation, objective, k, device, progress)
    if refine and run.state != "interrupted":
        return result.refine(cells, steps=refine, seed=seed, progress=progress)
    return result


def _refit(
    result: Fit, cells: Cells, n_members: int, validation: Any, objective: ELBO | str | None, k: int | None,
    device: Any,
    progress: bool,
) -> None:  # fmt: skip
    """Give a fit its members: refits on resampled donors, or cells, that start from it.

    They end after half its epochs: a choice by held-out cells would bring each back to where it started from.
    """
    given = result.settings
    names = ("batch_size", "lr", "global_lr", "schedule", "patience", "weight_decay", "clip_norm")
    options = {name: given[name] for name in names}
    held = _held_out(len(cells), validation, given["seed"])
    train = np.setdiff1d(np.arange(len(cells)), held)
    donors = None
    if cells.schema.sample is not None:
        donors = cells.codes[cells.schema.sample.column].cpu().numpy()[train]
    members: list[Program] = []
    for m in range(n_members):
        draw = np.random.default_rng([given["seed"], m])
        if donors is None:
            drawn = draw.choice(train, len(train))
        else:
            drawn = np.concatenate([train[donors == d] for d in draw.choice(np.unique(donors), len(np.unique(donors)))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PyroscWarning)
            refit = fit(
                result.program, cells[np.sort(drawn)], epochs=max(1, given["best_epoch"] // 2), warmup=0.0,
                validation=None, objective=objective, k=k, seed=int(draw.integers(2**31)), device=device,
                progress=progress, **options,
            )  # fmt: skip
        if refit.settings["state"] == "interrupted":
            kept = f"the {m} before it are kept" if m > 1 else "there is no ensemble, as it takes two"
            warnings.warn(f"interrupted in refit {m + 1} of {n_members}: {kept}", PyroscWarning, stacklevel=3)
            members = members if m > 1 else []
            break
        members.append(refit.program)
    result.members = tuple(members)
    factor = cells.schema.sample
    result.settings["ensemble"] = len(members)
    result.settings["resampled"] = "cells" if factor is None else factor.column


def default_epochs(n_cells: int, batch_size: int, most: int = 100, steps: int = _STEPS) -> int:
    """Epochs for so many steps, at most 100 (600 with global sites, which need the steps).

    At least 20, of more than 100,000 cells as many as make 2 million cells, and at least 10: larger data have more to
    be found, and 10 epochs left 1.3 and 3.6 nats a cell on the table with 16,000 and 20,000 cells.
    """
    least = min(20, max(10, round(2e6 / n_cells)))
    return int(min(most, max(least, round(steps / n_batches_of(n_cells, batch_size)))))


def versions() -> dict[str, str]:
    """Versions of what a fit rests on."""
    from . import __version__

    packages = {name: metadata.version(name) for name in ("torch", "pyro-ppl", "numpy", "anndata")}
    return {"pyrosc": __version__, "python": platform.python_version(), **packages}


def _check_arguments(
    epochs: Any, batch_size: Any, lr: Any, global_lr: Any, schedule: Any, warmup: Any, patience: Any,
    weight_decay: Any, clip_norm: Any, ensemble: Any,
) -> None:  # fmt: skip
    if isinstance(ensemble, bool) or not hasattr(ensemble, "__index__") or ensemble < 0 or ensemble == 1:
        raise ValueError(f"ensemble must be 0 for none, or a whole number of at least 2 refits, not {ensemble!r}")
    for name, value, optional in (
        ("epochs", epochs, True),
        ("batch_size", batch_size, False),
        ("patience", patience, True),
    ):
        if value is None and optional:
            continue
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    for name, value in (
        ("lr", lr), ("global_lr", global_lr), ("warmup", warmup), ("weight_decay", weight_decay),
        ("clip_norm", clip_norm),
    ):  # fmt: skip
        if isinstance(value, bool) or not (
            isinstance(value, numbers.Real) or (value is None and name == "weight_decay")
        ):
            raise ValueError(f"{name} must be a number, not {value!r}")
    for name, value in (("lr", lr), ("global_lr", global_lr)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], not {value!r}")
    if schedule not in ("cosine", "constant"):
        raise ValueError(f'schedule must be "cosine" or "constant", not {schedule!r}')
    if not 0 <= warmup < 1:
        raise ValueError(
            f"warmup must be in [0, 1), a fraction of the steps, not {warmup!r}; it always ends at weight 1"
        )
    if weight_decay is not None and not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay must be >= 0, not {weight_decay!r}")
    if not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, not {clip_norm!r}")


def _objective(objective: Any, k: Any, program: Program) -> ELBO | IWAE | None:
    """What is to be maximised; None for our own ELBO."""
    if k is not None and objective != "iwae":
        raise ValueError(f'k={k!r} is of objective="iwae" alone, which is not asked for')
    if objective is None:
        return None
    if isinstance(objective, str) and objective != "iwae":
        raise ValueError(f'objective must be None, "iwae" or a pyro.infer.ELBO, not {objective!r}')
    if not isinstance(objective, ELBO | str):
        raise ValueError(f"objective must be a pyro.infer.ELBO, such as TraceMeanField_ELBO(), not {objective!r}")
    if isinstance(objective, ELBO) and not hasattr(objective, "differentiable_loss"):
        raise ValueError(f"objective: {type(objective).__name__} has no differentiable_loss, which training needs")
    if program.has_own_bound:
        raise ValueError(
            f"objective: this story sums out {listed(program.enumerated + program.guided_sums)}, or its guide adds a "
            "factor, by a bound of its own; leave objective=None"
        )
    return IWAE(whole("k", 10 if k is None else k, 2)) if isinstance(objective, str) else objective


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:1", not {device!r}') from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f'device="{device}": this torch ({torch.__version__}) finds no CUDA. Install a CUDA build of torch '
            'and a driver, or pass device="cpu".'
        )
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be on "cpu" or "cuda", not {device!r}')
    return place


def _counts_stay(cells: Cells, place: torch.device) -> bool:
    """Whether the counts would fill a GPU more than half, so that they stay on the host."""
    return place.type == "cuda" and cells.nbytes > 0.5 * torch.cuda.mem_get_info(place)[0]


def _split(cells: Cells, validation: Any, seed: int) -> tuple[Cells, Cells | None]:
    """Training cells, and held-out ones."""
    n = len(cells)
    if validation is None:
        return cells, None
    mask = np.zeros(n, dtype=bool)
    mask[_held_out(n, validation, seed)] = True
    return cells[~mask], cells[mask]


def _held_out(n: int, validation: Any, seed: int) -> np.ndarray:
    """Positions of the cells that are held out."""
    if validation is None:
        return np.zeros(0, dtype=np.int64)
    if np.ndim(validation) == 0:
        if isinstance(validation, bool) or not 0 < validation < 1:
            raise ValueError(f"validation must be a share in (0, 1), positions, or None for none, not {validation!r}")
        n_held = round(validation * n)
        if not 0 < n_held < n:
            raise ValueError(f"validation={validation} of {n:,} cells leaves none on one side; pass validation=None")
        held = np.random.default_rng(seed).permutation(n)[:n_held]
    else:
        held = np.asarray(validation)
        if held.dtype.kind not in "iu":
            raise ValueError("validation takes whole positions (of a mask: numpy.flatnonzero(mask)), or a share")
        wrong = (held < 0) | (held >= n)
        if wrong.any():
            raise ValueError(f"validation: there is no cell {held[wrong.argmax()]}; there are {n:,}")
        repeated = pd.Index(held).duplicated()
        if repeated.any():
            raise ValueError(f"validation names cell {held[repeated.argmax()]} twice")
        if not 0 < len(held) < n:
            raise ValueError(f"validation names {len(held):,} of {n:,} cells; both sides need some")
    return np.asarray(held)


class _Run:
    """One fit under way."""

    def __init__(
        self,
        program: Program,
        train: Cells,
        held_out: Cells | None,
        given: dict[str, Any],
        objective: ELBO | IWAE | None = None,
    ) -> None:
        self.program, self.train, self.held_out, self.given = program, train, held_out, given
        self.rows: list[dict[str, float]] = []
        self.state, self.best_epoch, self.best_elbo = "failed", 0, -math.inf
        # An epoch chosen by held-out cells is chosen for its luck with them and with the draws of global sites,
        # which would move their posterior by more than its sd: with such sites the last epoch counts.
        self.has_globals = program.has_globals
        self.step, self.skipped, self.skipped_in_row = 0, 0, 0
        self.weight = 0.0
        self.seconds = 0.0
        self.labelled: Cells | None = None  # where factors of the guide are of these alone
        self.side = torch.zeros(())  # what they added in the last step, per cell
        self.side_order = torch.Generator().manual_seed(given["seed"])
        self.side_batches: Iterator[Cells] = iter(())
        self.settings: dict[str, Any] = {"n_cells": len(train), "n_held_out": 0 if held_out is None else len(held_out)}
        self.good = self._weights()
        self.elbo: Any = MeanFieldELBO(max_plate_nesting=program.n_plates) if objective is None else objective
        self.settings["objective"] = str(self.elbo) if isinstance(self.elbo, IWAE) else type(self.elbo).__name__
        self.kl = KLWeight(keep=not isinstance(self.elbo, MeanFieldELBO))
        self.model, self.guide = self.kl(program.model), self.kl(program.guide)
        self.total_steps = given["epochs"] * n_batches_of(len(train), given["batch_size"])

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.program.state_dict().items()}

    def loss(self, batch: Cells) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Minus the weighted bound, the KL of each site, and the reconstruction, all in nats per cell."""
        if isinstance(self.elbo, IWAE):
            return self.elbo.loss(self.program, batch, self.weight or 1.0)
        if not self.program.has_own_bound:
            loss = self.elbo.differentiable_loss(self.model, self.guide, batch) / batch.total
            kls = (self.kl if self.kl.keep else self.elbo).kl_terms(batch.total)
            return loss, kls, self._reconstruction(loss, kls)
        # TraceMeanField_ELBO does not know of sites that are summed out, nor of factors in a guide.
        terms = elbo_terms(self.program, batch)
        kls = {name: term.mean() for name, term in terms.local_kl.items()}
        kls |= {name: term / batch.total for name, term in terms.global_kl.items()}
        loss = (
            self.kl.weight * sum(kls.values(), torch.zeros_like(terms.reconstruction[0])) - terms.reconstruction.mean()
        )
        if terms.side is not None:
            side = terms.side.mean() if self.labelled is None else self._side()
            loss, self.side = loss - side, side.detach()
        kls = {name: term.detach() for name, term in kls.items()}
        return loss, kls, self._reconstruction(loss, kls)

    def _reconstruction(self, loss: Tensor, kls: dict[str, Tensor]) -> Tensor:
        return self.kl.weight * sum(kls.values(), loss.new_zeros(())) - loss.detach() - self.side

    def _find_labelled(self) -> None:
        """Whether factors of the guide are 0 for cells without a label, as those of a classifier are."""
        if not self.program.has_factors or self.train.schema.label is None:
            return
        is_known = self.train.label >= 0
        known, others = (torch.nonzero(rows).squeeze(-1) for rows in (is_known, ~is_known))
        if not len(known) or not len(others):
            return
        some = self.train.rows(others[:64], whole=True)
        with torch.no_grad():
            term: Any = side_terms(poutine.trace(self.program.guide).get_trace(some), some)
        if not bool(term.any()):
            self.labelled = self.train.rows(known, whole=True)

    def _side(self) -> Tensor:
        """What the guide's factors add, per cell: read from labelled cells alone, of which a mini-batch has few."""
        pool: Any = self.labelled
        some = next(self.side_batches, None)
        if some is None:
            self.side_batches = minibatches(pool, min(len(pool), _LABELLED), self.side_order)
            some = next(self.side_batches)
        term: Any = side_terms(poutine.trace(self.program.guide).get_trace(some), some)
        return term.mean() * (len(pool) / len(self.train))

    # ---- before the first step ----------------------------------------------------------------

    def prepare(self) -> None:
        """Start values, one validated run, and an estimate of what the fit will take."""
        self.program.train(False)
        self.program.start(self.train)
        self._find_labelled()
        self.program.set_training()
        self.good = self._weights()
        first, few = (
            self.train.rows(torch.arange(min(len(self.train), n), device=self.train.device), whole=False)
            for n in (self.given["batch_size"], self._n_checked())
        )
        self.program.check(few)
        n_weights = sum(p.numel() for p in self.program.parameters())
        # Weights, gradients, two moments, best and last good copy; some 12 dense arrays of a step.
        draws = self.elbo.k if isinstance(self.elbo, IWAE) else 1
        memory = 4 * (6 * n_weights + 12 * draws * len(first) * self.train.n_genes)
        self.settings["estimate"] = {"memory_gb": memory / 1e9}
        if self.train.device.type == "cpu":
            require_memory(memory, "training", "Lower batch_size, or choose fewer genes.")
        began = time.perf_counter()
        for _ in range(2):  # the first is slower: buffers are made
            began = time.perf_counter()
            self.loss(first)[0].backward()
            for p in self.program.parameters():
                p.grad = None
        step = time.perf_counter() - began
        self.program.load_state_dict(self.good)  # running statistics of norms moved
        seconds = 1.2 * step * self.total_steps  # optimiser and held-out cells add about a fifth
        self.settings["estimate"]["seconds"] = seconds
        logger.info("about %.0f s for %d steps, %.2f GB", seconds, self.total_steps, memory / 1e9)

    def _n_checked(self) -> int:
        """Cells of the validated run: a mini-batch, or fewer where one is large, as checks hold many dense copies."""
        return min(self.given["batch_size"], max(2, _CHECKED // self.train.n_genes))

    # ---- the loop -----------------------------------------------------------------------------

    def loop(self, progress: bool, interrupted: threading.Event) -> None:
        given = self.given
        parameters = [p for p in self.program.parameters() if p.requires_grad]
        # Biases, norms, dispersions have scales of their own: only weights of linear layers are drawn to zero.
        linear = {id(m.weight) for m in self.program.modules() if isinstance(m, torch.nn.Linear)}
        shared = {id(p) for p in self.program.completion.global_parameters()}
        groups: list[dict[str, Any]] = [
            {"params": [], "height": given["lr"], "weight_decay": given["weight_decay"]},
            {"params": [], "height": given["lr"], "weight_decay": 0.0},
            {"params": [], "height": given["global_lr"], "weight_decay": 0.0, "betas": _GLOBAL_BETAS},
        ]
        entries = {id(p): self.program.entries.get(name) for name, p in self.program.named_parameters()}
        hooks = []
        for p in parameters:
            mask = entries[id(p)]
            if mask is not None:  # what is not trained has no gradient, and must not decay either
                hooks.append(p.register_hook(partial(torch.mul, mask.to(p.device))))
            groups[2 if id(p) in shared else 0 if id(p) in linear and mask is None else 1]["params"].append(p)
        try:
            self._epochs(groups, parameters, progress, interrupted)
        finally:
            for hook in hooks:
                hook.remove()

    def _epochs(
        self, groups: list[dict[str, Any]], parameters: list[Any], progress: bool, interrupted: threading.Event
    ) -> None:
        given = self.given
        optimizer = FusedClippedAdam([g for g in groups if g["params"]], lr=given["lr"], clip_norm=given["clip_norm"])
        order = torch.Generator().manual_seed(given["seed"])
        estimate = self.settings["estimate"]
        text = f"fit (about {estimate['seconds']:.0f} s, {estimate['memory_gb']:.2f} GB)"
        began = time.perf_counter()
        since_best = 0
        with tqdm(total=given["epochs"], desc=text, unit="epoch", disable=not progress) as bar:
            for epoch in range(1, given["epochs"] + 1):
                row = self._epoch(epoch, optimizer, parameters, order, interrupted)
                self.seconds = time.perf_counter() - began
                self.rows.append(row | {"seconds": self.seconds})
                score = row.get("validation_iwae", row.get("validation_elbo", math.nan))
                if self.weight < 1 or self.held_out is None or self.has_globals:
                    self.good, self.best_epoch = self._weights(), epoch
                elif score > self.best_elbo:
                    self.good, self.best_epoch, self.best_elbo, since_best = self._weights(), epoch, score, 0
                else:
                    since_best += 1
                bar.set_postfix(
                    {"elbo": f"{row.get('validation_elbo', row['train_elbo']):.1f}", "kl": f"{self.weight:.2f}"},
                    refresh=False,
                )
                bar.update()
                if interrupted.is_set():
                    self.state = "interrupted"
                    return
                if given["patience"] is not None and since_best >= given["patience"]:
                    self.state = "stopped early"
                    return
        self.state = "finished"

    def _epoch(
        self,
        epoch: int,
        optimizer: FusedClippedAdam,
        parameters: Sequence[Tensor],
        order: torch.Generator,
        interrupted: threading.Event,
    ) -> dict[str, float]:
        given = self.given
        sums: dict[str, Tensor] = {}
        n_seen, skipped, began = 0, self.skipped, time.perf_counter()
        looks, wrong = may_look(parameters[0]), []
        for batch in minibatches(self.train, given["batch_size"], order):
            share = share_of_rate(self.step, self.total_steps, given["schedule"])
            rate = given["lr"] * share
            for group in optimizer.param_groups:
                group["lr"] = group["height"] * share
            self.kl.weight = self.weight = _kl_weight(self.step, self.total_steps, given["warmup"])
            loss, terms, reconstruction = self.loss(batch)
            self.step += 1
            if looks and not bool(torch.isfinite(loss)):
                raise self._failure(batch, f"the loss became {loss.item():g} at step {self.step}")
            loss.backward()
            norm = self._gradient_norm(parameters)
            if looks:
                is_bad = not math.isfinite(norm)
                if not is_bad:
                    optimizer.step(norm=float(norm))
                self._count_skips(batch, [is_bad], self.step)
            else:  # the host sees at the end of the epoch what was wrong in it
                wrong.append(1.0 - torch.isfinite(norm + loss.detach()).float())
                optimizer.step(bad=wrong[-1])
            for p in parameters:
                p.grad = None
            numbers = {f"kl_{name}": term for name, term in terms.items()}
            numbers["reconstruction"] = reconstruction
            numbers["train_elbo"] = reconstruction - sum(terms.values(), loss.new_zeros(()))
            if isinstance(self.elbo, IWAE):
                numbers["train_iwae"] = -loss.detach()
            if self.program.has_factors:
                numbers["factors"] = self.side
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0) + len(batch) * value
            n_seen += len(batch)
            if interrupted.is_set():
                break
        if wrong:
            self._count_skips(batch, torch.stack(wrong).bool().tolist(), self.step - len(wrong) + 1)
        seconds = time.perf_counter() - began
        means = {name: float(value) / n_seen for name, value in sums.items()}
        if not math.isfinite(means["train_elbo"]):  # seen late where the host does not wait
            raise self._failure(batch, f"the loss became {means['train_elbo']:g} in epoch {epoch}")
        row: dict[str, float] = {"epoch": epoch, "train_elbo": means.pop("train_elbo")}
        row |= self._look(self.train[: min(len(self.train), 1000)] if self.held_out is None else self.held_out)
        return row | means | {
            "kl_weight": self.weight, "lr": rate, "cells_per_second": n_seen / seconds,
            "skipped_steps": self.skipped - skipped,
        }  # fmt: skip

    def _look(self, cells: Cells) -> dict[str, float]:
        """Held-out ELBO at weight 1 (the same draws every epoch) and active units."""
        local, weighed, centres, shared = [], [], [], 0.0
        with self.program.driven(self.given["seed"]), torch.no_grad():
            for block in blocks(cells):
                terms = elbo_terms(self.program, block)
                centres.append(terms.z_mean)
                local.append(terms.local)
                if isinstance(self.elbo, IWAE) and not self.has_globals:
                    few = blocks(block, self.elbo.k)
                    weighed += [self.elbo.loss(self.program, some, 1.0)[0] * len(some) for some in few]
                shared = sum(float(v) for v in terms.global_kl.values()) - float(terms.global_observed)
        looked: dict[str, float] = {}
        if self.held_out is not None:
            looked["validation_elbo"] = float(torch.cat(local).mean()) - shared / len(self.train)
            if weighed:
                looked["validation_iwae"] = -float(torch.stack(weighed).sum()) / len(cells)
        known = [c for c in centres if c is not None]
        if len(known) == len(centres) and len(cells) > 1:
            self.spread = torch.cat(known).var(0)
            looked["active_units"] = int((self.spread > _DEAD).sum())
        return looked

    @staticmethod
    def _gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
        """2-norm of the whole gradient."""
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _count_skips(self, batch: Cells, are_bad: Sequence[bool], first: int) -> None:
        """Take note of steps, the first of that number, whose gradient was not finite and that were not taken."""
        for step, is_bad in enumerate(are_bad, first):
            self.skipped += is_bad
            self.skipped_in_row = self.skipped_in_row + 1 if is_bad else 0
            if self.skipped_in_row >= _SKIPS:
                raise self._failure(batch, f"the gradient was not finite for {_SKIPS} steps up to step {step}")

    # ---- when it goes wrong -------------------------------------------------------------------

    def _failure(self, batch: Cells, what: str) -> FitError:
        failure = FitError(
            f"{what}. {self._culprit(batch)} Lower lr (now {self.given['lr']:g}), or look at these cells."
        )
        failure.fit = self.result("failed")
        return failure

    def _culprit(self, batch: Cells) -> str:
        """The first site, cell and gene that is not finite."""
        wrong = [n for n, p in self.program.named_parameters() if not bool(torch.isfinite(p).all())]
        if wrong:
            return f"Weights of {wrong[0].removeprefix('parts.')} are no longer finite."
        with torch.no_grad(), pyro.validation_enabled(False):
            guide, model = self.program.traces(batch)
        for trace in (guide, model):
            nodes: dict[str, Any] = trace.nodes
            for name, site in nodes.items():
                if site["type"] != "sample" or name == "cells" or (site["is_observed"] and is_computed(site)):
                    continue
                fn = getattr(site["fn"], "base_dist", site["fn"])
                with torch.no_grad():
                    bad = ~torch.isfinite(fn.log_prob(site["value"]))
                if not bool(bad.any()):
                    continue
                place = bad.nonzero()[0].tolist()
                cells = bad.reshape(len(batch), -1).any(-1) if bad.shape[:1] == (len(batch),) else bad.any().reshape(1)
                text = f'First site that is not finite: "{name}", for {int(cells.sum())} of {len(batch)} cells'
                if bad.shape[:1] != (len(batch),) or batch._rows is None:
                    return text + "."
                text += f' (first: cell "{self._name(batch, place[0])}"'
                if name == "x" and len(place) == 2:
                    mean = float(fn.mean[tuple(place)])
                    text += (
                        f', gene "{self.program.schema.genes[place[1]]}", count '
                        f"{float(site['value'][tuple(place)]):g} where the mean is {mean:g}"
                    )
                return text + ")."
        return "Every site is finite in a second run: a draw of the guide was extreme."

    def _name(self, batch: Cells, row: int) -> str:
        """Name of a cell of a mini-batch."""
        rows: Any = batch._rows
        at = rows[row]  # its row in the matrix that all parts of the data share
        own = self.train._rows
        return str(self.train.names[int(at) if own is None else int((own == at).nonzero()[0])])

    def result(self, state: str) -> Fit:
        """The Fit of the last good weights."""
        program = self.program.copy()
        program.load_state_dict(self.good)
        kl_weight = self.rows[self.best_epoch - 1]["kl_weight"] if self.rows and self.best_epoch else self.weight
        settings = self.given | self.settings | {
            "state": state, "best_epoch": self.best_epoch, "seconds": self.seconds,
            "kl_weight": kl_weight, "skipped_steps": self.skipped,
        }  # fmt: skip
        history = pd.DataFrame(self.rows)
        return Fit(program, history.astype({"epoch": int}) if len(history) else history, settings)


def _kl_weight(step: int, total: int, warmup: float) -> float:
    """Rises linearly to 1 over the first ``warmup`` share of the steps; never zero."""
    return min(1.0, (step + 1) / max(warmup * total, 1.0))


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one raises KeyboardInterrupt. Handlers are put back."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()

    old = signal.signal(signal.SIGINT, handler)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, old)


def _remarks(result: Fit, run: _Run) -> None:
    """One warning with what a reader of this fit should know."""
    notes = []
    spread = getattr(run, "spread", None)
    if spread is not None and bool((spread <= _DEAD).any()) and result.settings["kl_weight"] == 1:
        dead = [str(i) for i in torch.nonzero(spread <= _DEAD).flatten().tolist()]
        if len(dead) == len(spread):
            notes.append(
                "posterior collapse: the latent state does not vary over cells. Train longer or with a larger warmup"
            )
        else:
            notes.append(
                f"{len(dead)} of {len(spread)} latent dimensions are unused ({', '.join(dead)}): "
                "the data ask for fewer. The answers stand; n_latent could be smaller"
            )
    if run.state == "finished" and "validation_elbo" in result.history:
        last = result.history["validation_elbo"].to_numpy()[-max(3, len(result.history) // 10) :]
        gain = (last[-1] - last[0]) / max(len(last) - 1, 1)
        if gain > 3e-4 * abs(last[-1]):
            notes.append(
                f"the held-out ELBO was still rising by {gain:.2f} nats a cell and epoch at the end: more epochs="
            )
    if result.settings["kl_weight"] < 1:
        notes.append(f"the fit ended at KL weight {result.settings['kl_weight']:.2f}: it is not yet a posterior")
    if run.skipped:
        notes.append(f"{run.skipped} steps were skipped because their gradient was not finite")
    if notes:
        warnings.warn("; ".join(notes), PyroscWarning, stacklevel=3)
