"""Priors: what was believed of a quantity before the counts.

A story calls ``prior(cells)`` for a quantity of each cell (a prior may then differ by label), and
``prior()`` for one quantity of all; every prior here takes both. Each answers a distribution
with ``event_dim`` 1. One of your own is a class of a few lines:

    class Sparse(Part):
        def forward(self, cells=None):
            return dist.Laplace(0.0, 0.5).expand([10]).to_event(1)  # for n_latent=10
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.distributions.torch_distribution import TorchDistributionMixin
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from .cells import Cells
from .errors import ProgramError
from .loading import blocks
from .networks import one_hot
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
        if not hasattr(distribution, "to_event"):
            raise ValueError(f"Prior takes pyro.distributions.{name}; this {name} is torch's own")
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
    def from_arguments(cls, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Prior:
        """The prior that a file describes; its numbers are among the file's tensors."""
        numbers = [tensors[f"number{i}"] for i in range(len(arguments["shapes"]))]
        return cls(DISTRIBUTIONS[arguments["distribution"]], *numbers, size=arguments["size"])

    def _made(self) -> Any:
        try:
            made = self.distribution(*(getattr(self, f"number{i}") for i in range(self.n_numbers)))
        except (TypeError, ValueError) as error:
            numbers = ", ".join(str(getattr(self, f"number{i}").tolist()) for i in range(self.n_numbers))
            raise ValueError(f"Prior({self.arguments['distribution']}, {numbers}): {error}") from error
        return made

    @property
    def n_given(self) -> int:
        """How many numbers its parameters describe; 1 leaves the size open."""
        return max((getattr(self, f"number{i}").numel() for i in range(self.n_numbers)), default=1)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        if self.size is None and self.is_scalar:
            self.is_latent = parts.get("prior") is self and self.n_given == 1
            self.take(sizes.get("n_latent", 1) if self.is_latent else self.n_given)

    def take(self, size: int) -> None:
        """Settle an open size: that many independent numbers. In a file it stays open."""
        self.size = size

    def forward(self, cells: Cells | None = None) -> Any:
        made = self._made()
        return made.expand([self.size or 1]).to_event(1) if self.is_scalar else made

    def extra_repr(self) -> str:
        numbers = "".join(
            f", {v.item():g}" if (v := getattr(self, f"number{i}")).numel() == 1 else f", {tuple(v.shape)}"
            for i in range(self.n_numbers)
        )
        return f"{self.arguments['distribution']}{numbers}, size={self.size}"


# ---- mixtures -------------------------------------------------------------------------------

_SURE = 10.0  # added to the logit of a known label's component


def _width(sizes: Mapping[str, int], name: str, own: int | None = None) -> int:
    """K, from the story's other parts or the part's own numbers."""
    found = sizes.get("n_latent", own)
    if found is None:
        raise ProgramError(
            f"{name} does not know how wide z is: hand the story an encoder, or a decoder with n_latent="
        )
    return found


def _is_trained(encoder: nn.Module | None) -> bool:
    return encoder is not None and bool(getattr(encoder, "started", False))


def _component_count(k: Any) -> int:
    if isinstance(k, bool) or not hasattr(k, "__index__") or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, not {k!r}")
    return int(k)


def responsibilities(mixture: Any, z: Tensor) -> Tensor:
    """(..., n, k) posterior probability of each component of a ``MixtureSameFamily`` given z (..., n, K)."""
    of_component = mixture.component_distribution.log_prob(z.unsqueeze(-2))
    return (mixture.mixture_distribution.logits + of_component).softmax(-1)


