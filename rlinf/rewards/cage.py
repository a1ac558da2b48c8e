"""The processes of rewards/pool.py. The nursery loads once what the workers of its kind need, and forks a worker whenever it is asked to.
A worker reads items from stdin and answers on stdout, one at a time, under limits of its own.

An item comes as [seconds that it may take, item].

python -m rlinf.rewards.cage KIND PARENT_PID MEMORY_BYTES      (the nursery; its stdin is the socket over which it is asked)
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import math
import os
import resource
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterable
from multiprocessing.connection import wait
from typing import Any, BinaryIO, NoReturn

PR_SET_PDEATHSIG = 1
RECURSION_LIMIT = 20_000  # pure Python frames; the parser bounds its depth itself

THREAD_STACK = 1 << 20  # bytes; with the usual 8 MiB a thread, those that wait for answers of a server would soon use up the memory limit


def die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def read_item(stream: BinaryIO) -> Any:
    header = stream.read(4)
    if len(header) < 4:
        return None
    return json.loads(stream.read(struct.unpack("<I", header)[0]))


def write_reply(stream: BinaryIO, reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode()
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def fork_workers(control: socket.socket) -> None:
    """Fork a worker for every three descriptors that come: its stdin, its stdout, and a socket that is told of its birth (its pid) and of
    its end (its exit status, negative for a signal), and whose other end is closed for writing when the worker is to be killed: here no
    pid can be another process's already. Returns in each worker; ends this process at SIGTERM, workers first."""
    workers: dict[int, socket.socket] = {}
    wanted: set[int] = set()  # those of them that are not to be killed
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    this = os.getpid()
    gc.freeze()  # a collection would write to every page, and the workers would no longer share them
    while True:
        heard: list[socket.socket | int] = [control, woken, *(workers[pid] for pid in wanted)]
        ready = wait(heard)  # select() would refuse descriptors from 1024 on
        asked = control in ready
        told = os.read(woken, 1 << 16) if woken in ready else b""
        for pid in [pid for pid in wanted if workers[pid] in ready]:  # nothing is ever sent: this is the end
            os.kill(pid, signal.SIGKILL)
            wanted.discard(pid)
        _bury(workers)
        wanted &= workers.keys()
        fds = socket.recv_fds(control, 1, 3)[1] if asked else []
        if signal.SIGTERM in told or (asked and not fds):  # or whoever asks has ended
            _end(workers)
        if not fds:
            continue
        life = socket.socket(fileno=fds.pop())
        pid = os.fork()
        if pid == 0:
            die_with_parent(this)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(fds[0], 0)
            os.dup2(fds[1], 1)
            for fd in (*fds, woken, wake):
                os.close(fd)
            for other in (control, life, *workers.values()):
                other.close()
            return
        for fd in fds:
            os.close(fd)
        workers[pid] = life
        wanted.add(pid)
        _tell(life, pid)


def _bury(workers: dict[int, socket.socket]) -> None:
    """Tell of workers that have ended."""
    while workers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        with workers.pop(ended[0]) as life:
            _tell(life, os.waitstatus_to_exitcode(ended[1]))


def _end(workers: Iterable[int]) -> NoReturn:
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    for pid in workers:
        os.waitpid(pid, 0)
    os._exit(0)


def _tell(life: socket.socket, number: int) -> None:
    try:
        life.send(struct.pack("<i", number))
    except BrokenPipeError:  # whoever asked for this worker wants it no more
        pass


def limit_cpu(seconds: float) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1, hard))


def main(kind: str, parent: int, memory_bytes: int) -> None:
    die_with_parent(parent)
    from rlinf.config.own_code import is_own
    from rlinf.rewards.own import PART, give_part, told
    from rlinf.rewards.tasks import judge_caged, warm_up

    own = is_own(kind)
    if not own:  # a user's file may start threads, or use a GPU, when it is loaded: a fork would lose them
        logging.disable(logging.CRITICAL)
        warm_up(kind)
    fork_workers(socket.socket(fileno=os.dup(0)))
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what is printed must not reach the protocol
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # line by line: a kill must not lose what was printed before
    sys.setrecursionlimit(RECURSION_LIMIT)
    if own:
        threading.stack_size(THREAD_STACK)
        warm_up(kind)
    write_reply(replies, {"ready": True})
    sys.excepthook = lambda _kind, error, _traceback: write_reply(replies, {"limit": "died", "why": told(error, kind)})
    for fd in () if own else (1, 2):  # what a library prints must not reach the log; a user wants to see what is printed
        os.dup2(nothing, fd)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (asked := read_item(requests)) is not None:
        seconds, item = asked
        if not own:  # threads of a user's function may use several cores; the time limit is the parent's to keep
            limit_cpu(seconds)
        try:
            reply = give_part(*item[1:]) if item[0] == PART else judge_caged(*item)._asdict()
        except MemoryError:
            reply = {"limit": "memory"}
        except RecursionError:
            reply = {"limit": "recursion"}
        write_reply(replies, reply)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
