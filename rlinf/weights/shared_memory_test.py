"""Shared memory hands over exactly what was published, and is written again when nobody has a view of it."""

import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlinf.errors import RunFailed
from rlinf.weights.opening import open_source, release
from rlinf.weights.segments import Mappings
from rlinf.weights.shared_memory import SharedMemoryPublisher, collect, land
from rlinf.weights.source import SharedMemory

TENSORS = [("a", torch.randn(40, 8)), ("b", torch.randn(3).bfloat16()), ("scalar", torch.tensor(2.0)), ("big", torch.randn(2000))]


@pytest.fixture
def run_id() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def source(run_id: str) -> Iterator[SharedMemory]:
    publisher = SharedMemoryPublisher(run_id)
    yield publisher.publish(iter(TENSORS), 5, bucket_bytes=2048)
    publisher.close()


def test_what_was_published_arrives(source: SharedMemory, run_id: str) -> None:
    received = list(open_source(source))
    assert [n for n, _ in received] == [n for n, _ in TENSORS] and len(source.buckets) == 2
    assert all(torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(received, TENSORS))
    for bucket in source.buckets:
        assert run_id in bucket.key and stat.S_IMODE(os.stat(bucket.key).st_mode) == 0o600


def test_a_failing_publisher_leaves_no_segment(run_id: str) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from TENSORS
        raise ArithmeticError("gather failed")

    with pytest.raises(ArithmeticError):
        SharedMemoryPublisher(run_id).publish(broken(), 0, bucket_bytes=512)
    assert not list(Path("/dev/shm").glob(f"rlinf-{run_id}-*"))


def test_the_segments_of_a_living_version_are_not_overwritten(source: SharedMemory, run_id: str) -> None:
    with pytest.raises(FileExistsError):
        SharedMemoryPublisher(run_id).publish(iter(TENSORS), 5)
    assert torch.equal(dict(open_source(source))["a"], TENSORS[0][1])


def files(run_id: str) -> dict[str, int]:
    return {path.name.removeprefix(f"rlinf-{run_id}-"): path.stat().st_ino for path in Path("/dev/shm").glob(f"rlinf-{run_id}-*")}


def test_the_next_version_goes_where_the_last_one_was(run_id: str) -> None:
    publisher = SharedMemoryPublisher(run_id)
    first = publisher.publish(iter(TENSORS), 1, bucket_bytes=2048)
    before = files(run_id)
    publisher.withdraw()
    assert set(files(run_id)) == {"spare-0", "spare-1"}
    with pytest.raises(RunFailed, match="v1-0: it does not exist"):
        list(open_source(first))
    second = publisher.publish(((name, t + 1) for name, t in TENSORS), 2, bucket_bytes=2048)
    assert set(files(run_id)) == {"v2-0", "v2-1"} and set(files(run_id).values()) == set(before.values())
    assert all(torch.equal(a, b + 1) for (_, a), (_, b) in zip(open_source(second), TENSORS, strict=True))
    publisher.publish([("other", torch.ones(5))], 3)
    assert set(files(run_id)) == {"v3-0"}
    publisher.close()
    assert not files(run_id)


def test_memory_that_is_not_kept_is_freed_but_where_a_reader_has_a_view(run_id: str) -> None:
    publisher = SharedMemoryPublisher(run_id)
    seen = dict(open_source(publisher.publish(iter(TENSORS), 1, bucket_bytes=2048)))
    view = seen.pop("big")
    seen.clear()
    publisher.withdraw(free=True)
    assert set(files(run_id)) == {"spare-1"} and torch.equal(view, TENSORS[3][1])
    del view
    publisher.withdraw(free=True)
    assert not files(run_id)
    assert len(list(open_source(publisher.publish(iter(TENSORS), 2)))) == len(TENSORS)
    publisher.close()


def test_a_segment_that_is_looked_at_is_not_written(run_id: str) -> None:
    publisher = SharedMemoryPublisher(run_id)
    seen = dict(open_source(publisher.publish(iter(TENSORS), 1, bucket_bytes=2048)))
    view = seen.pop("big")
    seen.clear()
    before = files(run_id)
    again = publisher.publish(((name, t + 1) for name, t in TENSORS), 2, bucket_bytes=2048)
    assert torch.equal(view, TENSORS[3][1])
    assert files(run_id)["v2-0"] == before["v1-0"] and files(run_id)["v2-1"] != before["v1-1"]
    assert torch.equal(dict(open_source(again))["big"], TENSORS[3][1] + 1)
    publisher.close()


def test_a_reader_keeps_its_mapping_of_what_is_written_again(run_id: str) -> None:
    publisher, mappings = SharedMemoryPublisher(run_id), Mappings()

    def version(number: int) -> dict[str, torch.Tensor]:
        tensors = dict(open_source(publisher.publish(((name, t + number) for name, t in TENSORS), number, bucket_bytes=2048), mappings))
        assert all(torch.equal(tensors[name], t + number) for name, t in TENSORS)
        return tensors

    first = version(1)
    address, view = first["a"].data_ptr(), first.pop("scalar")
    first.clear()
    second = version(2)  # not where the first still is
    assert second["a"].data_ptr() != address and view == TENSORS[2][1] + 1
    del view
    third = version(3)
    assert third["a"].data_ptr() == address and torch.equal(second["a"], TENSORS[0][1] + 2)
    publisher.close()
    assert not files(run_id) and torch.equal(third["big"], TENSORS[3][1] + 3)
    second.clear()
    third.clear()
    other = SharedMemoryPublisher(run_id)
    dict(open_source(other.publish(iter(TENSORS), 4), mappings)).clear()
    assert len(mappings._kept) == 1  # the removed ones are gone
    other.close()


def test_what_another_machine_sent_lands_with_its_checksums() -> None:
    run_id = f"land-{os.getpid()}"
    sent, arrays = collect(TENSORS, "d0-s0", bucket_bytes=2048)
    assert len(arrays) == len(sent.buckets) > 1 and not Path("/dev/shm/rlinf-d0-s0-0").exists()
    landed = land(sent, [a.copy() for a in arrays], run_id, version=3)
    assert [b.checksum for b in landed.buckets] == [b.checksum for b in sent.buckets]
    for (name, tensor), (own_name, own) in zip(TENSORS, open_source(landed), strict=True):
        assert name == own_name and torch.equal(tensor, own)
    release(landed)
    damaged = [a.copy() for a in arrays]
    damaged[-1][0] ^= 1
    landed = land(sent, damaged, run_id, version=4)
    with pytest.raises(RunFailed, match="as received"):
        list(open_source(landed))
    release(landed)
    with pytest.raises(ValueError):
        land(sent, arrays[:1], run_id, version=5)
    assert not list(Path("/dev/shm").glob(f"*{run_id}*"))
