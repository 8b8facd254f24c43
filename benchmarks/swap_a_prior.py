"""How many lines it takes to believe in a mixture instead of N(0, I): pyrosc and scvi-tools.

    python benchmarks/swap_a_prior.py --out benchmarks/results

Both sides start from three lines that fit scVI with NB counts to a simulated tissue, and change the prior on z to a
learned mixture of 20 normals. Lines are counted in this file between the markers: those added or changed, blank lines
and comments left out. Both are run, so that the lines are known to work: each prints its held-out ELBO before and
after, and what its own marginal likelihood makes of it.

On the scvi-tools side (1.4.2) the prior stands in three methods of its VAE: ``generative`` makes it, ``loss`` takes an
analytic KL that a mixture has not got, ``marginal_ll`` writes N(0, I) again. The first two are replaced below, in the
shortest way found (the branch for a latent library is left out); the third is left as it is, so `get_marginal_ll` then
answers for another model, without a word.
"""

from __future__ import annotations

import argparse
import json
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np


def data() -> Any:
    import pyrosc

    return pyrosc.simulate.tissue(2000, 200, n_types=4, n_batches=2, depth=800, n_markers=40, effect=1.0)


def with_pyrosc(adata: Any) -> dict[str, float]:
    import pyrosc

    cells = pyrosc.Cells.from_anndata(adata, batch="batch")
    train, test = cells.split(0.8, 0.2)
    plain = pyrosc.fit(pyrosc.scvi(train), train, progress=False)
    # -- pyrosc: begin
    fit = pyrosc.fit(pyrosc.scvi(train, prior=pyrosc.MixturePrior(20)), train, progress=False)
    # -- pyrosc: end
    return {
        "elbo before": float(plain.elbo(test, n_draws=20).mean()),
        "elbo after": float(fit.elbo(test, n_draws=20).mean()),
        "log p(x) after": float(fit.log_likelihood(test, 200).mean()),
    }


def with_scvi_tools(adata: Any, epochs: int) -> dict[str, float]:
    import scvi
    import torch
    from scvi.model import SCVI

    # -- scvi-tools: begin
    from scvi.module import VAE
    from scvi.module.base import LossOutput
    from torch import nn
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

    class MixtureVAE(VAE):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.prior_logits = nn.Parameter(torch.zeros(20))
            self.prior_loc = nn.Parameter(0.75**0.5 * torch.randn(20, self.n_latent))
            self.prior_log_scale = nn.Parameter(torch.full((20, self.n_latent), 0.5).log())

        def generative(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().generative(*args, **kwargs)
            components = Independent(Normal(self.prior_loc, self.prior_log_scale.exp()), 1)
            outputs["pz"] = MixtureSameFamily(Categorical(logits=self.prior_logits), components)
            return outputs

        def loss(self, tensors: Any, inference_outputs: Any, generative_outputs: Any, kl_weight: Any = 1.0) -> Any:
            z = inference_outputs["z"]
            kl_z = inference_outputs["qz"].log_prob(z).sum(-1) - generative_outputs["pz"].log_prob(z)
            reconstruction = -generative_outputs["px"].log_prob(tensors["X"]).sum(-1)
            return LossOutput(
                loss=(reconstruction + kl_weight * kl_z).mean(),
                reconstruction_loss=reconstruction,
                kl_local={"kl_divergence_z": kl_z, "kl_divergence_l": torch.zeros_like(kl_z)},
            )

    class MixtureSCVI(SCVI):
        _module_cls = MixtureVAE

    # -- scvi-tools: end
    order = np.random.default_rng(0).permutation(adata.n_obs)
    train, test = order[: int(0.8 * adata.n_obs)], order[int(0.8 * adata.n_obs) :]
    found = {}
    for name, kind in (("before", SCVI), ("after", MixtureSCVI)):
        scvi.settings.seed = 0
        kind.setup_anndata(adata, batch_key="batch")
        model = kind(adata, gene_likelihood="nb")
        model.train(
            epochs, enable_progress_bar=False, logger=False, enable_checkpointing=False, accelerator="cpu",
            datasplitter_kwargs={"external_indexing": [np.sort(train), np.sort(test), np.array([], dtype=int)]},
        )  # fmt: skip
        found[f"elbo {name}"] = float(model.get_elbo(indices=np.sort(test)))
    found["log p(x) after"] = float(model.get_marginal_ll(indices=np.sort(test), n_mc_samples=200))
    return found


def lines(side: str) -> list[str]:
    """Lines between the markers of a side, without blanks and comments."""
    text = Path(__file__).read_text().split(f"# -- {side}: begin\n")[1].split(f"# -- {side}: end")[0]
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--epochs", type=int, default=60, help="of scvi-tools")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = data()
    found = {"pyrosc": with_pyrosc(adata), "scvi-tools": with_scvi_tools(adata, options.epochs)}
    versions = {name: metadata.version(name) for name in ("pyrosc", "scvi-tools")}
    counted = {side: len(lines(side)) for side in found}
    text = [
        "# A mixture instead of N(0, I)",
        "",
        "Made by `benchmarks/swap_a_prior.py`, which says how to read it.",
        "",
    ]
    text += [
        "| | lines | held-out ELBO before | after | log p(x) after, by its own estimate |",
        "|---|---|---|---|---|",
    ]
    for side, numbers in found.items():
        row = " | ".join(f"{numbers[k]:.1f}" for k in ("elbo before", "elbo after", "log p(x) after"))
        text.append(f"| {side} {versions[side]} | {counted[side]} | {row} |")
    for side in found:
        body = "\n".join(line[4:] for line in lines(side))
        text += ["", f"{side}:", "", "```python", body, "```"]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "swap_a_prior.md").write_text("\n".join(text) + "\n")
    (out / "swap_a_prior.json").write_text(
        json.dumps({"versions": versions, "lines": counted, "runs": found}, indent=1)
    )
    print("\n".join(text))


if __name__ == "__main__":
    main()
