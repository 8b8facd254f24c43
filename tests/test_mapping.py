"""Mapping: the reference stays to the last bit, new columns are all that moves, genes that are missing are no zeros."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch

import pyrosc
from pyrosc import (
    BatchDispersion,
    Cells,
    Decoder,
    Encoder,
    LatentLibrary,
    LinearDecoder,
    Prior,
    PyroscWarning,
    VampPrior,
)  # fmt: skip
from pyrosc.mapping import drift, filled, lengthened
from pyrosc.schema import grown


def _fit(program, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells, progress=False, **options)


def _map(fit, query, train="surgery", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        return fit.map(query, train, progress=False, **options)


@pytest.fixture(scope="module")
def split():
    """(reference, query): two batches, and a third of other depth with an unknown label column."""
    adata = pyrosc.simulate.tissue(900, 200, 3, 3, n_markers=40, effect=1.0, seed=4)
    for column in ("batch", "cell_type"):
        adata.obs[column] = adata.obs[column].astype(str)
    adata.obs["condition"] = np.where(np.arange(900) % 3 == 0, "stim", "ctrl")
    new = (adata.obs["batch"] == "batch2").to_numpy()
    query = adata[new].copy()
    query.obs["truth"] = query.obs.pop("cell_type")
    return adata[~new].copy(), query


@pytest.fixture(scope="module")
def reference(split):
    cells = Cells.from_anndata(split[0], batch="batch", label="cell_type", categorical=["condition"])
    return cells, _fit(pyrosc.scanvi(cells), cells, epochs=25)


STORIES = {
    "first layer": {},
    "encoder sees batches": {"encoder": Encoder(4, 32, covariates="first")},
    "every layer": {"encoder": Encoder(4, 32, 2, covariates="deep"), "decoder": Decoder(4, 32, 2, covariates="deep")},
    "norms": {"encoder": Encoder(4, 32, covariates="norm"), "decoder": Decoder(4, 32, covariates="norm")},
    "embedded": {"decoder": Decoder(4, 32, embedding=1)},
    "linear": {"decoder": LinearDecoder(4)},
    "dispersion by batch": {"dispersion": BatchDispersion(), "library": LatentLibrary()},
    "dispersion with a prior": {"dispersion": BatchDispersion(prior=Prior(dist.LogNormal, 1.0, 1.0))},
    "pseudo-cells": {"prior": VampPrior(5), "encoder": Encoder(4, 32, covariates="first")},
    "batch norm": {"encoder": Encoder(4, 32, covariates="first", norm="batch"), "decoder": Decoder(4, norm="batch")},
}


@pytest.mark.parametrize("parts", STORIES.values(), ids=STORIES)
def test_surgery_leaves_the_reference_to_the_last_bit_and_moves_the_query(split, parts):
    ref, query = split
    cells = Cells.from_anndata(ref, batch="batch", categorical=["condition"])
    fit = _fit(pyrosc.scvi(cells, n_latent=4, n_hidden=32, **parts), cells, epochs=3)
    before = {name: value.clone() for name, value in fit.program.state_dict().items()}

    found = _map(fit, query, epochs=5)

    assert drift(fit, found, cells) == {"latent": 0.0, "expression": 0.0}
    for name, value in fit.program.state_dict().items():
        assert torch.equal(value, before[name])
    assert found.schema.batch.levels == ("batch0", "batch1", "batch2")
    untrained = _map(fit, query, "none")
    assert found.settings["map"][0]["trained"] > 0 == untrained.settings["map"][0]["trained"]
    assert not np.allclose(found.expression(query, n_draws=1), untrained.expression(query, n_draws=1), rtol=1e-3)
    assert all(p.requires_grad for p in found.program.parameters())
    if not fit.program.has_globals:  # whose draws take more random numbers with more batches
        pd.testing.assert_frame_equal(found.expression(ref, n_draws=3), fit.expression(ref, n_draws=3))


@pytest.mark.parametrize("embedding", [None, 1])
def test_a_reference_of_one_batch_is_given_a_second(split, embedding):
    ref, query = split
    cells = Cells.from_anndata(ref[ref.obs["batch"] == "batch0"].copy(), batch="batch")
    fit = _fit(pyrosc.scvi(cells, n_latent=3, n_hidden=16, decoder=Decoder(3, embedding=embedding)), cells, epochs=2)
    found, none = _map(fit, query, epochs=10), _map(fit, query, "none")
    assert drift(fit, found, cells) == {"latent": 0.0, "expression": 0.0}
    one, two = (f.expression(query, n_draws=1).to_numpy() for f in (found, none))
    assert not np.allclose(one, two, rtol=0.01)


def test_moments_of_a_new_batch_are_of_totals_over_all_genes(split):
    ref, query = split
    cells = Cells.from_anndata(ref, batch="batch", categorical=["condition"])
    fit = _fit(pyrosc.scvi(cells, n_latent=3, n_hidden=16, library=LatentLibrary()), cells, epochs=10)
    found = _map(fit, query[:, :120].copy(), "none")
    expected = np.log(np.asarray(query.X.sum(1)).ravel()).mean()
    assert found.program.parts["library"].mean[2] == pytest.approx(expected, abs=0.1)
    assert found.schema.log_library_mean[2] == pytest.approx(float(found.program.parts["library"].mean[2]))
    assert torch.equal(found.program.parts["library"].mean[:2], fit.program.parts["library"].mean)


def test_what_was_frozen_stays_frozen(split):
    ref, query = split
    cells = Cells.from_anndata(ref, batch="batch", categorical=["condition"])
    program = pyrosc.scvi(cells, n_latent=3, n_hidden=16)
    program.parts["encoder"].requires_grad_(False)
    found = _map(_fit(program, cells, epochs=1), query, "all", epochs=1)
    for one, two in zip(found.program.parts["encoder"].parameters(), program.parts["encoder"].parameters()):
        assert torch.equal(one, two)
        assert not one.requires_grad


@pytest.mark.parametrize("train", ["none", "surgery", "decoder", "all"])
def test_labels_are_answered_after_every_way(split, reference, train):
    table = _map(reference[1], split[1], train, epochs=1).labels(split[1])
    assert table["p_state"].isna().all() == (train == "all")
    assert table["label"].notna().all()


def test_new_columns_start_at_the_mean_of_the_others(split):
    ref, query = split
    cells = Cells.from_anndata(ref, batch="batch", categorical=["condition"])
    program = pyrosc.scvi(cells, n_latent=4, n_hidden=16, dispersion=BatchDispersion())
    schema, new = grown(cells.schema, query.obs.assign(condition="third"))
    assert new == {"batch": ["batch2"], "condition": ["third"]}

    made, entries = lengthened(program, schema)

    # Columns: z (4), batch (3), condition (3).
    old, now = (p.parts["decoder"].layers[0].linear.weight for p in (program, made))
    expected = torch.cat(
        [old[:, :6], old[:, 4:6].mean(1, keepdim=True), old[:, 6:], old[:, 6:].mean(1, keepdim=True)], 1
    )
    assert torch.equal(now, expected)
    is_new = entries["parts.decoder.layers.0.linear.weight"]
    assert is_new[0].tolist() == [False] * 6 + [True, False, False, True]
    rows = made.parts["dispersion"].log_dispersion
    assert torch.equal(rows[2], program.parts["dispersion"].log_dispersion.mean(0))
    assert set(entries) == {"parts.decoder.layers.0.linear.weight", "parts.dispersion.log_dispersion"}


def test_only_what_is_asked_for_is_trained(split, reference):
    cells, fit = reference
    for train, moved in (("surgery", set()), ("decoder", {"decoder", "dispersion"}), ("all", {"encoder", "decoder"})):
        found = _map(fit, split[1], train, epochs=2)
        apart = {
            name.split(".")[1]
            for name, value in found.program.state_dict().items()
            if value.shape == fit.program.state_dict()[name].shape
            and not torch.equal(value, fit.program.state_dict()[name])
        }
        assert moved <= apart
        if train != "all":
            assert apart == moved
            assert drift(fit, found, cells)["latent"] == 0.0
    assert drift(fit, found, cells)["latent"] > 0


def test_surgery_explains_the_query_better_and_types_are_transferred(split, reference):
    _, query = split
    _, fit = reference
    none, found = _map(fit, query, "none"), _map(fit, query)
    gain = found.log_likelihood(query, 100) - none.log_likelihood(query, 100)
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5
    for by in ("story", "neighbors"):
        share = found.label_probabilities(query, by=by)
        assert (share.columns[share.to_numpy().argmax(1)] == query.obs["truth"]).mean() > 0.9


def test_missing_genes_are_filled_in_and_not_taken_for_zeros(split, reference):
    _, query = split
    _, fit = reference
    keep = np.random.default_rng(0).permutation(200)[:140]
    few = query[:, keep].copy()  # in another order, too
    found = _map(fit, few, "none")
    assert found.settings["map"][0]["missing_genes"] == 60

    whole, part = _map(fit, query, "none").latent(query), found.latent(few)
    padded = query.copy()
    gone = np.setdiff1d(np.arange(200), keep)
    x = padded.X.toarray()
    x[:, gone] = 0
    padded.X = x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        zeros = _map(fit, query, "none").latent(padded)
    assert np.square(part - whole).sum() < 0.7 * np.square(zeros - whole).sum()
    # The library is the total over all genes, of which a part was seen.
    cells = Cells.align(few, found.schema, missing="mask")
    total = np.asarray(query.X.sum(1)).ravel()
    assert np.median(filled(found, cells).library.numpy().ravel() / total) == pytest.approx(1.0, abs=0.1)
    assert found.expression(few).shape == (len(few), 200)
    again = found.expression(few, n_draws=2)
    pd.testing.assert_frame_equal(again, found.expression(few, n_draws=2))
    share = found.label_probabilities(few)
    assert (share.columns[share.to_numpy().argmax(1)] == query.obs["truth"]).mean() > 0.85


def test_likelihoods_are_of_genes_that_were_measured(split, reference):
    _, query = split
    _, fit = reference
    few = query[:20, :150].copy()
    found = _map(fit, few, "none")
    cells = found._ready(few)
    with found.program.driven(0), torch.no_grad():
        _, model = found.program.traces(cells)
    site = model.nodes["x"]
    by_gene = site["fn"].base_dist.log_prob(torch.as_tensor(cells.x.numpy()))
    torch.testing.assert_close(site["fn"].log_prob(cells.x), by_gene[:, :150].sum(-1), rtol=1e-4, atol=1e-2)


def test_a_chain_of_queries_saves_loads_and_keeps_all(split, reference, tmp_path):
    _, query = split
    cells, fit = reference
    one, two = query[:120].copy(), query[120:].copy()
    two.obs["batch"] = "batch9"
    first = _map(fit, one, epochs=3)
    first.save(tmp_path / "first.safetensors")
    second = _map(pyrosc.load(tmp_path / "first.safetensors"), two, epochs=3)
    assert second.schema.batch.levels == ("batch0", "batch1", "batch2", "batch9")
    assert drift(fit, second, cells) == {"latent": 0.0, "expression": 0.0}
    assert drift(first, second, Cells.align(one, first.schema)) == {"latent": 0.0, "expression": 0.0}
    assert [m["new_levels"] for m in second.settings["map"]] == [{"batch": ["batch2"]}, {"batch": ["batch9"]}]
    assert len(second.landmarks.loc) == len(cells) + len(query)
    second.save(tmp_path / "second.safetensors")
    back = pyrosc.load(tmp_path / "second.safetensors")
    assert np.array_equal(back.latent(two), second.latent(two))
    pd.testing.assert_frame_equal(back.labels(two), second.labels(two))


def test_a_query_without_new_levels_and_labels_of_its_own(split, reference, caplog):
    ref, _ = split
    _, fit = reference
    again = ref[:50].copy()
    again.obs["cell_type"] = "something new"
    with (
        caplog.at_level("INFO", logger="pyrosc"),
        pytest.warns(PyroscWarning, match="no level that the reference has not, so surgery has nothing to train"),
    ):
        found = fit.map(again, progress=False)
    assert '"something new"' in caplog.text
    assert found.schema.label == fit.schema.label
    assert np.array_equal(found.latent(ref), fit.latent(ref))


def test_an_ensemble_is_mapped_whole(split):
    ref, query = split
    cells = Cells.from_anndata(ref, batch="batch", categorical=["condition"])
    fit = _fit(pyrosc.scvi(cells, n_latent=3, n_hidden=16), cells, epochs=2, ensemble=2)
    found = _map(fit, query, epochs=1)
    assert len(found.members) == 2
    table = found.expression(query, interval=0.9, n_draws=4)
    assert "decoder" in table.attrs["uncertainty"]


def test_what_cannot_be_mapped_is_said(split, reference):
    _, query = split
    _, fit = reference
    with pytest.raises(ValueError, match='train must be "surgery"'):
        fit.map(query, "everything")
    other = query.copy()
    other.var_names = [f"ENSG{i:011d}" for i in range(200)]
    with pytest.raises(ValueError, match="200 of 200 genes of the fit are missing"):
        fit.map(other)
    with pytest.raises(ValueError, match="101 of 200 genes of the fit are missing"):
        fit.map(query[:, :99].copy())
    bare = query.copy()
    del bare.obs["batch"]
    with pytest.raises(ValueError, match='the fit knows batch "batch", which is not in adata.obs'):
        fit.map(bare)
    scaled = query.copy()
    scaled.X = scaled.X.toarray() * 0.37
    with pytest.raises(ValueError, match="not whole"):
        fit.map(scaled)
    with pytest.raises(ValueError, match="0 cells"):
        fit.map(query[:0].copy())
    numbers = query.copy()
    numbers.obs["batch"] = 7
    with pytest.raises(ValueError, match="number levels"):
        fit.map(numbers)
    with pytest.raises(TypeError, match="takes Cells or an AnnData"):
        fit.map(query.X)
    assert fit.map(query[:1].copy(), "none", progress=False).latent(query[:1].copy()).shape == (1, 10)


def test_a_part_that_grows_in_its_own_way_is_refused_by_name(split):
    class ByBatch(pyrosc.Part):
        def build(self, schema, sizes, parts):
            self.table = torch.nn.Parameter(torch.zeros(2 * schema.n_batches + 1, schema.n_genes))

        def forward(self):
            return self.table[0].exp()

        def at(self, value, cells, hidden=None):
            return value

    cells = Cells.from_anndata(split[0], batch="batch", categorical=["condition"])
    fit = _fit(pyrosc.scvi(cells, n_latent=3, n_hidden=16, dispersion=ByBatch()), cells, epochs=1)
    with pytest.raises(pyrosc.ProgramError, match=r"dispersion.table is \(5, 200\) in the reference and \(7, 200\)"):
        fit.map(split[1], progress=False)
