"""The interface to all ranks of one component, as the runner uses it; it is the same under Ray and in one process."""

from __future__ import annotations

import asyncio
import pickle
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from rlinf.cluster.failure import Failure
from rlinf.errors import RunFailed
from rlinf.scheduling.placement import Seat


class Ref:
    """A reference to a result that stays where it was computed; await it to fetch it.

    life: which of the successive workers at this rank was called. payload: whether it is one of the further results of a call. Such a
    result can be passed on as an argument of another call; the first result is for the caller only.
    """

    __slots__ = ("group", "rank", "life", "method", "handle", "payload")

    def __init__(self, group: WorkerGroup, rank: int, method: str, handle: Any, payload: bool = False) -> None:
        self.group, self.rank, self.life, self.method, self.handle = group, rank, group.lives[rank], method, handle
        self.payload = payload

    def __await__(self) -> Generator[Any, None, Any]:
        return self.group.fetch(self).__await__()


class Shared:
    """An argument that many calls have in common: it is serialized once instead of once for each call. The worker receives the value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @cached_property
    def data(self) -> bytes:
        return pickle.dumps(self.value, pickle.HIGHEST_PROTOCOL)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.data,)


class WorkerGroup(ABC):
    """The ranks of one component. A call first waits for the constructors; `ready()` waits only for them. `calls` counts calls by method.

    Errors of a call: UserError as the worker raised it; RunFailed for everything else, with component, rank, node, method and log file.
    """

    def __init__(self, component: str, seats: Sequence[Seat], failure: Failure, start_timeout: float) -> None:
        self.component = component
        self.seats = tuple(seats)  # of each rank
        self.size = len(self.seats)
        self.calls: Counter[str] = Counter()
        self.failure = failure
        self.start_timeout = start_timeout
        self.starts: list[Ref] = []
        self.in_flight: list[Counter[str]] = [Counter() for _ in self.seats]
        self.pids: list[int | None] = [None] * self.size  # of the workers that have a process of their own
        self.lives = [0] * self.size  # of each rank, how often restart() has filled its place
        self.deaths_allowed = 0  # deaths to come that do not end the run: the calls raise WorkerLost, and restart() fills the place
        self._ready: asyncio.Task[list[Any]] | None = None

    @abstractmethod
    def submit(self, rank: int, method: str, args: tuple[Any, ...], returns: int) -> Sequence[Any]:
        """Start the call; returns `returns` handles."""

    @abstractmethod
    def resolve(self, handle: Any) -> asyncio.Future[Any]:
        """The value behind a handle, or the backend's error. Cancelling it does not stop the call."""

    def resolve_all(self, handles: Sequence[Any]) -> asyncio.Future[list[Any]]:
        """The values behind handles; raises the backend's error of the first that fails, as soon as it has failed. May be cancelled like
        resolve()."""
        return asyncio.ensure_future(gathered(map(self.resolve, handles)))

    def opened(self, ref: Ref, value: Any) -> Any:
        """The result of a call from the value behind its handle, which a backend may have serialized."""
        return value

    @abstractmethod
    async def explain(self, error: BaseException, ref: Ref) -> BaseException:
        """The exception to raise for the backend's error of a call."""

    @abstractmethod
    def where(self, rank: int) -> str:
        """'actor rank 3 (node 0, pid 123)', for messages."""

    def ref(self, rank: int, method: str, *args: Any, returns: int = 1) -> Any:
        """Start a call whose results stay where they are computed. Returns a Ref, or with `returns` a tuple of as many Refs, when the
        method returns a tuple."""
        self.failure.check()
        self.calls[method] += 1
        values = tuple([handed_on(a) if isinstance(a, Ref) else a for a in args])
        first, *payloads = self.submit(rank, method, values, returns)
        answer = Ref(self, rank, method, first)
        return (answer, *[Ref(self, rank, method, handle, payload=True) for handle in payloads]) if payloads else answer

    async def call(self, rank: int, method: str, *args: Any, returns: int = 1) -> Any:
        """Call a method of one rank and return its result, or with `returns` the tuple of its results."""
        refs = self.ref(rank, method, *args, returns=returns)
        return await refs if returns == 1 else tuple([await ref for ref in refs])

    async def call_all(self, method: str, *args: Any) -> list[Any]:
        """The same call to every rank; results by rank. The first failure is raised at once."""
        return await self.call_ranks(range(self.size), method, *args)

    async def call_ranks(self, ranks: Iterable[int], method: str, *args: Any) -> list[Any]:
        """The same call to some ranks; results in their order. The first failure is raised at once."""
        common = [a if isinstance(a, Ref) else Shared(a) for a in args]
        return await self.results([self.ref(rank, method, *common) for rank in ranks])

    async def call_each(self, method: str, per_rank_args: Iterable[Sequence[Any]]) -> list[Any]:
        """One call to every rank, each with its own arguments; results by rank. The first failure is raised at once."""
        return await self.results([self.ref(rank, method, *args) for rank, args in enumerate(per_rank_args)])

    async def results(self, refs: Sequence[Ref]) -> list[Any]:
        """The results of calls to this group, in their order. The first failure is raised at once."""
        await self.ready()
        with self._running(refs):  # until it is known who failed: a message about a death is made meanwhile, by another thread
            answers = self.resolve_all([ref.handle for ref in refs])
            try:
                await self.failure.first(answers)
                if answers.done() and answers.exception() is None:
                    return [self.opened(ref, value) for ref, value in zip(refs, answers.result())]
            finally:
                answers.cancel()
            return await gather_or_cancel(ref.group.fetch(ref) for ref in refs)  # one by one: then it is known whose failure it is

    async def ready(self) -> None:
        """Return when every constructor has returned; raises the error of the first that fails."""
        if self._ready is None:
            self._ready = asyncio.ensure_future(self.started())
        if not self._ready.done():
            await asyncio.shield(self._ready)
        self._ready.result()

    async def restart(self, rank: int) -> None:
        """Start a new worker at the rank of a lost one; returns when it is up. Raises RunFailed where that is not possible."""
        raise RunFailed(f"{self.where(rank)} cannot be restarted")

    def kill(self, rank: int) -> None:
        """Kill the process of a rank that does not answer."""
        raise RunFailed(f"{self.where(rank)} has no process of its own to be ended")

    def stacks(self, ranks: Sequence[int], seconds: float) -> dict[int, str]:
        """The Python stacks of those of the ranks that have a process of their own and answer in time. May be called from any thread."""
        return {}

    async def started(self) -> list[Any]:
        """Wait for the constructors; returns the results of `starts`."""
        waiting = {ref.rank: asyncio.ensure_future(self._value(ref)) for ref in self.starts}
        try:
            done, pending = await asyncio.wait(waiting.values(), timeout=self.start_timeout, return_when=asyncio.FIRST_EXCEPTION)
            values = {task: task.result() for task in done}
            if pending:
                late = ", ".join(self.where(rank) for rank, task in waiting.items() if task in pending)
                raise RunFailed(
                    f"not started within cluster.start_timeout = {self.start_timeout:g} s: {late}\nTheir logs, in workers/ of the run's "
                    "folder, say how far they came; where they were only slow, raise cluster.start_timeout"
                )
            return [values[task] for task in waiting.values()]
        finally:
            for task in waiting.values():
                task.cancel()

    async def fetch(self, ref: Ref) -> Any:
        await self.ready()
        return await self._value(ref)

    async def _value(self, ref: Ref) -> Any:
        answer = self.resolve(ref.handle)
        try:
            with self._running([ref]):
                await self.failure.first(answer)
                error = answer.exception() if answer.done() else self.failure.error
                if error is not None and answer.done():
                    error = await self.explain(error, ref)
        finally:
            answer.cancel()
        if error is not None:
            raise error
        return self.opened(ref, answer.result())

    @contextmanager
    def _running(self, refs: Sequence[Ref]) -> Iterator[None]:
        """The calls are among those that a message about a death names."""
        counters = [(self.in_flight[ref.rank], ref.method) for ref in refs]
        for running, method in counters:
            running[method] += 1
        try:
            yield
        finally:
            for running, method in counters:
                running[method] -= 1
                if not running[method]:
                    del running[method]


def handed_on(ref: Ref) -> Any:
    """The handle that represents the result among the arguments of a call. Raises TypeError for the first result of a call, which may be
    serialized."""
    if not ref.payload:
        raise TypeError(f"{ref.method}: the first result of a call is its caller's; what is handed on is returned beside it")
    return ref.handle


async def gathered(answers: Iterable[asyncio.Future[Any]]) -> list[Any]:
    """asyncio.gather as a coroutine, which can be cancelled quietly; a gathering future that nobody awaits would log an error."""
    return await asyncio.gather(*answers)


async def gather_or_cancel(work: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results in order. The first failure is raised, and all others are cancelled."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
