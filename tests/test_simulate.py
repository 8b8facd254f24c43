"""Simulated cells: what each simulator says of itself is so."""

import numpy as np
import pytest

import pyrosc


def test_counts_follow_the_stated_shares_totals_and_dispersions():
    adata = pyrosc.simulate.tissue(4000, 50, n_types=2, n_batches=1, depth=500, n_markers=10, seed=2)
    x, rho = adata.X.toarray(), adata.layers["rho"].astype(float)
    mean = adata.obs["library"].to_numpy()[:, None] * rho
    variance = mean + mean**2 / adata.var["dispersion"].to_numpy()
    scaled = (x - mean) / np.sqrt(variance)

    np.testing.assert_allclose(rho.sum(1), 1, rtol=1e-4)
    # by gene, over 4,000 cells: means within five standard errors, variances within what heavy tails allow
    assert np.abs(scaled.mean(0)).max() < 5 / 4000**0.5
    assert abs((scaled**2).mean() - 1) < 0.1
    assert abs(np.log(adata.obs["library"]).mean() - np.log(500)) < 5 * 0.35 / 4000**0.5


def test_types_batches_and_the_missing_type_are_there():
    adata = pyrosc.simulate.tissue(500, 80, n_types=4, n_batches=3, seed=0)
    table = adata.obs.groupby(["batch", "cell_type"], observed=False).size()

    assert table[("batch2", "type3")] == 0
    assert (table.drop(("batch2", "type3")) > 0).all()


def test_it_is_seeded_and_checks_its_arguments():
    one, other, third = (pyrosc.simulate.tissue(50, 60, seed=s) for s in (1, 1, 2))

    assert (one.X != other.X).nnz == 0
    assert (one.X != third.X).nnz > 0
    with pytest.raises(ValueError, match="n_markers must be between"):
        pyrosc.simulate.tissue(50, 20)


def test_programmes_are_what_tells_cells_apart():
    """Without batches, log shares of two cells differ by the programmes of their types and the factor, and by no more."""
    adata = pyrosc.simulate.tissue(40, 80, n_types=5, n_batches=1, n_markers=20, seed=3)
    table, kind = adata.varm["programmes"], adata.obs["cell_type"].astype(str).str[4:].astype(int).to_numpy()
    logits = np.outer(adata.obs["factor"], table["factor"])
    for name in table.columns.drop("factor"):
        level, branch = (int(v) for v in name.removeprefix("branch").split("."))
        logits += np.outer(kind >> (3 - level) == branch, table[name])
    apart = np.log(adata.layers["rho"][1:] / adata.layers["rho"][:1]) - (logits[1:] - logits[:1])

    np.testing.assert_allclose(apart, apart.mean(1, keepdims=True) + np.zeros(80), atol=1e-4)
    assert ((table.drop(columns="factor") != 0).sum() == 20).all()
    assert "branch1.1" in table  # type4 alone
    assert "branch2.3" not in table  # no type there


# ---- bursts -----------------------------------------------------------------------------------


def moments_of_bursts(adata):
    """(N, G) means and variances of counts, given the share captured, from the formulas of the kinetic law."""
    at = adata.obs["cell_type"].cat.codes.to_numpy()
    on, off, rate = (adata.varm[name].to_numpy().T[at] for name in ("on", "off", "rate"))
    captured = adata.obs["captured"].to_numpy()[:, None]
    mean = captured * rate * on / (on + off)
    return mean, mean + (captured * rate) ** 2 * on * off / ((on + off) ** 2 * (on + off + 1))


def test_bursts_have_the_means_and_variances_of_the_kinetic_law():
    adata = pyrosc.simulate.bursts(4000, 60, 2, populations=(2000, 2000), seed=1)
    mean, variance = moments_of_bursts(adata)
    scaled = (adata.X.toarray() - mean) / np.sqrt(variance)

    for kind in ("type0", "type1"):
        of_genes = scaled[(adata.obs["cell_type"] == kind).to_numpy()].mean(0)
        assert np.abs(of_genes).max() < 5 / 2000**0.5  # five standard errors
    squares = scaled**2
    assert abs(squares.mean() - 1) < 5 * squares.std() / squares.size**0.5
    assert abs(np.log(adata.obs["captured"]).mean() - np.log(0.08)) < 5 * 0.3 / 4000**0.5
    # the twin: without bursts (Poisson) the variance is far too small
    poisson = (adata.X.toarray() - mean) ** 2 / mean
    assert poisson.mean() - 1 > 20 * poisson.std() / poisson.size**0.5


