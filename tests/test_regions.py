"""Regions: shares and gradients without dense copies are those of the plain way, and what they take is counted."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy import sparse, stats

import pyrosc
from pyrosc import BernoulliLikelihood, Cells, Decoder, GeneDispersion, NBLikelihood, RegionDecoder, regions
from pyrosc.counts import CountMatrix, nonzeros
from pyrosc.distributions import Poisson, Presence, carried_logs, carry_logs


def block(n=5, n_genes=23, seed=0, dtype=torch.float64, presence=False):
    """Counts that carry their non-zeros, hidden layer, weights, biases, totals."""
    draw = np.random.default_rng(seed)
    x = draw.poisson(0.6, (n, n_genes))
    x[0], x[1, 3] = 0, 40  # a cell without counts, a count beyond tables
    x = np.minimum(x, 1) if presence else x
    csr = sparse.csr_matrix(x)
    held = CountMatrix.from_arrays(csr.indptr, csr.indices, csr.data, n_genes).dense(torch.arange(n), dtype)
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=g, dtype=dtype) for s in ((n, 4), (n_genes, 4), (n_genes,)))
    return held, hidden, weight, bias, torch.linspace(5.0, 60.0, n, dtype=dtype).unsqueeze(-1)


@pytest.mark.parametrize("at_once", [2**20, 30, 7])
@pytest.mark.parametrize("law", [Poisson, Presence])
def test_densities_and_gradients_are_those_of_the_plain_way(law, at_once, monkeypatch):
    monkeypatch.setattr(regions, "_PASS", at_once)  # pieces of all, a few and one region at a time
    x, *inputs, total = block(presence=law is Presence)
    found = nonzeros(x)
    results = []
    for lean in (True, False):
        hidden, weight, bias = (t.clone().requires_grad_() for t in inputs)
        exposure = total.clone().requires_grad_()
        if lean:
            rho, logs = regions._Shares.apply(hidden, weight, bias, found)
            counts = law(carry_logs(rho, found, logs), exposure=exposure).to_event(1)
        else:
            rho = (hidden @ weight.t() + bias).softmax(-1)
            counts = law(exposure * rho).to_event(1)
        value = counts.log_prob(x)
        (value * torch.linspace(-1.0, 2.0, len(x), dtype=value.dtype)).sum().backward()
        results.append([rho.detach(), value.detach(), hidden.grad, weight.grad, bias.grad, exposure.grad])

    for one, other in zip(*results):  # rounding of sums of 23 float64 numbers, of counts to 40
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    mean = (total * results[0][0]).numpy()
    by_hand = stats.poisson.logpmf(x, mean) if law is Poisson else stats.bernoulli.logpmf(x, 1 - np.exp(-mean))
    np.testing.assert_allclose(results[0][1], by_hand.sum(-1), rtol=1e-10)


def test_gradients_that_are_dense_are_right_too():
    x, hidden, weight, bias, _ = block()
    found = nonzeros(x)
    weights = torch.rand(5, 23, dtype=torch.float64)

    def both(*inputs):
        rho, logs = regions._Shares.apply(*inputs, found)
        return (weights * rho).sum(-1), logs

    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradcheck(lambda *i: regions._Shares.apply(*i, found)[0].sum(-1), inputs)


def test_logs_are_of_these_counts_and_shares_alone():
    x, hidden, weight, bias, _ = block()
    found = nonzeros(x)
    rho, logs = regions._Shares.apply(hidden, weight, bias, found)
    carry_logs(rho, found, logs)
    assert carried_logs(rho, found) is logs
    assert carried_logs(rho, nonzeros(x.clone())) is None  # other counts, though equal
    rho.mul_(0.5)
    assert carried_logs(rho, found) is None  # edited since


@pytest.fixture(scope="module")
def cells():
    adata = pyrosc.simulate.fragments(150, 90, n_types=2, depth=60.0, n_quantitative=10, seed=0)
    adata.obs["donor"] = np.resize(["a", "b", "b"], 150)
    adata = adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()
    return Cells.from_anndata(adata, batch="donor")


@pytest.mark.parametrize("likelihood", [None, NBLikelihood()])
def test_a_step_of_a_region_decoder_is_that_of_a_plain_one(cells, likelihood):
    parts = {} if likelihood is None else {"likelihood": likelihood, "dispersion": GeneDispersion()}
    lean = pyrosc.poissonvi(cells, n_latent=3, n_hidden=8, dropout=0.0, **parts).double()
    plain = pyrosc.poissonvi(cells, n_latent=3, n_hidden=8, dropout=0.0, decoder=Decoder(3, 8, 2), **parts).double()
    state = lean.state_dict()
    plain.load_state_dict({k: v for k, v in state.items() if "profile" not in k})
    some = cells.to("cpu", torch.float64).minibatch(np.arange(40))
    found = []
    for program in (lean, plain):
        with program.driven(3):
            elbo = pyrosc.training.MeanFieldELBO(max_plate_nesting=1)
            loss = elbo.differentiable_loss(program.model, program.guide, some)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in program.named_parameters()}))

    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=0)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-8, atol=1e-8)


def test_the_lean_way_is_taken_in_training_and_by_both_laws(cells, monkeypatch):
    calls = []
    way = pyrosc.distributions._OfRate._by_logs
    monkeypatch.setattr(
        pyrosc.distributions._OfRate, "_by_logs", lambda self, *a: calls.append(type(self)) or way(self, *a)
    )
    presence = cells.with_counts((cells.x > 0).float())
    for data, part in ((cells, None), (presence, BernoulliLikelihood())):
        parts = {} if part is None else {"likelihood": part}
        program = pyrosc.poissonvi(data, n_latent=3, n_hidden=8, **parts)
        with program.driven(0, train=True):
            pyrosc.training.MeanFieldELBO(max_plate_nesting=1).differentiable_loss(
                program.model, program.guide, data.minibatch(np.arange(20))
            )
    assert calls == [Poisson, Presence]


def test_genes_that_were_not_measured_take_the_plain_way(cells):
    mask = torch.ones(cells.n_genes, dtype=torch.bool)
    mask[:5] = False
    some = cells._copy(gene_mask=mask, _x=None)
    program = pyrosc.poissonvi(cells, n_latent=3, n_hidden=8)
    with program.driven(0):
        trace = poutine.trace(program.model).get_trace(some)
        rho, x = trace.nodes["rho"]["value"].detach(), trace.nodes["x"]
        expected = stats.poisson.logpmf(some.x, (some.library * rho).numpy())[:, 5:].sum(-1)

        np.testing.assert_allclose(x["fn"].log_prob(x["value"]).detach(), expected, rtol=1e-4)


def test_the_profile_is_that_of_the_training_cells_and_is_saved(cells, tmp_path):
    program = pyrosc.poissonvi(cells, n_latent=3, n_hidden=8)
    program.start(cells)
    sums = cells.x.double().sum(0).numpy() + 0.1
    decoder = program.parts["decoder"]

    assert isinstance(decoder, RegionDecoder)
    np.testing.assert_allclose(decoder.profile, sums / sums.sum(), rtol=1e-5)
    np.testing.assert_allclose(decoder.factors.detach().softmax(0), decoder.profile, rtol=1e-4)


# ---- memory ------------------------------------------------------------------------------------

_SCRIPT = """
import resource, sys, warnings
import numpy as np, torch, pyrosc
from scipy import sparse

