"""Flat buckets: named tensors packed one after another into a run of bytes, with specs and an xxh3-64 checksum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import xxhash
from torch import Tensor

from rlinf.weights.source import TensorSpec

BUCKET_BYTES = 128 * 2**20
WORDS_AT_ONCE = 1 << 22  # of word_sum: twice 32 MiB to compute with
ALIGNMENT = 64  # bytes: every tensor starts on a cache line, so that views of any dtype are aligned

Named = tuple[str, Tensor]


def group_into_buckets(tensors: Iterable[Named], bucket_bytes: int = BUCKET_BYTES) -> Iterator[list[Named]]:
    """Consecutive tensors whose packed size is at most `bucket_bytes`; a larger tensor gets a bucket of its own."""
    bucket: list[Named] = []
    filled = 0
    for name, tensor in tensors:
        size = aligned(tensor.nbytes)
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor))
        filled += size
    if bucket:
        yield bucket


def layout(bucket: Sequence[Named]) -> tuple[tuple[TensorSpec, ...], int]:
    """Where each tensor of a bucket goes, and the bytes of the whole."""
    specs = []
    offset = 0
    for name, tensor in bucket:
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name, dtype, tuple(tensor.shape), offset, tensor.nbytes))
        offset += aligned(tensor.nbytes)
    return tuple(specs), offset


def fill(buffer: Tensor, specs: Sequence[TensorSpec], bucket: Sequence[Named]) -> None:
    """Copy the tensors of a bucket into `buffer` (uint8, at least the bytes that `layout` named)."""
    for (_, view), (_, tensor) in zip(views(buffer, specs), bucket, strict=True):
        view.copy_(tensor)


def views(buffer: Tensor, specs: Sequence[TensorSpec]) -> Iterator[Named]:
    """The tensors of a bucket as views into its bytes."""
    for spec in specs:
        flat = buffer[spec.offset : spec.offset + spec.nbytes].view(getattr(torch, spec.dtype))
        yield spec.name, flat.view(spec.shape)


def checksum(buffer: Tensor) -> int:
    """xxh3-64 of the bytes of a CPU tensor."""
    return xxhash.xxh3_64_intdigest(buffer.numpy())


def word_sum(buffer: Tensor) -> int:
    """A checksum that the device of the bytes computes: the sum of (2i + 1) x_i modulo 2^64 over the 32-bit words x_i, exact on any device.

    One changed word always changes it, since an odd factor loses nothing; so do two different words that change places, since their
    difference is below 2^32 and that of their factors, in a bucket below 16 GiB, too. len(buffer): a multiple of 4.
    """
    words = buffer.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=buffer.device)
    for start in range(0, len(words), WORDS_AT_ONCE):
        part = words[start : start + WORDS_AT_ONCE]
        total += (torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=buffer.device) * part).sum()
    return int(total) % 2**64


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
