"""The thread on which a component computes.

OpenMP gives every thread that computes a team of its own, and when their threads are more than the cores, none waits awake for the next
operation: waking one takes longer than most operations of a decode step. So a component computes on one thread, and components that
share a process and take turns share the thread, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

_common: ThreadPoolExecutor | None = None


class _Lent(Executor):
    """The common thread in the hands of one component, whose shutdown() does not end it."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._thread.submit(function, *args, **kwargs)


def compute_thread(name: str) -> Executor:
    """A thread for a component, or, inside of common_thread(), the one that all of them have."""
    return _Lent(_common) if _common is not None else ThreadPoolExecutor(1, thread_name_prefix=name)


@contextmanager
def common_thread() -> Iterator[None]:
    """Components that are made meanwhile, in any thread of this process, compute in turn."""
    global _common
    if _common is not None:
        raise RuntimeError("the components of this process have a common thread already")
    _common = ThreadPoolExecutor(1, thread_name_prefix="compute")
    try:
        yield
    finally:
        thread, _common = _common, None
        thread.shutdown(wait=False)
