"""Every tensor reaches every engine exactly once, from the nearest replica, in every shape of cluster."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from rlinf.weights.routes import (
    BROADCAST,
    DEVICE_IPC,
    DISK,
    OBJECT_STORE,
    SHARED_MEMORY,
    Feed,
    broadcast_groups,
    device_feeds,
    plan_feeds,
    publisher,
)

PER_NODE = 8


def publishers_of(tp: int, pp: int, dp: int, first_device: int = 0) -> list[list[int]]:
    """Nodes of the publishing ranks when ranks fill nodes of eight devices in order."""
    return [[(first_device + publisher(d, p, tp, dp)) // PER_NODE for p in range(pp)] for d in range(dp)]


@pytest.mark.parametrize("tp", range(1, 9))
def test_every_stage_reaches_every_engine_exactly_once(tp: int) -> None:
    """All layouts up to TP 8 x PP 8 x DP 4 into up to 16 engines of up to TP 8, collocated and on nodes of their own."""
    for pp, dp in product(range(1, 9), range(1, 5)):
        ranks, publishers = range(tp * pp * dp), publishers_of(tp, pp, dp)
        stage_of = {publisher(d, p, tp, dp): p for d in range(dp) for p in range(pp)}
        assert len(stage_of) == pp * dp and set(stage_of) <= set(ranks) and all(rank % tp == 0 for rank in stage_of)
        nodes_of = [{*stages} for stages in publishers]
        for engine_tp, apart in product(range(1, 9), (False, True)):
            start = -(-len(ranks) // PER_NODE) * PER_NODE if apart else 0  # disaggregated: nodes of their own
            engines = [(start + e * engine_tp) // PER_NODE for e in range(16)]
            feeds = plan_feeds(publishers, engines)
            for node, feed in zip(engines, feeds, strict=True):
                arrived = [stage_of[publisher(feed.replica, p, tp, dp)] for p in range(pp)]
                assert arrived == [*range(pp)]  # one replica feeds an engine, all its stages
                here = nodes_of[feed.replica] == {node}
                assert feed.transport == (SHARED_MEMORY if here else OBJECT_STORE)
                assert here or {node} not in nodes_of  # shared memory whenever some replica is whole on the node
            for replicas in range(1, 16):  # an engine's feed does not depend on the engines behind it
                assert plan_feeds(publishers, engines[:replicas]) == feeds[:replicas]


def test_each_node_of_a_collocated_cluster_feeds_its_own_engines() -> None:
    feeds = plan_feeds(publishers_of(2, 1, 64), [e // 4 for e in range(64)])
    assert {f.transport for f in feeds} == {SHARED_MEMORY}
    assert [f.replica for f in feeds] == [4 * (e // 4) for e in range(64)]  # the first replica of the engine's node


def test_a_replica_that_spans_nodes_sends_through_the_object_store() -> None:
    assert plan_feeds([[0, 1], [0, 1]], [0, 1, 2]) == (Feed(0, OBJECT_STORE),) * 3
    assert plan_feeds([[0, 1], [2, 2]], [1, 2]) == (Feed(0, OBJECT_STORE), Feed(1, SHARED_MEMORY))


def test_a_transport_that_was_asked_for_is_used_everywhere() -> None:
    for transport in (DISK, BROADCAST):
        assert plan_feeds([[0, 1], [2, 2]], [1, 2], transport) == (Feed(0, transport), Feed(1, transport))


def test_an_engine_is_fed_on_its_device_by_the_replica_that_is_wholly_there() -> None:
    two_stages = [[(0, 0), (0, 2)], [(0, 1), (0, 3)]]
    assert device_feeds([[(0, 0)], [(1, 0)]], [[(1, 0)], [(0, 0)]]) == (Feed(1, DEVICE_IPC), Feed(0, DEVICE_IPC))
    assert device_feeds(two_stages, [[(0, 0), (0, 1), (0, 2), (0, 3)]]) == (Feed(0, DEVICE_IPC),)
    assert device_feeds(two_stages, [[(0, 1), (0, 3)]]) == (Feed(1, DEVICE_IPC),)
    assert device_feeds(two_stages, [[(0, 0), (0, 1)]]) is None  # the second stages are elsewhere
    assert device_feeds([[(0, 0)]], [[(0, 0)], [(0, 1)]]) is None  # one engine is alone
    assert device_feeds([[(0, 0)]], [[(1, 0)]]) is None  # the same number on another node


@pytest.mark.parametrize("tp", range(1, 9))
def test_broadcast_groups_hold_every_stage_once_for_every_engine(tp: int) -> None:
    """That all processes make them in one order is shown where they are made: tests/test_group_creation.py."""
    for pp, dp, (replicas, engine_tp) in product(range(1, 9), range(1, 5), ((1, 8), (2, 4), (3, 2), (16, 1))):
        start = -(-tp * pp * dp // PER_NODE)
        feeds = plan_feeds(publishers_of(tp, pp, dp), [start + e for e in range(replicas)], BROADCAST)
        spread = tuple(Feed(e % dp, BROADCAST) for e in range(replicas))
        for chosen in (feeds, spread):
            groups = broadcast_groups(chosen, tp, pp, dp, engine_tp)
            for group in groups:
                assert len({*group.members}) == len(group.members) == 1 + engine_tp * len(group.engines)
                for engine in group.engines:  # what an engine's ranks are told is the rank of the first
                    first = group.members.index(group.names_of(engine)[0])
                    assert group.members[first : first + engine_tp] == group.names_of(engine)
            assert groups == tuple(sorted(groups))
            fed = Counter((e, g.stage) for g in groups for e in g.engines)
            assert fed == {(e, stage): 1 for e in range(replicas) for stage in range(pp)}  # every stage reaches every engine exactly once
            assert len({g.publisher for g in groups}) == len(groups)  # an actor rank has one group, and never waits for another
