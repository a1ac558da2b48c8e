"""Attention over a packed micro-batch: the one core attention of the local layer spec, on CPU and on CUDA.

Rotary embedding is applied here, from the batch's positions, because the samples of a shared prompt all go on from the same position.
A response of a shared group attends to the prompt and to itself: softmax over the concatenation, exactly as if it were alone.

Shape legend: T packed rows, H query heads, K key heads, D head dimension, R responses of a group, L longest response, P prompt rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from rlinf.training.layout import PackedBatch, Segment


EXPLICIT_SCORES = 1 << 20  # up to this many scores, plain matrix products beat CPU's flash attention (4x in the backward pass)


class PackedAttention(MegatronModule):
    """Megatron's core_attention contract: (query [T,H,D], key [T,K,D], value [T,K,D]) -> [T, H*D], with packed_seq_params a PackedBatch."""

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1 or config.attention_dropout != 0.0:
            raise ValueError("PackedAttention has neither context parallelism nor dropout")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: PackedBatch, **_: Any) -> Tensor:
        cos, sin = packed_seq_params.rope
        segments = packed_seq_params.segments
        # a prompt whose responses share it is one piece and the responses another; split() costs one concatenation in the backward pass
        sizes = [n for s in segments for n in ((s.prompt, s.own) if s.slots is not None else (s.prompt + s.own,))]
        pieces = zip(*(t.split(sizes) for t in (_rotate(query, cos, sin), _rotate(key, cos, sin), value)))
        outputs = []
        common: tuple[Tensor, Tensor] | None = None  # keys and values of the start that all prompts share
        for segment in segments:
            q, k, v = next(pieces)
            if common is not None:
                k, v = torch.cat([common[0], k]), torch.cat([common[1], v])
            elif packed_seq_params.common:
                common = k, v
            outputs.append(self._attend(q[None], k[None], v[None])[0])
            if segment.slots is not None:
                outputs.append(self._responses(*next(pieces), k, v, segment))
        out_THD = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return out_THD.reshape(out_THD.size(0), -1)

    def _responses(self, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, segment: Segment) -> Tensor:
        """All responses of a prompt at once: padded to the longest, each behind the prompt's keys and values."""
        n, longest = len(segment.responses), segment.longest
        if longest == 0:
            return q

        def grid(rows: Tensor) -> Tensor:  # [rows, heads, D] -> [R, L, heads, D]
            full = rows if len(rows) == n * longest else rows.new_zeros(n * longest, *rows.shape[1:]).index_copy(0, segment.slots, rows)
            return full.view(n, longest, *rows.shape[1:])

        k, v = (torch.cat([head.expand(n, -1, -1, -1), grid(own)], 1) for head, own in ((prompt_k, k), (prompt_v, v)))  # [R, P + L, K, D]
        out = self._attend(grid(q), k, v).reshape(n * longest, *q.shape[1:])
        return out if len(out) == segment.own else out.index_select(0, segment.slots)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention, queries aligned to the end of the keys: q [B,L,H,D], k and v [B,S,K,D] -> [B,L,H,D]."""
        (b, length, heads, dim), (size, groups) = q.shape, k.shape[1:3]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if b * heads * length * size <= EXPLICIT_SCORES and q.device.type == "cpu":
            q = q.reshape(b * groups, heads // groups * length, dim)  # the query heads of a group share its keys: one matrix product
            k, v = (t.reshape(b * groups, size, dim) for t in (k, v))
            scores = torch.bmm(q, k.transpose(1, 2)).view(b, groups, heads // groups, length, size).float() * self.scale
            if length > 1:
                scores = scores + torch.full((length, size), float("-inf"), device=q.device).triu(size - length + 1)
            weights = scores.softmax(-1).to(q.dtype).view(b * groups, -1, size)
            return torch.bmm(weights, v).view(b, heads, length, dim).transpose(1, 2)
        if heads > groups:  # on CPU faster in training than enable_gqa
            k, v = k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1)
        if length == size:
            mask = None
        elif q.is_cuda:
            mask = causal_lower_right(length, size)  # a name for flash attention, not a matrix of length x size
        else:
            mask = torch.ones(length, size, dtype=torch.bool).tril(size - length)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale).transpose(1, 2)


def _rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_THD.chunk(2, -1)
    return x_THD * cos + torch.cat([-b, a], -1) * sin


def rope_tables(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, D] of the rotate-half convention (Hugging Face's), computed in fp32."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions_T.device).float() / head_dim)
    angles = torch.outer(positions_T.float(), inverse)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)
