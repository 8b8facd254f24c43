"""Corrections: what is added to the guide's guess of single cells, so that it is as good as its family allows.

An encoder guesses every cell's posterior by one network. For a cell n that was refined (`refinement`), the guess of
its latent numbers, Normal(m, diag s^2) on the real line, becomes

    Normal(m + s shift[n], diag(s) F[n] F[n]' diag(s)),    F[n] = diag(exp log_scale[n]) + lower[n]

with ``lower`` zero, or strictly lower triangular for a full covariance. Cells are known by their counts and columns,
which is all that their posterior depends on.
"""

from __future__ import annotations

import warnings
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .cells import Cells
from .encoders import FullRankNormal
from .errors import PyroscWarning
from .guides import is_computed

FAMILIES = ("normal", "full")


def cell_keys(cells: Cells) -> Tensor:
    """(n,) a number that two cells share only if their counts, totals and columns are the same (but for 1 in 2^64)."""
    x: Any = cells.x
    draw = torch.Generator().manual_seed(1)

    def hashed(values: Tensor) -> Tensor:
        odd = torch.randint(-(2**62), 2**62, (values.shape[-1],), generator=draw) * 2 + 1
        return (values * odd.to(values.device)).sum(-1)

    numbers = [cells.library, *(v.unsqueeze(-1) for _, v in sorted(cells.values.items()))]
    numbers += [] if cells.size_factor is None else [cells.size_factor.reshape(len(cells), -1)]
    codes = [v.long().unsqueeze(-1) for _, v in sorted(cells.codes.items())]
    found = hashed(x.long())
    for value in [torch.cat([n.double() for n in numbers], -1).view(torch.int64), *codes]:
        found = found * 31 + hashed(value)
    return found


def corrected(law: Any, n_batch: int, shift: Tensor, log_scale: Tensor, lower: Tensor | None) -> Any:
    """The law with corrections of its numbers on the real line, each (n, d); ``lower`` (n, d, d).

    A full covariance is that of one event; maps from the real line stay as they are.

    Raises
    ------
    NotImplementedError
        If it is no normal, nor made from one.
    """
    if isinstance(law, FullRankNormal):
        return FullRankNormal(law.loc + (law.scale_tril @ shift.unsqueeze(-1)).squeeze(-1),
                              scale_tril=law.scale_tril @ _factor(log_scale, lower))  # fmt: skip
    if isinstance(law, torch.distributions.Independent):
        base, n_events = law.base_dist, law.reinterpreted_batch_ndims
        if lower is not None and type(base) is dist.Normal and n_events == 1:
            factor = base.scale.unsqueeze(-1) * _factor(log_scale, lower)
            return FullRankNormal(base.loc + base.scale * shift, scale_tril=factor)
        return corrected(base, n_batch, shift, log_scale, lower).to_event(n_events)
    if type(law) in (dist.Normal, dist.LogNormal):
        shape = law.loc.shape[n_batch - 1 :]
        shift, log_scale = shift.reshape(shape), log_scale.reshape(shape)
        return type(law)(law.loc + law.scale * shift, law.scale * log_scale.exp())
    if isinstance(law, torch.distributions.TransformedDistribution) and not isinstance(law, dist.LogNormal):
        return dist.TransformedDistribution(corrected(law.base_dist, n_batch, shift, log_scale, lower), law.transforms)
    raise NotImplementedError(type(law).__name__)


def standardised(law: Any, value: Tensor) -> Tensor:
    """(..., n, d) the numbers on the real line behind values of a law, less its location and by its scale.

    In them the law is N(0, I), and corrections of it are N(shift, F F').
    """
    n_batch = len(law.batch_shape)
    while True:
        if isinstance(law, FullRankNormal):
            apart = (value - law.loc).unsqueeze(-1)
            return torch.linalg.solve_triangular(law.scale_tril, apart, upper=False).squeeze(-1)
        if isinstance(law, torch.distributions.Independent):
            law = law.base_dist
        elif type(law) in (dist.Normal, dist.LogNormal):
            value = (value if type(law) is dist.Normal else value.log()).sub(law.loc).div(law.scale)
            return value.reshape(*value.shape[:n_batch], -1)
        elif isinstance(law, torch.distributions.TransformedDistribution):
            for transform in reversed(law.transforms):
                value = transform.inv(value)
            law = law.base_dist
        else:
            raise NotImplementedError(type(law).__name__)


def _factor(log_scale: Tensor, lower: Tensor | None) -> Tensor:
    factor = torch.diag_embed(log_scale.exp())
    return factor if lower is None else factor + lower.tril(-1)


