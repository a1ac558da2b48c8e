"""The thread on which a component computes.

OpenMP gives every thread that computes a team of threads of its own. When all these are more than the cores, none of them stays awake for
the next operation, and waking one takes longer than most operations of a decode step. So a component computes on one thread, and components
that share a process and take turns share this thread too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

_common: ThreadPoolExecutor | None = None


class _Lent(Executor):
    """The common thread as one component gets it: its shutdown() does not end the thread."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._thread.submit(function, *args, **kwargs)


def compute_thread(name: str) -> Executor:
    """A thread for a component; inside common_thread(), the one that all components share."""
    return _Lent(_common) if _common is not None else ThreadPoolExecutor(1, thread_name_prefix=name)


@contextmanager
def common_thread() -> Iterator[None]:
    """Components that are created in the block, in any thread of this process, share one compute thread."""
    global _common
    if _common is not None:
        raise RuntimeError("the components of this process have a common thread already")
    _common = ThreadPoolExecutor(1, thread_name_prefix="compute")
    try:
        yield
    finally:
        thread, _common = _common, None
        thread.shutdown(wait=False)
