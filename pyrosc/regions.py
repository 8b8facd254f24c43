"""Regions: a decoder for hundreds of thousands of columns, which holds one dense block of a mini-batch.

With 200,000 regions a mini-batch of 128 cells is 0.1 GB, and the usual way to a likelihood holds several such blocks at
a time: logits, shares, means, and gradients of each. Here shares are made in the place of logits, and carry their logs
at the non-zero counts. A density of counts whose log p(0) is minus the mean needs no more than these and the sum of the
shares, so that the gradient of the shares is one number a row, and that of the logits

    d/dlogit[n, g] = d[n, g] - rho[n, g] * sum_h d[n, h],    d = x (dlog p / dlog mean) at non-zero counts, 0 elsewhere

is made a few regions at a time and goes into those of weights and hidden layer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .cells import Cells
from .counts import Nonzeros, carried, may_look
from .distributions import carry_logs
from .networks import Decoder
from .schema import Schema

_PASS = 2**20  # entries of a block that are worked on at a time


class _Shares(torch.autograd.Function):
    """softmax(hidden W' + bias), (n, G), and its logs (m,) at non-zero counts."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, found: Nonzeros) -> tuple[Tensor, Tensor]:
        n_genes = len(weight)
        shares = torch.addmm(bias, hidden, weight.t())
        size = max(1, _PASS // n_genes) if may_look(shares) else len(shares)
        totals = []
        for rows in shares.split(size):  # in place: rows are views
            rows.sub_(rows.max(-1, keepdim=True).values)
        row = torch.div(found.index, n_genes, rounding_mode="floor")
        at = shares.view(-1).index_select(0, found.index)
        for rows in shares.split(size):
            total = rows.exp_().sum(-1, keepdim=True)
            rows.div_(total)
            totals.append(total)
        logs = at.sub_(torch.cat(totals).squeeze(-1).log().index_select(0, row))
        ctx.save_for_backward(hidden, weight, shares)
        ctx.found, ctx.row = found, row
        ctx.set_materialize_grads(False)
        return shares, logs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_shares: Tensor | None, by_logs: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, shares = ctx.saved_tensors
        n, n_genes = shares.shape
        if by_shares is not None and n_genes > 1 and by_shares.stride(-1) == 0:
            by_shares = None  # one number a row: shares sum to 1, so nothing moves
        if by_shares is None and by_logs is None:
            return None, None, None, None
        size = max(1, _PASS // max(n, 1)) if may_look(shares) else n_genes  # a GPU would wait for what is in a piece
        pieces = range(0, n_genes, size)
        pull = shares.new_zeros(n)  # sum_h d[n, h]
        if by_logs is not None:
            pull.index_add_(0, ctx.row, by_logs)
        if by_shares is not None:
            for a in pieces:
                pull += (shares[:, a : a + size] * by_shares[:, a : a + size]).sum(-1)
        by_hidden, by_weight = torch.zeros_like(hidden), torch.empty_like(weight)
        by_bias = weight.new_empty(n_genes)
        for a in pieces:
            here = shares[:, a : a + size]
            width = here.shape[1]
            block = here * -pull.unsqueeze(-1)
            if by_shares is not None:
                block.addcmul_(here, by_shares[:, a : a + size])
            if by_logs is not None and width == n_genes:
                block.view(-1).index_add_(0, ctx.found.index, by_logs)
            elif by_logs is not None:
                some = ((ctx.found.gene >= a) & (ctx.found.gene < a + width)).nonzero().squeeze(-1)
                place = ctx.row.index_select(0, some).mul_(width).add_(ctx.found.gene.index_select(0, some)).sub_(a)
                block.view(-1).index_add_(0, place, by_logs.index_select(0, some))
            by_hidden.addmm_(block, weight[a : a + width])
            torch.mm(block.t(), hidden, out=by_weight[a : a + width])
            torch.sum(block, 0, out=by_bias[a : a + width])
        return by_hidden, by_weight, by_bias, None


class RegionDecoder(Decoder):
    """z and covariates to expected shares of regions: softmax(W h(z, c) + factors).

    Parameters
    ----------
    n_latent, n_hidden, n_layers, dropout, covariates, norm, embedding : as in `networks.Decoder`

    Attributes
    ----------
    factors : (G,) parameter
        Log of what a region has in all cells, up to a constant; starts at the log of the average profile.
    profile : (G,) buffer, sums to 1
        Share of all fragments of the training cells that fell on each region (a tenth of a fragment added), set before
        the first fit. What accessibility without region factors is relative to; see `Fit.accessibility`.

    Notes
    -----
    In training shares are made in the place of logits, and with `PoissonLikelihood` or `BernoulliLikelihood`, given
    shares and exposure, nothing else of their size is made, forward or backward. So a step holds three dense blocks of
    the mini-batch in all: counts, their logs (for the encoder), shares. Other likelihoods get the same shares and
    make blocks of their own.
    """

    profile: Tensor

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        super().build(schema, sizes, parts)
        self.register_buffer("profile", torch.full((schema.n_genes,), 1.0 / schema.n_genes))

    @property
    def factors(self) -> Tensor:
        return self.out.bias

    def start(self, cells: Cells) -> None:
        super().start(cells)
        sums = cells.gene_sums().counts + 0.1
        self.profile.copy_(sums / sums.sum())

    def forward(self, z: Tensor, cells: Cells, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = cells.x if torch.is_grad_enabled() and cells.has_counts and z.dim() == 2 else None
        found = None if x is None else carried(x)
        if found is None or found.mask is not None or x is None or x.shape[0] != z.shape[0]:
            return super().forward(z, cells, offset)
        if not self.is_share or offset is not None:
            return super().forward(z, cells, offset)
        hidden = self.layers(z, self.covariates(cells) if self.covariates else None)
        shares, logs = _Shares.apply(hidden, self.out.weight, self.out.bias, found)
        return carry_logs(shares, found, logs), hidden
