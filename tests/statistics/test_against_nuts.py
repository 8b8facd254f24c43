"""The guide against Hamiltonian Monte Carlo on the same story, decoder fixed: slow, run by make slow."""

import pytest
import torch
from pyro.infer import MCMC, NUTS

import pyrosc
from pyrosc import Cells

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*latent dimensions are unused:pyrosc.PyroscWarning", "ignore:.*still rising:pyrosc.PyroscWarning"
    ),
]


def test_means_and_sds_of_the_guide_are_those_of_the_posterior():
    tissue = pyrosc.simulate.tissue(2000, 200, n_types=4, n_batches=2, depth=1500, n_markers=40, effect=1.0, seed=0)
    cells = Cells.from_anndata(tissue, batch="batch")
    fit = pyrosc.fit(pyrosc.scvi(cells, n_latent=4), cells, progress=False)
    few = cells[::100]  # 20 cells
    fit.program.requires_grad_(False)
    torch.manual_seed(0)
    mcmc = MCMC(NUTS(fit.program.model), num_samples=500, warmup_steps=300, disable_progbar=True)

    mcmc.run(few)

    z = mcmc.get_samples()["z"]
    mean, sd = torch.tensor(fit.latent(few)), torch.tensor(fit.latent_sd(few))
    ratio, apart = sd / z.std(0), (mean - z.mean(0)).abs() / z.std(0)
    print(f"sd ratio: median {ratio.median():.2f}; means apart: median {apart.median():.2f} posterior sd")

    def sound(ratio, apart):
        # An amortised mean-field guide is somewhat narrow; the median over 80 coordinates has little noise.
        return bool(0.75 < ratio.median() < 1.15 and apart.median() < 0.5)

    assert sound(ratio, apart)
    assert not sound(ratio / 2, apart)  # the twins: half as wide, and at the prior's mean
    assert not sound(ratio, z.mean(0).abs() / z.std(0))
