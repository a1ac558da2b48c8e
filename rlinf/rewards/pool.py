"""The cage: worker processes that may be killed at any moment, for answers that need symbolic work.

C code can only be stopped by killing its process. So every worker is a clean process with a memory and a CPU limit, which speaks JSON over
pipes. It is not forked from this process, but from a child, the nursery, that has no torch and has loaded once what all workers need. A
keeper thread owns one worker, gives it one item at a time, and kills it when the time limit is over; a spare worker that has already
started takes its place. An item that hangs therefore costs `timeout` seconds of its own keeper, and no time of the others.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import socket
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

END_SECONDS = 10.0  # for the nursery to tell how a worker ended
START_SECONDS = 60.0  # for a worker to import its libraries on a busy machine; not part of any item's time
ITEMS_PER_WORKER = 5000  # then it is replaced, so that the caches of the libraries stay small
ATTEMPTS = 3
FIRST_SECONDS = 30.0  # at least, for the first call of a user's function in a process: it may import what it needs
FIRST_CALLS = 3  # so many first calls in a row may take longer than that; then it is not the imports that are slow
PRINTED_BYTES = 1 << 20  # how much of what the functions of a pool print is kept
_CLEAN = {
    "PYTHONHASHSEED": "0",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "MPLBACKEND": "agg",
    "MALLOC_ARENA_MAX": "2",  # each takes 64 MiB of address space; one a thread, as is usual, and 16 threads would reach the limit
}
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class Reply(NamedTuple):
    """The reply to one item: the worker's answer, or None with the reason (`timeout`, `memory`, `died`); and the seconds that it took."""

    answer: dict[str, Any] | None
    reason: str
    seconds: float


class Nursery:
    """The process that forks the workers of one pool. It ends with the thread that starts it (see _State._spawn)."""

    def __init__(self, kind: str, memory_bytes: int, messages: int | None = None) -> None:
        """messages: where stderr goes, that of the workers too; None = to ours."""
        env = dict(os.environ, **_CLEAN, PYTHONPATH=os.pathsep.join(filter(None, (_PACKAGE_ROOT, os.environ.get("PYTHONPATH")))))
        command = [sys.executable, "-m", "rlinf.rewards.cage", kind, str(os.getpid()), str(memory_bytes)]
        self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            out = 2 if messages is None else messages
            self.process = subprocess.Popen(command, stdin=other.fileno(), stdout=out, stderr=out, env=env, process_group=0)

    def worker(self) -> Worker:
        """A new worker. It may have to wait until the nursery has loaded what it needs."""
        to_child, from_child, life = os.pipe(), os.pipe(), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs = [to_child[0], from_child[1], life[1].fileno()]
        try:
            socket.send_fds(self._control, [b"+"], theirs)
        except (BrokenPipeError, ConnectionResetError):  # it has died: the worker finds the end of its pipe
            pass
        for fd in theirs[:2]:
            os.close(fd)
        life[1].close()
        return Worker(self.process, to_child[1], from_child[0], life[0])

    def close(self) -> None:
        """End and reap the process, and its workers before it."""
        self.process.terminate()
        self.process.wait()
        self._control.close()


class Worker:
    """One child of the nursery. Not thread-safe, but for poll(): it belongs to one keeper thread."""

    def __init__(self, nursery: subprocess.Popen, to_child: int, from_child: int, life: socket.socket) -> None:
        self._nursery, self._life = nursery, life
        self._to_child, self._from_child = open(to_child, "wb", buffering=0), open(from_child, "rb", buffering=0)
        self.items = 0
        self.pid: int | None = None  # from its birth on
        self.returncode: int | None = None  # from its end on
        self._lock = threading.Lock()  # poll() is for every thread
        self._ready = False

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it lives, or is not born yet."""
        self._hear(0.0)
        return self.returncode

    def wait_ready(self) -> bool:
        """Wait until the child is ready. False when it was killed. Raises RuntimeError when the child cannot start (its traceback is on
        stderr)."""
        if not self._ready:
            self._ready = self._read(time.monotonic() + START_SECONDS) == {"ready": True}
        if self._ready and self.poll() is None:
            return True
        status = self.poll()
        if status is not None and self.pid is None:  # it was never born
            status = self._nursery.wait(END_SECONDS)
        self.kill()
        if status in (None, -signal.SIGKILL):
            return False
        raise RuntimeError(f"a verifier process did not start (exit status {status}); see its messages on stderr")

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
        if timed_out or self.returncode == -signal.SIGXCPU:
            return Reply(None, "timeout", seconds)
        return Reply(None, "killed" if self.returncode == -signal.SIGKILL else "died", seconds)

    def kill(self) -> None:
        """Have the nursery kill it, by SIGKILL, and reap it. A child that is dead already keeps its own exit status; one that is not born
        yet ends at its birth, which is not waited for."""
        if self.poll() is None and self.pid:
            self._life.shutdown(socket.SHUT_WR)
            self._hear(END_SECONDS)
        self.close()

    def close(self) -> None:
        """Give back what this process holds of the child, which has ended, or will: the nursery sees that the socket is closed."""
        with self._lock:
            if self.returncode is None:
                self.returncode = -signal.SIGKILL
            for file in (self._to_child, self._from_child, self._life):
                file.close()

    def _hear(self, seconds: float) -> None:
        """Take note of its birth and of its end, after waiting at most so long for the end. When the nursery ends, all its workers do, by
        SIGKILL."""
        deadline, poll = time.monotonic() + seconds, select.poll()
        with self._lock:
            if self.returncode is None:
                poll.register(self._life, select.POLLIN)
            while self.returncode is None and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                data = self._life.recv(4)
                number = struct.unpack("<i", data)[0] if data else -signal.SIGKILL
                if data and self.pid is None:
                    self.pid = number
                else:
                    self.returncode = number

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
                self._hear(END_SECONDS)  # the pipe closed because the child ended: its exit status says why
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
            return [w.pid for w in self._state.workers if w.poll() is None and w.pid]

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

    def __init__(self, kind: str, timeout: float, memory_bytes: int, jobs: queue.Queue, starter: ThreadPoolExecutor) -> None:
        self.kind = kind
        self.timeout, self.memory_bytes, self.jobs, self.starter = timeout, memory_bytes, jobs, starter
        self.lock = threading.Lock()
        own = is_own(kind)
        self.patience = FIRST_CALLS if own else 0
        self.messages = _relay(kind) if own else None
        self.nursery: Nursery | None = None
        self.workers: list[Worker] = []
        self.closed = False
        self.spare: Future[Worker] = self.starter.submit(self._spawn)

    def _spawn(self) -> Worker:
        # Always in the starter's thread: the kernel sends PR_SET_PDEATHSIG when the *thread* that started the child ends.
        with self.lock:
            if self.closed:
                raise RuntimeError("the pool is closed")
            if self.nursery is None or self.nursery.process.poll() is not None:
                if self.nursery is not None:
                    self.nursery.close()
                self.nursery = Nursery(self.kind, self.memory_bytes, self.messages)
            worker = self.nursery.worker()
            self.workers = [w for w in self.workers if w.poll() is None] + [worker]
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
                mine, self.spare = self.spare, self.starter.submit(self._spawn)
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
                if worker is None or worker.items >= ITEMS_PER_WORKER or worker.poll() is not None:
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
    with state.lock:
        if state.nursery is not None:
            state.nursery.close()
        for worker in state.workers:
            worker.close()
    state.starter.shutdown(wait=True)
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
