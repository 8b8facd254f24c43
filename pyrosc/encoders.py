"""Encoders whose guide is more than independent normals, and what a story's guide asks of any encoder.

    Encoder           q(z | x) = Normal(m(x), diag s(x)^2)
    FullRankEncoder   q(z | x) = Normal(m(x), L(x) L(x)')            latents that depend on each other
    FlowEncoder       z = m(x) + s(x) f(e; x),  e ~ Normal(0, I)     skewed ones too

All start as independent normals, and any can stand where a story takes ``encoder=``. An encoder of one's own answers
(loc, scale), and where it knows better, a distribution by ``law(cells)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from torch import Tensor, nn
from torch.distributions import Independent, register_kl

from .cells import Cells
from .networks import Encoder
from .parts import whole
from .schema import Schema


def state_law(encoder: Any, cells: Cells) -> Any:
    """The guide's law of each cell's state: the encoder's own ``law(cells)``, else normals of its (loc, scale)."""
    if hasattr(encoder, "law"):
        return encoder.law(cells)
    loc, scale = encoder(cells)
    return dist.Normal(loc, scale).to_event(1)


class FullRankNormal(dist.MultivariateNormal):
    """A normal by its mean and Cholesky factor, whose KL from independent normals has a closed form."""


@register_kl(FullRankNormal, Independent)
def _kl_from_independent(q: FullRankNormal, p: Any) -> Tensor:
    """KL(N(m, L L') || N(m0, diag s0^2)), summed over the event."""
    base = p.base_dist
    while isinstance(base, Independent):
        base = base.base_dist
    if not isinstance(base, torch.distributions.Normal) or len(p.event_shape) != 1:
        raise NotImplementedError
    tril = q.scale_tril
    variance = tril.square().sum(-1) + (q.loc - base.loc).square()
    log_ratio = base.scale.log() - tril.diagonal(dim1=-2, dim2=-1).log()
    return (log_ratio + 0.5 * variance / base.scale.square() - 0.5).sum(-1)


class FullRankEncoder(Encoder):
    """log(1 + counts) to a normal over z with a full covariance matrix.

    Use it where `check.summary` finds latents that depend on each other given the counts: the family of independent
    normals then understates their sds. K (K - 1) / 2 numbers a cell more.

    Parameters
    ----------
    as `Encoder`, with ``n_latent`` of at least 2

    Notes
    -----
    Answers (loc, marginal sd), each (n, K), and ``law(cells)``. L = diag(s) (I + A), A strictly lower triangular and
    zero at the start. The KL from independent normals is analytic.
    """

    def __init__(self, n_latent: int = 10, *args: Any, **options: Any) -> None:
        if whole("n_latent", n_latent) < 2:
            raise ValueError("a covariance needs n_latent of at least 2, not 1: Encoder(1)")
        super().__init__(n_latent, *args, **options)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        super().build(schema, sizes, parts)
        k = self.arguments["n_latent"]
        self.lower = nn.Linear(self.arguments["n_hidden"], k * (k - 1) // 2)
        nn.init.zeros_(self.lower.weight)
        nn.init.zeros_(self.lower.bias)

    def tril(self, hidden: Tensor, scale: Tensor) -> Tensor:
        """(..., K, K) Cholesky factor of the covariance, from the last hidden layer and s."""
        k = scale.shape[-1]
        row, column = torch.tril_indices(k, k, -1, device=scale.device)
        unit = torch.eye(k, dtype=scale.dtype, device=scale.device).expand(*scale.shape, k).clone()
        unit[..., row, column] = self.lower(hidden)
        return scale.unsqueeze(-1) * unit

    def law(self, cells: Cells) -> FullRankNormal:
        """The normal of each cell's state, batch (n,), event (K,)."""
        hidden = self.read(cells)
        loc, scale = self.moments(hidden)
        return FullRankNormal(loc, scale_tril=self.tril(hidden, scale))

    def forward(self, cells: Cells) -> tuple[Tensor, Tensor]:
        law = self.law(cells)
        return law.loc, law.scale_tril.square().sum(-1).sqrt()


class FlowEncoder(Encoder):
    """log(1 + counts) to a normal over z that learned maps bend, given the counts.

    Use it where draws of the guide and of a sampler differ in shape, not only in width. Its KL terms are Monte Carlo,
    and posterior means are those of draws.

    Parameters
    ----------
    n_layers_flow : coupling layers (Dinh et al. 2017, "Density estimation using Real NVP"), each followed by a
        reversal of the dimensions
    n_hidden_flow : width of the network in each
    the others : as `Encoder`, with ``n_latent`` of at least 2

    Notes
    -----
    Answers (m, s), each (n, K), those of the normal before it is bent, and ``law(cells)``.
    """

    reversal: Tensor  # (K,) positions, last to first

    def __init__(
        self, n_latent: int = 10, *args: Any, n_layers_flow: int = 4, n_hidden_flow: int = 32, **options: Any
    ) -> None:
        if whole("n_latent", n_latent) < 2:
            raise ValueError("a flow couples latents and needs n_latent of at least 2, not 1: Encoder(1)")
        super().__init__(n_latent, *args, **options)
        self.arguments |= {
            "n_layers_flow": whole("n_layers_flow", n_layers_flow),
            "n_hidden_flow": whole("n_hidden_flow", n_hidden_flow),
        }

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        super().build(schema, sizes, parts)
        a = self.arguments
        k = a["n_latent"]
        self.flow = nn.ModuleList(
            transforms.conditional_affine_coupling(k, a["n_hidden"], hidden_dims=[a["n_hidden_flow"]])
            for _ in range(a["n_layers_flow"])
        )
        layer: Any
        for layer in self.flow:
            last = layer.nn.layers[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.register_buffer("reversal", torch.arange(k - 1, -1, -1))

    def law(self, cells: Cells) -> Any:
        """The law of each cell's state, batch (n,), event (K,)."""
        hidden = self.read(cells)
        loc, scale = self.moments(hidden)
        steps: list[Any] = []
        layer: Any
        for layer in self.flow:
            steps += [layer.condition(hidden), transforms.Permute(self.reversal)]
        steps.append(transforms.AffineTransform(loc, scale, event_dim=1))
        base = dist.Normal(torch.zeros_like(loc), torch.ones_like(scale)).to_event(1)
        return dist.TransformedDistribution(base, steps)
