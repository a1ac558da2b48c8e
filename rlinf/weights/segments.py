"""Runs of bytes in POSIX shared memory, by name.

A segment begins, like torch's own shared storages, with a count of its users, so that every torch process can open it by name (SGLang's do:
rlinf/rollout/sglang_weights.py). Our count starts so high that no such process takes itself for the last user and removes the file.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from rlinf.errors import RunFailed

SEGMENTS_FOLDER = "/dev/shm"
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


@dataclass(eq=False)
class Segment:
    """One segment of a publisher, mapped for writing."""

    path: str
    buffer: Tensor

    def rename(self, path: str) -> None:
        if os.path.exists(path):
            raise FileExistsError(f"{path} belongs to another publisher")
        os.rename(self.path, path)
        self.path = path

    def remove(self) -> None:
        """Remove the file. Readers that have it mapped keep their views; that it is already gone is no error."""
        if os.path.exists(self.path):
            os.unlink(self.path)


def map_file(path: str, nbytes: int) -> Tensor:
    """The bytes of a file; writing into them changes nothing for others. Raises RunFailed unless there are `nbytes`."""
    with _opened(path, nbytes, header=0) as file:
        return torch.frombuffer(_mapped(file), dtype=torch.uint8)


def open_segment(path: str, nbytes: int) -> Tensor:
    """The content of a segment, mapped by map_file(). As long as anybody has a view of it, the mapping holds a shared lock (in_use)."""
    with _opened(path, nbytes, HEADER) as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # held by the mapping, which has the file open too
        return torch.frombuffer(_mapped(file), dtype=torch.uint8)[HEADER:]


@dataclass
class Mapping:
    """A segment that a reader has mapped. views: how many of its tensors are alive; as long as any is, the file is locked for in_use()."""

    file: BinaryIO
    memory: mmap.mmap
    views: int = 0

    def view(self) -> Tensor:
        if self.views == 0:
            fcntl.flock(self.file, fcntl.LOCK_SH)
        self.views += 1
        content = memoryview(self.memory)
        weakref.finalize(content, self._leave).atexit = False  # torch's storage holds it until the last view has gone
        return torch.frombuffer(content, dtype=torch.uint8)[HEADER:]

    def _leave(self) -> None:
        self.views -= 1
        if self.views == 0:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def close_if_removed(self) -> bool:
        """Close the mapping if nobody can need it any more; returns whether it did."""
        if self.views or os.fstat(self.file.fileno()).st_nlink:
            return False
        self.memory.close()
        self.file.close()
        return True


class Mappings:
    """The segments of one reader, which stay mapped while their publisher writes later versions into them: the first access to each page of
    a new mapping costs about as much as reading its bytes.

    The reader must not write into a view, because later views would show it. The mapping of a removed segment is closed at the next open().
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], Mapping] = {}  # by device and number of the file

    def open(self, path: str, nbytes: int) -> Tensor:
        """Like open_segment(), with a mapping that is kept."""
        self._kept = {key: kept for key, kept in self._kept.items() if not kept.close_if_removed()}
        with ExitStack() as undo:
            file = undo.enter_context(_opened(path, nbytes, HEADER))
            status = os.fstat(file.fileno())
            key = status.st_dev, status.st_ino
            if key not in self._kept:
                self._kept[key] = Mapping(file, _mapped(file))
                undo.pop_all()
        return self._kept[key].view()


def _opened(path: str, nbytes: int, header: int) -> BinaryIO:
    if not os.path.exists(path):
        raise RunFailed(f"weight bucket {path}: it does not exist; it was released, or never written where this machine sees it")
    with ExitStack() as undo:
        file = undo.enter_context(open(path, "rb"))
        size = os.fstat(file.fileno()).st_size - header
        if size != nbytes:
            raise RunFailed(f"weight bucket {path}: {size} bytes, expected {nbytes}")
        undo.pop_all()
    return file


def _mapped(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def in_use(path: str) -> bool:
    """Whether anyone has a view of the segment."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