class MixturePrior(Part):
    """A mixture of k normals over the whole vector z: groups of cells are expected.

        p(z) = sum_m w_m prod_j Normal(z_j; loc_mj, scale_mj)

    Parameters
    ----------
    k : number of components; None for one a label, which ``labels`` asks for
    weights, locs, scales : (k,), (k, K) and (k, K), numbers to start from; None leaves them to the start
    learned : whether they are trained; if not, ``locs`` and ``scales`` are needed
    labels : whether component c belongs to label c (in the order of ``schema.label.levels``)
        A cell of known label then has 10 added to the logit of its component. With
        ``k`` above the number of labels the further components are free.

    Notes
    -----
    Starts with the mean and variance of N(0, I): locs from N(0, 0.75), scales 0.5. Where the
    encoder is trained already (``replace`` on a fit's program) it starts at a k-means of
    the encoded cells, or at the labels' means. Densities add over components *after* the product over
    dimensions: a mixture of vectors, not a product of mixtures. The KL term is Monte Carlo.
    """

    encoder: Any
    loc: Tensor  # (k, K)
    log_scale: Tensor  # (k, K)
    logits: Tensor  # (k,)

    def __init__(
        self,
        k: int | None = None,
        *,
        weights: Any = None,
        locs: Any = None,
        scales: Any = None,
        learned: bool = True,
        labels: bool = False,
    ) -> None:
        given = {"locs": locs, "scales": scales, "weights": weights}
        numbers = {name: torch.as_tensor(v, dtype=torch.float32) for name, v in given.items() if v is not None}
        if k is None and "locs" in numbers:
            k = len(numbers["locs"])
        if k is None and not labels:
            k = 20
        if k is not None:
            k = _component_count(k)
        super().__init__(k=k, learned=learned, labels=labels)
        if not learned and not {"locs", "scales"} <= numbers.keys():
            raise ValueError("a mixture that is not learned needs its numbers: locs= (k, K) and scales= (k, K)")
        for name, value in numbers.items():
            if value.dim() != (1 if name == "weights" else 2) or len(value) != k:
                shape = "(k,)" if name == "weights" else "(k, K)"
                raise ValueError(f"{name} must have shape {shape} with k={k}, not {tuple(value.shape)}")
            if name != "locs" and not bool((value > 0).all()):
                raise ValueError(f"{name} must be positive")
        self._given = numbers

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent",)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MixturePrior:
        """The mixture that a file describes."""
        numbers: dict[str, Any] = {
            "locs": tensors["loc"],
            "scales": tensors["log_scale"].exp(),
            "weights": tensors["logits"].softmax(-1),
        }
        return cls(**arguments, **numbers)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        a = self.arguments
        if a["labels"]:
            if schema.label is None:
                raise ProgramError(
                    "MixturePrior(labels=True) needs a label column: Cells.from_anndata(adata, label=...)"
                )
            a["k"] = len(schema.label) if a["k"] is None else a["k"]
            if a["k"] < len(schema.label):
                raise ProgramError(
                    f"MixturePrior: k={a['k']} components for {len(schema.label)} labels; give at least as many"
                )
        own = next((int(v.shape[1]) for name, v in self._given.items() if name != "weights"), None)
        width = _width(sizes, "MixturePrior", own)
        for name in ("locs", "scales"):
            if name in self._given and self._given[name].shape[1] != width:
                raise ProgramError(
                    f"MixturePrior: {name} has {self._given[name].shape[1]} columns, z has n_latent={width}"
                )
        starts = {
            "loc": self._given.get("locs", math.sqrt(0.75) * torch.randn(a["k"], width)),
            "log_scale": self._given.get("scales", torch.full((a["k"], width), 0.5)).log(),
            "logits": self._given.get("weights", torch.ones(a["k"])).log(),
        }
        for name, value in starts.items():
            setattr(self, name, nn.Parameter(value.clone(), requires_grad=a["learned"]))

    def link(self, parts: Mapping[str, nn.Module]) -> None:
        self.refer(encoder=parts.get("encoder"))

    def start(self, cells: Cells) -> None:
        if self._given or not _is_trained(self.encoder) or not cells.has_counts:
            return
        k, n = self.arguments["k"], min(len(cells), 20_000)
        some = cells.rows(torch.randperm(len(cells))[:n].to(cells.device), whole=True)
        encoded = [self.encoder(block) for block in blocks(some)]
        loc, sd = (torch.cat(v).double().cpu() for v in zip(*encoded))
        label = some.label.cpu() if self.arguments["labels"] else torch.full((n,), -1)
        n_labels = int(label.max()) + 1
        groups = label.clone()  # cells of known label start that label's component, the others the free ones
        free = torch.nonzero(label < 0).squeeze(-1)
        if k > n_labels and len(free) > k - n_labels:
            seed = np.random.default_rng(int(torch.randint(2**31, ())))
            with warnings.catch_warnings():  # an empty cluster keeps its random start
                warnings.simplefilter("ignore")
                _, member = kmeans2(loc[free].numpy(), k - n_labels, minit="++", seed=seed)
            groups[free] = torch.as_tensor(member, dtype=torch.int64) + n_labels
        for m in range(k):
            mine = groups == m
            if int(mine.sum()) > 1:
                self.loc[m] = loc[mine].mean(0)
                self.log_scale[m] = (loc[mine].var(0) + (sd[mine] ** 2).mean(0)).sqrt().log()
            self.logits[m] = math.log((float(mine.sum()) + 1) / (n + k))

    def forward(self, cells: Cells | None = None) -> Any:
        logits = self.logits
        component = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        if self.arguments["labels"] and cells is not None:
            known = one_hot(cells.label, len(logits))
            logits = logits + _SURE * known.to(logits)
            component = component.expand([len(cells), logits.shape[-1]])
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), component)

    def responsibilities(self, z: Tensor, cells: Cells | None = None) -> Tensor:
        """(..., n, k) probability of each component given z (..., n, K); with ``labels``, of each label."""
        return responsibilities(self(cells), z)


