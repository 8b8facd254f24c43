"""Networks: how covariates enter, norms, leading dimensions, and the architecture of the founding document."""

import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrosc
from pyrosc import (
    CellDispersion,
    Cells,
    Decoder,
    Encoder,
    LatentLibrary,
    LinearDecoder,
    ProgramError,
    PyroscWarning,
    ZINBLikelihood,
)
from pyrosc.counts import nonzeros
from pyrosc.networks import Covariates

from .conftest import small

WAYS = ["first", "deep", "norm"]


@pytest.fixture(scope="module")
def cells():
    return Cells.from_anndata(small(), batch="donor", categorical=["condition"], continuous=["age"])


def tiny(cells, **options):
    return pyrosc.scvi(cells, **(dict(n_latent=3, n_hidden=8) | options))


def test_covariates_are_one_hot_levels_and_standardised_numbers(cells):
    columns = Covariates(cells.schema)
    found = columns(cells)

    assert found.shape == (120, 5)
    assert torch.equal(found[:, :2], nn.functional.one_hot(cells.codes["donor"], 2).float())
    assert torch.equal(found[:, 2:4], nn.functional.one_hot(cells.codes["condition"], 2).float())
    torch.testing.assert_close(found[:, 4], cells.values["age"])


def test_many_levels_can_be_embedded():
    many = Cells.from_anndata(
        small(200, well=[f"w{i % 20}" for i in range(200)]), batch="well", categorical=["condition"]
    )
    columns = Covariates(many.schema, embedding=4)
    found = columns(many)

    assert found.shape == (200, 4 + 2)  # twenty wells as four numbers, two conditions as they are
    assert torch.equal(found[:, :4], columns.embeddings[0][many.batch])
    same = columns.embed(columns.one_hot(many))
    torch.testing.assert_close(same, found)
    program = tiny(many, decoder=Decoder(3, 8, embedding=4))
    rho = program.parts["decoder"](torch.zeros(200, 3), many)[0]
    rho[:, 0].sum().backward()
    assert program.parts["decoder"].covariates.embeddings[0].grad.abs().sum() > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_layers", [1, 3])
def test_every_way_lets_batch_and_numbers_through(cells, way, n_layers):
    program = tiny(
        cells,
        encoder=Encoder(3, 8, n_layers, covariates=way),
        decoder=Decoder(3, 8, n_layers, covariates=way),
    )
    with torch.no_grad():  # a shift that starts at nothing lets through what it has learned
        for name, p in program.named_parameters():
            if "shift" in name:
                p.normal_()
    z = torch.zeros(120, 3)

    for change in (dict(donor="d1"), dict(condition="stim"), dict(age=70.0)):
        other = cells.do(**change)
        assert not torch.allclose(program.parts["decoder"](z, cells)[0], program.parts["decoder"](z, other)[0])
        assert not torch.allclose(program.parts["encoder"](cells)[0], program.parts["encoder"](other)[0])


def test_the_ways_differ_by_where_covariates_enter(cells):
    layers = {way: Decoder(3, 8, 3, covariates=way) for way in WAYS}
    built = {way: tiny(cells, decoder=d).parts["decoder"].layers for way, d in layers.items()}
    widths = {way: [layer.linear.in_features for layer in net] for way, net in built.items()}

    assert widths == {"first": [8, 8, 8], "deep": [8, 13, 13], "norm": [3, 8, 8]}
    assert all(hasattr(layer.norm, "scale") for layer in built["norm"])
    assert not any(hasattr(layer.norm, "scale") for layer in built["deep"])


def test_conditional_norm_is_a_shift_and_scale_of_each_level(cells):
    layer = tiny(cells, decoder=Decoder(3, 8, covariates="norm")).parts["decoder"].layers[0]
    with torch.no_grad():
        layer.norm.scale.weight.normal_()
        layer.norm.shift.weight.normal_()
    h, c = torch.randn(7, 8), Covariates(cells.schema)(cells[:7])

    by_hand = nn.functional.layer_norm(h, [8]) * (1 + c @ layer.norm.scale.weight.T) + c @ layer.norm.shift.weight.T

    torch.testing.assert_close(layer.norm(h, c), by_hand)


