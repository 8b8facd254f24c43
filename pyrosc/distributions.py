"""Distributions of counts by mean and dispersion: exact in float32, quick on sparse data.

    NegativeBinomial(mean, dispersion)           variance mean + mean^2 / dispersion
    ZeroInflatedNegativeBinomial(.., gate_logits)  a zero is an extra one with probability sigmoid(gate_logits)
    Poisson(mean)                                variance mean

``dispersion`` is the inverse dispersion (the "size" of R); large means nearly Poisson.

At x = 0 the log density of the negative binomial is -dispersion log1p(mean / dispersion):
one pass over the dense block. All else is needed at the non-zero counts only, so forward
and backward are written out by hand in an ``autograd.Function`` that works on those alone.
Small counts take

    log p(x) = log p(0) + x (log mean - log1p(mean / dispersion)) + table[x, gene]

with a table of log Gamma(x + d) / (Gamma(d) d^x x!) for each gene, where float32 is exact
enough; the few large ones are computed in float64, because terms as large as the count
cancel, and float32 then loses nats.

Within 1e-3 nats an entry of the exact value for dispersion 1e-3 to 1e8 and means 1e-8 to 1e6
(relative 1e-6 where the log density is beyond 1,000). First derivatives only.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, ClassVar

import numpy as np
import torch
from pyro.distributions import Independent, TorchDistribution, constraints
from scipy import special
from torch import Tensor
from torch.autograd.function import once_differentiable

from .counts import Nonzeros, nonzeros

_LARGE = 1e5  # dispersion from which Stirling's series is exact in float64
_POISSON = 1e30  # a larger dispersion changes nothing in float32 or float64, but overflows
_MOST = 1e8  # rates are clamped here before a Poisson draw: larger ones are beyond float32's whole numbers


def _at_counts(x: Tensor, mean: Tensor, dispersion: Tensor, slopes: bool) -> tuple[Tensor, ...]:
    """log p(x) of the negative binomial, x > 0, all (m,); then its slopes in mean and dispersion.

    In float64: terms as large as x cancel, and these are few.
    """
    given = mean.dtype
    x, mean, dispersion = x.double(), mean.double(), dispersion.double()
    m, near_zero = x + dispersion, torch.log1p(mean / dispersion)
    # Gamma(m) / (Gamma(d) d^x), by Stirling's series where even float64 would cancel
    low, large, step = dispersion.clamp(max=_LARGE), dispersion > _LARGE, torch.log1p(x / dispersion)
    series = (m - 0.5) * step - x + (1 / m - 1 / dispersion) / 12
    rising = torch.where(large, series, torch.lgamma(x + low) - torch.lgamma(low) - x * low.log())
    value = rising - torch.lgamma(x + 1) + x * mean.log() - m * near_zero
    if not slopes:
        return (value.to(given),)
    series = step - (1 / m - 1 / dispersion) / 2
    rising = torch.where(large, series, torch.digamma(x + low) - torch.digamma(low))
    apart, both = x - mean, dispersion + mean
    by_mean = apart / mean * (dispersion / both)
    return value.to(given), by_mean.to(given), (rising - near_zero - apart / both).to(given)


# ---- the block: zeros in dense passes, the rest at the non-zero counts ------------------------

_FEW = 16  # up to this count sums over k < x come from a table, one column a gene


def _pick(block: Tensor, found: Nonzeros) -> Tensor:
    """Numbers of a block (..., G), or of a vector (G,), at the non-zero counts."""
    return block.index_select(0, found.gene) if block.dim() == 1 else block.reshape(-1).index_select(0, found.index)


def _put(block: Tensor, found: Nonzeros, values: Tensor) -> Tensor:
    """Write ``values`` at the non-zero counts; genes that were not measured say nothing."""
    block.view(-1).index_copy_(0, found.index, values)
    return block if found.mask is None else block.mul_(found.mask)


def _tables(dispersion: Tensor) -> tuple[Tensor, Tensor]:
    """For x = 0.._FEW and each gene, (x, G): log of Gamma(x + d) / (Gamma(d) d^x x!), and its slope in d."""
    k = torch.arange(_FEW, dtype=dispersion.dtype, device=dispersion.device).unsqueeze(-1)
    table = dispersion.new_zeros(_FEW + 1, len(dispersion))
    torch.cumsum((k / dispersion).log1p_(), 0, out=table[1:])
    table -= torch.lgamma(torch.arange(1, _FEW + 2, dtype=table.dtype, device=table.device)).unsqueeze(-1)
    slope = torch.zeros_like(table)
    torch.cumsum(-(k / dispersion) / (dispersion + k), 0, out=slope[1:])
    return table.view(-1), slope.view(-1)


class _Block:
    """A negative binomial block (..., G): what its log density and slopes are made of.

    log1p : (..., G), log1p(mean / dispersion); log p(0) is -dispersion times it
    inverse : (..., G), 1 / (1 + mean / dispersion); the slope of log p(0) in the mean is minus it
    value, by_mean, by_dispersion : (m,), log density and its slopes at the non-zero counts
    """

    inverse: Tensor
    value: Tensor
    by_mean: Tensor
    by_dispersion: Tensor

    def __init__(self, mean: Tensor, dispersion: Tensor, found: Nonzeros, slopes: bool) -> None:
        self.dispersion = dispersion
        self.ratio = mean / dispersion
        self.log1p = torch.log1p(self.ratio)
        if slopes:
            self.inverse = (self.ratio + 1.0).reciprocal_()
        # Tables need one dispersion a gene; picking out large counts would make a GPU wait.
        if dispersion.dim() == 1 and mean.device.type == "cpu":
            self._from_tables(mean, found, slopes)
            large = (found.count > _FEW).nonzero().squeeze(-1)
            if len(large):
                few = Nonzeros(*(t.index_select(0, large) for t in found[:3]))
                value, *both = self._in_full(mean, few, slopes)
                self.value.index_copy_(0, large, value)
                if slopes:
                    self.by_mean.index_copy_(0, large, both[0])
                    self.by_dispersion.index_copy_(0, large, both[1])
        else:
            self.value, *both = self._in_full(mean, found, slopes)
            if slopes:
                self.by_mean, self.by_dispersion = both

    def _in_full(self, mean: Tensor, found: Nonzeros, slopes: bool) -> tuple[Tensor, ...]:
        return _at_counts(found.count, _pick(mean, found), _pick(self.dispersion, found), slopes)

    def _from_tables(self, mean: Tensor, found: Nonzeros, slopes: bool) -> None:
        """log p(x) = table[x] + x (log mean - log1p) - dispersion log1p: exact enough up to x = _FEW."""
        table, slope = _tables(self.dispersion)
        entry = found.count.clamp(max=_FEW).long().mul_(len(self.dispersion)).add_(found.gene)
        mu, log1p = _pick(mean, found), _pick(self.log1p, found)
        dispersion = _pick(self.dispersion, found)
        self.value = table.index_select(0, entry)
        self.value += found.count * (mu.log() - log1p)
        self.value -= dispersion * log1p
        if slopes:
            inverse = _pick(self.inverse, found)
            seen = found.count * inverse
            self.by_mean = seen / mu - inverse
            ratio = mu / dispersion
            zero = _zero_slope(ratio, log1p, inverse, dispersion)
            self.by_dispersion = slope.index_select(0, entry) + zero + seen * ratio / dispersion

    def zero_slope(self) -> Tensor:
        """(..., G) slope of log p(0) in the dispersion."""
        return _zero_slope(self.ratio, self.log1p, self.inverse, self.dispersion)


def _zero_slope(ratio: Tensor, log1p: Tensor, inverse: Tensor, dispersion: Tensor) -> Tensor:
    """r / (1 + r) - log1p(r), r = mean / dispersion: the slope of log p(0) in the dispersion."""
    slope = (ratio * inverse).sub_(log1p)
    # Where r is small the difference cancels, to an error of 6e-8 dispersion (in sds of what a
    # count says of log dispersion): nothing, but at a large dispersion.
    if dispersion.dim() == 1 and dispersion.device.type == "cpu" and slope.dim() > 1:
        genes = (dispersion > 1000).nonzero().squeeze(-1)
        if len(genes):
            slope[..., genes] = _small_ratio_slope(ratio[..., genes], slope[..., genes])
        return slope
    return _small_ratio_slope(ratio, slope)


def _small_ratio_slope(ratio: Tensor, slope: Tensor) -> Tensor:
    """-r^2/2 + 2 r^3/3 - 3 r^4/4 + ... where r is small, else ``slope``."""
    r = ratio.clamp(max=0.02)
    series = r * r * (-1 / 2 + r * (2 / 3 - r * (3 / 4 - r * (4 / 5 - r * 5 / 6))))
    return torch.where(ratio < 0.02, series, slope)


def _rows(grad: Tensor, slope: Tensor, summed: bool) -> Tensor:
    """Incoming gradient times slope; the gradient is one number a row where the row was summed."""
    return slope * (grad.unsqueeze(-1) if summed else grad)


def _to_parameter(grad: Tensor, slope: Tensor, per_gene: bool, summed: bool) -> Tensor:
    """The same for a parameter: of the block's shape, or one number a gene (G,), summed over rows."""
    if not per_gene:
        return _rows(grad, slope, summed)
    n_genes = slope.shape[-1]
    if summed:
        return grad.reshape(-1) @ slope.reshape(-1, n_genes)
    return (grad * slope).reshape(-1, n_genes).sum(0)


