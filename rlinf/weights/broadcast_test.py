"""The broadcast transport over real gloo groups, a thread for each member."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from rlinf.errors import RunFailed
from rlinf.weights import broadcast
from rlinf.weights.broadcast import Wire, open_store
from rlinf.weights.buckets import Named
from rlinf.weights.opening import open_source, release
from rlinf.weights.receipts import merge_sources
from rlinf.weights.routes import BROADCAST, BroadcastGroup, broadcast_groups, plan_feeds
from rlinf.weights.source import SharedMemory

CPU = torch.device("cpu")
STAGES = [[("a", torch.randn(40, 8)), ("b", torch.randn(3).bfloat16())], [("scalar", torch.tensor(2.0)), ("big", torch.randn(2000))]]
GROUPS = broadcast_groups(plan_feeds([[0, 0]], [1, 1], BROADCAST), width=1, pp=2, dp=1)


@pytest.fixture
def name() -> Iterator[str]:
    made = f"test-{uuid.uuid4().hex[:8]}"
    yield made
    assert not list(Path("/dev/shm").glob(f"rlinf-{made}*"))


def publish(port: int, group: BroadcastGroup, tensors: list[Named], versions: int) -> list[SharedMemory]:
    wire = Wire(group, group.members[0], open_store("127.0.0.1", port, keeps=False), CPU, 20.0)
    return [wire.send(tensors, version, bucket_bytes=1000) for version in range(versions)]


def engine(port: int, rank: int, name: str, versions: int) -> list[tuple[SharedMemory, dict[str, str]]]:
    wires = [Wire(group, f"rollout rank {rank}", open_store("127.0.0.1", port, keeps=False), CPU, 20.0) for group in GROUPS]
    found = []
    for version in range(versions):
        parts = [wire.receive(f"{name}-r{rank}", version) for wire in wires]
        found.append((merge_sources([part for part, _ in parts]), {own: sent for _, keys in parts for own, sent in keys.items()}))
    return found


def test_two_stages_reach_two_engines_version_after_version(name: str) -> None:
    assert [(g.publisher, g.engines) for g in GROUPS] == [(0, (0, 1)), (1, (0, 1))]
    store = open_store("127.0.0.1", 0, keeps=True)
    with ThreadPoolExecutor(4) as threads:
        sending = [threads.submit(publish, store.port, group, stage, 2) for group, stage in zip(GROUPS, STAGES)]
        receiving = [threads.submit(engine, store.port, rank, name, 2) for rank in (0, 1)]
        sent, received = [s.result(60) for s in sending], [r.result(60) for r in receiving]
    for found in received:
        for version, (landed, keys) in enumerate(found):
            whole = merge_sources([stage[version] for stage in sent])
            assert {keys[b.key]: b.checksum for b in landed.buckets} == {b.key: b.checksum for b in whole.buckets}
            arrived = list(open_source(landed))
            assert all(
                n == m and torch.equal(a, b) and a.dtype == b.dtype for (n, a), (m, b) in zip(arrived, STAGES[0] + STAGES[1], strict=True)
            )
            release(landed)


def test_a_member_that_does_not_come_is_named() -> None:
    store = open_store("127.0.0.1", 0, keeps=True)
    with pytest.raises(RunFailed, match="actor rank 0 waited for 1 s at most; rollout rank 0, rollout rank 1 did not come"):
        Wire(GROUPS[0], "actor rank 0", open_store("127.0.0.1", store.port, keeps=False), CPU, 1.0)


def test_members_that_meet_over_nccl_have_the_whole_timeout_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL makes its group in the first broadcast; who is early waits at the store, by the store's own timeout."""
    made: list[float] = []

    def process_group(store: dist.Store, rank: int, size: int, options: SimpleNamespace) -> None:
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            store.get("the publisher's id")
        made.append(time.monotonic() - began)

    process_group.Options = SimpleNamespace
    monkeypatch.setattr(dist, "ProcessGroupNCCL", process_group, raising=False)
    monkeypatch.setattr(broadcast, "GRACE", 0.1)
    store = open_store("127.0.0.1", 0, keeps=True)
    there = dist.PrefixStore("a group", open_store("127.0.0.1", store.port, keeps=False))
    broadcast.make_process_group(there, 1, 2, torch.device("cuda"), 1.5)
    assert made[0] >= 1.4


def test_an_engine_that_stops_between_two_versions_is_named(name: str) -> None:
    (group,) = broadcast_groups(plan_feeds([[0]], [1], BROADCAST), width=1, pp=1, dp=1)
    store = open_store("127.0.0.1", 0, keeps=True)

    def silent() -> Wire:
        wire = Wire(group, "rollout rank 0", open_store("127.0.0.1", store.port, keeps=False), CPU, 20.0)
        release(wire.receive(name, 0)[0])
        return wire

    def send(versions: int) -> None:
        wire = Wire(group, "actor rank 0", open_store("127.0.0.1", store.port, keeps=False), CPU, 2.0)
        for version in range(versions):
            wire.send([("a", torch.zeros(1 << 20))] * 8, version)

    with ThreadPoolExecutor(2) as threads:
        sending, receiving = threads.submit(send, 2), threads.submit(silent)
        alive = receiving.result(60)  # it lives, and does nothing
        with pytest.raises(RunFailed, match=r"replica 0, stage 0, version 1.*rollout rank 0 did not come"):
            sending.result(60)
    assert alive.group is group
