"""A bucket of weights as SGLang's /update_weights_from_tensor takes it: where the bytes are, not the bytes.

SGLang un-pickles what it is sent, with a list of what may be called. It is a flattened bucket: one tensor of bytes, which torch opens in
each process of the server by the name of a segment or by a handle of CUDA, and what lies where in it.
"""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_storage_filename, rebuild_tensor, rebuild_typed_storage

from rlinf.device import rebuilding
from rlinf.weights.source import BucketSpec, DeviceBucket, TensorSpec


class Call:
    """Pickled as the call of a function, which the reader makes."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@contextmanager
def offered(bucket: BucketSpec, link: Path) -> Iterator[str]:
    """What one process of the server is sent; each of them wants its own copy.

    A segment is offered under a name of its own, `link` beside it: when a process that has it open is killed, torch's helper removes the
    name, and another engine may still want the bucket.
    """
    if isinstance(bucket, DeviceBucket) and bucket.handle:
        yield _pickled(bucket, Call(*rebuilding(bucket.handle, bucket.handle[0])))  # SGLang finds a GPU by its UUID
        return
    os.link(bucket.key, link)
    try:
        yield _pickled(bucket, _in_segment(link, bucket.nbytes))
    finally:
        link.unlink(missing_ok=True)


def _pickled(bucket: BucketSpec, tensor: Call) -> str:
    content = {"flattened_tensor": tensor, "metadata": [_metadata(spec) for spec in bucket.tensors]}
    return base64.b64encode(pickle.dumps(content)).decode()


def _in_segment(path: Path, nbytes: int) -> Call:
    """Torch opens it in two steps and looks at it in a third. The empty name: of a helper that is already there."""
    opened = Call(rebuild_storage_filename, (torch.UntypedStorage, b"", f"/{path.name}".encode(), nbytes))
    storage = Call(rebuild_typed_storage, (opened, torch.uint8))
    return Call(rebuild_tensor, (torch.Tensor, storage, (0, (nbytes,), (1,), False)))


def _metadata(spec: TensorSpec) -> SimpleNamespace:
    end, dtype = spec.offset + spec.nbytes, getattr(torch, spec.dtype)
    return SimpleNamespace(name=spec.name, shape=spec.shape, dtype=dtype, start_idx=spec.offset, end_idx=end, numel=spec.nbytes)
