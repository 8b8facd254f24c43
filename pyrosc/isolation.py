"""Isolation: what our calls do to the world around them, which is nothing.

Random numbers come from a seed and the generators are put back; Pyro's validation flags are
put back; one thread at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch

_one_thread = threading.RLock()


def checked_seed(seed: Any) -> int:
    """A seed as an int.

    Raises
    ------
    ValueError
        If it is not a whole number in [0, 2**63).
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed.__index__() < 2**63:
        raise ValueError(f"seed must be a whole number in [0, 2**63), not {seed!r}")
    return int(seed.__index__())


@contextmanager
def isolated(seed: int, device: torch.device | str = "cpu", validate: bool = False) -> Iterator[None]:
    """Run with random numbers from ``seed`` on this device; afterwards all is as before.

    Raises
    ------
    RuntimeError
        If another thread is inside: Pyro's handlers are one stack for the whole process.
    """
    if not _one_thread.acquire(blocking=False):
        raise RuntimeError("another thread is fitting or drawing. Pyro is not thread-safe; use processes")
    # Pyro puts back its own flags only, and sets torch's to its own on the way out.
    checks = bool(torch.distributions.Distribution._validate_args)
    try:
        device = torch.device(device)
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), pyro.validation_enabled(validate):
            torch.default_generator.manual_seed(seed)
            if cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(checks)
        _one_thread.release()
