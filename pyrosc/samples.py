"""Samples: how the specimen that a cell came from (donor, donor x condition) moves its expression.

    SampleEffects       effects of samples, for each of a few archetypes of cells, with a scale that is learned
    Directions          what a unit of an effect does to each gene
    Archetypes          a cell's shares of the archetypes, from its state
    SampleEncoder       an encoder that reads counts less what the sample has in all cells
    SampleNormal        the guide of effects and directions

A story draws effects and directions before the plate of cells, and asks ``effects.at(effect, shares, cells)`` inside
for how far the cells at hand are moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .cells import Cells
from .errors import ProgramError
from .loading import blocks
from .networks import Encoder
from .parts import Part, positive, whole
from .schema import Schema

# Guides start near "no effect": from wide ones, effects of what was noise were still there after 1,400 steps.
_START_SD, _START_SCALE, _START_DIRECTION = 0.1, 0.05, 0.5
_START_LOGIT = 2.0  # sd of the logits of shares of archetypes


class SampleEffects(Part):
    """Effects of samples, one a sample and archetype, (D, M, K), of a scale that is learned.

        effect_sd[m]           ~ HalfNormal(scale)          (M,)
        sample_effect[d, m, :] ~ Normal(0, effect_sd[m])    (D, M, K)

    A scale near 0 says that samples do not differ in cells of that archetype: the evidence decides how much of an
    effect there is, archetype by archetype (relevance determination).

    Parameters
    ----------
    n_archetypes : M; with 1 every cell of a sample is moved alike
    n_effect : K; None takes the width of the state, for a story in which effects move that
    scale : sd of the prior of scales, in units of the state, in which cells have sd 1
    centred : whether the mean over samples is taken out of the effects that are used
        Only differences of effects show in counts; what all samples have in common is then the state's.
    """

    prior_sd: Tensor  # (M,)
    n_reference: Tensor  # ()

    def __init__(
        self, n_archetypes: int = 6, n_effect: int | None = 20, scale: float = 1.0, *, centred: bool = True
    ) -> None:
        super().__init__(
            n_archetypes=whole("n_archetypes", n_archetypes),
            n_effect=None if n_effect is None else whole("n_effect", n_effect),
            scale=positive("scale", scale, "the sd of a half-normal"),
            centred=bool(centred),
        )

    @property
    def sizes(self) -> dict[str, int]:
        n_effect = self.arguments["n_effect"]
        found = {"n_archetypes": self.arguments["n_archetypes"]}
        return found if n_effect is None else found | {"n_effect": n_effect}

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent",) if self.arguments["n_effect"] is None else ()

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        self.shape = _shape(schema, sizes, "SampleEffects")
        self.register_buffer("prior_sd", torch.full((self.shape[1],), self.arguments["scale"]))
        # Samples that are mapped onto a fit come after its own, whose mean stays the one that effects are about.
        self.register_buffer("n_reference", torch.tensor(self.shape[0]))

    def forward(self) -> Tensor:
        sd = pyro.sample("effect_sd", dist.HalfNormal(self.prior_sd).to_event(1))
        scale = sd.unsqueeze(-1).unsqueeze(-3).expand(*sd.shape[:-1], *self.shape)
        return pyro.sample("sample_effect", dist.Normal(torch.zeros_like(scale), scale).to_event(3))

    def used(self, effect: Tensor) -> Tensor:
        """(..., D, M, K) effects as they act: about their mean over samples, where they are centred."""
        if not self.arguments["centred"]:
            return effect
        is_own = (torch.arange(effect.shape[-3], device=effect.device) < self.n_reference).to(effect)
        return effect - (effect * is_own[:, None, None]).sum(-3, keepdim=True) / self.n_reference

    def at(self, effect: Tensor, shares: Tensor | None, cells: Cells) -> Tensor:
        """(..., n, K) how far these cells are moved, of shares (..., n, M) of archetypes; None for a single one."""
        effect = self.used(effect)
        if effect.dim() > 3:  # draws in front come as (S, 1, D, M, K), with a place for the plate of cells
            effect = effect.squeeze(-4)
        own = effect.index_select(-3, cells.sample)
        return own[..., 0, :] if shares is None else (shares.unsqueeze(-2) @ own).squeeze(-2)


def _shape(schema: Schema, sizes: Mapping[str, int], name: str) -> tuple[int, int, int]:
    """(D, M, K) of the effects.

    Raises
    ------
    ProgramError
        If there are not two samples, or a part that says M or K is missing.
    """
    if schema.sample is None:
        raise ProgramError(f"{name} needs a sample column: Cells.from_anndata(adata, sample=...)")
    if len(schema.sample) < 2:
        raise ProgramError(
            f'"{schema.sample.column}" has one sample, and what is asked is how samples differ: use pyrosc.scvi(cells)'
        )
    if "n_archetypes" not in sizes:
        raise ProgramError(f'{name} does not know the archetypes: hand the story a part "effects", SampleEffects()')
    width = sizes.get("n_effect", sizes.get("n_latent"))
    if width is None:
        raise ProgramError(f"{name} does not know how wide the state is: hand the story an encoder with n_latent=")
    return len(schema.sample), sizes["n_archetypes"], width


class Directions(Part):
    """What a unit of each effect does to the log share of each gene, (K, G): the site "directions" ~ Normal(0, sd).

    Directions with a posterior, not weights of a network, are what keeps the story from explaining the noise of a
    sample's counts: a decoder free to turn effects into any change of expression did so, and samples that do not differ
    came out 0.13 log2 apart, where directions have them at 0.07 (simulated donors of 500 cells that differ in
    composition; benchmarks/results/mrvi_choices.md).

    Parameters
    ----------
    sd : of the prior, log share per unit of effect
    """

    prior_sd: Tensor  # (K, G)

    def __init__(self, sd: float = 0.3) -> None:
        super().__init__(sd=positive("sd", sd, "that of log fold changes a unit of effect"))

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_effect",)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        if "n_effect" not in sizes:
            raise ProgramError(
                'Directions does not know how many there are: give the part "effects" n_effect=, SampleEffects(6, 20)'
            )
        shape = (sizes["n_effect"], schema.n_genes)
        self.register_buffer("prior_sd", torch.full(shape, self.arguments["sd"]))

    def forward(self) -> Tensor:
        return pyro.sample("directions", dist.Normal(torch.zeros_like(self.prior_sd), self.prior_sd).to_event(2))

    def decoded(self, shift: Tensor, directions: Tensor) -> Tensor:
        """(..., n, G) change of log shares of cells that are moved by (..., n, K)."""
        return shift @ (directions.squeeze(-3) if directions.dim() > 2 else directions)


class Archetypes(Part):
    """Shares of the archetypes in a cell, which sum to 1: a state (..., n, L) to (..., n, M).

    One hidden layer and a softmax, so that cells of like state are moved alike.

    Parameters
    ----------
    n_hidden : of its hidden layer
    """

    def __init__(self, n_hidden: int = 32) -> None:
        super().__init__(n_hidden=whole("n_hidden", n_hidden))

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent", "n_archetypes")

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        for size, part in (("n_latent", "an encoder with n_latent="), ("n_archetypes", "effects=SampleEffects()")):
            if size not in sizes:
                raise ProgramError(f"Archetypes does not know {size}: hand the story {part}")
        n_hidden = self.arguments["n_hidden"]
        self.linear = nn.Linear(sizes["n_latent"], n_hidden)
        self.norm = nn.LayerNorm(n_hidden)
        self.out = nn.Linear(n_hidden, sizes["n_archetypes"])
        # Shares that differ from the start: from even ones, types that differ by other effects ended in one archetype.
        nn.init.normal_(self.out.weight, std=_START_LOGIT / (0.5 * n_hidden) ** 0.5)

    def forward(self, state: Tensor) -> Tensor:
        return self.out(self.norm(self.linear(state)).relu()).softmax(-1)


class SampleEncoder(Encoder):
    """An encoder that reads a cell's log counts less what its sample has more than the others.

        log(1 + x[n]) - (mean of log(1 + x) over cells of its sample - mean over samples of these)

    What all cells of a sample have in common says nothing of the state that is free of samples. An encoder that reads
    it finds its way back to states that hold the sample, and leaves nothing for effects: on Kang, states told the
    condition of a cell (AUC 1.00), and trees of samples of monocytes put 8 of 16 on its side
    (benchmarks/results/mrvi_choices.md).

    Parameters
    ----------
    As `Encoder`.

    Notes
    -----
    The means are set from the cells of the first fit, and for samples that are mapped onto it from theirs. A cell of a
    sample that is not known is read as it is.
    """

    offset: Tensor  # (D, G), log(1 + count)
    centre: Tensor  # (G,), their mean over samples before it was taken off

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        if schema.sample is None:
            raise ProgramError("SampleEncoder needs a sample column: Cells.from_anndata(adata, sample=...)")
        super().build(schema, sizes, parts)
        self.register_buffer("offset", torch.zeros(len(schema.sample), schema.n_genes))
        self.register_buffer("centre", torch.zeros(schema.n_genes))

    def start(self, cells: Cells) -> None:
        means, seen = _means(cells, len(self.offset))
        self.centre.copy_(means[seen].mean(0))
        self.offset[seen] = (means[seen] - self.centre).to(self.offset)

    def meet(self, cells: Cells) -> None:
        """Take the means of samples that the first fit did not have from these cells."""
        means, seen = _means(cells, len(self.offset))
        new = seen & (self.offset == 0).all(1)
        self.offset[new] = (means[new] - self.centre).to(self.offset)

    def _read(self, cells: Cells) -> Tensor:
        linear: Any = self.layers[0].linear
        codes = cells.codes[cells.schema.sample.column]  # type: ignore[union-attr]
        taken = self.offset @ linear.weight[:, : self.offset.shape[1]].t()
        taken = torch.cat([taken, torch.zeros_like(taken[:1])])[codes]  # -1, of a sample not known, is the last
        return self.layers(cells.log1p(), self.covariates(cells) if self.covariates else None, taken)


def _means(cells: Cells, n_samples: int) -> tuple[Tensor, Tensor]:
    """(D, G) means over the cells of each sample of log(1 + x), and which samples have cells."""
    codes = cells.codes[cells.schema.sample.column]  # type: ignore[union-attr]
    total = torch.zeros(n_samples + 1, cells.n_genes, dtype=torch.float64, device=cells.device)
    start = 0
    for block in blocks(cells):
        here = codes[start : start + len(block)]
        total.index_add_(0, torch.where(here < 0, n_samples, here), block.log1p().double())
        start += len(block)
    count = torch.bincount(codes[codes >= 0], minlength=n_samples)
    return total[:n_samples] / count.clamp(min=1).unsqueeze(-1), count > 0


class SampleNormal(Part):
    """Guide of `SampleEffects` and `Directions`: mean-field normals, and log-normals of the scales.

    Notes
    -----
    Trained at the learning rate of the networks, as effects and decoder have to move together; at ten times that rate,
    which guides of other global sites take, distances of simulated samples came out as well (one tissue). A fit takes
    2,000 steps for it by default, and lets the KL weight rise over 0.6 of them: the evidence decides how much of an
    effect there is once there is one. With 0.3 distances came out worse (rank correlation 0.63 against 0.89;
    benchmarks/results/mrvi_choices.md).
    """

    steps, warmup = 2000, 0.6

    def __init__(self) -> None:
        super().__init__()

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent", "n_archetypes", "n_effect")

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        shape = _shape(schema, sizes, "SampleNormal")
        self.loc = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.full(shape, _START_SCALE).log())
        self.sd_loc = nn.Parameter(torch.full((shape[1],), _START_SD).log())
        self.sd_log_scale = nn.Parameter(torch.full((shape[1],), 0.1).log())
        directions: Any = parts.get("directions")
        self.has_directions = directions is not None
        if self.has_directions:
            sd = torch.full((shape[2], schema.n_genes), directions.arguments["sd"])
            self.direction_loc = nn.Parameter(sd * torch.randn_like(sd))
            self.direction_log_scale = nn.Parameter((_START_DIRECTION * sd).log())

    def forward(self) -> Tensor:
        pyro.sample("effect_sd", dist.LogNormal(self.sd_loc, self.sd_log_scale.exp()).to_event(1))
        if self.has_directions:
            pyro.sample("directions", dist.Normal(self.direction_loc, self.direction_log_scale.exp()).to_event(2))
        return pyro.sample("sample_effect", dist.Normal(self.loc, self.log_scale.exp()).to_event(3))
