"""What the package as a whole promises: light imports, no pickle, only public modules of Pyro, types, a changelog."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import pyrosc

ROOT = Path(pyrosc.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

# Modules of Pyro's documentation; a Pyro release may move what is not here.
PUBLIC = {
    "pyro", "pyro.distributions", "pyro.distributions.torch_distribution", "pyro.infer", "pyro.infer.inspect",
    "pyro.ops.stats", "pyro.optim.clipped_adam", "pyro.poutine", "pyro.poutine.messenger", "pyro.poutine.util",
}  # fmt: skip


def imported(source):
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_import_brings_no_heavy_packages():
    code = (
        "import sys, torch, pyro, anndata; before = set(sys.modules); import pyrosc; print(*set(sys.modules) - before)"
    )
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    heavy = {"scanpy", "matplotlib", "sklearn", "seaborn", "numba", "umap", "psutil", "graphviz"}
    assert not heavy & {name.split(".")[0] for name in new}


def test_a_fit_does_not_wait_for_torch_s_compiler():
    """Importing it takes longer than a short fit, and nothing here is compiled."""
    code = (
        "import sys, pyrosc; cells = pyrosc.Cells.from_counts([[1, 0, 2], [0, 3, 1], [1, 1, 1]]);"
        "pyrosc.fit(pyrosc.scvi(cells, n_latent=2, n_hidden=4), cells, epochs=1, validation=None, progress=False);"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_pickles_or_swallows_errors(source):
    text = source.read_text()

    assert not re.search(
        r"\b(pickle|dill|joblib|cloudpickle)\b\.|import (pickle|dill)|torch\.(save|load)\(|\beval\(|\bexec\(",
        re.sub(r"\.eval\(\)", "", text),
    )
    assert "except Exception" not in text
    assert "except:" not in text
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.Assert), "errors of users are raised, not asserted"


def test_only_public_modules_of_pyro_are_used():
    used = {name for source in SOURCES for name in imported(source) if name.split(".")[0] == "pyro"}

    assert used <= PUBLIC


def test_no_global_setting_is_touched():
    for source in SOURCES:
        text = source.read_text()
        for forbidden in (
            "clear_param_store",
            "pyro.param(",
            "pyro.module(",
            "settings.set(",
            "set_rng_seed",
            "np.random.seed",
            "torch.manual_seed",
            "enable_validation(",
        ):
            assert forbidden not in text, f"{source.name}: {forbidden}"


def test_models_import_nothing_so_that_the_file_is_the_name():
    assert pyrosc.models.scvi.model.__module__ == "pyrosc.models.scvi"
    assert callable(pyrosc.models.scvi.guide)


def test_version_is_one_and_in_the_changelog():
    assert metadata.version("pyrosc") == pyrosc.__version__
    changelog = ROOT.parent / "CHANGELOG.md"
    assert f"## {pyrosc.__version__}" in changelog.read_text()


def test_the_package_is_typed():
    assert (ROOT / "py.typed").exists()


def test_public_names_have_docstrings():
    for name in dir(pyrosc):
        thing = getattr(pyrosc, name)
        if name.startswith("_") or not (callable(thing) and getattr(thing, "__module__", "").startswith("pyrosc")):
            continue
        assert thing.__doc__, name
        for method, value in vars(thing).items() if isinstance(thing, type) else ():
            if (
                not method.startswith("_")
                and callable(value)
                and method not in ("forward", "build", "link", "start", "extra_repr", "at", "to")
            ):
                assert value.__doc__, f"{name}.{method}"
