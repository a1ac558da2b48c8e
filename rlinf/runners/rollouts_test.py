"""What a step's measure of the engines is made of."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np

from rlinf.config.schema import Config
from rlinf.rollout.contract import SamplingParams, Stop
from rlinf.runners.requests import GroupRequest
from rlinf.runners.rollouts import Rollouts
from tests.simulated_engines import Engines, Judges
from tests.virtual_time import run_virtually


def wanted(name: str, n: int) -> GroupRequest:
    prompt = SimpleNamespace(prompt_id=name, token_ids=np.ones(3, np.int32))
    return GroupRequest(name, prompt, n, SamplingParams(), Stop(), 16, lambda _: "samples")


async def decoded(engines: Engines) -> int:
    return sum([(await engines.stats(rank)).decoded_tokens for rank in range(engines.size)])


async def held_out_between_steps() -> None:
    engines = Engines(2, 64, 0)
    rollouts = Rollouts(Config(), engines, Judges())
    await rollouts.generate_groups([wanted("1.a", 4)])
    of_step = await decoded(engines)
    assert of_step > 0
    await rollouts.generate_held_out([wanted(f"val.{i}", 1) for i in range(8)])
    assert await decoded(engines) == 0  # a step behind it begins to count anew

    going = asyncio.ensure_future(rollouts.generate_groups([wanted(f"2.{i}", 4) for i in range(16)]))
    before = engines.tokens
    await rollouts.generate_held_out([wanted("val.0", 1)])
    assert not going.done() and await decoded(engines) == engines.tokens - before > 0  # nothing of a step is lost
    await going


def test_what_engines_count_for_held_out_problems_is_of_no_step() -> None:
    run_virtually(held_out_between_steps())
