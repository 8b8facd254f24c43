"""Completion: guides for the sites that a guide function leaves out.

A global site gets a mean-field normal mapped to the site's support, with parameters of its own; a site in
the plate of cells an amortised one, a head on the encoder's features and the log total count. Positive
sites are guided by ``LogNormal`` itself, so that KL terms stay analytic. What each site is (support, shape,
plates, scale) is learned from runs of the model on made-up cells when the Program is made.

Order in a run: completed globals, the guide function, completed sites of cells. None of the completed
sites depends on another, so the mean-field condition holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from .cells import Cells
from .dispersions import moments
from .errors import ProgramError
from .loadings import principal_loadings
from .networks import Encoder
from .parts import Parts
from .schema import Schema

_DRAWS = 25  # of the prior, for starting values
_PERIODIC = ("VonMises", "VonMises3D", "SineBivariateVonMises", "SineSkewed", "ProjectedNormal")


@dataclass(frozen=True)
class Latent:
    """A latent site as the model draws it.

    frames : (name, size, dim) of its plates other than "cells"
    batch_shape, event_shape : without the cells
    centre, spread : median and robust sd of its prior on the unconstrained scale
    """

    name: str
    law: str
    in_cells: bool
    frames: tuple[tuple[str, int, int], ...]
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    support: Any
    centre: Tensor
    spread: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Latent:
        return self  # supports are known by identity

    @property
    def like(self) -> tuple[Any, ...]:
        """What a guide made for this site depends on."""
        return (self.in_cells, self.frames, self.batch_shape, self.event_shape, str(self.support))


# ---- what the model draws -------------------------------------------------------------------


def law_of(fn: Any) -> str:
    """Name of a distribution, whatever it is wrapped in."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in (
        "Independent", "_PerCell", "MaskedDistribution", "ExpandedDistribution",
    ):  # fmt: skip
        fn = fn.base_dist
    name = type(fn).__name__
    return f"{law_of(fn.base_dist)} mapped" if name == "TransformedDistribution" else name


def is_computed(site: Any) -> bool:
    """Whether a site is a value that the story computed (``pyro.deterministic``)."""
    return site["infer"].get("_deterministic", False) or (site["is_observed"] and law_of(site["fn"]) == "Delta")


def is_enumerated(site: Any) -> bool:
    """Whether the story asks for the sum over the values of this discrete site."""
    return site["infer"].get("enumerate") == "parallel" and site["fn"].has_enumerate_support


def latent_sites(trace: poutine.Trace) -> dict[str, Any]:
    """Sites that were drawn, by name."""
    nodes: dict[str, Any] = trace.nodes
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not is_computed(site)
    }


def plate_depth(*traces: poutine.Trace) -> int:
    """How many nested plates there are, the cells' included."""
    dims = [
        -frame.dim
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.dim is not None
    ]
    return max(dims, default=1)


def plain_support(support: Any) -> Any:
    """A support without its event dimensions."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _support(fn: Any) -> Any:
    """The support of a law; that of a mixture is its components'."""
    support = fn.support
    while type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint
    return support


def _bounds(support: Any) -> list[Any]:
    """Lower and upper bound, where a support has them; numbers or tensors."""
    inner = plain_support(support)
    return [getattr(inner, name) for name in ("lower_bound", "upper_bound") if hasattr(inner, name)]


def _settled(support: Any, n_cells: int | None) -> Any:
    """The support with constant bounds as numbers, whatever the cells at hand; None if it differs by cell."""
    fixed: list[Any]
    bounds = [torch.as_tensor(b).detach() for b in _bounds(support)]
    if all(bool((b == b.reshape(-1)[0]).all()) for b in bounds):
        fixed = [float(b.reshape(-1)[0]) for b in bounds]
    elif n_cells is not None and any(
        b.dim() > support.event_dim and b.shape[-1 - support.event_dim] == n_cells for b in bounds
    ):
        # The bounds were expanded over the cells: the same for all, or not?
        at = [b.movedim(-1 - support.event_dim, 0) if b.dim() > support.event_dim else b.unsqueeze(0) for b in bounds]
        if any(not bool((b == b[:1]).all()) for b in at):
            return None
        fixed = [b[0] for b in at]
    else:
        fixed = bounds
    return _rebuilt(support, fixed)


