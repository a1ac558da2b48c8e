"""Flat buckets: named tensors packed one after another into a run of bytes, with specs and a checksum.

The checksum is the sum of (2i + 1) x_i modulo 2^64 over the 32-bit words x_i, taken without a sign; missing bytes of the last are 0. It is
exact on any device, and of any part by itself, so that many hands can take it while they do something else with the bytes. One changed word
always changes it, since an odd factor loses nothing; so do two different words that change places, since their difference is below 2^32 and
that of their factors, in a bucket below 16 GiB, too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinf.cpu_kernels import EXPONENT, RUN, kernels
from rlinf.weights.source import TensorSpec

BUCKET_BYTES = 128 * 2**20
PIECE_BYTES = 8 << 20  # for one thread to look at
WORDS_AT_ONCE = 1 << 22  # of a checksum on a GPU: three times 32 MiB to compute with
SUMMED = 1 << 10  # words in a row of a checksum by numpy
ALIGNMENT = 64  # bytes: every tensor starts on a cache line, so that views of any dtype are aligned

Named = tuple[str, Tensor]


def group_into_buckets(tensors: Iterable[Named], bucket_bytes: int = BUCKET_BYTES) -> Iterator[list[Named]]:
    """Consecutive tensors whose packed size is at most `bucket_bytes`; a larger tensor gets a bucket of its own."""
    bucket: list[Named] = []
    filled = 0
    for name, tensor in tensors:
        size = aligned(tensor.nbytes)
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor))
        filled += size
    if bucket:
        yield bucket


def layout(bucket: Sequence[Named]) -> tuple[tuple[TensorSpec, ...], int]:
    """Where each tensor of a bucket goes, and the bytes of the whole."""
    specs = []
    offset = 0
    for name, tensor in bucket:
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name, dtype, tuple(tensor.shape), offset, tensor.nbytes))
        offset += aligned(tensor.nbytes)
    return tuple(specs), offset


def fill(buffer: Tensor, specs: Sequence[TensorSpec], bucket: Sequence[Named]) -> None:
    """Copy the tensors of a bucket into `buffer` (uint8, at least the bytes that `layout` named)."""
    for (_, target), (_, tensor) in zip(views(buffer, specs), bucket, strict=True):
        target.copy_(tensor)


def views(buffer: Tensor, specs: Sequence[TensorSpec]) -> Iterator[Named]:
    """The tensors of a bucket as views into its bytes."""
    for spec in specs:
        yield spec.name, view(buffer, spec)


def view(buffer: Tensor, spec: TensorSpec) -> Tensor:
    return buffer[spec.offset : spec.offset + spec.nbytes].view(getattr(torch, spec.dtype)).view(spec.shape)


class Look:
    """Runs of bytes on a CPU that threads of a pool look at, and copy where they are to go: their checksum, and which are not finite.

    rows: (address, address of the copy or 0, bytes, byte offset in the bucket, dtype) of a run; names: of the tensors that the runs are of,
    "" for none. held: what must live until all is done.
    """

    def __init__(self, rows: Sequence[Row], names: Sequence[str], held: Any, pool: Executor) -> None:
        self.names, self.held = names, held
        self.runs = np.array([(s, to, n, at // 4, 0, *EXPONENT.get(dtype, (0, 0)), 0) for s, to, n, at, dtype in rows], RUN)
        begins = np.flatnonzero(np.diff(np.cumsum(self.runs["nbytes"]) // PIECE_BYTES, prepend=-1))
        work = look_by_numpy if kernels() is None else kernels().look
        self.futures = [pool.submit(work, part) for part in np.split(self.runs, begins[1:])]

    def checksum(self) -> int:
        wait(self.futures)
        for future in self.futures:
            future.result()
        self.held = None  # a gathered bucket is as large as what was written of it
        return int(self.runs["sum"].sum(dtype=np.uint64))

    def spoiled(self) -> str | None:
        """The first tensor that is not finite, of those that were looked at for that."""
        found = np.flatnonzero(self.runs["spoiled"])
        return self.names[found[0]] if len(found) else None

    def known(self) -> set[str]:
        """The tensors that were looked at for values that are not finite."""
        if kernels() is None:
            return set()
        unknown = {self.names[i] for i in np.flatnonzero(self.runs["exponent"] == 0)}
        return {*self.names} - unknown


Row = tuple[int, int, int, int, torch.dtype]


def look_by_numpy(runs: np.ndarray) -> None:
    """What compiled code does, without a look for values that are not finite: torch's operations would start threads."""
    for run in runs:
        content = _bytes_at(run["source"], run["nbytes"])
        run["sum"] = numpy_checksum(content, int(run["first"]))
        if run["to"]:
            _bytes_at(run["to"], run["nbytes"])[:] = content