def test_batch_norm_takes_draws_in_front_and_normalises_the_right_axis(cells):
    layer = tiny(cells, decoder=Decoder(3, 8, norm="batch")).parts["decoder"].train().layers[0].norm
    values = torch.randn(5, 8, 8) * 3 + 1  # as many cells as hidden units: the trap of pyro-notes

    found = layer(values)

    torch.testing.assert_close(found.mean((0, 1)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std((0, 1), correction=0), torch.ones(8), atol=1e-2, rtol=0)
    assert torch.isfinite(layer(torch.randn(1, 8))).all()  # a single cell has no variance of its own
    layer.eval()
    mean = layer.norm.running_mean.clone()
    one, all_of_them = layer(values[:1, :1]), layer(values)[:1, :1]
    torch.testing.assert_close(one, all_of_them)
    assert torch.equal(layer.norm.running_mean, mean)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_batch_norm_fits_any_number_of_cells(cells, n):  # row 73
    program = tiny(cells, encoder=Encoder(3, 8, norm="batch"), decoder=Decoder(3, 8, norm="batch"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(program, cells[:n], epochs=2, batch_size=4, validation=None, progress=False)

    one = fit.latent(cells[:3])
    # Eval mode: no cell sees its neighbours (matrix products differ by 1e-6 between numbers of rows).
    assert fit.latent(cells)[:3] == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("decoder", [Decoder(3, 8, 2, covariates=w) for w in WAYS] + [LinearDecoder(3)])
def test_decoders_take_leading_dimensions(cells, decoder):
    made = tiny(cells, decoder=decoder).parts["decoder"]
    z = torch.randn(4, 2, 120, 3)

    rho = made(z, cells)[0]

    torch.testing.assert_close(rho[2, 1], made(z[2, 1], cells)[0])


def test_the_linear_decoder_is_a_softmax_of_loadings(cells):
    program = tiny(cells, decoder=LinearDecoder(3), likelihood=ZINBLikelihood())
    program.start(cells)
    made = program.parts["decoder"]
    z = torch.randn(120, 3)
    with torch.no_grad():
        made.shifts.weight.normal_()

    rho, hidden = made(z, cells)

    by_hand = (
        z @ made.loadings.T + Covariates(cells.schema)(cells) @ made.shifts.weight.T + made.factors.bias
    ).softmax(-1)
    torch.testing.assert_close(rho, by_hand)
    assert hidden is None
    assert program.parts["likelihood"].gate_logits.shape == (30,)  # a gate a gene where there is no hidden layer
    with torch.no_grad():
        made.shifts.weight.zero_()
    share = cells.x.sum(0) / cells.x.sum()
    torch.testing.assert_close(made(torch.zeros(1, 3), cells[:1])[0][0], share, rtol=0.05, atol=1e-4)


def test_the_founding_architecture_is_one_line_of_parts(cells):
    """theta and gate from the decoder, an encoder that sees the batch, ZINB, latent library."""
    program = pyrosc.scvi(
        cells, n_latent=3, n_hidden=8, encoder=Encoder(3, 8, covariates="first"), dispersion=CellDispersion(),
        likelihood=ZINBLikelihood(), library=LatentLibrary(),
    )  # fmt: skip
    z = torch.randn(120, 3)
    rho, hidden = program.parts["decoder"](z, cells)
    law = program.parts["likelihood"](rho, program.parts["dispersion"].at(None, cells, hidden), hidden).base_dist

    head = program.parts["dispersion"].head
    torch.testing.assert_close(law.dispersion, (hidden @ head.weight.T + head.bias).exp())
    gate = program.parts["likelihood"].gate
    torch.testing.assert_close(law.gate_logits, hidden @ gate.weight.T + gate.bias)
    assert not torch.allclose(program.parts["encoder"](cells)[0], program.parts["encoder"](cells.do(donor="d1"))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(program, cells, epochs=4, progress=False)
    assert fit.history["train_elbo"].iloc[-1] > fit.history["train_elbo"].iloc[0]


def test_any_module_with_the_contract_is_a_network(cells):
    class OwnDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(3, 30)

        def forward(self, z, cells):
            return self.map(z).softmax(-1), None

    class OwnEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(30, 6)

        def features(self, log1p_counts, covariates=None):
            return self.map(log1p_counts)

        def forward(self, cells):
            hidden = self.features(cells.log1p())
            return hidden[..., :3], hidden[..., 3:].exp()

    program = tiny(cells, encoder=OwnEncoder(), decoder=OwnDecoder(), library=LatentLibrary(),
                   prior=pyrosc.Prior(dist.Normal, 0.0, 1.0, size=3))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(program, cells, epochs=3, progress=False)

    assert fit.latent(cells).shape == (120, 3)
    assert fit.program.completion.encoder is None  # the completed library reads the features of the user's encoder


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Encoder(covariates="middle"), 'covariates must be False, "first", "deep" or "norm", not \'middle\''),
        (lambda: Decoder(norm="group"), 'norm must be "layer", "batch" or None'),
        (lambda: Decoder(covariates="norm", norm=None), "scales the output of a norm layer"),
        (lambda: Encoder(n_hidden=0), "n_hidden must be a whole number"),
        (lambda: Encoder(dropout=1.0), r"dropout must be in \[0, 1\)"),
        (lambda: Encoder(embedding=0), "embedding must be a whole number"),
        (lambda: LinearDecoder(covariates="both"), "covariates must be"),
    ],
)
def test_wrong_arguments_are_explained(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_dispersion_of_cells_needs_a_hidden_layer(cells):
    with pytest.raises(ProgramError, match="this story's has none: use GeneDispersion"):
        tiny(cells, decoder=LinearDecoder(3), dispersion=CellDispersion())


def test_without_columns_nothing_enters():
    plain = Cells.from_anndata(small(20))
    for way in WAYS:
        decoder = tiny(plain, decoder=Decoder(3, 8, covariates=way)).parts["decoder"]
        assert decoder.covariates is None
        assert decoder(torch.zeros(20, 3), plain)[0].shape == (20, 30)


# ---- the first layer, at the non-zero counts alone ---------------------------------------------


@pytest.fixture(scope="module")
def sparse_cells():
    counts = np.random.default_rng(0).poisson(0.03, (50, 400)) + np.eye(50, 400, dtype=int)
    counts[0] += 1
    return Cells.from_counts(counts, batch=np.array(["a", "b"])[np.arange(50) % 2])


@pytest.mark.parametrize("way", [False, "first", "deep", "norm"])
def test_the_sparse_first_layer_is_the_dense_one(sparse_cells, monkeypatch, way):
    encoder = tiny(sparse_cells, encoder=Encoder(3, 16, covariates=way, embedding=1)).parts["encoder"]
    made = []
    make = nn.functional.embedding_bag
    monkeypatch.setattr("pyrosc.networks._ROWS", 1)
    monkeypatch.setattr(nn.functional, "embedding_bag", lambda *a, **k: (made.append(1), make(*a, **k))[1])

    dense = encoder(sparse_cells.running())
    with torch.no_grad():
        quick = encoder(sparse_cells.running())
        alone = encoder(sparse_cells[:1].running())  # its cell has a count of every gene

    assert made == [1]  # in the second alone
    for a, b, c in zip(dense, quick, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a[:1], c, rtol=1e-4, atol=1e-5)


def test_log_counts_carry_their_entries_until_they_are_edited(sparse_cells):
    logs = sparse_cells.log1p()
    carried = nonzeros(logs)

    assert torch.equal(carried.count, logs.view(-1)[carried.index])
    logs[0, 0] = 5.0
    assert nonzeros(logs).count[0] == 5.0
