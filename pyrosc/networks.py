"""Networks: encoders and decoders, and how covariates enter them. No probability here.

All take leading dimensions (draws, enumeration) before the cells: inputs are (..., n, C).
Covariates (batch, further columns) can enter a network in three ways, by its argument ``covariates=``:

    "first"  joined to the input of the first layer
    "deep"   joined to the input of every layer
    "norm"   as a shift and scale of each hidden layer after its norm (conditional normalisation)

False keeps them out. ``embedding=e`` gives a column of more than e levels e learned numbers a
level instead of one weight a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .cells import Cells
from .counts import carried
from .errors import ProgramError
from .parts import Part
from .schema import Schema

WAYS = ("first", "deep", "norm")


def one_hot(codes: Tensor, n: int) -> Tensor:
    """(..., n) whether a code is 0, 1, ..., n - 1; torch's own looks at the codes first, for which a GPU would wait."""
    return codes.unsqueeze(-1) == torch.arange(n, device=codes.device)


class Covariates(nn.Module):
    """What networks see of the columns: (n, C), levels as one-hot or learned numbers, and standardised numbers.

    The batch, the further categorical columns and the continuous ones; labels and
    samples are the business of stories. A column with one level says nothing and is
    left out.

    Parameters
    ----------
    embedding : e, for columns of more than e levels; None for one-hot throughout
    """

    def __init__(self, schema: Schema, embedding: int | None = None) -> None:
        super().__init__()
        factors = [f for f in (schema.batch, *schema.categorical) if f is not None and len(f) > 1]
        self.factors = [(f.column, len(f)) for f in factors]
        self.columns = [c.column for c in schema.continuous]
        self.n_columns = sum(n for _, n in self.factors) + len(self.columns)
        embedded = [n for _, n in self.factors if embedding is not None and n > embedding]
        self.embeddings = nn.ParameterList(torch.randn(n, embedding or 1) / (embedding or 1) ** 0.5 for n in embedded)
        self.is_embedded = [embedding is not None and n > embedding for _, n in self.factors]
        self.width = self.n_columns - sum(n - (embedding or 0) for n in embedded)

    def one_hot(self, cells: Cells) -> Tensor:
        """(n, n_columns) levels as one-hot and standardised numbers."""
        pieces = [one_hot(cells.codes[name], n).to(cells.library) for name, n in self.factors]
        pieces += [cells.values[name].unsqueeze(-1) for name in self.columns]
        return torch.cat(pieces, -1) if pieces else cells.library.new_zeros(len(cells), 0)

    def soften(self, logits: Tensor) -> Tensor:
        """(..., n_columns) free numbers as shares of levels, summing to 1 for each column, and numbers."""
        sizes = [n for _, n in self.factors] + [len(self.columns)]
        *levels, numbers = logits.split(sizes, -1)
        return torch.cat([*(piece.softmax(-1) for piece in levels), numbers], -1)

    def embed(self, one_hot: Tensor) -> Tensor:
        """(..., n_columns) shares of levels to (..., C), what a network is handed."""
        if not len(self.embeddings):
            return one_hot
        tables = iter(self.embeddings)
        *levels, numbers = one_hot.split([n for _, n in self.factors] + [len(self.columns)], -1)
        pieces = [piece @ next(tables) if embedded else piece for piece, embedded in zip(levels, self.is_embedded)]
        return torch.cat([*pieces, numbers], -1)

    def forward(self, cells: Cells) -> Tensor:
        return self.embed(self.one_hot(cells))


def joined(linear: Any, values: Tensor, others: Tensor | None) -> Tensor:
    """A linear map of values (..., n, C1) and further columns (n, C2) side by side.

    As two products, so that a column more of zeros changes no digit (`mapping`), and nothing is copied.
    """
    if others is None or not others.shape[-1]:
        return nn.functional.linear(values, linear.weight, linear.bias)
    n = values.shape[-1]
    return nn.functional.linear(values, linear.weight[:, :n], linear.bias) + others @ linear.weight[:, n:].t()


