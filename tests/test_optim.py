"""The fused optimiser takes Pyro's steps."""

import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import nn

from pyrosc.optim import FusedClippedAdam

OPTIONS = {
    "usual": {},
    "clamped": dict(clip_norm=0.01),
    "decayed": dict(weight_decay=0.1, lrd=0.99),
    "short memory": dict(betas=(0.8, 0.95), eps=1e-3),
    "centred": dict(centered_variance=True),
}


def parameters(dtype):
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((), (7,), (3, 5), (200, 30))]


def descend(kind, options, dtype, n_steps=100):
    own = parameters(dtype)
    groups = [{"params": own[:2]}, {"params": own[2:], "lr": 0.003}]
    optimizer = kind(groups, lr=0.02, **options)
    torch.manual_seed(2)
    for step in range(n_steps):
        noise = [torch.randn_like(p) for p in own]
        for i, (p, e) in enumerate(zip(own, noise)):
            # the second tensor has no gradient every third step
            p.grad = None if i == 1 and step % 3 == 0 else 100.0 ** (i % 2) * (p.detach() - 1 + e)
        optimizer.step()
    return own, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_hundred_steps_are_those_of_pyro(options, dtype):
    (ours, one), (theirs, other) = (descend(kind, options, dtype) for kind in (FusedClippedAdam, ClippedAdam))

    for a, b in zip(ours, theirs):
        # A hundred steps round a hundred times, by 6e-8 of numbers around 1 each.
        torch.testing.assert_close(a, b, atol=6e-6 if dtype == torch.float32 else 1e-12, rtol=1e-6)
    assert [g["lr"] for g in one.param_groups] == [g["lr"] for g in other.param_groups]
    assert [s["step"] for s in one.state.values()] == [s["step"] for s in other.state.values()]
    start = parameters(dtype)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(ours, start))  # and they are steps


def test_state_is_exchanged_with_pyros():
    (_, theirs) = descend(ClippedAdam, {}, torch.float32, 20)
    own = parameters(torch.float32)
    ours = FusedClippedAdam([{"params": own[:2]}, {"params": own[2:], "lr": 0.003}], lr=0.02)

    ours.load_state_dict(theirs.state_dict())
    for p in own:
        p.grad = torch.ones_like(p)
    ours.step()

    assert [s["step"] for s in ours.state.values()] == [s["step"] + 1 for s in theirs.state.values()]


def test_a_closure_is_called_and_answered():
    own = parameters(torch.float32)
    optimizer = FusedClippedAdam(own, lr=0.1)

    def closure():
        for p in own:
            p.grad = torch.ones_like(p)
        return 3.0

    before = [p.detach().clone() for p in own]
    assert optimizer.step(closure) == 3.0
    assert all((a < b).all() for a, b in zip(own, before))


def test_a_known_norm_saves_clamping_and_changes_nothing():
    def descend_with(norms, clip_norm):
        own = parameters(torch.float32)
        optimizer = FusedClippedAdam(own, lr=0.1, clip_norm=clip_norm)
        torch.manual_seed(3)
        for _ in range(5):
            for p in own:
                p.grad = torch.randn_like(p)
            size = float(torch.nn.utils.get_total_norm([p.grad for p in own]))
            optimizer.step(**({"norm": norms(size)} if norms else {}))
        return own

    def equal(one, other):
        return all(torch.equal(a, b) for a, b in zip(one, other))

    for clip_norm in (0.5, 1e4):
        assert equal(descend_with(lambda size: size, clip_norm), descend_with(None, clip_norm))
    assert not equal(descend_with(lambda size: 0.1, 0.5), descend_with(None, 0.5))  # a bound that is none
