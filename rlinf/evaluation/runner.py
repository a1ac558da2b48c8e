"""The loop of an evaluation: sends requests to engines and groups to reward workers, which write the samples. The driver sees headers and
verdicts only."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup, gather_or_cancel
from rlinf.cluster.phase import START, Phase
from rlinf.data.records import GroupHeader
from rlinf.evaluation.folder import SetFolder
from rlinf.evaluation.problems import SHARE, Unit
from rlinf.metrics.progress import duration
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.scheduling.dispatcher import Dispatcher

EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """One request, and the file for its samples."""

    unit: Unit
    sampling: SamplingParams
    stop: Stop
    max_tokens: int
    folder: SetFolder


class EvaluationRunner:
    """Sends all requests at once: an engine that has finished a problem takes the next, of whatever set."""

    def __init__(self, cluster: Cluster, rollout: WorkerGroup, reward: WorkerGroup, running_requests: int, progress: Progress) -> None:
        self.cluster, self.rollout, self.reward, self.progress = cluster, rollout, reward, progress
        self.dispatcher = Dispatcher(rollout.size, running_requests, SHARE)

    async def run(self, jobs: Sequence[Job]) -> None:
        """Generate and judge all jobs; when it returns, every sample is on disk."""
        self.cluster.phase = START
        await asyncio.gather(self.rollout.ready(), self.reward.ready())
        self.cluster.phase = Phase("evaluation")
        self.progress.begin()
        await gather_or_cancel([self.answer(job) for job in jobs])

    async def answer(self, job: Job) -> None:
        unit = job.unit
        request = GenerateRequest(unit.group_id, unit.prompt.token_ids, unit.count, job.sampling, job.stop, job.max_tokens)
        async with self.dispatcher.seat(unit.count) as rank:
            header_ref, group_ref = self.rollout.ref(rank, "generate", request, unit.prompt, returns=2)
            header: GroupHeader = await header_ref
        judge = rank % self.reward.size
        verdicts = await self.reward.call(judge, "judge", group_ref, str(job.folder.part(judge)))
        self.progress.finished(header.with_verdicts(verdicts))


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
