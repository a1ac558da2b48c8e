"""Weights into servers' own process groups over real gloo; the servers are stand-ins that join as torch's `tcp://` rendezvous has it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from rlinf.errors import RunFailed
from rlinf.weights.broadcast import open_store
from rlinf.weights.buckets import Named
from rlinf.weights.routes import BROADCAST, BroadcastGroup, Feed, broadcast_groups
from rlinf.weights.server_groups import MAKING, Follower, ServerWire
from rlinf.weights.source import Broadcast, BucketSpec

HOST = "127.0.0.1"
CPU = torch.device("cpu")
STAGES = [[("a", torch.randn(40, 8)), ("b", torch.randn(3).bfloat16())], [("scalar", torch.tensor(2.0)), ("big", torch.randn(2000))]]
GROUPS = broadcast_groups((Feed(0, BROADCAST),) * 2, width=1, pp=2, dp=1, engine_ranks=2)
Taken = list[tuple[BucketSpec, list[Tensor]]]


def publish(port: int, group: BroadcastGroup, tensors: list[Named], rounds: int, timeout: float = 20.0) -> list[Broadcast]:
    wire = ServerWire(group, open_store(HOST, port, keeps=False), CPU, timeout)
    sent = [wire.send(tensors, version, bucket_bytes=1000) for version in range(rounds)]
    return sent


def join(port: int, group: BroadcastGroup, rank: int) -> dist.ProcessGroupGloo:
    """One rank of a server."""
    store, *_ = next(rendezvous(f"tcp://{HOST}:{port}", rank, len(group.members), timeout=timedelta(seconds=20)))
    for prefix in (group.name, f"{group.name}/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    return dist.ProcessGroupGloo(store, rank, len(group.members), timedelta(seconds=20))


def server(port: int, engine: int, rounds: int) -> list[Taken]:
    """A worker and the two ranks of its server; by round, what came with each description to the ranks, one after the other."""
    followers = [Follower(group, engine, open_store(HOST, port, keeps=False), 20.0) for group in GROUPS]
    made = []
    for follower in followers:
        with follower.together(MAKING), ThreadPoolExecutor(2) as ranks:
            made.append(list(ranks.map(lambda k, f=follower: join(port, f.group, f.first_rank + k), (0, 1))))
    found: list[Taken] = []
    for version in range(rounds):
        taken: Taken = []
        for follower, ranks in zip(followers, made):
            with follower.together(follower.coming(version)):
                for bucket in follower.descriptions():
                    arrived = [[torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for t in bucket.tensors] for _ in ranks]
                    for work in [rank.broadcast(t, 0) for rank, tensors in zip(ranks, arrived) for t in tensors]:
                        work.wait()
                    taken.append((bucket, [t for tensors in arrived for t in tensors]))
        found.append(taken)
    return found


def test_two_stages_reach_every_rank_of_two_servers_round_after_round() -> None:
    assert [g.members[1:3] for g in GROUPS] == [("rollout rank 0 (TP rank 0)", "rollout rank 0 (TP rank 1)")] * 2
    store = open_store(HOST, 0, keeps=True)
    with ThreadPoolExecutor(4) as threads:
        sending = [threads.submit(publish, store.port, group, stage, 3) for group, stage in zip(GROUPS, STAGES)]
        servers = [threads.submit(server, store.port, engine, 3) for engine in (0, 1)]
        sent, received = [s.result(60) for s in sending], [r.result(60) for r in servers]
    expected = dict(STAGES[0] + STAGES[1])
    for found in received:
        for version, taken in enumerate(found):
            assert [bucket for bucket, _ in taken] == [b for stage in sent for b in stage[version].buckets]
            assert len({bucket.key for bucket, _ in taken}) == len(taken) == 4
            names = [t.name for bucket, _ in taken for t in bucket.tensors]
            assert names == [*expected]
            for bucket, tensors in taken:
                assert all(torch.equal(tensor, expected[t.name]) for tensor, t in zip(tensors, bucket.tensors * 2, strict=True))


def test_a_tensor_that_is_not_finite_is_not_sent() -> None:
    group, store = BroadcastGroup(0, 0, 0, ()), open_store(HOST, 0, keeps=True)
    spoiled = [("good", torch.ones(3)), ("bad", torch.tensor([1.0, float("nan")]))]
    with pytest.raises(RunFailed, match="weights of version 0 are not sent: tensor bad holds values that are not finite"):
        publish(store.port, group, spoiled, 1)


def test_descriptions_are_at_the_store_until_they_are_forgotten() -> None:
    store = open_store(HOST, 0, keeps=True)
    wire = ServerWire(BroadcastGroup(0, 0, 0, ()), open_store(HOST, store.port, keeps=False), CPU, 20.0)
    before = store.num_keys()
    wire.send([("a", torch.ones(3))], 0)
    assert store.num_keys() == before + 3  # that it is there, a bucket, the end
    wire.forget()
    assert store.num_keys() == before + 1


def test_a_server_that_does_not_come_is_named() -> None:
    store = open_store(HOST, 0, keeps=True)
    with pytest.raises(RunFailed, match=r"actor rank 0 waited for 1 s at most; rollout rank 0 \(TP rank 0\), .* did not come"):
        publish(store.port, GROUPS[0], STAGES[0], 1, timeout=1.0)


def test_a_server_that_dies_between_two_rounds_is_named_with_its_last_words() -> None:
    (group,) = broadcast_groups((Feed(0, BROADCAST),), width=1, pp=1, dp=1)
    store = open_store(HOST, 0, keeps=True)

    def dies() -> None:
        follower = Follower(group, 0, open_store(HOST, store.port, keeps=False), 20.0)
        rank = join(store.port, group, 1)
        with follower.together(follower.coming(0)):
            del rank
            raise RuntimeError("its scheduler ended")

    with ThreadPoolExecutor(2) as threads:
        sending, dying = threads.submit(publish, store.port, group, [("a", torch.zeros(1 << 20))] * 8, 1), threads.submit(dies)
        with pytest.raises(RunFailed, match=r"version 0, round 0.*rollout rank 0 stopped: its scheduler ended"):
            sending.result(60)
        with pytest.raises(RunFailed, match="its scheduler ended"):
            dying.result(60)
