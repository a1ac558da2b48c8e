"""Flat buckets: named tensors packed one after another into one run of bytes, which a spec describes. Checksums are in scan.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from rlinf.weights.dtypes import dtype_name
from rlinf.weights.source import TensorSpec

BUCKET_BYTES = 128 * 2**20
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
    """The offset of each tensor in a bucket, and the size of the bucket in bytes."""
    specs = []
    offset = 0
    for name, tensor in bucket:
        specs.append(TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape), offset, tensor.nbytes))
        offset += aligned(tensor.nbytes)
    return tuple(specs), offset


def fill(buffer: Tensor, specs: Sequence[TensorSpec], bucket: Sequence[Named]) -> None:
    """Copy the tensors of a bucket into `buffer` (uint8, at least as many bytes as `layout` said)."""
    for (_, target), (_, tensor) in zip(views(buffer, specs), bucket, strict=True):
        target.copy_(tensor)


def views(buffer: Tensor, specs: Sequence[TensorSpec]) -> Iterator[Named]:
    """The tensors of a bucket as views into its bytes."""
    for spec in specs:
        yield spec.name, view(buffer, spec)


def view(buffer: Tensor, spec: TensorSpec) -> Tensor:
    return buffer[spec.offset : spec.offset + spec.nbytes].view(getattr(torch, spec.dtype)).view(spec.shape)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
