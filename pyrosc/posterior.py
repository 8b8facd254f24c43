"""Fit: a trained Program, and the questions it answers.

Every answer is computed in eval mode, in blocks of cells, with random numbers from its own
``seed``; nothing outside changes. Verbs take Cells or an AnnData, which is brought into the
order of the fit by the names of genes and levels.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from .cells import Cells
from .counts import require_memory
from .draws import Importance, by_block, by_draws, draw_guide, in_front, log_weight, run_model, sites_of
from .elbo import elbo_terms, in_cells
from .errors import ProgramError, PyroscWarning
from .guides import is_computed
from .isolation import checked_seed
from .parts import positive, whole
from .program import Program
from .schema import Schema, did_you_mean, listed

if TYPE_CHECKING:
    from .overlap import Landmarks

_MEAN_DRAWS = 200  # where a guide has no closed mean
_STATE_DRAWS = 25  # of a state that the story computes


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
    members : tuple of Program
        Refits on resampled donors or cells (``fit(ensemble=...)``); none for a single fit. What is said of
        expression is averaged over them, and intervals hold their differences; the latent space is the program's.
    landmarks : Landmarks or None
        States of up to 2,000 of the training cells and the columns they had: by them counterfactuals tell where the
        decoder extrapolates.
    examples : Landmarks or None
        States of up to 200 labelled training cells of each label: by them cells of no known type are told.
    """

    def __init__(
        self, program: Program, history: pd.DataFrame, settings: dict[str, Any], members: Sequence[Program] = (),
        landmarks: Landmarks | None = None, examples: Landmarks | None = None,
    ) -> None:  # fmt: skip
        self.program, self.history, self.settings = program.eval(), history, settings
        self.landmarks, self.examples = landmarks, examples
        self.members = tuple(member.eval() for member in members)
        self._said = False  # one warning a call

    def __repr__(self) -> str:
        s = self.settings
        elbo = "" if not len(self.history) else f", {self._elbo_line()}"
        refits = f", {len(self.members)} refits" if self.members else ""
        return (
            f"Fit({self.program.story}, {s['n_cells']:,} cells x {self.schema.n_genes:,} genes, "
            f"{s['state']}{elbo}{refits})"
        )

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
        members = [member.copy().to(device) for member in self.members]
        return Fit(self.program.copy().to(device), self.history, self.settings, members, self.landmarks, self.examples)

    # ---- questions ----------------------------------------------------------------------------

    def latent(self, cells: Cells | anndata.AnnData, n_draws: int = 0, *, site: str = "z", seed: int = 0) -> np.ndarray:
        """Where cells are in latent space.

        Parameters
        ----------
        n_draws : 0 for posterior means, else how many draws
        site : "z", or another state of each cell: "u" of `mrvi` is the state without what the sample does

        Returns
        -------
        array
            (N, K) posterior means, not random, but that of a state that the story computes is over 25 draws; or
            (S, N, K) draws, in the order of ``cells``.
        """
        cells = self._ready(cells)
        n_draws = whole("n_draws", n_draws, 0)
        if site in self.program.computed:
            found = self._of_computed(site, cells, n_draws or _STATE_DRAWS, seed)
            return np.concatenate([draws if n_draws else draws.mean(0) for draws in found], -2)
        laws = self._of_law(site, cells, seed, lambda law: law.sample((n_draws,)) if n_draws else _mean(law))
        return torch.cat(laws, -2).numpy()

    def latent_sd(self, cells: Cells | anndata.AnnData, *, site: str = "z", seed: int = 0) -> np.ndarray:
        """(N, K) posterior standard deviations of the state: how sure the guide is."""
        cells = self._ready(cells)
        if site in self.program.computed:
            return np.concatenate([draws.std(0) for draws in self._of_computed(site, cells, _STATE_DRAWS, seed)])
        return torch.cat(self._of_law(site, cells, seed, _sd)).numpy()

    def _of_computed(self, site: str, cells: Cells, n_draws: int, seed: int) -> Iterator[np.ndarray]:
        """(S, n, K) draws of a state that the story computes, block by block."""

        def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
            return self._value(site, trace, n, len(block), False)

        for (draws,) in self._runs(cells, [[cells]], n_draws, seed, ask, self.program):
            yield draws.cpu().numpy()

    def _centres(self, cells: Cells) -> Tensor:
        """(N, K) posterior means of the state of cells in the order of this fit."""
        return torch.cat(self._of_state(cells.to(self.device, self.program.dtype), 0, _mean))

    def _of_state(self, cells: Cells, seed: int, answer: Callable[[Any], Tensor]) -> list[Tensor]:
        """``answer`` to the guide's law of the state that it draws, block by block."""
        return self._of_law(self.program.state_site, cells, seed, answer)

    def _of_law(self, name: str, cells: Cells, seed: int, answer: Callable[[Any], Tensor]) -> list[Tensor]:
        """``answer`` to the guide's law of a site, block by block."""

        def ask(block: Cells) -> Tensor:
            trace = poutine.trace(self.program.guide).get_trace(block)
            if name not in trace.nodes:
                raise ProgramError(
                    f'the guide of {self.program.story} draws no "{name}"; it draws {listed(sites_of(trace))}'
                )
            site: Any = trace.nodes[name]
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
        importance: int = 0,
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
        importance : proposals a cell from which draws are taken by smoothed importance weights, as `draws`; 0 for none
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
        n_draws = whole("n_draws", n_draws, 1)
        _check_numbers(scale=scale, interval=interval)
        self._said = False
        at, names = self._genes(genes)
        worlds = self._worlds(cells, do)
        columns = 4 if interval else 1
        require_memory(8 * len(cells) * len(names) * columns, "this table", "Ask for fewer genes or cells at a time.")
        means, rest = [], []
        weighed = self._weighed(importance, n_draws)
        for (shares,) in self._draws_of("rho", cells, [worlds], n_draws, seed, at, bool(do), weighed):
            shares = shares * scale
            means.append(shares.mean(0).cpu())
            if interval is not None:
                sd, *ends = self.spread(shares.cpu().numpy(), interval, least=0.0)
                rest.append(np.stack([sd, *ends], -1))
        mean = torch.cat(means).numpy()
        if interval is None:
            table = pd.DataFrame(mean, index=cells.names, columns=names)
        else:
            both = np.concatenate([mean[..., None], np.concatenate(rest)], -1)
            header = pd.MultiIndex.from_product([names, ["mean", "sd", "lower", "upper"]], names=["gene", None])
            table = pd.DataFrame(both.reshape(len(cells), -1), index=cells.names, columns=header)
        table.attrs["uncertainty"] = self._uncertainty()
        table.attrs["unit"] = "share" if self.schema.size_factor is None else "rate per unit of size factor"
        self._say_weighed(weighed)
        return table

    def predict(
        self,
        cells: Cells | anndata.AnnData,
        n_draws: int = 1,
        genes: str | Sequence[str] | None = None,
        do: Mapping[str, Any] | None = None,
        *,
        noise: str = "new",
        seed: int = 0,
    ) -> np.ndarray:
        """New counts of the same cells: draws of the posterior predictive distribution.

        The state is read from the cells as they were seen, then counts are drawn anew at their observed totals
        (at drawn ones where the library is latent).

        Parameters
        ----------
        n_draws : S
        genes : names; None for all
        do : columns to set for decoding, as in `expression`; "all" draws each count from one level at random
        noise : "new" draws counts from their law in the world that is set: the interventional distribution
            "same" gives each count the noise that it was seen with, its place among the counts of its own world: the
            comonotone counterfactual. What nothing sets stays as it was seen.
        seed : draws are random through it

        Returns
        -------
        array
            (S, N, genes) whole numbers as float32, cells in order.

        Raises
        ------
        ValueError
            If a gene or level is unknown, or the draws would not fit into memory.
        """
        cells = self._ready(cells)
        n_draws = whole("n_draws", n_draws, 1)
        at, names = self._genes(genes)
        worlds = self._worlds(cells, do)
        require_memory(
            8 * n_draws * len(cells) * len(names), "these counts", "Ask for fewer draws, genes or cells at a time."
        )
        if noise not in ("new", "same"):
            raise ValueError(f'noise must be "new" or "same", not {noise!r}')
        every = max(n_draws, len(self.members))  # fewer draws than refits are of some of them, at random
        some = slice(None) if every == n_draws else np.random.default_rng([seed, 7]).permutation(every)[:n_draws]
        if noise == "same":
            from .prediction import same_noise

            return same_noise(self, cells, worlds, every, at, names, seed)[some]
        groups = [[world.without_counts()] for world in worlds]
        draw, found = np.random.default_rng(seed), []
        for blocks in self._draws_of("x", cells, groups, every, seed, at, False):
            drawn = torch.stack(blocks).cpu()
            which = torch.from_numpy(draw.integers(len(blocks), size=(1, *drawn.shape[1:3], 1)))
            found.append(drawn.gather(0, which.expand(1, *drawn.shape[1:]))[0])
        return torch.cat(found, 1).numpy()[some]

    def generate(
        self,
        n_cells: int | None = None,
        like: Cells | anndata.AnnData | None = None,
        do: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
    ) -> anndata.AnnData:
        """Cells that the story makes up.

        Parameters
        ----------
        n_cells : how many; None for one like each of ``like``
        like : cells whose states, columns and totals are taken, drawn with replacement: the aggregate posterior
            None draws states from the prior, and columns and totals as often as they were seen.
        do : columns to set, as in `expression`, one level each
        seed : cells are random through it

        Returns
        -------
        AnnData
            Counts (N, G) as CSR; ``obs`` has the columns, the "library" the counts were drawn at, and for ``like`` the
            name of the cell behind each; ``obsm["z"]`` their states; ``uns["pyrosc"]`` where they came from.

        Raises
        ------
        ValueError
            If neither or no positive number is given, a level is unknown, or the cells would not fit into memory.
        """
        from .prediction import generated

        if n_cells is not None:
            n_cells = whole("n_cells", n_cells, 1)
        elif like is None:
            raise ValueError("generate needs a number of cells, generate(1000), or cells to be like, like=cells")
        return generated(self, n_cells, None if like is None else self._ready(like), do, seed)

    def noise(
        self, cells: Cells | anndata.AnnData, *, n_draws: int = 10, interval: float = 0.9, seed: int = 0
    ) -> pd.DataFrame:
        """How counts scatter about their means, gene by gene.

        Parameters
        ----------
        n_draws : S; at least one of each refit of an ensemble
        interval : probability of the equal-tailed interval
        seed : draws are random through it

        Returns
        -------
        DataFrame
            One row a gene: "dispersion", the inverse dispersion d of variance mean + mean^2 / d, and with extra zeros
            "gate", their probability; each the mean over cells and draws, with "_lower" and "_upper" of an
            equal-tailed interval over draws of the mean over cells (as wide as 0 where one fit knows it for certain).

        Raises
        ------
        ProgramError
            If counts have no dispersion (Poisson).
        """
        from .prediction import noise

        _check_numbers(interval=interval)
        return noise(self, self._ready(cells), whole("n_draws", n_draws, 1), interval, seed)

    def technical_zeros(
        self,
        cells: Cells | anndata.AnnData,
        genes: str | Sequence[str] | None = None,
        *,
        n_draws: int = 25,
        seed: int = 0,
    ) -> pd.DataFrame:
        """(N, genes) probability that a zero is an extra one, of a story with extra zeros (ZINB).

        sigmoid(a - log NB(0)) for gate logits a, averaged over draws of the state; 0 where there is a count.

        Raises
        ------
        ProgramError
            If the law of the counts has no extra zeros.
        """
        from .prediction import technical_zeros

        cells = self._ready(cells)
        at, names = self._genes(genes)
        return technical_zeros(self, cells, at, names, whole("n_draws", n_draws, 1), seed)

    def label_probabilities(
        self,
        cells: Cells | anndata.AnnData,
        *,
        by: str = "story",
        k: int = 50,
        n_draws: int = 25,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Probability of each type for each cell, averaged over draws of its state.

        Labels of these cells are not used: it is said what their counts tell.

        Parameters
        ----------
        by : "story" for q(type | state) of the story (the exact posterior where the model sums types out), at the
            temperature of the fit if it has one; "neighbors" for weighted shares of types among the ``k`` nearest
            labelled cells of the fit
        k : neighbours
        n_draws : S; at least one of each refit of an ensemble
        seed : draws are random through it

        Returns
        -------
        DataFrame
            (N, C), rows sum to 1, columns in the order of ``schema.label.levels`` (without groups of types).

        Raises
        ------
        ProgramError
            If the story tells no types.
        """
        from .annotation import by_neighbors, probabilities, types_of

        if by not in ("story", "neighbors"):
            raise ValueError(f'by must be "story" or "neighbors", not {by!r}')
        n_draws, types = whole("n_draws", n_draws, 1), types_of(self)
        cells = self._ready(cells)
        if by == "neighbors":
            found = by_neighbors(self, cells, whole("k", k, 1), n_draws, seed)
        else:
            found = probabilities(self, cells, n_draws, seed)
        return pd.DataFrame(found.double().numpy(), index=cells.names, columns=types)

    def labels(
        self,
        cells: Cells | anndata.AnnData,
        threshold: float | None = None,
        *,
        novelty: float | None = None,
        n_draws: int = 25,
        seed: int = 0,
    ) -> pd.DataFrame:
        """The type of each cell, or "unknown".

        Parameters
        ----------
        threshold : probability below which a cell is "unknown"; None names the most probable type however sure
            `check.labels` chooses one for the accuracy wanted.
        novelty : level of a test that the cell is of a known type, such as 0.01: below it a cell is "unknown"
            That share of the cells of known types is lost by it.
        n_draws : S
        seed : draws are random through it

        Returns
        -------
        DataFrame
            By cell: "label" (a Categorical), "probability" of the most probable type, and "p_known", a p-value that it
            is of a known type at all, of two: "p_state", the share of labelled cells of the fit that lie as far from
            the types as this cell or farther (Mahalanobis distance of states to the nearest type's mean); and
            "p_residual", of what many of these cells have in common and the fit does not explain (1 for fewer than 50).
            A type that the fit knows nothing of may be named with a probability of 1 while "p_known" is near 0. In a
            fit that keeps fewer than 20 labelled cells, "p_state" and "p_known" are nan. In a new batch states move,
            and p-values of known types are too small as well: 11 to 14 % were below 0.01 in simulated batches
            (benchmarks/results/mapping.md), so rank by them rather than count on the level.

        Raises
        ------
        ValueError
            If a threshold is out of range.
        ProgramError
            If the story tells no types; or ``novelty`` is asked of a fit that keeps too few labelled cells.

        Notes
        -----
        "p_residual" decodes the cells twice and takes the leading factors of a matrix of genes by genes, of the 4,000
        with most counts: some seconds for 10,000 cells x 2,000 genes, and 0.3 GB at most for the matrices.
        """
        from .annotation import annotated

        for name, value in (("threshold", threshold), ("novelty", novelty)):
            if value is not None and (isinstance(value, bool) or not 0 < value <= 1):
                raise ValueError(f"{name} must be above 0 and at most 1, or None, not {value!r}")
        return annotated(self, self._ready(cells), threshold, novelty, whole("n_draws", n_draws, 1), seed)

    def with_temperature(self, cells: Cells | anndata.AnnData, *, n_draws: int = 25, seed: int = 0) -> Fit:
        """The same fit with log odds of types divided by a temperature that suits these cells' labels.

        Parameters
        ----------
        cells : with labels, that were not labelled in training; at least 20
            The temperature that gives their labels the largest likelihood (Guo et al. 2017, ICML), between 0.2 and 5.

        Returns
        -------
        Fit
            Its ``settings["label_temperature"]`` is above 1 where probabilities were too sure.

        Raises
        ------
        ValueError
            If fewer than 20 of the cells have a label.
        """
        from .annotation import temperature

        return temperature(self, self._ready(cells), whole("n_draws", n_draws, 1), seed)

    def map(
        self,
        query: Cells | anndata.AnnData,
        train: str = "surgery",
        *,
        epochs: int | None = None,
        batch_size: int = 128,
        lr: float | None = None,
        validation: float | None = 0.1,
        seed: int = 0,
        device: str | torch.device = "auto",
        progress: bool = True,
    ) -> Fit:
        """A new fit that knows these cells too: their batches, other new levels, and genes they were not measured for.

        Parameters
        ----------
        query : cells with the columns of the fit; batches, samples and categorical levels may be new
            Genes are matched by name, further ones left out; up to half may be missing. Labels are optional.
        train : "surgery" trains the weights of new levels alone, and answers about cells of the reference stay as they
            were to the last bit. "decoder" trains decoder, dispersion and likelihood, "all" every weight, "none" none;
            "decoder" and "all" forget: what was said of the reference moves.
        epochs : passes over the query; None takes 600 steps, in 10 to 100
        batch_size, validation, seed, device, progress : as in `fit`; nothing is held out of fewer than 100 cells
        lr : None takes 0.01 for "surgery", else 0.001

        Returns
        -------
        Fit
            Its ``settings["map"]`` lists what each mapping in a chain added. New levels come after the old in its
            schema. Labels of the query that the reference does not know count as unknown.

        Raises
        ------
        ValueError
            If genes do not meet, a column is missing, or an argument is out of range.
        ProgramError
            If a part of the user's own depends on levels in a way that is not known.

        Notes
        -----
        With an encoder that sees no columns (the default) surgery moves what is decoded and leaves the query's latent
        state where the reference's encoder puts it; for a state that adapts, fit the reference with
        ``encoder=Encoder(covariates="first")``. "all" moves states of the reference's cells, which are not at hand, so
        that its ``examples`` are of the query alone.

        References
        ----------
        Lotfollahi et al. 2022, Nature Biotechnology 40:121 (scArches).
        """
        from .mapping import WAYS, mapped

        if train not in WAYS:
            raise ValueError(f'train must be "surgery", "decoder", "all" or "none", not {train!r}')
        return mapped(
            self, query, train, epochs=epochs, batch_size=batch_size, lr=lr, validation=validation, seed=seed,
            device=device, progress=progress,
        )  # fmt: skip

    def outliers(
        self, cells: Cells | anndata.AnnData, *, fdr: float = 0.1, n_draws: int = 200, seed: int = 0
    ) -> pd.DataFrame:
        """Cells that the story has no place for: doublets, types that the fit has not seen, strange counts.

        Parameters
        ----------
        cells : as measured; at least 20, most of them sound
        fdr : expected share of sound cells among those called
        n_draws : S, draws of the state and of counts
        seed : the thinning of counts and draws are random through it

        Returns
        -------
        DataFrame
            One row a cell: "surprise" at counts that thinning dropped, in sds, and "p_predictive", their posterior
            predictive p-value; "extra_genes", how many more are seen among them than expected, in sds; "p_counts" and
            "p_genes", surprise and extra genes beside those of the other cells; "p_state" and "p_total", how far the
            state is from those of the cells of the fit, and how large the total beside cells of like state; "p" of
            the four, "q" by Benjamini and Hochberg, "is_outlier".

        Raises
        ------
        ValueError
            If there are too few cells, or they are thinned already.

        Notes
        -----
        See `outliers` (the module) for what each p-value is. What each finds is in benchmarks/results/outliers.md.
        """
        from .outliers import outliers

        _check_numbers(fdr=fdr)
        given = Cells.align(cells, self.schema)
        if len(given) < 20:
            raise ValueError(f"outliers are judged beside the other cells: give at least 20, not {len(given)}")
        if given.kept != 1:
            raise ValueError("these cells are thinned already; pass them as they were measured")
        fraction = self.settings.get("kept", 1.0)
        return outliers(self, given, fraction if fraction < 1 else 0.5, fdr, whole("n_draws", n_draws, 20), seed)

    def counterfactual(
        self,
        cells: Cells | anndata.AnnData,
        do: Mapping[str, Any],
        n_draws: int = 100,
        genes: str | Sequence[str] | None = None,
        *,
        by_cell: bool = False,
        scale: float = 1.0,
        delta: float = 0.25,
        pseudocount: float = 0.0,
        interval: float = 0.9,
        seed: int = 0,
    ) -> pd.DataFrame:
        """What the expression of these cells would be under other columns: abduct the state, act, predict.

        The state is drawn from the cells as they were seen, and decoded twice, as they were seen and with the columns
        set; both worlds get the same draws. Read causally only if the columns are as good as assigned at random
        given the state, and cells of such a state were seen under the levels set.

        Parameters
        ----------
        do : columns to set, ``{"condition": "stim", "age": 40.0}``; the level "all" averages over levels
        n_draws : S
        genes : names; None for all
        by_cell : an effect for each cell instead of one for their mean
        scale : multiplies shares in the columns "factual" and "counterfactual"
        delta : |log2 fold change| above which an effect counts
        pseudocount : added to shares before the logarithm
        interval : probability of the equal-tailed interval
        seed : draws are random through it

        Returns
        -------
        DataFrame
            One row a gene: "factual" and "counterfactual" mean share over the cells; "lfc_mean", "lfc_sd",
            "lfc_median", "lfc_lower", "lfc_upper" of log2(counterfactual / factual); "probability" of |lfc| > delta
            and its "log_odds". With ``by_cell`` (N, genes x columns). ``.attrs`` keeps what was asked, what the
            interval rests on, and "overlap": for each column set, the median density ratio of the cells' states under
            the level set and in all, the share of cells "without" (below 0.2), and the "auc" with which states of the
            training cells tell the level.

        Warns
        -----
        PyroscWarning
            Where over a tenth of the cells have no overlap, a number lies outside of what was seen, or states still
            tell the level (AUC above 0.75): then the decoder extrapolates, or the effect is in part in the state.

        Raises
        ------
        ValueError
            If a column, level or gene is unknown, or the table would not fit into memory.
        ProgramError
            If the story has no "rho" of each cell.

        References
        ----------
        Pearl 2009, Causality, section 7.1 (abduction, action, prediction).
        """
        from .counterfactuals import counterfactual
        from .overlap import assess

        cells = self._ready(cells)
        if not do:
            raise ValueError('do names no column to set; such as do={"condition": "stim"}')
        _check_numbers(scale=scale, delta=delta, pseudocount=pseudocount, interval=interval)
        n_draws = whole("n_draws", n_draws, 2)
        at, names = self._genes(genes)
        if not names:
            raise ValueError("genes names no gene; None is for all")
        self._require_rho_of_cells(cells)
        self._require_read(cells, do)
        overlap, notes = assess(self, cells, do)
        if notes:
            self._warn("; ".join(notes), depth=3)
        table = counterfactual(
            self, cells, do, n_draws=n_draws, at=at, names=names, scale=scale, delta=delta, pseudocount=pseudocount,
            interval=interval, by_cell=by_cell, seed=seed,
        )  # fmt: skip
        table.attrs["overlap"] = overlap
        return table

    def variance_explained(
        self,
        cells: Cells | anndata.AnnData,
        column: str = "batch",
        *,
        n_draws: int = 25,
        interval: float = 0.9,
        pseudocount: float = 0.0,
        seed: int = 0,
    ) -> pd.DataFrame:
        """How much of each gene's variation a batch, or another column, explains in the decoder.

        Every cell is decoded under every level. Of log2 shares, the variance over the levels of a cell, averaged over
        cells, is the column's; the variance over cells of their means over levels is the state's.

        Parameters
        ----------
        column : a categorical column of the fit, or the role "batch", "label" or "sample"
        n_draws : S
        interval : probability of the equal-tailed interval of the share
        pseudocount : added to shares before the logarithm
        seed : draws are random through it

        Returns
        -------
        DataFrame
            One row a gene, in order of "share": the column's part of the variance, 0 to 1, with "lower" and "upper";
            "sd_column" and "sd_state" in log2.

        Raises
        ------
        ValueError
            If there is no such column, it is continuous, or it has one level.
        ProgramError
            If the story has no "rho" of each cell.

        Notes
        -----
        Levels count alike, however many cells they have. Interactions of state and column are in the column's part.
        """
        from .counterfactuals import variance_explained

        cells = self._ready(cells)
        _check_numbers(interval=interval, pseudocount=pseudocount)
        factor = self.schema.factor(column)
        if factor is None:
            known = list(self.schema.factors)
            is_number = self.schema.covariate(column) is not None
            what = "is continuous; its effect is asked by counterfactual()" if is_number else "is not one of this fit's"
            raise ValueError(
                f'column: "{column}" {what}. Categorical: {listed(known, 10) or "none"}.' + did_you_mean(column, known)
            )
        if len(factor) < 2:
            raise ValueError(f'column: "{column}" has one level, so it explains nothing')
        self._require_rho_of_cells(cells)
        self._require_read(cells, {factor.column: factor.levels[0]})
        n_draws = whole("n_draws", n_draws, max(2, len(self.members)))
        return variance_explained(
            self, cells, factor.column, list(factor.levels), n_draws, interval, pseudocount, seed
        )  # fmt: skip

    def differential_expression(
        self,
        cells: Cells | anndata.AnnData,
        groupby: str | None = None,
        group1: Any = None,
        group2: Any = None,
        *,
        estimand: str = "population",
        delta: float | None = None,
        pseudocount: float | None = None,
        fdr: float = 0.05,
        n_draws: int = 100,
        interval: float = 0.9,
        resample: bool = True,
        residual: bool = True,
        shrink: bool = True,
        batches: str = "shared",
        donor: str | None = None,
        design: Sequence[str] = (),
        importance: int = 0,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Which genes differ between groups of cells, by how much, and how sure that is.

        Effects are log2 of group1 over group2.

        Parameters
        ----------
        groupby : column of ``obs``; None where the groups are masks
        group1 : a level, a list of levels, or a mask (N,); None for every level against the rest
        group2 : likewise; None for the rest
        estimand : "population", "cell" or "donor"
            "population" compares the groups' mean shares. "cell" compares a random cell of one with a random cell of
            the other: its spread is that of the cells and does not shrink with more of them. "donor" compares
            donors' means by a moderated t, paired where three donors or more are in both groups. Donors in one group
            only are left out of pairs; donors in both are left out where there are too few to pair.
            Groups that differ by donor are told apart by "donor" alone: the others take every cell for a witness.
        delta : |lfc| above which a gene counts as different; None takes it from the effects themselves, at least 0.3
        pseudocount : added to shares; None takes what genes that were not seen still get
        fdr : genes are called as long as the posterior expected share of false ones is at most this
        n_draws : S; "cell" takes 5,000 pairs
        interval : probability of the equal-tailed interval
        resample : whether each draw weighs cells by Dirichlet(1, ..., 1), for the population they come from
            Where donors are known they are weighed so, and the cells within each. Without it the answer is
            about these very cells.
        residual : whether "population" and "donor" add what counts of groups and donors say beyond what is decoded
            A decoder that was not told of groups or donors averages their differences away. So log2 of counts seen over
            counts expected is compared between the groups, and added ("lfc_residual"): as it is for donors and a single
            fit,
            which does not know how wrong it is; for an ensemble as it is or drawn towards 0 by the law that it has over
            genes, whichever is surer of most genes.
        shrink : whether "population" judges a gene by what all genes do: variances of an ensemble are moderated, and
            "probability" is that of an effect from the law that the genes follow (a mixture of normals around 0).
            Without it each effect has a flat prior of its own, and calls have more false ones than they say.
        batches : "shared" decodes both groups under each batch that both have, and averages
            "own" decodes each cell under its own.
        donor : column of ``obs`` that names donors; None takes the cells' ``sample=``
            A donor with a sample under each of two conditions is paired by this.
        design : further columns of ``obs`` that "donor" adjusts for, such as ["age", "sex"]: numbers are averaged over
            a donor's cells in a group, levels must be one there
        importance : draws of the guide for each cell, out of which the S are taken by Pareto smoothed importance
            weights towards the true posterior; 0 for none, 5000 is a good number. Cells whose weights cannot be relied
            on (k-hat above min(1 - 1 / log10, 0.7)) keep the guide's draws and are counted in
            ``.attrs["n_unweighted"]``; where they are more than a fifth of 200 cells, all keep them, with a warning.
            Takes about ``importance`` / 100 times as long.
        seed : draws are random through it

        Returns
        -------
        DataFrame
            One row a gene, in order of probability: "lfc_mean", "lfc_sd", "lfc_median", "lfc_lower", "lfc_upper", each
            gene for itself; "lfc_shrunk", the mean under the law that the genes follow; "probability" of |lfc| > delta
            and its "log_odds", under that law too; "bayes_factor" of the gene's own draws against two states from the
            prior (NaN where that has too few or too many effects), a word of "evidence" (Kass and Raftery 1995);
            "expected_fdp" if this gene and those above are called, "is_de"; "share1", "share2" decoded, "raw_mean1",
            "detected1", ... as counted; numbers of cells "n1", "n2"; "group1", "group2". For
            "donor" also "t", "df" and the "p_value" of |lfc| <= delta, by which genes are in order, and "expected_fdp"
            is that adjusted by Benjamini and Hochberg. ``.attrs``:
            estimand, delta, pseudocount, batches, what the uncertainty rests on, and the 90 % interval of the false
            discovery proportion of the call (genes go together as the draws do). All groups of ``groupby`` are stacked.

        Raises
        ------
        ValueError
            If a group is unknown, empty or overlaps the other, or an argument is out of range.
        ProgramError
            If the story has no "rho" of each cell.

        Notes
        -----
        What "cell" and "donor" compare is decoded: how donors differ is in them as far as the story lets a donor
        (``batch=``) change it, and a single fit takes the decoder for certain. "population" with ``residual`` is honest
        for a single fit too, as it then rests on the counts; ``fit(..., ensemble=5)`` finds more in small groups
        (benchmarks/results/effects.md). Groups that were
        found on these counts use them twice: cluster on one half of ``cells.thin(0.5)``, test on the other.

        References
        ----------
        Boyeau et al. 2023, PNAS 120:e2209124120; Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3:3; Stephens 2017,
        Biostatistics 18:275.
        """
        from .effects import ESTIMANDS, comparisons, differential_expression

        cells = self._ready(cells)
        if estimand not in ESTIMANDS:
            raise ValueError(f'estimand must be "population", "cell" or "donor", not {estimand!r}')
        if batches not in ("shared", "own"):
            raise ValueError(f'batches must be "shared" or "own", not {batches!r}')
        _check_numbers(delta=delta, pseudocount=pseudocount, fdr=fdr, interval=interval)
        n_draws, importance = whole("n_draws", n_draws, 2), whole("importance", importance, 0)
        _check_importance(importance, n_draws)
        for name, flag in (("resample", resample), ("residual", residual), ("shrink", shrink)):
            if not isinstance(flag, (bool, np.bool_)):
                raise TypeError(f"{name} is True or False, not {flag!r}")
        if isinstance(design, str):
            raise TypeError(f'design takes a list of columns: design=["{design}"]')
        if len(design) and estimand != "donor":
            raise ValueError(
                f'design is for estimand="donor", not {estimand!r}: others have the covariates of the story'
            )
        pairs = comparisons(cells, groupby, group1, group2)
        self._require_rho_of_cells(cells)
        table = differential_expression(
            self, cells, pairs, estimand=estimand, delta=delta, pseudocount=pseudocount, fdr=fdr, n_draws=n_draws,
            interval=interval, resample=resample, residual=residual, shrink=shrink, batches=batches, donor=donor,
            design=design, importance=importance, seed=seed,
        )  # fmt: skip
        table.attrs["groupby"] = groupby
        return table

    def sample_states(self, cells: Cells | anndata.AnnData, n_draws: int = 0, *, seed: int = 0) -> np.ndarray:
        """The state that each cell would have in every sample.

        Parameters
        ----------
        n_draws : 0 for the mean over 25 draws, else how many draws

        Returns
        -------
        array
            (N, D, K), or (S, N, D, K) draws: ``z`` of the cells, in order, in the samples of
            ``schema.sample.levels``. Random through ``seed``.

        Raises
        ------
        ProgramError
            If the story does not decode by sample.
        """
        from .between_samples import states

        n_draws = whole("n_draws", n_draws, 0)
        found = states(self, self._ready(cells), n_draws or _STATE_DRAWS, seed)
        return found if n_draws else found.mean(0)

    def sample_distances(
        self,
        cells: Cells | anndata.AnnData,
        groupby: str | None = None,
        *,
        of: str = "expression",
        by_cell: bool = False,
        n_draws: int = 25,
        interval: float = 0.9,
        most: int = 100,
        seed: int = 0,
    ) -> pd.DataFrame:
        """How far samples are apart in each group of cells: the same cells, decoded in either sample.

        Parameters
        ----------
        groupby : column of ``obs``, such as cell types; None takes all cells together
        of : "expression" for the root mean square over genes of log2 fold changes, "state" for lengths in z
        by_cell : one row a cell and a column for each pair of samples, posterior means alone
        n_draws : S
        interval : probability of the equal-tailed interval
        most : cells that stand for a group, at random
        seed : draws are random through it

        Returns
        -------
        DataFrame
            One row a group and pair: "group", "sample1", "sample2"; "distance" (posterior mean), "sd", "lower",
            "upper"; "normalized", the distance in sds above that of a sample from itself (between two draws of the
            posterior): near 0 where samples do not differ more than is unknown. `sample_matrix` makes it
            square, `sample_tree` a tree of samples.

        Raises
        ------
        ProgramError
            If the story does not decode by sample.
        """
        from .between_samples import distances, distances_by_cell

        if of not in ("expression", "state"):
            raise ValueError(f'of must be "expression" or "state", not {of!r}')
        _check_numbers(interval=interval)
        cells, n_draws = self._ready(cells), whole("n_draws", n_draws, 2)
        if by_cell:
            if groupby is not None:
                raise ValueError("by_cell answers for each cell: leave groupby= out")
            return distances_by_cell(self, cells, of, n_draws, seed)
        return distances(self, cells, groupby, of, n_draws, interval, whole("most", most, 1), seed)

    def sample_spread(
        self,
        cells: Cells | anndata.AnnData,
        groupby: str | None = None,
        *,
        delta: float = 0.1,
        n_draws: int = 50,
        interval: float = 0.9,
        most: int = 100,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Whether samples differ at all in each group of cells.

        Parameters
        ----------
        groupby, n_draws, interval, most, seed : as in `sample_distances`
        delta : log2, below which a spread counts as none

        Returns
        -------
        DataFrame
            One row a group: "sd", the root mean square over genes of the sd over samples of log2 expression (posterior
            mean), "lower", "upper"; and "p_none", the posterior probability that it is below ``delta``.

        Raises
        ------
        ProgramError
            If the story does not decode by sample.
        """
        from .between_samples import spread

        _check_numbers(interval=interval, delta=delta)
        return spread(
            self, self._ready(cells), groupby, whole("n_draws", n_draws, 2), interval, delta, whole("most", most, 1),
            seed,
        )  # fmt: skip

    def sample_effects(
        self,
        cells: Cells | anndata.AnnData,
        design: str | Sequence[str],
        groupby: str | None = None,
        *,
        block: str | None = None,
        genes: str | Sequence[str] | None = None,
        by_cell: bool = False,
        delta: float = 0.25,
        fdr: float = 0.05,
        least: int = 5,
        n_permutations: int = 1000,
        n_draws: int = 25,
        interval: float = 0.9,
        most: int = 100,
        seed: int = 0,
    ) -> pd.DataFrame:
        """What covariates of samples (condition, age, sex) do to expression, in each group of cells or each cell.

        The cells of a group are decoded in every sample. Their mean log2 shares, with what the counts of each sample
        say beyond them, are regressed on the covariates: samples are the units, so that how samples of a
        condition differ is in the answer.

        Parameters
        ----------
        design : columns of ``obs`` with one value a sample: ``"condition"``, ``"~ condition + age"``, or a list
            Levels are compared with the first; numbers are per unit.
        groupby : column of ``obs``; None takes all cells together
        block : column within which samples are compared and exchanged, such as the donor of samples under two
            conditions
        genes : names; None for all. Adjustment is over all genes of the fit.
        by_cell : effects in each cell instead, for a few genes
        delta : |lfc| above which an effect counts in "probability"
        fdr : genes are called while the estimated share of false ones is at most this
        least : cells that a sample must have in a group to be a witness there
        n_permutations : of the samples
        n_draws, interval, most, seed : as in `sample_distances`

        Returns
        -------
        DataFrame
            One row a group, contrast and gene (the index): "lfc_mean", "lfc_sd",
            "lfc_lower", "lfc_upper" (moderated t); "lfc_decoded", what is decoded alone; "probability" of
            |lfc| > delta and its "log_odds"; "t"; "p_value" by permutation, the gene's own; "p_pooled" beside
            the permuted t of all genes, "expected_fdp" that adjusted by Benjamini and Hochberg, "is_de";
            "n_samples". With ``by_cell`` (N, contrasts x genes x ("lfc_mean", "lfc_sd",
            "probability")): effects of these very samples, whose uncertainty is that of the posterior alone.

        Raises
        ------
        ValueError
            If a column is unknown, differs within a sample, or cannot be told from the others.
        ProgramError
            If the story does not decode by sample.

        Notes
        -----
        With few samples there are few permutations: four against four have 70, and no "p_value" is below 1 / 71.
        "p_pooled" is not bound by that where true and mirrored orders are a small part of those drawn, and takes genes
        without effects for alike. Five pairs within blocks have 32 orders, two of them the true one and its mirror: no
        p-value there is below 1 / 16, whatever the genes do.

        References
        ----------
        Freedman and Lane 1983, JBES 1:292; Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3:3 (moderated t).
        """
        from .between_samples import effects, effects_by_cell

        _check_numbers(delta=delta, fdr=fdr, interval=interval)
        cells, n_draws = self._ready(cells), whole("n_draws", n_draws, 2)
        at, names = self._genes(genes)
        if by_cell:
            if groupby is not None or block is not None:
                raise ValueError("by_cell answers for each cell and these samples: leave groupby= and block= out")
            return effects_by_cell(self, cells, design, at, names, delta, n_draws, seed)
        return effects(
            self, cells, design, groupby, block=block, least=whole("least", least, 1), names=names, delta=delta,
            fdr=fdr, n_permutations=whole("n_permutations", n_permutations, 20), n_draws=n_draws, interval=interval,
            most=whole("most", most, 1), seed=seed,
        )  # fmt: skip

    def sample_tests(
        self,
        cells: Cells | anndata.AnnData,
        design: str | Sequence[str],
        groupby: str | None = None,
        *,
        block: str | None = None,
        least: int = 5,
        n_permutations: int = 1000,
        n_draws: int = 25,
        most: int = 100,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Whether samples differ by a covariate in each group of cells, all genes together.

        Genes count by how well they are known: each is divided by the sd that counts give it.

        Parameters
        ----------
        As in `sample_effects`.

        Returns
        -------
        DataFrame
            One row a group and covariate: "r2", the share of the squared distances of samples that it explains beside
            the others; "f"; "p_value" by permutation of samples, which is exact if samples are exchangeable where the
            covariate does nothing; "null_median" and "null_95" of f under permutation; "n_samples".

        Raises
        ------
        ValueError
            If a column is unknown, differs within a sample, or cannot be told from the others.
        ProgramError
            If the story does not decode by sample.

        References
        ----------
        Anderson 2001, Austral Ecology 26:32.
        """
        from .between_samples import tests

        return tests(
            self, self._ready(cells), design, groupby, block=block, least=whole("least", least, 1),
            n_permutations=whole("n_permutations", n_permutations, 20), n_draws=whole("n_draws", n_draws, 2),
            most=whole("most", most, 1), seed=seed,
        )  # fmt: skip

    def differential_abundance(
        self,
        cells: Cells | anndata.AnnData,
        column: str,
        group1: Any = None,
        group2: Any = None,
        *,
        block: str | None = None,
        n_permutations: int = 1000,
        fdr: float = 0.1,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Of which states there are more cells in some samples than in others.

        The density of a sample at a cell's state u is the mean over the sample's other cells of their q(u | x); that of
        a group is the mean over its samples.

        Parameters
        ----------
        column : of ``obs``, with one value a sample
        group1, group2 : levels; None for ``group2`` takes all other samples
        block : column within which samples are exchanged
        n_permutations : of the samples
        fdr : cells are called while the expected share of false ones is at most this

        Returns
        -------
        DataFrame
            One row a cell: "lfc", log2 of group1's density over group2's; "p_value" by permutation of samples, its
            adjustment "expected_fdp" (Benjamini and Hochberg), "is_da". ``.attrs["p_overall"]`` is for the mean of
            |lfc| over cells.

        Raises
        ------
        ValueError
            If the column or a level is unknown, or a group has fewer than two samples.

        Notes
        -----
        Takes a product of N x N numbers, in blocks: some seconds for 10,000 cells.
        """
        from .between_samples import abundance

        _check_numbers(fdr=fdr)
        return abundance(
            self, self._ready(cells), column, group1, group2, block, whole("n_permutations", n_permutations, 20), fdr,
            seed,
        )  # fmt: skip

    def admissible_samples(self, cells: Cells | anndata.AnnData, *, level: float = 0.05, seed: int = 0) -> pd.DataFrame:
        """(N, D) whether cells of such a state are found in each sample, so that what it would be there is no guess.

        Parameters
        ----------
        level : share of cells that may be taken for strangers in their own sample

        Returns
        -------
        DataFrame
            True where the largest log q(u | x) among the sample's other cells, at the cell's u, is above the
            ``level`` quantile of what cells have in their own sample.

        Raises
        ------
        ProgramError
            If the fit has no samples.
        """
        from .between_samples import admissible

        _check_numbers(level=level)
        return admissible(self, self._ready(cells), level, seed)

    def loadings(self, *, n_draws: int = 500, interval: float = 0.9, seed: int = 0) -> pd.DataFrame:
        """What each factor does to each gene, of a story with a site "loadings" (`linear_scvi`).

        Parameters
        ----------
        n_draws : S, of the posterior of loadings; at least one of each refit of an ensemble
        interval : probability of the equal-tailed interval
        seed : draws are random through it

        Returns
        -------
        DataFrame
            (G, K x 4): columns (factor, "mean" | "sd" | "lower" | "upper"), change of a gene's log share (natural) per
            unit of the factor, relative to the median gene. Factors are in order of the variance they give to log
            shares; the sum of cubes of a factor's means is positive. ``attrs["place"]`` and ``attrs["sign"]`` lead
            back to `latent`, which keeps the order and signs of z: factor k is
            ``fit.latent(cells)[:, place[k]] * sign[k]``, as `factors` gives it. ``attrs["strength"]`` (K,) is the root
            mean square over genes of what a factor adds to log shares.

        Raises
        ------
        ProgramError
            If the story has no loadings.

        Notes
        -----
        Order and sign go by means over these draws, so that two factors of like strength may change places under
        another seed. Intervals are the guide's, which takes loadings to be independent and knows one rotation; under
        `NormalLoadings` that rotation is as good as any other. They are too narrow for genes that move: in two data
        sets with planted programmes those of 90 % held 92 and 96 % of the genes that no programme moves, half of those
        that one moves, and with ``fit(ensemble=4)`` 91 and 78 % of these (the latter where programmes were mixed).
        """
        from .programmes import loadings

        _check_numbers(interval=interval)
        return loadings(self, whole("n_draws", n_draws, 2), interval, seed)

    def top_genes(self, n: int = 10, *, n_draws: int = 500, interval: float = 0.9, seed: int = 0) -> pd.DataFrame:
        """The ``n`` genes of largest absolute mean loading of each factor; arguments and errors as `loadings`.

        Returns
        -------
        DataFrame
            Index (factor, rank), rank from 1; columns "gene", "mean", "sd", "lower", "upper".
        """
        from .programmes import top_genes

        _check_numbers(interval=interval)
        return top_genes(self, whole("n", n, 1), whole("n_draws", n_draws, 2), interval, seed)

    def factors(self, cells: Cells | anndata.AnnData, *, n_draws: int = 500, seed: int = 0) -> pd.DataFrame:
        """(N, K) posterior means of the factors of each cell, in the order and with the signs of `loadings`.

        ``n_draws`` and ``seed`` are those of `loadings`, by which order and signs go.
        """
        from .programmes import scores

        return scores(self, self._ready(cells), whole("n_draws", n_draws, 2), seed)

    def accessibility(
        self,
        cells: Cells | anndata.AnnData,
        regions: str | Sequence[str] | None = None,
        do: Mapping[str, Any] | None = None,
        *,
        factors: bool = False,
        n_draws: int = 25,
        interval: float | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """How open regions are in cells, without what a region has in all of them.

        Parameters
        ----------
        regions : names; None for all
        do : columns to set for decoding, as in `expression`
        factors : whether to leave the region factors in; the answer is then ``rho``, shares of a cell's fragments
        n_draws, interval, seed : as in `expression`

        Returns
        -------
        DataFrame
            (N, regions), cells in order: ``rho`` over the region's share of the fragments of all training cells
            together (`RegionDecoder.profile`), so that 1 is a region as open as there. With ``interval`` columns are
            (region, "mean" | "sd" | "lower" | "upper").

        Raises
        ------
        ValueError
            If a region or level is unknown, or the answer would not fit into memory.
        ProgramError
            If the story has no region factors and is asked for shares without them.

        Notes
        -----
        The published model sets the decoder's last bias to zero instead. That depends on what training put into the
        bias and what into the weights, of which only the sum is in the likelihood: two fits that say the same of every
        fragment may differ in it. A ratio to what was counted does not.
        """
        from .accessibility import without_factors

        if not isinstance(factors, (bool, np.bool_)):
            raise TypeError(f"factors is True or False, not {factors!r}")
        table = self.expression(cells, regions, do, n_draws=n_draws, interval=interval, seed=seed)
        return table if factors else without_factors(self, table)

    def differential_accessibility(
        self,
        cells: Cells | anndata.AnnData,
        groupby: str | None = None,
        group1: Any = None,
        group2: Any = None,
        *,
        scale: str = "ratio",
        delta: float | None = None,
        library: float | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Which regions differ in accessibility between groups of cells, by how much, and how sure that is.

        Parameters
        ----------
        groupby, group1, group2 : as in `differential_expression`
        scale : "ratio" or "difference"
            "ratio" is log2 of the groups' mean shares, group1 over group2. "difference" is that of the probabilities
            that a cell with ``library`` fragments shows the region open, at least one fragment, group1 less group2:
            it lies between -1 and 1.
        delta : effect above which a region counts as different, on that scale; None takes it from the effects
            themselves for ratios, 0.05 for differences
        library : fragments of the cell that "difference" is about; None for the median of the cells that are compared
        **options : ``estimand``, ``fdr``, ``n_draws``, ``interval``, ``resample``, ``residual``, ``shrink``,
            ``batches``, ``donor``, ``seed`` and for ratios ``pseudocount``, ``design``, ``importance``: as in
            `differential_expression`. Differences are of populations.

        Returns
        -------
        DataFrame
            One row a region, in order of probability. For ratios as `differential_expression`, with "is_da" for
            "is_de". For differences "difference_mean", "difference_sd", "difference_median", "difference_lower",
            "difference_upper", "difference_shrunk" (under the law that the regions share), "probability" of
            |difference| > delta under that law, 0 where delta is 1 or more, its "log_odds", "expected_fdp", "is_da",
            "open1" and "open2", the probabilities, and "share1", "raw_mean1", "detected1", ... as there.

        Raises
        ------
        ValueError
            As `differential_expression`, and if ``scale`` is unknown or an option is not for it.
        """
        from .accessibility import differences
        from .effects import comparisons

        if scale not in ("ratio", "difference"):
            raise ValueError(f'scale must be "ratio" or "difference", not {scale!r}')
        known = set(self.differential_expression.__kwdefaults__ or ()) - {"delta"}
        if scale == "difference":
            known -= {"pseudocount", "design", "importance"}
        for name in options:
            if name not in known:
                raise TypeError(f'there is no option {name!r} for scale="{scale}".' + did_you_mean(name, known))
        if scale == "ratio":
            if library is not None:
                raise ValueError('library is for scale="difference": ratios of shares need none')
            table = self.differential_expression(cells, groupby, group1, group2, delta=delta, **options)
            table.attrs["scale"] = "ratio"
        else:
            usual = dict(self.differential_expression.__kwdefaults__ or {})
            given: dict[str, Any] = {name: usual[name] for name in known} | options
            if given.pop("estimand") != "population":
                raise ValueError('differences are of populations: estimand="population", or scale="ratio"')
            if given["batches"] not in ("shared", "own"):
                raise ValueError(f'batches must be "shared" or "own", not {given["batches"]!r}')
            delta = 0.05 if delta is None else delta
            _check_numbers(delta=delta, fdr=given["fdr"], interval=given["interval"], library=library)
            if library is not None and not library > 0:
                raise ValueError(f"library must be a positive number of fragments, not {library!r}")
            given["n_draws"] = whole("n_draws", given["n_draws"], 2)
            for name in ("resample", "residual", "shrink"):
                if not isinstance(given[name], (bool, np.bool_)):
                    raise TypeError(f"{name} is True or False, not {given[name]!r}")
            cells = self._ready(cells)
            pairs = comparisons(cells, groupby, group1, group2)
            self._require_rho_of_cells(cells)
            table = differences(self, cells, pairs, delta=delta, library=library, **given)
            table.attrs["groupby"] = groupby
        table.index.name = "region"
        return table.rename(columns={"is_de": "is_da"})

    def draws(
        self,
        site: str,
        cells: Cells | anndata.AnnData,
        n_draws: int = 100,
        *,
        do: Mapping[str, Any] | None = None,
        importance: int = 0,
        seed: int = 0,
    ) -> np.ndarray:
        """Posterior draws of any site of the story: ``fit.draws("dispersion", cells)``.

        Parameters
        ----------
        do : columns to set for decoding; the state is read from the cells as they were seen
        importance : proposals a cell from which draws are taken by smoothed importance weights, 0 for none
            At least 100. They go from the guide to the posterior where the guide is near enough (`check.importance`);
            cells whose weights cannot be relied on keep the guide's draws, with a warning that says how many.

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
        n_draws = whole("n_draws", n_draws, 1)
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
                raise ValueError(f'site "{site}" is observed; predict() draws counts anew')
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
        world = cells if do is None else cells.do(**do)
        weighed = self._weighed(importance, n_draws)
        for (block,) in by_draws(self.program, cells, [[world]], n_draws, seed, ask, weighed):
            found.append(block.cpu())
            if is_global:
                break
        self._say_weighed(weighed)
        return torch.cat(found, 1).numpy() if not is_global else found[0].numpy()

    def elbo(self, cells: Cells | anndata.AnnData, *, n_draws: int = 1, seed: int = 0) -> np.ndarray:
        """(N,) evidence lower bound of each cell in nats, at KL weight 1, averaged over draws.

        Local terms only; the KL of global sites, once for a data set, is in the history.
        """
        n_draws = whole("n_draws", n_draws, 1)

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
        n_draws = whole("n_draws", n_draws, 1)
        cells = self._ready(cells).to(self.device, torch.float64)
        program = self.program.copy().double()

        each = in_front(program, cells, n_draws)

        def ask(block: Cells) -> Tensor:
            return torch.cat([log_weight(program, draw_guide(program, block, n), block, n) for n in each]).cpu()

        return by_block(program, [cells], n_draws * 2 * program.n_combinations, seed, ask)

    def train_guide(
        self, cells: Cells | anndata.AnnData, *, steps: int = 1000, batch_size: int = 160, lr: float = 3e-3,
        seed: int = 0, progress: bool = True,
    ) -> Fit:  # fmt: skip
        """This fit with a guide that learned on, while the story stood still; this fit stays as it is.

        Use it where the encoder is not as good as its family (the amortisation gap, `check.summary`) for cells at
        large; `refine` is for single ones, and can follow. The story's weights do not change by a bit.

        Parameters
        ----------
        cells : to learn from, such as those of the fit; labels are not used
        steps : of the optimiser
        batch_size : cells of a step: two fifths of them measured, two fifths made up by the story around the guide's
            states of measured ones, one fifth made up from the prior
        lr : learning rate at its height, in (0, 1]; it rises over the first 5 % of the steps and falls to zero
        seed : the result is random through it

        Returns
        -------
        Fit
            ``settings["guide"]`` has the mean ELBO before and after of up to 1,000 of the cells, by 16 draws. Cells
            that were refined have to be refined again.

        Raises
        ------
        ValueError
            If an argument is out of range, or cells lack genes.
        ProgramError
            If the story observes anything but counts, or reads weights of its guide (VampPrior).

        Warns
        -----
        PyroscWarning
            If the ELBO of these cells fell.

        Notes
        -----
        The guide of sites of all cells stays as it is. Dropout is off. After Zhang, Hayes and Barber 2022 (NeurIPS,
        "Generalization gap in amortized inference"), who mix measured and made-up cells; here are ones around the
        guide's own states besides, as most draws of the prior are unlike any cell.
        """
        from .guide_training import train_guide

        ready = self._ready(cells)
        if ready.gene_mask is not None:
            raise ValueError("these cells lack genes of the fit, so that others cannot be made up: pass cells with all")
        steps, batch_size = whole("steps", steps, 1), whole("batch_size", batch_size, 5)
        if positive("lr", lr) > 1:
            raise ValueError(f"lr must be in (0, 1], not {lr!r}")
        return train_guide(self, ready, steps, batch_size, float(lr), checked_seed(seed), progress)

    def refine(
        self, cells: Cells | anndata.AnnData, *, family: str = "normal", steps: int = 150, n_draws: int = 4,
        lr: float = 0.2, moments: int | None = None, seed: int = 0, progress: bool = True,
    ) -> Fit:  # fmt: skip
        """This fit with a better guess of the latent numbers of these cells; weights, and this fit, stay as they are.

        Use it where `check.summary` finds that the encoder is not as good as its family (the amortisation gap), or for
        the few cells that matter. Each cell's guess is improved from the encoder's by gradient steps on its own ELBO;
        everything asked of the new fit then takes it: draws, expression, effects, intervals.

        Parameters
        ----------
        cells : whose guess is refined; those refined before keep theirs
        family : "normal" (independent normals, as the encoder's), or "full" (a covariance matrix for each site)
        steps : natural gradient steps of each cell
        n_draws : of a cell at each step
        lr : rate at the first step, which falls to zero: no step moves a guess by more than this share of its sd
        moments : draws of each cell that give its guess the posterior's mean and covariance at last, twice; at least
            100, or 0 for none. None takes 1,000 for "full" and 0 for "normal": the highest ELBO, whose sds are too
            narrow where the posterior has tails or latents depend on each other
        seed : the result is random through it

        Returns
        -------
        Fit
            ``settings["refined"]`` says of how many cells, and their mean ELBO before and after, each by 64 draws. A
            cell whose ELBO did not rise keeps the encoder's guess. Cells that were not refined have it too, with a
            warning. Cells are known by their counts and columns.

        Raises
        ------
        ValueError
            If an argument is out of range.
        ProgramError
            If the guide draws no normal of each cell, nor anything made from one.

        Warns
        -----
        PyroscWarning
            If the ELBO was still rising at the end.

        Notes
        -----
        `refinement` has the mathematics. Time is that of ``steps x n_draws`` decodings of each cell and their
        gradients. Discrete sites that the guide draws, and global ones, stay as they are. `Fit.save` keeps the result.
        """
        from .corrections import FAMILIES
        from .refinement import How, refine

        if family not in FAMILIES:
            raise ValueError(f"family must be one of {listed(FAMILIES)}, not {family!r}")
        ready = self._ready(cells)
        steps, n_draws = whole("steps", steps, 1), whole("n_draws", n_draws, 1)
        if moments is None:
            moments = 1000 if family == "full" else 0
        if 0 < whole("moments", moments, 0) < 100:
            raise ValueError(f"moments must be 0 or at least 100 draws, not {moments!r}")
        how = How(family, steps, n_draws, positive("lr", lr), moments)
        return refine(self, ready, how, checked_seed(seed), progress)

    def to_arviz(
        self,
        cells: Cells | anndata.AnnData,
        n_draws: int = 100,
        sites: Sequence[str] | None = None,
        *,
        seed: int = 0,
    ) -> Any:
        """Draws of these cells as ArviZ holds them, with names of cells and genes.

        Parameters
        ----------
        n_draws : S, of each refit of an ensemble, which are the chains; one chain for a single fit
        sites : of the posterior; None for those the guide draws ("rho" is large: name it to have it)

        Returns
        -------
        xarray.DataTree
            Groups "posterior" (chain, draw, cell, ...), "posterior_predictive" and "observed_data" with counts "x"
            (cell, gene), and "log_likelihood" of each cell's counts given the draw, (chain, draw, cell).

        Raises
        ------
        ImportError
            Without ``arviz-base``: pip install "pyrosc[arviz]".
        ValueError
            If a site is unknown or the draws would not fit into memory.

        Notes
        -----
        Draws are of the guide, not of a Markov chain: they are independent, and R-hat over the members of an ensemble
        says how far refits differ.
        """
        from .prediction import to_arviz

        return to_arviz(self, self._ready(cells), whole("n_draws", n_draws, 1), sites, seed)

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
            num_samples=whole("n_draws", n_draws, 1),
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
        self,
        adata: anndata.AnnData,
        cells: Cells | None = None,
        key: str | None = None,
        *,
        effects: pd.DataFrame | None = None,
        overwrite: bool = False,
    ) -> list[str]:
        """Put the latent state where scanpy looks: ``obsm[key]``, its sd, and where it came from.

        With ``effects`` it is that table that is put there, as scanpy's ``rank_genes_groups`` lays it out, so that
        scanpy's plots and ``sc.get.rank_genes_groups_df`` show it.

        Parameters
        ----------
        cells : the cells to encode; None encodes ``adata`` itself
            Joined to ``adata`` by name; cells of ``adata`` that are not among them get NaN.
        key : None for "X_pyrosc", and "rank_genes_groups" for a table of effects
        effects : from `differential_expression`
            "scores" are lfc_mean / lfc_sd, "pvals" 1 - probability (for "donor" the p-value), "pvals_adj"
            the expected share of false calls down to the gene.
        overwrite : whether keys that are there may be replaced

        Returns
        -------
        list of str
            What was written: ``obsm[key]`` (N, K) means, ``obsm[key + "_sd"]`` (N, K), ``uns[key]`` a dict
            of numbers and text; with ``effects``, ``uns[key]`` alone.

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
        if key is None:
            key = "X_pyrosc" if effects is None else "rank_genes_groups"
        if not isinstance(key, str) or not key or "/" in key:
            raise ValueError(f'key must be a name without "/", not {key!r}')
        if effects is not None:
            if cells is not None:
                raise ValueError(
                    "a table of effects has no cells: leave cells= out, or write the latent state by itself"
                )
            from .effects import ranked

            if key in adata.uns and not overwrite:
                raise ValueError(f'uns["{key}"] is there already: pass overwrite=True, or another key=')
            adata.uns[key] = ranked(effects, list(adata.var_names.astype(str)))
            return [f'uns["{key}"]']
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
        cells = Cells.align(data, self.schema, missing=self.settings.get("missing", "error"))
        if not len(cells):
            raise ValueError("there are no cells to ask about")
        if not cells.has_counts:
            raise ValueError("these cells hold no counts (without_counts), so there is nothing to encode")
        if cells.gene_mask is not None and cells.fill is None and self.settings.get("missing") == "mask":
            from .mapping import filled

            cells = filled(self, cells.to(self.device, self.program.dtype))
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

    @staticmethod
    def _weighed(importance: int, n_draws: int) -> Importance | None:
        """How draws are taken by weights; None for the guide's own."""
        _check_importance(whole("importance", importance, 0), n_draws)
        return Importance(importance) if importance else None

    def _say_weighed(self, weighed: Importance | None) -> None:
        if weighed is not None and weighed.n_unweighted:
            self._warn(
                f"importance weights cannot be relied on in {weighed.n_unweighted:,} of {weighed.n_cells:,} cells: "
                "they keep the draws of the guide. fit.refine(cells, family='full') brings it nearer"
            )

    def member_of(self, n_draws: int) -> np.ndarray:
        """(S,) which member each of so many draws is of, in the order they are answered in."""
        n_members = max(len(self.members), 1)
        if n_draws < n_members:
            raise ValueError(f"n_draws={n_draws} is below the {n_members} refits of this ensemble; ask for more")
        return np.repeat(np.arange(n_members), [n_draws // n_members + (m < n_draws % n_members)
                                                for m in range(n_members)])  # fmt: skip

    def spread(
        self, draws: np.ndarray, interval: float, *, member: np.ndarray | None = None, least: float = -np.inf
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sd and equal-tailed interval of a quantity from its draws (S, ...) in the order of `member_of`.

        Of an ensemble of M: sd from W + (1 + 1/M) B, for W the variance within members and B that between their means
        (less what the draws add to it); the interval is Student's with (M - 1) (1 + W / ((1 + 1/M) B))^2 degrees of
        freedom (Rubin 1987, Multiple Imputation, section 3.3). ``least`` is a bound that intervals respect.
        """
        from scipy import stats

        from .effects import t_law

        if not self.members:
            ends = np.quantile(draws, [(1 - interval) / 2, (1 + interval) / 2], axis=0)
            return draws.std(0, ddof=min(1, len(draws) - 1)), ends[0], ends[1]
        mean, sd, df = t_law(draws, self.member_of(len(draws)) if member is None else member)
        reach = stats.t.ppf(0.5 + interval / 2, df) * sd
        return sd, np.maximum(mean - reach, least), mean + reach

    def _uncertainty(self, cells: bool = False, counts: bool = False) -> str:
        """What the spread of draws comes from."""
        known = ["z"] + ["global sites"] * self.program.has_globals + ["cells"] * cells + ["counts"] * counts
        known += ["decoder"] * bool(self.members)
        return "z only" if len(known) == 1 else ", ".join(known[:-1]) + f" and {known[-1]}"

    def _require_rho_of_cells(self, cells: Cells) -> None:
        few = cells.rows(torch.arange(1, device=cells.device), whole=True)
        with self.program.driven(0), torch.no_grad():
            nodes: dict[str, Any] = poutine.trace(self.program.model).get_trace(few).nodes
        if "rho" not in nodes:
            raise ProgramError(f'{self.program.story} has no site "rho", which this needs: the share of each gene')
        if not in_cells(nodes["rho"]):
            raise ProgramError(
                f'"rho" is one for all cells in {self.program.story}, so that no groups or worlds differ'
            )

    def _require_read(self, cells: Cells, do: Mapping[str, Any]) -> None:
        """Whether columns that are set change what is decoded; unknown ones are refused too."""
        self._worlds(cells, do)
        few = cells.rows(torch.arange(min(3, len(cells)), device=cells.device), whole=True)
        for name in do:
            factor = self.schema.factor(name)
            if factor is not None and len(factor) < 2:
                continue
            ends = [0.0, 1.0] if factor is None else list(factor.levels[:2])
            found = []
            for level in ends:
                with self.program.driven(0), torch.no_grad():
                    guide = draw_guide(self.program, few)
                    nodes: Any = run_model(self.program, guide, few.do(**{name: level}), None).nodes
                    found.append(nodes["rho"]["value"])
            if torch.equal(*found):
                raise ValueError(
                    f'do: {self.program.story} does not decode by "{name}", so setting it changes nothing. Columns of '
                    "a decoder are named when cells are read: batch=, categorical= or continuous="
                )

    def _warn(self, text: str, depth: int = 4) -> None:
        warnings.warn(text, PyroscWarning, stacklevel=depth)

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

    def _worlds(self, cells: Cells, do: Mapping[str, Any] | None) -> list[Cells]:
        """The cells as they are to be decoded: once, or once for each level that "all" averages over."""
        if do is not None and not isinstance(do, Mapping):
            raise TypeError(f'do takes columns and levels, such as do={{"donor": "101"}}, not {do!r}')
        do = do or {}
        choices: list[list[Any]] = []
        for name, level in do.items():
            factor = self.schema.factor(name)
            levels: list[Any] = [level]
            if isinstance(level, str) and level == "all" and self.schema.covariate(name) is not None:
                raise ValueError(f'"{name}" is continuous, so there are no levels to average over; give it a number')
            if isinstance(level, str) and level == "all" and factor is not None and "all" not in factor.levels:
                levels = list(factor.levels)
            choices.append(levels)
        return [cells.do(**dict(zip(do, levels))) for levels in itertools.product(*choices)]

    def _draws_of(
        self,
        site: str,
        read: Cells,
        worlds: list[list[Cells]],
        n_draws: int,
        seed: int,
        at: np.ndarray | None,
        changed: bool,
        importance: Importance | None = None,
    ) -> Iterator[list[Tensor]]:
        """(S, n, genes) draws of a site, averaged over the worlds of each group, block by block of cells."""
        chosen = None if at is None else torch.as_tensor(at, device=self.device)

        def ask(block: Cells, trace: poutine.Trace, n: int | None) -> Tensor:
            values = self._value(site, trace, n, len(block), changed)
            return values if chosen is None else values.index_select(-1, chosen)

        return self._runs(read, worlds, n_draws, seed, ask, importance=importance)

    def _runs(
        self,
        read: Cells,
        worlds: list[list[Cells]],
        n_draws: int,
        seed: int,
        ask: Callable[[Cells, poutine.Trace, int | None], Tensor],
        program: Program | None = None,
        importance: Importance | None = None,
    ) -> Iterator[list[Tensor]]:
        """Answers of `by_draws` from all members of an ensemble, their draws one after the other; or of one program."""
        if program is not None or not self.members:
            return by_draws(program or self.program, read, worlds, n_draws, seed, ask, importance)
        shares = np.bincount(self.member_of(n_draws))
        seeds = [int(np.random.SeedSequence([seed, m]).generate_state(1)[0]) for m in range(len(self.members))]
        runs = [
            by_draws(member, read, worlds, int(n), own, ask, importance)
            for member, n, own in zip(self.members, shares, seeds)
        ]
        return self._joined(runs)

    @staticmethod
    def _joined(runs: list[Iterator[list[Tensor]]]) -> Iterator[list[Tensor]]:
        """Blocks of the members side by side, cut to the same cells, their draws one after the other."""
        held: list[list[Tensor] | None] = [None] * len(runs)
        while True:
            for m, run in enumerate(runs):
                if held[m] is None or not held[m][0].shape[1]:  # type: ignore[index]
                    held[m] = next(run, None)
            if any(h is None for h in held):
                return
            n = min(h[0].shape[1] for h in held if h is not None)
            yield [torch.cat([h[k][:, :n] for h in held if h is not None]) for k in range(len(held[0] or ()))]
            held = [[t[:, n:] for t in h] for h in held if h is not None]

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


def require_fit(fit: Any) -> None:
    """Refuse what is not a Fit.

    Raises
    ------
    TypeError
    """
    if not isinstance(fit, Fit):
        raise TypeError(f"expected a Fit first, as pyrosc.fit(...) answers, not {type(fit).__name__}")


def _check_importance(importance: int, n_draws: int) -> None:
    if 0 < importance < max(100, n_draws):
        raise ValueError(f"importance must be 0 or at least {max(100, n_draws)} draws, not {importance}")


def _check_numbers(**numbers: Any) -> None:
    """Numbers are in their ranges; None is left to the default."""
    for name, value in numbers.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
            what = "a positive number, such as 1e4" if name == "scale" else "a number"
            raise ValueError(f"{name} must be {what}, not {value!r}")
        if name in ("interval", "fdr", "level") and not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value!r}")
        if name == "scale" and not value > 0:
            raise ValueError(f"scale must be a positive number, such as 1e4, not {value!r}")
        if name in ("delta", "pseudocount") and value < 0:
            raise ValueError(f"{name} must be at least 0, not {value!r}")


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
