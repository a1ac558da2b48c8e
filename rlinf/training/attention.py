"""Attention over a packed micro-batch: the one core attention of every layer spec, on CPU and on CUDA.

Rotary embedding is applied here, from the batch's positions, because the samples of a shared prompt all go on from the same position.
A response of a shared group attends to the prompt and to itself: softmax over the concatenation, exactly as if it were alone.

Shape legend: T packed rows, H query heads, K key heads, D head dimension, R responses of a group, L longest response, P prompt rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from rlinf.kernels.cpu import kernels_for
from rlinf.kernels.rowwise import rotate
from rlinf.training.context import Piece, gather_rows
from rlinf.training.packed_batch import PackedBatch

# Up to this many scores, attention on CPU keeps their weights for the backward pass, and takes half of flash attention's time.
CPU_SCORES = 1 << 22
CPU_BLOCK = 1 << 19  # scores at a time: they stay in the cache


class PackedAttention(MegatronModule):
    """Megatron's core_attention contract: (query [T,H,D], key [T,K,D], value [T,K,D]) -> [T, H*D], with packed_seq_params a PackedBatch.

    Under context parallelism T are the rows of this rank, and keys and values of the other ranks' rows are fetched here.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        if config.attention_dropout != 0.0:
            raise ValueError("PackedAttention has no dropout")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: PackedBatch, **_: Any
    ) -> Tensor:
        cos, sin = packed_seq_params.rope
        share = packed_seq_params.share
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if self.config.context_parallel_size > 1:
            both = gather_rows(torch.cat([key, value], 1), mpu.get_context_parallel_group())
            key, value = both.split(key.size(1), 1)
        # split() costs one concatenation in the backward pass, whatever the number of parts
        atoms = list(zip(key.split(share.atoms), value.split(share.atoms)))
        joined: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

        def keys_of(names: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            if names not in joined:
                keys, values = zip(*(atoms[i] for i in names))
                joined[names] = (torch.cat(keys), torch.cat(values)) if len(names) > 1 else atoms[names[0]]
            return joined[names]

        outputs = []
        for q, piece in zip(query.split([p.rows for p in share.pieces]), share.pieces):
            if piece.responses:
                outputs.append(self._responses(q, *keys_of(piece.own), *keys_of(piece.prefix), piece))
            else:
                k, v = keys_of(piece.prefix + piece.own)
                outputs.append(self._attend(q[None], k[None], v[None]).squeeze(0))
        out_THD = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return out_THD.reshape(out_THD.size(0), -1)

    def _responses(self, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, piece: Piece) -> Tensor:
        """All responses of a prompt at once: padded to the longest, each behind the prompt's keys and values."""
        n, longest = len(piece.responses), piece.longest

        def grid(rows: Tensor) -> Tensor:  # [rows, heads, D] -> [R, L, heads, D]
            full = rows if piece.slots is None else rows.new_zeros(n * longest, *rows.shape[1:]).index_copy(0, piece.slots, rows)
            return full.view(n, longest, *rows.shape[1:])

        k, v = (torch.cat([head.expand(n, -1, -1, -1), grid(own)], 1) for head, own in ((prompt_k, k), (prompt_v, v)))  # [R, P + L, K, D]
        out = self._attend(grid(q), k, v).reshape(n * longest, *q.shape[1:])
        return out if piece.slots is None else out.index_select(0, piece.slots)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention, queries aligned to the end of the keys: q [B,L,H,D], k and v [B,S,K,D] -> [B,L,H,D]."""
        (b, length, heads, _), (size, groups) = q.shape, k.shape[1:3]
        if q.device.type == "cpu" and b * heads * length * size <= CPU_SCORES:
            return _CpuAttention.apply(q, k, v, self.scale)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = heads > groups and _takes_groups(q, k, v)
        if heads > groups and not grouped:
            k, v = k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1)
        if length == size:
            mask = None
        elif q.is_cuda:
            mask = _to_the_end(length, size)
        else:
            mask = torch.ones(length, size, dtype=torch.bool).tril(size - length)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped)
        return out.transpose(1, 2)


def _takes_groups(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether keys and values of fewer heads can stay as they are: flash attention on a GPU reads them so. What torch takes in fp32 and on
    older GPUs does not, and on CPU repeated heads are faster in training."""
    return q.is_cuda and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, q.size(2) == k.size(2), True))


