"""The first reason why a run cannot go on. Any thread can report it; every pending call and the loop itself then raise it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from rlinf.errors import RunFailed

T = TypeVar("T")
UNWIND = 5.0  # seconds that a cancelled loop has for its own `finally` blocks


class Failure:
    def __init__(self) -> None:
        self._first: Future[RunFailed] = Future()
        self._lock = threading.Lock()
        self._views: dict[asyncio.AbstractEventLoop, asyncio.Future[RunFailed]] = {}
        self._waiters: set[asyncio.Future[None]] = set()  # of that loop

    def report(self, error: RunFailed) -> None:
        """Report a failure. Only the first report counts."""
        with self._lock:
            if not self._first.done():
                self._first.set_result(error)

    @property
    def error(self) -> RunFailed | None:
        return self._first.result() if self._first.done() else None

    def wait(self) -> RunFailed:
        """Block until a failure is reported."""
        return self._first.result()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def future(self) -> asyncio.Future[RunFailed]:
        """A future of the running loop that holds the report when there is one; all who wait share it."""
        loop = asyncio.get_running_loop()
        if loop not in self._views:
            self._views, self._waiters = {loop: asyncio.wrap_future(self._first)}, set()
            self._views[loop].add_done_callback(self._wake)
        return self._views[loop]

    async def first(self, answer: asyncio.Future[Any]) -> None:
        """Return when `answer` is done or a failure is reported.

        It is made for thousands of calls that wait at the same time: with asyncio.wait, each call that returns would search all callbacks
        of the future that they share.
        """
        self.future()
        if answer.done() or self.error is not None:
            return
        waiter = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: None if waiter.done() else waiter.set_result(None))
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _wake(self, _: asyncio.Future[RunFailed]) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def race(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. When a failure is reported first, `work` is cancelled and the failure is raised."""
        self.check()
        task = asyncio.ensure_future(work)
        both: list[asyncio.Future[Any]] = [task, self.future()]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if task.done():
            return task.result()
        await asyncio.wait({task}, timeout=UNWIND)
        raise self._first.result()
