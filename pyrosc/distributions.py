"""Distributions of counts by mean and dispersion: exact in float32, quick on sparse data.

    NegativeBinomial(mean, dispersion)           variance mean + mean^2 / dispersion
    ZeroInflatedNegativeBinomial(.., gate_logits)  a zero is an extra one with probability sigmoid(gate_logits)
    Poisson(mean)                                variance mean
    Presence(mean)                               whether a Poisson count is above zero

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

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pyro.distributions import Independent, TorchDistribution, constraints
from scipy import special
from torch import Tensor
from torch.autograd.function import once_differentiable

from .counts import Nonzeros, may_look, nonzeros

_LARGE = 1e5  # dispersion from which Stirling's series is exact in float64
_POISSON = 1e30  # a larger dispersion changes nothing in float32 or float64, but overflows
_MOST = 1e8  # rates are clamped here before a Poisson draw: larger ones are beyond float32's whole numbers


# ---- the non-zero counts ----------------------------------------------------------------------

_ROUGH = 8.0  # dispersion up to which log(1 + r), wrong by up to 6e-8, costs no 1e-3 nats over 2,000 genes
_FEW = 16  # up to this count sums over k < x come from a table, one column a gene


class _Entries(NamedTuple):
    """Non-zero counts of a block: (m,) each, but ``exact`` of those in float64 (None for all of them).

    rise : log p(x) - log p(0); log p(x) itself where exact
    by_mean, by_dispersion : slopes of log p(x), None if they are not asked for
    sums : (n,) rows' sums of ``rise`` over genes that were measured
    """

    rise: Tensor
    by_mean: Tensor | None
    by_dispersion: Tensor | None
    exact: Tensor | None
    sums: Tensor


def _in_full(x: Tensor, mean: Tensor, dispersion: Tensor, slopes: bool, large: bool = True) -> tuple[Tensor, Any, Any]:
    """log p(x) of the negative binomial, x > 0, all (m,); its slopes in mean and dispersion, None if not wanted.

    In float64: terms as large as x cancel, and these are few. ``large`` says that a dispersion may be above ``_LARGE``,
    where Gamma(x + d) / (Gamma(d) d^x) is taken by Stirling's series, because even float64 would cancel.
    """
    given = mean.dtype
    x, mean, dispersion = x.double(), mean.double(), dispersion.double()
    m, both = x + dispersion, dispersion + mean
    near_zero = torch.log1p(mean / dispersion)
    low = dispersion.clamp(max=_LARGE) if large else dispersion
    top = x + low
    rising = torch.lgamma(top).sub_(torch.lgamma(low)).sub_(x * low.log())
    if large:
        beyond, step = dispersion > _LARGE, torch.log1p(x / dispersion)
        series = (m - 0.5) * step - x + (1 / m - 1 / dispersion) / 12
        rising = torch.where(beyond, series, rising)
    value = rising.sub_(torch.lgamma(x + 1)).add_(x * mean.log()).sub_(m * near_zero)
    if not slopes:
        return value.to(given), None, None
    apart = x - mean
    by_mean = apart / mean * (dispersion / both)
    rising = torch.digamma(top).sub_(torch.digamma(low))
    if large:
        rising = torch.where(beyond, step - (1 / m - 1 / dispersion) / 2, rising)
    return value.to(given), by_mean.to(given), rising.sub_(near_zero).sub_(apart / both).to(given)


class _Tables:
    """What is the same for all rows, from one dispersion a gene (G,).

    value, slope : (x * G + gene,) for x = 0.._FEW, log of Gamma(x + d) / (Gamma(d) d^x x!), and its slope in d
    precise : (p,) genes whose dense part is taken with log1p, and not with log; ``is_all`` if most are
    is_wide : whether a dispersion is above _LARGE
    """

    def __init__(self, dispersion: Tensor) -> None:
        k = torch.arange(_FEW, dtype=dispersion.dtype, device=dispersion.device).unsqueeze(-1)
        self.inverse, both = dispersion.reciprocal(), k + dispersion
        share = k * self.inverse
        table = dispersion.new_zeros(_FEW + 1, len(dispersion))
        slope = torch.zeros_like(table)
        torch.cumsum(share.log1p(), 0, out=table[1:])
        torch.cumsum(share.div_(both).neg_(), 0, out=slope[1:])
        self.value, self.slope = table.sub_(_log_factorials(dispersion)).view(-1), slope.view(-1)
        most = float(dispersion.max()) if len(dispersion) else 0.0
        self.is_wide = not most <= _LARGE
        self.precise = (dispersion > _ROUGH).nonzero().squeeze(-1) if not most <= _ROUGH else _NONE
        self.is_all = len(self.precise) > len(dispersion) // 3
        self.one = dispersion.new_ones(())


_NONE = torch.zeros(0, dtype=torch.int64)


def _log_factorials(like: Tensor) -> Tensor:
    """log x! for x = 0.._FEW, (x, 1)."""
    return torch.arange(1, _FEW + 2, dtype=like.dtype, device=like.device).lgamma().unsqueeze(-1)


def _entries(mean: Tensor, dispersion: Tensor, found: Nonzeros, tables: _Tables | None, slopes: bool) -> _Entries:
    """Log densities and slopes at the non-zero counts of a block (n, G)."""
    mu, x = mean.view(-1).index_select(0, found.index), found.count
    if dispersion.dim() == 1:
        size = dispersion.index_select(0, found.gene)
    else:
        size = dispersion.view(-1).index_select(0, found.index)
    if tables is None:
        value, by_mean, by_dispersion = _in_full(x, mu, size, slopes)
        return _Entries(value, by_mean, by_dispersion, None, _row_sums(value, found))
    entry = x.clamp(max=_FEW).long().mul_(len(dispersion)).add_(found.gene)
    ratio = mu / size
    inverse = (ratio + 1.0).reciprocal_()
    rise = tables.value.index_select(0, entry)
    rise.addcmul_(x, (mu * inverse).log_())
    by_mean = by_dispersion = None
    if slopes:
        seen = x * inverse
        by_mean = (seen / mu).sub_(inverse)
        by_dispersion = (ratio * inverse).sub_(ratio.log1p())
        if len(tables.precise):
            by_dispersion = _small_ratio_slope(ratio, by_dispersion)
        by_dispersion.add_(tables.slope.index_select(0, entry)).add_(seen.mul_(ratio).div_(size))
    large = (x > _FEW).nonzero().squeeze(-1)
    if len(large):
        few = [t.index_select(0, large) for t in (x, mu, size)]
        value, few_by_mean, few_by_dispersion = _in_full(few[0], few[1], few[2], slopes, tables.is_wide)
        rise.index_copy_(0, large, value)
        if by_mean is not None and by_dispersion is not None:
            by_mean.index_copy_(0, large, few_by_mean)
            by_dispersion.index_copy_(0, large, few_by_dispersion)
    return _Entries(rise, by_mean, by_dispersion, large, _row_sums(rise, found))


def _small_ratio_slope(ratio: Tensor, slope: Tensor) -> Tensor:
    """-r^2/2 + 2 r^3/3 - 3 r^4/4 + ... where r is small, else ``slope`` = r / (1 + r) - log1p(r)."""
    r = ratio.clamp(max=0.02)
    series = r * r * (-1 / 2 + r * (2 / 3 - r * (3 / 4 - r * (4 / 5 - r * 5 / 6))))
    return torch.where(ratio < 0.02, series, slope)


# ---- blocks: zeros in dense passes, the rest at the non-zero counts ---------------------------

_PASS = 2**18  # entries of a block whose non-zero counts are worked on at a time
_DENSE = 2**16  # entries of a dense pass: with its neighbours it stays in a core's own cache


def _passes(
    mean: Tensor, dispersion: Tensor, found: Nonzeros, tables: _Tables | None, slopes: bool
) -> Iterator[tuple[slice, Nonzeros, _Entries]]:
    """Blocks of rows small enough for one dense pass, with what is to be said at their non-zero counts."""
    n_rows, n_genes = mean.shape
    for rows, here in _cut(found, n_rows, n_genes, _PASS if may_look(mean) else mean.numel()):
        start = rows.start
        at = _entries(mean[rows], _rows_of(dispersion, rows), here, tables, slopes)
        low = 0
        pieces = list(_cut(here, rows.stop - start, n_genes, _DENSE if may_look(mean) else mean.numel()))
        highs = [low := low + len(piece.index) for _, piece in pieces]
        exact = [0] * len(pieces)
        if at.exact is not None and len(at.exact):
            exact = torch.searchsorted(at.exact, torch.tensor(highs)).tolist()
        for (inner, piece), low, high, first, last in zip(pieces, [0, *highs], highs, [0, *exact], exact):
            yield (
                slice(start + inner.start, start + inner.stop),
                piece,
                _Entries(
                    at.rise[low:high],
                    None if at.by_mean is None else at.by_mean[low:high],
                    None if at.by_dispersion is None else at.by_dispersion[low:high],
                    None if at.exact is None else at.exact[first:last] - low,
                    at.sums[inner],
                ),
            )


def _cut(found: Nonzeros, n_rows: int, n_genes: int, most: int) -> Iterator[tuple[slice, Nonzeros]]:
    """Blocks of rows of at most ``most`` entries, and their non-zero counts."""
    size = max(1, most // max(n_genes, 1))
    if n_rows <= size:
        yield slice(0, n_rows), found
        return
    starts = list(range(0, n_rows, size))
    ends = [0, *found.ends[[min(s + size, n_rows) - 1 for s in starts]].tolist()]
    for start, low, high in zip(starts, ends, ends[1:]):
        rows = slice(start, min(start + size, n_rows))
        yield rows, Nonzeros(
            found.index[low:high] - start * n_genes, found.gene[low:high], found.count[low:high],
            found.ends[rows] - low, found.mask,
        )  # fmt: skip


def _rows_of(parameter: Tensor, rows: slice) -> Tensor:
    return parameter if parameter.dim() == 1 else parameter[rows]


def _row_sums(values: Tensor, found: Nonzeros) -> Tensor:
    """(n,) sums over rows of values (m,) at the non-zero counts of genes that were measured."""
    if found.mask is not None:
        values = values * found.mask.index_select(0, found.gene)
    sums = values.new_zeros(len(values) + 1, dtype=torch.float64)
    torch.cumsum(values, 0, dtype=torch.float64, out=sums[1:])
    return sums.index_select(0, found.ends).diff(prepend=sums[:1]).to(values.dtype)


def _put(block: Tensor, found: Nonzeros, values: Tensor) -> Tensor:
    """Write ``values`` at the non-zero counts; genes that were not measured say nothing."""
    block.view(-1).index_copy_(0, found.index, values)
    return block if found.mask is None else block.mul_(found.mask.to(block))


class _Pass:
    """One dense pass over rows (n, G) of negative binomials, r = mean / dispersion.

    log1p : log(1 + r); log p(0) is -dispersion times it
    inverse : 1 / (1 + r); the slope of log p(0) in the mean is minus it
    slope : log(1 + r) - r / (1 + r), minus the slope of log p(0) in the dispersion; takes the place of ``log1p``

    ``room`` are two blocks to work in. Most genes get by with four passes: 1 + r, its log, its inverse, and
    their sum less 1. Where the dispersion is large that cancels; those are done again with log1p.
    """

    def __init__(self, mean: Tensor, dispersion: Tensor, tables: _Tables | None, room: list[Tensor]) -> None:
        self.mean, self.dispersion, self.tables = mean, dispersion, tables
        self.inverse, self.log1p = room
        if tables is None or tables.is_all:
            self.ratio = mean / dispersion
            torch.log1p(self.ratio, out=self.log1p)
            return
        torch.addcmul(tables.one, mean, tables.inverse, out=self.inverse)
        torch.log(self.inverse, out=self.log1p)
        if len(tables.precise):
            self.ratio = mean.index_select(1, tables.precise) / dispersion.index_select(0, tables.precise)
            self.few_log1p = self.ratio.log1p()
            self.log1p.index_copy_(1, tables.precise, self.few_log1p)

    def leave_out(self, found: Nonzeros, exact: Tensor | None) -> None:
        """No log p(0) where log p(x) is given whole: the two may be large and nearly equal."""
        index = found.index if exact is None else found.index.index_select(0, exact)
        if len(index):
            self.log1p.view(-1).index_fill_(0, index, 0.0)

    def zeros(self, found: Nonzeros, summed: bool) -> Tensor:
        """log p(0), (n, G), or (n,) summed over genes that were measured."""
        if not summed:
            return self.log1p * -self.dispersion
        if self.dispersion.dim() == 1:
            return (self.log1p @ _mask(self.dispersion, found)).neg_()
        return (self.log1p * _mask(self.dispersion, found)).sum(-1).neg_()

    def make_slopes(self) -> Tensor:
        """``slope``; ``inverse`` is ready after it, and ``log1p`` gone."""
        tables = self.tables
        if tables is None or tables.is_all:
            torch.add(self.ratio, 1.0, out=self.inverse).reciprocal_()
            self.log1p.addcmul_(self.ratio, self.inverse, value=-1.0)
            return torch.neg(_small_ratio_slope(self.ratio, self.log1p.neg_()), out=self.log1p)
        self.inverse.reciprocal_()
        self.log1p.add_(self.inverse).sub_(1.0)
        if len(tables.precise):
            slope = self.ratio / (1 + self.ratio) - self.few_log1p
            self.log1p.index_copy_(1, tables.precise, _small_ratio_slope(self.ratio, slope).neg_())
        return self.log1p


def _mask(values: Tensor, found: Nonzeros) -> Tensor:
    return values if found.mask is None else values * found.mask


def _to_rows(grad: Tensor, slope: Tensor, summed: bool) -> Tensor:
    """Incoming gradient times slope (n, G); the gradient is one number a row where the row was summed."""
    return slope * (grad.unsqueeze(-1) if summed else grad)


def _to_parameter(grad: Tensor, slope: Tensor, per_gene: bool, summed: bool) -> Tensor:
    """The same for a parameter: of the block's shape, or one number a gene (G,), summed over rows."""
    if not per_gene:
        return _to_rows(grad, slope, summed)
    return grad @ slope if summed else (grad * slope).sum(0)