def settled_support(fn: Any, n_cells: int) -> Any:
    """The support of a site's law, the same for all of so many cells.

    Raises
    ------
    ProgramError
        If it differs between them.
    """
    found = _settled(_support(fn), n_cells)
    if found is None:
        raise ProgramError(f"the support of {law_of(fn)} differs from cell to cell")
    return found


def _rebuilt(support: Any, bounds: list[Any]) -> Any:
    """A support with other bounds."""
    inner = plain_support(support)
    if not bounds or inner in (constraints.positive, constraints.nonnegative, constraints.unit_interval):
        return support
    made: Any = type(inner)(*bounds)
    return constraints.independent(made, support.event_dim) if support.event_dim else made


def _refuse(name: str, reason: str, remedy: str) -> ProgramError:
    return ProgramError(f'site "{name}" is left out by the guide, and cannot be completed: {reason}. {remedy}')


def check_enumerated(name: str, site: Any) -> None:
    """Refuse a site to be enumerated that cannot be summed out cell by cell.

    Raises
    ------
    ProgramError
    """
    plates = [f.name for f in site["cond_indep_stack"]]
    if "cells" not in plates:
        raise ProgramError(
            f'site "{name}" is to be enumerated, but is one for all cells: '
            "only sites in the plate of cells are summed out"
        )
    if len(plates) > 1:
        raise ProgramError(
            f'site "{name}" is to be enumerated, but stands in plates {plates}: only sites with one value a cell are '
            "summed out. Write the mixture as one distribution (dist.MixtureSameFamily), or the plate as several sites"
        )


def survey(draw: Callable[[], poutine.Trace], missing: list[str]) -> list[Latent]:
    """What the model draws at these sites.

    Parameters
    ----------
    draw : one run of the model on made-up cells with counts, from its prior

    Raises
    ------
    ProgramError
        If a site is of a kind that cannot be guided.
    """
    with torch.enable_grad():  # for once, to see which bounds of supports are learned
        traces = [draw()]
    traces += [draw() for _ in range(_DRAWS - 1)]
    return [_surveyed(name, [trace.nodes[name] for trace in traces]) for name in missing]


