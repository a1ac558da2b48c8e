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
    BroadcastGroup,
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


@pytest.mark.parametrize(("tp", "pp", "dp"), list(product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4))))
def test_every_stage_reaches_every_engine_exactly_once(tp: int, pp: int, dp: int) -> None:
    ranks = range(tp * pp * dp)
    stage_of = {publisher(d, p, tp, dp): p for d in range(dp) for p in range(pp)}
    assert len(stage_of) == pp * dp and set(stage_of) <= set(ranks) and all(rank % tp == 0 for rank in stage_of)
    for engine_tp, replicas, apart in product((1, 2, 4, 8), (1, 2, 3, 16), (False, True)):
        devices = tp * pp * dp
        start = -(-devices // PER_NODE) * PER_NODE if apart else 0  # disaggregated: nodes of their own
        engines = [(start + e * engine_tp) // PER_NODE for e in range(replicas)]
        publishers = publishers_of(tp, pp, dp)
        feeds = plan_feeds(publishers, engines)
        assert len(feeds) == replicas
        for node, feed in zip(engines, feeds):
            arrived = Counter(stage_of[publisher(feed.replica, p, tp, dp)] for p in range(pp))
            assert arrived == {p: 1 for p in range(pp)}  # one replica feeds an engine, all its stages
            here = set(publishers[feed.replica]) == {node}
            assert feed.transport == (SHARED_MEMORY if here else OBJECT_STORE)
            if not here:  # shared memory whenever some replica is whole on the node
                assert all(set(stages) != {node} for stages in publishers)


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


def made_in_order(groups: tuple[BroadcastGroup, ...], orders: dict[str, list[BroadcastGroup]]) -> bool:
    """Whether all groups come about when every member waits in its first unmade group until all members are there."""
    left = {member: [*mine] for member, mine in orders.items()}
    while any(left.values()):
        ready = [g for g in groups if all(left[m] and left[m][0] == g for m in g.members)]
        if not ready:
            return False
        for group in ready:
            for member in group.members:
                left[member].pop(0)
    return True


@pytest.mark.parametrize(("tp", "pp", "dp"), list(product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4))))
def test_no_two_processes_make_broadcast_groups_in_opposite_orders(tp: int, pp: int, dp: int) -> None:
    for replicas, engine_tp in ((1, 8), (2, 4), (3, 2), (16, 1)):
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
            orders = {m: [g for g in groups if m in g.members] for group in groups for m in group.members}
            position = {group: i for i, group in enumerate(groups)}
            assert all([position[g] for g in mine] == sorted(position[g] for g in mine) for mine in orders.values())
            assert made_in_order(groups, orders)
            fed = Counter((e, g.stage) for g in groups for e in g.engines)
            assert fed == {(e, stage): 1 for e in range(replicas) for stage in range(pp)}  # every stage reaches every engine exactly once
            assert len({g.publisher for g in groups}) == len(groups)  # an actor rank has one group, and never waits for another


def test_opposite_orders_would_stand_still() -> None:
    """That the test above could fail."""
    groups = broadcast_groups((Feed(0, BROADCAST), Feed(0, BROADCAST)), 1, 2, 1)
    orders = {m: [g for g in groups if m in g.members] for group in groups for m in group.members}
    assert made_in_order(groups, orders)
    assert not made_in_order(groups, orders | {"rollout rank 1": orders["rollout rank 1"][::-1]})
