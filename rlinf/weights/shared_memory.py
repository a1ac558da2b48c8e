"""Weights through POSIX shared memory: written once by the trainer, mapped without a copy by every engine of the machine."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rlinf.errors import RunFailed
from rlinf.weights.buckets import BUCKET_BYTES, Named, checksum, fill, group_into_buckets, layout, views
from rlinf.weights.source import BucketSpec, Disk, SharedMemory, WeightSource
from rlinf.weights.tensor_folder import open_hf_folder

FOLDER = "/dev/shm"


def publish(tensors: Iterable[Named], run_id: str, version: int, bucket_bytes: int = BUCKET_BYTES) -> SharedMemory:
    """Write the tensors into segments `/dev/shm/rlinf-<run_id>-v<version>-<i>` (mode 600). A failure leaves no segment behind."""
    buckets = []
    with ExitStack() as undo:
        for i, bucket in enumerate(group_into_buckets(tensors, bucket_bytes)):
            specs, nbytes = layout(bucket)
            path = f"{FOLDER}/rlinf-{run_id}-v{version}-{i}"
            buffer = _create(path, nbytes, undo)
            fill(buffer, specs, bucket)
            buckets.append(BucketSpec(path, nbytes, specs, checksum(buffer)))
        undo.pop_all()
    return SharedMemory(tuple(buckets))


def collect(tensors: Iterable[Named], name: str, bucket_bytes: int = BUCKET_BYTES) -> tuple[SharedMemory, tuple[np.ndarray, ...]]:
    """What publish() would write, as uint8 arrays that the caller sends to another machine, where land() writes them. `name`: of the keys."""
    buckets, arrays = [], []
    for i, bucket in enumerate(group_into_buckets(tensors, bucket_bytes)):
        specs, nbytes = layout(bucket)
        buffer = torch.zeros(nbytes, dtype=torch.uint8)  # zeros: the gaps between tensors count in the checksum
        fill(buffer, specs, bucket)
        buckets.append(BucketSpec(f"{name}-{i}", nbytes, specs, checksum(buffer)))
        arrays.append(buffer.numpy())
    return SharedMemory(tuple(buckets)), tuple(arrays)


def land(source: SharedMemory, arrays: Sequence[np.ndarray], run_id: str, version: int) -> SharedMemory:
    """Buckets that came from another machine as segments of this one, `/dev/shm/rlinf-<run_id>-v<version>-<i>`; checksums as sent."""
    buckets = []
    with ExitStack() as undo:
        for i, (bucket, array) in enumerate(zip(source.buckets, arrays, strict=True)):
            path = f"{FOLDER}/rlinf-{run_id}-v{version}-{i}"
            buffer = _create(path, bucket.nbytes, undo)
            buffer.numpy()[:] = array
            buckets.append(replace(bucket, key=path))
        undo.pop_all()
    return SharedMemory(tuple(buckets))


def open_source(source: WeightSource) -> Iterator[Named]:
    """The tensors of a source in order; from shared memory as views whose bucket's checksum has just been verified.

    Raises RunFailed when a segment is missing, has the wrong size or other bytes than were sent, or when a name comes twice.
    """
    if isinstance(source, Disk):
        yield from open_hf_folder(source.path).items()
        return
    seen: set[str] = set()
    for bucket in source.buckets:
        buffer = _open(bucket)
        received = checksum(buffer)
        if received != bucket.checksum:
            raise RunFailed(f"weight bucket {bucket.key}: checksum {received:016x} as received, {bucket.checksum:016x} as sent")
        for name, tensor in views(buffer, bucket.tensors):
            if name in seen:
                raise RunFailed(f"weight bucket {bucket.key}: tensor {name} was already in an earlier place of this source")
            seen.add(name)
            yield name, tensor


def release(source: WeightSource) -> None:
    """Remove the segments; engines that still map them keep their view. A segment already gone is no error."""
    if isinstance(source, SharedMemory):
        for bucket in source.buckets:
            if os.path.exists(bucket.key):
                os.unlink(bucket.key)


def _create(path: str, nbytes: int, undo: ExitStack) -> Tensor:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    undo.callback(os.unlink, path)
    with open(descriptor, "r+b") as file:
        os.posix_fallocate(descriptor, 0, nbytes)  # a full /dev/shm is an OSError here, a SIGBUS at the first write otherwise
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)


def _open(bucket: BucketSpec) -> Tensor:
    if not os.path.exists(bucket.key):
        raise RunFailed(f"weight bucket {bucket.key}: the segment does not exist; it was released or never written on this machine")
    with open(bucket.key, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != bucket.nbytes:
            raise RunFailed(f"weight bucket {bucket.key}: {size} bytes, expected {bucket.nbytes}")
        # a private mapping: the reader cannot change what other readers see
        return torch.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