def memory():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

n_cells, n_regions, n_hidden, *decoders = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
torch.set_num_threads(1)
warnings.simplefilter("ignore")
draw = np.random.default_rng(0)
each = n_regions // 100
region = draw.integers(n_regions, size=(n_cells, each)).ravel()
count = np.where(draw.random(len(region)) < 0.8, 1.0, 2.0).astype(np.float32)
x = sparse.csr_matrix((count, (np.repeat(np.arange(n_cells), each), region)), shape=(n_cells, n_regions))
cells = pyrosc.Cells.from_counts(x, genes=[f"chr1:{500 * j}-{500 * j + 499}" for j in range(n_regions)])
# Once before, so that what libraries take on first use is not counted.
few = pyrosc.Cells.from_counts(x[:, :2000], genes=cells.schema.genes[:2000])[:20]
pyrosc.fit(pyrosc.poissonvi(few), few, epochs=1, warmup=0.0, progress=False)
for kind in decoders:
    parts = {} if kind == "lean" else {"decoder": pyrosc.Decoder(None, n_hidden, 2)}
    program = pyrosc.poissonvi(cells, n_hidden=n_hidden, **parts)
    n_weights = sum(p.numel() for p in program.parameters())
    before = memory()
    fit = pyrosc.fit(program, cells, epochs=1, warmup=0.0, progress=False)
    assert np.isfinite(fit.history["train_elbo"]).all()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Beside the Program: a trained copy, gradients, two moments and the best weights.
    print((peak - before - 4 * 5 * n_weights) / (4 * 128 * n_regions), peak / 1e9)
    del fit, program
"""


def peaks(n_cells, n_regions, n_hidden, *decoders):
    """Dense mini-batches of 128 cells that a fit holds at most beside weights, and GB in all, one row a decoder."""
    made = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *map(str, (n_cells, n_regions, n_hidden, *decoders))],
        capture_output=True, text=True, check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},  # what is freed is given back, and not counted
    )  # fmt: skip
    return [tuple(map(float, line.split())) for line in made.stdout.splitlines()]


@pytest.mark.slow  # a process's memory is watched from outside, which fails where others take the cores
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_step_holds_three_dense_mini_batches():
    # Few hidden units, so that weights are small beside a block of 128 cells x 100,000 regions (51 MB).
    (lean, _), (plain, _) = peaks(142, 100_000, 8, "lean", "plain")

    assert lean < 4, lean  # counts, their logs, shares; the rest is pieces, non-zero counts and small arrays
    assert plain > lean + 1, (plain, lean)  # the twin: mean and gradients, two at a time


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_thousand_cells_of_two_hundred_thousand_regions_with_the_published_sizes():
    ((blocks, total),) = peaks(1000, 200_000, 447, "lean")

    assert blocks < 4
    assert total < 6.0  # GB, of which 179 million weights take 4 bytes six times
