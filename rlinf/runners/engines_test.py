"""Engines that die, die again, or stand still, while several calls wait for each."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any, NamedTuple

from ray.exceptions import RayActorError

from rlinf.cluster.failure import Failure
from rlinf.cluster.group import Ref
from rlinf.cluster.ray_group import RayWorkerGroup
from rlinf.errors import WorkerLost
from rlinf.runners.engines import Engines
from rlinf.scheduling.placement import Seat


class Asked(NamedTuple):
    """As much of a Ref as is asked for."""

    rank: int
    life: int
    method: str


class Group:
    """Each life of rank 0 answers at once, or, while it is one of the mute ones, only by its end; the other ranks answer at once."""

    def __init__(self, deaths_in_restart: int = 0, mute_lives: int = 0, size: int = 1) -> None:
        self.size, self.lives, self.deaths_allowed = size, [0] * size, 9
        self.deaths_in_restart, self.mute_lives = deaths_in_restart, mute_lives
        self.ends, self.killed, self.asked = asyncio.Event(), [], []

    def ref(self, rank: int, method: str, *args: Any) -> Asked:
        self.asked.append(Asked(rank, self.lives[rank], method))
        return self.asked[-1]

    async def fetch(self, ref: Asked) -> str:
        if ref.rank == 0 and ref.life < self.mute_lives:
            await self.ends.wait()
            raise WorkerLost(f"life {ref.life}")
        return f"{ref.method} by life {ref.life}"

    async def results(self, refs: list[Asked]) -> list[str]:
        return await asyncio.gather(*map(self.fetch, refs))

    def kill(self, rank: int) -> None:
        self.killed.append(self.lives[rank])
        self.ends.set()

    async def restart(self, rank: int) -> None:
        self.lives[rank] += 1
        await asyncio.sleep(0.01)
        if self.lives[rank] <= self.deaths_in_restart:
            raise WorkerLost(f"life {self.lives[rank]} did not begin")


class Seats:
    """The dispatcher's doors."""

    def __init__(self) -> None:
        self.open_doors, self.moves = {0}, []

    def close(self, rank: int) -> None:
        self.open_doors.discard(rank)
        self.moves.append("close")

    def open(self, rank: int) -> None:
        self.open_doors.add(rank)
        self.moves.append("open")


def test_all_who_lost_the_same_worker_wait_for_one_restart() -> None:
    async def run() -> None:
        group, seats = Group(), Seats()
        engines = Engines(group, seats, 0)  # type: ignore[arg-type]
        loss = WorkerLost("life 0")
        await asyncio.gather(*(engines.revive(0, loss) for _ in range(5)))
        await engines.revive(0, loss)  # a call whose error came late
        assert group.lives == [1] and engines.restarted == 1 and seats.moves == ["close", "open"]
        await engines.revive(0, WorkerLost("life 1"))
        assert group.lives == [2] and engines.restarted == 2

    asyncio.run(run())


def test_a_worker_that_dies_while_it_starts_is_started_once_more() -> None:
    async def run() -> None:
        group, seats = Group(deaths_in_restart=2), Seats()
        engines, loaded = Engines(group, seats, 0), []  # type: ignore[arg-type]

        async def load(rank: int) -> None:
            loaded.append(group.lives[rank])

        engines.load = load
        await engines.revive(0, WorkerLost("life 0"))
        assert group.lives == [3] and loaded == [3] and engines.restarted == 1 and seats.open_doors == {0}

    asyncio.run(run())


def test_who_does_not_answer_is_ended_once_and_asked_again() -> None:
    async def run() -> None:
        group = Group(mute_lives=1)
        engines = Engines(group, Seats(), 0.2)  # type: ignore[arg-type]
        began = asyncio.get_running_loop().time()
        answers = await asyncio.gather(engines.ask_all("sequence_logprobs"), engines.ask_all("stats"))
        assert 0.2 <= asyncio.get_running_loop().time() - began < 0.35  # one stall_timeout and a restart, not two
        assert answers == [["sequence_logprobs by life 1"], ["stats by life 1"]] and set(group.killed) == {0} and group.lives == [1]
        engines.end(0, life=0)  # somebody who noticed late
        assert set(group.killed) == {0}

    asyncio.run(run())


def test_only_the_one_that_dies_is_asked_again() -> None:
    async def run() -> None:
        group = Group(mute_lives=1, size=3)
        engines = Engines(group, Seats(), 0)  # type: ignore[arg-type]
        asked = asyncio.ensure_future(engines.ask_each("load", [("x",), ("y",), ("z",)]))
        await asyncio.sleep(0.01)
        group.ends.set()
        assert await asked == ["load by life 1", "load by life 0", "load by life 0"] and group.lives == [1, 0, 0]
        assert [(one.rank, one.life) for one in group.asked] == [(0, 0), (1, 0), (2, 0), (0, 1)]

    asyncio.run(run())


class Process:
    """An actor whose calls nobody answers."""

    def __getattr__(self, method: str) -> Any:
        return self

    def remote(self, *args: Any) -> Any:
        return self

    def future(self) -> Future[Any]:
        return Future()


def test_an_error_is_the_loss_of_the_life_that_was_asked() -> None:
    """Also when the next one stands already: the one who asks looks every 50 ms, and a restart begins at once."""

    async def run() -> None:
        group = RayWorkerGroup(
            "rollout", [Seat("rollout", 0, 0, (0,))], lambda seat: Process(), [], Failure(), 10.0, lambda: "step 3", lambda *_: None
        )
        group.deaths_allowed = 1
        asked = Ref(group, 0, "generate", object())
        assert group.lose(0, 0, "killed")
        group.lives[0] += 1
        found = await asyncio.wait_for(group.explain(RayActorError(), asked), 1.0)
        assert isinstance(found, WorkerLost) and str(found) == "killed"
        assert group.lose(0, 1, "killed again") is False

    asyncio.run(run())
