"""What training maximises: Pyro's mean-field ELBO with less to do at each step, and the weight of its KL terms."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .cells import Cells
from .draws import draw_guide, run_model, sites_of
from .elbo import in_cells, kl, of_cells, still, weighed
from .guides import is_computed
from .program import Program, analytic_kl


class MeanFieldELBO(TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO``, faster a step and less noisy.

    Parameters
    ----------
    path_gradients : whether a Monte Carlo KL term has its gradient through the draw alone
        What is left out has mean zero and is noise (Roeder et al. 2017, NeurIPS, "Sticking the landing"). False is
        Pyro's own gradient.
    **options : of ``TraceMeanField_ELBO``

    Notes
    -----
    Equal in value to Pyro's class for any model and guide, and in gradient with ``path_gradients=False``. Left out:
    densities of the guide where a KL term has a closed form, densities of values that were computed and not drawn, and
    every look at a number that would make a GPU wait. Shapes are checked only while Pyro's validation is on.
    """

    def __init__(self, *, path_gradients: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.path_gradients = path_gradients
        self._kl: dict[str, tuple[bool, Tensor]] = {}

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[poutine.Trace, poutine.Trace]:
        if pyro.settings.get("validate_infer") or isinstance(poutine.unwrap(guide), Messenger):
            return super()._get_trace(model, guide, args, kwargs)
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        return poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs), drawn

    def _differentiable_loss_particle(self, model: poutine.Trace, guide: poutine.Trace) -> tuple[Tensor, Tensor]:
        terms: list[Tensor] = []
        drawn: dict[str, Any] = guide.nodes
        nodes: dict[str, Any] = model.nodes
        for name, site in nodes.items():
            if site["type"] != "sample" or site_is_subsample(site) or site["mask"] is False:
                continue
            if site["is_observed"]:
                if not site["infer"].get("_deterministic", False):
                    terms.append(_total(_log_prob(site, site["fn"]), site))
                continue
            guessed = drawn[name]
            closed = analytic_kl(guessed["fn"], site["fn"])
            if closed is not None:
                terms.append(-_total(closed, guessed))
            else:
                log_p, log_q = _log_prob(site, site["fn"]), self._log_guide(guessed)
                terms += [_total(log_p, site), -_total(log_q, guessed)]
                closed = log_q.detach() - log_p.detach()
            self._kl[name] = in_cells(site), closed.detach()
        for name, site in drawn.items():
            if site["type"] == "sample" and name not in nodes and not site_is_subsample(site):
                terms.append(-_total(self._log_guide(site), site))
        loss = -sum(terms[1:], terms[0]) if terms else torch.zeros(())
        return loss.detach(), loss

    def _log_guide(self, site: Any) -> Tensor:
        return _log_prob(site, still(site["fn"]) if self.path_gradients else site["fn"])

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the ELBO, with its gradient; summed over the whole data set."""
        particles = [
            self._differentiable_loss_particle(*traces)[1] for traces in self._get_traces(model, guide, args, kwargs)
        ]
        return particles[0] if self.num_particles == 1 else sum(particles, torch.zeros(())) / self.num_particles

    def kl_terms(self, total: int) -> dict[str, Tensor]:
        """Nats per cell of each site's KL in the last run, at weight 1; of global sites, over ``total`` cells."""
        n = self.num_particles if self.vectorize_particles else 1
        return {
            name: (of_cells(term).mean() if by_cell else term.sum() / total) / n
            for name, (by_cell, term) in self._kl.items()
        }


def _log_prob(site: Any, law: Any) -> Tensor:
    return law.log_prob(site["value"], *site["args"], **site["kwargs"])


def _total(values: Tensor, site: Any) -> Tensor:
    """Sum of a site's densities, masked and weighed as the handlers around it say."""
    scale, mask = site["scale"], site["mask"]
    if isinstance(mask, Tensor):
        values = torch.where(mask, values, 0.0)
    return values.sum() * scale if isinstance(scale, float | int) else (values * scale).sum()


