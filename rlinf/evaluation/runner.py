"""The loop of an evaluation: has groups generated and judged as training does; the reward workers write the samples. The driver sees
headers and verdicts only."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup, gather_or_cancel
from rlinf.cluster.phase import START, Phase
from rlinf.config.schema import Config
from rlinf.data.records import GroupHeader
from rlinf.metrics.progress import duration
from rlinf.runners.own_failures import OwnFailures
from rlinf.runners.requests import GroupRequest
from rlinf.runners.rollouts import Rollouts

EVERY_SECONDS = 10.0


class EvaluationRunner:
    """Asks for all groups at once: an engine that has finished a problem takes the next, of whatever set. An engine that dies or hangs is
    replaced, and its groups are asked for again, as in training (Rollouts)."""

    def __init__(self, config: Config, cluster: Cluster, rollout: WorkerGroup, reward: WorkerGroup, progress: Progress) -> None:
        self.cluster, self.rollout, self.reward, self.progress = cluster, rollout, reward, progress
        self.rollouts = Rollouts(config, rollout, reward)
        self.first_failures, self.all_failures = (OwnFailures(config.reward) for _ in range(2))
        self.judged: list[GroupHeader] = []

    async def run(self, wanted: Sequence[GroupRequest]) -> None:
        """Generate and judge all groups; when it returns, every sample is on disk."""
        self.cluster.phase = START
        await asyncio.gather(self.rollout.ready(), self.reward.ready())
        self.cluster.phase = Phase("evaluation")
        self.progress.begin()
        await gather_or_cancel([self.answer(group) for group in wanted])
        self.all_failures.tell(self.judged, self.progress.label)

    async def answer(self, group: GroupRequest) -> None:
        header, _ = await self.rollouts.generate_group(group)
        self.first_failures.tell([header], f"{self.progress.label}, {group.name}")  # at once: the end may be hours away
        self.judged.append(header)
        self.progress.finished(header)


class Progress:
    """A line every ten seconds and at the end: `base  samples 480/960  right 0.312  cut 0.110  no box 0.020  tokens/s 812  ETA 3:05`."""

    def __init__(
        self, label: str, samples: int, done: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self.label, self.samples, self.done, self.before, self.clock = label, samples, done, done, clock
        self.console = Console(file=stream or sys.stderr, soft_wrap=True, highlight=False)
        self.right = self.cut = self.no_box = self.tokens = 0
        self.begin()

    def begin(self) -> None:
        """Start counting, for speeds."""
        self.started = self.printed = self.clock()

    def finished(self, header: GroupHeader) -> None:
        self.done += len(header.sample_ids)
        self.tokens += sum(header.response_lengths)
        self.cut += sum(f.cut_off for f in header.finishes)
        self.right += sum(header.right)
        self.no_box += sum(v is not None and v.extracted is None for v in header.verdicts)
        if self.done == self.samples or self.clock() - self.printed >= EVERY_SECONDS:
            self.printed = self.clock()
            self.console.print(self.line())

    def line(self) -> str:
        new, spent = self.done - self.before, max(self.clock() - self.started, 1e-9)
        left = spent / new * (self.samples - self.done)
        shares = "  ".join(
            f"{name} {count / new:.3f}" for name, count in (("right", self.right), ("cut", self.cut), ("no box", self.no_box))
        )
        speed = f"tokens/s {self.tokens / spent:,.0f}  ETA {duration(left)}"
        return f"[bold]{escape(self.label)}[/bold]  samples {self.done}/{self.samples}  {shares}  {speed}"
