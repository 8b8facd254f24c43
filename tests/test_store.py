"""Files: what goes in comes out, nothing in them runs, and what is wrong with one is said (rows 94-100 of the faults)."""

import json
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pyrosc
from pyrosc import Cells, Decoder, NBLikelihood, Part, PoissonLikelihood, Prior, Program, PyroscWarning, ZINBLikelihood
from pyrosc.distributions import NegativeBinomial
from pyrosc.models import scvi as story

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def fit(fitted):
    return fitted[2]


@pytest.fixture
def cells(fitted):
    return fitted[1]


def quick(program, cells):
    with warnings.catch_warnings():  # one epoch leaves latents unused
        warnings.simplefilter("ignore", PyroscWarning)
        return pyrosc.fit(program, cells[:60], epochs=1, progress=False, warmup=0.0)


def edit(path, change):
    """Rewrite the JSON text of a file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    held = json.loads(header["__metadata__"]["pyrosc"])
    change(held)
    header["__metadata__"]["pyrosc"] = json.dumps(held)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_a_fit_comes_back_whole(fit, cells, tmp_path):
    path = tmp_path / "a.safetensors"
    fit.save(path)
    again = pyrosc.load(path)

    np.testing.assert_array_equal(again.latent(cells), fit.latent(cells))
    pd.testing.assert_frame_equal(again.expression(cells[:5]), fit.expression(cells[:5]))
    np.testing.assert_array_equal(again.elbo(cells), fit.elbo(cells))
    pd.testing.assert_frame_equal(again.history, fit.history)
    assert again.settings == json.loads(json.dumps(fit.settings))
    assert again.schema == fit.schema
    assert again.program.describe() == fit.program.describe()
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize(
    "parts",
    [
        dict(likelihood=ZINBLikelihood()),
        dict(likelihood=PoissonLikelihood(), dispersion=None),
        dict(prior=Prior(dist.Laplace, 0.0, 2.0)),
        dict(prior=Prior(dist.Normal, torch.linspace(-1, 1, 3), torch.ones(3))),
        dict(decoder=Decoder(3, 9, 2, dropout=0.2, covariates=False)),
        dict(encoder=pyrosc.Encoder(3, 7, 2, covariates=True)),
        dict(prior=pyrosc.VampPrior(3)),
        dict(prior=pyrosc.VampPrior(3), encoder=pyrosc.Encoder(3, 7, covariates="norm")),
        dict(prior=pyrosc.FlowPrior(2, "spline"), library=pyrosc.LatentLibrary()),
        dict(prior=pyrosc.MixturePrior(locs=np.zeros((2, 3)), scales=np.ones((2, 3)), learned=False)),
        dict(dispersion=pyrosc.BatchDispersion(pyrosc.TrendPrior()), decoder=pyrosc.LinearDecoder(3)),
    ],
    ids=lambda p: "+".join(p),
)
def test_every_part_of_the_table_comes_back(cells, tmp_path, parts):
    program = pyrosc.scvi(cells, n_latent=3, n_hidden=8).replace(
        **{k: v or pyrosc.NoDispersion() for k, v in parts.items()}
    )
    fit = quick(program, cells)
    fit.save(tmp_path / "a.safetensors")

    again = pyrosc.load(tmp_path / "a.safetensors")

    np.testing.assert_array_equal(again.elbo(cells[:9]), fit.elbo(cells[:9]))
    assert again.program.describe() == fit.program.describe()


def test_every_part_that_is_shipped_is_in_the_table():
    from pyrosc.store import PARTS

    shipped = {v for v in vars(pyrosc).values() if isinstance(v, type) and issubclass(v, Part) and v is not Part}
    assert shipped == set(PARTS.values())


class Doubled(Part):
    def forward(self, mean, dispersion=None, hidden=None):
        return NegativeBinomial(mean, 2 * dispersion).to_event(1)


def test_a_part_of_ones_own_is_handed_back_by_name(cells, tmp_path):
    fit = quick(pyrosc.scvi(cells, n_latent=3, n_hidden=8, likelihood=Doubled()), cells)
    fit.save(tmp_path / "a.safetensors")

    with pytest.raises(ValueError, match=r'part "likelihood" is of a class of your own, Doubled.*likelihood=Doubled'):
        pyrosc.load(tmp_path / "a.safetensors")
    again = pyrosc.load(tmp_path / "a.safetensors", likelihood=Doubled())
    np.testing.assert_array_equal(again.elbo(cells[:9]), fit.elbo(cells[:9]))
    with pytest.warns(PyroscWarning, match='source of part "likelihood" has changed'):
        pyrosc.load(tmp_path / "a.safetensors", likelihood=NBLikelihood())
    with pytest.raises(ValueError, match='has no part "liklihood"'):
        pyrosc.load(tmp_path / "a.safetensors", likelihood=Doubled(), liklihood=Doubled())


class Own(dist.Normal):
    pass


class Wide(Part):
    def __init__(self, scale=1.0):
        super().__init__(scale=scale)

    def forward(self, cells=None):
        return dist.Normal(0.0, self.arguments["scale"]).expand([3]).to_event(1)


def test_own_parts_are_compared_by_arguments_and_source(cells, tmp_path):
    path = tmp_path / "a.safetensors"
    quick(pyrosc.scvi(cells, n_latent=3, n_hidden=8, prior=Prior(Own, 0.0, 1.0)), cells).save(path)
    with pytest.raises(ValueError, match=r"own, Prior\(Own, ...\).*prior=Prior\(Own, ...\)"):
        pyrosc.load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PyroscWarning)
        pyrosc.load(path, prior=Prior(Own, 0.0, 1.0))
    quick(pyrosc.scvi(cells, n_latent=3, n_hidden=8, prior=Wide(2.0)), cells).save(path, overwrite=True)
    with pytest.raises(ValueError, match="scale is 20.0 as handed in, and was 2.0"):
        pyrosc.load(path, prior=Wide(20.0))
    with pytest.raises(ValueError, match="must be made, prior=Wide"):
        pyrosc.load(path, prior=Wide)
    dispersion = pyrosc.GeneDispersion(prior=Prior(Own, 3.0, 0.001))
    quick(pyrosc.scvi(cells, n_latent=3, n_hidden=8, dispersion=dispersion), cells).save(path, overwrite=True)
    with pytest.raises(ValueError, match=r"dispersion=GeneDispersion\(Prior\(Own, ...\)\)"):
        pyrosc.load(path)
    pyrosc.load(path, dispersion=pyrosc.GeneDispersion(prior=Prior(Own, 3.0, 0.001)))


def test_an_open_prior_stays_open(cells, tmp_path):
    fit = quick(pyrosc.scvi(cells, n_latent=4, n_hidden=8), cells)
    fit.save(tmp_path / "a.safetensors")
    again = pyrosc.load(tmp_path / "a.safetensors").program

    with pytest.raises(pyrosc.ProgramError, match='"prior" was built for n_latent=4, which is now 3'):
        again.replace(encoder=pyrosc.Encoder(3, 8), decoder=Decoder(3, 8))


def own_model(cells, *, rate, likelihood):
    with cells.plate():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", likelihood(rate(z)), obs=cells.x)


def other_model(cells, *, rate, likelihood):
    with cells.plate():
        z = pyro.sample("z", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        pyro.sample("x", likelihood(rate(z)), obs=cells.x)


def wider_model(cells, *, rate, likelihood):
    with cells.plate():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("x", likelihood(rate(z[..., :2])), obs=cells.x)


def own_guide(cells, *, encoder):
    with cells.plate():
        pyro.sample("z", dist.Normal(*encoder(cells)).to_event(1))


class Rate(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.linear = nn.Linear(width, 60)

    def forward(self, z):
        return self.linear(z).exp()


def test_a_story_of_ones_own_is_handed_back_and_compared(cells, tmp_path):  # row 100
    parts = dict(rate=Rate(), likelihood=PoissonLikelihood(), encoder=pyrosc.Encoder(2, 8))
    fit = quick(Program(own_model, cells, own_guide, **parts), cells)
    path = tmp_path / "a.safetensors"
    fit.save(path)

    with pytest.raises(
        ValueError, match=r'story of your own, "own_model".*load\(path, model=own_model, guide=own_guide\)'
    ):
        pyrosc.load(path, rate=Rate())
    again = pyrosc.load(path, model=own_model, guide=own_guide, rate=Rate())
    np.testing.assert_array_equal(again.elbo(cells[:9]), fit.elbo(cells[:9]))
    with pytest.warns(PyroscWarning, match='source of model "own_model" has changed'):
        pyrosc.load(path, model=other_model, guide=own_guide, rate=Rate())
    with pytest.raises(ValueError, match="the story's sites are"):
        pyrosc.load(path, model=wider_model, guide=own_guide, rate=Rate())
    with pytest.raises(ValueError, match=r"rate.linear.weight.*shape \(60, 4\).*\(60, 2\)"):
        pyrosc.load(path, model=own_model, guide=own_guide, rate=Rate(4))


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5, 0.99])
def test_a_cut_off_file_is_called_incomplete(fit, tmp_path, share):  # row 94
    path = tmp_path / "a.safetensors"
    fit.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])

    with pytest.raises(ValueError, match="a.safetensors is (incomplete|not a file that pyrosc wrote)"):
        pyrosc.load(path)


def test_strange_files_are_refused(tmp_path):  # row 94
    path = tmp_path / "a.safetensors"
    path.write_bytes(os.urandom(2000))
    with pytest.raises(ValueError, match="not a file that pyrosc wrote"):
        pyrosc.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not one that pyrosc wrote"):
        pyrosc.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        pyrosc.load(tmp_path / "b.safetensors")


def test_nothing_in_a_file_is_imported_or_run(fit, tmp_path):  # row 95
    path = tmp_path / "a.safetensors"
    fit.save(path)

    def change(held):
        held["parts"]["likelihood"] = {"part": "os.system", "arguments": {"command": "true"}}

    edit(path, change)
    with pytest.raises(ValueError, match='a part "os.system" that this pyrosc does not know'):
        pyrosc.load(path)


def test_an_existing_file_is_kept_unless_told(fit, tmp_path):  # row 96
    path = tmp_path / "a.safetensors"
    fit.save(path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        fit.save(path)
    fit.save(path, overwrite=True)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        fit.save(tmp_path / "none" / "a.safetensors")


def test_a_failed_write_leaves_the_old_file_whole_and_nothing_beside_it(fit, tmp_path, monkeypatch):  # rows 77, 78
    path = tmp_path / "a.safetensors"
    fit.save(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"could not write [\d,]+ bytes to .*No space left"):
        fit.save(path, overwrite=True)

    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_newer_format_names_the_version_that_reads_it(fit, tmp_path):  # row 99
    path = tmp_path / "a.safetensors"
    fit.save(path)

    def change(held):
        held["format"], held["versions"]["pyrosc"] = 99, "7.3"

    edit(path, change)
    with pytest.raises(ValueError, match=r"written by pyrosc 7\.3 \(format 99\); this is"):
        pyrosc.load(path)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda p: p.stem)
def test_files_of_every_release_load_and_answer_the_same(path):  # row 98
    expected = json.loads(path.with_suffix(".json").read_text())
    fit = pyrosc.load(path)
    with warnings.catch_warnings():  # six cells do not show every gene
        warnings.simplefilter("ignore", PyroscWarning)
        cells = Cells.from_counts(expected["x"], genes=expected["genes"], batch=expected["batch"])

    np.testing.assert_allclose(fit.latent(cells), expected["latent"], atol=1e-4)
    np.testing.assert_allclose(fit.latent_sd(cells), expected["latent_sd"], rtol=1e-3)
    # draws come from torch's generator, which may change between its versions: five errors of 500 draws
    np.testing.assert_allclose(fit.elbo(cells, n_draws=500), expected["elbo"], atol=0.5)
    np.testing.assert_allclose(fit.expression(cells, n_draws=500), expected["expression"], atol=0.005)


def test_there_is_a_file_of_this_format():
    assert (GOLDEN / "format1.safetensors").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_what_is_saved_on_a_gpu_loads_on_the_cpu(fit, cells, tmp_path):  # row 97
    fit.to("cuda").save(tmp_path / "a.safetensors")

    again = pyrosc.load(tmp_path / "a.safetensors")
    assert again.device == torch.device("cpu")
    np.testing.assert_allclose(again.latent(cells), fit.latent(cells), atol=1e-5)


def test_the_story_of_the_package_comes_back_as_itself(fit, tmp_path):
    fit.save(tmp_path / "a.safetensors")

    assert pyrosc.load(tmp_path / "a.safetensors").program.functions == (story.model, story.guide)


def test_flipped_bytes_are_noticed(fit, tmp_path):  # row 94
    path = tmp_path / "a.safetensors"
    fit.save(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)

    with pytest.raises(ValueError, match="is damaged"):
        pyrosc.load(path)


def test_numpy_arguments_and_frozen_weights_survive(cells, tmp_path):
    program = pyrosc.scvi(cells, n_latent=np.int64(3), n_hidden=np.int64(8))
    program.parts["decoder"].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroscWarning)
        fit = pyrosc.fit(program, cells[:60], epochs=np.int64(1), lr=np.float64(0.01), progress=False)
    fit.save(tmp_path / "a.safetensors")

    frozen = [n for n, p in pyrosc.load(tmp_path / "a.safetensors").program.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(name.startswith("parts.decoder") for name in frozen)
