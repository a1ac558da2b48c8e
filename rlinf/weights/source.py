"""Descriptions of weights on their way, as plain data: what is offered (WeightSource), and what an engine answers (Receipt).

Tensors travel under their Hugging Face names, whole, packed into flat buckets. A source is opened by the process that owns the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class TensorSpec(NamedTuple):
    """One tensor in a bucket: name, torch dtype name ("bfloat16"), shape, byte offset in the bucket, and its part of the bucket's checksum
    (0 where that is not divided). It is a tuple, because a driver reads very many."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    checksum: int = 0


@dataclass(frozen=True)
class BucketSpec:
    """A flat run of bytes: where it is (for shared memory, the name of the segment), what is in it, and its checksum as sent
    (weights/scan.py)."""

    key: str
    nbytes: int
    tensors: tuple[TensorSpec, ...]
    checksum: int


@dataclass(frozen=True)
class SharedMemory:
    """Buckets in POSIX shared memory of this machine; key = path of the segment under /dev/shm.

    rewritten: whether later versions will be written to the same memory, which readers may keep mapped (segments.Mappings).
    """

    buckets: tuple[BucketSpec, ...]
    rewritten: bool = False


@dataclass(frozen=True)
class DeviceBucket(BucketSpec):
    """A bucket in memory of a device. handle: what CUDA needs to open it in another process (device.share); empty on CPU, where key is the
    path of a segment."""

    handle: tuple[Any, ...] = ()


@dataclass(frozen=True)
class DeviceIpc:
    """Buckets in memory of the device that publisher and engine share. An engine that has answered keeps no view of them."""

    buckets: tuple[DeviceBucket, ...]


@dataclass(frozen=True)
class Disk:
    """A Hugging Face folder of safetensors files."""

    path: str


@dataclass(frozen=True)
class Files:
    """Buckets as safetensors files that every machine can read; key = path of the file, offsets count from its first byte."""

    buckets: tuple[BucketSpec, ...]


@dataclass(frozen=True)
class Collective:
    """Buckets that come over process groups, in the order of `groups`; the engine's worker has joined them (weights.broadcast), or the
    engine itself (weights.server_groups)."""

    groups: tuple[str, ...]


@dataclass(frozen=True)
class Broadcast:
    """Buckets that were sent into the engines' own memory over process groups; there is nothing to open. checksum: of the description that
    announced the bucket to the engine (weights.server_groups)."""

    buckets: tuple[BucketSpec, ...]


# What every engine takes; its worker turns a Collective into SharedMemory, unless the engine is a member of the groups itself.
Readable = SharedMemory | Files | DeviceIpc  # buckets that an engine opens
WeightSource = Readable | Disk
Buckets = Readable | Broadcast


@dataclass(frozen=True)
class Receipt:
    """What an engine returns from load_weights: the checksums of the buckets as it received them. It is a proof only together with probes
    (weights.receipts).

    engine_tensors: checksums of the weights as the engine holds them, by names and in a form of its own; they must be equal among replicas;
    empty where the engine reports none.
    """

    version: int
    checksums: dict[str, int]
    n_tensors: int
    nbytes: int
    seconds: float
    engine_tensors: dict[str, str] = field(default_factory=dict)
