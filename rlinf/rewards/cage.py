"""The child process of rewards/pool.py: reads items from stdin and answers on stdout, one at a time, under limits of its own.

An item comes as [seconds that it may take, item].

python -m rlinf.rewards.cage KIND PARENT_PID MEMORY_BYTES
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

PR_SET_PDEATHSIG = 1
RECURSION_LIMIT = 20_000  # pure Python frames; the parser bounds its depth itself


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


def limit_cpu(seconds: float) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1, hard))


def main(kind: str, parent: int, memory_bytes: int) -> None:
    die_with_parent(parent)
    from rlinf.config.own_code import is_own
    from rlinf.rewards.own import PART, give_part
    from rlinf.rewards.tasks import judge_caged, warm_up

    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing, own = os.open(os.devnull, os.O_RDWR), is_own(kind)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what is printed must not reach the protocol
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # line by line: a kill must not lose what was printed before
    if not own:
        logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(RECURSION_LIMIT)
    warm_up(kind)
    write_reply(replies, {"ready": True})
    sys.excepthook = lambda _kind, error, _traceback: write_reply(
        replies, {"limit": "died", "why": f"{type(error).__name__}: {error}"[:200]}
    )
    for fd in () if own else (1, 2):  # what a library prints must not reach the log; a user wants to see what is printed
        os.dup2(nothing, fd)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (asked := read_item(requests)) is not None:
        seconds, item = asked
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
