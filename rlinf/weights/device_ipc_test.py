"""Buckets on the device: what arrives is what was published, nothing else passes, and the memory comes back."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlinf.errors import RunFailed
from rlinf.weights import device_ipc
from rlinf.weights.device_ipc import DeviceBuckets
from rlinf.weights.opening import open_source
from rlinf.weights.receipts import check_receipts, merge_sources
from rlinf.weights.source import DeviceIpc, Receipt

TENSORS = [("a", torch.randn(40, 8)), ("b", torch.randn(3).bfloat16()), ("scalar", torch.tensor(2.0)), ("big", torch.randn(2000))]


class Forgetful(dict):
    def __setitem__(self, key: object, value: object) -> None:
        """As if it were not this process's."""


@pytest.fixture(params=["publisher's process", "other process"])
def publisher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceBuckets]:
    """Its sources are opened here, and as another process does, which has the handle and no more."""
    if request.param == "other process":
        monkeypatch.setattr(device_ipc, "_OWN", Forgetful())
    made = DeviceBuckets(f"test-{uuid.uuid4().hex[:8]}", torch.device("cpu"))
    yield made
    made.close()
    assert not list(Path("/dev/shm").glob(f"rlinf-{made.name}-*"))


def publish(publisher: DeviceBuckets, version: int = 1, add: float = 0.0) -> DeviceIpc:
    return publisher.publish(((name, tensor + add) for name, tensor in TENSORS), version, bucket_bytes=2048)


def test_what_was_published_arrives_version_after_version(publisher: DeviceBuckets) -> None:
    for version in (1, 2):
        source = publish(publisher, version, add=version)
        received = list(open_source(source))
        assert len(source.buckets) == 2 and [name for name, _ in received] == [name for name, _ in TENSORS]
        assert all(torch.equal(a, b + version) and a.dtype == b.dtype for (_, a), (_, b) in zip(received, TENSORS))
        assert all(stat.S_IMODE(os.stat(b.key).st_mode) == 0o600 for b in source.buckets)
        del received
        publisher.withdraw()
        assert not any(os.path.exists(b.key) for b in source.buckets)


def test_a_changed_byte_names_the_bucket(publisher: DeviceBuckets) -> None:
    source = publish(publisher)
    publisher._offered[source.buckets[1].key][36] ^= 0x40
    with pytest.raises(RunFailed, match=f"{source.buckets[1].key}: tensor {source.buckets[1].tensors[0].name}, checksum"):
        list(open_source(source))


def test_buckets_that_changed_places_are_found(publisher: DeviceBuckets) -> None:
    halves = [("a", torch.randn(16)), ("b", torch.randn(16))]
    source = publisher.publish(halves, 1, bucket_bytes=64)
    first, second = source.buckets
    swapped = DeviceIpc((replace(first, key=second.key), replace(second, key=first.key)))
    with pytest.raises(RunFailed, match=f"{second.key}: tensor a, checksum"):
        list(open_source(swapped))


def test_a_stale_source_is_refused(publisher: DeviceBuckets) -> None:
    stale, fresh = publish(publisher, 1), publish(publisher, 2, add=1.0)
    with pytest.raises(RunFailed, match="v1-0: it does not exist"):
        list(open_source(stale))
    receipt = Receipt(2, {b.key: b.checksum for b in stale.buckets}, len(TENSORS), 0, 0.0)
    with pytest.raises(RunFailed, match=f"other bytes than were sent in bucket {fresh.buckets[0].key}"):
        check_receipts([fresh], 2, [receipt])


def test_a_dropped_bucket_is_found(publisher: DeviceBuckets) -> None:
    source = merge_sources([publish(publisher)])
    part = DeviceIpc(source.buckets[:-1])
    receipt = Receipt(1, {b.key: b.checksum for b in part.buckets}, len(list(open_source(part))), 0, 0.0)
    with pytest.raises(RunFailed, match=f"reports version 1 and 3 tensors; {len(TENSORS)} were sent"):
        check_receipts([source], 1, [receipt])


def test_a_view_that_outlives_the_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = DeviceBuckets("test-kept", torch.device("cpu"))
    source = publish(publisher)
    monkeypatch.setattr(device_ipc, "_OWN", {})
    kept = dict(open_source(source))["b"]
    with pytest.raises(RunFailed, match=f"{source.buckets[0].key}: an engine has answered and still looks at it"):
        publisher.withdraw()
    assert torch.equal(kept, TENSORS[1][1]) and not list(Path("/dev/shm").glob("rlinf-test-kept-*"))
    publisher.withdraw()


def test_a_failing_publisher_leaves_nothing(publisher: DeviceBuckets) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from TENSORS
        raise ArithmeticError("gather failed")

    with pytest.raises(ArithmeticError):
        publisher.publish(broken(), 0, bucket_bytes=512)
    assert not list(Path("/dev/shm").glob(f"rlinf-{publisher.name}-*"))