class _LogNB(torch.autograd.Function):
    """mean (..., G), dispersion (..., G) or (G,) -> log density (..., G), or (...) summed over genes."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, dispersion: Tensor, found: Nonzeros, summed: bool) -> Tensor:
        to_mean, to_dispersion, *_ = ctx.needs_input_grad
        block = _Block(mean, dispersion, found, to_mean or to_dispersion)
        by_mean = by_dispersion = None
        if to_dispersion:
            by_dispersion = _put(block.zero_slope(), found, block.by_dispersion)
        if to_mean:
            by_mean = _put(block.inverse.neg_(), found, block.by_mean)
        value = _put(block.log1p.mul_(-dispersion), found, block.value)
        ctx.save_for_backward(by_mean, by_dispersion)
        ctx.per_gene, ctx.summed = dispersion.dim() == 1, summed
        return value.sum(-1) if summed else value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_mean, by_dispersion = ctx.saved_tensors
        return (
            None if by_mean is None else _rows(grad, by_mean, ctx.summed),
            None if by_dispersion is None else _to_parameter(grad, by_dispersion, ctx.per_gene, ctx.summed),
            None,
            None,
        )


def _softplus(t: Tensor) -> Tensor:
    """log(1 + e^t), within 1e-7: twice as quick as torch's on a CPU, and right at -inf."""
    return t.clamp(min=0).sub_(t.abs().sigmoid_().log_())


