"""What an engine opens is what was published, or it is told which bucket is at fault."""

import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlinf.errors import RunFailed, UserError
from rlinf.weights.opening import open_source, release
from rlinf.weights.segments import HEADER
from rlinf.weights.shared_memory import SharedMemoryPublisher
from rlinf.weights.source import Disk, SharedMemory

TENSORS = [("a", torch.randn(40, 8)), ("b", torch.randn(3).bfloat16()), ("scalar", torch.tensor(2.0)), ("big", torch.randn(2000))]


@pytest.fixture
def source() -> Iterator[SharedMemory]:
    publisher = SharedMemoryPublisher(f"test-{uuid.uuid4().hex[:8]}")
    yield publisher.publish(iter(TENSORS), 5, bucket_bytes=2048)
    publisher.close()


def test_views_outlive_the_segment_and_do_not_write_through(source: SharedMemory) -> None:
    first = dict(open_source(source))
    first["a"].zero_()
    second = dict(open_source(source))
    release(source)
    assert torch.equal(second["a"], TENSORS[0][1])
    assert not any(os.path.exists(b.key) for b in source.buckets)


def test_a_changed_byte_names_the_bucket(source: SharedMemory) -> None:
    with open(source.buckets[1].key, "r+b") as file:
        file.seek(100)
        file.write(b"\x7f")
    with pytest.raises(RunFailed, match=f"{source.buckets[1].key}: tensor {source.buckets[1].tensors[0].name}, checksum"):
        list(open_source(source))


def test_a_missing_segment_is_named(source: SharedMemory) -> None:
    os.unlink(source.buckets[1].key)
    with pytest.raises(RunFailed, match=f"{source.buckets[1].key}: it does not exist"):
        list(open_source(source))


def test_a_short_segment_is_named(source: SharedMemory) -> None:
    os.truncate(source.buckets[0].key, HEADER + 64)
    with pytest.raises(RunFailed, match=f"{source.buckets[0].key}: 64 bytes, expected {source.buckets[0].nbytes}"):
        list(open_source(source))


def test_a_name_that_comes_twice_is_refused(source: SharedMemory) -> None:
    doubled = replace(source, buckets=(*source.buckets, source.buckets[0]))
    with pytest.raises(RunFailed, match="tensor a was already"):
        list(open_source(doubled))


def test_a_folder_without_weights_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="safetensors"):
        list(open_source(Disk(str(tmp_path))))
