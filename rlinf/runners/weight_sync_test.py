"""Which way the weights take, by what the actor and its engines stand on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlinf.config.schema import Config
from rlinf.runners.weight_sync import WeightSync
from rlinf.scheduling.placement import Seat
from rlinf.weights.routes import AUTO, DEVICE_IPC, SHARED_MEMORY, Feed

SHARING = [(0, (0,)), (0, (1,))]  # (node, devices) of two engines that stand where two replicas of the actor do


def sync_of(
    engines: list[tuple[int, tuple[int, ...]]], on_gpu: bool, transport: str = AUTO, restarts: int = 0, tp: int = 1, away: bool = True
) -> WeightSync:
    config = Config()
    config.actor.offload_optimizer = away
    config.actor.model.tensor_model_parallel_size, config.rollout.weight_transport = tp, transport
    actor = SimpleNamespace(seats=tuple(Seat("actor", i, 0, (i,)) for i in range(2)), size=2)
    seats = tuple(Seat("rollout", i, node, devices) for i, (node, devices) in enumerate(engines))
    return WeightSync(config, actor, SimpleNamespace(group=SimpleNamespace(seats=seats, restarts=restarts)), [], on_gpu)


def test_on_a_shared_gpu_weights_stay_on_it() -> None:
    assert sync_of(SHARING, on_gpu=True).feeds == (Feed(0, DEVICE_IPC), Feed(1, DEVICE_IPC))
    assert sync_of(SHARING[::-1], on_gpu=True).feeds == (Feed(1, DEVICE_IPC), Feed(0, DEVICE_IPC))
    assert sync_of([(0, (0, 1))], on_gpu=True, tp=2).feeds == (Feed(0, DEVICE_IPC),)


@pytest.mark.parametrize(("engines", "on_gpu", "restarts", "tp"), [
    (SHARING, False, 0, 1),  # on CPU only when asked for
    (SHARING, True, 1, 1),  # they would have to lie on the device during rollout
    ([(0, (0,)), (0, (2,))], True, 0, 1),  # one engine has a device of its own
    (SHARING, True, 0, 2),  # the second engine is not where its replica publishes
])  # fmt: skip
def test_elsewhere_auto_is_what_it_was(engines: list[tuple[int, tuple[int, ...]]], on_gpu: bool, restarts: int, tp: int) -> None:
    assert {f.transport for f in sync_of(engines, on_gpu, restarts=restarts, tp=tp).feeds} == {SHARED_MEMORY}


def test_without_room_for_a_second_copy_auto_is_what_it_was() -> None:
    assert {f.transport for f in sync_of(SHARING, on_gpu=True, away=False).feeds} == {SHARED_MEMORY}


def test_on_cpu_it_is_done_when_asked_for() -> None:
    assert sync_of(SHARING, on_gpu=False, transport=DEVICE_IPC).feeds == (Feed(0, DEVICE_IPC), Feed(1, DEVICE_IPC))
