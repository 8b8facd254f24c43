"""Labels: what is believed of a cell's type before its counts, what tells it from the state, and states by type.

A label column may be known for some of the cells, be wrong in some, or name a group of types. All three are evidence:
p(label seen | type), a table of labels by types. It enters a story where labels do, in the prior of the type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .cells import Cells
from .errors import ProgramError
from .parts import Part
from .schema import Schema, did_you_mean, listed

_IMPOSSIBLE = -100.0  # log probability; an infinite one has no gradient
_EXAMPLE = {"weights": '{"B": 0.2, "NK": 0.1}', "groups": '{"T": ["CD4 T", "CD8 T"]}'}


def _by_name(name: str, given: Any) -> dict[Any, Any]:
    """What is given by type as a dict, from one or from pairs: files have no keys that are numbers."""
    pairs = given.items() if isinstance(given, Mapping) else given or ()
    try:
        return dict(pairs)
    except (TypeError, ValueError):
        raise ValueError(f"{name} takes types by name, such as {_EXAMPLE[name]}, not {given!r}") from None


class LabelPrior(Part):
    """What is believed of the type of a cell before its counts: a Categorical over C types.

        p(type | label seen)  is in proportion to  weights[type] p(label seen | type)

    A cell without a label has ``weights`` alone.

    Parameters
    ----------
    weights : how common types are, by name; types left out count 1, as all do for None
    learned : whether ``weights`` are a start, and the shares of types are learned from the cells without a label
        By maximum likelihood: each step moves them towards the mean of q(type | z). Where types are told apart well
        they come out as the shares of the population, though labels may have been given to as many cells of each;
        where they are hardly told apart, a share can run away (`simulate.subtle_types`).
    errors : share of the labels that are wrong, and then any other type's, in [0, 1)
    groups : labels that stand for several types, by name: ``{"T": ["CD4 T", "CD8 T"]}``
        Of such a cell it is known that it is one of these. Every other level of the label column is a type.
    """

    log_weights: Tensor  # (C,)
    log_seen: Tensor  # (L + 1, C), the last row for no label

    def __init__(
        self,
        weights: Mapping[Any, float] | Sequence[tuple[Any, float]] | None = None,
        errors: float = 0.0,
        groups: Mapping[Any, Sequence[Any]] | Sequence[tuple[Any, Sequence[Any]]] | None = None,
        *,
        learned: bool = False,
    ) -> None:
        if isinstance(errors, bool) or not 0 <= errors < 1:
            raise ValueError(f"errors must be at least 0 and below 1, not {errors!r}: it is a share of the labels")
        by_weight, by_group = _by_name("weights", weights), _by_name("groups", groups)
        for kind, weight in by_weight.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise ValueError(f'weights["{kind}"] must be a positive number, not {weight!r}')
        empty = [group for group, types in by_group.items() if isinstance(types, str) or not len(types)]
        if empty:
            raise ValueError(f'groups["{empty[0]}"] must be a list of types, such as ["CD4 T", "CD8 T"]')
        super().__init__(
            weights=None if weights is None else [[kind, weight] for kind, weight in by_weight.items()],
            errors=errors,
            groups=None if groups is None else [[group, list(types)] for group, types in by_group.items()],
            learned=learned,
        )
        self.weights, self.groups = by_weight, by_group

    @property
    def sizes(self) -> dict[str, int]:
        return {"n_groups": len(self.groups)}

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        if schema.label is None:
            raise ProgramError("a story of labels needs a label column: Cells.from_anndata(adata, label=...)")
        weights, groups = self.weights, self.groups
        errors = self.arguments["errors"]
        levels = list(schema.label.levels)
        self.types = [v for v in levels if v not in groups]
        for what, names, known in (
            ("groups", [t for members in groups.values() for t in members], self.types),
            ("groups", groups, levels),
            ("weights", weights, self.types),
        ):
            wrong = [name for name in names if name not in known]
            if wrong:
                raise ProgramError(
                    f"LabelPrior: {what} names {listed(wrong)}, not among {listed(known, 20)} of "
                    f'"{schema.label.column}".' + did_you_mean(wrong[0], known)
                )
        at = {name: i for i, name in enumerate(self.types)}
        others = max(len(self.types) - 1, 1)
        seen = torch.zeros(len(levels) + 1, len(self.types))
        for i, level in enumerate(levels):
            members = [at[t] for t in groups.get(level, [level])]
            wrong_too = len(members) < len(self.types)  # where there is another type for it to be
            seen[i] = errors / others if wrong_too else 1.0
            seen[i, members] = 1 - errors if wrong_too else 1.0
        seen[-1] = 1.0
        share = torch.tensor([float(weights.get(t, 1.0)) for t in self.types])
        log_weights = (share / share.sum()).log()
        if self.arguments["learned"]:
            self.log_weights = nn.Parameter(log_weights)
        else:
            self.register_buffer("log_weights", log_weights)
        self.register_buffer("log_seen", seen.log().clamp(min=_IMPOSSIBLE))

    def evidence(self, cells: Cells) -> Tensor:
        """(n, C) log p(label seen | type), nats; 0 for cells without a label."""
        codes = cells.label
        return self.log_seen[torch.where(codes < 0, len(self.log_seen) - 1, codes)]

    def forward(self, cells: Cells) -> Any:
        return dist.Categorical(logits=self.log_weights + self.evidence(cells))


class Classifier(Part):
    """Log odds of the types from a state: z (..., n, K) to (..., n, C).

    Parameters
    ----------
    n_hidden, dropout : of its hidden layer
    weight : of known labels in training, nats per cell
        ``weight`` times the mean of log q(label | z) over the cells that have one is added to the mean ELBO of a cell;
        over those whose label is a group of types by itself, so that many of these do not drown a few of the others.

    Notes
    -----
    The added term is in the objective of training and in nothing else: it is no part of the ELBO, and a cell of known
    type would otherwise teach the classifier nothing (Kingma et al. 2014, NeurIPS 27, equation 9). With 10 and
    20 simulated types were told about as well, with 50 less so, and with 1 not at all (one tissue:
    benchmarks/results/scanvi_choices.md).

    The log odds are those among labelled cells. Where types are more or less common in the story (`LabelPrior`) than
    among labels, q(type | z) is shifted by the log of that ratio (Saerens et al. 2002, Neural Computation 14:21).
    """

    labels: Any
    share: Tensor  # (2,) of cells whose label names one type, and a group of them
    log_share: Tensor  # (C,) of labelled cells, by type

    def __init__(self, n_hidden: int = 128, dropout: float = 0.1, weight: float = 20.0) -> None:
        _check_width(n_hidden, dropout)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"weight must be a number of nats of at least 0, not {weight!r}")
        super().__init__(n_hidden=n_hidden, dropout=dropout, weight=weight)

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent", "n_groups")

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        a, n_types = self.arguments, _n_types(schema, sizes, "Classifier")
        self.link(parts)
        self.linear = nn.Linear(_width_of_z(sizes, "Classifier"), a["n_hidden"])
        self.norm = nn.LayerNorm(a["n_hidden"])
        self.out = nn.Linear(a["n_hidden"], n_types)
        self.register_buffer("share", torch.ones(2))
        self.register_buffer("log_share", torch.full((n_types,), 1 / n_types).log())

    def link(self, parts: Mapping[str, nn.Module]) -> None:
        self.refer(labels=parts["labels"])

    def start(self, cells: Cells) -> None:
        known = torch.nonzero(cells.label >= 0).squeeze(-1)
        evidence = self.labels.evidence(cells.rows(known, whole=True))
        of_group = torch.bincount(_is_group(evidence), minlength=2)
        self.share.copy_((of_group / len(cells)).clamp(min=1 / len(cells)))
        counts = evidence.softmax(-1).sum(0) + 1.0
        self.log_share.copy_((counts / counts.sum()).log())

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.norm(self.linear(z)).relu()
        return self.out(nn.functional.dropout(hidden, self.arguments["dropout"], self.training))

    def law(self, logits: Tensor, evidence: Tensor) -> Any:
        """q(type | z, label seen), from log odds (..., n, C) and log p(label seen | type)."""
        shift = self.labels.log_weights.log_softmax(-1) - self.log_share
        return dist.Categorical(logits=logits + shift + evidence)

    def term(self, logits: Tensor, evidence: Tensor) -> Tensor:
        """(..., n) weight times log q(label seen | z), over the share of cells that have one; 0 for the others."""
        weight = self.arguments["weight"] / self.share[_is_group(evidence)]
        told = weight * (logits.log_softmax(-1) + evidence).logsumexp(-1)
        return torch.where((evidence != 0).any(-1), told, 0.0)


class TypeNormal(Part):
    """A normal by type: a value (..., n, K) and types y to its location and scale, each (..., n, K).

    With y (C, 1), all types at once, they are (C, n, K): the value goes through the hidden layer's weights once, and
    each type shifts it by numbers of its own.

    Parameters
    ----------
    n_hidden : of its hidden layer
    """

    def __init__(self, n_hidden: int = 32) -> None:
        _check_width(n_hidden)
        super().__init__(n_hidden=n_hidden)

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent", "n_groups")

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        n_types, width = _n_types(schema, sizes, "TypeNormal"), _width_of_z(sizes, "TypeNormal")
        n_hidden = self.arguments["n_hidden"]
        self.linear = nn.Linear(width, n_hidden)
        self.of_type = nn.Parameter(0.1 * torch.randn(n_types, n_hidden))
        self.norm = nn.LayerNorm(n_hidden)
        self.out = nn.Linear(n_hidden, 2 * width)

    def forward(self, value: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.norm(self.linear(value) + self.of_type[y]).relu()
        loc, log_variance = self.out(hidden).chunk(2, -1)
        return loc, (0.5 * log_variance).exp() + 1e-3


def _is_group(evidence: Tensor) -> Tensor:
    """(n,) 1 where more than one type is as likely as any, as for a group's label or none, else 0."""
    return ((evidence == evidence.amax(-1, keepdim=True)).sum(-1) > 1).long()


def _check_width(n_hidden: Any, dropout: float = 0.0) -> None:
    if isinstance(n_hidden, bool) or not hasattr(n_hidden, "__index__") or n_hidden < 1:
        raise ValueError(f"n_hidden must be a whole number of at least 1, not {n_hidden!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout!r}")


def _n_types(schema: Schema, sizes: Mapping[str, int], name: str) -> int:
    if "n_groups" not in sizes:
        raise ProgramError(f'{name} does not know the types: hand the story a part "labels", such as LabelPrior()')
    return schema.n_labels - sizes["n_groups"]


def _width_of_z(sizes: Mapping[str, int], name: str) -> int:
    if "n_latent" not in sizes:
        raise ProgramError(f"{name} does not know how wide z is: hand the story an encoder with n_latent=")
    return sizes["n_latent"]
