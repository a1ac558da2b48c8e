"""The cage: worker processes that may be killed at any moment, for answers that need symbolic work.

C code can only be stopped by killing its process. So every worker is a clean child (no torch, not forked from this process) with a memory
and a CPU limit, which speaks JSON over pipes. A keeper thread owns one worker, gives it one item at a time, and kills it when the time
limit is over; a spare worker that has already started takes its place. An item that hangs therefore costs `timeout` seconds of its own
keeper, and no time of the others.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rlinf.config.own_code import is_own

START_SECONDS = 60.0  # for a worker to import its libraries on a busy machine; not part of any item's time
ITEMS_PER_WORKER = 5000  # then it is replaced, so that the caches of the libraries stay small
ATTEMPTS = 3
FIRST_SECONDS = 30.0  # at least, for the first call of a user's function in a process: it may import what it needs
FIRST_CALLS = 3  # so many first calls in a row may take longer than that; then it is not the imports that are slow
PRINTED_BYTES = 1 << 20  # how much of what the functions of a pool print is kept
_CLEAN = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "agg"}
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class Reply(NamedTuple):
    """The reply to one item: the worker's answer, or None with the reason (`timeout`, `memory`, `died`); and the seconds that it took."""

    answer: dict[str, Any] | None
    reason: str
    seconds: float


class Worker:
    """One child process. Not thread-safe: it belongs to one keeper thread."""

    def __init__(self, kind: str, memory_bytes: int, messages: int | None = None) -> None:
        """messages: where its stderr goes; None = to ours."""
        env = dict(os.environ, **_CLEAN, PYTHONPATH=os.pathsep.join(filter(None, (_PACKAGE_ROOT, os.environ.get("PYTHONPATH")))))
        command = [sys.executable, "-m", "rlinf.rewards.cage", kind, str(os.getpid()), str(memory_bytes)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, env=env, bufsize=0, process_group=0
        )
        assert self.process.stdin and self.process.stdout  # both are pipes
        self._to_child, self._from_child = self.process.stdin, self.process.stdout
        self.items = 0
        self._ready = False

    def wait_ready(self) -> bool:
        """Wait until the child is ready. False when it was killed. Raises RuntimeError when the child cannot start (its traceback is on
        stderr)."""
        if not self._ready:
            self._ready = self._read(time.monotonic() + START_SECONDS) == {"ready": True}
        if self._ready and self.process.poll() is None:
            return True
        self.kill()
        if self.process.returncode == -signal.SIGKILL:
            return False
        raise RuntimeError(f"a verifier process did not start (exit status {self.process.returncode}); see its messages on stderr")

    def ask(self, item: Any, timeout: float) -> Reply:
        """Give an item to the child and wait. Unless it answers, the worker must then be replaced."""
        started = time.monotonic()
        data = json.dumps([timeout, item]).encode()
        try:
            self._to_child.write(struct.pack("<I", len(data)) + data)
            answer = self._read(started + timeout)
        except BrokenPipeError:
            answer = None
        seconds = time.monotonic() - started
        self.items += 1
        if answer is not None:
            return Reply(answer, answer.get("limit", ""), seconds)
        timed_out = seconds >= timeout
        self.kill()
        if timed_out or self.process.returncode == -signal.SIGXCPU:
            return Reply(None, "timeout", seconds)
        return Reply(None, "killed" if self.process.returncode == -signal.SIGKILL else "died", seconds)

    def kill(self) -> None:
        """SIGKILL and reap. A child that is dead already keeps its own exit status."""
        self.process.kill()
        self.process.wait()
        self._to_child.close()
        self._from_child.close()

    def _read(self, deadline: float) -> dict[str, Any] | None:
        """One message, or None at the deadline or at the end of the pipe."""
        header = self._read_bytes(4, deadline)
        body = header and self._read_bytes(struct.unpack("<I", header)[0], deadline)
        return json.loads(body) if body else None

    def _read_bytes(self, count: int, deadline: float) -> bytes | None:
        fd, data = self._from_child.fileno(), b""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while len(data) < count:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            chunk = os.read(fd, count - len(data))
            if not chunk:
                self.process.wait()  # the pipe closed because the child ended: its exit status says why
                return None
            data += chunk
        return data


