"""Likelihoods: how counts scatter around their mean.

Called as ``likelihood(mean, dispersion=None, hidden=None)`` with mean (..., n, G); answers a
distribution with ``event_dim`` 1. With ``exposure=`` (n, 1), the mean is that of one unit of it: `models.poissonvi`
hands over shares and totals like this, so that they need not be multiplied out. One of your own is a class of a few
lines:

    class PoissonLikelihood(Part):
        def forward(self, mean, dispersion=None, hidden=None):
            return Poisson(mean).to_event(1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .distributions import NegativeBinomial, Poisson, Presence, ZeroInflatedNegativeBinomial
from .errors import ProgramError
from .parts import Part
from .schema import Schema


def _needed(dispersion: Tensor | None, name: str) -> Tensor:
    if dispersion is None:
        raise ProgramError(
            f"{name} needs a dispersion and was given none: hand the story one, dispersion=GeneDispersion(), "
            "or another likelihood, likelihood=PoissonLikelihood()"
        )
    return dispersion


def _exposed(mean: Tensor, exposure: Tensor | None) -> Tensor:
    return mean if exposure is None else exposure * mean


class NBLikelihood(Part):
    """Negative binomial: variance mean + mean^2 / dispersion."""

    def forward(
        self,
        mean: Tensor,
        dispersion: Tensor | None = None,
        hidden: Tensor | None = None,
        exposure: Tensor | None = None,
    ) -> Any:
        return NegativeBinomial(_exposed(mean, exposure), _needed(dispersion, "NBLikelihood")).to_event(1)


class ZINBLikelihood(Part):
    """Negative binomial with extra zeros.

    The log odds of an extra zero are linear in the decoder's last hidden layer, or one number
    a gene where the decoder shows none.
    """

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_hidden",)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        # Extra zeros start rare (12 %): UMI counts have few, and a gate at one half has to be unlearned.
        if "n_hidden" in sizes:
            self.gate = nn.Linear(sizes["n_hidden"], schema.n_genes)
            nn.init.constant_(self.gate.bias, -2.0)
        else:
            self.gate_logits = nn.Parameter(torch.full((schema.n_genes,), -2.0))

    def forward(
        self,
        mean: Tensor,
        dispersion: Tensor | None = None,
        hidden: Tensor | None = None,
        exposure: Tensor | None = None,
    ) -> Any:
        if hasattr(self, "gate_logits"):
            gate = self.gate_logits
        elif hidden is None:
            raise ProgramError(
                "the story's decoder has a hidden layer, but does not pass it on: likelihood(..., hidden)"
            )
        else:
            gate = self.gate(hidden)
        mean, dispersion = _exposed(mean, exposure), _needed(dispersion, "ZINBLikelihood")
        return ZeroInflatedNegativeBinomial(mean, dispersion, gate).to_event(1)


class PoissonLikelihood(Part):
    """Poisson: variance equal to the mean. Ignores dispersion and hidden layer."""

    def forward(
        self,
        mean: Tensor,
        dispersion: Tensor | None = None,
        hidden: Tensor | None = None,
        exposure: Tensor | None = None,
    ) -> Any:
        return Poisson(mean, exposure=exposure).to_event(1)


class BernoulliLikelihood(Part):
    """For counts that were cut to 0 and 1: P(1) = 1 - exp(-mean), the mean that of the counts behind.

    The same decoder then says what `PoissonLikelihood` would, learned from less; see `distributions.Presence`.
    Ignores dispersion and hidden layer.
    """

    def forward(
        self,
        mean: Tensor,
        dispersion: Tensor | None = None,
        hidden: Tensor | None = None,
        exposure: Tensor | None = None,
    ) -> Any:
        return Presence(mean, exposure=exposure).to_event(1)