def _surveyed(name: str, sites: list[Any]) -> Latent:
    site = sites[0]
    fn, law = site["fn"], law_of(site["fn"])
    by_hand = f'Draw "{name}" in the guide yourself, or write the story without it.'
    if law in _PERIODIC:
        raise _refuse(name, f"{law} is periodic, and a normal on the line would run around the circle", by_hand)
    support = _support(fn)
    if support.is_discrete and site["infer"].get("enumerate"):
        found = site["infer"]["enumerate"]
        reason = (
            f'enumerate="{found}" is not known here'
            if found != "parallel"
            else f"{law} has no finite list of values to sum over"
        )
        raise _refuse(name, reason, 'Sites with few values are summed out by infer={"enumerate": "parallel"}.')
    if support.is_discrete:
        raise _refuse(
            name,
            f"{law} is discrete, and has no gradient",
            'Sum it out: pyro.sample(..., infer={"enumerate": "parallel"}) for a site of each cell with few values.',
        )
    if any(isinstance(b, Tensor) and b.requires_grad for b in _bounds(support)):
        raise _refuse(name, f"the support of {law} moves with learned numbers", by_hand)
    if site["mask"] is not None or float(torch.as_tensor(site["scale"]).max()) != 1.0:
        raise _refuse(name, "it is drawn under a mask or scale handler, which its KL term would not follow", by_hand)
    first = [torch.as_tensor(b).detach() for b in _bounds(support)]
    if any(
        not torch.equal(b, torch.as_tensor(o)) for other in sites for b, o in zip(first, _bounds(_support(other["fn"])))
    ):
        raise _refuse(name, f"the support of {law} depends on another site", by_hand)
    n_cells = site["fn"].batch_shape[-1] if any(f.name == "cells" for f in site["cond_indep_stack"]) else None
    support = _settled(support, n_cells)
    if support is None:
        raise _refuse(name, f"the support of {law} differs from cell to cell", by_hand)
    try:
        transform = biject_to(support)
    except NotImplementedError as error:
        raise _refuse(name, f"there is no map from the real line to its support ({support})", by_hand) from error
    frames = [f for f in site["cond_indep_stack"] if f.name != "cells"]
    in_cells = len(frames) < len(site["cond_indep_stack"])
    if in_cells and (not fn.batch_shape or any(f.dim == -1 for f in frames)):
        raise _refuse(name, "the plate of cells must be the last batch dimension (dim -1) of its sites", by_hand)
    free = torch.stack([transform.inv(other["value"].detach().double()) for other in sites])
    if in_cells:  # all cells are alike to the prior: (draws, batch, cells, event) to (draws x cells, batch, event)
        free = free.movedim(len(fn.batch_shape), 1).flatten(0, 1)
    free = free.nan_to_num(0.0, 0.0, 0.0)
    low, centre, high = free.quantile(free.new_tensor([0.25, 0.5, 0.75]), 0)
    return Latent(
        name, law, in_cells, tuple((f.name, f.size, f.dim) for f in frames),
        tuple(fn.batch_shape[:-1] if in_cells else fn.batch_shape), tuple(fn.event_shape), support,
        centre.float(), ((high - low) / 1.349).clamp(1e-3, 1e3).float(),
    )  # fmt: skip


def family(loc: Tensor, scale: Tensor, support: Any) -> Any:
    """A normal over the reals mapped to a support, with the support's event dimensions."""
    plain, event_dim = plain_support(support), support.event_dim
    if any(isinstance(b, Tensor) for b in _bounds(support)):
        support = _rebuilt(support, [b.to(loc) for b in _bounds(support)])
    if plain is constraints.real:
        return dist.Normal(loc, scale).to_event(event_dim)
    if plain in (constraints.positive, constraints.nonnegative):
        return dist.LogNormal(loc, scale).to_event(event_dim)
    return dist.TransformedDistribution(dist.Normal(loc, scale), biject_to(support))


# ---- the guides -----------------------------------------------------------------------------


# Unit of locations of loadings. Their posteriors are narrow and start near to where they end; at a unit of 1 the first
# steps shook them apart before the encoder could read them. Planted programmes were found with a cosine of 0.84 at 1,
# 0.94 at 0.3 and 0.96 at 0.1 and 0.03 (two data sets), the ELBO being best at 0.1.
_LOADINGS_UNIT = 0.1


