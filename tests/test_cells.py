"""Cells and Schema: columns (rows 41-60 of the faults), new data (101-109), subsets and interventions."""

import json

import anndata
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine

from pyrosc import Cells, PyroscWarning, Schema
from pyrosc.counts import nonzeros

from .conftest import small

# ---- columns -----------------------------------------------------------------------------------


def test_a_missing_column_lists_those_there_and_the_nearest(adata):  # row 41
    with pytest.raises(
        ValueError, match='no column "doner".*"age", "cell_type", "condition", "donor".*Did you mean "donor"'
    ):
        Cells.from_anndata(adata, batch="doner")


def test_a_missing_batch_is_named_with_the_remedy(adata):  # row 42
    adata.obs["donor"] = adata.obs["donor"].astype("category")
    adata.obs.iloc[7, 0] = np.nan

    with pytest.raises(ValueError, match=r'"donor".*missing for 1 of 120 cells \(first: cell "c7"\).*add_categories'):
        Cells.from_anndata(adata, batch="donor")


def test_one_batch_runs_and_is_noted(adata, caplog):  # row 43
    adata.obs["donor"] = "d1"
    with caplog.at_level("INFO", "pyrosc"):
        assert Cells.from_anndata(adata, batch="donor").schema.n_batches == 1

    assert "no batch to adjust for" in caplog.text


def test_a_continuous_batch_is_refused(adata):  # row 44
    with pytest.raises(ValueError, match="looks continuous: 120 values in 120 cells"):
        Cells.from_anndata(adata, batch="age")


def test_a_rare_batch_is_named(adata):  # row 45
    adata.obs["donor"] = ["d3"] * 2 + ["d1"] * 60 + ["d2"] * 58

    with pytest.warns(PyroscWarning, match='one or two cells in "d3"'):
        Cells.from_anndata(adata, batch="donor")


def test_unused_categories_are_left_out(adata):  # row 46
    adata.obs["donor"] = adata.obs["donor"].astype("category").cat.add_categories("d9")

    assert Cells.from_anndata(adata, batch="donor").schema.batch.levels == ("d1", "d2")


@pytest.mark.parametrize(
    "values, levels, kind",
    [
        ([True, False, True], (False, True), "truth"),
        ([2, 1, 2], (1, 2), "number"),
        ([2.0, 1.0, 2.0], (1, 2), "number"),
        (["b", "a", "b"], ("a", "b"), "text"),
        (pd.Categorical(["b", "a", "b"], categories=["b", "a"]), ("a", "b"), "text"),
        (pd.Categorical([2, 1, 2]), (1, 2), "number"),
    ],
)
def test_levels_are_coded_by_value_whatever_their_type(values, levels, kind):  # row 47
    adata = small(9)
    adata.obs["donor"] = pd.concat([pd.Series(values)] * 3).to_numpy()
    if isinstance(values, pd.Categorical):
        adata.obs["donor"] = pd.Categorical(adata.obs["donor"], categories=values.categories)

    cells = Cells.from_anndata(adata, batch="donor")

    assert cells.schema.batch.levels == levels
    assert cells.schema.batch.kind == kind
    assert cells.batch.tolist() == [1, 0, 1] * 3


def test_numbers_at_training_and_text_later_are_explained(adata):  # row 48
    adata.obs["donor"] = [1, 2] * 60
    known = Cells.from_anndata(adata, batch="donor")
    adata.obs["donor"] = adata.obs["donor"].astype(str)

    with pytest.raises(ValueError, match=r"number levels.*another type: cast with .*astype\(int\)"):
        Cells.align(adata, known.schema)


def test_odd_level_names_are_kept_and_empty_ones_refused(adata):  # row 49
    adata.obs["donor"] = ["nan", "a/b"] * 60
    schema = Cells.from_anndata(adata, batch="donor").schema
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema

    adata.obs["donor"] = ["", "b"] * 60
    with pytest.raises(ValueError, match='empty level "".*cell "c0"'):
        Cells.from_anndata(adata, batch="donor")


def test_a_column_of_identifiers_is_said():  # row 50
    n = 2100
    with pytest.warns(PyroscWarning, match="1,050 levels: 134,400 weights"):
        Cells.from_counts(np.ones((n, 2)), condition=[f"id{i % 1050}" for i in range(n)])


def test_a_constant_covariate_is_said_and_harmless(adata):  # row 51
    adata.obs["age"] = 40.0

    with pytest.warns(PyroscWarning, match='"age".*is 40 in every cell'):
        cells = Cells.from_anndata(adata, continuous=["age"])

    assert torch.equal(cells.values["age"], torch.zeros(120))


