"""Engines that die or hang in an evaluation; the line that a person watches."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlinf.config.schema import Config
from rlinf.data.records import Finish, GroupHeader, Status, Verdict
from rlinf.errors import RunFailed, WorkerLost
from rlinf.evaluation.runner import EvaluationRunner, Progress
from rlinf.rollout.contract import SamplingParams, Stop
from rlinf.runners.requests import GroupRequest
from tests.simulated_engines import Engines, Judges
from tests.virtual_time import run_virtually

SAMPLES, SLOTS = 8, 16  # of a group; of an engine


def group(status: Status, finish: Finish, extracted: str | None) -> GroupHeader:
    verdict = Verdict(0.0, status, extracted, "string", 0.0)
    return GroupHeader("g", "p", "math", 5, ("g/0", "g/1"), (30, 10), (30, 10), (finish,) * 2, (((0, 30),), ((0, 10),)), (verdict, verdict))


def test_a_line_at_most_every_ten_seconds_and_one_at_the_end() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress("base", samples=10, done=4, stream=stream, clock=lambda: now[0])
    now[0] = 100.0
    progress.begin()  # the engines are up
    now[0] = 104.0
    progress.finished(group(Status.RIGHT, Finish.STOP, "7"))
    assert stream.getvalue() == ""
    now[0] = 110.0
    progress.finished(group(Status.WRONG, Finish.LENGTH, None))
    assert stream.getvalue() == "base  samples 8/10  right 0.500  cut 0.500  no box 0.500  tokens/s 8  ETA 0:05\n"
    now[0] = 111.0
    progress.finished(group(Status.RIGHT, Finish.STOP, "7"))
    assert stream.getvalue().splitlines()[1].startswith("base  samples 10/10  right 0.667")


@dataclass
class Answer:
    """As much of a Ref as is asked for."""

    life: int
    header: asyncio.Future[GroupHeader]

    def __await__(self) -> Iterator[Any]:
        return self.header.__await__()


class Mortal(Engines):
    """Two engines; in its first `lives` lives engine 0 dies, or hangs if `mute`, when it has been asked for three groups."""

    def __init__(self, lives: int, mute: bool, deaths_allowed: int) -> None:
        super().__init__(2, SLOTS, 0)
        self.short_lives, self.mute, self.deaths_allowed = lives, mute, deaths_allowed
        self.taken: list[asyncio.Future[GroupHeader]] = []  # by engine 0 in this life
        self.killed: list[int] = []
        self.asked: list[str] = []

    async def ready(self) -> None: ...

    def ref(self, rank: int, method: str, *args: Any, returns: int = 1) -> Any:
        answer, payload = super().ref(rank, method, *args, returns=returns)
        self.asked.append(payload.name)
        if rank == 0 and self.lives[0] < self.short_lives:
            answer.cancel()
            answer = asyncio.get_running_loop().create_future()
            self.taken.append(answer)
            if len(self.taken) == 3 and not self.mute:
                self.die()
        return Answer(self.lives[rank], answer), payload

    def die(self) -> None:
        lost, self.taken = self.taken, []
        if not self.deaths_allowed:
            lost[0].set_exception(RunFailed("one death too many"))
            return
        loss = WorkerLost(f"life {self.lives[0]}")
        for answer in lost:
            answer.set_exception(loss)

    def kill(self, rank: int) -> None:
        self.killed.append(rank)
        self.die()

    async def restart(self, rank: int) -> None:
        self.deaths_allowed -= 1
        self.lives[rank] += 1
        await asyncio.sleep(60)


def evaluate(engines: Mortal, stall_timeout: int = 0) -> tuple[Judges, str]:
    """Evaluate twelve problems; returns the reward workers, and the last line that a person sees."""
    config, judges, stream = Config(), Judges(), io.StringIO()
    config.algorithm.group_size, config.rollout.max_running_requests = SAMPLES, SLOTS
    config.rollout.stall_timeout = stall_timeout
    judges.ready = engines.ready
    wanted = [
        GroupRequest(f"set/p{i}/0", prompt, SAMPLES, SamplingParams(), Stop(), 16, "parts/{}".format)
        for i in range(12)
        for prompt in [SimpleNamespace(prompt_id=f"p{i}", token_ids=np.ones(3, np.int32))]
    ]
    progress = Progress("base", 12 * SAMPLES, 0, stream)
    runner = EvaluationRunner(config, SimpleNamespace(), engines, judges, progress)  # type: ignore[arg-type]
    run_virtually(runner.run(wanted))
    return judges, stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize(("mute", "stall_timeout"), [(False, 0), (True, 5000)])
def test_an_engine_that_dies_or_hangs_costs_only_time(mute: bool, stall_timeout: int) -> None:
    engines, undisturbed = Mortal(lives=2, mute=mute, deaths_allowed=3), Mortal(lives=0, mute=False, deaths_allowed=0)
    judges, line = evaluate(engines, stall_timeout)
    clean, clean_line = evaluate(undisturbed)
    assert engines.lives == [2, 0] and bool(engines.killed) == mute
    assert sorted(judges.written) == sorted(clean.written) == sorted(("parts/0", f"set/p{i}/0") for i in range(12))
    assert sorted(engines.lengths) == sorted(undisturbed.lengths)  # noise is drawn by the names of groups
    assert set(engines.asked) == set(undisturbed.asked) and len(undisturbed.asked) == 12 < len(engines.asked)
    assert line.split("  tokens")[0] == clean_line.split("  tokens")[0]


def test_one_death_too_many_ends_an_evaluation() -> None:
    engines = Mortal(lives=2, mute=False, deaths_allowed=1)
    with pytest.raises(RunFailed, match="one death too many"):
        evaluate(engines)
    assert engines.lives == [1, 0]
