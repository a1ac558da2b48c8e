"""Weights on a device that actor and engine share: the publisher sends handles only, and the engine opens the same memory.

On a GPU the handle is CUDA's (rlinf/device.py). On CPU, where device memory is host memory, it is the name of a segment in shared memory;
everything else is the same. An engine that has answered with its receipt keeps no view of a bucket, so that the memory can be freed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rlinf.device import forgo_shared, open_shared, share, synchronize
from rlinf.errors import RunFailed
from rlinf.weights.buckets import BUCKET_BYTES, Named, fill, group_into_buckets, layout
from rlinf.weights.scan import checksums, verify
from rlinf.weights.segments import SEGMENTS_FOLDER, create_segment, in_use, open_segment
from rlinf.weights.source import DeviceBucket, DeviceIpc

_OWN: WeakValueDictionary[str, Tensor] = WeakValueDictionary()  # by key: CUDA does not let a process open its own handles


class DeviceBuckets:
    """The buckets of one publisher, of one version at a time. Their memory exists only from publish() to withdraw(): between two syncs
    trainer and engine need it, and a second copy of the weights would waste it."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self._offered: dict[str, Tensor] = {}

    def publish(self, tensors: Iterable[Named], version: int, bucket_bytes: int = BUCKET_BYTES) -> DeviceIpc:
        """Copy the tensors into buckets on the device, complete when this returns. A failure leaves nothing behind."""
        self.withdraw()
        buckets = []
        with ExitStack() as undo:
            undo.callback(self.close)
            for i, bucket in enumerate(group_into_buckets(tensors, bucket_bytes)):
                specs, nbytes = layout(bucket)
                key = f"{SEGMENTS_FOLDER}/rlinf-{self.name}-ipc-v{version}-{i}"  # on a GPU nothing but a name
                buffer, handle = self._allocate(key, nbytes)
                fill(buffer, specs, bucket)
                buckets.append(DeviceBucket(key, nbytes, *checksums(buffer, specs), handle))
            synchronize(self.device)
            undo.pop_all()
        return DeviceIpc(tuple(buckets))

    def withdraw(self) -> None:
        """Free the memory, when all engines have answered. Raises RunFailed when an engine still has a view of it; only on CPU this can be
        seen, by the lock of the segment."""
        looked_at = [key for key in self._offered if os.path.exists(key) and in_use(key)]
        self.close()
        if looked_at:
            raise RunFailed(f"weight bucket {looked_at[0]}: an engine has answered and still looks at it")

    def close(self) -> None:
        for key in self._offered:
            if os.path.exists(key):
                os.unlink(key)
        self._offered = {}

    def _allocate(self, key: str, nbytes: int) -> tuple[Tensor, tuple[Any, ...]]:
        on_cpu = self.device.type == "cpu"
        # zeros: the gaps between tensors count in the checksum
        buffer = create_segment(key, nbytes) if on_cpu else torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        self._offered[key] = _OWN[key] = buffer
        return buffer, () if on_cpu else share(buffer)


def open_bucket(bucket: DeviceBucket) -> Tensor:
    """The bytes of a bucket, in place. Raises RunFailed when it is not there, or its bytes are not those that were sent."""
    buffer = _OWN.get(bucket.key)
    if buffer is None:
        buffer = open_shared(bucket.handle) if bucket.handle else open_segment(bucket.key, bucket.nbytes)
    elif bucket.handle:
        forgo_shared(bucket.handle)
    tensors, received = checksums(buffer, bucket.tensors)
    verify(bucket, received, tensors)
    return buffer
