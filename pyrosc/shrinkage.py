"""What many genes say of one: variances and effects are drawn towards the law that the genes share.

A threshold on effects picks genes whose estimate happens to be large. With a flat prior on each, the share of false
ones among those picked is more than their probabilities say; with the prior that the genes themselves follow it is not.

    variance_g  ~ scaled inverse chi-square around a trend in abundance     (Smyth 2004; Law et al. 2014)
    effect_g    ~ sum_k w_k Normal(0, scale_k), weights by maximum likelihood     (Stephens 2017)
    estimate_g  ~ Normal(effect_g, variance of the estimate)

References: Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3:3; Law et al. 2014, Genome Biology 15:R29; Stephens 2017,
Biostatistics 18:275.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special, stats

_N_VARIANCES = 8  # points that stand for the law of a variance
_TREND_GENES = 50  # fewer genes have one variance, without a trend


def moderated(
    variance: np.ndarray, df: np.ndarray | float, abundance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Variances of genes (G,), each with ``df`` degrees of freedom, drawn towards a common one, and their new degrees.

    Empirical Bayes with a scaled inverse chi-square prior, its two numbers by moments of log variances
    (Smyth 2004, section 6.2). Those of genes of like ``abundance`` (G,), positive, have a centre in common: a cubic in
    its logarithm.
    """
    df = np.broadcast_to(np.asarray(df, dtype=float), variance.shape)
    positive = np.maximum(variance, 1e-5 * max(float(np.median(variance)), 1e-300))
    e = np.log(positive) - special.digamma(df / 2) + np.log(df / 2)
    design = np.ones((len(e), 1))
    if abundance is not None and len(e) >= _TREND_GENES:
        log = np.log(np.maximum(abundance, 1e-300))
        design = np.vander((log - log.mean()) / max(float(log.std()), 1e-12), 4)
    centre = design @ np.linalg.lstsq(design, e, rcond=None)[0]
    n_free = len(e) - design.shape[1]
    rest = float(((e - centre) ** 2).sum() / n_free - special.polygamma(1, df / 2).mean()) if n_free > 0 else 0.0
    if rest <= 0:  # no more scatter than chance
        return np.exp(centre), np.full_like(variance, np.inf)
    half = _inverse_trigamma(rest)
    prior = np.exp(centre + special.digamma(half) - np.log(half))
    return (2 * half * prior + df * variance) / (2 * half + df), 2 * half + df


def _inverse_trigamma(y: float) -> float:
    """x with trigamma(x) = y > 0, by Newton steps on 1 / trigamma, which is nearly a line."""
    x = 0.5 + 1 / y
    for _ in range(50):
        slope = special.polygamma(2, x)
        step = special.polygamma(1, x) * (1 - special.polygamma(1, x) / y) / slope
        x += float(step)
        if abs(step) < 1e-10 * x:
            break
    return x


@dataclass
class Shrunk:
    """Posteriors of effects of genes, each a mixture of M normals.

    weight, loc, scale : (G, M); a scale of 0 is a point
    prior_scale, prior_weight : (K,) the law that the genes share
    """

    weight: np.ndarray
    loc: np.ndarray
    scale: np.ndarray
    prior_scale: np.ndarray
    prior_weight: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(G,) posterior means."""
        return (self.weight * self.loc).sum(1)

    @property
    def sd(self) -> np.ndarray:
        """(G,) posterior standard deviations."""
        second = (self.weight * (self.loc**2 + self.scale**2)).sum(1)
        return np.sqrt(np.maximum(second - self.mean**2, 0.0))

    def cdf(self, value: float) -> np.ndarray:
        """(G,) posterior probability of an effect of at most ``value``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(self.scale > 0, (value - self.loc) / self.scale, np.where(value >= self.loc, np.inf, -np.inf))
        return (self.weight * special.ndtr(z)).sum(1)

    def probability(self, delta: float) -> np.ndarray:
        """(G,) posterior probability of |effect| > delta, each tail by itself: 0 where it is out of reach."""
        with np.errstate(divide="ignore", invalid="ignore"):
            above, below = (
                np.where(self.scale > 0, special.ndtr(side / self.scale), side > 0)
                for side in (self.loc - delta, -delta - self.loc)
            )
        return np.clip((self.weight * (above + below)).sum(1), 0.0, 1.0)


def shrunk(estimate: np.ndarray, sd: np.ndarray, df: np.ndarray | float = np.inf) -> Shrunk:
    """Effects of genes from estimates (G,), their sds (G,) and the degrees of freedom of these.

    The prior is a mixture of normals around 0, a point at 0 among them, with scales by factors of sqrt(2) from a
    quarter of the least sd to twice the largest effect. Its weights are those of largest likelihood for these genes and
    one more that may have any of the scales, without which few genes would rule out what none of them shows. A variance
    with ``df`` degrees of freedom is stood for by points of df sd^2 / chi-square(df), at equal probabilities, so that
    an estimate is a Student t about its effect.
    """
    sd = np.maximum(np.asarray(sd, dtype=float), 1e-9)
    df = np.broadcast_to(np.asarray(df, dtype=float), sd.shape)[:, None]
    at = (np.arange(_N_VARIANCES) + 0.5) / _N_VARIANCES
    capped = np.minimum(df, 1e6)  # a chi-square of more is its mean, to float precision
    variance = sd[:, None] ** 2 * np.where(df < 1e6, capped / stats.chi2.ppf(at, capped), 1.0)  # (G, V)
    least = sd.min() / 4
    largest = 2 * np.sqrt(max(float((estimate**2 - sd**2).max()), (2 * least) ** 2))
    steps = int(np.ceil(np.log2(largest / least) * 2)) + 1
    scale = np.concatenate([[0.0], least * 2 ** (np.arange(steps) / 2)])  # (K,)
    spread = variance[:, None, :] + scale[:, None] ** 2  # (G, K, V)
    log_p = -0.5 * (np.log(2 * np.pi * spread) + estimate[:, None, None] ** 2 / spread)
    of_scale = special.logsumexp(log_p, axis=2)
    weight = _weights(np.exp(of_scale - of_scale.max(1, keepdims=True)))
    with np.errstate(divide="ignore"):
        joint = log_p + np.log(weight)[:, None]
    member = special.softmax(joint.reshape(len(sd), -1), axis=1)
    towards = scale[:, None] ** 2 / spread
    loc = (estimate[:, None, None] * towards).reshape(len(sd), -1)
    width = np.sqrt(variance[:, None, :] * towards).reshape(len(sd), -1)
    return Shrunk(member, loc, width, scale, weight)


def _weights(likelihood: np.ndarray, n_iterations: int = 2000) -> np.ndarray:
    """Weights (K,) of a mixture of columns of likelihoods (G, K), by EM under a Dirichlet(1 + 1 / K) prior."""
    n_genes, n_scales = likelihood.shape
    weight = np.full(n_scales, 1 / n_scales)
    for _ in range(n_iterations):
        new = weight * (likelihood.T @ (1 / (likelihood @ weight)))
        new = (new + 1 / n_scales) / (n_genes + 1)
        done = np.abs(new - weight).max() < 1e-6
        weight = new
        if done:
            break
    return weight