class GlobalGuide(nn.Module):
    """A mean-field normal on the unconstrained scale, with a location and a log sd for each number.

    Starts at the prior's median with a tenth of its sd; sites "dispersion" and "rho" at the data's moments,
    "loadings" at principal components.
    """

    def __init__(self, site: Latent) -> None:
        super().__init__()
        self.site = site
        self.unit = (
            _LOADINGS_UNIT if site.name == "loadings" else 1.0
        )  # of locations: what a step of training is a share of
        # Of log sds: those of logs of loadings, which may be near 0, ran off before the KL term counted.
        self.scale_unit = self.unit if _is_positive(site.support) else 1.0
        self.loc = nn.Parameter(site.centre / self.unit)
        self.log_scale = nn.Parameter((0.1 * site.spread).log() / self.scale_unit)

    def start(self, cells: Cells) -> None:
        """Set location and scale from moments, where the site's name says what it is."""
        name, shape, plain = self.site.name, self.site.event_shape, plain_support(self.site.support)
        positive = plain in (constraints.positive, constraints.nonnegative)
        if name == "loadings" and not self.site.batch_shape and len(shape) == 2 and shape[0] == cells.n_genes:
            found = principal_loadings(cells, shape[1])
            if positive:
                found = (found * found.pow(3).sum(0).sign()).clamp(min=0.01).log()
            with torch.no_grad():
                self.loc.copy_(found / self.unit)
                self.log_scale.fill_(math.log(0.3 if positive else 0.05) / self.scale_unit)
        if self.site.batch_shape or shape[-1:] != (cells.n_genes,):
            return
        loc = scale = None
        if name == "dispersion" and positive:
            loc, scale = moments(cells), torch.tensor(0.1)
        elif name == "rho":
            counts = cells.gene_sums().counts
            if plain is constraints.simplex:
                share = (counts + 1) / (counts + 1).sum()
                loc = biject_to(self.site.support).inv(share)
                # A stick of a Dirichlet is a Beta(a, b), whose logit has variance about 1/a + 1/b.
                rest = (counts + 1).flip(0).cumsum(0).flip(0)
                scale = (1 / (counts + 1)[:-1] + 1 / rest[1:]).sqrt()
            elif positive:
                loc = ((counts + 0.1) / cells.depth.double().sum()).log()
                scale = 1 / (counts + 1).sqrt()
        if loc is not None and scale is not None:
            with torch.no_grad():
                self.loc.copy_(loc.expand_as(self.loc))
                self.log_scale.copy_(scale.log().expand_as(self.log_scale))

    def law(self) -> Any:
        """The guide's distribution."""
        return family(self.unit * self.loc, (self.scale_unit * self.log_scale).exp(), self.site.support)

    def draw(self, cells: Cells) -> None:
        """Draw the site, inside the plates the model draws it in."""
        with _plates(self.site):
            pyro.sample(self.site.name, self.law())


class LocalGuide(nn.Module):
    """An amortised normal on the unconstrained scale: a head on features and the log total count.

    The log total joins past the encoder's norm, which removes the scale of its input. Locations and scales are in
    units of the prior's; ``library`` starts at the observed total.
    """

    def __init__(self, site: Latent, n_features: int, schema: Schema) -> None:
        super().__init__()
        self.site = site
        numbers = max(site.centre.numel(), 1)
        self.loc = nn.Linear(n_features + 1, numbers)
        self.log_variance = nn.Linear(n_features + 1, numbers)
        means, sds = torch.tensor(schema.log_library_mean), torch.tensor(schema.log_library_sd)
        self.depth_mean = float(means.mean())
        self.depth_sd = max(float((sds.square().mean() + means.var(correction=0)).sqrt()), 0.1)
        centre, spread = site.centre.reshape(-1), site.spread.reshape(-1)
        if site.name == "library" and site.support.event_dim <= 1 and numbers == 1 and _is_positive(site.support):
            centre, spread = torch.full_like(centre, self.depth_mean), torch.ones_like(spread)
            for head, bias in ((self.loc, 0.0), (self.log_variance, 2 * math.log(0.1))):
                nn.init.zeros_(head.weight)
                nn.init.constant_(head.bias, bias)
            with torch.no_grad():
                self.loc.weight[0, -1] = self.depth_sd
        self.register_buffer("centre", centre.clone())
        self.register_buffer("spread", spread.clone())

    def law(self, cells: Cells, features: Tensor) -> Any:
        """The guide's distribution for these cells."""
        depth = (cells.library.clamp(min=0.5).log() - self.depth_mean) / self.depth_sd
        hidden = torch.cat([features, depth], -1)
        loc = self.centre + self.spread * self.loc(hidden)
        scale = self.spread * (self.log_variance(hidden).exp() + 1e-6).sqrt()
        return family(self._shaped(loc), self._shaped(scale), self.site.support)

    def _shaped(self, values: Tensor) -> Tensor:
        """(n, numbers) as (batch, n, event), the cells last of the batch dimensions."""
        free = self.site.centre.shape
        n_batch = len(self.site.batch_shape)
        return values.view(len(values), *free).movedim(0, n_batch)

    def draw(self, cells: Cells, features: Tensor) -> None:
        """Draw the site in the plate of cells, and in the others the model draws it in."""
        with cells.plate(), _plates(self.site):
            pyro.sample(self.site.name, self.law(cells, features))


