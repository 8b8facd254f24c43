"""Agreement: whether a model and its guide belong together, seen from one run of each.

Sites, supports, plates, scales, and the condition under which the KL terms of ``TraceMeanField_ELBO`` are right.
What does not agree is an error that names the site and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .cells import Cells
from .errors import ProgramError
from .guides import is_computed, latent_sites, law_of, plain_support
from .schema import did_you_mean, listed


def check_sites(
    guide: poutine.Trace, model: poutine.Trace, cells: Cells, enumerated: list[str], guided_sums: list[str]
) -> None:
    for trace, what in ((guide, "guide"), (model, "model")):
        found: dict[str, Any] = dict(trace.nodes)
        for name, site in found.items():
            if site["type"] == "param":
                raise ProgramError(
                    f'the {what} makes a parameter "{name}" by pyro.param, which a Program neither trains nor keeps. '
                    "Hand it over as a part: a module with an nn.Parameter."
                )
            if site["type"] != "sample" or site_is_subsample(site) or is_computed(site):
                continue
            inside = any(f.name == "cells" for f in site["cond_indep_stack"])
            if not inside and len(cells) > 1 and tuple(site["fn"].batch_shape[-1:]) == (len(cells),):
                raise ProgramError(
                    f'the {what} draws "{name}" for each cell, but outside of the plate of cells, so that mini-batches '
                    "would count for less than the whole: draw it under `with cells.plate():`"
                )
    drawn, wanted = latent_sites(guide), latent_sites(model)
    wanted = {name: site for name, site in wanted.items() if name not in enumerated}
    nodes: dict[str, Any] = model.nodes
    in_model = [n for n, s in nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]
    for name in drawn:
        if name not in wanted:
            raise ProgramError(
                f'the guide draws "{name}" but the model does not. '
                f"Model: {', '.join(in_model)}. Guide: {', '.join(drawn)}. "
                f"Rename it in the guide, or remove it.{did_you_mean(name, set(wanted) - set(drawn))}"
            )
    for name in wanted:
        if name not in drawn:
            raise ProgramError(
                f'the model draws "{name}" but the guide does not. Model: {", ".join(in_model)}. '
                f"Guide: {', '.join(drawn) or 'nothing'}. Draw it in the guide as well."
            )
    for name, site in wanted.items():
        q, p = drawn[name]["fn"], site["fn"]
        if q.event_shape != p.event_shape:
            raise ProgramError(
                f'site "{name}": the guide draws events of shape {tuple(q.event_shape)}, '
                f"the model of {tuple(p.event_shape)}"
            )
        # torch takes the image of an affine map to be all reals; what is drawn is checked with the densities.
        if law_of(q) != "Delta" and not law_of(q).endswith("mapped") and not _within(q.support, p.support):
            raise ProgramError(
                f'site "{name}": the guide ({law_of(q)}, {_reach(q.support)}) can draw values that the prior '
                f"({law_of(p)}, {_reach(p.support)}) rules out. Use a distribution with that support in the guide, "
                "such as LogNormal for positive numbers; or leave the site out, and it is completed."
            )
        if not q.has_rsample and name not in guided_sums:
            raise ProgramError(
                f'site "{name}": the guide draws it from {law_of(q)}, through which no gradient passes. '
                "Draw it from a continuous distribution, or leave a discrete site out of the guide and sum it out: "
                'infer={"enumerate": "parallel"} in the model'
            )
        scales = [float(torch.as_tensor(s["scale"]).max()) for s in (drawn[name], site)]
        if scales[0] != scales[1]:
            raise ProgramError(
                f'site "{name}" counts {scales[0]:g} times in the guide and {scales[1]:g} times in the model, so that '
                "its KL and the likelihood are weighed differently: their plates differ in size (cells.plate() in both "
                "gives one), or a scale handler is around one of them only"
            )
        if (drawn[name]["mask"] is None) != (site["mask"] is None):
            raise ProgramError(
                f'site "{name}": a mask handler is around it in one of model and guide only; the analytic KL takes '
                "the guide's. Put it around both, or around neither"
            )
        plates = [sorted(f.name for f in s["cond_indep_stack"]) for s in (drawn[name], site)]
        if plates[0] != plates[1]:
            raise ProgramError(f'site "{name}": the guide draws it in plates {plates[0]}, the model in {plates[1]}')
    for name, site in nodes.items():
        if site["type"] == "sample" and site["is_observed"] and not is_computed(site) and not site_is_subsample(site):
            here, seen = tuple(site["fn"].shape()), tuple(site["value"].shape)
            if here != seen and site["fn"].event_dim and here[-1:] != seen[-1:]:
                alike = [n for n, s in nodes.items() if n != name and s["type"] == "sample"
                         and not site_is_subsample(s) and s["fn"].event_shape[-1:] == here[-1:]]  # fmt: skip
                raise ProgramError(
                    f'site "{name}": the story gives {here[-1]:,} genes, the data have {seen[-1]:,}. '
                    f"Sites of that width: {listed(alike) or 'none'}; check the sizes of their priors.\n"
                    f"Shapes:\n{model.format_shapes()}"
                )


def _span(support: Any) -> tuple[Tensor, Tensor] | None:
    """Bounds of a support of numbers; None for another kind (simplex, matrices)."""
    inner = plain_support(support)
    low, high = getattr(inner, "lower_bound", -torch.inf), getattr(inner, "upper_bound", torch.inf)
    if inner is constraints.real or hasattr(inner, "lower_bound") or hasattr(inner, "upper_bound"):
        return torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64)
    return None


def _within(guide: Any, prior: Any) -> bool:
    """Whether what the guide can draw lies within the prior's support, as far as is known."""
    inner, outer = _span(guide), _span(prior)
    if outer is None:  # a simplex, an ordered vector and the like want a guide of their own kind
        return type(plain_support(guide)) is type(plain_support(prior)) or not _is_narrow(prior)
    if inner is None:
        return True
    return bool((inner[0] >= outer[0]).all()) and bool((inner[1] <= outer[1]).all())


