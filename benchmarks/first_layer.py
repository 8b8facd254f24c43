"""The encoder's first layer, three ways: dense, compressed rows (CSR), and a bag of embeddings, by share of non-zeros.

    python benchmarks/first_layer.py --out benchmarks/results

n cells x 2,000 genes to 128 units; float32, medians of the repeats in turn. "forward" is the product alone; "both" adds
the gradient of the weight, for CSR with the turning of the rows into columns (scipy) that it needs.
Why `GeneLinear` is dense in training, and a bag outside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy import sparse

N_GENES, N_HIDDEN = 2000, 128


def csr(start: Any, column: Any, value: Any, n: int, m: int) -> torch.Tensor:
    return torch.sparse_csr_tensor(start, column, value, size=(n, m), check_invariants=False)


def ways(n: int, share: float) -> dict[str, Callable[[], Any]]:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(n, N_GENES, generator=draw) * (torch.rand(n, N_GENES, generator=draw) < share)
    index = x.view(-1).nonzero().squeeze(-1)
    gene, row, value = index % N_GENES, index // N_GENES, x.view(-1)[index]
    start = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=n).cumsum(0)])
    weight = torch.randn(N_HIDDEN, N_GENES, generator=draw)
    columns = weight.t().contiguous().requires_grad_()  # as a bag that is trained would keep it
    grad = torch.randn(n, N_HIDDEN, generator=draw)

    def turned() -> torch.Tensor:
        by_column = sparse.csr_matrix((value.numpy(), gene.numpy(), start.numpy()), shape=(n, N_GENES)).tocsc()
        return csr(*map(torch.from_numpy, (by_column.indptr, by_column.indices, by_column.data)), N_GENES, n) @ grad

    def bag() -> torch.Tensor:
        return torch.nn.functional.embedding_bag(gene, columns, start[:-1], mode="sum", per_sample_weights=value)

    def bag_both() -> None:
        columns.grad = None
        bag().backward(grad)

    with torch.no_grad():
        torch.testing.assert_close(csr(start, gene, value, n, N_GENES) @ columns, x @ weight.t(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(turned(), x.t() @ grad, rtol=1e-3, atol=1e-3)
    return {
        "dense, forward": lambda: torch.nn.functional.linear(x, weight),
        "CSR, forward": lambda: csr(start, gene, value, n, N_GENES) @ weight.t().contiguous(),
        "bag, forward": lambda: torch.nn.functional.embedding_bag(
            gene, weight.t().contiguous(), start[:-1], mode="sum", per_sample_weights=value
        ),
        "dense, both": lambda: (torch.nn.functional.linear(x, weight), grad.t() @ x),
        "CSR, both": lambda: (csr(start, gene, value, n, N_GENES) @ weight.t().contiguous(), turned()),
        "bag, both": bag_both,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    for n in (128, 1024):
        for share in (0.03, 0.07, 0.15, 0.3):
            made = ways(n, share)
            taken: dict[str, list[float]] = {name: [] for name in made}
            for repeat in range(given.repeats + 2):
                for name, way in made.items():
                    began = time.perf_counter()
                    way()
                    if repeat >= 2:
                        taken[name].append(1e3 * (time.perf_counter() - began))
            row = {"cells": n, "non-zero": share} | {name: statistics.median(t) for name, t in taken.items()}
            if not lines:
                lines = ["| " + " | ".join(row) + " |", "|---" * len(row) + "|"]
                print("\n".join(lines))
            rows.append(row)
            lines.append(
                "| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else f"{v:,}" for v in row.values()) + " |"
            )
            print(lines[-1], flush=True)
    if given.out:
        machine = f"{platform.machine()}, {given.threads} thread(s), torch {torch.__version__}"
        (given.out / "first_layer.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        text = f"# The encoder's first layer\n\nMilliseconds. {machine}\n\n"
        (given.out / "first_layer.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
