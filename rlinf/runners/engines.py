"""Calls to the rollout workers that survive the death of one: it is restarted with the weights that the others have."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rlinf.cluster.group import Ref, Shared, WorkerGroup
from rlinf.data.records import GroupHeader
from rlinf.errors import WorkerLost
from rlinf.scheduling.dispatcher import Dispatcher

log = logging.getLogger(__name__)


class Engines:
    """Repeats calls whose engine died, after it has been restarted.

    load: gives a restarted engine the current weights, if they can still be read; set by WeightSync.
    stall_timeout: seconds without an answer or a finished group after which an engine counts as hung and is killed; 0 = never.
    """

    def __init__(self, group: WorkerGroup, dispatcher: Dispatcher, stall_timeout: float) -> None:
        self.group, self.dispatcher, self.stall_timeout = group, dispatcher, stall_timeout
        self.load: Callable[[int], Awaitable[None]] | None = None
        self.restarted = 0
        self._done = [0.0] * group.size  # when each engine last finished a group
        self._reviving: dict[int, asyncio.Task[None]] = {}
        self._losses: dict[int, WorkerLost] = {}  # rank -> the last loss for which a restart was begun

    async def ask_all(self, method: str, *args: Any) -> list[Any]:
        """The same call to every engine, repeated when one dies; results by rank."""
        common = [Shared(a) for a in args]
        return await self.ask_each(method, [common] * self.group.size)

    async def ask_each(self, method: str, per_rank_args: Sequence[Sequence[Any]]) -> list[Any]:
        """One call to every engine, repeated when one dies; results by rank.

        All are awaited together, which is cheap; each by itself only when one has failed or is late.
        """
        asked = [self.group.ref(rank, method, *args) for rank, args in enumerate(per_rank_args)]
        loop, together = asyncio.get_running_loop(), asyncio.ensure_future(self.group.results(asked))
        begun = loop.time()
        try:  # half the time for all together, the other half for each by itself
            done, _ = await asyncio.wait({together}, timeout=self.stall_timeout / 2 or None)
            if done and together.exception() is None:
                return together.result()
        finally:
            together.cancel()
        left = self.stall_timeout - (loop.time() - begun)
        return await asyncio.gather(*(self._insist(ref, args, left) for ref, args in zip(asked, per_rank_args)))

    async def ask_once(self, rank: int, method: str, *args: Any) -> Any:
        """One call that is not repeated: raises WorkerLost when the worker dies, or is killed as hung, before it answers."""
        return await self._in_time(self.group.ref(rank, method, *args), self.stall_timeout)

    async def group_of(self, rank: int, header: Ref) -> GroupHeader | WorkerLost:
        """The header of the group that an engine was asked for, or when the engine died its loss.

        A group may take long: an engine counts as hung only when it has finished none of its groups for stall_timeout.
        """
        loop, asked = asyncio.get_running_loop(), asyncio.ensure_future(header)
        begun = loop.time()
        try:
            while not (await asyncio.wait({asked}, timeout=self.stall_timeout or None))[0]:
                if loop.time() - max(begun, self._done[rank]) >= self.stall_timeout:
                    self.end(rank, header.life)
                    begun = loop.time()
            self._done[rank] = loop.time()
            return asked.result()
        except WorkerLost as loss:
            self.dispatcher.close(rank)
            return loss
        finally:
            asked.cancel()

    async def _insist(self, ref: Ref, args: Sequence[Any], patience: float) -> Any:
        """The result of a call, repeated after every death before an answer. patience: seconds that the first try has, where there is a
        stall_timeout."""
        while True:
            try:
                return await self._in_time(ref, patience)
            except WorkerLost as loss:
                await self.revive(ref.rank, loss)
            ref, patience = self.group.ref(ref.rank, ref.method, *args), self.stall_timeout

    async def _in_time(self, ref: Ref, patience: float) -> Any:
        """The result of a call; where there is a stall_timeout, a worker that does not answer within `patience` is killed."""
        answer = asyncio.ensure_future(self.group.fetch(ref))
        try:
            if not (await asyncio.wait({answer}, timeout=patience if self.stall_timeout else None))[0]:
                self.end(ref.rank, ref.life)
            return await answer
        finally:
            answer.cancel()

    def end(self, rank: int, life: int) -> None:
        """Kill a worker that hangs, unless it has already been replaced. life: which of the rank's successive workers is meant."""
        if self.group.lives[rank] == life:
            self.group.kill(rank)

    async def revive(self, rank: int, loss: WorkerLost) -> None:
        """Restart a lost worker; returns when it is up. It is restarted once, however many callers wait for it."""
        if rank not in self._reviving:
            if self._losses.get(rank) is loss:
                return  # this loss was already repaired
            self._losses[rank] = loss
            self._reviving[rank] = asyncio.ensure_future(self._revive(rank, loss))
        await asyncio.shield(self._reviving[rank])

    async def _revive(self, rank: int, loss: WorkerLost | None) -> None:
        self.dispatcher.close(rank)
        try:
            while loss is not None:  # the new worker may also die before it is ready
                log.warning("%s\nIt is started anew; %d more of such deaths do not end the run.", loss, self.group.deaths_allowed)
                loss = await self._restart(rank)
        finally:
            del self._reviving[rank]
        self.dispatcher.open(rank)

    async def _restart(self, rank: int) -> WorkerLost | None:
        """None, or the loss of the new worker too."""
        try:
            await self.group.restart(rank)
            self.restarted += 1
            if self.load is not None:
                await self.load(rank)
        except WorkerLost as again:
            return again
        return None
