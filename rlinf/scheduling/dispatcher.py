"""Which engine takes the next group: the one with most room; nobody is split statically over engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Dispatcher:
    """Room in samples, by engine. An engine is filled a little beyond what it decodes at once, so that it never waits for the driver."""

    def __init__(self, engines: int, running_requests: int, group_size: int) -> None:
        self.capacity = running_requests + group_size
        self.load = [0] * engines
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def seat(self, samples: int) -> AsyncIterator[int]:
        """Wait until an engine has room for the group (an empty engine always has) and hold it; yields the engine's rank."""
        async with self._changed:
            await self._changed.wait_for(lambda: min(self.load) == 0 or min(self.load) + samples <= self.capacity)
            rank = self.load.index(min(self.load))
            self.load[rank] += samples
        try:
            yield rank
        finally:
            async with self._changed:
                self.load[rank] -= samples
                self._changed.notify_all()
