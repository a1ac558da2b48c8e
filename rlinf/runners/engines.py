"""The rollout workers as the loop sees them: one that dies is started anew, with the weights that the others have."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from rlinf.cluster.group import WorkerGroup
from rlinf.errors import WorkerLost
from rlinf.scheduling.dispatcher import Dispatcher

log = logging.getLogger(__name__)


class Engines:
    """rank of an engine -> calls that survive its death. load: gives an engine the current weights, where they are still to be had.

    stall_timeout: seconds after which an engine that does not answer is ended; 0 = never.
    """

    def __init__(self, group: WorkerGroup, dispatcher: Dispatcher, stall_timeout: float) -> None:
        self.group, self.dispatcher, self.stall_timeout = group, dispatcher, stall_timeout
        self.load: Callable[[int], Awaitable[None]] | None = None
        self.restarted = 0
        self._reviving: dict[int, asyncio.Task[None]] = {}
        self._losses: dict[int, WorkerLost] = {}  # the last one of each rank that was made good

    async def ask(self, rank: int, method: str, *args: Any) -> Any:
        """The result of a call that may be made twice."""
        while True:
            life, asked = self.group.lives[rank], asyncio.ensure_future(self.group.call(rank, method, *args))
            try:
                if not (await asyncio.wait({asked}, timeout=self.stall_timeout or None))[0]:
                    self.end(rank, life)
                return await asked
            except WorkerLost as loss:
                await self.revive(rank, loss)
            finally:
                asked.cancel()

    async def ask_all(self, method: str, *args: Any) -> list[Any]:
        return await asyncio.gather(*(self.ask(rank, method, *args) for rank in range(self.group.size)))

    def end(self, rank: int, life: int) -> None:
        """End a worker that stands still, unless another already stands in its place."""
        if self.group.lives[rank] == life:
            self.group.kill(rank)

    async def revive(self, rank: int, loss: WorkerLost) -> None:
        """Return when another worker stands in the place of the lost one; one attempt, however many wait for it."""
        if rank not in self._reviving:
            if self._losses.get(rank) is loss:
                return  # who asks comes late
            self._losses[rank] = loss
            self._reviving[rank] = asyncio.ensure_future(self._revive(rank, loss))
        await asyncio.shield(self._reviving[rank])

    async def _revive(self, rank: int, loss: WorkerLost | None) -> None:
        self.dispatcher.close(rank)
        try:
            while loss is not None:  # the new worker may die before it is ready, too
                log.warning("%s\nIt is started anew; %d more of such deaths do not end the run.", loss, self.group.restarts)
                loss = await self._start_anew(rank)
        finally:
            del self._reviving[rank]
        self.dispatcher.open(rank)

    async def _start_anew(self, rank: int) -> WorkerLost | None:
        try:
            await self.group.restart(rank)
            self.restarted += 1
            if self.load is not None:
                await self.load(rank)
        except WorkerLost as again:
            return again
        return None