@pytest.mark.parametrize("value", [np.nan, pd.NA, np.inf])
def test_a_missing_covariate_is_named(adata, value):  # row 52
    adata.obs["age"] = adata.obs["age"].astype("Float64") if value is pd.NA else adata.obs["age"]
    adata.obs.loc["c5", "age"] = value

    with pytest.raises(ValueError, match='"age".*1 of 120 cells.*cell "c5"'):
        Cells.from_anndata(adata, continuous=["age"])


def test_covariates_are_standardised_and_the_scaling_kept(adata):  # row 53
    adata.obs["age"] = 1e7 + adata.obs["age"] * 1e6

    cells = Cells.from_anndata(adata, continuous=["age"])

    scaling = cells.schema.continuous[0]
    assert cells.values["age"].mean().abs() < 1e-5
    assert cells.values["age"].std(correction=0) == pytest.approx(1, abs=1e-5)
    assert scaling.mean == pytest.approx(adata.obs["age"].mean())
    assert scaling.sd == pytest.approx(adata.obs["age"].std(ddof=0))


def test_a_text_covariate_is_refused_with_the_remedy(adata):  # row 54
    adata.obs["age"] = ["forty"] * 120

    with pytest.raises(ValueError, match=r"\"age\".*must hold numbers, found 'forty'.*categorical="):
        Cells.from_anndata(adata, continuous=["age"])


def test_a_batch_that_is_the_condition_is_shown_as_a_table(adata):  # row 55
    adata.obs["donor"] = np.where(adata.obs["condition"] == "stim", "lane2", "lane1")

    with pytest.warns(PyroscWarning, match="the same split.*cannot be told apart") as caught:
        Cells.from_anndata(adata, batch="donor", categorical=["condition"])

    n = int((adata.obs["condition"] == "stim").sum())
    assert str(n) in str(caught[0].message)
    assert "lane1" in str(caught[0].message)


def test_batches_nested_in_a_condition_are_said(adata):
    adata.obs["donor"] = adata.obs["donor"] + adata.obs["condition"]

    with pytest.warns(PyroscWarning, match='every level of "donor".* lies within one level of "condition"'):
        Cells.from_anndata(adata, batch="donor", categorical=["condition"])


def test_batches_that_cross_the_condition_are_not_remarked(adata):
    Cells.from_anndata(adata, batch="donor", categorical=["condition"])  # a warning is an error here


def test_a_sample_in_two_conditions_is_refused_with_the_samples(adata):  # row 56
    with pytest.raises(ValueError, match='2 of 2 samples \\("d1", "d2"\\).*"condition".*one specimen'):
        Cells.from_anndata(adata, sample="donor", categorical=["condition"])

    adata.obs["sample"] = adata.obs["donor"] + "_" + adata.obs["condition"]
    assert Cells.from_anndata(adata, sample="sample", categorical=["condition"]).schema.n_samples == 4


def test_missing_and_named_labels_count_as_unlabelled(adata):  # row 57
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(object)
    adata.obs.loc["c0", "cell_type"] = np.nan
    adata.obs.loc["c1", "cell_type"] = "Unknown"

    cells = Cells.from_anndata(adata, label="cell_type", unlabeled="Unknown")

    assert cells.label[:2].tolist() == [-1, -1]
    assert cells.schema.label.levels == ("B", "NK", "T")


def test_a_label_of_one_cell_is_named(adata):  # row 58
    adata.obs.loc["c0", "cell_type"] = "rare"

    with pytest.warns(PyroscWarning, match='a single cell in "rare"'):
        Cells.from_anndata(adata, label="cell_type")


@pytest.mark.filterwarnings("ignore:Transforming to str index")
def test_a_numeric_index_is_fine(adata):  # row 59
    adata.obs.index = range(120)

    assert len(Cells.from_anndata(adata)[["5", "6"]]) == 2


def test_columns_may_have_any_name_and_nothing_is_written(adata):  # row 60
    for i, name in enumerate(("_indices", "batch", "library", "codes", "x")):
        adata.obs[name] = np.random.default_rng(i).choice(["u", "v"], 120)
    before = list(adata.obs), list(adata.uns), list(adata.obsm)

    cells = Cells.from_anndata(adata, batch="_indices", categorical=["batch"])

    assert cells.do(batch="u").codes["batch"].unique().tolist() == [0]
    assert cells.do(batch="u").codes["_indices"].tolist() == cells.codes["_indices"].tolist()
    assert (list(adata.obs), list(adata.uns), list(adata.obsm)) == before


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(categorical="donor"), "list of columns"),
        (dict(continuous="age"), "list of columns"),
        (dict(unlabeled="x"), "needs label="),
        (dict(batch=["donor"]), "name of a column"),
        (dict(batch="donor", categorical=["donor"]), "has a role already"),
        (dict(genes=["g1", "g111"]), 'names "g111".*Did you mean "g11"'),
        (dict(genes="hvg"), 'genes="hvg": no such column'),
        (dict(genes=[True]), "mask of 1 for 30 genes"),
        (dict(genes=["g1", "g1"]), "twice"),
        (dict(size_factor="donor"), "must hold numbers"),
    ],
)
def test_wrong_arguments_are_explained(adata, options, says):
    with pytest.raises((ValueError, TypeError), match=says):
        Cells.from_anndata(adata, **options)


