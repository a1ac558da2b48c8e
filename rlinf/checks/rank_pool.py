"""Training ranks on this machine that are used for many layouts.

They are gloo processes that run one function after another, each in its own TP x CP x PP x DP layout. Imports take seconds, while new
process groups take a fraction of a second; so proofs and tests of many layouts share one pool, and its ranks are forked from a process that
has imported everything once (multiprocessing's fork server, with rlinf.checks.rank_imports).
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from rlinf.cluster.processes import die_with_parent
from rlinf.errors import RunFailed
from rlinf.hardware import VISIBLE_GPUS

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(seconds=120)
LOG_LINES = 40


class RankPool:
    """`size` processes, begun when they are first needed. When a rank fails or dies, all are ended; the next run() starts new ones."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="rlinf-ranks-")
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._layout: tuple[int, int, int, int] | None = None
        self._groups = 0

    def start(self) -> None:
        """Begin the imports, unless they are done. Returns at once; they go on while the caller does something else."""
        forkserver.set_forkserver_preload(["rlinf.checks.rank_imports"])
        forkserver.ensure_running()

    def _begin(self) -> None:
        self.start()
        context = multiprocessing.get_context("forkserver")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, self._folder.name), name=f"rank-{rank}", daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., T], *args: Any, ranks: int | None = None, tp: int = 1, pp: int = 1, cp: int = 1) -> list[T]:
        """Call function(at, *args) in the first `ranks` processes (default: all), laid out as TP x CP x PP x DP. Returns the results by
        rank.

        The function belongs to a module; its arguments and results are plain data or numpy arrays. Raises RunFailed, with the rank's
        traceback, as soon as a rank fails or dies.
        """
        if not self._processes:
            self._begin()
        ranks = ranks or self.size
        if (ranks, tp, pp, cp) != self._layout:
            self._layout = (ranks, tp, pp, cp)
            self._groups += 1
        for pipe in self._pipes[:ranks]:
            pipe.send((function, args, self._groups, *self._layout))
        results: dict[int, T] = {}
        while len(results) < ranks:
            ready = wait([*self._pipes[:ranks], *(p.sentinel for p in self._processes)])
            for rank, pipe in enumerate(self._pipes[:ranks]):
                if pipe in ready and pipe.poll() and (answer := _receive(pipe)) is not None:
                    (results[rank],) = answer
            if any(not p.is_alive() for p in self._processes):
                self._fail()
        return [results[rank] for rank in range(ranks)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes):
            process.join()
            pipe.close()
        self._processes, self._pipes, self._layout = [], [], None

    def _fail(self) -> None:
        logs = {rank: Path(self._folder.name, f"rank-{rank}.log") for rank, p in enumerate(self._processes) if not p.is_alive()}
        first = min(logs, key=lambda rank: logs[rank].stat().st_mtime)  # the others' collectives fail because of it
        code = self._processes[first].exitcode
        self.close()
        tail = logs[first].read_text(errors="replace").splitlines()[-LOG_LINES:]
        raise RunFailed("\n".join([f"rank {first} ended with exit code {code}", *tail]))

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._folder.cleanup()


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:  # the process is dying; its sentinel says so next
        return None


def _serve(rank: int, pipe: Connection, folder: str) -> None:
    """The life of a rank: it runs jobs until the other end of the pipe closes. Errors are not caught: one ends the process, with the
    traceback in its log."""
    die_with_parent()  # the fork server, which ends with the process that uses the pool
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    log = open(Path(folder, f"rank-{rank}.log"), "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable()
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", VISIBLE_GPUS: ""}  # Megatron puts its tensors on a GPU that it sees

    import torch
    import torch.distributed as dist

    from rlinf.training import parallel

    torch.set_num_threads(1)
    joined, at = 0, None
    while (job := _receive(pipe)) is not None:
        function, args, groups, ranks, tp, pp, cp = job
        if groups != joined:
            if dist.is_initialized():
                gc.collect()  # an engine is full of cycles, and a group that something refers to keeps its threads
                dist.destroy_process_group()
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/groups-{groups}", rank=rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT
            )
            joined, at = groups, parallel.set_layout(tp, pp, cp)
        pipe.send((function(at, *args),))
    sys.exit(0)
