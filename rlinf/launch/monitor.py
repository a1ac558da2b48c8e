"""Watches a run while it goes on: once a second the watchdog looks for a hang, and the status file is replaced."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlinf.cluster.cluster import Cluster
from rlinf.launch.status import Status
from rlinf.launch.watchdog import Watchdog
from rlinf.runners.training_loop import TrainingLoop

PERIOD = 1.0


class Monitor:
    """Works in threads, so that it goes on when the loop is stuck.

    Watchdog and status have a thread each: a status file on a file system that hangs must not stop the watchdog, which is there to report
    such a hang.
    """

    def __init__(self, cluster: Cluster, loop: TrainingLoop, watchdog: Watchdog, status: Status) -> None:
        self.cluster, self.loop, self.watchdog, self.status = cluster, loop, watchdog, status
        self.closed = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Run both tasks while the block runs; the last status says how the run ended."""
        tasks: dict[str, Callable[[], None]] = {"rlinf-watchdog": self.look, "rlinf-status": self.status.write}
        threads = [threading.Thread(target=self.repeat, args=(task,), name=name, daemon=True) for name, task in tasks.items()]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.closed.set()
            for thread in threads:
                thread.join()
            self.status.end(sys.exc_info()[1])

    def look(self) -> None:
        self.watchdog.look(self.cluster.phase, self.loop.step, time.time())

    def repeat(self, task: Callable[[], None]) -> None:
        task()
        while not self.closed.wait(PERIOD):
            task()
