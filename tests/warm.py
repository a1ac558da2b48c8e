"""Commands in a fresh process each, forked from one that has imported torch, Megatron and rlinf: that is most of a small run's time.

python -m tests.warm        (the process that forks: a JSON request a line on stdin; the child's pid, then its exit code on stdout)
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "rlinf.cli",
    "rlinf.launch.train",
    "rlinf.workers.actor",
    "rlinf.workers.critic",
    "rlinf.workers.rollout",
    "rlinf.workers.reward",
)


class Warm:
    """The forking process of this test process, and what is asked of it."""

    def __init__(self) -> None:
        env = dict(os.environ, PYTHONPATH=str(ROOT), OPENBLAS_NUM_THREADS="1")  # its threads would be lost in a fork
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.process.kill)

    def run(self, words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """`python -m rlinf *words`, with this process's folder and environment."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, err)]
            self.process.stdin.write(json.dumps({"words": words, "cwd": os.getcwd(), "env": {**os.environ}, "files": files}) + "\n")
            self.process.stdin.flush()
            pid = int(self.process.stdout.readline())
            late = threading.Event()
            timer = threading.Timer(timeout, lambda: (late.set(), os.kill(pid, signal.SIGKILL)))
            timer.start()
            code = int(self.process.stdout.readline())
            timer.cancel()
            found = [file.seek(0) or file.read() for file in (out, err)]
        if late.is_set():
            raise subprocess.TimeoutExpired(words, timeout, *found)
        return subprocess.CompletedProcess(words, code, *found)


def warm_rlinf(*words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    global _warm
    if _warm is None or _warm.process.poll() is not None:
        _warm = Warm()
    return _warm.run([*words], timeout)


_warm: Warm | None = None


def become(request: dict[str, Any]) -> None:
    """The child: what `python -m rlinf` would be."""
    for number, path in enumerate(request["files"], 1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["rlinf", *request["words"]]
    runpy.run_module("rlinf", run_name="__main__", alter_sys=True)


def main() -> None:
    for name in PRELOADED:
        __import__(name)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would lose all but one"
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(request)
            return
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