class Norm(nn.Module):
    """LayerNorm or BatchNorm over hidden units, with a shift and scale by covariates where they are given.

    h' = norm(h) (1 + A c) + B c for covariates c. BatchNorm takes any leading dimensions as
    further rows; in training a single row is normalised by the running statistics, having none of its own.
    """

    def __init__(self, kind: str, n_hidden: int, n_covariates: int = 0) -> None:
        super().__init__()
        # Momentum and epsilon of BatchNorm as in scvi-tools.
        self.norm: Any = (
            nn.LayerNorm(n_hidden) if kind == "layer" else nn.BatchNorm1d(n_hidden, momentum=0.01, eps=1e-3)
        )
        self.is_batch = kind == "batch"
        if n_covariates:
            self.scale = nn.Linear(n_covariates, n_hidden, bias=False)
            self.shift = nn.Linear(n_covariates, n_hidden, bias=False)
            nn.init.normal_(self.scale.weight, std=0.02)
            nn.init.zeros_(self.shift.weight)

    def forward(self, hidden: Tensor, covariates: Tensor | None = None) -> Tensor:
        hidden = self._batch(hidden) if self.is_batch else self.norm(hidden)
        if covariates is None:
            return hidden
        return hidden * (1 + self.scale(covariates)) + self.shift(covariates)

    def _batch(self, hidden: Tensor) -> Tensor:
        rows, norm = hidden.reshape(-1, hidden.shape[-1]), self.norm
        if norm.training and len(rows) == 1:
            moments = norm.running_mean, norm.running_var
            rows = nn.functional.batch_norm(rows, *moments, norm.weight, norm.bias, False, 0.0, norm.eps)
        else:
            rows = norm(rows)
        return rows.view(hidden.shape)


# Where a product at the non-zeros alone is the quicker, without gradients: up to this share of them, from this many
# rows (turning the weight around has to pay). With gradients it hardly is: what is saved forward is lost in the
# gradient of the weight (benchmarks/first_layer.py).
_SPARSE, _ROWS = 0.2, 256


class GeneLinear(nn.Linear):
    """``nn.Linear`` on values of genes and further columns side by side; quicker where most values are zero.

    Outside training, values that carry their non-zeros (`Cells.log1p`) are multiplied at these alone, on a CPU and
    where they are few.
    """

    def forward(self, values: Tensor, others: Tensor | None = None) -> Tensor:
        found = carried(values)
        if (
            found is None
            or torch.is_grad_enabled()
            or values.dim() != 2
            or len(values) < _ROWS
            or values.device.type != "cpu"
            or len(found.index) > _SPARSE * values.numel()
        ):
            return joined(self, values, others)
        columns = self.weight.t().contiguous()
        starts = torch.cat([found.ends.new_zeros(1), found.ends[:-1]])
        product = nn.functional.embedding_bag(
            found.gene, columns[: values.shape[1]], starts, mode="sum", per_sample_weights=found.count
        ).add_(self.bias)
        return product if others is None else product.addmm_(others, columns[values.shape[1] :])


class Layer(nn.Module):
    """One hidden layer: linear, norm, ReLU, dropout."""

    def __init__(
        self, n_in: int, n_hidden: int, dropout: float, norm: str | None, n_conditions: int, genes: bool = False
    ) -> None:
        super().__init__()
        self.linear = GeneLinear(n_in, n_hidden) if genes else nn.Linear(n_in, n_hidden)
        self.norm = None if norm is None else Norm(norm, n_hidden, n_conditions)
        self.dropout = dropout

    def forward(
        self, values: Tensor, beside: Tensor | None, conditions: Tensor | None, less: Tensor | None = None
    ) -> Tensor:
        """``beside`` are columns beside the values, ``conditions`` those that move the norm; ``less`` is taken off."""
        if isinstance(self.linear, GeneLinear):
            hidden = self.linear(values, beside)
        else:
            hidden = joined(self.linear, values, beside)
        hidden = hidden if less is None else hidden - less
        hidden = hidden if self.norm is None else self.norm(hidden, conditions)
        return nn.functional.dropout(hidden.relu(), self.dropout, self.training)


