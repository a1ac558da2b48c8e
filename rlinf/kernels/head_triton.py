"""The head's passes over the logits on a GPU, in Triton: one reading pass for the sums, one in place for the gradient. Torch's operations,
which are the same formulas (training.logprobs), pass over fp32 copies of them about ten times.

Shape legend: N rows, V vocabulary rows of this rank. A program has one row, or a block of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8  # columns at a time, and by how many warps


@triton.jit(do_not_specialize=["n_rows"])
def _sums_kernel(logits, columns, top, sums, n_rows, n_columns, valid, by_temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * n_columns
    most, total, weighted = -1e30, 0.0, 0.0  # of the columns so far: largest z, sum of e^(z - most), sum of (z - most) e^(z - most)
    for first in range(0, valid, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < valid
        z = tl.load(start + column, mask=inside, other=0.0).to(tl.float32) * by_temperature
        now = tl.maximum(most, tl.max(tl.where(inside, z, -1e30), 0))
        below = tl.where(inside, z - now, 0.0)
        weight = tl.where(inside, tl.exp(below), 0.0)
        shift = most - now
        scale = tl.exp(shift)
        weighted = scale * (weighted + shift * total) + tl.sum(weight * below, 0)
        total = scale * total + tl.sum(weight, 0)
        most = now
    target = tl.load(start + tl.load(columns + row)).to(tl.float32) * by_temperature
    tl.store(top + row, most)
    tl.store(sums + row, total)
    tl.store(sums + n_rows + row, target - most)
    tl.store(sums + 2 * n_rows + row, weighted)


@triton.jit
def _gradient_kernel(
    logits,
    columns,
    mine,
    lse,
    entropy,
    by_logit,
    by_entropy,
    n_columns,
    valid,
    by_temperature,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row.to(tl.int64) * n_columns + column
    inside = column < n_columns
    below = tl.load(place, mask=inside, other=0.0).to(tl.float32) * by_temperature - tl.load(lse + row)
    by_row = tl.load(by_logit + row)
    share = tl.exp(tl.where(column < valid, below, 0.0))
    if HAS_ENTROPY:  # dH/dz = -p (z - E[z]), and E[z] = lse - H
        gradient = -share * ((below + tl.load(entropy + row)) * tl.load(by_entropy + row) + by_row)
    else:
        gradient = -share * by_row
    gradient = tl.where(column < valid, gradient, 0.0)
    gradient += tl.where((column == tl.load(columns + row)) & (tl.load(mine + row) != 0), by_row, 0.0)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)


def head_sums(logits_NV: Tensor, columns_N1: Tensor, temperature: float, valid: int) -> tuple[Tensor, Tensor]:
    """Of z = logit / temperature of the first `valid` columns, in fp32: the largest [N]; relative to it [3, N] the sum of e^z, z of the
    row's column, the sum of z e^z. Of no columns: -1e30 and zeros, but for the second."""
    rows, width = logits_NV.shape
    top, sums = (torch.empty(*shape, dtype=torch.float32, device=logits_NV.device) for shape in ((rows,), (3, rows)))
    _sums_kernel[(rows,)](logits_NV, columns_N1, top, sums, rows, width, valid, 1.0 / temperature, BLOCK, num_warps=WARPS)
    return top, sums


def head_back(
    logits_NV: Tensor,
    columns_N1: Tensor,
    mine_N: Tensor,
    lse_N: Tensor,
    entropy_N: Tensor,
    by_logit_N: Tensor,
    by_entropy_N: Tensor | None,
    temperature: float,
    valid: int,
) -> None:
    """The gradient takes the logits' place; see training.logprobs."""
    rows, width = logits_NV.shape
    _gradient_kernel[(rows, triton.cdiv(width, BLOCK))](
        logits_NV, columns_N1, mine_N, lse_N, entropy_N, by_logit_N, by_logit_N if by_entropy_N is None else by_entropy_N, width, valid,
        1.0 / temperature, by_entropy_N is not None, BLOCK, num_warps=WARPS,
    )  # fmt: skip
