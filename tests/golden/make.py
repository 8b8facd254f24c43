"""Makes the file that later versions must still read: run once when the file format changes.

python tests/golden/make.py tests/golden/format1
"""

import json
import sys
import warnings
from pathlib import Path

import pyrosc

if __name__ == "__main__":
    warnings.simplefilter("ignore", pyrosc.PyroscWarning)
    adata = pyrosc.simulate.tissue(120, 20, n_types=3, n_batches=2, depth=200, n_markers=8, effect=1.0)
    cells = pyrosc.Cells.from_anndata(adata, batch="batch")
    fit = pyrosc.fit(pyrosc.scvi(cells, n_latent=2, n_hidden=8), cells, epochs=5, progress=False)
    path = Path(sys.argv[1])
    fit.save(path.with_suffix(".safetensors"), overwrite=True)
    few = cells[:6]
    expected = {
        "x": few.x.int().tolist(),
        "genes": list(cells.schema.genes),
        "batch": few.obs["batch"].tolist(),
        "latent": fit.latent(few).tolist(),
        "latent_sd": fit.latent_sd(few).tolist(),
        "elbo": fit.elbo(few, n_draws=500).tolist(),
        "expression": fit.expression(few, n_draws=500).to_numpy().tolist(),
    }
    path.with_suffix(".json").write_text(json.dumps(expected))
