"""Runs of bytes in POSIX shared memory, by name.

A segment begins as torch's own shared storages do, with a count of those who use it, so that every torch process can open it by name
(SGLang's do: rlinf/rollout/sglang_weights.py). Ours starts so high that none of them takes itself for the last and removes the file.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import ExitStack

import torch
from torch import Tensor

from rlinf.errors import RunFailed

FOLDER = "/dev/shm"
HEADER = 64  # bytes in front of the content
USERS = 1 << 30


def create_segment(path: str, nbytes: int) -> Tensor:
    """A new segment of `nbytes` zeros, mapped for writing."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with ExitStack() as undo, open(descriptor, "r+b"):
        undo.callback(os.unlink, path)
        os.posix_fallocate(descriptor, 0, HEADER + nbytes)  # a full /dev/shm is an OSError here, a SIGBUS at the first write otherwise
        whole = torch.frombuffer(mmap.mmap(descriptor, HEADER + nbytes), dtype=torch.uint8)
        undo.pop_all()
    whole[:8].view(torch.int64)[0] = USERS
    return whole[HEADER:]


def map_file(path: str, nbytes: int, header: int = 0) -> Tensor:
    """The bytes of a file behind its header, which the reader cannot change for others. Raises RunFailed unless there are `nbytes`.

    Of a segment the mapping holds a shared lock, as long as anyone has a view of it (in_use).
    """
    if not os.path.exists(path):
        raise RunFailed(f"weight bucket {path}: it does not exist; it was released, or never written where this machine sees it")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - header
        if size != nbytes:
            raise RunFailed(f"weight bucket {path}: {size} bytes, expected {nbytes}")
        if header:  # not every folder that machines share has locks
            fcntl.flock(file, fcntl.LOCK_SH)  # held by the mapping, which has the file open too
        return torch.frombuffer(mmap.mmap(file.fileno(), header + size, access=mmap.ACCESS_COPY), dtype=torch.uint8)[header:]


def open_segment(path: str, nbytes: int) -> Tensor:
    return map_file(path, nbytes, HEADER)


def in_use(path: str) -> bool:
    """Whether anyone has a view of the segment."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