def test_size_factors_must_be_positive(adata):
    adata.obs["s"] = 1.0
    adata.obs.loc["c9", "s"] = 0.0

    with pytest.raises(ValueError, match='must be positive, but is 0 in cell "c9"'):
        Cells.from_anndata(adata, size_factor="s")


def test_genes_are_chosen_by_name_mask_or_column(adata):
    dense = adata.X.toarray()
    adata.var["hvg"] = [j in (3, 7) for j in range(30)]
    by_name = Cells.from_anndata(adata, genes=["g7", "g3", *[f"g{j}" for j in range(10, 20)]])

    assert by_name.schema.genes[:2] == ("g7", "g3")
    assert np.array_equal(by_name.x[:, :2].numpy(), dense[:, [7, 3]])
    keep = np.zeros(30, bool)
    keep[:20] = True
    assert Cells.from_anndata(adata, genes=keep).schema.genes == tuple(f"g{j}" for j in range(20))
    assert by_name.library.flatten().tolist() == dense[:, [7, 3, *range(10, 20)]].sum(1).tolist()
    adata.X[:, [3, 7]] = 1
    assert Cells.from_anndata(adata, genes="hvg").schema.genes == ("g3", "g7")


# ---- new data ----------------------------------------------------------------------------------


@pytest.fixture
def known(adata):
    return Cells.from_anndata(adata, batch="donor", label="cell_type", categorical=["condition"], continuous=["age"])


def test_genes_in_another_order_are_put_in_order(adata, known):  # rows 101, 109
    shuffled = adata[::-1, np.random.default_rng(0).permutation(30)]

    aligned = Cells.align(shuffled, known.schema)

    assert torch.equal(aligned.x, known.x.flip(0))
    assert list(aligned.names) == list(adata.obs_names[::-1])
    assert torch.equal(aligned.values["age"], known.values["age"].flip(0))


def test_missing_genes_are_listed(adata, known):  # row 102
    with pytest.raises(ValueError, match='10 of 30 genes of the fit are missing here \\("g20", "g21".*too many'):
        Cells.align(adata[:, :20], known.schema)
    with pytest.raises(ValueError, match='1 of 30 .*missing="zero"'):
        Cells.align(adata[:, :29], known.schema)
    with pytest.raises(ValueError, match="too many"):
        Cells.align(adata[:, :27], known.schema, missing="zero")

    with pytest.warns(PyroscWarning, match='1 of 30 genes.*"g29".*taken as not measured'):
        aligned = Cells.align(adata[:, :29], known.schema, missing="zero")
    assert aligned.gene_mask.tolist() == [True] * 29 + [False]


def test_extra_genes_are_left_out(adata, known):  # row 103
    more = anndata.concat(
        [adata, anndata.AnnData(np.ones((120, 2)), obs=adata.obs[[]], var=pd.DataFrame(index=["x1", "x2"]))], axis=1
    )
    more.obs = adata.obs

    assert torch.equal(Cells.align(more, known.schema).x, known.x)


@pytest.mark.parametrize(
    "here, fit, cause",
    [
        (lambda g: f"{g}.3", str, "version suffix"),
        (str.lower, str.upper, "upper and lower case"),
        (lambda g: f"ENSG0000{g[1:]}", str, "Ensembl ids"),
        (lambda g: f"other{g}", str, "same species"),
    ],
)
def test_names_of_another_kind_are_explained(adata, here, fit, cause):  # row 104
    adata.var_names = [fit(f"g{j}") for j in range(30)]
    known = Cells.from_anndata(adata)
    adata.var_names = [here(f"g{j}") for j in range(30)]

    with pytest.raises(ValueError, match=f"30 of 30 genes.*{cause}"):
        Cells.align(adata, known.schema)