class Layers(nn.ModuleList):
    """Hidden layers, and the one place that decides how covariates enter them.

    LayerNorm is the default: it does not mix cells, has no running statistics to go
    stale, and takes any number of cells and leading dimensions.
    """

    def __init__(
        self, n_in: int, n_covariates: int, way: str, n_hidden: int, n_layers: int, dropout: float, norm: str | None,
        genes: bool = False,
    ) -> None:  # fmt: skip
        self.way = way if n_covariates else "none"
        conditions = n_covariates if self.way == "norm" else 0
        super().__init__(
            Layer(
                (n_hidden if i else n_in) + self._joins(i) * n_covariates,
                n_hidden,
                dropout,
                norm,
                conditions,
                genes and i == 0,
            )
            for i in range(n_layers)
        )

    def _joins(self, i: int) -> bool:
        return self.way == "deep" or (self.way == "first" and i == 0)

    def forward(self, values: Tensor, covariates: Tensor | None, less: Tensor | None = None) -> Tensor:
        """``less`` (n, n_hidden) is taken off what the first linear map makes of the values."""
        for i, layer in enumerate(self):
            beside = covariates if self._joins(i) else None
            values = layer(values, beside, covariates if self.way == "norm" else None, None if i else less)
        return values


def _check_network(dropout: float, covariates: bool | str, norm: str | None, **sizes: Any) -> bool | str:
    """``covariates`` as False or the way they enter."""
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__") or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout!r}")
    if norm not in ("layer", "batch", None):
        raise ValueError(f'norm must be "layer", "batch" or None, not {norm!r}')
    if not isinstance(covariates, bool) and covariates not in WAYS:
        raise ValueError(f'covariates must be False, "first", "deep" or "norm", not {covariates!r}')
    if covariates == "norm" and norm is None:
        raise ValueError('covariates="norm" scales the output of a norm layer: pass norm="layer" with it')
    return "first" if covariates is True else covariates


def _covariates(schema: Schema, way: bool | str, embedding: int | None) -> Covariates | None:
    made = Covariates(schema, embedding) if way else None
    return made if made is not None and made.width else None