def _is_positive(support: Any) -> bool:
    return plain_support(support) in (constraints.positive, constraints.nonnegative)


def _plates(site: Latent) -> ExitStack:
    stack = ExitStack()
    for name, size, dim in site.frames:
        stack.enter_context(pyro.plate(name, size, dim=dim))
    return stack


class Completion(nn.Module):
    """Guides of the sites that the guide function leaves out, by site.

    encoder : a network of its own, where sites of cells are completed and the story has no part "encoder"
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites = Parts()
        self.encoder: Encoder | None = None

    @property
    def guides(self) -> list[Any]:
        """The guides, globals first."""
        return list(self.sites.values())

    @property
    def names(self) -> list[str]:
        """Completed sites, globals first."""
        return [guide.site.name for guide in self.guides]

    def settle(
        self,
        sites: list[Latent],
        schema: Schema,
        parts: Mapping[str, nn.Module],
        blank: Cells,
        is_wanted: bool,
    ) -> None:
        """Guides for these sites; those that were there for the same kind of site keep their weights.

        ``is_wanted`` says whether a function of the story asks for the part "encoder" itself.
        """
        held = dict(self.sites.items())
        own = self.encoder
        given = parts.get("encoder")
        if any(site.in_cells for site in sites) and not _reads(given):
            if given is not None and not is_wanted:
                raise ProgramError(
                    f'part "encoder" ({type(given).__name__}) is to guide '
                    f"{[s.name for s in sites if s.in_cells]}, and has no "
                    "features(log1p_counts, covariates) to read cells with: give it that method, or leave it out"
                )
            if own is None:
                own = Encoder(None)
                own.build(schema, {}, {})
                own.to(blank.library)
        else:
            own = None
        self.encoder, encoder = own, own if own is not None else given
        self.sites = Parts()
        for site in sorted(sites, key=lambda s: s.in_cells):
            n_features = _features(encoder, blank).shape[-1] if site.in_cells else 0
            old: Any = held.get(site.name)
            same = old is not None and old.site.like == site.like
            if same and isinstance(old, LocalGuide):
                same = old.loc.in_features == n_features + 1
            if not same:
                old = LocalGuide(site, n_features, schema) if site.in_cells else GlobalGuide(site)
            self.sites[site.name] = old

    def global_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the guides of global sites, which take a learning rate of their own."""
        for guide in self.guides:
            if isinstance(guide, GlobalGuide):
                yield from guide.parameters()

    def start(self, cells: Cells) -> None:
        """Set new guides of global sites from data; once for each."""
        for guide in self.guides:
            if isinstance(guide, GlobalGuide) and not getattr(guide, "started", False):
                guide.start(cells)
            guide.started = True

    def draw_globals(self, cells: Cells) -> None:
        """Draw the completed global sites."""
        for guide in self.guides:
            if isinstance(guide, GlobalGuide):
                guide.draw(cells)

    def draw_locals(self, cells: Cells, encoder: nn.Module | None) -> None:
        """Draw the completed sites of cells."""
        own = [guide for guide in self.guides if isinstance(guide, LocalGuide)]
        if own:
            features = _features(self.encoder if self.encoder is not None else encoder, cells)
            for guide in own:
                guide.draw(cells, features)


def _reads(encoder: nn.Module | None) -> bool:
    return encoder is not None and (hasattr(encoder, "read") or hasattr(encoder, "features"))


def _features(encoder: Any, cells: Cells) -> Tensor:
    return encoder.read(cells) if hasattr(encoder, "read") else encoder.features(cells.log1p(), None)