def _to_the_end(length: int, size: int) -> Tensor:
    """Torch's name for causal attention aligned to the end of the keys, by which flash attention knows it; not a matrix.

    Torch's own causal_lower_right() reserves 2 x length x size numbers of host memory with it, which nothing reads.
    """
    from torch.nn.attention.bias import CausalBias, CausalVariant  # brings torch._dynamo along, a second that CPU ranks do not need

    mask = CausalBias.__new__(CausalBias)
    mask.__init__(CausalVariant.LOWER_RIGHT, length, size)  # type: ignore[misc]  # torch's constructor is in __new__, which reserves it
    return mask


class _CpuAttention(torch.autograd.Function):
    """Causal attention, queries aligned to the end of the keys: query [B,L,H,D], key and value [B,S,K,D] -> [B,L,H,D].

    Plain matrix products, for one or more (sample, key head) at a time; the query heads of a group share its keys, so that they are one
    product. Scores and softmax are in fp32, weights are rounded to the precision of the values.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (b, length, heads, _), (size, groups) = query.shape, key.shape[1:3]
        q, k, v = _by_group(query, groups), _by_group(key, groups), _by_group(value, groups)
        weights, out = q.new_empty(*q.shape[:2], size), torch.empty_like(q)
        at_once = max(1, CPU_BLOCK // (heads // groups * length * size))
        ctx.parts = [slice(a, a + at_once) for a in range(0, len(q), at_once)]
        for part in ctx.parts:
            torch.bmm(q[part], k[part].transpose(1, 2), out=weights[part])
            _softmax(weights[part], length, scale)
            torch.bmm(weights[part], v[part], out=out[part])
        ctx.save_for_backward(q, k, v, weights)
        ctx.batch, ctx.scale = b, scale
        return _by_token(out, b, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        length, groups = grad.size(1), len(q) // ctx.batch
        grad = _by_group(grad, groups)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in ctx.parts:
            by_score = torch.bmm(grad[part], v[part].transpose(1, 2))
            _softmax_back(weights[part], by_score, length, ctx.scale)
            torch.bmm(by_score, k[part], out=grad_q[part])
            torch.bmm(by_score.transpose(1, 2), q[part], out=grad_k[part])
            torch.bmm(weights[part].transpose(1, 2), grad[part], out=grad_v[part])
        return _by_token(grad_q, ctx.batch, length), _by_token(grad_k, ctx.batch, k.size(1)), _by_token(grad_v, ctx.batch, k.size(1)), None


def _softmax(scores_NLS: Tensor, length: int, scale: float) -> None:
    """Scores become weights. Rows are those of one or more heads, `length` queries each."""
    if (compiled := kernels_for(scores_NLS.dtype, scores_NLS.device)) is not None:
        compiled.softmax(scores_NLS, length, scale)
        return
    size = scores_NLS.size(2)
    hidden = torch.full((length, size), float("-inf")).triu(size - length + 1).repeat(scores_NLS.size(1) // length, 1)
    scores_NLS.copy_(scores_NLS.float().mul_(scale).add_(hidden).softmax(-1))


def _softmax_back(weights_NLS: Tensor, grad_NLS: Tensor, length: int, scale: float) -> None:
    """The gradient of the weights becomes that of the scores."""
    if (compiled := kernels_for(grad_NLS.dtype, grad_NLS.device)) is not None:
        compiled.softmax_back(weights_NLS, grad_NLS, length, scale)
        return
    weights, grad = weights_NLS.float(), grad_NLS.float()
    grad_NLS.copy_(grad.sub_((weights * grad).sum(-1, keepdim=True)).mul_(weights).mul_(scale))


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[B, L, heads, D] -> [B * groups, heads / groups * L, D], contiguous."""
    b, length, heads, dim = x.shape
    return x.reshape(b, length, groups, -1, dim).permute(0, 2, 3, 1, 4).reshape(b * groups, heads // groups * length, dim).contiguous()


def _by_token(x: Tensor, b: int, length: int) -> Tensor:
    """What _by_group() came from."""
    groups, dim = len(x) // b, x.size(2)
    return x.view(b, groups, -1, length, dim).permute(0, 3, 1, 2, 4).reshape(b, length, -1, dim)


def rope_tables(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of the rotate-half convention (Hugging Face's), computed in fp32."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions_T.device).float() / head_dim)
    angles = torch.outer(positions_T.float(), inverse)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