class Encoder(Part):
    """log(1 + counts) to the mean and standard deviation of a normal over z.

    Parameters
    ----------
    n_latent : K; None for features only, to guide completed sites with
    n_hidden, n_layers, dropout : width, number and dropout rate of the hidden layers
    covariates : how it sees batch and other columns: False (not at all), "first" (or True), "deep", "norm"
    norm : "layer", "batch" or None
    embedding : e, for columns of more than e levels; None for one-hot

    Notes
    -----
    Answers (loc, scale), each (n, K); scale = sqrt(exp(a) + 1e-4) as in Lopez et al. 2018
    (Nature Methods 15:1053), so that it stays above 0.01.
    """

    def __init__(
        self,
        n_latent: int | None = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout: float = 0.1,
        covariates: bool | str = False,
        *,
        norm: str | None = "layer",
        embedding: int | None = None,
    ) -> None:
        covariates = _check_network(
            dropout, covariates, norm, n_latent=n_latent, n_hidden=n_hidden, n_layers=n_layers, embedding=embedding
        )
        super().__init__(
            n_latent=n_latent, n_hidden=n_hidden, n_layers=n_layers, dropout=dropout, covariates=covariates,
            norm=norm, embedding=embedding,
        )  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        n_latent = self.arguments["n_latent"]
        return {} if n_latent is None else {"n_latent": n_latent}

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        a = self.arguments
        self.covariates = _covariates(schema, a["covariates"], a["embedding"])
        width = self.covariates.width if self.covariates else 0
        self.layers = Layers(
            schema.n_genes, width, str(a["covariates"]), a["n_hidden"], a["n_layers"], a["dropout"], a["norm"],
            genes=True,
        )  # fmt: skip
        if a["n_latent"] is not None:
            self.loc = nn.Linear(a["n_hidden"], a["n_latent"])
            self.log_variance = nn.Linear(a["n_hidden"], a["n_latent"])

    @property
    def n_features(self) -> int:
        """Width of the last hidden layer."""
        return self.arguments["n_hidden"]

    def features(self, log1p_counts: Tensor, covariates: Tensor | None = None) -> Tensor:
        """(..., n, n_hidden) last hidden layer."""
        return self.layers(log1p_counts, covariates)

    def read(self, cells: Cells) -> Tensor:
        """(n, n_hidden) last hidden layer for these cells; computed once in a run of the guide."""
        return cells.once(self, lambda: self._read(cells))

    def _read(self, cells: Cells) -> Tensor:
        return self.features(cells.log1p(), self.covariates(cells) if self.covariates else None)

    def moments(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(loc, scale), each (..., n, K), from the last hidden layer."""
        return self.loc(hidden), (self.log_variance(hidden).exp() + 1e-4).sqrt()

    def forward(self, cells: Cells) -> tuple[Tensor, Tensor]:
        return self.moments(self.read(cells))


def _start_at_profile(bias: Tensor, cells: Cells, is_share: bool) -> None:
    """Set an output bias so that, at z = 0, every cell gets the average profile."""
    depth = cells.depth
    # A tenth of a count keeps the logs of genes that are never seen finite.
    profile = (cells.gene_sums().counts + 0.1) / depth.double().sum()
    # The inverse of a softplus is r + log(1 - e^-r), which does not overflow at a large rate.
    with torch.no_grad():
        bias.copy_(profile.log() if is_share else profile + (-(-profile).expm1()).log())


def _width_of_z(sizes: Mapping[str, int], name: str) -> int:
    if "n_latent" not in sizes:
        raise ProgramError(f"the decoder does not know how wide z is: {name}(n_latent=...)")
    return sizes["n_latent"]


def _are_shares(schema: Schema) -> bool:
    if schema.size_factor is None and schema.n_genes == 1:
        raise ProgramError("shares of a single gene are always 1: give more genes, or a size_factor=")
    return schema.size_factor is None


class Decoder(Part):
    """z and covariates to expected shares of genes (or rates, with given size factors).

    Parameters
    ----------
    n_latent : K; None takes it from the encoder
    n_hidden, n_layers, dropout : width, number and dropout rate of the hidden layers
    covariates : how it sees batch and other columns: "first" (or True), "deep", "norm", False (not at all)
    norm : "layer", "batch" or None
    embedding : e, for columns of more than e levels; None for one-hot

    Notes
    -----
    Answers (rho, hidden), (..., n, G) and (..., n, n_hidden). rho is a softmax over genes, or
    a softplus where the schema has size factors. ``decoder(z, cells, offset)`` adds an offset (..., n, G) before it, to
    log shares. Before the first fit the output bias is
    set to the log of the average profile, so that training starts from one shared profile.
    """

    def __init__(
        self,
        n_latent: int | None = None,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout: float = 0.0,
        covariates: bool | str = "first",
        *,
        norm: str | None = "layer",
        embedding: int | None = None,
    ) -> None:
        covariates = _check_network(
            dropout, covariates, norm, n_latent=n_latent, n_hidden=n_hidden, n_layers=n_layers, embedding=embedding
        )
        super().__init__(
            n_latent=n_latent, n_hidden=n_hidden, n_layers=n_layers, dropout=dropout, covariates=covariates,
            norm=norm, embedding=embedding,
        )  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        own = {"n_hidden": self.arguments["n_hidden"]}
        return own if self.arguments["n_latent"] is None else own | {"n_latent": self.arguments["n_latent"]}

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent",)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        a = self.arguments
        a["n_latent"] = _width_of_z(sizes, "Decoder")
        self.is_share = _are_shares(schema)
        self.covariates = _covariates(schema, a["covariates"], a["embedding"])
        width = self.covariates.width if self.covariates else 0
        self.layers = Layers(
            a["n_latent"], width, str(a["covariates"]), a["n_hidden"], a["n_layers"], a["dropout"], a["norm"]
        )
        self.out = nn.Linear(a["n_hidden"], schema.n_genes)

    def start(self, cells: Cells) -> None:
        _start_at_profile(self.out.bias, cells, self.is_share)

    def forward(self, z: Tensor, cells: Cells, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.layers(z, self.covariates(cells) if self.covariates else None)
        out = self.out(hidden) if offset is None else self.out(hidden) + offset
        return (out.softmax(-1) if self.is_share else nn.functional.softplus(out)), hidden


class LinearDecoder(Part):
    """z and covariates to expected shares by one linear map: softmax(W z + V c + b).

    Parameters
    ----------
    n_latent : K; None takes it from the encoder
    covariates : whether batch and other columns shift the log shares of genes

    Notes
    -----
    Answers (rho, None): there is no hidden layer; an ``offset`` is added as by `Decoder`. ``loadings`` (G, K) are
    the log fold changes of genes per unit of each latent, up to the softmax's constant. After Svensson et
    al. 2020 (Bioinformatics 36:3418).
    """

    def __init__(self, n_latent: int | None = None, covariates: bool = True) -> None:
        covariates = bool(_check_network(0.0, covariates, "layer", n_latent=n_latent))
        super().__init__(n_latent=n_latent, covariates=covariates)

    @property
    def sizes(self) -> dict[str, int]:
        return {} if self.arguments["n_latent"] is None else {"n_latent": self.arguments["n_latent"]}

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent",)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        a = self.arguments
        a["n_latent"] = _width_of_z(sizes, "LinearDecoder")
        self.is_share = _are_shares(schema)
        self.covariates = _covariates(schema, a["covariates"], None)
        self.factors = nn.Linear(a["n_latent"], schema.n_genes)
        if self.covariates:
            self.shifts = nn.Linear(self.covariates.width, schema.n_genes, bias=False)
            nn.init.zeros_(self.shifts.weight)

    def start(self, cells: Cells) -> None:
        _start_at_profile(self.factors.bias, cells, self.is_share)

    @property
    def loadings(self) -> Tensor:
        """(G, K) weights of the latents on the log shares of genes."""
        return self.factors.weight

    def forward(self, z: Tensor, cells: Cells, offset: Tensor | None = None) -> tuple[Tensor, None]:
        out = self.factors(z)
        if self.covariates:
            out = out + self.shifts(self.covariates(cells))
        if offset is not None:
            out = out + offset
        return (out.softmax(-1) if self.is_share else nn.functional.softplus(out)), None


class LoadingsDecoder(Part):
    """z, loadings and covariates to expected shares: softmax(z W' + V c + b), W handed in.

    Parameters
    ----------
    covariates : whether batch and other columns shift the log shares of genes

    Notes
    -----
    V and b are estimates without a posterior. With given size factors rho is a rate, exp(z W' + V c + b). There is no
    hidden layer. `LinearDecoder` is the same with W a weight of its own.
    """

    def __init__(self, covariates: bool = True) -> None:
        if not isinstance(covariates, bool):
            raise ValueError(f"covariates must be True or False, not {covariates!r}")
        super().__init__(covariates=covariates)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        self.is_share = _are_shares(schema)
        self.covariates = _covariates(schema, self.arguments["covariates"], None)
        self.bias = nn.Parameter(torch.zeros(schema.n_genes))
        if self.covariates:
            self.shifts = nn.Linear(self.covariates.width, schema.n_genes, bias=False)
            nn.init.zeros_(self.shifts.weight)

    def start(self, cells: Cells) -> None:
        _start_at_profile(self.bias, cells, True)

    def forward(self, z: Tensor, cells: Cells, loadings: Tensor) -> Tensor:
        """rho (..., n, G) of states (..., n, K) under loadings (G, K), or (S, 1, G, K) with draws in front."""
        if loadings.dim() > 2:
            loadings = loadings.squeeze(-3)
        out = z @ loadings.transpose(-1, -2) + self.bias
        if self.covariates:
            out = out + self.shifts(self.covariates(cells))
        return out.softmax(-1) if self.is_share else out.exp()
