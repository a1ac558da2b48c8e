"""What a run uses on this machine: CPU seconds by phase and peak memory of the driver and of every process that carries the run id."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlinf.cluster.phase import START, Phase
from rlinf.cluster.processes import marked

INTERVAL = 2.0
PSS_SHARE = 0.02
TICK = os.sysconf("SC_CLK_TCK")


class Usage:
    """Takes a sample from /proc every two seconds. Memory is PSS, in which a page shared by k processes counts 1/k in each.

    To compute PSS the kernel walks over all pages, which takes seconds where hundreds of GB are mapped; so memory is asked for so seldom
    that it takes at most 2 % of a core.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.cpu_seconds: dict[str, float] = defaultdict(float)
        self.peak_pss, self.peak_phase = 0, START.word
        self._seen: dict[int, float] = {}
        self._pss_due = 0.0
        self._stop = threading.Event()

    @contextmanager
    def sampling(self, phase: Callable[[], Phase]) -> Iterator[None]:
        """Take samples while the block runs. phase: returns what the run is doing at that moment."""
        thread = threading.Thread(target=self._run, args=(phase,), daemon=True, name="usage")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def describe(self) -> str:
        parts = "  ".join(f"{name} {seconds:.0f}" for name, seconds in sorted(self.cpu_seconds.items(), key=lambda x: -x[1]))
        total = sum(self.cpu_seconds.values())
        return (
            f"CPU seconds on this machine: {total:.0f} ({parts}); peak memory (PSS) {self.peak_pss / 2**30:.2f} GiB, in {self.peak_phase}"
        )

    def _run(self, phase: Callable[[], Phase]) -> None:
        self._sample(phase())
        while not self._stop.wait(INTERVAL):
            self._sample(phase())
        self._sample(phase())

    def _sample(self, phase: Phase) -> None:
        pss, cost, with_memory = 0, 0.0, time.monotonic() >= self._pss_due
        for pid in [os.getpid(), *marked(self.run_id)]:
            try:
                spent, before = cpu_seconds(pid), time.thread_time()
                pss += pss_bytes(pid) if with_memory else 0
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile; its time is in its parent's children times
            self.cpu_seconds[phase.word] += max(0.0, spent - self._seen.get(pid, 0.0))
            cost += time.thread_time() - before
            self._seen[pid] = spent
        if with_memory:
            self._pss_due = time.monotonic() + cost / PSS_SHARE
        if pss > self.peak_pss:
            self.peak_pss, self.peak_phase = pss, phase.word


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICK


def pss_bytes(pid: int) -> int:
    """Memory of a process; 0 where it may not be read, as for a process that has changed its user."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except PermissionError:
        return 0
    for line in lines:
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