def test_an_unseen_batch_is_refused_with_the_options(adata, known):  # row 105
    adata.obs.loc["c4", "donor"] = "d9"

    with pytest.raises(
        ValueError, match='levels that training did not: "d9" for 1 of 120.*nearest.*average.*fit again'
    ):
        Cells.align(adata, known.schema)


def test_an_absent_batch_column_is_refused_with_the_options(adata, known):  # row 106
    del adata.obs["donor"]

    with pytest.raises(ValueError, match='"donor", which is not in adata.obs.*nearest.*average.*fit again'):
        Cells.align(adata, known.schema)


def test_labels_may_be_absent_or_new_in_new_data(adata, known):
    adata.obs["cell_type"] = "something else"
    assert Cells.align(adata, known.schema).label.unique().tolist() == [-1]
    del adata.obs["cell_type"]
    assert Cells.align(adata, known.schema).label.unique().tolist() == [-1]


def test_normalised_queries_are_refused_too(adata, known):  # row 107
    adata.X = np.log1p(adata.X.toarray())

    with pytest.raises(ValueError, match="not whole"):
        Cells.align(adata, known.schema)


def test_one_cell_is_fine_and_none_is_not(adata, known):  # row 108
    assert len(Cells.align(adata[:1], known.schema)) == 1
    with pytest.raises(ValueError, match="0 cells"):
        Cells.align(adata[:0], known.schema)


def test_an_unseen_sample_is_no_obstacle(adata):
    adata.obs["sample"] = adata.obs["donor"] + adata.obs["condition"]
    known = Cells.from_anndata(adata, sample="sample")
    adata.obs["sample"] = "new"

    assert Cells.align(adata, known.schema).sample.unique().tolist() == [-1]


def test_genes_not_measured_and_kept_libraries_survive_a_second_alignment(adata, known):
    with pytest.warns(PyroscWarning):
        masked = Cells.align(adata[:, :29], known.schema, missing="zero")
    other = Cells.from_anndata(
        adata[:, ::-1], batch="donor", label="cell_type", categorical=["condition"], continuous=["age"]
    )

    again = Cells.align(masked, other.schema)
    assert again.gene_mask.tolist() == [False] + [True] * 29
    thinned, _ = known.thin(0.5)
    kept = known.with_counts(thinned.x)
    assert torch.equal(Cells.align(kept, other.schema).library, known.library)


def test_counts_edited_in_place_are_searched_again(known):
    x = known[:3].x
    before = nonzeros(x).index.clone()
    x[0, :] = 0

    assert not torch.equal(nonzeros(x).index, before)
    assert torch.equal(nonzeros(x).index, x.flatten().nonzero().squeeze(-1))


def test_cells_of_another_schema_are_recoded_by_value(adata, known):
    part = adata[adata.obs["donor"] == "d2"]
    own = Cells.from_anndata(part, batch="donor", label="cell_type", categorical=["condition"], continuous=["age"])

    aligned = Cells.align(own.do(condition="stim"), known.schema)

    assert own.batch.unique().tolist() == [0]
    assert aligned.batch.unique().tolist() == [1]
    assert aligned.codes["condition"].unique().tolist() == [1]
    torch.testing.assert_close(aligned.values["age"], known[list(part.obs_names)].values["age"])


# ---- subsets, interventions, mini-batches ------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [[3, 1, 2], slice(1, 9, 2), np.arange(120) < 5, ["c7", "c2"], -1, torch.tensor([0, 4]), np.array([], dtype=int)],
    ids=str,
)
def test_subsets_keep_order_names_and_columns(adata, known, index):
    rows = {"c7": [7, 2]}.get(index[0], None) if isinstance(index, list) and isinstance(index[0], str) else None
    rows = np.arange(120)[index.numpy() if isinstance(index, torch.Tensor) else index] if rows is None else rows
    rows = np.atleast_1d(rows)

    part = known[index]

    assert list(part.names) == [f"c{i}" for i in rows]
    assert np.array_equal(part.x.numpy(), adata.X.toarray()[rows])
    assert part.batch.tolist() == known.batch[rows].tolist()
    assert part.total == len(part) == len(rows)
    assert part.obs["cell_type"].tolist() == adata.obs["cell_type"].iloc[rows].tolist()


def test_subsets_of_subsets_are_subsets(known):
    assert list(known[20:60][[3, 1]].names) == ["c23", "c21"]
    assert torch.equal(known[20:60][[3, 1]].x, known.x[[23, 21]])


@pytest.mark.parametrize(
    "index, says",
    [([120], "no cell 120"), ([-121], "no cell -121"), ([True] * 5, "mask has 5 values for 120"), (["zz"], "no cell named"), ([[1]], "one dimension"), ([0.5], "positions, a mask or names")],
)  # fmt: skip
def test_a_wrong_index_is_explained(known, index, says):
    with pytest.raises(ValueError, match=says):
        known[index]


