"""Count densities against scipy and high precision, Pyro's classes, and finite differences."""

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pyrosc.counts import carry, nonzeros
from pyrosc.distributions import NegativeBinomial, Poisson, Presence, ZeroInflatedNegativeBinomial

mpmath.mp.dps = 40
INF = float("inf")


def exact_nb(x, mean, dispersion):
    """log density in 40 digits of the numbers that float32 holds."""
    x, m, d = mpmath.mpf(float(x)), mpmath.mpf(float(mean)), mpmath.mpf(float(dispersion))
    log_mean = x * mpmath.log(m / (d + m)) if x else 0
    return float(
        mpmath.loggamma(x + d) - mpmath.loggamma(d) - mpmath.loggamma(x + 1) - d * mpmath.log1p(m / d) + log_mean
    )


def grid():
    """Counts, means and dispersions that cover the promised range, far tails included."""
    rows = []
    for dispersion in 10.0 ** np.arange(-3, 9):
        for mean in 10.0 ** np.arange(-8, 7):
            sd = np.sqrt(mean + mean**2 / dispersion)
            counts = {0, 1, 2, 5, 16, 17, mean / 3, mean, 3 * mean, mean + 2 * sd, mean + 6 * sd, max(mean - 6 * sd, 0)}
            rows += [(round(x), mean, dispersion) for x in counts if x < 2**24]
    return (torch.tensor(column, dtype=torch.float32) for column in zip(*rows))


@pytest.mark.parametrize("layout", ["per gene", "per entry"])
def test_nb_is_exact_to_a_thousandth_of_a_nat_in_float32(layout):
    x, mean, dispersion = grid()
    expected = np.array([exact_nb(*row) for row in zip(x, mean, dispersion)])
    if layout == "per entry":  # a full block of dispersions takes the way without tables
        x, mean, dispersion = x.unsqueeze(-1), mean.unsqueeze(-1), dispersion.unsqueeze(-1)

    found = NegativeBinomial(mean, dispersion).log_prob(x).double().numpy().reshape(-1)

    # 1e-3 nats an entry, 1e-6 of itself where it is beyond 1,000
    assert np.max(np.abs(found - expected) / np.maximum(1, np.abs(expected) / 1000)) < 1e-3


def test_pyros_own_class_would_fail_that_test():
    x, mean, dispersion = grid()
    expected = np.array([exact_nb(*row) for row in zip(x, mean, dispersion)])

    found = dist.NegativeBinomial(dispersion, logits=mean.log() - dispersion.log()).log_prob(x).double().numpy()

    assert np.max(np.abs(found - expected) / np.maximum(1, np.abs(expected) / 1000)) > 1e-2