def numbers_of(law: Any) -> int:
    """How many numbers of the real line each cell has in a law of batch (n,).

    Raises
    ------
    NotImplementedError
        If it is no normal, nor made from one.
    """
    if isinstance(law, FullRankNormal) or type(law) in (dist.Normal, dist.LogNormal):
        return int(law.loc.shape[1:].numel())
    if isinstance(law, torch.distributions.Independent | torch.distributions.TransformedDistribution):
        return numbers_of(law.base_dist)
    raise NotImplementedError(type(law).__name__)


class Corrections(nn.Module):
    """The corrections of some cells, by site.

    Parameters
    ----------
    sizes : numbers of each site
    family : "normal" or "full"
    n_cells : rows to make room for
    """

    keys: Tensor  # (N,) sorted

    def __init__(self, sizes: dict[str, int], family: str, n_cells: int) -> None:
        super().__init__()
        self.sizes, self.family = dict(sizes), family
        self.register_buffer("keys", torch.zeros(n_cells, dtype=torch.int64))
        for name, size in sizes.items():
            self.register_buffer(f"{name}_shift", torch.zeros(n_cells, size))
            self.register_buffer(f"{name}_log_scale", torch.zeros(n_cells, size))
            if family == "full":
                self.register_buffer(f"{name}_lower", torch.zeros(n_cells, size, size))

    def __len__(self) -> int:
        return len(self.keys)

    def of_site(self, name: str) -> list[Any]:
        """shift (N, d), log_scale (N, d), lower (N, d, d) or None."""
        return [getattr(self, f"{name}_{what}", None) for what in ("shift", "log_scale", "lower")]

    def sorted(self) -> Corrections:
        """The same, in the order of keys, each once."""
        order = self.keys.argsort(stable=True)
        keys = self.keys[order]
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        new = Corrections(self.sizes, self.family, int(first.sum()))
        for name, value in self.named_buffers():
            setattr(new, name, value[order[first]])
        return new

    def of(self, cells: Cells) -> Correcting:
        """A handler for a run of the guide on these cells."""
        keys = cell_keys(cells)
        place = torch.searchsorted(self.keys, keys).clamp(max=max(len(self) - 1, 0))
        known = self.keys[place] == keys if len(self) else torch.zeros_like(keys, dtype=torch.bool)
        if not bool(known.all()):
            warnings.warn(
                "some of these cells were not refined, and have the encoder's guess; fit.refine(cells) refines them",
                PyroscWarning, stacklevel=2,
            )  # fmt: skip
        return Correcting({name: [_rows(value, place, known) for value in self.of_site(name)] for name in self.sizes})


def _rows(values: Tensor | None, place: Tensor, known: Tensor) -> Tensor | None:
    if values is None:
        return None
    return values[place] * known.reshape(-1, *(1,) * (values.dim() - 1)).to(values)


class Correcting(Messenger):
    """Around a guide: draws of these sites are from the corrected laws."""

    def __init__(self, numbers: dict[str, list[Any]]) -> None:
        super().__init__()
        self.numbers = numbers

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.numbers and not msg["is_observed"] and not site_is_subsample(msg):
            msg["fn"] = corrected(msg["fn"], len(msg["fn"].batch_shape), *self.numbers[msg["name"]])


def is_wide(site: Any) -> bool:
    """Whether a site is one that `Widening` widens: latent, of a cell, a normal or made from one."""
    if site["is_observed"] or site_is_subsample(site) or is_computed(site):
        return False
    if all(f.name != "cells" for f in site["cond_indep_stack"]):
        return False
    law = site["fn"]
    while isinstance(law, torch.distributions.Independent | torch.distributions.TransformedDistribution):
        if type(law) is dist.LogNormal:
            return True
        law = law.base_dist
    return isinstance(law, FullRankNormal) or type(law) is dist.Normal


def widened(law: Any, width: float) -> Any:
    """A normal, or what is made from one, with ``width`` times its sd on the real line."""
    if isinstance(law, FullRankNormal):
        return FullRankNormal(law.loc, scale_tril=law.scale_tril * width, validate_args=False)
    if isinstance(law, torch.distributions.Independent):
        return widened(law.base_dist, width).to_event(law.reinterpreted_batch_ndims)
    if type(law) in (dist.Normal, dist.LogNormal):
        return type(law)(law.loc, law.scale * width, validate_args=False)
    return dist.TransformedDistribution(widened(law.base_dist, width), law.transforms, validate_args=False)


class Widening(Messenger):
    """Around a guide: sites of cells that are normals, or made from them, are drawn from ones so many times as wide."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def _pyro_sample(self, msg: Any) -> None:
        if self.width != 1 and is_wide(msg):
            msg["fn"] = widened(msg["fn"], self.width)
