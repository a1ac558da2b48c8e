"""What SGLang is sent of a bucket: it opens as the bucket, with calls that SGLang allows, and no death on the far side takes it away."""

from __future__ import annotations

import base64
import inspect
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from rlinf.rollout.sglang_weights import offered
from rlinf.weights.opening import open_source
from rlinf.weights.segments import USERS
from rlinf.weights.shared_memory import SharedMemoryPublisher
from rlinf.weights.source import DeviceBucket, SharedMemory, TensorSpec

TENSORS = [("a", torch.randn(40, 8)), ("b", torch.randn(3).bfloat16()), ("scalar", torch.tensor(2.0))]
ALLOWED = {  # of SGLang 0.5.21's SafeUnpickler
    ("types", "SimpleNamespace"), ("torch.storage", "UntypedStorage"),
    *(("torch", name) for name in ("Tensor", "uint8", "float32", "bfloat16")),
    *(("torch.multiprocessing.reductions", f"rebuild_{what}") for what in ("cuda_tensor", "storage_filename", "tensor", "typed_storage")),
}  # fmt: skip
READER = """
import base64, pickle, sys, time
bucket = pickle.loads(base64.b64decode(sys.stdin.readline()))
total = bucket["flattened_tensor"].long().sum()
print(int(total), flush=True)
time.sleep(60)
"""


@pytest.fixture
def publisher() -> Iterator[SharedMemoryPublisher]:
    made = SharedMemoryPublisher(f"sglang-weights-{os.getpid()}")
    yield made
    made.close()


class Reader(pickle.Unpickler):
    """Opens what was sent if SGLang would; `found`: what it called for. instead: functions that stand in for others."""

    def __init__(self, payload: str, instead: dict[str, Any] | None = None) -> None:
        super().__init__(io.BytesIO(base64.b64decode(payload)))
        self.instead, self.found = instead or {}, set()

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in ALLOWED
        self.found.add(name)
        return self.instead.get(name) or super().find_class(module, name)


def tensors_of(bucket: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """As SGLang takes a flattened bucket apart."""
    flat = bucket["flattened_tensor"]
    return [(m.name, flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape)) for m in bucket["metadata"]]


def test_what_is_sent_opens_as_the_bucket_with_calls_that_are_allowed(publisher: SharedMemoryPublisher) -> None:
    (bucket,) = publisher.publish(TENSORS, 1).buckets
    link = Path(f"{bucket.key}-link")
    for _ in range(2):
        with offered(bucket, link) as payload:
            reader = Reader(payload)
            received = tensors_of(reader.load())
            assert [name for name, _ in received] == [name for name, _ in TENSORS]
            assert all(torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(received, TENSORS, strict=True))
            assert "rebuild_storage_filename" in reader.found
            del received
        assert not link.exists() and os.path.exists(bucket.key)
    assert len(list(open_source(SharedMemory((bucket,))))) == len(TENSORS)
    with open(bucket.key, "rb") as file:
        assert USERS - 10 < int.from_bytes(file.read(8), "little") <= USERS


def test_a_reader_that_is_killed_leaves_the_bucket_where_it_is(publisher: SharedMemoryPublisher) -> None:
    (bucket,) = publisher.publish(TENSORS, 1).buckets
    link = Path(f"{bucket.key}-link")
    with offered(bucket, link) as payload:
        reader = subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        reader.stdin.write(f"{payload}\n")
        reader.stdin.flush()
        assert int(reader.stdout.readline()) > 0
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        deadline = time.monotonic() + 30
        while link.exists() and time.monotonic() < deadline:  # torch's helper hears of it
            time.sleep(0.05)
        assert not link.exists()
    assert len(list(open_source(SharedMemory((bucket,))))) == len(TENSORS)


def test_a_handle_of_cuda_goes_to_the_function_that_opens_it() -> None:
    handle = ("GPU-1234", b"memory", 4096, 512, b"counter", 3, b"event", True)
    bucket = DeviceBucket("/dev/shm/none", 4096, (TensorSpec("a", "float32", (4, 8), 0, 128),), 0, handle)
    with offered(bucket, Path("/dev/shm/none-link")) as payload:
        calls = []
        Reader(payload, {"rebuild_cuda_tensor": lambda *arguments: calls.append(arguments)}).load()
    told = inspect.signature(rebuild_cuda_tensor).bind(*calls[0]).arguments
    assert told == {
        "tensor_cls": torch.Tensor, "tensor_size": (4096,), "tensor_stride": (1,), "tensor_offset": 0, "storage_cls": torch.UntypedStorage,
        "dtype": torch.uint8, "storage_device": "GPU-1234", "storage_handle": b"memory", "storage_size_bytes": 4096,
        "storage_offset_bytes": 512, "requires_grad": False, "ref_counter_handle": b"counter", "ref_counter_offset": 3,
        "event_handle": b"event", "event_sync_required": True,
    }  # fmt: skip
