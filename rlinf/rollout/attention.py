"""The three ways in which tokens attend: decoding in slots, prefilling slots, and whole sequences without a cache.

Legend: N packed tokens, R rows (slots), S suffix tokens of a row (padded), T key positions, A attention heads, K key-value heads,
G = A / K, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rlinf.kernels.cpu import ATTENTION_DIM, ATTENTION_LANES, Kernels, kernels_for
from rlinf.rollout.embedded_model import Attend
from rlinf.rollout.slot_cache import SlotCache
from rlinf.weights.architecture import Architecture


@dataclass(frozen=True)
class Span:
    """Positions [start, end) of one slot, to be computed."""

    row: int
    start: int
    end: int


def decode_attention(cache: SlotCache, arch: Architecture, positions_R: Tensor) -> Attend:
    """One new token for each of the first R slots, at its position; it sees everything before it in its slot."""
    if (own := _own_kernels(cache, arch)) is not None:
        return lambda layer, queries, keys, values: own.decode_attention(
            queries, keys, values, cache.layer(layer), positions_R, arch.head_dim**-0.5
        ).flatten(1)
    rows, heads, dim = len(positions_R), arch.n_kv_heads, arch.head_dim
    addresses = cache.addresses(torch.arange(rows, device=positions_R.device), positions_R)
    hidden_RT = torch.arange(cache.capacity, device=positions_R.device) > positions_R[:, None]
    bias: dict[torch.dtype, Tensor] = {}

    def attend(layer: int, queries_RAD: Tensor, keys_RKD: Tensor, values_RKD: Tensor) -> Tensor:
        cache.write(layer, addresses, keys_RKD, values_RKD)
        keys, values = (x.flatten(0, 1) for x in cache.read(layer, rows))
        queries = (queries_RAD * dim**-0.5).reshape(rows * heads, -1, dim)
        if queries.dtype not in bias:
            bias[queries.dtype] = (
                torch.zeros(rows, 1, cache.capacity, dtype=queries.dtype, device=queries.device)
                .masked_fill_(hidden_RT[:, None], float("-inf"))
                .repeat_interleave(heads, 0)
            )
        # two batched products beat the fused kernel at one query a row: half the time at 352 keys
        scores = torch.bmm(queries, keys.transpose(1, 2)).add_(bias[queries.dtype])
        return torch.bmm(scores.softmax(-1), values).view(rows, -1)

    return attend


def _own_kernels(cache: SlotCache, arch: Architecture) -> Kernels | None:
    """Those that attend on this CPU; None where torch does."""
    fits = arch.head_dim % ATTENTION_LANES == 0 and arch.head_dim <= ATTENTION_DIM
    return kernels_for(cache.dtype, cache.device) if fits else None


def prefill_attention(cache: SlotCache, spans: Sequence[Span], device: torch.device) -> Attend:
    """The packed tokens of several spans, each seeing its slot up to itself.

    Span by span: what a context comes to does not depend, to the last bit, on those that are computed with it.
    """
    rows_N = torch.tensor([s.row for s in spans for _ in range(s.end - s.start)], device=device)
    positions_N = torch.tensor([p for s in spans for p in range(s.start, s.end)], device=device)
    addresses = cache.addresses(rows_N, positions_N)
    visible = [torch.arange(s.end, device=device) <= torch.arange(s.start, s.end, device=device)[:, None] for s in spans]

    def attend(layer: int, queries_NAD: Tensor, keys_NKD: Tensor, values_NKD: Tensor) -> Tensor:
        cache.write(layer, addresses, keys_NKD, values_NKD)
        parts, begin = [], 0
        for span, visible_ST in zip(spans, visible):
            queries_AND = queries_NAD[begin : (begin := begin + span.end - span.start)].transpose(0, 1)
            keys, values = cache.gather(layer, torch.tensor([span.row], device=device), span.end)
            out = F.scaled_dot_product_attention(queries_AND[None], keys, values, attn_mask=visible_ST, enable_gqa=True)
            parts.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(parts)

    return attend


def causal_attention(lengths: Sequence[int], device: torch.device) -> Attend:
    """Whole sequences, packed one after another, without a cache."""
    batch_N, offset_N = _padded_places(lengths, device)
    longest = max(lengths)

    def attend(layer: int, queries_NAD: Tensor, keys_NKD: Tensor, values_NKD: Tensor) -> Tensor:
        def padded(x: Tensor) -> Tensor:
            whole = x.new_zeros(len(lengths), longest, *x.shape[1:])
            whole[batch_N, offset_N] = x
            return whole.transpose(1, 2)

        # padding stands at the right, where the causal mask hides it from every real token
        out = F.scaled_dot_product_attention(padded(queries_NAD), padded(keys_NKD), padded(values_NKD), is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)[batch_N, offset_N].flatten(1)

    return attend


def _padded_places(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, offset) of every packed token in a right-padded batch."""
    rows = torch.tensor([r for r, n in enumerate(lengths) for _ in range(n)], device=device)
    offsets = torch.tensor([i for n in lengths for i in range(n)], device=device)
    return rows, offsets
