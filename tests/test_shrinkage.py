"""Variances and effects drawn towards the law that genes share: against integrals, and by the rate that calls keep."""

import numpy as np
import pytest
from scipy import stats

from pyrosc import effects
from pyrosc.shrinkage import moderated, shrunk


def test_moderated_variances_find_their_prior():
    draw = np.random.default_rng(0)
    true = 4.0 * 0.3 / draw.chisquare(4.0, 20_000)  # scaled inverse chi-square, 4 degrees, scale 0.3
    seen = true * draw.chisquare(5, 20_000) / 5

    variance, df = moderated(seen, 5)

    assert df[0] == pytest.approx(9.0, rel=0.1)  # 5 + 4
    np.testing.assert_allclose(variance[:5], (4 * 0.3 + 5 * seen[:5]) / 9, rtol=0.1)
    assert (moderated(0.3 * draw.chisquare(5, 1000) / 5, 5)[1] > 50).all()  # one variance for all


def test_moderated_variances_follow_a_trend_in_abundance():
    draw = np.random.default_rng(1)
    abundance = draw.lognormal(-7, 1.5, 5000)
    true = 0.001 / abundance**0.7
    seen = true * draw.chisquare(4, 5000) / 4

    variance, df = moderated(seen, 4, abundance)
    flat, _ = moderated(seen, 4)

    # The trend is all there is: the 4 degrees of each variance are as good as forgotten.
    assert np.median(df) > 50
    error, without = (np.abs(np.log(v / true)).mean() for v in (variance, flat))
    assert error < 0.05 < 0.3 < without


def test_a_handful_of_genes_has_no_trend():
    variance, df = moderated(np.array([1.0, 2.0, 0.5]), 4, np.array([0.1, 0.2, 0.3]))
    alone, _ = moderated(np.array([0.7]), 4, np.array([0.1]))

    assert np.isfinite(variance).all()
    assert (df >= 4).all()
    assert np.isfinite(alone).all()


def test_shrunken_effects_are_the_posterior_under_their_mixture():
    draw = np.random.default_rng(2)
    effect = np.where(draw.uniform(size=400) < 0.7, 0.0, draw.normal(0, 1.5, 400))
    sd = draw.uniform(0.1, 0.6, 400)
    estimate = effect + sd * draw.normal(size=400)

    found = shrunk(estimate, sd)

    # The weights are at a maximum: under Dirichlet(1 + 1 / K) no scale has more to gain than another.
    likelihood = stats.norm.pdf(estimate[:, None], 0, np.hypot(sd[:, None], found.prior_scale))
    positive = found.prior_scale > 0
    gain = (likelihood / (likelihood @ found.prior_weight)[:, None]).sum(0)
    gain += 1 / len(found.prior_weight) / found.prior_weight
    assert found.prior_weight.sum() == pytest.approx(1)
    np.testing.assert_allclose(gain, 401, rtol=1e-2)
    for g in (0, 17, 333):
        # Integrals over 200,001 effects; steps of 1e-4 are far below every scale there is.
        b = np.linspace(-10, 10, 200_001)
        prior = (found.prior_weight[positive, None] * stats.norm.pdf(b, 0, found.prior_scale[positive, None])).sum(0)
        joint = prior * stats.norm.pdf(estimate[g], b, sd[g]) * 1e-4
        point = found.prior_weight[0] * stats.norm.pdf(estimate[g], 0, sd[g])
        total = joint.sum() + point
        assert found.probability(0.4)[g] == pytest.approx(joint[np.abs(b) > 0.4].sum() / total, abs=1e-3)
        assert found.mean[g] == pytest.approx((b * joint).sum() / total, abs=1e-5)


def test_an_estimate_of_few_degrees_is_a_student_t_about_its_effect():
    # A wide prior leaves the likelihood: eight points of the chi-square give its tails to about a tenth.
    estimate = np.concatenate([np.linspace(-400, 400, 8000), [1.0]])
    sd = np.ones(8001)

    few, many = shrunk(estimate, sd, 5.0), shrunk(estimate, sd)

    exact = stats.t.cdf(0.0, 5.0, loc=1.0)
    assert few.cdf(0.0)[-1] == pytest.approx(exact, rel=0.15)
    assert few.cdf(-1.5)[-1] > 3 * many.cdf(-1.5)[-1]  # heavier tails


@pytest.mark.parametrize("df", [4.0, np.inf])
def test_calls_keep_their_rate_where_a_flat_prior_calls_too_many(df):
    draw = np.random.default_rng(3)
    n, delta, rate, false = 4000, 0.5, 0.1, {"shrunk": [], "flat": []}
    for _ in range(10):
        effect = draw.choice([0.05, 0.3, 1.0], size=n, p=[0.5, 0.3, 0.2]) * draw.normal(size=n)
        known = np.full(n, 0.35)
        sd = known * (np.sqrt(draw.chisquare(df, n) / df) if np.isfinite(df) else 1.0)
        estimate = effect + known * draw.normal(size=n)
        law = stats.t(df) if np.isfinite(df) else stats.norm
        flat = law.sf((delta - estimate) / sd) + law.cdf((-delta - estimate) / sd)
        variance, degrees = moderated(sd**2, df) if np.isfinite(df) else (sd**2, df)
        alike = shrunk(estimate, np.sqrt(variance), degrees).probability(delta)
        for name, chance in (("shrunk", alike), ("flat", flat)):
            called = effects.expected_fdp(chance) <= rate
            false[name].append((np.abs(effect[called]) <= delta).mean())

    # About 400 calls in each of ten: the standard error of the mean is 0.005.
    assert np.mean(false["shrunk"]) == pytest.approx(rate, abs=0.02)
    assert np.mean(false["flat"]) > 2 * rate
