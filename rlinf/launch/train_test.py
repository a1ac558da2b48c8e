"""The order in which the workers of a run start; the cluster writes down what it is asked for."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest

from rlinf.config.schema import Config
from rlinf.launch.train import launch_generation, launch_workers
from rlinf.scheduling.placement import Plan, Seat

TOGETHER = {"actor": 0, "rollout": 0, "reward": 0, "critic": 0}


class Recorded:
    """A cluster, and each of its worker groups."""

    def __init__(self, device: str, asked: list[str], component: str = "") -> None:
        self.device, self.asked, self.component = device, asked, component
        self.deaths_allowed = 0

    def launch(self, plan: Plan, component: str, worker: str, *_: Any) -> Recorded:
        self.asked.append(f"{component} starts")
        return Recorded(self.device, self.asked, component)

    async def call_all(self, method: str, *args: Any) -> None:
        """Returns when all have started, as a real group's does."""
        self.asked.append(" ".join([self.component, method, *map(str, args)]))

    async def guard(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await work


def asked(device: str, backend: str, devices: dict[str, int], offload: bool = True) -> list[str]:
    config, found = Config(), []
    config.cluster.backend, config.rollout.offload, config.algorithm.adv_type = backend, offload, "gae"
    plan = Plan(tuple(Seat(name, 0, 0, (place,)) for name, place in devices.items()), "collocated")
    launch_workers(Recorded(device, found), plan, config)
    return found


@pytest.mark.parametrize(("backend", "deaths"), [("ray", 2), ("local", 0)])
def test_engines_with_a_process_of_their_own_may_die(backend: str, deaths: int) -> None:
    config = Config()
    config.cluster.backend, config.rollout.max_engine_restarts = backend, 2
    groups = launch_generation(Recorded("cpu", []), Plan((), "collocated"), config)
    assert (groups["rollout"].deaths_allowed, groups["reward"].deaths_allowed) == (deaths, 0)


def test_an_engine_starts_when_the_others_have_left_its_gpu_and_sleeps_until_the_first_weights() -> None:
    """It takes its share of what is free as it starts, and an actor that reads a checkpoint comes back before the first weights."""
    first = ["actor starts", "critic starts", "actor hand_over", "critic hand_over", "rollout starts", "reward starts"]
    assert asked("cuda", "ray", TOGETHER) == [*first, "rollout sleep ('kv', 'weights')"]
    assert asked("cuda", "ray", TOGETHER, offload=False) == first


@pytest.mark.parametrize(
    ("device", "backend", "devices"),
    [("cpu", "ray", TOGETHER), ("cuda", "local", TOGETHER), ("cuda", "ray", TOGETHER | {"rollout": 1})],
    ids=["cpu", "one process", "apart"],
)
def test_elsewhere_all_start_at_the_same_time(device: str, backend: str, devices: dict[str, int]) -> None:
    assert asked(device, backend, devices) == ["actor starts", "critic starts", "rollout starts", "reward starts"]
