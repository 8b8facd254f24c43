"""Mapping: new cells brought onto a trained reference, by new columns for what is new in them.

A network that sees levels has a column of weights for each. New levels get new columns, started at the mean of those
of their factor, and "surgery" trains these alone (Lotfollahi et al. 2022, Nature Biotechnology 40:121): a cell of the
reference meets the very weights it met before. Dispersions by batch get new rows, which train too.

Genes that the new cells were not measured for say nothing in the likelihood. An encoder reads what their log(1 + count)
would be on average in a cell of that state, found in a few rounds of encoding and decoding, and the library is the
total over all genes that goes with the total seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anndata
import torch
from pyro import poutine
from torch import Tensor

from .cells import Cells
from .counts import logger
from .draws import draw_guide, run_model, sites_of
from .elbo import in_cells
from .errors import ProgramError
from .labels import Classifier
from .libraries import LatentLibrary
from .loading import blocks
from .networks import Covariates
from .overlap import Landmarks
from .posterior import Fit
from .prediction import law_of_counts
from .program import Program
from .schema import Schema, grown, library_moments, listed
from .training import default_epochs, fit

WAYS = ("surgery", "decoder", "all", "none")
_ROUNDS = 4  # of encoding and decoding, to fill in genes that were not measured
_STEPS = 600
_NEVER = -100.0  # logit of a new level in a pseudo-cell of the reference


def mapped(
    reference: Fit,
    query: Cells | anndata.AnnData,
    train: str,
    *,
    epochs: int | None,
    batch_size: int,
    lr: float | None,
    validation: float | None,
    seed: int,
    device: Any,
    progress: bool,
) -> Fit:
    """See `Fit.map`."""
    cells, new = extended(query, reference.schema)
    missing = 0 if cells.gene_mask is None else int((~cells.gene_mask).sum())
    made = [_made(reference, program, cells, train) for program in (reference.program, *reference.members)]
    base = Fit(made[0], reference.history, reference.settings)
    if missing:
        cells = filled(base, cells.to(base.device, base.program.dtype)).to("cpu")
        cells = _with_moments(cells, reference.schema.n_batches, made)
    n_trained = _n_trained(made[0])
    note: dict[str, Any] = {
        "train": train, "new_levels": {k: list(v) for k, v in new.items()}, "missing_genes": missing,
        "trained": n_trained, "reference": reference.settings.get("n_cells", 0),
    }  # fmt: skip
    if train != "none" and not n_trained:
        none = "these cells have no level that the reference has not"
        if not _sees(reference.program):
            none = "the networks of the reference see no column"
        reference._warn(f'{none}, so surgery has nothing to train; train="decoder" fits more', depth=4)
    if train == "none" or not n_trained:
        settings = reference.settings | {"map": [*reference.settings.get("map", []), note], "fingerprint": None}
        first, *rest = (_free(m, reference.program) for m in made)
        found = Fit(first, reference.history, settings, rest)
    else:
        if epochs is None:
            epochs = default_epochs(len(cells), batch_size, steps=_STEPS)
        if lr is None:
            lr = 1e-2 if train == "surgery" else 1e-3
        if validation is not None and validation * len(cells) < 10:
            validation = None
        fits = [
            fit(
                program, cells, epochs=epochs, batch_size=batch_size, lr=lr, warmup=0.0, validation=validation,
                weight_decay=0.0, seed=seed, device=device, progress=progress,
            )
            for program in made
        ]  # fmt: skip
        found = fits[0]
        first, *rest = (_free(f.program, reference.program) for f in fits)
        found.program, found.members = first, tuple(rest)
        found.settings["map"] = [*reference.settings.get("map", []), note]
        for name in ("ensemble", "resampled", "label_temperature"):
            if name in reference.settings:
                found.settings[name] = reference.settings[name]
    found.settings["missing"] = "mask" if missing or reference.settings.get("missing") == "mask" else "error"
    own = cells.to(found.device, found.program.dtype)
    # An encoder that was trained on puts cells of the reference elsewhere, and these are not at hand.
    kept = (None, None) if train == "all" else (reference.landmarks, reference.examples)
    found.landmarks = _joined(kept[0], Landmarks.of(found, own, seed))
    found.examples = _joined(kept[1], Landmarks.of_labels(found, own, seed))
    return found


def extended(query: Cells | anndata.AnnData, schema: Schema) -> tuple[Cells, dict[str, list[Any]]]:
    """The query's cells by a schema that has its new levels too; and those, by column."""
    obs = query._decoded_obs() if isinstance(query, Cells) else getattr(query, "obs", None)
    if obs is None:
        raise TypeError(f"map() takes Cells or an AnnData, not {type(query).__name__}")
    more, new = grown(schema, obs)
    cells = Cells.align(query, more, missing="mask")
    if not len(cells):
        raise ValueError("there are no cells to map")
    cells = _with_moments(cells, schema.n_batches)
    if schema.label is not None and schema.label.column in obs.columns:
        strange = set(map(str, obs[schema.label.column].dropna())) - set(map(str, schema.label.levels))
        strange -= {str(schema.label.unlabeled)}
        if strange:
            logger.info("labels that the reference does not know are taken as unknown: %s", listed(sorted(strange)))
    return cells, new


