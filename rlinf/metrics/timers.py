"""Seconds by phase, on the monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """Collects `time/<phase>` over one step. A phase that runs several times, or at the same time as another, adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def collect(self, tokens: int | None = None) -> dict[str, float]:
        """time/<phase> and time/step since the last call, and perf/tokens_per_second when the step's tokens are given; starts anew."""
        now = time.monotonic()
        step = now - self.started
        metrics = {f"time/{name}": seconds for name, seconds in self.seconds.items()} | {"time/step": step}
        if tokens is not None:
            metrics["perf/tokens_per_second"] = tokens / max(step, 1e-9)
        self.seconds, self.started = {}, now
        return metrics
