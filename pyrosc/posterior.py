"""Fit: a trained Program, and the questions it answers.

Every answer is computed in eval mode, in blocks of cells, with random numbers from its own
``seed``; nothing outside changes. Verbs take Cells or an AnnData, which is brought into the
order of the fit by the names of genes and levels.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from .cells import Cells
from .counts import require_memory
from .draws import by_block, by_draws, draw_guide, in_front, log_weight, sites_of
from .elbo import elbo_terms, in_cells
from .errors import ProgramError, PyroscWarning
from .guides import is_computed
from .program import Program
from .schema import Schema, did_you_mean, listed

_MEAN_DRAWS = 200  # where a guide has no closed mean


class Fit:
    """A trained Program with its schema, history and settings. Made by `fit` and `load`.

    Attributes
    ----------
    program : Program
        The trained copy, in eval mode.
    history : DataFrame
        One row an epoch; see `fit`.
    settings : dict
        The arguments of the fit, versions, state, and the fingerprint of the training data.
    """

    def __init__(self, program: Program, history: pd.DataFrame, settings: dict[str, Any]) -> None:
        self.program, self.history, self.settings = program.eval(), history, settings
        self._said = False  # one warning a call

    def __repr__(self) -> str:
        s = self.settings
        elbo = "" if not len(self.history) else f", {self._elbo_line()}"
        return f"Fit({self.program.story}, {s['n_cells']:,} cells x {self.schema.n_genes:,} genes, {s['state']}{elbo})"

    def _elbo_line(self) -> str:
        row = self.history.iloc[max(self.settings["best_epoch"] - 1, 0)]
        if "validation_elbo" in self.history:
            return f"held-out ELBO {row['validation_elbo']:.1f} nats a cell"
        return f"training ELBO {row['train_elbo']:.1f} nats a cell"

    @property
    def schema(self) -> Schema:
        return self.program.schema

    @property
    def device(self) -> torch.device:
        return self.program.device

    def to(self, device: torch.device | str) -> Fit:
        """The same fit on another device; this one stays where it is."""
        return Fit(self.program.copy().to(device), self.history, self.settings)

    # ---- questions ----------------------------------------------------------------------------

    def latent(self, cells: Cells | anndata.AnnData, n_draws: int = 0, *, seed: int = 0) -> np.ndarray:
        """Where cells are in latent space.

        Parameters
        ----------
        n_draws : 0 for posterior means, else how many draws

        Returns
        -------
        array
            (N, K) posterior means of ``z``, not random; or (S, N, K) draws, in the order of ``cells``.
        """
        cells = self._ready(cells)
        n_draws = _whole("n_draws", n_draws, 0)
        found = self._of_z(cells, seed, lambda law: law.sample((n_draws,)) if n_draws else _mean(law))
        return torch.cat(found, -2).numpy()

    def latent_sd(self, cells: Cells | anndata.AnnData, *, seed: int = 0) -> np.ndarray:
        """(N, K) posterior standard deviations of ``z``: how sure the guide is."""
        return torch.cat(self._of_z(self._ready(cells), seed, _sd)).numpy()

    def _of_z(self, cells: Cells, seed: int, answer: Callable[[Any], Tensor]) -> list[Tensor]:
        """``answer`` to the guide's law of z, block by block."""

        def ask(block: Cells) -> Tensor:
            trace = poutine.trace(self.program.guide).get_trace(block)
            if "z" not in trace.nodes:
                raise ProgramError(
                    f'the guide of {self.program.story} draws no "z"; it draws {listed(sites_of(trace))}'
                )
            site: Any = trace.nodes["z"]
            return answer(site["fn"]).cpu()

        return list(by_block(self.program, [cells], 1, seed, ask))

    def expression(
        self,
        cells: Cells | anndata.AnnData,
        genes: str | Sequence[str] | None = None,
        do: Mapping[str, Any] | None = None,
        *,
        n_draws: int = 25,
        scale: float = 1.0,
        interval: float | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Expected share of each gene (``rho``), averaged over draws of the latent state.

        Parameters
        ----------
        genes : names; None for all
        do : columns to set for decoding, ``{"donor": "101"}``; the level "all" averages over levels
            The state is still read from the cells as they were seen.
        n_draws : S
        scale : multiplies shares: 1e4 gives expected counts per 10,000
        interval : probability of an equal-tailed interval, such as 0.9
            With it columns are (gene, "mean" | "sd" | "lower" | "upper").
        seed : draws are random through it; the error of a mean is its sd / sqrt(S)

        Returns
        -------
        DataFrame
            (N, genes), cells in order. ``.attrs["uncertainty"]`` is "z only": draws vary with the
            state of the cell, not with the weights, so intervals are too narrow for a mean
            over many cells. With given size factors it is a rate per unit of size factor.

        Raises
        ------
        ValueError
            If a gene or level is unknown, or the answer would not fit into memory.
        """
        cells = self._ready(cells)
        n_draws = _whole("n_draws", n_draws, 1)
        if do is not None and not isinstance(do, Mapping):
            raise TypeError(f'do takes columns and levels, such as do={{"donor": "101"}}, not {do!r}')
        if isinstance(scale, bool) or not isinstance(scale, (int, float, np.number)) or not scale > 0:
            raise ValueError(f"scale must be a positive number, such as 1e4, not {scale!r}")
        if interval is not None and not 0 < interval < 1:
            raise ValueError(f"interval must be between 0 and 1, not {interval!r}")
        self._said = False
        at, names = self._genes(genes)
        worlds = self._worlds(cells, do or {})
        columns = 4 if interval else 1
        require_memory(8 * len(cells) * len(names) * columns, "this table", "Ask for fewer genes or cells at a time.")
        means, rest = [], []
        for shares in self._draws_of("rho", worlds, n_draws, seed, at, bool(do)):
            shares = shares * scale
            means.append(shares.mean(0).cpu())
            if interval is not None:
                shares = shares.cpu()
                ends = np.quantile(shares.numpy(), [(1 - interval) / 2, (1 + interval) / 2], axis=0)
                sd = shares.std(0, correction=min(1, n_draws - 1))
                rest.append(np.stack([sd.numpy(), *ends], -1))
        mean = torch.cat(means).numpy()
        if interval is None:
            table = pd.DataFrame(mean, index=cells.names, columns=names)
        else:
            both = np.concatenate([mean[..., None], np.concatenate(rest)], -1)
            header = pd.MultiIndex.from_product([names, ["mean", "sd", "lower", "upper"]], names=["gene", None])
            table = pd.DataFrame(both.reshape(len(cells), -1), index=cells.names, columns=header)
        table.attrs["uncertainty"] = "z and global sites" if self.program.has_globals else "z only"
        table.attrs["unit"] = "share" if self.schema.size_factor is None else "rate per unit of size factor"
        return table

    def draws(
        self,
        site: str,
        cells: Cells | anndata.AnnData,
        n_draws: int = 100,
        *,
        do: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Posterior draws of any site of the story: ``fit.draws("dispersion", cells)``.

        Returns
        -------
        array
            (S, N, event) for a site of each cell, in the order of ``cells``; (S, event) for one of all cells,
            whose posterior rests on the cells of the fit. Random through ``seed``. Sites in further plates
            have those after N.

        Raises
        ------
        ValueError
            If the story has no such site, it is observed, or the draws would not fit into memory.
        """
        cells = self._ready(cells)
        n_draws = _whole("n_draws", n_draws, 1)
        is_global = False

        def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
            nonlocal is_global
            if site not in trace.nodes or site not in sites_of(trace):
                raise ValueError(
                    f'{self.program.story} has no site "{site}". Its sites: {listed(sites_of(trace), 20)}.'
                    + did_you_mean(site, sites_of(trace))
                )
            node: Any = trace.nodes[site]
            if node["is_observed"] and not is_computed(node):
                raise ValueError(f'site "{site}" is observed; predictive() draws it anew')
            event = node["fn"].event_dim
            value = node["value"]
            if not in_cells(node):
                is_global = True
                if n is None or value.dim() == event:  # without draws in front: of one run, or not random
                    return value.expand(n or 1, *value.shape)
                value = value.flatten(0, value.dim() - event - 1)
                return value.expand(n, *value.shape[1:])
            each = value.numel() // max(len(block), 1) * (n_draws if n is None else 1)
            require_memory(8 * each * len(cells), "these draws", "Ask for fewer draws or cells at a time.")
            front = int(n is not None)
            value = value.movedim(value.dim() - event - 1, front)
            return value.cpu() if n is not None else value.unsqueeze(0).cpu()

        found = []
        for block in by_draws(self.program, [cells, cells if do is None else cells.do(**do)], n_draws, seed, ask):
            found.append(block.cpu())
            if is_global:
                break
        return torch.cat(found, 1).numpy() if not is_global else found[0].numpy()

    def elbo(self, cells: Cells | anndata.AnnData, *, n_draws: int = 1, seed: int = 0) -> np.ndarray:
        """(N,) evidence lower bound of each cell in nats, at KL weight 1, averaged over draws.

        Local terms only; the KL of global sites, once for a data set, is in the history.
        """
        n_draws = _whole("n_draws", n_draws, 1)

        def ask(block: Cells) -> Tensor:
            return torch.stack([elbo_terms(self.program, block).local for _ in range(n_draws)]).mean(0).cpu()

        return torch.cat(list(by_block(self.program, [self._ready(cells)], 1, seed, ask))).numpy()

    def log_likelihood(self, cells: Cells | anndata.AnnData, n_draws: int = 1000, *, seed: int = 0) -> np.ndarray:
        """(N,) importance-weighted log p(x) of each cell in nats, with the guide as proposal.

        log mean_s p(x, z_s) / q(z_s | x), in float64: a lower bound in expectation that
        tightens with draws (Burda et al. 2016). Likelihoods of stories can be compared only
        where both have the same likelihood family and library. Global sites are drawn from the
        guide and averaged over inside the log. ``check.importance`` says for which
        cells the guide is good enough for this.
        """
        found = [w.logsumexp(0) - np.log(len(w)) for w in self.log_weights(cells, n_draws, seed=seed)]
        return torch.cat(found).numpy()

    def log_weights(self, cells: Cells | anndata.AnnData, n_draws: int = 1000, *, seed: int = 0) -> Iterator[Tensor]:
        """Log importance weights log p(x, z) - log q(z | x), (S, n) float64, block by block of cells."""
        n_draws = _whole("n_draws", n_draws, 1)
        cells = self._ready(cells).to(self.device, torch.float64)
        program = self.program.copy().double()

        each = in_front(program, cells, n_draws)

        def ask(block: Cells) -> Tensor:
            return torch.cat([log_weight(program, draw_guide(program, block, n), block, n) for n in each]).cpu()

        return by_block(program, [cells], n_draws * 2 * program.n_combinations, seed, ask)

    def predictive(self, n_draws: int, return_sites: Sequence[str] | None = None) -> Predictive:
        """Pyro's own Predictive: latent sites from the guide, counts drawn anew.

        Call it with Cells in the order of this fit. A story that indexes a global site by cell
        (``effect[cells.batch]``) breaks in it, as Pyro pads such draws; `draws` has no such limit.
        It draws every site for all cells at once, from Pyro's global random state.

        Raises
        ------
        ProgramError
            If the story sums out a discrete site, which Predictive would draw from its prior.
        """
        if self.program.enumerated:
            raise ProgramError(
                f"{self.program.story} sums out {listed(self.program.enumerated)}, which Pyro's Predictive would draw "
                "from the prior; draws() and expression() draw it given the counts"
            )
        self.program.eval()
        return Predictive(
            poutine.uncondition(self.program.model),
            guide=self.program.guide,
            num_samples=_whole("n_draws", n_draws, 1),
            return_sites=return_sites,
        )

    def summary(self) -> str:
        """A few lines: what was fitted, on what, how it ended."""
        s = self.settings
        lines = [
            f"{self.program.story} on {s['n_cells']:,} cells x {self.schema.n_genes:,} genes ({s['state']})",
            f"{len(self.history)} epochs in {s['seconds']:.1f} s on {s['device']}; best epoch {s['best_epoch']}",
        ]
        if len(self.history):
            lines.append(self._elbo_line())
        return "\n".join(lines)

    # ---- keeping it ---------------------------------------------------------------------------

    def save(self, path: Any, *, overwrite: bool = False) -> None:
        """Write one safetensors file; see `load`.

        Raises
        ------
        FileExistsError
            If ``path`` is there and ``overwrite`` is not set. The old file stays whole until the new
            one is on disk.
        """
        from .store import save

        save(self, path, overwrite=overwrite)

    def write(
        self, adata: anndata.AnnData, cells: Cells | None = None, key: str = "X_pyrosc", *, overwrite: bool = False
    ) -> list[str]:
        """Put the latent state where scanpy looks: ``obsm[key]``, its sd, and where it came from.

        Parameters
        ----------
        cells : the cells to encode; None encodes ``adata`` itself
            Joined to ``adata`` by name; cells of ``adata`` that are not among them get NaN.
        overwrite : whether keys that are there may be replaced

        Returns
        -------
        list of str
            What was written: ``obsm[key]`` (N, K) means, ``obsm[key + "_sd"]`` (N, K), ``uns[key]`` a dict
            of numbers and text.

        Raises
        ------
        ValueError
            If a key is taken, ``adata`` is a view or backed, or names do not meet. Nothing is written then.
        """
        if not isinstance(adata, anndata.AnnData):
            raise TypeError(f"write() takes an AnnData first, not {type(adata).__name__}; cells go second")
        if adata.is_view or adata.isbacked:
            kind = "a view" if adata.is_view else "backed by a file"
            raise ValueError(
                f"adata is {kind}; write to an object in memory: "
                f"adata = adata.{'copy' if adata.is_view else 'to_memory'}()"
            )
        if not key or "/" in key:
            raise ValueError(f'key must be a name without "/", not {key!r}')
        places = [("obsm", key), ("obsm", f"{key}_sd"), ("uns", key)]
        taken = [f'{where}["{name}"]' for where, name in places if name in getattr(adata, where)]
        if taken and not overwrite:
            raise ValueError(f"{', '.join(taken)} is there already: pass overwrite=True, or another key=")
        own = self._ready(adata if cells is None else cells)
        mean, sd = self.latent(own), self.latent_sd(own)
        if cells is not None:
            there = adata.obs_names.astype(str)
            for index, what in ((there, "adata"), (own.names, "cells")):
                if not index.is_unique:
                    raise ValueError(f"cell names of {what} repeat, so results cannot be joined by name")
            at = own.names.get_indexer(there)
            if (at < 0).all() or len(own.names.difference(there)):
                strange = own.names.difference(there)
                raise ValueError(f"{len(strange):,} of these cells are not in adata ({listed(strange)})")
            mean, sd = (np.where(at[:, None] >= 0, a[at], np.nan).astype(a.dtype) for a in (mean, sd))
        adata.obsm[key], adata.obsm[f"{key}_sd"] = mean, sd
        adata.uns[key] = {
            "story": self.program.story,
            "parts": self.program._parts_line(),
            "pyrosc": self.settings["versions"]["pyrosc"],
            "seed": self.settings["seed"],
            "n_cells": self.settings["n_cells"],
            "state": self.settings["state"],
            "genes": np.array(self.schema.genes, dtype=str),
        }
        return [f'{where}["{name}"]' for where, name in places]

    # ---- inside -------------------------------------------------------------------------------

    def _ready(self, data: Cells | anndata.AnnData) -> Cells:
        """Cells in the order of this fit, on its device."""
        if isinstance(data, Cells) and data.total != len(data):
            raise ValueError("a mini-batch is a part of a training step; pass cells[rows] for a data set of its own")
        cells = Cells.align(data, self.schema)
        if not len(cells):
            raise ValueError("there are no cells to ask about")
        if not cells.has_counts:
            raise ValueError("these cells hold no counts (without_counts), so there is nothing to encode")
        known = self.settings.get("fingerprint")
        if known and known["cells"] == len(cells):
            now = cells.fingerprint()
            if now["names"] == known["names"] and now["counts"] != known["counts"]:
                self._warn(
                    "these cells have the names of the training cells but other counts: was the data edited since?"
                )
        if self.settings.get("kl_weight", 1.0) < 1:
            self._warn(
                f"this fit ended at KL weight {self.settings['kl_weight']:.2f}, before its warm-up was over: "
                "its posterior is too narrow. Fit with more epochs, or a smaller warmup"
            )
        return cells.to(self.device, self.program.dtype)

    def _warn(self, text: str) -> None:
        warnings.warn(text, PyroscWarning, stacklevel=4)

    def _genes(self, genes: str | Sequence[str] | None) -> tuple[np.ndarray | None, list[str]]:
        if genes is None:
            return None, list(self.schema.genes)
        if not isinstance(genes, (str, Sequence, np.ndarray, pd.Index)):
            raise TypeError(f"genes takes names of genes, or None for all, not {genes!r}")
        names = [genes] if isinstance(genes, str) else [str(g) for g in genes]
        if len(set(names)) < len(names):
            raise ValueError("genes names a gene twice; name each once")
        at = pd.Index(self.schema.genes).get_indexer(pd.Index(names))
        if (at < 0).any():
            wrong = [g for g, i in zip(names, at) if i < 0]
            raise ValueError(f"genes {listed(wrong)} are not in this fit." + did_you_mean(wrong[0], self.schema.genes))
        return at, names

    def _worlds(self, cells: Cells, do: Mapping[str, Any]) -> list[tuple[Cells, Cells]]:
        """(cells as seen, cells as decoded): one pair, or one for each level that "all" averages over."""
        choices: list[list[Any]] = []
        for name, level in do.items():
            factor = self.schema.factor(name)
            levels: list[Any] = [level]
            if isinstance(level, str) and level == "all" and self.schema.covariate(name) is not None:
                raise ValueError(f'"{name}" is continuous, so there are no levels to average over; give it a number')
            if isinstance(level, str) and level == "all" and factor is not None and "all" not in factor.levels:
                levels = list(factor.levels)
            choices.append(levels)
        return [(cells, cells.do(**dict(zip(do, levels)))) for levels in itertools.product(*choices)]

    def _draws_of(
        self,
        site: str,
        worlds: list[tuple[Cells, Cells]],
        n_draws: int,
        seed: int,
        at: np.ndarray | None,
        changed: bool,
    ) -> Iterator[Tensor]:
        """(S, n, genes) draws of a site, averaged over worlds, block by block of cells."""
        chosen = None if at is None else torch.as_tensor(at, device=self.device)

        def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
            values = self._value(site, trace, n, len(block), changed)
            return values if chosen is None else values.index_select(-1, chosen)

        return by_draws(self.program, [worlds[0][0], *(decoded for _, decoded in worlds)], n_draws, seed, ask)

    def _value(self, site: str, trace: poutine.Trace, n_draws: int | None, n_cells: int, changed: bool) -> Tensor:
        if site not in trace.nodes:
            raise ProgramError(
                f'{self.program.story} has no site "{site}", which this needs. Its sites: {listed(sites_of(trace), 20)}'
            )
        node: Any = trace.nodes[site]
        value = node["value"]
        if not any(f.name == "cells" for f in node["cond_indep_stack"]):
            if changed and not self._said:
                self._said = True
                self._warn(f'"{site}" is one for all cells in {self.program.story}: do= changes nothing')
            value = value.reshape(-1, 1, value.shape[-1])
        elif n_draws is not None and value.dim() > 2:
            value = value.reshape(len(value), -1, value.shape[-1])
        return value.expand(n_draws or 1, n_cells, value.shape[-1])


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def _mean(law: Any) -> Tensor:
    try:
        return law.mean
    except NotImplementedError:
        return law.sample((_MEAN_DRAWS,)).mean(0)


def _sd(law: Any) -> Tensor:
    try:
        return law.variance.sqrt()
    except NotImplementedError:
        return law.sample((_MEAN_DRAWS,)).std(0)
