"""Weights on the move as plain data: what is offered (WeightSource) and the proof that it arrived (Receipt).

Tensors travel under their Hugging Face names, whole, flattened into buckets. A source is opened by the process that owns the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class TensorSpec(NamedTuple):
    """One tensor inside a bucket: name, torch dtype name ("bfloat16"), shape, byte offset in the bucket. A tuple: a driver reads many."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class BucketSpec:
    """A flat run of bytes: where it is (for shared memory: the segment's name), what is in it, and its checksum as sent
    (weights/scan.py)."""

    key: str
    nbytes: int
    tensors: tuple[TensorSpec, ...]
    checksum: int


@dataclass(frozen=True)
class SharedMemory:
    """Buckets in POSIX shared memory of this machine; key = path of the segment under /dev/shm.

    rewritten: later versions come in the same memory, which readers may leave mapped (segments.Mappings).
    """

    buckets: tuple[BucketSpec, ...]
    rewritten: bool = False


@dataclass(frozen=True)
class DeviceBucket(BucketSpec):
    """A bucket in memory of a device. handle: what CUDA needs to open it in another process (device.share); empty on CPU, where key is
    the path of a segment."""

    handle: tuple[Any, ...] = ()


@dataclass(frozen=True)
class DeviceIpc:
    """Buckets in memory of the device that publisher and engine share. The engine keeps no view of them when it answers."""

    buckets: tuple[DeviceBucket, ...]


@dataclass(frozen=True)
class Disk:
    """A Hugging Face folder of safetensors files."""

    path: str


@dataclass(frozen=True)
class Files:
    """Buckets as safetensors files that every machine sees; key = path of the file, offsets count from its first byte."""

    buckets: tuple[BucketSpec, ...]


@dataclass(frozen=True)
class Collective:
    """Buckets that come over process groups, which the engine's worker has joined (weights.broadcast) or the engine itself
    (weights.server_groups): first those of `groups[0]`."""

    groups: tuple[str, ...]


@dataclass(frozen=True)
class Broadcast:
    """Buckets that went into the engines' own memory over their process groups; what was sent, nothing to be opened. checksum: of the
    description by which the engine was told what comes (weights.server_groups)."""

    buckets: tuple[BucketSpec, ...]


# What every engine takes; its worker turns a Collective into SharedMemory, unless the engine is a member of the groups itself.
WeightSource = SharedMemory | Files | DeviceIpc | Disk
Buckets = SharedMemory | Files | DeviceIpc | Broadcast


@dataclass(frozen=True)
class Receipt:
    """What an engine says after load_weights: bucket checksums as received. Valid only together with a probe (see `weights.receipts`).

    engine_checksum: of the weights as the engine holds them, in a form of its own, equal among replicas; "" where it reports none.
    """

    version: int
    checksums: dict[str, int]
    n_tensors: int
    nbytes: int
    seconds: float
    engine_checksum: str = ""
