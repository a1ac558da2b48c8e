"""Which way the weights take, by what the actor and its engines stand on."""

from __future__ import annotations

from types import SimpleNamespace

from rlinf.config.schema import Config
from rlinf.runners.weight_sync import WeightSync
from rlinf.scheduling.placement import Seat
from rlinf.weights.routes import AUTO, DEVICE_IPC, SHARED_MEMORY, Feed

SHARING = [(0, (0,)), (0, (1,))]  # (node, devices) of two engines that stand where two replicas of the actor do


def sync_of(engines: list[tuple[int, tuple[int, ...]]], transport: str, tp: int = 1) -> WeightSync:
    config = Config()
    config.actor.model.tensor_model_parallel_size, config.rollout.weight_transport = tp, transport
    actor = SimpleNamespace(seats=tuple(Seat("actor", i, 0, (i,)) for i in range(2)), size=2)
    seats = tuple(Seat("rollout", i, node, devices) for i, (node, devices) in enumerate(engines))
    return WeightSync(config, actor, SimpleNamespace(group=SimpleNamespace(seats=seats, restarts=0)), [])


def test_each_engine_is_fed_on_its_device_when_that_is_asked_for() -> None:
    assert sync_of(SHARING, DEVICE_IPC).feeds == (Feed(0, DEVICE_IPC), Feed(1, DEVICE_IPC))
    assert sync_of(SHARING[::-1], DEVICE_IPC).feeds == (Feed(1, DEVICE_IPC), Feed(0, DEVICE_IPC))
    assert sync_of([(0, (0, 1))], DEVICE_IPC, tp=2).feeds == (Feed(0, DEVICE_IPC),)


def test_by_itself_a_run_takes_the_way_over_shared_memory() -> None:
    assert {f.transport for f in sync_of(SHARING, AUTO).feeds} == {SHARED_MEMORY}