def _with_moments(cells: Cells, n_old: int, programs: Sequence[Program] = ()) -> Cells:
    """Cells whose schema has the moments of log totals of new batches; programs of the old one take it over."""
    if cells.schema.n_batches == n_old:
        return cells
    totals, batch = (t.cpu().numpy() for t in (cells.library.squeeze(-1), cells.batch))
    moments = library_moments(totals, batch, cells.schema.n_batches)
    both: dict[str, Any] = {name: (*getattr(cells.schema, name)[:n_old], *v[n_old:]) for name, v in moments.items()}
    schema = replace(cells.schema, **both)
    for program in programs:
        program.schema = schema
        part: Any = dict(program.parts.items()).get("library")
        if isinstance(part, LatentLibrary):
            for name in ("mean", "sd"):
                if part.arguments[name] is None:
                    getattr(part, name)[n_old:] = torch.tensor(moments[f"log_library_{name}"][n_old:])
    return cells._copy(schema=schema)


# ---- weights --------------------------------------------------------------------------------


def _made(reference: Fit, program: Program, cells: Cells, train: str) -> Program:
    """A program for the longer schema, with the weights of the reference and what is to be trained set."""
    made, entries = lengthened(program, cells.schema)
    frozen = {name for name, p in program.named_parameters() if not p.requires_grad}
    for name, p in made.named_parameters():
        part = name.split(".")[1] if name.startswith("parts.") else name
        if train == "surgery":
            p.requires_grad_(name in entries)
        elif train == "decoder":
            p.requires_grad_(name not in frozen and part in ("decoder", "dispersion", "likelihood"))
        else:
            p.requires_grad_(name not in frozen and train == "all")
    made.entries = entries if train == "surgery" else {}
    has_labels = cells.schema.label is not None and bool((cells.label >= 0).any())
    for own in made.parts.values():
        meet = getattr(own, "meet", None)
        if meet is not None:
            with torch.no_grad():
                meet(cells)
        if isinstance(own, Classifier) and train == "all" and has_labels:
            own.__dict__["started"] = False  # of these cells other shares are labelled
    return made


def _sees(program: Program) -> bool:
    """Whether a network is handed a column."""
    return any(getattr(part, "covariates", None) is not None for part in program.parts.values())


def _n_trained(program: Program) -> int:
    return sum(
        int(program.entries[name].sum()) if name in program.entries else p.numel()
        for name, p in program.named_parameters()
        if p.requires_grad
    )


def _free(program: Program, was: Program) -> Program:
    """With every weight to be trained again in a fit to come, but for those that were frozen in the reference."""
    program.entries = {}
    frozen = {name for name, p in was.named_parameters() if not p.requires_grad}
    for name, p in program.named_parameters():
        p.requires_grad_(name not in frozen)
    return program


def lengthened(program: Program, schema: Schema) -> tuple[Program, dict[str, Tensor]]:
    """The program by a schema with further levels; and of each parameter that grew, which entries are new.

    Raises
    ------
    ProgramError
        If a part grows in a way that is not known here.
    """
    model, guide = program.functions
    made = Program(model, Cells.empty(schema), guide, seed=program.seed, **dict(program.parts.items()))
    made.to(program.device, program.dtype)
    # Guesses of refined cells are not taken along: those of the query are to be refined with it.
    before = {name: value for name, value in program.state_dict().items() if not name.startswith("corrections.")}
    after = made.state_dict()
    parameters = dict(made.named_parameters())
    entries: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, value in after.items():
            old = before.get(name)
            if old is not None and old.shape == value.shape:
                value.copy_(old)
                continue
            is_new = torch.ones_like(value, dtype=torch.bool)
            if old is None:  # of a factor with one level until now, which has no effect
                if "embeddings" in name:
                    value[0] = 0
                    is_new[0] = False
                else:
                    value.zero_()
            else:
                is_new = _grow(name, old, value, program, made, name in parameters)
            if name in parameters:
                entries[name] = is_new
    lost = [name for name in before if name not in after]
    if lost:
        raise ProgramError(f"{lost[0]} has no place in the story with the new levels; fit again with all cells")
    made.set_started()
    return made, entries