class _LogCounts(torch.autograd.Function):
    """What the functions below share: slopes that are multiplied with the incoming gradient.

    Each forward takes its parameters, (n, G) or (G,), then ``found`` and ``summed``; answers the log density (n, G),
    or (n,) summed over genes. Saved slopes are *minus* those of the log density.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = -grad
        gradients = [
            None if slope is None else _to_parameter(grad, slope, per_gene, ctx.summed)
            for slope, per_gene in zip(ctx.saved_tensors, ctx.per_gene)
        ]
        return (*gradients, None, None)


class _Room:
    """Two blocks (n, G) to work in: those that are wanted whole afterwards, the others for one pass at a time."""

    def __init__(self, mean: Tensor, wanted: Sequence[bool]) -> None:
        self.mean = mean
        self.kept = [torch.empty_like(mean) if w else None for w in wanted]
        self.passing: list[Tensor | None] = [None, None]

    def of(self, rows: slice) -> list[Tensor]:
        """Both for these rows; the first block of rows is the largest."""
        n = rows.stop - rows.start
        blocks = []
        for i, kept in enumerate(self.kept[:2]):
            passing = self.passing[i]
            if kept is None and passing is None:
                passing = self.passing[i] = self.mean.new_empty(n, self.mean.shape[1])
            blocks.append(kept[rows] if kept is not None else passing[:n])  # type: ignore[index]
        return blocks


def _tables_for(mean: Tensor, dispersion: Tensor) -> _Tables | None:
    """Tables need one dispersion a gene; picking out large counts would make a GPU wait."""
    return _Tables(dispersion) if dispersion.dim() == 1 and may_look(mean) else None


class _LogNB(_LogCounts):
    """mean (n, G), dispersion (n, G) or (G,)."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, dispersion: Tensor, found: Nonzeros, summed: bool) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        tables = _tables_for(mean, dispersion)
        value = mean.new_empty(len(mean)) if summed else torch.empty_like(mean)
        room = _Room(mean, wanted)
        for rows, here, at in _passes(mean, dispersion, found, tables, any(wanted)):
            means, sizes = mean[rows], _rows_of(dispersion, rows)
            dense = _Pass(means, sizes, tables, room.of(rows))
            dense.leave_out(here, at.exact)
            if summed:
                value[rows] = dense.zeros(here, True).add_(at.sums)
            else:
                zero = dense.zeros(here, False)
                value[rows] = _put(zero, here, zero.view(-1).index_select(0, here.index).add_(at.rise))
            if at.by_mean is not None and at.by_dispersion is not None:
                slope = dense.make_slopes()
                _put(dense.inverse, here, at.by_mean.neg_())
                _put(slope, here, at.by_dispersion.neg_())
        by_mean, by_dispersion = room.kept
        ctx.save_for_backward(by_mean, by_dispersion)
        ctx.per_gene, ctx.summed = (False, dispersion.dim() == 1), summed
        return value