class _LogZINB(torch.autograd.Function):
    """As ``_LogNB``, with gate logits a (..., G) or (G,).

    x = 0:  -softplus(a) + l0 + softplus(a - l0),  l0 = log NB(0)
    x > 0:  -softplus(a) + log NB(x)
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, dispersion: Tensor, gate: Tensor, found: Nonzeros, summed: bool) -> Tensor:
        to_mean, to_dispersion, to_gate, *_ = ctx.needs_input_grad
        slopes = to_mean or to_dispersion or to_gate
        block = _Block(mean, dispersion, found, slopes)
        by_mean = by_dispersion = by_gate = None
        if slopes:
            zero_slope = block.zero_slope() if to_dispersion else None
        zero = block.log1p.mul_(-dispersion)
        apart = gate - zero
        open_gate = _softplus(gate)
        if slopes:
            counted = apart.neg().sigmoid_()  # probability that a zero is a count, not an extra one
            if to_gate:
                chance = gate.sigmoid()
                by_gate = _put((1.0 - chance) - counted, found, -_pick(chance, found))
            if zero_slope is not None:
                by_dispersion = _put(zero_slope.mul_(counted), found, block.by_dispersion)
            if to_mean:
                by_mean = _put(block.inverse.neg_().mul_(counted), found, block.by_mean)
        value = zero.add_(_softplus(apart)).sub_(open_gate)
        value = _put(value, found, block.value.sub_(_pick(open_gate, found)))
        ctx.save_for_backward(by_mean, by_dispersion, by_gate)
        ctx.per_gene, ctx.summed = (dispersion.dim() == 1, gate.dim() == 1), summed
        return value.sum(-1) if summed else value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_mean, by_dispersion, by_gate = ctx.saved_tensors
        return (
            None if by_mean is None else _rows(grad, by_mean, ctx.summed),
            None if by_dispersion is None else _to_parameter(grad, by_dispersion, ctx.per_gene[0], ctx.summed),
            None if by_gate is None else _to_parameter(grad, by_gate, ctx.per_gene[1], ctx.summed),
            None,
            None,
        )


class _LogPoisson(torch.autograd.Function):
    """mean (..., G) -> log density (..., G), or (...) summed over genes."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, found: Nonzeros, summed: bool) -> Tensor:
        mu, x = _pick(mean, found), found.count
        few = torch.arange(1, _FEW + 2, dtype=mean.dtype, device=mean.device).lgamma()
        at = x * mu.log() - mu - few.index_select(0, x.clamp(max=_FEW).long())
        large = (x > _FEW).nonzero().squeeze(-1)
        if len(large):
            big, rate = x.index_select(0, large).double(), mu.index_select(0, large).double()
            at.index_copy_(0, large, (big * rate.log() - rate - torch.lgamma(big + 1)).to(at.dtype))
        value = _put(mean.neg(), found, at)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_put(torch.full_like(mean, -1.0), found, x / mu - 1))
            ctx.summed = summed
        return value.sum(-1) if summed else value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _rows(grad, ctx.saved_tensors[0], ctx.summed), None, None