def _grow(name: str, old: Tensor, value: Tensor, was: Program, now: Program, is_weight: bool) -> Tensor:
    """Copy ``old`` into the longer ``value``, in place; (shape) which entries are new."""
    axis = next((i for i, (a, b) in enumerate(zip(old.shape, value.shape)) if a != b), 0)
    others = [i for i in range(old.dim()) if i != axis]
    if old.dim() != value.dim() or any(old.shape[i] != value.shape[i] for i in others):
        raise ProgramError(_unknown(name, old, value))
    place = _place(name, old.shape[axis], value.shape[axis], axis, was, now)
    if place is None:
        raise ProgramError(_unknown(name, old, value))
    is_new = torch.zeros(value.shape[axis], dtype=torch.bool)
    for i, (source, alike) in enumerate(place):
        target = value.select(axis, i)
        if source is not None:
            target.copy_(old.select(axis, source))
            continue
        is_new[i] = True
        if name.endswith("prior.columns"):
            target.fill_(_NEVER)
        elif is_weight:  # numbers that are set from data (moments of totals) were set for the new level
            mean = old.index_select(axis, torch.tensor(alike, device=old.device)).mean(axis) if alike else 0.0
            target.copy_(torch.as_tensor(mean, device=old.device).expand_as(target))
    shape = [1] * value.dim()
    shape[axis] = -1
    return is_new.view(shape).expand_as(value).to(value.device)


def _unknown(name: str, old: Tensor, value: Tensor) -> str:
    return (
        f"{name} is {tuple(old.shape)} in the reference and {tuple(value.shape)} with the new levels, and how to carry "
        "it over is known for columns of networks and rows by batch only: fit again with all cells"
    )


_Place = list[tuple[int | None, list[int]]]


def _place(name: str, n_old: int, n_new: int, axis: int, was: Program, now: Program) -> _Place | None:
    """For each new index, the old one it is, or those that it starts at the mean of; None where it is not known."""
    part = name.split(".")[1] if name.startswith("parts.") else ""
    columns = [getattr(dict(p.parts.items()).get(part), "covariates", None) for p in (was, now)]
    if name.endswith("prior.columns"):
        columns = [getattr(dict(p.parts.items()).get("encoder"), "covariates", None) for p in (was, now)]
        layouts = [_layout(c, whole=True) for c in columns]
        return _matched(layouts[0], layouts[1], 0)
    if axis == 1 or "shift" in name or "scale" in name:
        layouts = [_layout(c) for c in columns]
        if len(layouts[1]) - len(layouts[0]) == n_new - n_old and n_old >= len(layouts[0]):
            return _matched(layouts[0], layouts[1], n_old - len(layouts[0]))
    factors = [(f, now.schema.factors[f.column]) for f in was.schema.factors.values() if f.column in now.schema.factors]
    for old, new in sorted(factors, key=lambda pair: pair[0] is not was.schema.batch):
        if (len(old), len(new)) == (n_old, n_new):
            return [(i, []) if i < n_old else (None, list(range(n_old))) for i in range(n_new)]
    return None


def _layout(columns: Covariates | None, *, whole: bool = False) -> list[tuple[str, Any]]:
    """(factor, level) of each column that a network is handed; embedded factors by number."""
    if columns is None:
        return []
    found: list[tuple[str, Any]] = []
    width = columns.embeddings[0].shape[1] if len(columns.embeddings) else 0
    for (name, n), embedded in zip(columns.factors, columns.is_embedded):
        found += [(name, i) for i in range(width if embedded and not whole else n)]
    return found + [(name, None) for name in columns.columns]


