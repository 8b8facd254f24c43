"""Networks: encoders and decoders, and how covariates enter them. No probability here.

All take leading dimensions (draws, enumeration) before the cells: inputs are (..., n, C).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .cells import Cells
from .errors import ProgramError
from .parts import Part
from .schema import Schema


class Covariates(nn.Module):
    """What networks see of the columns: (n, C), one-hot levels and standardised numbers.

    The batch, the further categorical columns and the continuous ones; labels and
    samples are the business of stories. A column with one level says nothing and is
    left out.
    """

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        factors = [f for f in (schema.batch, *schema.categorical) if f is not None and len(f) > 1]
        self.factors = [(f.column, len(f)) for f in factors]
        self.columns = [c.column for c in schema.continuous]
        self.width = sum(n for _, n in self.factors) + len(self.columns)

    def forward(self, cells: Cells) -> Tensor:
        pieces = [nn.functional.one_hot(cells.codes[name], n).to(cells.library) for name, n in self.factors]
        pieces += [cells.values[name].unsqueeze(-1) for name in self.columns]
        return torch.cat(pieces, -1) if pieces else cells.library.new_zeros(len(cells), 0)


def join(values: Tensor, covariates: Tensor | None) -> Tensor:
    """values (..., n, C1) and covariates (n, C2) side by side."""
    if covariates is None or not covariates.shape[-1]:
        return values
    return torch.cat([values, covariates.expand(*values.shape[:-1], covariates.shape[-1])], -1)


class Layers(nn.Sequential):
    """Hidden layers: linear, LayerNorm, ReLU, dropout.

    LayerNorm rather than BatchNorm: it does not mix cells, has no running statistics to go
    stale, and takes any number of cells and leading dimensions.
    """

    def __init__(self, n_in: int, n_hidden: int, n_layers: int, dropout: float) -> None:
        layers: list[nn.Module] = []
        for i in range(n_layers):
            layers += [nn.Linear(n_in if i == 0 else n_hidden, n_hidden), nn.LayerNorm(n_hidden), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        super().__init__(*layers)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout!r}")


class Encoder(Part):
    """log(1 + counts) to the mean and standard deviation of a normal over z.

    Parameters
    ----------
    n_latent : K
    n_hidden, n_layers, dropout : width, number and dropout rate of the hidden layers
    covariates : whether the encoder sees batch and other columns, joined to the counts

    Notes
    -----
    Answers (loc, scale), each (n, K); scale = sqrt(exp(a) + 1e-4) as in Lopez et al. 2018
    (Nature Methods 15:1053), so that it stays above 0.01.
    """

    def __init__(
        self,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout: float = 0.1,
        covariates: bool = False,
    ) -> None:
        _check_sizes(n_latent=n_latent, n_hidden=n_hidden, n_layers=n_layers)
        _check_dropout(dropout)
        super().__init__(
            n_latent=n_latent, n_hidden=n_hidden, n_layers=n_layers, dropout=dropout, covariates=covariates
        )

    @property
    def sizes(self) -> dict[str, int]:
        return {"n_latent": self.arguments["n_latent"]}

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        a = self.arguments
        self.covariates = Covariates(schema) if a["covariates"] else None
        width = schema.n_genes + (self.covariates.width if self.covariates else 0)
        self.layers = Layers(width, a["n_hidden"], a["n_layers"], a["dropout"])
        self.loc = nn.Linear(a["n_hidden"], a["n_latent"])
        self.log_variance = nn.Linear(a["n_hidden"], a["n_latent"])

    def features(self, log1p_counts: Tensor, covariates: Tensor | None = None) -> Tensor:
        """(..., n, n_hidden) last hidden layer."""
        return self.layers(join(log1p_counts, covariates))

    def forward(self, cells: Cells) -> tuple[Tensor, Tensor]:
        hidden = self.features(cells.log1p(), self.covariates(cells) if self.covariates else None)
        return self.loc(hidden), (self.log_variance(hidden).exp() + 1e-4).sqrt()


class Decoder(Part):
    """z and covariates to expected shares of genes (or rates, with given size factors).

    Parameters
    ----------
    n_latent : K; None takes it from the encoder
    n_hidden, n_layers, dropout : width, number and dropout rate of the hidden layers
    covariates : whether the decoder sees batch and other columns, joined to z

    Notes
    -----
    Answers (rho, hidden), (..., n, G) and (..., n, n_hidden). rho is a softmax over genes, or
    a softplus where the schema has size factors. Before the first fit the output bias is
    set to the log of the average profile, so that training starts from one shared profile.
    """

    def __init__(
        self,
        n_latent: int | None = None,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout: float = 0.0,
        covariates: bool = True,
    ) -> None:
        _check_sizes(n_hidden=n_hidden, n_layers=n_layers)
        _check_dropout(dropout)
        super().__init__(
            n_latent=n_latent, n_hidden=n_hidden, n_layers=n_layers, dropout=dropout, covariates=covariates
        )

    @property
    def sizes(self) -> dict[str, int]:
        own = {"n_hidden": self.arguments["n_hidden"]}
        return own if self.arguments["n_latent"] is None else own | {"n_latent": self.arguments["n_latent"]}

    @property
    def uses(self) -> tuple[str, ...]:
        return ("n_latent",)

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        a = self.arguments
        if "n_latent" not in sizes:
            raise ProgramError("the decoder does not know how wide z is: Decoder(n_latent=...)")
        a["n_latent"] = sizes["n_latent"]
        self.is_share = schema.size_factor is None
        if self.is_share and schema.n_genes == 1:
            raise ProgramError("shares of a single gene are always 1: give more genes, or a size_factor=")
        self.covariates = Covariates(schema) if a["covariates"] else None
        width = a["n_latent"] + (self.covariates.width if self.covariates else 0)
        self.layers = Layers(width, a["n_hidden"], a["n_layers"], a["dropout"])
        self.out = nn.Linear(a["n_hidden"], schema.n_genes)

    def start(self, cells: Cells) -> None:
        depth = cells.depth
        # A tenth of a count keeps the logs of genes that are never seen finite.
        profile = (cells.gene_sums().counts + 0.1) / depth.double().sum()
        # The inverse of a softplus is r + log(1 - e^-r), which does not overflow at a large rate.
        bias = profile.log() if self.is_share else profile + (-(-profile).expm1()).log()
        with torch.no_grad():
            self.out.bias.copy_(bias)

    def forward(self, z: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        hidden = self.layers(join(z, self.covariates(cells) if self.covariates else None))
        out = self.out(hidden)
        return (out.softmax(-1) if self.is_share else nn.functional.softplus(out)), hidden
