"""A mixture of experts over packed tokens, the same in training and in the embedded engine: which experts a token goes to, and what the
experts that are here make of it. Nothing is dropped, and no expert has a capacity: a token's result depends on no other token.

Legend: T tokens, K experts of a token, E experts, H hidden, F units of an expert, R rows: (token, expert) pairs of the experts here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlinf.kernels.rowwise import swiglu

Grouped = Callable[[Tensor, Tensor], Tensor]  # (rows [R, in] in the order of the experts, where those of each end [E]) -> [R, out]

ALIGNMENT = 16  # bytes: where rows have to begin for torch's grouped product


def router_logits(x_TH: Tensor, router_EH: Tensor) -> Tensor:
    """fp32 [T, E]: rounded to 16 bits, experts would be equal that are not, and chance would choose between them."""
    return F.linear(x_TH.float(), router_EH.float())


def route(logits_TE: Tensor, top_k: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """(weights [T, K], experts [T, K]) by the softmax over all experts; normalized: a token's weights are made to add up to 1."""
    weights_TK, experts_TK = logits_TE.softmax(-1).topk(top_k, -1)
    return (weights_TK / weights_TK.sum(-1, keepdim=True) if normalized else weights_TK), experts_TK


def mixture(x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up: Grouped, down: Grouped, here: range, everywhere: int) -> Tensor:
    """[T, H]: the weighted sum of what the experts `here` make of their tokens, of as many as there are `everywhere`; zero for a token that
    goes to none of them."""
    sorted_A, order_R = experts_TK.flatten().sort(stable=True)  # assignments: K of a token, one after another
    ends_E = torch.searchsorted(sorted_A, torch.arange(everywhere, device=sorted_A.device), right=True)
    if len(here) < everywhere:
        begin, end = (int(ends_E[e - 1]) if e else 0 for e in (here.start, here.stop))
        order_R, ends_E = order_R[begin:end], ends_E[here.start : here.stop] - begin
    top_k = experts_TK.shape[1]
    units_RF = swiglu(gate_up(_Spread.apply(x_TH, order_R, top_k), ends_E))
    units_RF = units_RF * weights_TK.flatten()[order_R, None].to(units_RF.dtype)
    return _Collect.apply(down(units_RF, ends_E), order_R, top_k, len(x_TH))


def products(weight_EOI: Tensor) -> Grouped:
    """Each row times the matrix of its expert: torch's grouped product in bf16, for which torch promises it on GPUs."""
    if weight_EOI.dtype == torch.bfloat16 and not any(n * weight_EOI.element_size() % ALIGNMENT for n in weight_EOI.shape[1:]):
        return grouped_mm(weight_EOI)
    return one_by_one([partial(F.linear, weight=weight_OI) for weight_OI in weight_EOI.unbind()])


def grouped_mm(weight_EOI: Tensor) -> Grouped:
    return lambda rows, ends_E: _GroupedMM.apply(rows, weight_EOI, ends_E.to(torch.int32))


def one_by_one(linears: Sequence[Callable[[Tensor], Tensor]]) -> Grouped:
    """The product of each expert by itself, which the host has to ask for."""

    def of_each(rows: Tensor, ends_E: Tensor) -> Tensor:
        counts = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
        return torch.cat([linear(part) for linear, part in zip(linears, rows.split(counts))])

    return of_each


class _GroupedMM(torch.autograd.Function):
    """torch's grouped product, but with a gradient of zero for an expert without rows: on some GPUs torch leaves there what was in memory
    before (pytorch/pytorch issue 172439)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight_EOI, ends_E)
        return F.grouped_mm(rows, weight_EOI.transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight_EOI, ends_E = ctx.saved_tensors
        grad = grad.contiguous()
        to_rows = F.grouped_mm(grad, weight_EOI, offs=ends_E) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_rows, None, None
        without_rows_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
        to_weight = F.grouped_mm(grad.t(), rows, offs=ends_E).masked_fill_(without_rows_E[:, None, None], 0)
        return to_rows, to_weight, None


class _Spread(torch.autograd.Function):
    """Rows of tokens in the order of their experts. The transpose of _Collect, so that each is the other's backward pass; no sum depends
    on the order in which threads get there."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order_R: Tensor, top_k: int) -> Tensor:
        ctx.order_R, ctx.top_k, ctx.n_tokens = order_R, top_k, len(x_TH)
        return _spread(x_TH, order_R, top_k)

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor | None, ...]:
        return _collect(grad_RH, ctx.order_R, ctx.top_k, ctx.n_tokens), None, None


class _Collect(torch.autograd.Function):
    """For each token the sum of its rows."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, order_R: Tensor, top_k: int, n_tokens: int) -> Tensor:
        ctx.order_R, ctx.top_k = order_R, top_k
        return _collect(rows_RH, order_R, top_k, n_tokens)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grad_TH, ctx.order_R, ctx.top_k), None, None, None


def _spread(x_TH: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    return x_TH.index_select(0, order_R // top_k)


def _collect(rows_RH: Tensor, order_R: Tensor, top_k: int, n_tokens: int) -> Tensor:
    placed = rows_RH.new_zeros(n_tokens * top_k, rows_RH.shape[1])
    return placed.index_copy_(0, order_R, rows_RH).view(n_tokens, top_k, -1).sum(1)
