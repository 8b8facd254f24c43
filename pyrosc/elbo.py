"""The evidence lower bound of each cell, and the weight of its KL terms in training.

ELBO = E_q[log p(x | latents)] - sum over latent sites of KL(q || p)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .cells import Cells
from .program import Program, analytic_kl, is_computed


def in_cells(site: Any) -> bool:
    """Whether a site is drawn for each cell."""
    return any(f.name == "cells" for f in site["cond_indep_stack"])


def kl(guide_site: Any, model_site: Any) -> Tensor:
    """KL term of one latent site, of its batch shape: in closed form, else log q - log p at the draw."""
    closed = analytic_kl(guide_site["fn"], model_site["fn"])
    if closed is not None:
        return closed
    value = guide_site["value"]
    return guide_site["fn"].log_prob(value) - model_site["fn"].log_prob(value)


@dataclass
class Terms:
    """The terms of an ELBO at KL weight 1, from one draw of the guide.

    reconstruction : (n,) log density of what was observed
    local_kl : site -> (n,)
    global_kl : site -> ()  once for the whole data set
    z_mean : (n, K) the guide's mean of z, None where there is no closed one
    """

    reconstruction: Tensor
    local_kl: dict[str, Tensor] = field(default_factory=dict)
    global_kl: dict[str, Tensor] = field(default_factory=dict)
    z_mean: Tensor | None = None

    @property
    def local(self) -> Tensor:
        """(n,) nats: reconstruction less the KL of the cell's own sites."""
        return self.reconstruction - sum(self.local_kl.values(), torch.zeros_like(self.reconstruction))


def elbo_terms(program: Program, cells: Cells) -> Terms:
    """Terms of the ELBO of these cells; random through the guide's draw.

    Each is as of one cell: plate scales do not enter.
    """
    guide, model = program.traces(cells)
    drawn: dict[str, Any] = guide.nodes
    nodes: dict[str, Any] = model.nodes
    terms = Terms(cells.library.new_zeros(len(cells)))
    for name, site in nodes.items():
        if site["type"] != "sample" or site_is_subsample(site) or is_computed(site):
            continue
        if site["is_observed"]:
            terms.reconstruction = terms.reconstruction + site["fn"].log_prob(site["value"])
        elif in_cells(site):
            terms.local_kl[name] = kl(drawn[name], site)
        else:
            terms.global_kl[name] = kl(drawn[name], site).sum()
    if "z" in terms.local_kl:
        try:
            terms.z_mean = drawn["z"]["fn"].mean
        except NotImplementedError:
            pass
    return terms


class KLWeight(Messenger):
    """Weighs every latent site, in model and guide alike, and keeps their laws of the last run.

    Around both, the objective becomes reconstruction - weight * KL, for any story; the
    story itself knows nothing of it.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self._sites: dict[str, list[dict[str, Any]]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = self.weight * msg["scale"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            seen = self._sites.setdefault(msg["name"], [])
            seen.append({k: msg[k] for k in ("fn", "value", "cond_indep_stack")})

    def kl_terms(self, total: int) -> dict[str, Tensor]:
        """Nats per cell of each site's KL in the run just done (guide, then model), and forget it."""
        terms = {}
        with torch.no_grad():
            for name, (guide_site, model_site) in self._sites.items():
                term = kl(guide_site, model_site)
                terms[name] = term.mean() if in_cells(model_site) else term.sum() / total
        self._sites = {}
        return terms