def test_effects_between_types_of_bursts_are_found_in_their_counts():
    adata = pyrosc.simulate.bursts(4000, 200, 3, populations=(1500, 1500), seed=3)
    mean, variance = moments_of_bursts(adata)
    x, captured, kind = adata.X.toarray(), adata.obs["captured"].to_numpy(), adata.obs["cell_type"].to_numpy()
    truth = np.log(adata.varm["mean"]["type0"] / adata.varm["mean"]["type1"]).to_numpy()

    found, error = np.zeros(200), np.zeros(200)
    for sign, of_type in ((1, kind == "type0"), (-1, kind == "type1")):
        found += sign * np.log(x[of_type].sum(0) / captured[of_type].sum())
        error += variance[of_type].sum(0) / mean[of_type].sum(0) ** 2  # of a log of sums, by the delta method

    assert np.abs((found - truth) / np.sqrt(error)).max() < 5  # of 200 genes; chance of more is 1e-4
    assert np.abs((found - truth[::-1]) / np.sqrt(error)).max() > 20  # the twin: other genes' effects


def test_types_of_bursts_have_their_sizes_and_move_their_share_of_genes():
    adata = pyrosc.simulate.bursts(seed=0)
    sizes = adata.obs["cell_type"].value_counts()
    differs = (adata.varm["mean"]["type0"] != adata.varm["mean"]["type1"]).mean()
    none = pyrosc.simulate.bursts(50, 20, 3, populations=(), effects=0.0)

    assert adata.shape == (4000, 800)
    assert [sizes[f"type{t}"] for t in range(6)] == [500, 100, 850, 850, 850, 850]
    assert abs(differs - 0.51) < 5 * (0.51 * 0.49 / 800) ** 0.5
    assert (none.varm["mean"].nunique(axis=1) == 1).all()