def fill_and_look(buffer: Tensor, specs: Sequence[TensorSpec], bucket: Sequence[Named], pool: Executor) -> Look:
    """`fill` on CPU with zeros between the tensors, done when the returned look is."""
    rows: list[Row] = []
    names: list[str] = []
    ends = [*(spec.offset for spec in specs[1:]), len(buffer)]
    start = buffer.data_ptr()
    for (name, tensor), spec, end in zip(bucket, specs, ends, strict=True):
        words = spec.offset + spec.nbytes // 4 * 4
        source, to = tensor.data_ptr(), start + spec.offset
        if words < end:
            buffer[words:end] = 0
        dtype = getattr(torch, spec.dtype)
        if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous() or spec.nbytes % 4:
            view(buffer, spec).copy_(tensor)
            source, to, words = to, 0, end
        elif words < end:
            rows.append((start + words, 0, end - words, words, torch.uint8))
            names.append("")
        for at in range(spec.offset, words, PIECE_BYTES):
            done = at - spec.offset
            rows.append((source + done, to and to + done, min(PIECE_BYTES, words - at), at, dtype))
            names.append(name)
    return Look(rows, names, (buffer, bucket), pool)


def look_at(buffer: Tensor, specs: Sequence[TensorSpec], pool: Executor) -> Look:
    """At all bytes of a bucket on a CPU; those behind a tensor count as its own.

    Where tensors do not begin at a word, which happens in files, nothing is looked for that is not finite.
    """
    placed = sorted(specs, key=lambda spec: spec.offset)  # in files tensors lie in another order than they are named
    if any(spec.offset % 4 for spec in placed):
        placed = []
    begins = [0, *(spec.offset for spec in placed), len(buffer)]
    kinds = [("", torch.uint8), *((spec.name, getattr(torch, spec.dtype)) for spec in placed)]
    rows, names = [], []
    for (name, dtype), begin, end in zip(kinds, begins[:-1], begins[1:], strict=True):
        for at in range(begin, end, PIECE_BYTES):
            rows.append((buffer.data_ptr() + at, 0, min(PIECE_BYTES, end - at), at, dtype))
            names.append(name)
    return Look(rows, names, buffer, pool)


def checksum(buffer: Tensor) -> int:
    """Of bytes on any device, by the calling thread alone where they are on a CPU."""
    if buffer.device.type == "cpu":
        run = np.zeros(1, RUN)
        run["source"], run["nbytes"] = buffer.data_ptr(), len(buffer)
        (look_by_numpy if kernels() is None else kernels().look)(run)
        return int(run["sum"][0])
    return device_checksum(buffer)


def device_checksum(buffer: Tensor) -> int:
    """By torch's operations, a part at a time: a GPU may have no room for a second bucket as large as an embedding."""
    whole = buffer if len(buffer) % 4 == 0 else torch.nn.functional.pad(buffer, (0, -len(buffer) % 4))  # pad() copies in any case
    words = whole.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=buffer.device)
    for start in range(0, len(words), WORDS_AT_ONCE):
        part = words[start : start + WORDS_AT_ONCE].long() & 0xFFFFFFFF
        total += (torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=buffer.device) * part).sum()
    return int(total) % 2**64


def numpy_checksum(content: np.ndarray, first: int) -> int:
    """Without compiled code. The number of a word is SUMMED times that of its row, plus that of its column: sums of both will do."""
    whole = len(content) // (4 * SUMMED) * 4 * SUMMED
    rows = content[:whole].view(np.uint32).reshape(-1, SUMMED)
    rest = np.frombuffer(content[whole:].tobytes() + bytes(-len(content) % 4), np.uint32)
    of_rows, of_columns = rows.sum(1, dtype=np.uint64), rows.sum(0, dtype=np.uint64)
    numbers = np.arange(max(SUMMED, len(rows)), dtype=np.uint64)
    with np.errstate(over="ignore"):
        total = (of_rows * (2 * SUMMED * numbers[: len(rows)])).sum() + (of_columns * (2 * numbers[:SUMMED] + (2 * first + 1))).sum()
        total += (rest * (2 * numbers[: len(rest)] + (2 * (first + whole // 4) + 1))).sum()
    return int(total)


def _bytes_at(address: int, nbytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * int(nbytes)).from_address(int(address)), np.uint8)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
