"""One pass over the bytes of buckets: a checksum, whether all values are finite, and on request a copy.

The checksum is the sum of (2i + 1) x_i modulo 2^64 over the unsigned 32-bit words x_i; bytes that the last word lacks count as 0. It is
exact on any device, and each part of the bytes can be summed by itself, so that many threads share the work and do something else with
the bytes in the same pass. One changed word always changes it, since an odd factor loses nothing; so do two different words that change
places, since their difference is below 2^32 and that of their factors, in a bucket below 16 GiB, too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinf.errors import RunFailed
from rlinf.kernels.cpu import EXPONENT, RUN, kernels
from rlinf.weights.buckets import Named, view
from rlinf.weights.source import BucketSpec, TensorSpec

PIECE_BYTES = 8 << 20  # at most, that one thread scans at a time
WORDS_AT_ONCE = 1 << 22  # of a checksum on a GPU: three times 32 MiB to compute with
SUMMED = 1 << 10  # words in a row of a checksum by numpy

Row = tuple[int, int, int, int, torch.dtype]


class Scan:
    """Threads of a pool scan runs of bytes on a CPU, and copy those that have a target.

    rows: (address, address of the copy or 0, bytes, byte offset in the bucket, dtype) of each run. names: the tensor to which each run
    belongs, "" for none. held: objects that must stay in memory until the scan is done.
    """

    def __init__(self, rows: Sequence[Row], names: Sequence[str], held: Any, pool: Executor) -> None:
        self.names, self.held = names, held
        self.runs = np.array([(s, to, n, at // 4, 0, *EXPONENT.get(dtype, (0, 0)), 0) for s, to, n, at, dtype in rows], RUN)
        begins = np.flatnonzero(np.diff(np.cumsum(self.runs["nbytes"]) // PIECE_BYTES, prepend=-1))
        work = scan_function()
        self.futures = [pool.submit(work, part) for part in np.split(self.runs, begins[1:])]

    def checksum(self) -> int:
        """The checksum of the whole bucket; waits for all threads."""
        wait(self.futures)
        for future in self.futures:
            future.result()
        self.held = None  # a gathered bucket is as large as what was written of it
        return int(self.runs["sum"].sum(dtype=np.uint64))

    def with_checksums(self, specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The tensors with their parts of the checksum. To be called after checksum()."""
        parts: dict[str, int] = {}
        for name, part in zip(self.names, self.runs["sum"].tolist()):
            parts[name] = (parts.get(name, 0) + part) % 2**64
        return tuple(spec._replace(checksum=parts.get(spec.name, 0)) for spec in specs)

    def first_not_finite(self) -> str | None:
        """The first tensor with a value that is not finite, among those that were scanned for that. To be called after checksum()."""
        found = np.flatnonzero(self.runs["not_finite"])
        return self.names[found[0]] if len(found) else None

    def scanned_for_finite(self) -> set[str]:
        """The tensors that were scanned for values that are not finite; without compiled code, none."""
        if kernels() is None:
            return set()
        unknown = {self.names[i] for i in np.flatnonzero(self.runs["exponent"] == 0)}
        return {*self.names} - unknown


def scan_function() -> Callable[[np.ndarray], None]:
    """Fills in the results of an array of RUN."""
    compiled = kernels()
    return scan_by_numpy if compiled is None else compiled.scan


