"""Which way the weights take, by what the actor and its engines stand on."""

from __future__ import annotations

from rlinf.config.schema import Config
from rlinf.scheduling.placement import Seat
from rlinf.scheduling.sync_plan import SyncPlan, plan_sync
from rlinf.weights.routes import AUTO, BROADCAST, DEVICE_IPC, OBJECT_STORE, SHARED_MEMORY, Feed

SHARING = [(0, (0,)), (0, (1,))]  # (node, devices) of two engines that stand where two replicas of the actor do


def plan(engines: list[tuple[int, tuple[int, ...]]], transport: str, tp: int = 1, ranks: int = 2) -> SyncPlan:
    config = Config()
    config.actor.model.tensor_model_parallel_size, config.rollout.weight_transport = tp, transport
    actor = [Seat("actor", i, 0, (i,)) for i in range(ranks)]
    return plan_sync(config, actor, [Seat("rollout", i, node, devices) for i, (node, devices) in enumerate(engines)])


def test_each_engine_is_fed_on_its_device_when_that_is_asked_for() -> None:
    assert plan(SHARING, DEVICE_IPC).feeds == (Feed(0, DEVICE_IPC), Feed(1, DEVICE_IPC))
    assert plan(SHARING[::-1], DEVICE_IPC).feeds == (Feed(1, DEVICE_IPC), Feed(0, DEVICE_IPC))
    assert plan([(0, (0, 1))], DEVICE_IPC, tp=2).feeds == (Feed(0, DEVICE_IPC),)


def test_by_itself_a_run_takes_the_way_over_shared_memory() -> None:
    assert {f.transport for f in plan(SHARING, AUTO).feeds} == {SHARED_MEMORY}


def test_ranks_whose_replica_feeds_no_engine_have_no_part_in_a_sync() -> None:
    mixed = plan([(0, (0,)), (1, (0,))], AUTO, tp=2, ranks=4)  # both engines are fed by the first of two replicas
    assert mixed.publishers == ((0,), (2,)) and {feed.replica for feed in mixed.feeds} == {0}
    assert mixed.transports == ((SHARED_MEMORY, OBJECT_STORE),) * 2 + ((),) * 2 and mixed.feeding == [0, 1]


def test_only_broadcasts_have_groups() -> None:
    assert plan(SHARING, AUTO).groups == ()
    groups = plan(SHARING, BROADCAST).groups
    assert groups == tuple(sorted(groups)) and [group.publisher for group in groups] == [0]