class Pool:
    """Workers for items of one kind: `math`, `rg` for reasoning-gym, or a user's function.

    `submit` returns a future of a Reply; it blocks while more than a few items per worker are waiting (back-pressure).
    """

    def __init__(self, processes: int, timeout: float, kind: str = "math", memory_bytes: int = 1 << 30) -> None:
        if processes < 1 or timeout <= 0:
            raise ValueError(f"a pool needs at least one process and a positive timeout, got {processes} and {timeout}")
        self._state = _State(kind, timeout, memory_bytes, queue.Queue(maxsize=8 * processes), ThreadPoolExecutor(1, "rlinf-nursery"))
        self._keepers = [threading.Thread(target=_keep, args=(self._state,), name="rlinf-keeper", daemon=True) for _ in range(processes)]
        for keeper in self._keepers:
            keeper.start()
        self._close = weakref.finalize(self, _close, self._state, self._keepers)

    def submit(self, item: Any) -> Future[Reply]:
        future: Future[Reply] = Future()
        if not self._close.alive:
            raise RuntimeError("the pool is closed")
        self._state.jobs.put((item, future))
        return future

    def worker_pids(self) -> list[int]:
        with self._state.lock:
            return [w.process.pid for w in self._state.workers if w.process.poll() is None]

    def close(self) -> None:
        """Cancel waiting items, let running ones finish or time out, and reap every child. It is also called at exit and when the pool
        is collected."""
        self._close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _State:
    """What the keeper threads share. It is separate from Pool, so that the threads do not keep the pool alive."""

    def __init__(self, kind: str, timeout: float, memory_bytes: int, jobs: queue.Queue, nursery: ThreadPoolExecutor) -> None:
        self.kind = kind
        self.timeout, self.memory_bytes, self.jobs, self.nursery = timeout, memory_bytes, jobs, nursery
        self.lock = threading.Lock()
        own = is_own(kind)
        self.patience = FIRST_CALLS if own else 0
        self.messages = _relay(kind) if own else None
        self.workers: list[Worker] = []
        self.closed = False
        self.spare: Future[Worker] = self.nursery.submit(self._spawn)

    def _spawn(self) -> Worker:
        # Always in the nursery's thread: the kernel sends PR_SET_PDEATHSIG when the *thread* that started the child ends.
        worker = Worker(self.kind, self.memory_bytes, self.messages)
        with self.lock:
            self.workers = [w for w in self.workers if w.process.poll() is None] + [worker]
        return worker

    def ask(self, worker: Worker, item: Any) -> Reply:
        """The worker's reply under the time limit; a user's function has more for its first call in a process."""
        first = worker.items == 0 and self.patience > 0
        reply = worker.ask(item, max(self.timeout, FIRST_SECONDS) if first else self.timeout)
        if first:
            with self.lock:
                self.patience = self.patience - 1 if reply.reason == "timeout" else FIRST_CALLS
        return reply

    def next_worker(self) -> Worker:
        """The spare worker, when it is ready; starts another spare. A spare that was killed while it waited is skipped."""
        for _ in range(ATTEMPTS):
            with self.lock:
                mine, self.spare = self.spare, self.nursery.submit(self._spawn)
            worker = mine.result()
            if worker.wait_ready():
                return worker
        raise RuntimeError("verifier processes are killed as soon as they start; is the machine out of memory?")


def _keep(state: _State) -> None:
    worker: Worker | None = None
    while (job := state.jobs.get()) is not None:
        item, future = job
        if state.closed or not future.set_running_or_notify_cancel():
            future.cancel()
            continue
        try:
            for _ in range(ATTEMPTS):
                if worker is None or worker.items >= ITEMS_PER_WORKER or worker.process.poll() is not None:
                    if worker is not None:
                        worker.kill()
                    worker = state.next_worker()
                reply = state.ask(worker, item)
                if reply.reason:
                    worker.kill()
                    worker = None
                if reply.reason != "killed":  # killed from outside while it held an innocent item: again
                    break
            future.set_result(reply)
        except (RuntimeError, OSError) as error:  # a worker that cannot start: the caller must hear of it, this thread must live on
            future.set_exception(error)
            worker = None
    if worker is not None:
        worker.kill()


def _close(state: _State, keepers: list[threading.Thread]) -> None:
    state.closed = True
    for _ in keepers:
        state.jobs.put(None)
    for keeper in keepers:
        keeper.join()
    state.nursery.shutdown(wait=True)
    for worker in state.workers:
        worker.kill()
    if state.messages is not None:
        os.close(state.messages)


def _relay(kind: str) -> int:
    """The writing end of a pipe: what a user's function prints goes from there to our stderr, but no more than PRINTED_BYTES of it."""
    source, target = os.pipe()
    threading.Thread(target=_copy, args=(source, kind), name="rlinf-printed", daemon=True).start()
    return target


def _copy(source: int, kind: str) -> None:
    left = PRINTED_BYTES
    with open(source, "rb", buffering=0) as pipe, open(os.dup(2), "wb", buffering=0) as stderr:
        while chunk := pipe.read(1 << 16):  # also what is dropped is read, or printing would block
            if left > 0:
                stderr.write(chunk[:left])
                left -= len(chunk)
                if left <= 0:
                    stderr.write(f"\n{kind} has printed {PRINTED_BYTES} bytes; what it prints from here on is dropped\n".encode())
