"""Answers from other threads: each to its own future, and the loop is woken once for many."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from rlinf.cluster.inbox import Inbox


class Handle:
    """As much of an ObjectRef as is asked for."""

    def __init__(self) -> None:
        self.come: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.come


def test_every_answer_reaches_its_own_future_whatever_thread_it_comes_from() -> None:
    async def main() -> None:
        inbox, handles = Inbox(asyncio.get_running_loop()), [Handle() for _ in range(2000)]
        answers = [inbox.expect(handle) for handle in handles]

        def put(part: int) -> None:
            for i in range(part, 2000, 4):
                handles[i].come.set_result(i)

        threads = [threading.Thread(target=put, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        assert await asyncio.wait_for(asyncio.gather(*answers), 30) == list(range(2000))
        for thread in threads:
            thread.join()

    asyncio.run(main())


def test_what_comes_while_the_loop_is_busy_wakes_it_once() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        inbox, handles, wakes = Inbox(loop), [Handle() for _ in range(50)], []
        told = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args, **more: (wakes.append(args), told(*args, **more))[1]  # type: ignore[method-assign]
        answers = [inbox.expect(handle) for handle in handles]
        for handle in handles[:49]:
            handle.come.set_result("x")
        assert await asyncio.gather(*answers[:49]) == ["x"] * 49 and len(wakes) == 1
        handles[49].come.set_result("y")
        assert await answers[49] == "y" and len(wakes) == 2

    asyncio.run(main())


def test_errors_and_calls_that_were_given_up() -> None:
    async def main() -> None:
        inbox, handles = Inbox(asyncio.get_running_loop()), [Handle() for _ in range(3)]
        failing, given_up, last = (inbox.expect(handle) for handle in handles)
        given_up.cancel()
        handles[0].come.set_exception(ZeroDivisionError("there"))
        handles[1].come.set_result(1)
        handles[2].come.set_result("fine")
        assert await last == "fine"
        with pytest.raises(ZeroDivisionError, match="there"):
            await failing

    asyncio.run(main())


def test_an_answer_to_a_loop_that_has_ended_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """An error in the callback of a concurrent.futures.Future is not raised, but logged."""
    handle = Handle()

    async def main() -> None:
        Inbox(asyncio.get_running_loop()).expect(handle)

    asyncio.run(main())
    handle.come.set_result(1)
    assert caplog.records == []
