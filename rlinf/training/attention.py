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

from rlinf.training.layout import PackedBatch, Segment


class PackedAttention(MegatronModule):
    """Megatron's core_attention contract: (query [T,H,D], key [T,K,D], value [T,K,D]) -> [T, H*D], with packed_seq_params a PackedBatch."""

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1 or config.attention_dropout != 0.0:
            raise ValueError("PackedAttention has neither context parallelism nor dropout")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: PackedBatch, **_: Any) -> Tensor:
        cos, sin = packed_seq_params.rope
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        parts = []
        for segment in packed_seq_params.segments:
            if len(segment.responses) > 1:
                parts += self._shared(query, key, value, segment)
            else:
                rows = slice(segment.start, segment.end)
                parts.append(self._causal(query[rows], key[rows], value[rows]))
        out_THD = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out_THD.reshape(out_THD.size(0), -1)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return self._sdpa(q, k, v, None)[0].transpose(0, 1)

    def _shared(self, query: Tensor, key: Tensor, value: Tensor, segment: Segment) -> list[Tensor]:
        """Prompt rows, then all responses at once: padded to the longest, each behind its own view of the prompt's keys and values."""
        first = segment.start + segment.prompt
        prompt = slice(segment.start, first)
        longest, n = max(segment.responses), len(segment.responses)
        outputs = [self._causal(query[prompt], key[prompt], value[prompt])]
        if longest == 0:
            return outputs
        q, k, v = (_pad(t[first : segment.end], segment.responses, longest) for t in (query, key, value))  # [R, L, heads, D]
        k, v = (torch.cat([t[prompt].expand(n, -1, -1, -1), own], 1) for t, own in ((key, k), (value, v)))  # [R, P + L, K, D]
        mask = torch.ones(longest, segment.prompt + longest, dtype=torch.bool, device=query.device).tril(segment.prompt)
        out = self._sdpa(*(t.transpose(1, 2) for t in (q, k, v)), mask).transpose(1, 2)  # [R, L, H, D]
        return outputs + [row[:length] for row, length in zip(out, segment.responses)]

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [B,H,S,D], k and v [B,K,S',D]; mask True = attend, None = causal."""
        repeat = q.size(1) // k.size(1)
        if repeat > 1:  # on CPU faster in training than enable_gqa
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)


def _pad(rows: Tensor, lengths: tuple[int, ...], longest: int) -> Tensor:
    return torch.stack([F.pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in rows.split(list(lengths))])


def _rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_THD.chunk(2, -1)
    return x_THD * cos + torch.cat([-b, a], -1) * sin


def rope_tables(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, D] of the rotate-half convention (Hugging Face's), computed in fp32."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions_T.device).float() / head_dim)
    angles = torch.outer(positions_T.float(), inverse)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)
