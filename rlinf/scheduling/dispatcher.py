"""Decides which engine takes the next group (the one with the most room) and which group goes next (the longest expected). Groups are not
divided among engines in advance."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(order=True)
class _Waiting:
    """A group that waits for an engine. The smallest in this order goes next."""

    shortness: float
    order: int
    samples: int = field(compare=False)
    rank: asyncio.Future[int] = field(compare=False)


class Dispatcher:
    """Counts the samples at each engine. An engine is given a little more than it can decode at once, so that it never has to wait for the
    driver."""

    def __init__(self, engines: int, running_requests: int, group_size: int) -> None:
        self.capacity = running_requests + group_size
        self.load = [0] * engines
        self._rooms = [(0, rank) for rank in range(engines)]  # a heap; an entry whose load is no longer its engine's is passed over
        self._closed: set[int] = set()
        self._queue: list[_Waiting] = []
        self._asked = 0

    @asynccontextmanager
    async def seat(self, samples: int, expected_length: float = 0.0) -> AsyncIterator[int]:
        """Wait until an engine has room for the group (an empty engine always has), and hold that room in the block; yields the rank of the
        engine.

        Of the groups that wait, the one with the largest expected_length goes first, then the one that asked first: a long group that
        starts late would keep everybody waiting at the end of the step.
        """
        self._asked += 1
        mine = _Waiting(-expected_length, self._asked, samples, asyncio.get_running_loop().create_future())
        heapq.heappush(self._queue, mine)
        self._grant()
        try:
            yield await mine.rank
        finally:
            if not mine.rank.cancelled():
                self._change(mine.rank.result(), -samples)
            self._grant()

    def close(self, rank: int) -> None:
        """Give no more groups to this engine until open()."""
        self._closed.add(rank)

    def open(self, rank: int) -> None:
        """Give groups to this engine again."""
        self._closed.discard(rank)
        self._change(rank, 0)
        self._grant()

    def _change(self, rank: int, samples: int) -> None:
        self.load[rank] += samples
        heapq.heappush(self._rooms, (self.load[rank], rank))
        if len(self._rooms) > 4 * len(self.load):
            self._rooms = sorted((load, rank) for rank, load in enumerate(self.load))

    def _emptiest(self) -> tuple[int, int] | None:
        """(load, rank) of the engine with the most room, the first of equals; None when all are closed."""
        while self._rooms and (self.load[self._rooms[0][1]] != self._rooms[0][0] or self._rooms[0][1] in self._closed):
            heapq.heappop(self._rooms)
        return self._rooms[0] if self._rooms else None

    def _grant(self) -> None:
        """Seat waiting groups as long as there is room."""
        while self._queue:
            first = self._queue[0]
            if first.rank.cancelled():
                heapq.heappop(self._queue)
                continue
            emptiest = self._emptiest()
            if emptiest is None or (emptiest[0] and emptiest[0] + first.samples > self.capacity):
                return
            rank = emptiest[1]
            self._change(rank, first.samples)
            heapq.heappop(self._queue)
            first.rank.set_result(rank)
