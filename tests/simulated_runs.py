"""Runs with the real schedules and simulated engines on a clock that jumps, for tests and benchmarks/asynchrony.py."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from rlinf.config.schema import Config
from rlinf.data.sampler import PromptSampler
from rlinf.rollout.contract import SamplingParams, Stop
from rlinf.runners.requests import GroupRequest, name_groups
from rlinf.runners.rollouts import Rollouts
from rlinf.runners.schedule import GroupsOnDisk, Schedule
from rlinf.runners.schedule_logical import Logical
from rlinf.runners.schedule_wallclock import Wallclock
from rlinf.runners.step_metrics import staleness_metrics
from tests.simulated_engines import Engines, Judges
from tests.virtual_time import run_virtually

GROUPS, SAMPLES, PROMPTS = 16, 4, 4000
UPDATE = 300.0  # seconds that the actor trains


@dataclass
class Outcome:
    """steps: the groups of each step. ages: for each group, its step minus the step in which it was begun."""

    seconds: float = 0.0
    steps: list[list[str]] = field(default_factory=list)
    stale: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    engines: Engines | None = None


def config_of(schedule: str, eta: int, **rollout: Any) -> Config:
    config = Config()
    config.algorithm.schedule, config.algorithm.max_staleness, config.algorithm.group_size = schedule, eta, SAMPLES
    config.rollout.max_running_requests = 2 * GROUPS * SAMPLES
    config.runner.max_epochs = 10
    for name, value in rollout.items():
        (section,) = [part for part in (config.algorithm, config.rollout, config.runner) if hasattr(part, name)]
        setattr(section, name, value)
    return config


def make(
    config: Config, steps: int, seed: int, right: float = 0.5, prompts: int = PROMPTS, groups: int = GROUPS
) -> tuple[Schedule, Engines, Rollouts, Judges]:
    engines, judges = Engines(2, 2 * GROUPS * SAMPLES, seed), Judges(right)
    rollouts = Rollouts(config, engines, judges)
    sampler = PromptSampler(prompts, groups, True, seed)

    def requests(step: int, indices: Sequence[int], taken: Counter[str]) -> list[GroupRequest]:
        prompts = [SimpleNamespace(prompt_id=f"p{i}", token_ids=np.ones(3, np.int32)) for i in indices]
        return [
            GroupRequest(name, p, SAMPLES, SamplingParams(), Stop(), 16, lambda _: samples(step))
            for name, p in zip(name_groups(step, prompts, taken), prompts)
        ]

    kind = {"logical": Logical, "wallclock": Wallclock}[config.algorithm.schedule]
    return kind(config, sampler, rollouts, GroupsOnDisk(judges, samples), requests, steps), engines, rollouts, judges


def samples(step: int) -> str:
    return f"samples of {step}"


async def loop(config: Config, steps: int, seed: int, right: float, look: Callable[[Schedule, Engines], None] = lambda *_: None) -> Outcome:
    schedule, engines, rollouts, _ = make(config, steps, seed, right)
    found, clock = Outcome(engines=engines), asyncio.get_running_loop()
    for step in range(1, steps + 1):
        batch = await schedule.take(step)
        await schedule.before_training()
        before = engines.tokens
        found.steps.append([h.group_id for h, _ in batch.scored])
        found.stale.append(staleness_metrics([h for h, _ in batch.scored], step - 1)["rollout/staleness_max"])
        found.metrics.append(batch.metrics)
        await asyncio.sleep(UPDATE)
        if config.rollout.partial:
            assert engines.tokens == before, "the engines were to stand still"
        await schedule.before_sync()
        engines.version = step
        look(schedule, engines)
    found.seconds, found.lengths = clock.time(), engines.lengths
    return found


def play(schedule: str, eta: int, steps: int, seed: int = 0, right: float = 0.5, **rollout: Any) -> Outcome:
    return run_virtually(loop(config_of(schedule, eta, **rollout), steps, seed, right))