def _is_narrow(support: Any) -> bool:
    return plain_support(support) in (constraints.simplex, constraints.ordered_vector, constraints.corr_cholesky)


def _reach(support: Any) -> str:
    inner, span = plain_support(support), _span(support)
    if inner is constraints.simplex:
        return "sums to 1"
    if span is None:
        return str(inner)
    low, high = (float(v.reshape(-1)[0]) for v in span)
    if (low, high) == (-float("inf"), float("inf")):
        return "all reals"
    return "positive" if (low, high) == (0.0, float("inf")) else f"between {low:g} and {high:g}"


def _ancestors(relations: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """For each site, every site it depends on, directly or not."""
    direct = {child: set(parents) - {child} for child, parents in relations["sample_sample"].items()}
    reached: dict[str, set[str]] = {}
    for child in direct:
        todo, found = list(direct[child]), set()
        while todo:
            parent = todo.pop()
            if parent not in found:
                found.add(parent)
                todo += direct.get(parent, ())
        reached[child] = found
    return reached


def drawn_backwards(guide: Mapping[str, Any], model: Mapping[str, Any]) -> set[str]:
    """Sites that the guide draws before one that the model draws them from; their KL has no closed form."""
    in_guide = _ancestors(guide)
    found: dict[str, Any] = model["sample_sample"]
    return {child for child, parents in found.items() if any(child in in_guide.get(p, ()) for p in parents)}


def check_mean_field(guide: Mapping[str, Any], model: Mapping[str, Any], noisy: set[str]) -> None:
    """No direct parent of a site in the model may depend on that site in the guide (the analytic KL would be wrong).

    Those of ``noisy`` are known, and their KL is not taken in closed form.
    """
    in_guide = _ancestors(guide)
    for child, parents in model["sample_sample"].items():
        for parent in parents:
            if child in in_guide.get(parent, ()) and child not in noisy:
                raise ProgramError(
                    f'the model draws "{child}" from "{parent}", but the guide draws "{parent}" from "{child}": the KL '
                    f'terms of TraceMeanField_ELBO are then wrong. Draw "{parent}" first in the guide.'
                )
