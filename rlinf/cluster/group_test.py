from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from rlinf.cluster.failure import Failure
from rlinf.cluster.group import Ref, WorkerGroup
from rlinf.scheduling.placement import Seat


class Broken(WorkerGroup):
    """Every call fails; `seen` is what the group says is running whenever it is asked for an answer."""

    def __init__(self) -> None:
        super().__init__("actor", [Seat("actor", rank, 0, (rank,)) for rank in range(2)], Failure(), 1.0)
        self.seen: list[list[str]] = []

    async def started(self) -> list[Any]:
        return []

    def submit(self, rank: int, method: str, args: tuple[Any, ...], returns: int) -> Sequence[Any]:
        return [rank]

    def resolve(self, handle: Any) -> asyncio.Future[Any]:
        self.seen.append([*self.in_flight[handle]])
        answer = asyncio.get_running_loop().create_future()
        answer.set_exception(ConnectionError(f"rank {handle} is gone"))
        return answer

    async def explain(self, error: BaseException, ref: Ref) -> BaseException:
        return error

    def where(self, rank: int) -> str:
        return f"actor rank {rank}"


def test_calls_that_failed_are_running_until_it_is_known_whose_failure_it_was() -> None:
    """A thread that learns of a death in between says what the dead worker was doing."""
    group = Broken()
    with pytest.raises(ConnectionError, match="rank 0 is gone"):
        asyncio.run(group.call_all("train_step"))
    assert group.seen == [["train_step"]] * 4  # both together, then one by one
    assert group.in_flight == [{}, {}]
