"""Brings answers from Ray's threads to an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any


class Inbox:
    """Wakes the loop once for all answers that arrive while it is busy, not once for each as asyncio.wrap_future would: a driver waits for
    thousands of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._come: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._told = False  # the loop will look

    def expect(self, handle: Any) -> asyncio.Future[Any]:
        """The value of an ObjectRef, or Ray's error."""
        answer = self.loop.create_future()
        handle.future().add_done_callback(partial(self._put, answer))
        return answer

    def _put(self, answer: asyncio.Future[Any], come: Future[Any]) -> None:
        """In any thread. What is put before the loop has looked for the last time is seen; after that it is told again."""
        self._come.append((answer, come))
        if not self._told:
            self._told = True
            with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                self.loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._told = False
        while self._come:
            answer, come = self._come.popleft()
            if answer.done():  # its call was given up
                continue
            error = come.exception()
            if error is None:
                answer.set_result(come.result())
            else:
                answer.set_exception(error)
