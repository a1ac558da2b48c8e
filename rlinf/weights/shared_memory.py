"""Weights through POSIX shared memory: written once by the trainer, mapped without a copy by every engine of the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlinf.errors import RunFailed
from rlinf.weights.buckets import BUCKET_BYTES, Look, Named, checksum, fill, fill_and_look, group_into_buckets, layout, look_at, views
from rlinf.weights.device_ipc import open_bucket
from rlinf.weights.finite import finite
from rlinf.weights.segments import FOLDER, Mappings, create_segment, in_use, map_file, open_segment
from rlinf.weights.source import BucketSpec, DeviceIpc, Disk, Files, SharedMemory, TensorSpec, WeightSource
from rlinf.weights.tensor_folder import open_hf_folder


@dataclass(eq=False)
class Segment:
    """One file in shared memory, mapped for writing."""

    path: str
    buffer: Tensor

    def rename(self, path: str) -> None:
        if os.path.exists(path):
            raise FileExistsError(f"{path} belongs to another publisher")
        os.rename(self.path, path)
        self.path = path

    def remove(self) -> None:
        """Who has it mapped keeps the view. Already gone is no error."""
        if os.path.exists(self.path):
            os.unlink(self.path)


class Segments:
    """The shared memory of one publisher, `/dev/shm/rlinf-<name>-v<version>-<i>` (mode 600), at most one version at a time on offer.

    The memory is written again for later versions: fresh pages cost several times the copy. A segment that somebody still looks at is left
    to them, and another takes its place: an engine that computes with the weights where they lie goes on with one version while the next
    is written, in the memory of the one before.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._offered: list[Segment] = []
        self._spare: list[Segment] = []
        self._withdrawn = 0  # segments, of all versions

    def publish(self, tensors: Iterable[Named], version: int, bucket_bytes: int = BUCKET_BYTES) -> SharedMemory:
        """Write the tensors in the place of the version before. A failure leaves no segment behind."""
        self.withdraw()
        written: list[tuple[Segment, tuple[TensorSpec, ...], Look]] = []
        with ExitStack() as undo, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            undo.callback(self.close)
            for i, bucket in enumerate(group_into_buckets(tensors, bucket_bytes)):
                if i > 1:
                    written[-2][2].checksum()  # two at a time: what was gathered for them is in memory, too
                specs, nbytes = layout(bucket)
                segment = self._take(f"{FOLDER}/rlinf-{self.name}-v{version}-{i}", nbytes)
                written.append((segment, specs, fill_and_look(segment.buffer, specs, bucket, pool)))
            buckets = tuple(BucketSpec(s.path, len(s.buffer), specs, look.checksum()) for s, specs, look in written)
            undo.pop_all()
        self._drop_spare(lambda segment: not in_use(segment.path))
        return SharedMemory(buckets, rewritten=True)

    def withdraw(self) -> None:
        """What was published is not to be had any more; its memory waits for the next version."""
        for segment in self._offered:
            segment.rename(f"{FOLDER}/rlinf-{self.name}-spare-{self._withdrawn}")
            self._withdrawn += 1
        self._spare += self._offered
        self._offered = []

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
    """What publish() would write, as uint8 arrays that the caller sends to another machine, where land() writes them.

    name: of the keys.
    """
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
            buffer = create_segment(path, bucket.nbytes)
            undo.callback(os.unlink, path)
            buffer.numpy()[:] = array
            buckets.append(replace(bucket, key=path))
        undo.pop_all()
    return SharedMemory(tuple(buckets))


def open_source(source: WeightSource, mappings: Mappings | None = None) -> Iterator[Named]:
    """The tensors of a source in order; of buckets as views into a mapping whose checksum has just been verified. mappings: of this reader,
    for segments that are written again; then it must not write into the views.

    Raises RunFailed when a bucket is missing, has the wrong size or other bytes than were sent, or when a name comes twice; ValueError
    that names a tensor that is not finite.
    """
    for name, tensor, looked_at in _arriving(source, mappings):
        if not looked_at and not finite(tensor):
            raise ValueError(f"tensor {name} holds values that are not finite")
        yield name, tensor


def _arriving(source: WeightSource, mappings: Mappings | None) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor, and whether it is already known to be finite."""
    if isinstance(source, Disk):
        yield from ((name, tensor, False) for name, tensor in open_hf_folder(source.path).items())
        return
    seen: set[str] = set()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for bucket, (buffer, finite_names) in zip(source.buckets, _opened(source, mappings, pool)):
            for name, tensor in views(buffer, bucket.tensors):
                if name in seen:
                    raise RunFailed(f"weight bucket {bucket.key}: tensor {name} was already in an earlier place of this source")
                seen.add(name)
                yield name, tensor, name in finite_names


def _opened(source: SharedMemory | Files | DeviceIpc, mappings: Mappings | None, pool: Executor) -> Iterator[tuple[Tensor, set[str]]]:
    """The bytes of each bucket, verified, and which of its tensors are known to be finite. Raises ValueError that names one that is not."""
    if isinstance(source, DeviceIpc):
        yield from ((open_bucket(bucket), set()) for bucket in source.buckets)
        return
    how, opened = map_file if isinstance(source, Files) else open_segment, []
    if isinstance(source, SharedMemory) and source.rewritten and mappings is not None:
        how = mappings.open
    for bucket in source.buckets:
        buffer = how(bucket.key, bucket.nbytes)
        opened.append((bucket, buffer, look_at(buffer, bucket.tensors, pool)))
    for bucket, buffer, look in opened:
        if (received := look.checksum()) != bucket.checksum:
            raise RunFailed(f"weight bucket {bucket.key}: checksum {received:016x} as received, {bucket.checksum:016x} as sent")
        if (spoiled := look.spoiled()) is not None:
            raise ValueError(f"tensor {spoiled} holds values that are not finite")
        yield buffer, look.known()


def release(source: WeightSource) -> None:
    """Remove the buckets; engines that still map them keep their view. A bucket already gone is no error."""
    for bucket in () if isinstance(source, Disk) else source.buckets:
        if os.path.exists(bucket.key):
            os.unlink(bucket.key)
