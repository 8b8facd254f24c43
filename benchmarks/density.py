"""Milliseconds of a count density, forward and backward: pyrosc against Pyro's and scvi-tools' classes.

    python benchmarks/density.py --out benchmarks/results

Blocks of 128 and 1,024 cells x 2,000 genes with 7, 10 and 30 % non-zero counts, gradients to
the mean, the dispersion of each gene and the gate; float32, one thread, validation off. Classes are
timed in turn, each value the median of the repeats, so that a busy machine meets all alike.
scvi-tools' column is empty where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch

from pyrosc.counts import carry, nonzeros
from pyrosc.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial


def block(n: int, density: float) -> dict[str, torch.Tensor]:
    """Counts with this share of non-zeros, most of them ones, and parameters to match."""
    draw = torch.Generator().manual_seed(0)
    base = torch.rand(2000, generator=draw).pow(3)
    low, high = -12.0, 6.0
    for _ in range(40):  # the log scale at which this share of gamma-Poisson counts is not zero
        middle = (low + high) / 2
        mean = (base * torch.tensor(middle).exp()).expand(n, 2000)
        low, high = (middle, high) if (1 - (1 + mean).pow(-1)).mean() < density else (low, middle)
    mean = mean * (0.5 + torch.rand(n, 2000, generator=draw))
    x = torch.poisson(torch._standard_gamma(torch.ones(n, 2000), generator=draw) * mean, generator=draw)
    carry(x, nonzeros(x))
    dispersion = 0.3 + 3 * torch.rand(2000, generator=draw)
    gate = torch.randn(n, 2000, generator=draw) - 2
    return {"x": x, "mean": mean, "dispersion": dispersion, "gate": gate}


def laws() -> dict[str, dict[str, Callable[..., Any]]]:
    off: dict[str, Any] = {"validate_args": False}
    found: dict[str, dict[str, Callable[..., Any]]] = {
        "NB": {
            "pyrosc": lambda m, d, a: NegativeBinomial(m, d, **off).to_event(1),
            "pyro": lambda m, d, a: dist.NegativeBinomial(d, logits=m.log() - d.log(), **off).to_event(1),
        },
        "ZINB": {
            "pyrosc": lambda m, d, a: ZeroInflatedNegativeBinomial(m, d, a, **off).to_event(1),
            "pyro": lambda m, d, a: dist.ZeroInflatedNegativeBinomial(
                d, logits=m.log() - d.log(), gate_logits=a, **off
            ).to_event(1),
        },
        "Poisson": {
            "pyrosc": lambda m, d, a: Poisson(m, **off).to_event(1),
            "pyro": lambda m, d, a: dist.Poisson(m, **off).to_event(1),
        },
    }  # fmt: skip
    try:
        from scvi import distributions as theirs
    except ImportError:
        return found
    found["NB"]["scvi-tools"] = lambda m, d, a: theirs.NegativeBinomial(mu=m, theta=d, **off)
    found["ZINB"]["scvi-tools"] = lambda m, d, a: theirs.ZeroInflatedNegativeBinomial(mu=m, theta=d, zi_logits=a, **off)
    return found


def milliseconds(made: dict[str, Callable[..., Any]], held: dict[str, torch.Tensor], repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(repeats + 2):
        for name, law in made.items():
            inputs = [held[k].clone().requires_grad_() for k in ("mean", "dispersion", "gate")]
            began = time.perf_counter()
            law(*inputs).log_prob(held["x"]).sum().backward()
            if repeat >= 2:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    header = "| law | cells | non-zero | pyrosc ms | Pyro ms | scvi-tools ms | Pyro / pyrosc | scvi-tools / pyrosc |"
    print(header + "\n" + "|---" * 8 + "|")
    lines = [header, "|---" * 8 + "|"]
    for n in (128, 1024):
        for density in (0.07, 0.10, 0.30):
            held = block(n, density)
            share = len(nonzeros(held["x"]).index) / held["x"].numel()
            for law, made in laws().items():
                ms = milliseconds(made, held, given.repeats)
                rows.append({"law": law, "cells": n, "non_zero": share, **ms})
                theirs = ms.get("scvi-tools")
                lines.append(
                    f"| {law} | {n:,} | {share:.0%} | {ms['pyrosc']:.1f} | {ms['pyro']:.1f} | "
                    + (f"{theirs:.1f}" if theirs else "")
                    + f" | {ms['pyro'] / ms['pyrosc']:.1f} | "
                    + (f"{theirs / ms['pyrosc']:.1f} |" if theirs else " |")
                )
                print(lines[-1], flush=True)
    if given.out:
        cpu = platform.processor() or platform.machine()
        if Path("/proc/cpuinfo").exists():
            cpu = next((t.split(":")[1].strip() for t in open("/proc/cpuinfo") if t.startswith("model name")), cpu)
        machine = f"{cpu}, one thread, torch {torch.__version__}"
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "density.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        (given.out / "density.md").write_text(
            f"# Densities, forward and backward\n\n{machine}\n\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