class CallingThread(Executor):
    """For a scan by the calling thread alone."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args, **kwargs))
        return done


def scan(buffer: Tensor, specs: Sequence[TensorSpec], pool: Executor) -> Scan:
    """Scan all bytes of a bucket on a CPU, divided as divide() says, each tensor for values that are not finite."""
    rows, names = [], []
    for spec, begin, end in divide(specs, len(buffer)):
        name, dtype = ("", torch.uint8) if spec is None else (spec.name, getattr(torch, spec.dtype))
        for at in range(begin, end, PIECE_BYTES):
            rows.append((buffer.data_ptr() + at, 0, min(PIECE_BYTES, end - at), at, dtype))
            names.append(name)
    return Scan(rows, names, buffer, pool)


def divide(specs: Sequence[TensorSpec], nbytes: int) -> list[tuple[TensorSpec | None, int, int]]:
    """(tensor, begin, end) of the parts of a bucket of `nbytes`, in bytes; what is between two tensors belongs to the first one, and what
    is before them to none.

    A tensor that does not begin at a multiple of 4 bytes, as happens in files, leaves the bucket undivided.
    """
    placed = sorted(specs, key=lambda spec: spec.offset)  # in files tensors lie in another order than they are named
    if any(spec.offset % 4 for spec in placed):
        placed = []
    begins = [0, *(spec.offset for spec in placed), nbytes]
    return list(zip([None, *placed], begins[:-1], begins[1:], strict=True))


def fill_and_scan(buffer: Tensor, specs: Sequence[TensorSpec], bucket: Sequence[Named], pool: Executor) -> Scan:
    """buckets.fill() on a CPU, with zeros between the tensors, and scan() in the same pass. The bucket is filled when the scan is done."""
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
    return Scan(rows, names, (buffer, bucket), pool)


def checksums(buffer: Tensor, specs: Sequence[TensorSpec]) -> tuple[tuple[TensorSpec, ...], int]:
    """The tensors of a bucket on any device with their parts of the checksum, and the checksum; on a CPU they are computed by the calling
    thread alone."""
    if buffer.device.type == "cpu":
        scanned = scan(buffer, specs, CallingThread())
        total = scanned.checksum()
        return scanned.with_checksums(specs), total
    return device_checksums(buffer, specs)


def device_checksums(buffer: Tensor, specs: Sequence[TensorSpec]) -> tuple[tuple[TensorSpec, ...], int]:
    """checksums() by torch's operations."""
    parts = divide(specs, len(buffer))
    sums = torch.stack([device_sum(buffer[begin:end], begin // 4) for _, begin, end in parts]).tolist()
    of_tensors = {spec.name: part % 2**64 for (spec, _, _), part in zip(parts, sums) if spec is not None}
    return tuple(spec._replace(checksum=of_tensors.get(spec.name, 0)) for spec in specs), sum(sums) % 2**64


def verify(bucket: BucketSpec, received: int, tensors: Sequence[TensorSpec]) -> None:
    """received: the checksum of the bytes that arrived; tensors: with their parts of it. Raises RunFailed, naming the first tensor that
    changed on the way, unless they are what was sent."""
    if received == bucket.checksum:
        return
    changed = next((f"tensor {sent.name}, " for sent, own in zip(bucket.tensors, tensors) if sent.checksum != own.checksum), "")
    raise RunFailed(f"weight bucket {bucket.key}: {changed}checksum {received:016x} as received, {bucket.checksum:016x} as sent")


def device_sum(buffer: Tensor, first: int = 0) -> Tensor:
    """The checksum modulo 2^64, as a signed number, of bytes whose first word has the number `first`; by torch's operations, part by part:
    a GPU may have no room for a second bucket as large as an embedding."""
    whole = buffer if len(buffer) % 4 == 0 else torch.nn.functional.pad(buffer, (0, -len(buffer) % 4))  # pad() copies in any case
    words = whole.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=buffer.device)
    for start in range(0, len(words), WORDS_AT_ONCE):
        part = words[start : start + WORDS_AT_ONCE].long() & 0xFFFFFFFF
        numbers = torch.arange(2 * (first + start) + 1, 2 * (first + start + len(part)), 2, device=buffer.device)
        total += (numbers * part).sum()
    return total


def scan_by_numpy(runs: np.ndarray) -> None:
    """What the compiled code does, except for the search for values that are not finite: torch's operations would start threads."""
    for run in runs:
        content = _bytes_at(run["source"], run["nbytes"])
        run["sum"] = numpy_checksum(content, int(run["first"]))
        if run["to"]:
            _bytes_at(run["to"], run["nbytes"])[:] = content


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
    return np.frombuffer(memoryview((ctypes.c_char * int(nbytes)).from_address(int(address))), np.uint8)