def _softplus(t: Tensor) -> Tensor:
    """log(1 + e^t), within 1e-7: twice as quick as torch's on a CPU, and right at -inf."""
    return t.clamp(min=0).sub_(t.abs().sigmoid_().log_())


_UNDERFLOW = -80.0  # below it sigmoids come close to the smallest numbers of float32


class _LogZINB(_LogCounts):
    """mean (n, G), dispersion (n, G) or (G,), gate logits a (n, G) or (G,).

    With o = sigmoid(-a) and c = sigmoid(log NB(0) - a), the probability that a zero is a count and not an extra one:
    x = 0:  log NB(0) + log(o / c)
    x > 0:  log NB(x) + log o
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, dispersion: Tensor, gate: Tensor, found: Nonzeros, summed: bool) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        tables = _tables_for(mean, dispersion)
        value = mean.new_empty(len(mean)) if summed else torch.empty_like(mean)
        room = _Room(mean, wanted)
        by_gate = room.kept[2]
        for rows, here, at in _passes(mean, dispersion, found, tables, any(wanted)):
            means, sizes = mean[rows], _rows_of(dispersion, rows)
            closed = -gate if gate.dim() == 1 else -gate[rows]  # log odds of no extra zero
            pick = closed.index_select(0, here.gene) if gate.dim() == 1 else closed.view(-1).index_select(0, here.index)
            dense = _Pass(means, sizes, tables, room.of(rows))
            counted = torch.addcmul(closed, dense.log1p, sizes, value=-1.0)
            safe = may_look(mean) and counted.numel() > 0 and float(counted.min()) > _UNDERFLOW
            chance = None if safe else _softplus(-counted) - _softplus(-closed)
            counted.sigmoid_()
            is_open = closed.sigmoid_() if safe else closed.sigmoid()
            if chance is None:
                chance = (is_open / counted).log_()  # log(o / c)
            chance.view(-1).index_copy_(0, here.index, -_softplus(-pick))
            dense.leave_out(here, at.exact)
            if summed:
                extra = chance.sum(-1) if here.mask is None else chance @ here.mask.to(chance)
                value[rows] = dense.zeros(here, True).add_(at.sums).add_(extra)
            else:
                zero = dense.zeros(here, False)
                _put(zero, here, zero.view(-1).index_select(0, here.index).add_(at.rise))
                value[rows] = zero.add_(_mask(chance, here))
            if at.by_mean is not None and at.by_dispersion is not None:
                slope = dense.make_slopes()
                _put(dense.inverse.mul_(counted), here, at.by_mean.neg_())
                _put(slope.mul_(counted), here, at.by_dispersion.neg_())
            if by_gate is not None:
                _put(torch.sub(counted, is_open, out=by_gate[rows]), here, pick.neg_().sigmoid_())
        by_mean, by_dispersion, _ = room.kept
        ctx.save_for_backward(by_mean, by_dispersion, by_gate)
        ctx.per_gene, ctx.summed = (False, dispersion.dim() == 1, gate.dim() == 1), summed
        return value


class _LogRate(torch.autograd.Function):
    """mean (n, G), of counts whose log p(0) is -mean: `_AtPoisson` or `_AtPresence` says what holds at the others.

    The slope is -1 at zeros and is kept at the non-zero counts alone: a dense block is made where it is handed back.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, found: Nonzeros, summed: bool, kind: Any) -> Tensor:
        mu = mean.view(-1).index_select(0, found.index)
        at, whole = kind.at(found.count, mu)
        dense = mean
        if len(whole):  # log p(x) is given whole there
            dense = mean.clone()
            dense.view(-1).index_fill_(0, found.index.index_select(0, whole), 0.0)
        if summed:
            zero = dense.sum(-1) if found.mask is None else dense @ found.mask.to(dense)
            value = _row_sums(at, found).sub_(zero)
        else:
            value = -dense
            value = _put(value, found, value.view(-1).index_select(0, found.index).add_(at))
        ctx.save_for_backward(kind.slope(found.count, mu) if ctx.needs_input_grad[0] else None)
        ctx.found, ctx.summed, ctx.shape = found, summed, mean.shape
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        if slope is None:
            return None, None, None, None
        block = (grad.unsqueeze(-1) if ctx.summed else grad).expand(ctx.shape).neg()
        return _put(block, ctx.found, block.view(-1).index_select(0, ctx.found.index).mul_(-slope)), None, None, None


