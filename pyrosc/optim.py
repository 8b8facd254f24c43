"""Optimiser: Pyro's ``ClippedAdam`` with all tensors of a group updated in one fused call.

Pyro's own takes one kernel after another for each tensor: 3.1 ms a step for scVI on 2,000 genes, 1.3 this way (one
CPU thread). The mathematics is the same: gradients clamped element by element, then Adam with an L2 penalty, its
epsilon outside the bias correction.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adam import adam


class FusedClippedAdam(ClippedAdam):
    """Pyro's ``ClippedAdam``, with the same arguments and the same steps to rounding, in fewer calls.

    Notes
    -----
    Adam here divides by sqrt(v) + eps before the bias correction of v, torch's by sqrt(v / (1 - beta2^t)) + eps:
    the two agree with eps / sqrt(1 - beta2^t) handed to torch's. ``centered_variance=True`` takes Pyro's own steps.
    """

    def __init__(self, params: Any, *args: Any, **options: Any) -> None:
        super().__init__(params, *args, **options)
        self._counts: dict[nn.Parameter, tuple[int, Tensor]] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # As torch's, without the wrapper that imports torch's compiler: 1.5 s before the first step of a process.
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)

    def step(
        self, closure: Callable[[], Any] | None = None, *, norm: float = math.inf, bad: Tensor | None = None
    ) -> Any:
        """One step; answers what ``closure`` does.

        ``norm``, a bound on every element of the gradients where one is known (their 2-norm is), saves the
        clamping that would change nothing. ``bad`` is 1.0 where the step is not to be taken, on the device, so that
        the host need not look; the step counts as one all the same.
        """
        if any(group["centered_variance"] for group in self.param_groups):
            return super().step(closure)
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["lr"] *= group["lrd"]
            # Tensors that had no gradient at times have taken fewer steps.
            by_step: dict[int, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_step.setdefault(self._started(p)["step"], []).append(p)
            for step, parameters in by_step.items():
                if norm > group["clip_norm"]:
                    nn.utils.clip_grad_value_(parameters, group["clip_norm"])
                self._fused(group, parameters, step + 1, bad)
        return loss

    def _started(self, p: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return state

    def _fused(self, group: dict[str, Any], parameters: list[nn.Parameter], step: int, bad: Tensor | None) -> None:
        states = [self.state[p] for p in parameters]
        for state in states:
            state["step"] = step
        beta1, beta2 = group["betas"]
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        first, second = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq"))
        with torch.no_grad():
            adam(
                list(parameters), gradients, first, second, [], self._steps_done(parameters, step - 1),
                fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"] / math.sqrt(1 - beta2**step), maximize=False, found_inf=bad,
            )  # fmt: skip

    def _steps_done(self, parameters: list[nn.Parameter], step: int) -> list[Tensor]:
        """Torch's own count of the steps of each, which its call raises by one."""
        counts = []
        for p in parameters:
            known, count = self._counts.get(p, (-1, None))
            if known != step or count is None:
                count = torch.full((), float(step), device=p.device)
            self._counts[p] = step + 1, count
            counts.append(count)
        return counts


def share_of_rate(step: int, total: int, schedule: str = "cosine") -> float:
    """Share of the learning rate at a step: rising over the first 5 %, then a cosine down to zero; or constant."""
    if schedule == "constant":
        return 1.0
    rise = max(1.0, 0.05 * total)
    if step < rise:
        return (step + 1) / rise if rise > 1 else 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))