def test_a_mask_of_other_cells_is_refused(known):
    mask = pd.Series([True] * 120, index=[f"x{i}" for i in range(120)])

    with pytest.raises(ValueError, match="mask's index"):
        known[mask]


def test_a_minibatch_knows_the_total_and_a_subset_does_not(known):
    batch, part = known.minibatch([1, 2, 3]), known[[1, 2, 3]]

    def scale(cells):
        def model():
            with cells.plate():
                pyro.sample("u", pyro.distributions.Normal(0, 1))

        return poutine.trace(model).get_trace().nodes["u"]["scale"]

    assert (batch.total, part.total) == (120, 3)
    assert (scale(batch), scale(part)) == (40.0, 1.0)
    assert torch.equal(batch.x, part.x)


def test_do_sets_levels_by_column_or_role(known):
    assert known.do(condition="stim").codes["condition"].unique().tolist() == [1]
    assert known.do(batch="d2").batch.unique().tolist() == [1]
    assert known.do(condition="stim").obs["condition"].unique().tolist() == ["stim"]
    assert known.do(donor=["d1", "d2"] * 60).batch.tolist() == [0, 1] * 60
    aged = known.do(age=50.0)
    scaling = known.schema.continuous[0]
    torch.testing.assert_close(aged.values["age"], torch.full((120,), (50 - scaling.mean) / scaling.sd))
    assert known.codes["condition"].unique().tolist() == [0, 1]
    assert torch.equal(known.do(condition="stim").x, known.x)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(condition="stimm"), 'no level \'stimm\'.*"ctrl", "stim".*Did you mean "stim"'),
        (dict(conditoin="stim"), 'no covariate "conditoin".*Did you mean "condition"'),
        (dict(condition=["stim"]), "1 levels for 120 cells"),
        (dict(donor=1), "no level 1"),
    ],
)
def test_do_explains_what_it_cannot_do(known, change, says):
    with pytest.raises(ValueError, match=says):
        known.do(**change)


def test_split_is_disjoint_and_seeded(known):
    a, b, c = known.split(0.8, 0.1, 0.1, seed=3)

    assert [len(part) for part in (a, b, c)] == [96, 12, 12]
    assert set(a.names) | set(b.names) | set(c.names) == set(known.names)
    assert list(known.split(0.5, seed=3)[0].names) == list(known.split(0.5, seed=3)[0].names)
    assert list(known.split(0.5, seed=3)[0].names) != list(known.split(0.5, seed=4)[0].names)
    with pytest.raises(ValueError, match="sum to at most 1"):
        known.split(0.8, 0.8)


def test_thinned_counts_add_up_and_keep_the_stated_share(known):
    kept, rest = known.thin(0.3, seed=1)

    assert torch.equal(kept.x + rest.x, known.x)
    n = float(known.library.sum())
    # five binomial standard errors
    assert abs(float(kept.library.sum()) / n - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5
    assert torch.equal(kept.library.squeeze(-1), kept.x.sum(1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        known.thin(1.5)


def test_counts_can_be_taken_away_and_replaced(known):
    bare = known.without_counts()

    assert bare.x is None
    assert not bare.has_counts
    assert torch.equal(bare.library, known.library)
    other = bare.with_counts(known.x + 1)
    assert torch.equal(other.x, known.x + 1)
    assert torch.equal(other.library, known.library)
    with pytest.raises(ValueError, match="shape"):
        bare.with_counts(torch.ones(2, 2))


def test_the_schema_survives_json(known):
    assert Schema.from_json(json.loads(json.dumps(known.schema.to_json()))) == known.schema


def test_double_precision_is_everywhere(known):
    wide = known.to("cpu", torch.float64)

    assert wide.x.dtype == wide.library.dtype == wide.values["age"].dtype == wide.log1p().dtype == torch.float64
    assert wide.batch.dtype == torch.int64


def test_the_fingerprint_tells_edited_data(adata, known):
    before = known.fingerprint()
    adata.X = adata.X.copy()
    adata.X[0, 0] += 1

    assert known.fingerprint() == before
    after = Cells.from_anndata(adata).fingerprint()
    assert after["names"] == before["names"]
    assert after["counts"] != before["counts"]


def test_dense_counts_that_do_not_fit_are_refused(known, monkeypatch):
    monkeypatch.setattr("pyrosc.counts.available_memory", lambda: 1000)

    with pytest.raises(ValueError, match=r"dense counts.*GB are free.*cells\[:1000\]"):
        _ = known.x
