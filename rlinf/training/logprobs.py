"""Log-probability and entropy of the target tokens, vocab-parallel and chunked.

Extra memory is bounded by one chunk of rows, never [N, V]: the backward pass computes a chunk's logits again, except those of the last
chunk, which are still there. Both numbers are of softmax(logits / temperature) in fp32.

Shape legend: N rows, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 1 << 27  # fp32 logits of one chunk
PADDING = -1e30  # logit of a padding row: probability 0, and 0 * logit is 0, not NaN


def target_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, *, temperature: float, vocab: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(logprob_N, entropy_N) in fp32.

    weight_VH is this rank's shard; rows at or beyond `vocab` (over all ranks) are padding and excluded.
    """
    return _TargetLogprobs.apply(hidden_NH, weight_VH, targets_N, temperature, vocab, group)


def _chunk_logits(hidden: Tensor, weight: Tensor, temperature: float, n_valid: int) -> Tensor:
    logits = (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits /= temperature
    if n_valid < logits.size(1):
        logits[:, n_valid:] = PADDING
    return logits


def _even_chunk(n: int, most: int) -> int:
    """Rows of a chunk so that n rows are cut into as few chunks as `most` rows each allow, all of about the same size."""
    return -(-n // max(1, -(-n // most))) or 1


def _row_dot(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    return torch.bmm(a_NV[:, None], b_NV[:, :, None])[:, 0, 0]  # no [N, V] product in memory


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, vocab: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = weight.size(0)
        local = targets - rank * rows
        mine = (local >= 0) & (local < rows)
        ctx.temperature, ctx.n_valid = temperature, min(max(vocab - rank * rows, 0), rows)
        ctx.chunk, ctx.kept = _even_chunk(len(targets), max(1, CHUNK_BYTES // (4 * rows))), None
        logprob, lse, mean = (torch.empty(len(targets), dtype=torch.float32, device=hidden.device) for _ in range(3))
        for a in range(0, len(targets), ctx.chunk):
            part = slice(a, a + ctx.chunk)
            logits = _chunk_logits(hidden[part], weight, temperature, ctx.n_valid)
            top = logits.amax(1)
            if ranks > 1:
                dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            logits -= top[:, None]
            chosen = logits.gather(1, local[part].clamp(0, rows - 1)[:, None])[:, 0]
            weights = logits.exp()
            sums = torch.stack([weights.sum(1), torch.where(mine[part], chosen, 0.0), _row_dot(weights, logits)])
            if ranks > 1:
                dist.all_reduce(sums, group=group)
            log_total = sums[0].log()
            logprob[part] = sums[1] - log_total
            lse[part] = top + log_total
            mean[part] = top + sums[2] / sums[0]
        if len(targets):
            ctx.kept = logits, top
        ctx.save_for_backward(hidden, weight, local, mine, lse, mean)
        return logprob, lse - mean

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, mine, lse, mean = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        n_chunks = -(-len(lse) // ctx.chunk)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if n_chunks != 1 else None
        with_entropy = bool(grad_entropy.any())
        for a in reversed(range(0, len(lse), ctx.chunk)):  # the last one first: then its logits go
            part = slice(a, a + ctx.chunk)
            lse_part, mean_part = lse[part, None], mean[part, None]
            if ctx.kept is not None:
                (logits, top), ctx.kept = ctx.kept, None  # logits - top; changed in place below, so they serve once
                lse_part, mean_part = lse_part - top[:, None], mean_part - top[:, None]
            else:
                logits = _chunk_logits(hidden[part], weight, ctx.temperature, ctx.n_valid)
            scale = grad_logprob[part, None] / ctx.temperature
            if with_entropy:  # dH/dz = -p (z - E[z])
                grad = (logits - lse_part).exp_()
                grad *= -scale - (logits - mean_part) * (grad_entropy[part, None] / ctx.temperature)
            else:
                grad = logits.sub_(lse_part).exp_().mul_(-scale)
            grad.scatter_add_(1, local[part].clamp(0, weight.size(0) - 1)[:, None], torch.where(mine[part, None], scale, 0.0))
            grad = grad.to(weight.dtype)
            grad_hidden[part] = grad @ weight
            product = grad.t() @ hidden[part]
            grad_weight = product if grad_weight is None else grad_weight.add_(product)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None
