"""The base of all training loops: what every run does around a step (start or resume, validate, save, log), until the last one."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.cluster.phase import RESUME, START, Phase
from rlinf.config.schema import Config
from rlinf.metrics.logger import MetricLogger
from rlinf.metrics.progress import Progress
from rlinf.metrics.timers import Timers
from rlinf.rollout.contract import EngineStats
from rlinf.run_folder.folder import RunFolder
from rlinf.run_folder.resuming import groups_ahead
from rlinf.runners.saving import Saving


@dataclass(frozen=True)
class StepResult:
    """What a finished step reports.

    tokens: of all samples, prompts included. memory: component -> peak bytes of each of its ranks. engine_stats: one for each engine.
    checkpoint_written: whether all ranks report that their files of the checkpoint that is written in the background are on disk.
    """

    metrics: dict[str, float]
    tokens: int
    memory: Mapping[str, Sequence[int]] = field(default_factory=dict)
    engine_stats: Sequence[EngineStats] = ()
    checkpoint_written: bool = False


class StepSource(Protocol):
    """What the steps of a run are made of: the sampler of prompts or examples, or the steps of an earlier run."""

    def total_steps(self, max_epochs: int, max_steps: int, done: int = 0, waiting: int = 0) -> int:
        """The last step. done: the step from which the run goes on; waiting: batches that were taken for steps behind it."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainingLoop(ABC):
    """One run. The subclass says what a step is; status.py reads the attributes below from another thread.

    in_flight: group -> the worker that has it now. engine_load: samples at each engine now. last: the last step that this process finished.
    """

    in_flight: dict[str, str] = {}
    engine_load: Sequence[int] = ()
    last = StepResult({}, 0)

    def __init__(self, config: Config, folder: RunFolder, cluster: Cluster, sampler: StepSource, trained: Sequence[WorkerGroup]) -> None:
        self.config, self.folder, self.cluster, self.sampler = config, folder, cluster, sampler
        self.total_steps = sampler.total_steps(config.runner.max_epochs, config.runner.max_steps)
        self.saving = Saving(folder, trained, config.runner.async_checkpoint)
        self.timers = Timers()
        self.step = 0

    @abstractmethod
    async def ready(self) -> None:
        """Return when all workers are up."""

    @abstractmethod
    async def begin(self) -> None:
        """Called once before the first step of this process, after a checkpoint, if there is one, has been loaded."""

    @abstractmethod
    async def take_step(self) -> StepResult:
        """Make step number self.step."""

    @abstractmethod
    async def validate(self) -> dict[str, float]:
        """Metrics on the held-out data; empty when the run has no such data."""

    @abstractmethod
    async def state(self, folder: Path) -> dict[str, Any]:
        """What a resumed run needs besides weights, step and sampler, as JSON values; larger things may be written as files to `folder`."""

    @abstractmethod
    async def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Take back what state() gave."""

    async def run(self, logger: MetricLogger) -> None:
        """Start or resume, then make all remaining steps."""
        await self.start(logger)
        with frozen_heap():
            await self.take_steps(logger)

    async def take_steps(self, logger: MetricLogger) -> None:
        progress, runner = Progress(self.total_steps, self.step + 1), self.config.runner
        if self.step == 0 and runner.val_check_interval != 0 and (scores := await self.validate()):
            logger.log(0, scores | self.timers.collect())
        while not self.finished:
            self.step += 1
            self.last = await self.take_step()
            self.saving.written, metrics = self.last.checkpoint_written, self.last.metrics
            if self.due(runner.val_check_interval):
                metrics |= await self.validate()
            if self.due(runner.save_interval):
                await self.save(metrics)
            if self.saving.ready(self.finished):
                with self.phase("checkpoint"):
                    async with self.actor_alone():
                        await self.saving.complete()
            metrics |= self.timers.collect(tokens=self.last.tokens)
            logger.log(self.step, metrics)
            progress.step(self.step, metrics)

    async def start(self, logger: MetricLogger) -> None:
        """Wait for the workers, and load the checkpoint that the run goes on from, if there is one."""
        self.cluster.phase = START
        await self.ready()
        if self.folder.resume is not None:
            folder, state = self.folder.resume.step_dir, self.folder.resume.state
            self.cluster.phase = RESUME
            for group in self.saving.groups:
                await group.call_all("load", str(folder))
            self.sampler.load_state_dict(state["sampler"])
            self.step, runner = state["step"], self.config.runner
            self.total_steps = self.sampler.total_steps(runner.max_epochs, runner.max_steps, self.step, groups_ahead(state))
            await self.restore(folder, state)
            if logger.last_step < self.step:  # the run died between the checkpoint and the line of its step
                logger.log(self.step, state["metrics"])
        await self.begin()

    async def save(self, metrics: dict[str, float]) -> None:
        """Write the checkpoint of this step. metrics: of the step, whose line in metrics.jsonl is written only afterwards."""

        async def describe(folder: Path) -> dict[str, Any]:
            return {"step": self.step, "sampler": self.sampler.state_dict(), "metrics": metrics} | await self.state(folder)

        with self.phase("checkpoint"):
            async with self.actor_alone():
                await self.saving.save(self.step, describe)

    @asynccontextmanager
    async def actor_alone(self) -> AsyncIterator[None]:
        """Around what needs the whole actor outside of training, such as a checkpoint; where devices are shared, the engines give way."""
        yield

    @property
    def finished(self) -> bool:
        """Whether this was the last step."""
        return self.step >= self.total_steps

    def due(self, interval: int) -> bool:
        """Whether this step is one of every `interval` steps, or the last; interval -1 = only the last, 0 = never."""
        return interval != 0 and (self.finished or (interval > 0 and self.step % interval == 0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as time/<name>; watchdog and status see it as what the run is doing now."""
        self.cluster.phase = Phase(name, self.step)
        with self.timers.phase(name):
            yield


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Objects that exist now (libraries, prompts) live to the end of the run anyway, so in the block the garbage collector ignores them:
    otherwise it would walk over all of them again and again while steps make their headers."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
