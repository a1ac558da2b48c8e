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
    """rank of an engine -> calls that survive its death. load: gives an engine the current weights, where they are still to be had."""

    def __init__(self, group: WorkerGroup, dispatcher: Dispatcher) -> None:
        self.group, self.dispatcher = group, dispatcher
        self.load: Callable[[int], Awaitable[None]] | None = None
        self.restarted = 0
        self._reviving: dict[int, asyncio.Task[None]] = {}

    async def ask(self, rank: int, method: str, *args: Any) -> Any:
        """The result of a call that may be made twice."""
        while True:
            try:
                return await self.group.call(rank, method, *args)
            except WorkerLost as loss:
                await self.revive(rank, loss)

    async def ask_all(self, method: str, *args: Any) -> list[Any]:
        return await asyncio.gather(*(self.ask(rank, method, *args) for rank in range(self.group.size)))

    async def revive(self, rank: int, loss: WorkerLost) -> None:
        """Return when a worker that was lost stands again; one attempt, however many wait for it."""
        if rank not in self._reviving:
            self._reviving[rank] = asyncio.ensure_future(self._revive(rank, loss))
        await asyncio.shield(self._reviving[rank])

    async def _revive(self, rank: int, loss: WorkerLost) -> None:
        log.warning("%s\nIt is started anew; %d more of such deaths do not end the run.", loss, self.group.restarts)
        self.dispatcher.close(rank)
        try:
            await self.group.restart(rank)
            self.restarted += 1
            if self.load is not None:
                await self.load(rank)
        finally:
            del self._reviving[rank]
        self.dispatcher.open(rank)
