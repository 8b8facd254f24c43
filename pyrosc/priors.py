"""Priors: what was believed of a quantity before the counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from .parts import Part
from .schema import Schema

# The distributions that a file may name.
DISTRIBUTIONS: dict[str, type] = {
    name: value
    for name, value in vars(dist).items()
    if isinstance(value, type) and issubclass(value, TorchDistributionMixin) and name != "TorchDistribution"
}


class Prior(Part):
    """Any distribution of Pyro as a part: ``Prior(dist.Laplace, 0.0, 1.0)``.

    Parameters
    ----------
    distribution : class of ``pyro.distributions``
    *numbers : float or tensor
        Its parameters, in order; fixed, not learned.
    size : for a scalar distribution, how many independent numbers are drawn
        None takes ``n_latent`` where this is the part called "prior", and 1 elsewhere.

    Notes
    -----
    Called, it answers a distribution with ``event_dim`` 1: independent numbers, or the
    vector distribution (a Dirichlet) itself.

    >>> Prior(dist.LogNormal, 7.0, 1.0, size=1)().event_shape
    torch.Size([1])
    """

    def __init__(self, distribution: Any, *numbers: Any, size: int | None = None) -> None:
        name = getattr(distribution, "__name__", str(distribution))
        if not (isinstance(distribution, type) and hasattr(distribution, "log_prob")):
            raise ValueError(f"Prior takes a distribution class, such as dist.Laplace, not {distribution!r}")
        super().__init__(distribution=name, shapes=[list(torch.as_tensor(v).shape) for v in numbers], size=size)
        self.distribution, self.size = distribution, size
        self.n_numbers = len(numbers)
        for i, value in enumerate(numbers):
            self.register_buffer(f"number{i}", torch.as_tensor(value, dtype=torch.get_default_dtype()).clone())
        event = self._made().event_shape
        if len(event) > 1:
            raise ValueError(f"a prior draws a vector; {name} draws an array of shape {tuple(event)}")
        self.is_scalar = not event
        self.is_latent = False  # whether its size was left open and taken from n_latent

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent",) if self.is_latent else ()

    @classmethod
    def from_arguments(cls, distribution: str, shapes: list[list[int]], size: int | None, **numbers: Tensor) -> Prior:
        """The prior that a file describes; its numbers are among the file's tensors."""
        return cls(DISTRIBUTIONS[distribution], *(numbers[f"number{i}"] for i in range(len(shapes))), size=size)

    def _made(self) -> Any:
        try:
            made = self.distribution(*(getattr(self, f"number{i}") for i in range(self.n_numbers)))
        except (TypeError, ValueError) as error:
            numbers = ", ".join(str(getattr(self, f"number{i}").tolist()) for i in range(self.n_numbers))
            raise ValueError(f"Prior({self.arguments['distribution']}, {numbers}): {error}") from error
        return made

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        if self.size is None and self.is_scalar:
            numbers = max((getattr(self, f"number{i}").numel() for i in range(self.n_numbers)), default=1)
            self.is_latent = parts.get("prior") is self and numbers == 1
            open_size = sizes.get("n_latent", 1) if self.is_latent else 1
            self.size = self.arguments["size"] = numbers if numbers > 1 else open_size

    def forward(self) -> Any:
        made = self._made()
        return made.expand([self.size or 1]).to_event(1) if self.is_scalar else made

    def extra_repr(self) -> str:
        numbers = "".join(
            f", {v.item():g}" if (v := getattr(self, f"number{i}")).numel() == 1 else f", {tuple(v.shape)}"
            for i in range(self.n_numbers)
        )
        return f"{self.arguments['distribution']}{numbers}, size={self.size}"
