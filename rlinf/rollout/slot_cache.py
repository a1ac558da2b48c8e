"""The KV cache of the embedded engine: one slot for each running sample, and a small store of recent prompts from which samples start.

Legend: L layers, R rows (slots), K key-value heads, C capacity in tokens, D head dimension, P prompt tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlinf.weights.architecture import Architecture

BLOCK = 32  # tokens: capacity is a multiple of this, so that decode steps repeat the same shapes
MINIMUM_REUSE = 8  # tokens: a shorter common prefix is not worth a copy


class SlotCache:
    """Keys and values of the running samples, left-aligned, one tensor [2, R, K, C, D] a layer; C grows as the samples do."""

    def __init__(self, arch: Architecture, slots: int, longest: int, dtype: torch.dtype, device: torch.device) -> None:
        """longest: tokens that a sample may have."""
        self._arch = arch
        self._slots = slots
        self._longest = longest
        self.dtype = dtype
        self.device = device
        self.free()

    def free(self) -> None:
        """Give the memory back; the next reserve() starts from nothing."""
        a = self._arch
        self.capacity = 0
        empty = torch.zeros(2, self._slots, a.n_kv_heads, 0, a.head_dim, dtype=self.dtype, device=self.device)
        self._layers = [empty] * a.n_layers

    def reserve(self, length: int) -> None:
        """Make room for samples of `length` tokens."""
        if length > self.capacity:
            self._resize(max(length, min(self.capacity + self.capacity // 4, self._longest)))

    def fit(self, length: int) -> None:
        """Make room for `length` tokens, and shrink when there is more than twice as much: attention reads the whole capacity."""
        self.reserve(length)
        if self.capacity > 2 * length:
            self._resize(length)

    def _resize(self, length: int) -> None:
        capacity = -(-length // BLOCK) * BLOCK
        kept = min(capacity, self.capacity)
        for i, old in enumerate(self._layers):
            self._layers[i] = torch.empty(*old.shape[:3], capacity, old.shape[4], dtype=old.dtype, device=old.device)
            self._layers[i][:, :, :, :kept] = old[:, :, :, :kept]
            self._layers[i][:, :, :, kept:] = 0  # where torch attends, a masked position still enters 0 * value
        self.capacity = capacity

    def addresses(self, rows_N: Tensor, positions_N: Tensor) -> Tensor:
        """Where the tokens at (row, position) are written, for every key-value head: [N * K], for write()."""
        heads = torch.arange(self._arch.n_kv_heads, device=self.device)
        return ((rows_N[:, None] * self._arch.n_kv_heads + heads) * self.capacity + positions_N[:, None]).reshape(-1)

    def write(self, layer: int, addresses: Tensor, keys_NKD: Tensor, values_NKD: Tensor) -> None:
        dim = self._arch.head_dim
        keys, values = self._layers[layer]
        keys.view(-1, dim).index_copy_(0, addresses, keys_NKD.reshape(-1, dim))
        values.view(-1, dim).index_copy_(0, addresses, values_NKD.reshape(-1, dim))

    def layer(self, layer: int) -> Tensor:
        """Keys and values of all slots, [2, R, K, C, D]; the caller may write to them."""
        return self._layers[layer]

    def read(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `rows` slots, [R, K, C, D], over the whole capacity: matrix products copy what is not contiguous."""
        keys, values = self._layers[layer]
        return keys[:rows], values[:rows]

    def gather(self, layer: int, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of some slots."""
        keys, values = self._layers[layer]
        return keys[:, :, :length].index_select(0, rows), values[:, :, :length].index_select(0, rows)

    def snapshot(self, row: int, length: int) -> Tensor:
        """A copy of one slot's first positions, [L, 2, K, length, D]."""
        return torch.stack([layer[:, row, :, :length] for layer in self._layers])

    def restore(self, rows: Sequence[int], kv_L2KPD: Tensor, length: int) -> None:
        """Start some slots with the first `length` positions of a snapshot."""
        index = torch.tensor(rows, device=self.device)
        for layer, kv in zip(self._layers, kv_L2KPD, strict=True):
            layer[:, index, :, :length] = kv[:, None, :, :length]

    def move(self, source: int, target: int, length: int) -> None:
        for layer in self._layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]


@dataclass(frozen=True)
class CachedPrompt:
    """The tokens of a context, their keys and values [L, 2, K, P, D], and the last token's hidden state [H]."""

    token_ids: np.ndarray
    kv: Tensor
    last_hidden: Tensor


class PrefixCache:
    """The most recently used contexts, up to a number of tokens in all (the newest always stays)."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: OrderedDict[bytes, CachedPrompt] = OrderedDict()

    def clear(self) -> None:
        self._entries.clear()

    def add(self, entry: CachedPrompt) -> None:
        self._entries[entry.token_ids.tobytes()] = entry
        while len(self._entries) > 1 and sum(len(e.token_ids) for e in self._entries.values()) > self._max_tokens:
            self._entries.popitem(last=False)

    def whole(self, token_ids: np.ndarray) -> CachedPrompt | None:
        """The entry of exactly these tokens."""
        key = token_ids.tobytes()
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def longest(self, token_ids: np.ndarray) -> tuple[int, CachedPrompt | None]:
        """(number of shared tokens, the entry that shares the most leading ones): at least MINIMUM_REUSE, at most all but the last."""
        best, found = MINIMUM_REUSE - 1, None
        for entry in self._entries.values():
            shared = min(common_prefix(entry.token_ids, token_ids), len(token_ids) - 1)
            if shared > best:
                best, found = shared, entry
        return (best, found) if found is not None else (0, None)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of equal leading tokens."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