@pytest.mark.parametrize("dispersion", [1e-3, 1e-1, 1.0, 1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("total", [1_500, 100_000])
def test_nb_of_a_cell_is_within_a_thousandth_of_a_nat(dispersion, total):
    draw = np.random.default_rng(0)
    share = draw.dirichlet(np.full(2000, 0.3), size=4)
    mean = torch.tensor(np.maximum(total * share, 1e-8), dtype=torch.float32)
    size = torch.full((2000,), dispersion, dtype=torch.float32)
    rate = draw.gamma(dispersion, mean.numpy() / dispersion)
    x = torch.tensor(draw.poisson(np.minimum(rate, 1e6)), dtype=torch.float32)
    d = float(size[0])
    if d >= 1e4:  # scipy's own float64 is off by nats here
        expected = np.array([sum(exact_nb(a, b, d) for a, b in zip(*row)) for row in zip(x, mean)])
    else:
        m = mean.double().numpy()
        expected = stats.nbinom.logpmf(x.numpy(), d, d / (d + m)).sum(-1)

    found = NegativeBinomial(mean, size).to_event(1).log_prob(x)

    # beyond 16,000 nats float32 itself is coarser than 1e-3
    np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-3, rtol=1e-7)


def test_poisson_is_exact_to_a_thousandth_of_a_nat_in_float32():
    x, mean, _ = grid()
    expected = np.array([float(a * mpmath.log(m) - m - mpmath.loggamma(a + 1)) for a, m in
                         ((mpmath.mpf(float(a)), mpmath.mpf(float(m))) for a, m in zip(x, mean))])  # fmt: skip

    found = Poisson(mean).log_prob(x).double().numpy()

    assert np.max(np.abs(found - expected) / np.maximum(1, np.abs(expected) / 1000)) < 1e-3


def test_nb_with_infinite_dispersion_is_the_poisson():
    x, mean, _ = grid()

    limit = NegativeBinomial(mean, torch.tensor(INF)).log_prob(x)

    torch.testing.assert_close(limit, Poisson(mean).log_prob(x), rtol=1e-6, atol=1e-4)


def test_nb_with_dispersion_1e8_is_the_poisson_to_a_nat_in_a_thousand():
    mean = torch.tensor(10.0 ** np.arange(-8, 3), dtype=torch.float64)
    x = mean.round() + torch.arange(3.0, dtype=torch.float64).unsqueeze(-1)

    # the true difference is of the order (x - mean)^2 / 1e8
    torch.testing.assert_close(
        NegativeBinomial(mean, torch.tensor(1e8)).log_prob(x), Poisson(mean).log_prob(x), atol=1e-3, rtol=0
    )


def test_zinb_with_closed_gate_is_the_nb():
    x, mean, dispersion = grid()

    closed = ZeroInflatedNegativeBinomial(mean, dispersion, torch.tensor(-INF)).log_prob(x)

    torch.testing.assert_close(closed, NegativeBinomial(mean, dispersion).log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize("gate_shape", [(40,), (6, 40)])
def test_all_three_equal_pyros_classes_in_float64(gate_shape):
    torch.manual_seed(0)
    mean = torch.rand(6, 40, dtype=torch.float64) * 5 + 0.01
    size = torch.rand(40, dtype=torch.float64) * 3 + 0.2
    gate = torch.randn(gate_shape, dtype=torch.float64)
    x = torch.poisson(mean * torch.rand(6, 1))
    logits = mean.log() - size.log()
    pairs = [
        (NegativeBinomial(mean, size), dist.NegativeBinomial(size, logits=logits)),
        (
            ZeroInflatedNegativeBinomial(mean, size, gate),
            dist.ZeroInflatedNegativeBinomial(size, logits=logits, gate_logits=gate),
        ),
        (Poisson(mean), dist.Poisson(mean)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-8, atol=1e-6)
        torch.testing.assert_close(ours.mean, theirs.mean)
        torch.testing.assert_close(ours.variance, theirs.variance)
        torch.testing.assert_close(ours.to_event(1).log_prob(x), theirs.to_event(1).log_prob(x), rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("mean, size, gate", [(0.3, 0.5, -1.0), (8.0, 3.0, 0.5), (40.0, 1e5, -8.0)])
def test_probabilities_sum_to_one(mean, size, gate):
    x = torch.arange(3000.0, dtype=torch.float64)
    m, d, a = (torch.tensor(v, dtype=torch.float64) for v in (mean, size, gate))

    for law in (NegativeBinomial(m, d), ZeroInflatedNegativeBinomial(m, d, a), Poisson(m)):
        assert law.log_prob(x).exp().sum() == pytest.approx(1, abs=1e-8)


def _laws(mean, size, gate):
    return {
        "nb": NegativeBinomial(mean, size),
        "zinb": ZeroInflatedNegativeBinomial(mean, size, gate),
        "poisson": Poisson(mean),
    }


@pytest.mark.parametrize("law", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize("per_gene", [True, False])
@pytest.mark.parametrize("summed", [True, False])
def test_gradients_equal_finite_differences_in_float64(law, per_gene, summed):
    torch.manual_seed(1)
    mean = (torch.rand(4, 30, dtype=torch.float64) * 30 + 0.05).requires_grad_()
    shape = (30,) if per_gene else (4, 30)
    size = (torch.rand(shape, dtype=torch.float64) * 200 + 0.1).requires_grad_()
    gate = torch.randn(shape, dtype=torch.float64).requires_grad_()
    x = torch.poisson(mean.detach() * torch.rand(4, 30))
    weight = torch.randn(4, 1, dtype=torch.float64)

    def value(mean, size, gate):
        made = _laws(mean, size, gate)[law]
        return made.to_event(1).log_prob(x) * weight.squeeze(-1) if summed else made.log_prob(x) * weight

    assert torch.autograd.gradcheck(value, (mean, size, gate), atol=1e-6, rtol=1e-5)


def test_gradients_are_right_and_finite_over_the_whole_range_in_float32():
    x, mean, dispersion = grid()

    def slopes(a, m, d):
        a, m, d = (mpmath.mpf(float(v)) for v in (a, m, d))
        by_d = mpmath.digamma(a + d) - mpmath.digamma(d) - mpmath.log1p(m / d) + (m - a) / (d + m)
        return float(d * (a - m) / (d + m)), float(d * by_d)

    expected = np.array([slopes(*row) for row in zip(x, mean, dispersion)])
    for shape in ((-1,), (-1, 1)):
        m, d = mean.clone().reshape(shape).requires_grad_(), dispersion.clone().reshape(shape).requires_grad_()
        NegativeBinomial(m, d).log_prob(x.reshape(shape)).sum().backward()
        found = torch.stack([m * m.grad, d * d.grad], -1).detach().double().numpy().reshape(-1, 2)

        assert np.isfinite(found).all()
        # by log mean and log dispersion; 1e-3 of itself, 1e-6 where it is smaller than that
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-6)


def test_zinb_gradients_are_finite_over_the_whole_range_in_float32():
    x, mean, dispersion = grid()
    for logit in (-60.0, -5.0, 0.0, 5.0, 60.0):
        m, d = mean.clone().requires_grad_(), dispersion.clone().requires_grad_()
        a = torch.full_like(mean, logit).requires_grad_()
        ZeroInflatedNegativeBinomial(m, d, a).log_prob(x).sum().backward()

        assert all(torch.isfinite(t.grad).all() for t in (m, d, a))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5), g=st.integers(2, 7), density=st.floats(0, 1), seed=st.integers(0, 10_000),
    law=st.sampled_from(["nb", "zinb", "poisson"]),
)  # fmt: skip
def test_carried_entries_give_the_same_as_searching(n, g, density, seed, law):
    draw = torch.Generator().manual_seed(seed)
    mean = torch.rand(n, g, generator=draw, dtype=torch.float64) * 20 + 0.1
    size, gate = (
        torch.rand(g, generator=draw, dtype=torch.float64) + 0.1,
        torch.randn(g, generator=draw, dtype=torch.float64),
    )
    x = torch.poisson(mean, generator=draw) * (torch.rand(n, g, generator=draw) < density)
    carried = carry(x.clone(), nonzeros(x))

    made = _laws(mean, size, gate)[law].to_event(1)

    torch.testing.assert_close(made.log_prob(carried), made.log_prob(x), rtol=1e-10, atol=1e-10)


def test_a_scalar_law_takes_many_values():
    law = NegativeBinomial(3.0, 2.0)
    x = torch.arange(5.0)

    torch.testing.assert_close(law.log_prob(x), torch.tensor([exact_nb(a, 3, 2) for a in x]).float())
    assert law.log_prob(torch.tensor(2.0)).shape == ()


def test_draws_in_front_broadcast_against_the_same_counts():
    torch.manual_seed(0)
    mean, size = torch.rand(5, 3, 8) + 0.1, torch.rand(8) + 0.1
    x = torch.poisson(torch.ones(3, 8))
    carry(x, nonzeros(x))
    expected = torch.stack([NegativeBinomial(m, size).log_prob(x).sum(-1) for m in mean])

    torch.testing.assert_close(NegativeBinomial(mean, size).to_event(1).log_prob(x), expected)
    per_draw = size.expand(5, 1, 8)  # a global dispersion under a plate of draws
    torch.testing.assert_close(NegativeBinomial(mean, per_draw).to_event(1).log_prob(x), expected)


def test_genes_that_were_not_measured_say_nothing():
    mean = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    x = torch.tensor([[1.0, 0.0, 0.0]])
    carry(x, nonzeros(x)._replace(mask=torch.tensor([True, True, False])))

    for law in _laws(mean, torch.ones(3), torch.zeros(3)).values():
        masked = law.to_event(1).log_prob(x)
        torch.testing.assert_close(masked, law.log_prob(x.clone())[:, :2].sum(-1))
        (gradient,) = torch.autograd.grad(masked.sum(), mean)
        assert gradient[0, 2] == 0


def test_a_transposed_mean_is_no_trouble():
    mean = (torch.rand(7, 4) + 0.5).T
    x = torch.poisson(mean)

    torch.testing.assert_close(
        NegativeBinomial(mean, torch.ones(7)).log_prob(x),
        NegativeBinomial(mean.contiguous(), torch.ones(7)).log_prob(x),
    )


@pytest.mark.parametrize("law", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize("mean, size", [(0.2, 0.5), (6.0, 2.0), (300.0, 50.0)])
def test_samples_have_the_stated_moments_and_law(law, mean, size):
    torch.manual_seed(0)
    made = _laws(torch.tensor(mean), torch.tensor(size), torch.tensor(-1.0))[law]
    n = 40_000

    x = made.sample((n,))

    # five standard errors; that of a variance from the fourth moment of the sample
    assert abs(x.mean() - made.mean) < 5 * (made.variance / n) ** 0.5
    fourth = ((x - x.mean()) ** 4).mean()
    assert abs(x.var() - made.variance) < 5 * ((fourth - made.variance**2) / n) ** 0.5
    # the whole law, by its randomised PIT; a twin with twice the mean must fail
    below, at = made.cdf(x - 1), made.cdf(x)
    pit = below + torch.rand(n) * (at - below)
    assert stats.kstest(pit.numpy(), "uniform").pvalue > 1e-4
    twin = _laws(torch.tensor(2 * mean), torch.tensor(size), torch.tensor(-1.0))[law]
    wrong = twin.cdf(x - 1) + torch.rand(n) * (twin.cdf(x) - twin.cdf(x - 1))
    assert stats.kstest(wrong.numpy(), "uniform").pvalue < 1e-6


def test_cdf_is_scipys():
    x = torch.tensor([-1.0, 0.0, 0.5, 3.0, 50.0], dtype=torch.float64)
    m, d = torch.tensor(7.0, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)

    torch.testing.assert_close(
        NegativeBinomial(m, d, validate_args=False).cdf(x), torch.tensor(stats.nbinom.cdf(x, 2.5, 2.5 / 9.5))
    )
    torch.testing.assert_close(Poisson(m, validate_args=False).cdf(x), torch.tensor(stats.poisson.cdf(x, 7.0)))
    extra = torch.sigmoid(torch.tensor(0.3, dtype=torch.float64))
    zinb = ZeroInflatedNegativeBinomial(m, d, torch.tensor(0.3, dtype=torch.float64), validate_args=False).cdf(x)
    torch.testing.assert_close(
        zinb, torch.where(x < 0, 0, extra + (1 - extra) * torch.tensor(stats.nbinom.cdf(x, 2.5, 2.5 / 9.5)))
    )


def test_logs_may_be_given_instead():
    mean, size = torch.tensor([0.1, 5.0]), torch.tensor([2.0, 0.3])
    x = torch.tensor([1.0, 4.0])

    by_logs = NegativeBinomial(log_mean=mean.log(), log_dispersion=size.log()).log_prob(x)

    torch.testing.assert_close(by_logs, NegativeBinomial(mean, size).log_prob(x))
    with pytest.raises(ValueError, match="either mean or log_mean"):
        NegativeBinomial(mean, size, log_mean=mean.log())


def test_shapes_and_expand():
    law = NegativeBinomial(torch.ones(3, 1), torch.ones(4))

    assert law.batch_shape == (3, 4)
    assert law.expand([2, 3, 4]).sample().shape == (2, 3, 4)
    assert law.to_event(1).batch_shape == (3,)
    assert law.to_event(1).event_shape == (4,)
    assert law.to_event(1).expand([2, 3]).sample((5,)).shape == (5, 2, 3, 4)
    assert law.to_event(1).expand([2, 3]).log_prob(torch.zeros(3, 4)).shape == (2, 3)


def test_validation_names_what_is_wrong():
    with pyro.validation_enabled(True):
        with pytest.raises(ValueError, match="dispersion"):
            NegativeBinomial(torch.ones(2), torch.tensor([1.0, -1.0]))
        with pytest.raises(ValueError, match="mean"):
            Poisson(torch.tensor(-1.0))
        for law in _laws(torch.ones(2), torch.ones(2), torch.zeros(2)).values():
            with pytest.raises(ValueError, match="support"):
                law.log_prob(torch.tensor([0.5, 1.0]))
            with pytest.raises(ValueError, match="support"):
                law.to_event(1).log_prob(torch.tensor([-1.0, 1.0]))


def test_a_count_where_the_mean_is_zero_is_impossible():
    law = NegativeBinomial(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]))

    assert law.log_prob(torch.tensor([0.0, 2.0])).tolist() == [0.0, -INF]


# ---- presence ---------------------------------------------------------------------------------


def test_presence_is_what_is_left_of_a_poisson_count():
    mean = torch.tensor(10.0 ** np.arange(-12.0, 2.6, 0.5), dtype=torch.float64)
    law = Presence(mean)
    one, none = torch.ones_like(mean), torch.zeros_like(mean)

    exact = [float(mpmath.log1p(-mpmath.exp(-mpmath.mpf(float(m))))) for m in mean]
    np.testing.assert_allclose(law.log_prob(one), exact, rtol=1e-12)
    np.testing.assert_allclose(law.log_prob(one)[:24], stats.poisson.logsf(0, mean)[:24], rtol=1e-10)
    np.testing.assert_allclose(law.log_prob(none), stats.poisson.logpmf(0, mean), rtol=1e-12)
    np.testing.assert_allclose(law.mean, -np.expm1(-mean.numpy()), rtol=1e-12)
    np.testing.assert_allclose(law.variance, -np.expm1(-mean.numpy()) * np.exp(-mean.numpy()), rtol=1e-12)
    np.testing.assert_allclose(law.cdf(none), stats.poisson.cdf(0, mean), rtol=1e-12)
    assert float(law.cdf(one).min()) == 1
    assert float(law.cdf(-one).max()) == 0


def test_presence_is_exact_in_float32_where_the_plain_form_is_not():
    mean = torch.tensor([1e-12, 1e-8, 1e-4, 0.5, 20.0])
    exact = [float(mpmath.log(-mpmath.expm1(-mpmath.mpf(float(m))))) for m in mean]

    np.testing.assert_allclose(Presence(mean).log_prob(torch.ones(5)), exact, rtol=1e-6)
    assert not np.allclose((1 - (-mean).exp()).log(), exact, rtol=1e-2)  # the twin


@pytest.mark.parametrize("law", [Poisson, Presence])
@pytest.mark.parametrize("summed", [True, False])
def test_slopes_at_non_zero_counts_are_those_of_finite_differences(law, summed):
    g = torch.Generator().manual_seed(1)
    x = torch.poisson(torch.full((4, 9), 0.7, dtype=torch.float64), generator=g)
    x[0, 0] = 30.0
    x = x.clamp(max=1) if law is Presence else x
    mean = torch.rand(4, 9, generator=g, dtype=torch.float64).add_(0.1).requires_grad_()
    total = torch.rand(4, 1, generator=g, dtype=torch.float64).add_(1.0).requires_grad_()

    def density(rate, exposure):
        made = law(rate, exposure=exposure)
        return made.to_event(1).log_prob(x) if summed else made.log_prob(x)

    assert torch.autograd.gradcheck(density, (mean, total))
    assert torch.autograd.gradcheck(lambda m: law(m).to_event(int(summed)).log_prob(x), (mean,))


@pytest.mark.parametrize("law", [Poisson, Presence])
def test_an_exposure_multiplies_the_mean(law):
    rate, exposure = torch.rand(3, 5), torch.tensor([[1.0], [10.0], [100.0]])
    x = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0]]).expand(3, 5)
    one, other = law(rate, exposure=exposure), law(exposure * rate)

    torch.testing.assert_close(one.log_prob(x), other.log_prob(x))
    torch.testing.assert_close(one.mean, other.mean)
    assert one.expand(torch.Size([2, 3, 5])).sample().shape == (2, 3, 5)
    assert one.sample((4,)).shape == (4, 3, 5)
    drawn = one.sample((4000,)).mean(0)
    error = (one.variance / 4000).sqrt() + 1e-9
    assert float(((drawn - one.mean) / error).abs().max()) < 5  # five standard errors of 15


def test_presence_takes_zeros_and_ones():
    with pyro.validation_enabled(True):
        with pytest.raises(ValueError, match="support"):
            Presence(torch.ones(2)).log_prob(torch.tensor([0.0, 2.0]))
        with pytest.raises(ValueError, match="mean"):
            Presence(torch.tensor(-1.0))