class _AtPoisson:
    """Poisson counts x > 0."""

    @staticmethod
    def at(x: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x) + mean, or log p(x) at positions in the second answer: terms as large as a large x cancel."""
        everywhere = torch.arange(len(x), device=x.device)
        if not may_look(mu):
            return _whole_poisson(x, mu), everywhere
        value = _AtPoisson.rise(x, mu.log())
        large = (x > _FEW).nonzero().squeeze(-1)
        if len(large):
            value.index_copy_(0, large, _whole_poisson(x.index_select(0, large), mu.index_select(0, large)))
        return value, large

    @staticmethod
    def rise(x: Tensor, log_mu: Tensor) -> Tensor:
        """log p(x) + mean."""
        if not may_look(x):
            return x * log_mu - torch.lgamma(x.double() + 1).to(x)
        few = _log_factorials(x).squeeze(-1)
        constant = few.index_select(0, x.clamp(max=_FEW).long())
        large = (x > _FEW).nonzero().squeeze(-1)
        if len(large):
            constant.index_copy_(0, large, torch.lgamma(x.index_select(0, large).double() + 1).to(x))
        return x * log_mu - constant

    @staticmethod
    def slope(x: Tensor, mu: Tensor) -> Tensor:
        """Of log p(x) in the mean."""
        return x / mu - 1


class _AtPresence:
    """Whether a Poisson count is above zero: log p(1) = log(1 - exp(-mean))."""

    @staticmethod
    def at(x: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        return _log_positive(mu), torch.arange(len(x), device=x.device)

    @staticmethod
    def rise(x: Tensor, log_mu: Tensor) -> Tensor:
        mu = log_mu.exp()
        return mu + _log_positive(mu)

    @staticmethod
    def slope(x: Tensor, mu: Tensor) -> Tensor:
        return torch.exp(-mu) / -torch.expm1(-mu)


def _log_positive(mu: Tensor) -> Tensor:
    """log(1 - exp(-mu)), exact on both sides (Maechler 2012, Accurately computing log(1 - exp(-|a|)))."""
    small = mu < 0.7
    safe = torch.where(small, mu, 0.7)  # a branch that is not taken has a gradient too
    return torch.where(small, (-torch.expm1(-safe)).log(), torch.log1p(-torch.exp(-torch.where(small, 0.7, mu))))


def _whole_poisson(x: Tensor, mean: Tensor) -> Tensor:
    """log p(x) of the Poisson, in float64: terms as large as x cancel."""
    big, rate = x.double(), mean.double()
    return (big * rate.log() - rate - torch.lgamma(big + 1)).to(mean.dtype)


_LOGS = "pyrosc_logs"  # attribute under which shares (n, G) carry their logs at the non-zero counts


def carry_logs(shares: Tensor, found: Nonzeros, logs: Tensor) -> Tensor:
    """Hand ``shares`` (n, G) their logs (m,) at non-zero counts; densities then need no dense gradient."""
    setattr(shares, _LOGS, (found, logs, shares._version))
    return shares


def carried_logs(shares: Tensor, found: Nonzeros) -> Tensor | None:
    """Logs (m,) at these very non-zero counts, if ``shares`` carry them and were not edited since."""
    known, logs, version = getattr(shares, _LOGS, (None, None, None))
    return logs if known is found and version == shares._version else None


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

    support: ClassVar[Any] = constraints.nonnegative_integer
    has_rsample = False
    _names: tuple[str, ...]  # parameters, each kept as it came (not expanded) under "_" + name

    @property
    def _beside(self) -> tuple[str, ...]:
        """Parameters beside the mean that the density takes."""
        return self._names[1:]

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
        mean = self._mean
        found = _meet(value, block, mean.dtype)
        n_genes = block[-1]
        mean = mean.expand(block).reshape(-1, n_genes).contiguous()
        rest = [_per_gene_or_full(getattr(self, "_" + name), block) for name in self._beside]
        if not torch.is_grad_enabled():  # else slopes would be made, and thrown away
            mean, *rest = (t.detach() for t in (mean, *rest))
        result: Tensor = self._apply(mean, *rest, found, summed)
        return result.reshape(shape[:-1] if summed else shape)

    def _apply(self, *args: Any) -> Tensor:
        raise NotImplementedError


def _per_gene_or_full(parameter: Tensor, shape: torch.Size) -> Tensor:
    """(G,) if the parameter has one number a gene (or one for all), else the whole block, as rows (n, G)."""
    n_genes = shape[-1]
    if parameter.numel() == 1:
        return parameter.reshape(1).expand(n_genes).contiguous()
    if parameter.numel() == n_genes == parameter.shape[-1]:
        return parameter.reshape(n_genes).contiguous()
    return parameter.expand(shape).reshape(-1, n_genes).contiguous()


def _meet(value: Tensor, shape: torch.Size, dtype: torch.dtype) -> Nonzeros:
    """Non-zero counts of ``value`` as they stand in a block of this shape."""
    if value.shape != shape and (not value.dim() or shape[len(shape) - value.dim() :] != value.shape):
        value = value.expand(shape)
    found = nonzeros(value)
    times = shape.numel() // max(value.numel(), 1)
    if times > 1:  # the same counts against several draws
        step = torch.arange(times, device=value.device).unsqueeze(-1) * value.numel()
        index = (step + found.index).reshape(-1)
        ends = (torch.arange(times, device=value.device).unsqueeze(-1) * len(found.index) + found.ends).reshape(-1)
        found = Nonzeros(index, found.gene.repeat(times), found.count.repeat(times), ends, found.mask)
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


class _OfRate(_Counts):
    """What `Poisson` and `Presence` share: a mean that may be given as a rate and an exposure."""

    arg_constraints: ClassVar[dict[str, Any]] = {"mean": constraints.nonnegative}
    _names = ("rate", "exposure")
    _kind: ClassVar[Any]

    def __init__(
        self,
        mean: Tensor | float | None = None,
        *,
        log_mean: Tensor | None = None,
        exposure: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._exposure: Tensor | None = None
        given = {"rate": _given("mean", mean, log_mean)}
        if exposure is not None:
            given["exposure"] = torch.as_tensor(exposure)
        self._set(given, validate_args)

    @property
    def _beside(self) -> tuple[str, ...]:
        return ()

    @property
    def _mean(self) -> Tensor:
        return self._rate if self._exposure is None else self._exposure * self._rate

    def _log_density(self, value: Tensor, summed: bool) -> Tensor:
        rate, exposure = self._rate, self._exposure
        if summed and exposure is not None and rate.dim() == 2 and torch.is_grad_enabled():
            found = nonzeros(value)
            logs = carried_logs(rate, found) if found.mask is None else None
            if logs is not None and rate.shape == value.shape == self.batch_shape and exposure.shape[-1:] == (1,):
                return self._by_logs(found, logs, rate, exposure.expand(len(rate), 1).squeeze(-1))
        return super()._log_density(value, summed)

    def _by_logs(self, found: Nonzeros, logs: Tensor, rate: Tensor, exposure: Tensor) -> Tensor:
        """(n,) sums over genes: no mean is made, and the gradient of the rates is the same along each row."""
        row = torch.div(found.index, rate.shape[-1], rounding_mode="floor")
        rise = self._kind.rise(found.count.to(logs), logs + exposure.log().index_select(0, row))
        sums = torch.zeros(len(rate), dtype=torch.float64, device=rate.device).index_add(0, row, rise.double())
        return (sums - (exposure * rate.sum(-1)).double()).to(rate.dtype)

    def _apply(self, *args: Any) -> Tensor:
        return _LogRate.apply(*args, self._kind)


class Poisson(_OfRate):
    """Poisson counts, with the log density taken at the non-zero counts only.

    Parameters
    ----------
    mean, log_mean : (...,), >= 0
        Expected count, or its log; give one of the two.
    exposure : (..., 1), > 0
        Multiplies the mean; 1 without it. Shares that carry their logs at the non-zero counts (`regions`) and totals
        of cells are then never multiplied out in training.

    Notes
    -----
    Precision, ranges and errors as for `NegativeBinomial`.

    >>> Poisson(torch.tensor([0.2, 0.8]), exposure=torch.tensor([10.0])).mean
    tensor([2., 8.])
    """

    _kind = _AtPoisson

    @property
    def mean(self) -> Tensor:
        """Expected count, of the batch shape."""
        return self._mean.expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """The mean again."""
        return self.mean

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts; rates are clamped at 1e8."""
        with torch.no_grad():
            return torch.poisson(self._mean.expand(self._extended_shape(torch.Size(sample_shape))).clamp(max=_MOST))

    def rest_given(self, kept: Tensor, fraction: float) -> Poisson:
        """Law of the counts that were dropped, as for `NegativeBinomial`: those kept say nothing of them."""
        return Poisson((1 - fraction) / fraction * self._mean + 0 * kept, validate_args=False)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``, without gradient."""
        x, mean = _float64(value), _float64(self._mean)
        return _tensor(np.where(x < 0, 0.0, special.pdtr(np.floor(np.maximum(x, 0)), mean)), self._mean)


class Presence(_OfRate):
    """Whether there is a count at all: 1 with probability 1 - exp(-mean), else 0.

    It is what is left of a `Poisson` of that mean when counts are cut to 0 and 1, so that the two can be compared: one
    mean, one decoder, two ways to look at the data.

    Parameters
    ----------
    mean, log_mean : (...,), >= 0
        Expected count behind it, or its log; give one of the two.
    exposure : (..., 1), > 0
        Multiplies the mean, as in `Poisson`.

    Notes
    -----
    ``.mean`` is that of the values, 1 - exp(-mean), and exact for small ones. Values are 0 and 1.

    >>> Presence(torch.tensor(1e-6)).log_prob(torch.tensor(1.0)).exp()
    tensor(1.0000e-06)
    """

    support: ClassVar[Any] = constraints.boolean
    _kind = _AtPresence

    @property
    def mean(self) -> Tensor:
        """Probability of a 1, of the batch shape."""
        return (-torch.expm1(-self._mean)).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Of a value that is 0 or 1."""
        return self.mean * torch.exp(-self._mean)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """0 or 1."""
        with torch.no_grad():
            return torch.bernoulli(self.mean.expand(self._extended_shape(torch.Size(sample_shape))))

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``, without gradient."""
        none = torch.exp(-self._mean.detach())
        return torch.where(value < 0, torch.zeros_like(none), torch.where(value < 1, none, torch.ones_like(none)))


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
