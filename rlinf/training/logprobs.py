"""Log-probability and entropy of the target tokens, vocab-parallel and chunked.

Extra memory is bounded by one chunk of rows, never [N, V]: the backward pass computes a chunk's logits again, except those of the last
chunk, which are still there. Both numbers are of softmax(logits / temperature) in fp32; the logits themselves have the precision of the
weights, so that fp32 numbers are only ever there for a block of rows.

Shape legend: N rows, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlinf.hardware import triton_lacks
from rlinf.kernels.cpu import kernels_for

CHUNK_BYTES = 1 << 27  # logits of one chunk
GPU_CHUNK_BYTES = 1 << 30  # there: each chunk adds a gradient as large as the head's weight to the sum, and each but one is computed twice
BLOCK_BYTES = 1 << 26  # fp32 numbers of some of its rows
CPU_BLOCK_BYTES = 1 << 22  # there they stay in the cache
PADDING = -1e30  # logit of a padding row: probability 0, and 0 * logit is 0, not NaN


def target_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, *, temperature: float, vocab: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(logprob_N, entropy_N) in fp32.

    weight_VH is this rank's shard; rows at or beyond `vocab` (over all ranks) are padding and excluded.
    """
    return _TargetLogprobs.apply(hidden_NH, weight_VH, targets_N, temperature, vocab, group)


