"""Engines that are started anew around a sync of weights."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from rlinf.config.schema import Config
from rlinf.errors import RunFailed, WorkerLost
from rlinf.rollout.contract import EngineStats
from rlinf.runners.engines import Engines
from rlinf.runners.weight_sync import WeightSync
from rlinf.scheduling.placement import Seat
from rlinf.weights.routes import SHARED_MEMORY
from rlinf.weights.source import BucketSpec, Receipt, SharedMemory
from tests.virtual_time import run_virtually

WRITE, LOAD, START = 20.0, 5.0, 30.0  # seconds: the actor's publish, an engine's load_weights, the start of a worker


class Actor:
    """offered: the version that can be read now."""

    size, seats, offered = 1, (Seat("actor", 0, 0, (0,)),), -1

    def ref(self, rank: int, method: str, version: int, transports: Any, returns: int) -> tuple[Any, None]:
        return self.publish(version), None

    async def publish(self, version: int) -> Any:
        self.offered = -1
        await asyncio.sleep(WRITE)
        self.offered = version
        return {SHARED_MEMORY: SharedMemory((BucketSpec(f"v{version}", 1, (), version),))}, WRITE

    async def results(self, calls: list[Any]) -> list[Any]:
        return await asyncio.gather(*calls)

    async def call_ranks(self, ranks: Any, method: str, *args: Any) -> None: ...


class Life:
    """Of an engine: holds the version that it was given last; -1 = what it was built with. load: seconds that it takes."""

    def __init__(self, actor: Actor, load: float) -> None:
        self.actor, self.load, self.holds = actor, load, -1
        self.built, self.dead, self.turn = asyncio.Event(), asyncio.Event(), asyncio.Lock()

    async def load_weights(self, offer: Any, version: int) -> tuple[Receipt, EngineStats]:
        await self.built.wait()
        async with self.turn:
            for seconds in (self.load, 0.0):  # they are to be there from the beginning to the end
                if self.actor.offered != version:
                    raise RunFailed(f"version {version} was withdrawn")
                await asyncio.sleep(seconds)
            self.holds = version
        return Receipt(version, {b.key: b.checksum for b in offer.value.buckets}, 0, 0, self.load), EngineStats()


class Rollout:
    """Two engines. loads: seconds that each new life of rank 0 takes to load weights."""

    size, seats, deaths_allowed = 2, (Seat("rollout", 0, 0, (0,)), Seat("rollout", 1, 0, (1,))), 9

    def __init__(self, actor: Actor, loads: list[float]) -> None:
        self.actor, self.loads, self.lives = actor, loads, [0, 0]
        self.engines = [Life(actor, LOAD), Life(actor, LOAD)]
        for engine in self.engines:
            engine.built.set()

    def ref(self, rank: int, method: str, *args: Any) -> Any:
        engine = self.engines[rank]

        async def until_dead() -> Any:
            done, dead = asyncio.ensure_future(getattr(engine, method)(*args)), asyncio.ensure_future(engine.dead.wait())
            await asyncio.wait({done, dead}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                done.cancel()
                raise WorkerLost(f"rank {rank} died")
            dead.cancel()
            return done.result()

        answer = asyncio.ensure_future(until_dead())
        answer.add_done_callback(lambda a: a.cancelled() or a.exception())
        return SimpleNamespace(rank=rank, life=self.lives[rank], method=method, answer=answer)

    async def fetch(self, ref: Any) -> Any:
        return await asyncio.shield(ref.answer)

    async def results(self, refs: list[Any]) -> list[Any]:
        return await asyncio.gather(*map(self.fetch, refs))

    def kill(self, rank: int) -> None:
        self.engines[rank].dead.set()

    async def restart(self, rank: int) -> None:
        self.lives[rank] += 1
        self.engines[rank] = engine = Life(self.actor, self.loads.pop(0) if self.loads else LOAD)
        await asyncio.sleep(START)
        engine.built.set()


class Doors:
    """The dispatcher's. opened: (rank, the version that it held) whenever one was opened."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout, self.opened = rollout, []

    def close(self, rank: int) -> None: ...

    def open(self, rank: int) -> None:
        self.opened.append((rank, self.rollout.engines[rank].holds))


async def sync_around(begun: float, loads: list[float], stall_timeout: float = 0) -> tuple[Rollout, Doors]:
    """Two syncs; engine 0 dies, and its start is begun, so many seconds before (< 0) or after the beginning of the second."""
    actor = Actor()
    rollout = Rollout(actor, loads)
    doors = Doors(rollout)
    engines = Engines(rollout, doors, stall_timeout)  # type: ignore[arg-type]
    sync = WeightSync(Config(), actor, engines, [])  # type: ignore[arg-type]
    sync.config.rollout.verify_weights_every, sync.syncs = 0, 1  # no probes
    await sync.publish(0)

    async def die(after: float) -> None:
        await asyncio.sleep(after)
        rollout.kill(0)
        await engines.revive(0, WorkerLost("rank 0 died"))

    death = asyncio.ensure_future(die(max(0.0, 100 + begun)))
    await asyncio.sleep(100)
    try:
        await sync.publish(1)
    finally:  # asyncio would tell of an error that nobody asked for, whenever the task is collected
        await asyncio.gather(death, return_exceptions=True)
    await death
    return rollout, doors


@pytest.mark.parametrize("up", [-50, -7, -3, -1, 1, 10, 19, 21, 24, 26, 40])
def test_an_engine_that_comes_back_around_a_sync_is_given_weights_before_groups(up: float) -> None:
    """up: seconds after the beginning of the sync at which its worker stands; the one before it is withdrawn at 0, the next there at 20."""
    rollout, doors = run_virtually(sync_around(up - START, []))
    assert doors.opened == [(0, 0 if up < 0 else 1)] and rollout.lives == [1, 0]
    assert [engine.holds for engine in rollout.engines] == [1, 1]


def test_a_sync_waits_for_no_engine_that_does_not_take_the_weights_before() -> None:
    rollout, doors = run_virtually(sync_around(-START - 3, [10**6], stall_timeout=60))
    assert rollout.lives == [2, 0] and doors.opened == [(0, 1)] and [engine.holds for engine in rollout.engines] == [1, 1]


@pytest.mark.parametrize("begun", [-5, 5])
def test_an_engine_that_cannot_come_back_ends_the_sync_too(begun: float, monkeypatch: pytest.MonkeyPatch) -> None:
    async def restart(self: Rollout, rank: int) -> None:
        await asyncio.sleep(START)
        raise RunFailed("it cannot be restarted")

    monkeypatch.setattr(Rollout, "restart", restart)
    with pytest.raises(RunFailed, match="it cannot be restarted"):
        run_virtually(sync_around(begun, []))