class VampPrior(Part):
    """A mixture of the guide's own posteriors at k learned pseudo-cells (Tomczak and Welling 2018, AISTATS).

        p(z) = sum_m w_m q(z | u_m),    u_m pseudo-counts, as log(1 + count), (G,)

    Parameters
    ----------
    k : number of pseudo-cells
        They start as real cells drawn at random. Each step runs the encoder on them too.

    Notes
    -----
    The encoder reads them in eval mode (no dropout, running statistics). Where it sees covariates, each pseudo-cell
    has learned shares of the levels. Needs a part "encoder" with ``features`` and ``moments`` (`Encoder`). The
    mixture is over vectors; the KL term is Monte Carlo.
    """

    encoder: Any

    def __init__(self, k: int = 50) -> None:
        super().__init__(k=_component_count(k))

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent",)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        k = self.arguments["k"]
        self._parameters.pop("inputs", None)  # of another schema, whose columns the encoder sees no more
        self.link(parts)
        self.logits = nn.Parameter(torch.zeros(k))
        self.inputs = nn.Parameter(torch.rand(k, schema.n_genes))
        columns = getattr(self.encoder, "covariates", None)
        self.columns = None if columns is None else nn.Parameter(torch.zeros(k, columns.n_columns))

    def link(self, parts: Mapping[str, nn.Module]) -> None:
        encoder = parts.get("encoder")
        if encoder is None or not (hasattr(encoder, "features") and hasattr(encoder, "moments")):
            found = "no such part" if encoder is None else type(encoder).__name__
            raise ProgramError(
                'VampPrior reads its pseudo-cells with the part "encoder", which must have features() and moments(); '
                f"found {found}"
            )
        sees = getattr(encoder, "covariates", None)
        n_columns = None if sees is None else sees.n_columns
        if "inputs" in self._parameters and n_columns != (None if self.columns is None else self.columns.shape[1]):
            raise ProgramError(
                "the new encoder sees other columns than the VampPrior was built for: replace prior= as well"
            )
        self.refer(encoder=encoder)

    def start(self, cells: Cells) -> None:
        k, n = self.arguments["k"], len(cells)
        chosen = torch.cat([torch.randperm(n) for _ in range(-(-k // n))])[:k].to(cells.device)
        drawn = cells.rows(chosen, whole=True)
        with torch.no_grad():
            self.inputs.copy_(drawn.log1p())
            if self.columns is not None:
                levels = self.encoder.covariates.one_hot(drawn)
                # Shares of 0.9 for its own level, to be softened or sharpened.
                self.columns.copy_(levels)
                at = 0
                for _, n_levels in self.encoder.covariates.factors:
                    own = levels[:, at : at + n_levels]
                    self.columns[:, at : at + n_levels] = (0.9 * own + 0.1 / n_levels).log()
                    at += n_levels

    def forward(self, cells: Cells | None = None) -> Any:
        encoder = self.encoder
        modes = [(module, module.training) for module in encoder.modules()]
        encoder.eval()
        try:
            covariates = (
                None if self.columns is None else encoder.covariates.embed(encoder.covariates.soften(self.columns))
            )
            loc, scale = encoder.moments(encoder.features(self.inputs, covariates))
        finally:
            for module, mode in modes:
                module.training = mode
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), dist.Normal(loc, scale).to_event(1))

    def responsibilities(self, z: Tensor, cells: Cells | None = None) -> Tensor:
        """(..., n, k) probability of each pseudo-cell given z (..., n, K)."""
        return responsibilities(self(cells), z)


# ---- flows ----------------------------------------------------------------------------------


class FlowPrior(Part):
    """A standard normal pushed through learned invertible maps: any smooth shape.

        z = f(u),  u ~ N(0, I),    log p(z) = log N(f^-1(z)) + log |det df^-1/dz|

    Parameters
    ----------
    n_layers : number of coupling layers, each followed by a reversal of the dimensions
    kind : "affine" (RealNVP, Dinh et al. 2017) or "spline" (rational splines, Durkan et al. 2019)
        A spline is the identity beyond +-3.
    n_hidden : width of the network in each layer

    Notes
    -----
    Starts as N(0, I). It can also be fitted after the rest: freeze a fit's program
    (``requires_grad_(False)``), ``replace(prior=FlowPrior())``, and fit again; the decoder stays, and the
    ELBO gains up to KL(aggregate posterior, N(0, I)). The KL term is Monte Carlo.
    """

    zero: Tensor  # (K,)
    reversal: Tensor  # (K,) positions, last to first

    def __init__(self, n_layers: int = 4, kind: str = "affine", *, n_hidden: int = 32) -> None:
        for name, value in (("n_layers", n_layers), ("n_hidden", n_hidden)):
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if kind not in ("affine", "spline"):
            raise ValueError(f'kind must be "affine" or "spline", not {kind!r}')
        super().__init__(n_layers=n_layers, kind=kind, n_hidden=n_hidden)

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent",)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        a = self.arguments
        width = _width(sizes, "FlowPrior")
        if width < 2:
            raise ProgramError("a FlowPrior couples dimensions of z and needs at least two; for one use MixturePrior")
        make = transforms.affine_coupling if a["kind"] == "affine" else transforms.spline_coupling
        self.layers = nn.ModuleList(make(width, hidden_dims=[a["n_hidden"]]) for _ in range(a["n_layers"]))
        for layer in self.layers:
            _start_as_identity(layer)
        self.register_buffer("zero", torch.zeros(width))
        self.register_buffer("reversal", torch.arange(width - 1, -1, -1))

    def forward(self, cells: Cells | None = None) -> Any:
        steps = []
        for layer in self.layers:
            steps += [layer, transforms.Permute(self.reversal)]
        base = dist.Normal(self.zero, torch.ones_like(self.zero)).to_event(1)
        return dist.TransformedDistribution(base, steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowPrior:
        # Transforms remember their last input with its graph, which cannot be copied.
        for module in self.modules():
            for name in [n for n in vars(module) if n.startswith("_cache") and n != "_cache_size"]:
                setattr(module, name, (None, None) if name == "_cached_x_y" else None)
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


_UNIT_SLOPE = math.log(math.e - 1)  # softplus of it is 1


def _start_as_identity(layer: Any) -> None:
    """Shifts and log scales of zero; splines of equal bins, slopes of one."""
    is_spline = hasattr(layer, "upper_spline")
    network = layer.upper_spline.nn if is_spline else layer.nn
    last = network.layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    if is_spline:
        with torch.no_grad():
            last.bias[network.param_slices[2]] = _UNIT_SLOPE
            for name, value in layer.lower_spline.named_parameters():
                value.fill_(_UNIT_SLOPE if name == "unnormalized_derivatives" else 0.0)
