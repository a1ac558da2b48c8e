"""Sends weights through POSIX shared memory: the trainer writes them once, and every engine of the machine maps them without a copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from rlinf.weights.buckets import BUCKET_BYTES, Named, fill, group_into_buckets, layout
from rlinf.weights.scan import Scan, checksums, fill_and_scan
from rlinf.weights.segments import SEGMENTS_FOLDER, Segment, create_segment, in_use
from rlinf.weights.source import BucketSpec, SharedMemory, TensorSpec


class SharedMemoryPublisher:
    """Writes the weights of one pipeline stage to segments `/dev/shm/rlinf-<name>-v<version>-<i>` (mode 600). At most one version at a time
    can be read.

    Segments of earlier versions are reused, since fresh pages cost several times the copy. A segment of which an engine still has a view is
    not reused: an engine that computes directly with the memory that it was sent goes on with its version, while the next version is
    written to the segments of the version before.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._offered: list[Segment] = []
        self._spare: list[Segment] = []
        self._withdrawn = 0  # segments, of all versions

    def publish(self, tensors: Iterable[Named], version: int, bucket_bytes: int = BUCKET_BYTES) -> SharedMemory:
        """Write the tensors in place of the version before. A failure leaves no segment behind."""
        self.withdraw()
        written: list[tuple[Segment, tuple[TensorSpec, ...], Scan]] = []
        with ExitStack() as undo, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            undo.callback(self.close)
            for i, bucket in enumerate(group_into_buckets(tensors, bucket_bytes)):
                if i > 1:
                    written[-2][2].checksum()  # two at a time: what was gathered for them is in memory, too
                specs, nbytes = layout(bucket)
                segment = self._take(f"{SEGMENTS_FOLDER}/rlinf-{self.name}-v{version}-{i}", nbytes)
                written.append((segment, specs, fill_and_scan(segment.buffer, specs, bucket, pool)))
            totals = [scan.checksum() for _, _, scan in written]
            buckets = tuple(
                BucketSpec(s.path, len(s.buffer), scan.with_checksums(specs), n) for (s, specs, scan), n in zip(written, totals)
            )
            undo.pop_all()
        self._drop_spare(lambda segment: not in_use(segment.path))
        return SharedMemory(buckets, rewritten=True)

    def withdraw(self, free: bool = False) -> None:
        """Make what was published impossible to open; its memory is kept for the next version. free: only while an engine has a view of
        it."""
        for segment in self._offered:
            segment.rename(f"{SEGMENTS_FOLDER}/rlinf-{self.name}-spare-{self._withdrawn}")
            self._withdrawn += 1
        self._spare += self._offered
        self._offered = []
        if free:
            self._drop_spare(lambda segment: not in_use(segment.path))

    def close(self) -> None:
        self._spare += self._offered
        self._offered = []
        self._drop_spare(lambda segment: True)

    def _take(self, path: str, nbytes: int) -> Segment:
        segment = next((s for s in self._spare if len(s.buffer) == nbytes and not in_use(s.path)), None)
        if segment is None:
            segment = Segment(path, create_segment(path, nbytes))
        else:
            self._spare.remove(segment)
            segment.rename(path)
        self._offered.append(segment)
        return segment

    def _drop_spare(self, drop: Callable[[Segment], bool]) -> None:
        kept = []
        for segment in self._spare:
            if drop(segment):
                segment.remove()
            else:
                kept.append(segment)
        self._spare = kept


def collect(tensors: Iterable[Named], name: str, bucket_bytes: int = BUCKET_BYTES) -> tuple[SharedMemory, tuple[np.ndarray, ...]]:
    """What publish() would write, as uint8 arrays that the caller sends to another machine, where land() writes them. name: the beginning
    of the buckets' keys."""
    buckets, arrays = [], []
    for i, bucket in enumerate(group_into_buckets(tensors, bucket_bytes)):
        specs, nbytes = layout(bucket)
        buffer = torch.zeros(nbytes, dtype=torch.uint8)  # zeros: the gaps between tensors count in the checksum
        fill(buffer, specs, bucket)
        buckets.append(BucketSpec(f"{name}-{i}", nbytes, *checksums(buffer, specs)))
        arrays.append(buffer.numpy())
    return SharedMemory(tuple(buckets)), tuple(arrays)


def land(source: SharedMemory, arrays: Sequence[np.ndarray], run_id: str, version: int) -> SharedMemory:
    """Write buckets that came from another machine to segments of this one, `/dev/shm/rlinf-<run_id>-v<version>-<i>`. Their checksums are
    those that were sent."""
    buckets = []
    with ExitStack() as undo:
        for i, (bucket, array) in enumerate(zip(source.buckets, arrays, strict=True)):
            path = f"{SEGMENTS_FOLDER}/rlinf-{run_id}-v{version}-{i}"
            buffer = create_segment(path, bucket.nbytes)
            undo.callback(os.unlink, path)
            buffer.numpy()[:] = array
            buckets.append(replace(bucket, key=path))
        undo.pop_all()
    return SharedMemory(tuple(buckets))