def test_bursts_are_seeded_and_check_their_arguments():
    one, other, third = (pyrosc.simulate.bursts(50, 20, 2, populations=(30,), seed=s) for s in (1, 1, 2))

    assert (one.X != other.X).nnz == 0
    assert (one.X != third.X).nnz > 0
    for wrong, message in (
        (dict(n_genes=0), "n_genes must be a whole number >= 1, not 0"),
        (dict(n_types=1), "at most one for each of n_types=1, not .500, 100.: name fewer"),
        (dict(n_cells=602), "leave 2 of n_cells=602 to 4 other types, which is too few"),
        (dict(n_cells=700, n_types=2), "leave 100 of n_cells=700 to 0 other types, which must be none"),
        (dict(effects=1.5), "effects is the share of genes that a type moves, between 0 and 1, not 1.5"),
        (dict(capture=0.0), "capture is the share of molecules counted, above 0 and at most 1, not 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            pyrosc.simulate.bursts(**wrong)


# ---- shifted groups ---------------------------------------------------------------------------


def test_log_rates_of_shifted_groups_have_the_stated_mean_and_covariance():
    adata = pyrosc.simulate.shifted_groups(4000, 40, seed=1)
    gene, second = adata.var, (adata.obs["group"] == "group2").to_numpy()
    logs = np.log(adata.layers["mean"].astype(float))
    centred = logs - np.log(gene["base"].to_numpy()) - np.log(2) * second[:, None] * gene["shift"].to_numpy()
    factor = gene["factor"].to_numpy()
    covariance = 0.16 * np.outer(factor, factor) + np.diag(gene["sd"] ** 2)
    variance = np.diag(covariance)

    for group in (second, ~second):
        assert (np.abs(centred[group].mean(0)) < 5 * np.sqrt(variance / 2000)).all()
    # of normals, a sample covariance has the variance (v_g v_h + c_gh^2) / n; 820 of them within five standard errors
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / 4000)
    assert (np.abs(centred.T @ centred / 4000 - covariance) < 5 * error).all()


def test_counts_of_shifted_groups_are_poisson_with_extra_zeros():
    adata = pyrosc.simulate.shifted_groups(4000, 40, extra_zeros=0.3, seed=2)
    x, mean = adata.X.toarray(), adata.layers["mean"].astype(float)
    scaled = (x - 0.7 * mean) / np.sqrt(0.7 * mean + 0.21 * mean**2)
    squares = scaled**2

    assert np.abs(scaled.mean(0)).max() < 5 / 4000**0.5
    assert abs(squares.mean() - 1) < 5 * squares.std() / squares.size**0.5
    zeros = (x == 0).mean() - (0.3 + 0.7 * np.exp(-mean)).mean()
    assert abs(zeros) < 5 * (0.25 / x.size) ** 0.5
    none = pyrosc.simulate.shifted_groups(1000, 40, extra_zeros=0.0, seed=2)
    assert (none.X.toarray() == 0).mean() < 0.001


def test_half_of_the_genes_of_shifted_groups_move_and_counts_show_it():
    adata = pyrosc.simulate.shifted_groups(4000, 100, shift=1.0, seed=0)
    moved, shift = adata.var["is_shifted"].to_numpy(), adata.var["shift"].to_numpy()
    x, second = adata.X.toarray(), (adata.obs["group"] == "group2").to_numpy()

    found = np.log2(x[second].mean(0)) - np.log2(x[~second].mean(0))

    assert moved.sum() == 50
    assert second.sum() == 2000
    # normals around 0, -1 and 1; of 100, one beyond 4.5 sds has a chance of 7e-4
    assert np.abs(np.abs(shift) - moved).max() < 4.5 * 0.16
    # log rates have variance at most 0.22, zeros and Poisson add at most 0.68 to the squared cv of a count: 0.93 in all
    assert np.abs(found - shift).max() < 5 * (2 * 0.93 / 2000) ** 0.5 / np.log(2)
    assert np.abs(found + shift).max() > 1


def test_shifted_groups_are_seeded_and_check_their_arguments():
    one, other, third = (pyrosc.simulate.shifted_groups(20, 10, seed=s) for s in (1, 1, 2))

    assert (one.X != other.X).nnz == 0
    assert (one.X != third.X).nnz > 0
    for wrong, message in (
        (dict(n_cells=1), "n_cells must be at least 2, not 1"),
        (dict(n_genes=2.5), "n_genes must be a whole number >= 1, not 2.5"),
        (dict(shift=np.inf), "shift must be a finite log2 ratio such as 1.0, not inf"),
        (dict(extra_zeros=1.0), "extra_zeros must be at least 0 and below 1, not 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            pyrosc.simulate.shifted_groups(**wrong)


def test_subtle_types_have_the_law_that_they_say():
    data = pyrosc.simulate.subtle_types(4000, 600, 3, effect=1.0, n_markers=20, n_seeds=40, errors=0.25, seed=2)
    kind, label = (data.obs[c].cat.codes.to_numpy() for c in ("cell_type", "label"))
    marker_of = data.var["marker_of"].to_numpy()
    x = data.X.toarray()

    assert [int((marker_of == t).sum()) for t in ("", "type0", "type1", "type2")] == [540, 20, 20, 20]
    assert x.sum(1).mean() == pytest.approx(1500, rel=0.1)  # LogNormal(log 1500, 0.3) has mean 1,569; depth is a median
    assert x[:, marker_of != ""].mean() == pytest.approx(0.3, abs=0.06)
    for t in range(3):
        own = x[:, marker_of == f"type{t}"]
        # The log ratio of means: 1, with an error of 20 x 1,333 counts of 0.3, and the softmax's.
        assert np.log(own[kind == t].mean() / own[kind != t].mean()) == pytest.approx(1.0, abs=0.1)
    rho = data.layers["rho"]
    np.testing.assert_allclose(rho.sum(1), 1, rtol=1e-4)

    assert (np.bincount(label[label >= 0]) == 40).all()
    assert (label == kind)[label >= 0].mean() == pytest.approx(0.75)
    again = pyrosc.simulate.subtle_types(4000, 600, 3, effect=1.0, n_markers=20, n_seeds=40, errors=0.25, seed=2)
    assert (again.X != data.X).nnz == 0


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"errors": 1.0}, "errors must be at least 0 and below 1"),
        ({"n_seeds": 1000}, "n_cells=6,000 must be at least 16,000"),
        ({"n_markers": 500}, "4 types of 500 markers need 2,000 genes"),
        ({"n_types": 0}, "n_types must be a whole number"),
    ],
)
def test_subtle_types_refuse_what_cannot_be(wrong, text):
    with pytest.raises(ValueError, match=text):
        pyrosc.simulate.subtle_types(**wrong)
