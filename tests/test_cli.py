"""The command line, as a user types it."""

import re
import subprocess
import sys

import anndata
import numpy as np
import pytest

import pyrosc
from pyrosc.cli import main

from .conftest import small


@pytest.fixture
def file(tissue, tmp_path):
    adata = tissue[:200].copy()
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    return tmp_path / "a.h5ad"


def test_fit_trains_and_writes_everything(file, tmp_path, capsys):
    out = tmp_path / "out"
    status = main(["fit", str(file), "--layer", "counts", "--batch", "batch", "--label", "cell_type", "--latent", "3", "--epochs", "3", "--out", str(out), "--quiet"])  # fmt: skip
    said = capsys.readouterr().out

    assert status == 0
    assert {p.name for p in out.iterdir()} == {"fit.safetensors", "cells.h5ad", "training.png", "latent.png"}
    assert re.search(r"^z +cells +n \| 3 +Normal +Normal +analytic$", said, re.M)
    assert re.search(r"held-out ELBO -\d+\.\d nats a cell", said)
    assert re.search(r"scvi latent +[-\d.]+ +[-\d.]+\n  3 PCs of log counts +[-\d.]+ +[-\d.]+", said)
    assert re.search(r"gene\d+, expected counts per 10,000, with 90 % intervals", said)
    written = anndata.read_h5ad(out / "cells.h5ad")
    fit = pyrosc.load(out / "fit.safetensors")
    np.testing.assert_allclose(written.obsm["X_scvi"], fit.latent(written), atol=1e-5)
    assert (out / "latent.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--batch", "btch"], 'no column "btch".*Did you mean "batch"'),
        (["--layer", "count"], 'no layer "count".*Did you mean "counts"'),
        (["--epochs", "0"], "epochs must be a whole number"),
        (["--gene", "gene999"], 'no gene "gene999"'),
        (["--latent", "0"], "n_latent must be"),
        (["--device", "gpu"], "device must be"),
        (["--genes", "hvg"], "no such column in adata.var"),
    ],
)
def test_bad_input_is_one_line_and_status_2(file, tmp_path, capsys, arguments, says):
    status = main(["fit", str(file), "--out", str(tmp_path / "out"), "--quiet", *arguments])
    said = capsys.readouterr().err

    assert status == 2
    assert re.search(f"^pyrosc: error: .*{says}", said, re.M)
    assert "Traceback" not in said


def test_files_that_are_not_there_or_not_h5ad_are_said(tmp_path, capsys):
    assert main(["fit", str(tmp_path / "no.h5ad")]) == 2
    (tmp_path / "text.h5ad").write_text("hello")
    assert main(["fit", str(tmp_path / "text.h5ad")]) == 2
    said = capsys.readouterr().err

    assert "there is no file" in said
    assert "could not be read as h5ad" in said


def test_results_are_not_replaced_unless_told(file, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "cells.h5ad").write_text("mine")

    assert main(["fit", str(file), "--out", str(out), "--quiet"]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert (out / "cells.h5ad").read_text() == "mine"


def test_normalised_counts_are_refused_from_a_real_shell(tmp_path):
    adata = small()
    adata.X = np.log1p(adata.X.toarray())
    adata.write_h5ad(tmp_path / "log.h5ad")

    done = subprocess.run(
        [sys.executable, "-m", "pyrosc", "fit", "log.h5ad"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert done.stderr.startswith("pyrosc: error: adata.X must hold whole numbers >= 0")
    assert done.stderr.count("\n") == 1


def test_a_wrong_command_is_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fitt"])
    assert stop.value.code == 2