# ---- the distributions ------------------------------------------------------------------------


class _PerCell(Independent):
    """Independent over genes, with the log density of a row summed in the same pass."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self.reinterpreted_batch_ndims != 1:
            return super().log_prob(value)
        if self._validate_args:
            self.base_dist._validate_sample(value)
        return self.base_dist._log_density(value, summed=True)


class _Counts(TorchDistribution):
    """What the count distributions share: shapes, and how a value meets its parameters."""

    support = constraints.nonnegative_integer
    has_rsample = False
    _names: tuple[str, ...]  # parameters, each kept as it came (not expanded) under "_" + name

    def _set(self, parameters: dict[str, Tensor], validate_args: bool | None) -> None:
        floating = [p.dtype for p in parameters.values() if p.is_floating_point()]
        dtype = reduce(torch.promote_types, floating) if floating else torch.get_default_dtype()
        parameters = {name: value.to(dtype) for name, value in parameters.items()}
        for name, value in parameters.items():
            setattr(self, "_" + name, value)
        shape = torch.broadcast_shapes(*(p.shape for p in parameters.values()))
        super().__init__(shape, torch.Size(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(_Counts, _instance) if _instance else type(self).__new__(type(self))
        for name in self._names:
            setattr(new, "_" + name, getattr(self, "_" + name))
        TorchDistribution.__init__(new, torch.Size(batch_shape), torch.Size(), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Genes as one event, ``to_event(1)``: rows are then summed in one pass."""
        n = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return _PerCell(self, n) if n else self

    def _full(self, name: str, shape: torch.Size | None = None) -> Tensor:
        value: Tensor = getattr(self, "_" + name)
        return value.expand(self.batch_shape if shape is None else shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of each count: the broadcast of ``value`` and the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        return self._log_density(value, summed=False)

    def _log_density(self, value: Tensor, summed: bool) -> Tensor:
        shape = torch.broadcast_shapes(self.batch_shape, value.shape)
        block = shape if shape else torch.Size([1])
        found = _meet(value, block, self._mean.dtype)
        mean = self._mean.expand(block).contiguous()
        rest = [_per_gene_or_full(getattr(self, "_" + name), block) for name in self._names[1:]]
        if not torch.is_grad_enabled():  # else slopes would be made, and thrown away
            mean, *rest = (t.detach() for t in (mean, *rest))
        result = self._apply(mean, *rest, found, summed)
        return result if shape else result.reshape(())

    def _apply(self, *args: Any) -> Tensor:
        raise NotImplementedError


def _per_gene_or_full(parameter: Tensor, shape: torch.Size) -> Tensor:
    """(G,) if the parameter has one number a gene (or one for all), else the whole block."""
    n_genes = shape[-1]
    if parameter.numel() == 1:
        return parameter.reshape(1).expand(n_genes).contiguous()
    if parameter.numel() == n_genes == parameter.shape[-1]:
        return parameter.reshape(n_genes).contiguous()
    return parameter.expand(shape).contiguous()


def _meet(value: Tensor, shape: torch.Size, dtype: torch.dtype) -> Nonzeros:
    """Non-zero counts of ``value`` as they stand in a block of this shape."""
    if value.shape != shape and (not value.dim() or shape[len(shape) - value.dim() :] != value.shape):
        value = value.expand(shape)
    found = nonzeros(value)
    times = shape.numel() // max(value.numel(), 1)
    if times > 1:  # the same counts against several draws
        step = torch.arange(times, device=value.device).unsqueeze(-1) * value.numel()
        index = (step + found.index).reshape(-1)
        found = Nonzeros(index, found.gene.repeat(times), found.count.repeat(times), found.mask)
    return found._replace(count=found.count.to(dtype))


def _given(name: str, value: Any, log_value: Any) -> Tensor:
    if (value is None) == (log_value is None):
        raise ValueError(f"give either {name} or log_{name}, and not both")
    return torch.as_tensor(log_value).exp() if value is None else torch.as_tensor(value)


class NegativeBinomial(_Counts):
    """Negative binomial counts by mean and inverse dispersion.

    Parameters
    ----------
    mean, log_mean : (...,), >= 0
        Expected count, or its log; give one of the two.
    dispersion, log_dispersion : (...,), > 0
        Inverse dispersion, or its log: the variance is ``mean + mean**2 / dispersion``.
        One number a gene, (G,), is the quickest. Infinity is the Poisson.

    Raises
    ------
    ValueError
        If both or neither of a number and its log are given, or (with validation on)
        a parameter or a value is out of range.

    Notes
    -----
    The log density and its first derivatives are exact to about 1e-3 nats an entry in
    float32 over dispersion 1e-3 to 1e8 and means 1e-8 to 1e6. Counts should be below
    2**24, the whole numbers of float32. ``cdf`` is computed by scipy in float64 and
    has no gradient.

    >>> NegativeBinomial(torch.tensor(3.0), torch.tensor(2.0)).variance
    tensor(7.5000)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"mean": constraints.nonnegative, "dispersion": constraints.positive}
    _names = ("mean", "dispersion")

    def __init__(
        self,
        mean: Tensor | float | None = None,
        dispersion: Tensor | float | None = None,
        *,
        log_mean: Tensor | None = None,
        log_dispersion: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        mean = _given("mean", mean, log_mean)
        dispersion = _given("dispersion", dispersion, log_dispersion).clamp(max=_POISSON)
        self._set({"mean": mean, "dispersion": dispersion}, validate_args)

    @property
    def mean(self) -> Tensor:
        """Expected count, of the batch shape."""
        return self._full("mean")

    @property
    def dispersion(self) -> Tensor:
        """Inverse dispersion, of the batch shape."""
        return self._full("dispersion")

    @property
    def variance(self) -> Tensor:
        """``mean + mean**2 / dispersion``."""
        return self.mean + self.mean**2 / self.dispersion

    def _apply(self, *args: Any) -> Tensor:
        return _LogNB.apply(*args)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts by way of a gamma rate; rates are clamped at 1e8."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            dispersion = self._full("dispersion", shape)
            rate = torch._standard_gamma(dispersion.contiguous()) * (self._full("mean", shape) / dispersion)
            return torch.poisson(rate.clamp(max=_MOST))

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value`` (any real number), without gradient."""
        return _nb_cdf(value, self._mean, self._dispersion)

    def rest_given(self, kept: Tensor, fraction: float) -> NegativeBinomial:
        """Law of the counts that were dropped, if this is the law of those kept, each with probability ``fraction``.

        With mean m and dispersion d: negative binomial with dispersion d + kept and mean
        m (1 - fraction) / fraction * (d + kept) / (d + m): the gamma rate behind the counts, updated by those kept.
        """
        size = self._dispersion + kept
        # (d + kept) / (d + m), which tends to 1 for large d
        ratio = 1 + (kept - self._mean) / (self._dispersion + self._mean)
        return NegativeBinomial((1 - fraction) / fraction * self._mean * ratio, size, validate_args=False)


class ZeroInflatedNegativeBinomial(_Counts):
    """Negative binomial counts that are replaced by zero with probability ``sigmoid(gate_logits)``.

    Parameters
    ----------
    mean, log_mean : (...,), >= 0
        Expected count of the negative binomial, before zeros are added.
    dispersion, log_dispersion : (...,), > 0
        Its inverse dispersion.
    gate_logits : (...,), real or -inf
        Log odds of an extra zero; -inf is the negative binomial.

    Notes
    -----
    ``.mean`` is that of the counts, ``(1 - sigmoid(gate_logits))`` times the one given.
    Precision, ranges and errors as for `NegativeBinomial`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "mean": constraints.nonnegative,
        "dispersion": constraints.positive,
        "gate_logits": constraints.less_than(float("inf")),
    }
    _names = ("mean", "dispersion", "gate_logits")

    def __init__(
        self,
        mean: Tensor | float | None = None,
        dispersion: Tensor | float | None = None,
        gate_logits: Tensor | float = 0.0,
        *,
        log_mean: Tensor | None = None,
        log_dispersion: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        mean = _given("mean", mean, log_mean)
        dispersion = _given("dispersion", dispersion, log_dispersion).clamp(max=_POISSON)
        gate = torch.as_tensor(gate_logits)
        self._set({"mean": mean, "dispersion": dispersion, "gate_logits": gate}, validate_args)

    @property
    def gate_logits(self) -> Tensor:
        """Log odds of an extra zero, of the batch shape."""
        return self._full("gate_logits")

    @property
    def dispersion(self) -> Tensor:
        """Inverse dispersion, of the batch shape."""
        return self._full("dispersion")

    @property
    def mean(self) -> Tensor:
        """Expected count, extra zeros included."""
        return self._full("mean") * torch.sigmoid(-self.gate_logits)

    @property
    def variance(self) -> Tensor:
        """``(1 - p) (m + m**2 / dispersion + p m**2)`` for gate probability p and mean m before it."""
        counted, m = torch.sigmoid(-self.gate_logits), self._full("mean")
        return counted * (m + m**2 / self.dispersion + (1 - counted) * m**2)

    def _apply(self, *args: Any) -> Tensor:
        return _LogZINB.apply(*args)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts, or an extra zero where the gate closes."""
        shape = self._extended_shape(torch.Size(sample_shape))
        counts = NegativeBinomial(self._mean, self._dispersion, validate_args=False).expand(shape).sample()
        with torch.no_grad():
            extra = torch.bernoulli(torch.sigmoid(self._full("gate_logits", shape)))
        return counts * (1 - extra)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``, without gradient."""
        extra = torch.sigmoid(self._gate_logits.detach())
        return extra * (value >= 0) + (1 - extra) * _nb_cdf(value, self._mean, self._dispersion)

    def rest_given(self, kept: Tensor, fraction: float) -> ZeroInflatedNegativeBinomial:
        """Law of the counts that were dropped, as for `NegativeBinomial`.

        A count kept shows that the gate was open; none kept raises its log odds of being closed by -log NB(0).
        """
        counted = NegativeBinomial(self._mean, self._dispersion, validate_args=False)
        zero = -self._dispersion * torch.log1p(self._mean / self._dispersion)
        closed = torch.where(kept > 0, -torch.inf, self._gate_logits - zero)
        rest = counted.rest_given(kept, fraction)
        return ZeroInflatedNegativeBinomial(rest._mean, rest._dispersion, closed, validate_args=False)


class Poisson(_Counts):
    """Poisson counts, with the log density taken at the non-zero counts only.

    Parameters
    ----------
    mean, log_mean : (...,), >= 0
        Expected count, or its log; give one of the two.

    Notes
    -----
    Precision, ranges and errors as for `NegativeBinomial`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"mean": constraints.nonnegative}
    _names = ("mean",)

    def __init__(
        self,
        mean: Tensor | float | None = None,
        *,
        log_mean: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._set({"mean": _given("mean", mean, log_mean)}, validate_args)

    @property
    def mean(self) -> Tensor:
        """Expected count, of the batch shape."""
        return self._full("mean")

    @property
    def variance(self) -> Tensor:
        """The mean again."""
        return self.mean

    def _apply(self, *args: Any) -> Tensor:
        return _LogPoisson.apply(*args)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts; rates are clamped at 1e8."""
        with torch.no_grad():
            return torch.poisson(self._full("mean", self._extended_shape(torch.Size(sample_shape))).clamp(max=_MOST))

    def rest_given(self, kept: Tensor, fraction: float) -> Poisson:
        """Law of the counts that were dropped, as for `NegativeBinomial`: those kept say nothing of them."""
        return Poisson((1 - fraction) / fraction * self._mean + 0 * kept, validate_args=False)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``, without gradient."""
        x, mean = _float64(value), _float64(self._mean)
        return _tensor(np.where(x < 0, 0.0, special.pdtr(np.floor(np.maximum(x, 0)), mean)), self._mean)


def _float64(t: Tensor) -> np.ndarray:
    return t.detach().cpu().double().numpy()


def _tensor(a: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(a, dtype=like.dtype, device=like.device)


def _nb_cdf(value: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """I_p(dispersion, x + 1), p = dispersion / (dispersion + mean): the regularised incomplete beta."""
    x, mu, size = _float64(value), _float64(mean), _float64(dispersion)
    whole = np.floor(np.maximum(x, 0))
    # From the other side, so that a p near one keeps its digits; beyond 1e10 it is Poisson to 1e-9.
    beta = special.betaincc(whole + 1, np.minimum(size, 1e10), mu / (np.minimum(size, 1e10) + mu))
    poisson = special.pdtr(whole, mu)
    return _tensor(np.where(x < 0, 0.0, np.where(size > 1e10, poisson, beta)), mean)
