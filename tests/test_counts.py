"""Reading matrices of counts: what is accepted, what is refused, and what is said (rows 1-40 of the faults)."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from pyrosc import Cells, PyroscWarning
from pyrosc.counts import CountMatrix, nonzeros

from .conftest import small


def with_x(adata, x):
    return anndata.AnnData(X=x, obs=adata.obs, var=adata.var)


def spoiled(value, dtype=np.float32):
    """Counts with one odd value at cell c3, gene g4."""
    adata = small()
    x = adata.X.toarray().astype(dtype)
    x[3, 4] = value
    return with_x(adata, sparse.csr_matrix(x))


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, says",
    [(np.nan, "1 missing"), (np.inf, "1 infinite"), (-1.0, "1 negative.*Scaled"), (1.5, "1 not whole.*Log-normalised")],
    ids=["row 1: nan", "row 2: inf", "row 3: negative", "rows 4 and 5: a stray fraction"],
)
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_what_is_no_count_is_named_with_cell_gene_and_remedy(value, says, form):
    adata = small()
    x = adata.X.toarray()
    x[3, 4] = value
    adata.layers["counts"] = form(x)

    with pytest.raises(ValueError, match=f'layers\\["counts"\\] must hold whole numbers.*{says}') as error:
        Cells.from_anndata(adata, layer="counts")

    assert 'cell "c3", gene "g4"' in str(error.value)
    assert "layer=" in str(error.value)


def test_a_single_fraction_among_millions_is_found():
    x = sparse.random(3000, 4000, density=0.2, random_state=0, dtype=np.float32)
    x.data[:] = 1
    x = x.tocsr()
    x.data[1_234_567] = 1.5

    with pytest.raises(ValueError, match="of 2,400,000 values looked at 1 not whole"):
        Cells.from_counts(x)


def test_many_bad_values_are_counted_by_kind():
    x = np.ones((4, 5))
    x[0, 0], x[1, 1], x[2, 2] = np.nan, -2, -3

    with pytest.raises(ValueError, match=r"1 missing \(NaN\) and 2 negative"):
        Cells.from_counts(x)


def test_x_that_is_none_lists_the_layers():  # row 6
    adata = small()
    adata.layers["counts"] = adata.X
    adata.X = None

    with pytest.raises(ValueError, match='X is empty.*layers there: "counts"'):
        Cells.from_anndata(adata)


def test_a_wrong_layer_lists_the_layers_and_the_nearest():  # row 7
    adata = small()
    adata.layers["counts"] = adata.X

    with pytest.raises(ValueError, match='no layer "count".*"counts".*Did you mean "counts"'):
        Cells.from_anndata(adata, layer="count")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=["row 8: no cells", "row 9: no genes"])
def test_nothing_to_read_is_an_error(shape):
    with pytest.raises(ValueError, match="at least one of each"):
        Cells.from_counts(np.zeros(shape))


def test_all_zero_is_an_error():  # row 11
    with pytest.raises(ValueError, match="zero everywhere"):
        Cells.from_counts(np.zeros((3, 4)))


def test_cells_without_counts_are_named_with_the_remedy():  # row 12
    adata = small()
    x = adata.X.toarray()
    x[[2, 5]] = 0

    with pytest.raises(ValueError, match=r'2 of 120 cells have no counts \("c2", "c5"\).*filter_cells'):
        Cells.from_anndata(with_x(adata, x))


def test_cells_without_counts_are_flagged_when_asked_about(adata):  # row 12, at draw time
    known = Cells.from_anndata(adata)
    x = adata.X.toarray()
    x[2] = 0

    with pytest.warns(PyroscWarning, match='1 cells have no counts.*"c2".*prior'):
        Cells.align(with_x(adata, x), known.schema)


def test_genes_never_seen_are_kept_and_counted():  # row 13
    x = np.ones((3, 5))
    x[:, [1, 3]] = 0

    with pytest.warns(PyroscWarning, match="2 of 5 genes are never seen"):
        assert Cells.from_counts(x).n_genes == 5


def test_repeated_gene_names_are_an_error(adata):  # row 14
    adata.var_names = ["g0", "g0", *adata.var_names[2:]]

    with pytest.raises(ValueError, match=r'gene names repeat \("g0"\).*var_names_make_unique'):
        Cells.from_anndata(adata)


def test_repeated_cell_names_are_said_once(adata):  # row 15
    adata.obs_names = ["c0", "c0", *adata.obs_names[2:]]

    with pytest.warns(PyroscWarning, match="cell names repeat"):
        cells = Cells.from_anndata(adata)

    with pytest.raises(ValueError, match="names repeat"):
        cells[["c0"]]


def test_counts_beyond_float32_are_an_error():  # row 16
    with pytest.raises(ValueError, match=r'16777217.*cell "c3", gene "g4".*2\*\*24'):
        Cells.from_anndata(spoiled(2**24 + 1, np.float64))


def test_large_counts_are_said():  # row 17
    with pytest.warns(PyroscWarning, match="counts up to 2000000"):
        Cells.from_anndata(spoiled(2_000_000))


def test_float16_is_taken_up_to_what_it_holds(adata):  # row 18
    x = adata.X.toarray()
    assert torch.equal(Cells.from_anndata(with_x(adata, x.astype(np.float16))).x, torch.tensor(x))
    x[0, 0] = 4000

    with pytest.raises(ValueError, match="float16 has already rounded"):
        Cells.from_anndata(with_x(adata, x.astype(np.float16)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.int64, np.float64, ">i4", ">f4"])
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_any_numeric_type_gives_the_same_counts(adata, dtype, form):  # rows 19, 23, 27
    if np.dtype(dtype).byteorder == ">" and form is not np.asarray:
        pytest.importorskip("scipy")
        x = sparse.csr_matrix(adata.X)
        x.data = x.data.astype(dtype)
        x = (
            x
            if form is sparse.csr_matrix
            else form((x.tocsc().data.astype(dtype), x.tocsc().indices, x.tocsc().indptr), shape=x.shape)
        )
    else:
        x = form(adata.X.toarray().astype(dtype))

    cells = Cells.from_counts(x)

    assert torch.equal(cells.x, torch.tensor(adata.X.toarray()))
    assert torch.equal(cells.library.squeeze(-1), torch.tensor(adata.X.toarray()).sum(1))


def test_totals_do_not_overflow_the_stored_type():  # row 19
    cells = Cells.from_counts(np.array([[200, 100], [255, 255]], dtype=np.uint8))

    assert cells.library.flatten().tolist() == [300, 510]


def test_object_matrices_are_refused_by_type():  # row 20
    with pytest.raises(TypeError, match="dtype object; its first element is str"):
        Cells.from_counts(np.array([["1", "2"]], dtype=object))


def test_a_true_false_matrix_is_said():  # row 21
    with pytest.warns(PyroscWarning, match="presence or absence"):
        assert Cells.from_counts(np.array([[True, False], [True, True]])).x.tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("x", [np.ones((2, 2), dtype=complex), np.array([["a", "b"]])], ids=["complex", "text"])
def test_matrices_of_no_numbers_are_refused(x):  # row 22
    with pytest.raises(TypeError, match="Convert it to numbers"):
        Cells.from_counts(x)


@pytest.mark.parametrize("change", ["fortran", "read-only", "reversed", "memmap"])
def test_odd_memory_layouts_are_read_and_left_alone(adata, change, tmp_path):  # rows 24, 25, 26
    x = adata.X.toarray()
    if change == "fortran":
        x = np.asfortranarray(x)
    elif change == "read-only":
        x.flags.writeable = False
    elif change == "reversed":
        x = x[::-1, ::-1]
    else:
        file = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=x.shape)
        file[:] = x
        x = file
    flags, copy = (x.flags.f_contiguous, x.flags.writeable), np.array(x)

    cells = Cells.from_counts(x)

    assert torch.equal(cells.x, torch.tensor(copy))
    assert (x.flags.f_contiguous, x.flags.writeable) == flags
    assert np.array_equal(x, copy)


def test_csc_is_converted_privately_with_its_size_said(adata, caplog):  # row 27
    adata.X = adata.X.tocsc()
    with caplog.at_level("INFO", "pyrosc"):
        Cells.from_anndata(adata)

    assert "stored by columns; a private copy" in caplog.text
    assert adata.X.format == "csc"


def test_csc_that_would_not_fit_is_refused_with_the_remedy(adata, monkeypatch):  # row 27
    monkeypatch.setattr("pyrosc.counts.available_memory", lambda: 1000)
    adata.X = adata.X.tocsc()

    with pytest.raises(ValueError, match="a copy of adata.X by rows .* would take .* are free.*tocsr"):
        Cells.from_anndata(adata)


def test_coo_is_refused_with_the_remedy(adata):  # row 28
    with pytest.raises(TypeError, match="tocsr"):
        Cells.from_counts(adata.X.tocoo())


def test_csr_arrays_equal_csr_matrices(adata):  # row 29
    one, other = (Cells.from_counts(form(adata.X)) for form in (sparse.csr_array, sparse.csr_matrix))

    assert torch.equal(one.x, other.x)


def odd_csr():
    """[[0, 3, 1], [2, 0, 0]] with a stored zero, unsorted columns and an entry given twice."""
    data = np.array([1.0, 1.0, 0.0, 2.0, 2.0], dtype=np.float32)
    return sparse.csr_matrix((data, np.array([2, 1, 0, 1, 0]), np.array([0, 4, 5])), shape=(2, 3))


def test_stored_zeros_unsorted_and_repeated_entries_are_put_in_order():  # rows 30, 31, 32
    x = odd_csr()
    before = x.data.copy(), x.indices.copy(), x.indptr.copy()

    cells = Cells.from_counts(x)

    assert cells.x.tolist() == [[0, 3, 1], [2, 0, 0]]
    assert nonzeros(cells.x).index.tolist() == [1, 2, 3]
    assert all(np.array_equal(a, b) for a, b in zip(before, (x.data, x.indices, x.indptr)))


def test_repeated_entries_do_not_overflow():  # rows 19 and 32
    x = sparse.csr_matrix((np.array([200, 100], dtype=np.uint8), [0, 0], [0, 2]), shape=(1, 2))

    with pytest.warns(PyroscWarning, match="never seen"):
        assert Cells.from_counts(x).x.tolist() == [[300, 0]]


def test_more_than_two_to_the_31_entries_are_reached(tmp_path):  # row 33
    n = 2**31 + 10
    held = []
    for name, dtype in (("data", np.uint8), ("indices", np.int32)):
        path = tmp_path / name
        with open(path, "wb") as file:  # a hole: takes no room on disk
            file.truncate(n * np.dtype(dtype).itemsize)
        held.append(np.memmap(path, dtype=dtype, mode="r+", shape=(n,)))
    data, indices = held
    data[-3:], indices[-3:] = [7, 8, 9], [0, 2, 3]
    indptr = torch.tensor([0, n - 3, n], dtype=torch.int64)
    matrix = CountMatrix(indptr, torch.from_numpy(indices), torch.from_numpy(data), 4)

    assert matrix.dense(torch.tensor([1]), torch.float32).tolist() == [[7, 0, 8, 9]]
    assert matrix.take(torch.tensor([1, 1])).indptr.tolist() == [0, 3, 6]


@pytest.mark.parametrize("module, remedy", [("dask.array", "compute"), ("cupy", "get"), ("awkward", "csr_matrix")])
def test_matrices_of_other_libraries_are_refused_by_kind(module, remedy):  # row 34
    stranger = type("Array", (), {"__module__": module, "ndim": 2, "shape": (2, 2), "dtype": np.dtype("f4")})()

    from pyrosc.counts import read_counts

    with pytest.raises(TypeError, match=f"{module.split('.')[0]} array.*{remedy}"):
        read_counts(stranger, "adata.X", ["a", "b"], ["g", "h"], "", [])


def test_views_are_read(adata):  # row 35
    view = adata[10:20, ::-1]

    cells = Cells.from_anndata(view)

    assert view.is_view
    assert torch.equal(cells.x, torch.tensor(adata.X.toarray()[10:20, ::-1].copy()))


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_backed_files_are_read_and_may_then_vanish(adata, form, tmp_path, caplog):  # rows 36, 37
    dense = adata.X.toarray()
    with_x(adata, form(dense)).write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")

    with caplog.at_level("INFO", "pyrosc"):
        cells = Cells.from_anndata(backed)
    assert "MB a second; the file is not needed again" in caplog.text
    backed.file.close()
    (tmp_path / "a.h5ad").unlink()

    assert torch.equal(cells.x, torch.tensor(dense))


def test_genes_by_cells_is_refused(adata):  # row 39
    barcodes = ["".join(np.random.default_rng(i).choice(list("ACGT"), 16)) + "-1" for i in range(adata.n_obs)]
    adata.obs_names = barcodes

    with pytest.raises(ValueError, match=r"look like cells.*adata\.T"):
        Cells.from_anndata(adata.T)


def test_mixed_feature_types_are_said(adata):  # row 40
    adata.var["feature_types"] = ["Gene Expression"] * 25 + ["Antibody Capture"] * 5

    with pytest.warns(PyroscWarning, match="25 Gene Expression, 5 Antibody Capture"):
        Cells.from_anndata(adata)


def test_more_than_ten_thousand_genes_are_said():
    x = sparse.random(5, 10_001, density=0.5, random_state=0, format="csr")
    x.data[:] = 1
    with pytest.warns(PyroscWarning, match="10,001 genes: .*Select some first.*size_factor="):
        Cells.from_counts(x)


# ---- the matrix itself -------------------------------------------------------------------------


def test_counts_are_held_in_the_smallest_integers():
    sizes = {255: torch.uint8, 256: torch.int16, 40_000: torch.int32}
    for most, dtype in sizes.items():
        assert Cells.from_counts(np.array([[most, 1]]))._counts.data.dtype == dtype


def test_dense_blocks_carry_their_entries(adata):
    cells = Cells.from_anndata(adata)
    block = cells[[5, 3, 3]]
    found = nonzeros(block.x)
    expected = block.x.flatten().nonzero().squeeze(-1)

    assert torch.equal(block.x, torch.tensor(adata.X.toarray()[[5, 3, 3]]))
    assert torch.equal(found.index, expected)
    assert torch.equal(found.gene, expected % 30)
    assert torch.equal(found.count, block.x.flatten()[expected])


def test_the_matrix_of_the_caller_never_changes(adata):
    copy = adata.copy()

    cells = Cells.from_anndata(adata, batch="donor", label="cell_type", continuous=["age"])
    cells.do(donor="d1")
    cells._counts.data.fill_(1)

    assert (adata.X != copy.X).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, copy.obs)
    assert list(adata.uns) == list(copy.uns)