def _even_chunk(n: int, most: int) -> int:
    """Rows of a chunk so that n rows are cut into as few chunks as `most` rows each allow, all of about the same size."""
    return -(-n // max(1, -(-n // most))) or 1


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, vocab: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = weight.size(0)
        local = targets - rank * rows
        mine, columns = (local >= 0) & (local < rows), local.clamp(0, rows - 1)[:, None]
        ctx.temperature, ctx.n_valid = temperature, min(max(vocab - rank * rows, 0), rows)
        most = (GPU_CHUNK_BYTES if weight.is_cuda else CHUNK_BYTES) // (weight.element_size() * rows)
        ctx.chunk = _even_chunk(len(targets), max(1, most))
        logprob, lse, entropy = (torch.empty(len(targets), dtype=torch.float32, device=hidden.device) for _ in range(3))
        room = hidden.new_empty(min(ctx.chunk, len(targets)), rows)  # one for all chunks: fresh pages cost time, two of them memory
        for a in range(0, len(targets), ctx.chunk):
            part = slice(a, a + ctx.chunk)
            logits = _logits(hidden[part], weight, room)
            top, sums = _row_sums(logits, columns[part], temperature, ctx.n_valid, group)
            sums[1].masked_fill_(~mine[part], 0.0)
            if ranks > 1:
                dist.all_reduce(sums, group=group)
            log_total = sums[0].log()
            logprob[part] = sums[1] - log_total
            lse[part] = top + log_total
            entropy[part] = log_total - sums[2] / sums[0]
        ctx.room = room
        ctx.set_materialize_grads(False)  # whether the entropy has a gradient is seen without a look at it
        ctx.save_for_backward(hidden, weight, columns, mine, lse, entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, columns, mine, lse, entropy = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        one_chunk = len(lse) <= ctx.chunk
        room, filled = ctx.room, ctx.room is not None
        ctx.room = None  # the logits in it serve once: the gradient takes their place
        if not filled:
            room = hidden.new_empty(min(ctx.chunk, len(lse)), weight.size(0))
        by_logit = torch.zeros_like(lse) if grad_logprob is None else grad_logprob / ctx.temperature
        by_entropy = None if grad_entropy is None else grad_entropy / ctx.temperature
        for a in reversed(range(0, len(lse), ctx.chunk)):  # the last one first: then its logits go
            part = slice(a, a + ctx.chunk)
            logits = room[: len(lse) - a] if filled else _logits(hidden[part], weight, room)
            filled = False
            grads = (by_logit[part], None if by_entropy is None else by_entropy[part])
            _become_gradient(logits, columns[part], mine[part], lse[part], entropy[part], *grads, ctx.temperature, ctx.n_valid)
            grad_hidden[part] = logits @ weight
            if not ctx.needs_input_grad[1]:  # a head that is not trained
                continue
            if grad_weight is None:
                product = logits.t() @ hidden[part]
                grad_weight = product if one_chunk else product.float()
            elif weight.dtype == torch.float32:
                grad_weight.addmm_(logits.t(), hidden[part])
            else:
                grad_weight.add_(logits.t() @ hidden[part])
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _logits(hidden_NH: Tensor, weight_VH: Tensor, room: Tensor) -> Tensor:
    """[N, V], in the first rows of `room`."""
    return torch.mm(hidden_NH, weight_VH.t(), out=room[: len(hidden_NH)])


def _fused(device: torch.device) -> ModuleType | None:
    """Our kernels for a GPU."""
    return _triton_kernels() if device.type == "cuda" else None


@cache
def _triton_kernels() -> ModuleType | None:
    """Triton comes with torch for CUDA; what it needs besides may be missing."""
    if importlib.util.find_spec("triton") is None or triton_lacks() is not None:
        return None
    return importlib.import_module("rlinf.kernels.head_triton")


def _row_sums(logits_NV: Tensor, columns_N1: Tensor, temperature: float, valid: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Of z = logit / temperature in fp32: the largest of all ranks [N]; relative to it, of this rank alone, what _sums() says [3, N]."""
    several = dist.get_world_size(group) > 1
    if (fused := _fused(logits_NV.device)) is not None:
        own, sums = fused.head_sums(logits_NV, columns_N1, temperature, valid)
        top = own
        if several:
            dist.all_reduce(top := own.clone(), dist.ReduceOp.MAX, group=group)
            below = own - top
            sums[2] = (sums[2] + below * sums[0]).mul_(below.exp())
            sums[0] *= below.exp()
            sums[1] += below
        return top, sums
    top = _top(logits_NV, valid)
    if several:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    return top / temperature, _sums(logits_NV, top, columns_N1, temperature, valid)


def _top(logits_NV: Tensor, valid: int) -> Tensor:
    """Largest logit of each row [N] in fp32."""
    if not valid:
        return logits_NV.new_full((len(logits_NV),), PADDING, dtype=torch.float32)
    compiled = kernels_for(logits_NV.dtype, logits_NV.device)
    return logits_NV[:, :valid].amax(1).float() if compiled is None else compiled.head_top(logits_NV, valid)


def _sums(logits_NV: Tensor, top_N: Tensor, columns_N1: Tensor, temperature: float, valid: int) -> Tensor:
    """[3, N] fp32 of z = (logit - top) / temperature: sum of e^z, z of the column, sum of z e^z."""
    if (compiled := kernels_for(logits_NV.dtype, logits_NV.device)) is not None:
        return compiled.head_sums(logits_NV, columns_N1, top_N, temperature, valid)
    sums = torch.empty(3, len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    for block in _blocks(logits_NV):
        below = _scaled(logits_NV[block] - top_N[block, None], temperature, valid)
        weights = below.exp()
        sums[0, block] = weights.sum(1)
        sums[1, block] = below.gather(1, columns_N1[block])[:, 0]
        sums[2, block] = below.mul_(weights).sum(1)
    return sums


def _become_gradient(
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
    """The gradient takes the logits' place. by_logit, by_entropy: of the loss by log-probability and entropy, over the temperature."""
    compiled = _fused(logits_NV.device) or kernels_for(logits_NV.dtype, logits_NV.device)
    if compiled is not None:
        compiled.head_back(logits_NV, columns_N1, mine_N, lse_N, entropy_N, by_logit_N, by_entropy_N, temperature, valid)
        return
    for rows in _blocks(logits_NV):
        below = _scaled(logits_NV[rows].float(), temperature, valid).sub_(lse_N[rows, None])
        if by_entropy_N is not None:  # dH/dz = -p (z - E[z]), and E[z] = lse - H
            grad = below.exp()
            grad *= below.add_(entropy_N[rows, None]).mul_(-by_entropy_N[rows, None]).sub_(by_logit_N[rows, None])
        else:
            grad = below.exp_().mul_(-by_logit_N[rows, None])
        grad.scatter_add_(1, columns_N1[rows], torch.where(mine_N[rows], by_logit_N[rows], 0.0)[:, None])
        logits_NV[rows] = grad


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    rows = max(1, (CPU_BLOCK_BYTES if logits_NV.device.type == "cpu" else BLOCK_BYTES) // (4 * logits_NV.size(1)))
    return (slice(a, min(a + rows, len(logits_NV))) for a in range(0, len(logits_NV), rows))


def _scaled(logits_NV: Tensor, temperature: float, n_valid: int) -> Tensor:
    """In place."""
    if temperature != 1.0:
        logits_NV /= temperature
    if n_valid < logits_NV.size(1):
        logits_NV[:, n_valid:] = PADDING
    return logits_NV
