"""Measures the seconds of each phase of a step, by the monotonic clock."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timers:
    """Seconds of the phases of a step, which may overlap.

    seconds: how long a phase ran; when it runs several times at once, the time counts once.
    alone: how long it ran while no other phase did: what the step would gain if the phase took no time.
    A phase that is running at collect() is divided between the two steps.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.started = self.seen = clock()
        self.running: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.alone: dict[str, float] = {}
        self.overlap = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._settle()
        self.running[name] += 1
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._settle()
            self.running -= Counter({name: 1})

    def collect(self, tokens: int | None = None) -> dict[str, float]:
        """time/<phase> and time/step since the last call, and perf/tokens_per_second when the step's tokens are given. Then counts from 0.

        When phases overlapped, also time/overlap, the seconds in which more than one ran, and time/alone_<phase>; together these are at
        most time/step.
        """
        now = self._settle()
        step = now - self.started
        metrics = {f"time/{name}": seconds for name, seconds in self.seconds.items()} | {"time/step": step}
        if self.overlap:
            metrics |= {f"time/alone_{name}": self.alone.get(name, 0.0) for name in self.seconds} | {"time/overlap": self.overlap}
        if tokens is not None:
            metrics["perf/tokens_per_second"] = tokens / max(step, 1e-9)
        self.started, self.seconds, self.alone, self.overlap = now, dict.fromkeys(self.running, 0.0), {}, 0.0
        return metrics

    def _settle(self) -> float:
        """Credit the time since the last change to the phases that were running. Returns the time now."""
        now = self.clock()
        elapsed, self.seen = now - self.seen, now
        for name in self.running:
            self.seconds[name] += elapsed
        if len(self.running) == 1:
            (name,) = self.running
            self.alone[name] = self.alone.get(name, 0.0) + elapsed
        elif self.running:
            self.overlap += elapsed
        return now