def _matched(old: list[tuple[str, Any]], new: list[tuple[str, Any]], lead: int) -> _Place:
    at = {column: lead + i for i, column in enumerate(old)}
    front: _Place = [(i, []) for i in range(lead)]
    return front + [
        (at.get(column), [at[c] for c in old if c[0] == column[0]] if column not in at else []) for column in new
    ]


# ---- genes that were not measured -----------------------------------------------------------


def filled(reference: Fit, cells: Cells) -> Cells:
    """Cells with what encoders are to read at genes that were not measured, and the library over all genes.

    log(1 + count) is on average about (1 - p0) log(1 + mean / (1 - p0)), for p0 the probability of a zero.
    """
    mask: Any = cells.gene_mask
    program = reference.program
    fills: list[Any] = []
    libraries: list[Tensor] = []
    with program.driven(0), torch.no_grad():
        for block in blocks(cells):
            seen = block.library
            now = block._copy(fill=seen.new_zeros(len(block), int((~mask).sum())))
            for _ in range(_ROUNDS):
                guide = draw_guide(program, now)
                trace = _at_mean(program, guide, now)
                law, rho = law_of_counts(reference, trace), trace.nodes["rho"]["value"]
                seen_share = rho[:, mask].sum(-1, keepdim=True)
                mean = law.mean[:, ~mask]
                zeros = law.log_prob(torch.zeros_like(law.mean)).exp()[:, ~mask]
                some = (1 - zeros).clamp(min=1e-6)
                library = seen / seen_share.clamp(min=1e-3) if block.size_factor is None else seen
                now = now._copy(fill=some * (mean / some).log1p(), library=library)
            fills.append(now.fill)
            libraries.append(now.library)
    return cells._copy(fill=torch.cat(fills), library=torch.cat(libraries))


def _joined(one: Landmarks | None, two: Landmarks | None) -> Landmarks | None:
    """States of the reference and of the query; columns that one of them lacks are unknown there."""
    if one is None or two is None:
        return one if two is None else two
    columns = {}
    for name in [*one.columns, *(c for c in two.columns if c not in one.columns)]:
        known: Any = one.columns.get(name, two.columns.get(name))
        blank = -1 if not known.is_floating_point() else math.nan
        sides = [m.columns.get(name, torch.full((len(m.loc),), blank, dtype=known.dtype)) for m in (one, two)]
        columns[name] = torch.cat(sides)
    return Landmarks(torch.cat([one.loc, two.loc]), torch.cat([one.log_total, two.log_total]), columns)


def drift(reference: Fit, found: Fit, cells: Cells | anndata.AnnData) -> dict[str, float]:
    """How far a mapped fit moved what is said of the reference's cells.

    Returns
    -------
    dict
        "latent" and "expression": the largest change of a posterior mean of z, and of a share decoded there. Both are
        0 after surgery (of stories that compute states from tables by sample, 0 up to rounding).
    """
    apart = [
        [abs(a - b).max() for a, b in zip(_decoded(reference, one), _decoded(found, two))]
        for one, two in zip(blocks(reference._ready(cells)), blocks(found._ready(cells)))
    ]
    latent, expression = (float(torch.stack(column).max()) for column in zip(*apart))
    return {"latent": latent, "expression": expression}


def _decoded(fit: Fit, block: Cells) -> tuple[Tensor, Tensor]:
    """Posterior means of z of a block of cells, and shares decoded there."""
    with fit.program.driven(0), torch.no_grad():
        guide = draw_guide(fit.program, block)
        nodes: dict[str, Any] = _at_mean(fit.program, guide, block).nodes
    return nodes["z"]["value"].cpu(), nodes["rho"]["value"].cpu()


def _at_mean(program: Program, guide: poutine.Trace, block: Cells) -> Any:
    """A run of the model along the guide's, with the state at its mean where that has a closed form.

    Likewise what it computes the state from.
    """
    if program.state_site not in guide.nodes:
        raise ProgramError(f'{program.story} has no "z" of each cell to go by')
    names = [program.state_site]
    if "z" in program.computed:
        names += [name for name in sites_of(guide) if not in_cells(guide.nodes[name])]
    for name in names:
        site: Any = guide.nodes[name]
        try:
            site["value"] = site["fn"].mean
        except NotImplementedError:
            pass
    model = run_model(program, guide, block, None)
    if "rho" not in model.nodes:
        raise ProgramError(f'{program.story} has no site "rho", the share of each gene, to go by')
    return model