class IWAE:
    """The importance-weighted bound of each cell, log (1/k) sum_s w_s with w_s = p(x, z_s) / q(z_s | x).

    Tighter than the ELBO the larger k is, and kinder to guides that are wider than the posterior: it asks that weights
    be even where they are large, so that draws can be reweighed, where the ELBO asks for narrowness.

    Parameters
    ----------
    k : draws a cell, at least 2

    Notes
    -----
    Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders". Gradients of the guide are doubly
    reparametrised (Tucker et al. 2019, "Doubly reparameterized gradient estimators", eq. 8), whose noise does not grow
    with k, where cells have one latent site of the guide's own beside completed ones, a normal; else those of Burda et
    al. Global sites are drawn once a step; their KL counts as in an ELBO. A weight of the KL terms below 1 raises
    p(z) / q(z) to it.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def __str__(self) -> str:
        return f"IWAE({self.k})"

    def loss(self, program: Program, batch: Cells, weight: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Minus the bound in nats per cell, the KL of each site and the mean log density of counts, per cell."""
        has_front = not program.has_globals
        rows = torch.arange(len(batch), device=batch.device)
        cells = batch if has_front else batch.rows(rows.repeat(self.k), whole=True)
        guide = draw_guide(program, cells, self.k if has_front else None)
        model = run_model(program, guide, cells, self.k if has_front else None)
        drawn: dict[str, Any] = guide.nodes
        nodes: dict[str, Any] = model.nodes
        latent = [n for n in sites_of(model) if not nodes[n]["is_observed"] and not is_computed(nodes[n])]
        own = [name for name in latent if in_cells(nodes[name])]
        laws = {name: still(drawn[name]["fn"]) for name in own}
        doubly = sum(name not in program.completion.names for name in own) <= 1 and all(
            laws[name] is not drawn[name]["fn"] for name in own
        )

        def of_draws(site: Any, law: Any) -> Tensor:
            """(k, n) log densities."""
            values = of_cells(weighed(law.log_prob(site["value"]), site, cells), int(has_front))
            return values if has_front else values.reshape(self.k, -1)

        terms: dict[str, Tensor] = {}
        reconstruction = torch.zeros(())
        shared = torch.zeros(())
        for name in sites_of(model):
            site = nodes[name]
            if is_computed(site):
                continue
            if name in own:
                terms[name] = of_draws(drawn[name], laws[name] if doubly else drawn[name]["fn"]) - of_draws(
                    site, site["fn"]
                )
            elif site["is_observed"] and in_cells(site):
                reconstruction = reconstruction + of_draws(site, site["fn"])
            elif site["is_observed"]:
                shared = shared - weighed(site["fn"].log_prob(site["value"]), site, batch).sum() / batch.total
        log_weights = reconstruction - weight * sum(terms.values(), torch.zeros(()))
        share = log_weights.detach().softmax(0)
        bound = (log_weights.detach().logsumexp(0) - math.log(self.k)).mean()
        loss = -(share * log_weights).sum(0).mean()
        loss = loss - loss.detach() - bound + shared
        kls = {name: term.detach().mean() for name, term in terms.items()}
        for name in latent:
            if name not in own:
                value = kl(drawn[name], nodes[name]).sum() / batch.total
                loss, kls[name] = loss + weight * value, value.detach()
        if doubly:
            # E[w ds log q] = E[(w - w^2) dz log w dz/ds] for shares w of the weights; a KL weight stands before log q.
            share = (1 - weight) + weight * share
            for name in own:
                _weigh_gradient(drawn[name], share if has_front else share.reshape(1, -1), has_front)
        return loss, kls, reconstruction.detach().mean() - shared.detach()


def _weigh_gradient(site: Any, share: Tensor, has_front: bool) -> None:
    """Let the gradient by draws of a site count for their share (k, n), or (1, k n) without draws in front."""
    value = site["value"]
    if not value.requires_grad:
        return
    shape = [1] * value.dim()
    shape[value.dim() - site["fn"].event_dim - 1] = share.shape[1]
    if has_front:
        shape[0] = share.shape[0]
    share = share.reshape(shape)
    value.register_hook(lambda gradient: gradient * share)


class KLWeight(Messenger):
    """Weighs every latent site, in model and guide alike.

    Around both, the objective becomes reconstruction - weight * KL, for any story; the
    story itself knows nothing of it.

    Parameters
    ----------
    keep : whether to keep the laws of the last run, for ``kl_terms``
    """

    def __init__(self, weight: float = 1.0, *, keep: bool = True) -> None:
        super().__init__()
        self.weight, self.keep = weight, keep
        self._sites: dict[str, list[dict[str, Any]]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = self.weight * msg["scale"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.keep and not msg["is_observed"] and not site_is_subsample(msg):
            seen = self._sites.setdefault(msg["name"], [])
            seen.append({k: msg[k] for k in ("fn", "value", "cond_indep_stack")})

    def kl_terms(self, total: int) -> dict[str, Tensor]:
        """Nats per cell of each site's KL in the run just done (guide, then model), and forget it."""
        terms = {}
        with torch.no_grad():
            for name, (guide_site, model_site) in self._sites.items():
                term = kl(guide_site, model_site)
                terms[name] = of_cells(term).mean() if in_cells(model_site) else term.sum() / total
        self._sites = {}
        return terms
