"""Opens weights in an engine: the tensors that a trainer offers by any transport, by name, verified while they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import torch
from torch import Tensor

from rlinf.errors import RunFailed
from rlinf.weights.buckets import Named, views
from rlinf.weights.device_ipc import open_bucket
from rlinf.weights.finite import finite
from rlinf.weights.scan import scan, verify
from rlinf.weights.segments import Mappings, map_file, open_segment
from rlinf.weights.source import DeviceIpc, Disk, Files, SharedMemory, WeightSource
from rlinf.weights.tensor_folder import open_hf_folder


def open_source(source: WeightSource, mappings: Mappings | None = None) -> Iterator[Named]:
    """The tensors of a source, in order. Those of a bucket are views into its memory, whose checksum has just been verified.

    mappings: of this reader, for segments that are reused for later versions; the reader must then not write into the views.
    Raises RunFailed when a bucket is missing, has the wrong size or other bytes than were sent, or when a name comes twice; ValueError that
    names a tensor that is not finite.
    """
    for name, tensor, known_finite in _named(source, mappings):
        if not known_finite and not finite(tensor):
            raise ValueError(f"tensor {name} holds values that are not finite")
        yield name, tensor


def _named(source: WeightSource, mappings: Mappings | None) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is already known to be finite)."""
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
    """(the verified bytes of each bucket, which of its tensors are known to be finite). Raises ValueError that names a tensor that is not
    finite."""
    if isinstance(source, DeviceIpc):
        yield from ((open_bucket(bucket), set()) for bucket in source.buckets)
        return
    open_bytes, opened = map_file if isinstance(source, Files) else open_segment, []
    if isinstance(source, SharedMemory) and source.rewritten and mappings is not None:
        open_bytes = mappings.open
    for bucket in source.buckets:
        buffer = open_bytes(bucket.key, bucket.nbytes)
        opened.append((bucket, buffer, scan(buffer, bucket.tensors, pool)))
    for bucket, buffer, scanned in opened:
        verify(bucket, scanned.checksum(), scanned.with_checksums(bucket.tensors))
        if (name := scanned.first_not_finite()) is not None:
            raise ValueError(f"tensor {name} holds values that are not finite")
        yield buffer, scanned.scanned_for_finite()


def release(source: WeightSource) -> None:
    """Remove the buckets. Engines that still map them keep their views; a bucket that is already gone is no error."""
    for bucket in () if isinstance(source, Disk) else source.buckets:
        if os.path.exists(bucket.key):
            os.unlink(bucket.key)
