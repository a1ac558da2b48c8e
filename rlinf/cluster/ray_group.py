"""The ranks of a component as Ray actors: calls, and messages about calls that fail and workers that die."""

from __future__ import annotations

import asyncio
import pickle
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from rlinf.cluster.failure import Failure
from rlinf.cluster.group import Ref, WorkerGroup
from rlinf.cluster.host import Call
from rlinf.cluster.inbox import Inbox
from rlinf.cluster.phase import Phase
from rlinf.errors import RunFailed, UserError, WorkerLost
from rlinf.scheduling.placement import Seat

BLAME = 2.0  # seconds to wait, after an error, for the report of a death that explains it
FORGIVEN = 4.0  # the same where the rank may be started anew: such workers take a second to leave
LOOK = 1.0  # seconds after which a thread that waits for answers sees that nobody else does
WAITING = 32  # calls to many ranks that may be waited for at once
LOG_TAIL = 15  # lines of a dead worker's log in the message
ANSI = re.compile(r"\x1b\[[0-9;]*m")
FATAL = "Fatal Python error"  # how faulthandler begins what it writes of a crash
KILLED = "the process was killed (SIGKILL; perhaps by the kernel's out-of-memory killer) or crashed"


class RayWorkerGroup(WorkerGroup):
    """process: makes the process of a seat. ended: is told, from any thread, when one has ended (group, rank, life, error); that is known
    by the failure of a call that never returns."""

    def __init__(
        self,
        component: str,
        seats: Sequence[Seat],
        process: Callable[[Seat], Any],
        logs: list[Path],
        failure: Failure,
        start_timeout: float,
        phase: Callable[[], Phase],
        ended: Callable[[RayWorkerGroup, int, int, BaseException | None], None],
    ) -> None:
        super().__init__(component, seats, failure, start_timeout)
        self.process, self.logs, self.phase, self.ended = process, logs, phase, ended
        self.actors = [process(seat) for seat in seats]
        for rank in range(self.size):
            self._rest(rank, 0)
        self.lost: dict[tuple[int, int], WorkerLost] = {}  # by rank and life
        self.entrances: list[dict[int, Any]] = [{} for _ in seats]  # by rank, then number of results
        self.inbox: Inbox | None = None
        self.waiting = ThreadPoolExecutor(WAITING, f"rlinf-{component}-answers")

    def start(self, class_path: str, args: tuple[Any, ...]) -> None:
        """Have every rank construct its worker, with a port for the process group that rank 0 found free."""
        port = self.actors[0].free_port.remote()
        self.made_from = (class_path, *(a.handle if isinstance(a, Ref) else a for a in args))
        self.starts = [Ref(self, rank, "__init__", actor.start.remote(port, *self.made_from)) for rank, actor in enumerate(self.actors)]

    def _rest(self, rank: int, life: int) -> None:
        self.actors[rank].rest.remote().future().add_done_callback(lambda rest: self.ended(self, rank, life, rest.exception()))

    def lose(self, rank: int, life: int, obituary: str) -> bool:
        """Called once for each death, from any thread; returns whether the run goes on without the rank until restart()."""
        if self.deaths_allowed == 0:
            return False
        self.lost[rank, life] = WorkerLost(obituary)  # first: who waits for it looks whether deaths are allowed at all
        self.deaths_allowed -= 1
        return True

    async def restart(self, rank: int) -> None:
        self.in_flight[rank] = Counter()
        self.actors[rank] = actor = self.process(self.seats[rank])
        self.entrances[rank] = {}
        self._rest(rank, self.lives[rank] + 1)
        self.lives[rank] += 1
        port = actor.free_port.remote()
        made = self._value(Ref(self, rank, "__init__", actor.start.remote(port, *self.made_from)))
        try:
            self.pids[rank] = await asyncio.wait_for(made, self.start_timeout)
        except TimeoutError:
            raise RunFailed(
                f"{self.where(rank)} was not ready within cluster.start_timeout = {self.start_timeout:g} s after it was started anew\n"
                f"Its log: {self.logs[rank]}"
            ) from None

    def kill(self, rank: int) -> None:
        ray.kill(self.actors[rank])

    def stacks(self, ranks: Sequence[int], seconds: float) -> dict[int, str]:
        asked = {self.actors[rank].stacks.remote(): rank for rank in ranks}
        told, _ = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
        found = {}
        for handle in told:
            with suppress(ray.exceptions.RayError):  # it has died meanwhile
                found[asked[handle]] = ray.get(handle)
        return found

    def submit(self, rank: int, method: str, args: tuple[Any, ...], returns: int) -> list[Any]:
        places = [i for i, a in enumerate(args) if isinstance(a, ray.ObjectRef)]  # Ray fetches what is an argument of its own
        call = Call(method, [a for a in args if not isinstance(a, ray.ObjectRef)], places, returns)
        handles = self._entrance(rank, returns).remote(pickle.dumps(call, pickle.HIGHEST_PROTOCOL), *[args[i] for i in places])
        return [handles] if returns == 1 else handles

    def _entrance(self, rank: int, returns: int) -> Any:
        """The remote method through which all calls go. Ray's options() creates a class each time, so its result is kept."""
        kept = self.entrances[rank]
        if returns not in kept:
            kept[returns] = self.actors[rank].call_packed.options(num_returns=returns)
        return kept[returns]

    def resolve(self, handle: Any) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        if self.inbox is None or self.inbox.loop is not loop:
            self.inbox = Inbox(loop)
        return self.inbox.expect(handle)

    def resolve_all(self, handles: Sequence[Any]) -> asyncio.Future[list[Any]]:
        """Waits for all answers in one thread: for an answer with a future of its own Ray needs 0.3 to 0.4 ms of CPU."""
        given_up = threading.Event()
        answers = asyncio.get_running_loop().run_in_executor(self.waiting, values_of, handles, given_up)
        answers.add_done_callback(lambda _: given_up.set())
        return answers

    def opened(self, ref: Ref, value: Any) -> Any:
        return value if ref.payload else pickle.loads(value)

    async def explain(self, error: BaseException, ref: Ref) -> BaseException:
        if isinstance(error, UserError):
            return UserError(str(error.cause) if isinstance(error, RayTaskError) else str(error))
        if not isinstance(error, ray.exceptions.RayError):
            return error
        deadline = time.monotonic() + (FORGIVEN if self.deaths_allowed else BLAME)
        rank, of_it = ref.rank, (ref.rank, ref.life)
        while self.deaths_allowed and of_it not in self.lost and self.failure.error is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)  # the health thread is about to say what it was
        if of_it not in self.lost:
            await asyncio.wait({self.failure.future()}, timeout=max(0.0, deadline - time.monotonic()))
        if of_it in self.lost:
            return self.lost[of_it]
        if self.failure.error is not None:  # a peer's error is often only the echo of a death
            return self.failure.error
        if not isinstance(error, RayTaskError):
            return RunFailed(self.obituary(rank, error))
        traceback = ANSI.sub("", str(error))
        return RunFailed(
            f"{self.where(rank)} failed in {ref.method} (phase: {self.phase()}): {type(error.cause).__name__}: {error.cause}\n\n"
            f"{traceback}\nIts log: {self.logs[rank]}"
        )

    def obituary(self, rank: int, error: BaseException) -> str:
        """The message about a death: which worker, when, why as far as Ray knows, and the end of its log."""
        running = ", ".join(self.in_flight[rank]) or "nothing"
        reason = ANSI.sub("", str(error)).strip()
        detail = reason.rpartition("Worker exit detail: ")[2]
        if "connection error code 2" in detail:
            reason = KILLED
        log = self.logs[rank]
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        reason = next((line for line in reversed(lines) if line.startswith(FATAL)), reason)
        tail = "\n".join(f"  | {line}" for line in lines[-LOG_TAIL:])
        return f"{self.where(rank)} died (phase: {self.phase()}; running: {running}): {reason}\nIts log: {log}\n{tail}"

    def where(self, rank: int) -> str:
        pid = f", pid {self.pids[rank]}" if self.pids[rank] else ""
        return f"{self.component} rank {rank} (node {self.seats[rank].node}{pid})"

    async def started(self) -> list[Any]:
        self.pids = await super().started()
        return self.pids


def values_of(handles: Sequence[Any], given_up: threading.Event) -> list[Any]:
    """ray.get() that can be interrupted. Raises the error of the first that fails, as soon as it has failed."""
    while not given_up.is_set():
        with suppress(ray.exceptions.GetTimeoutError):
            return ray.get(handles, timeout=LOOK)
    return []
