"""What every training run does around a step: start or go on, validate, save, log, until the last step."""

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
from rlinf.runners.resuming import ahead
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.saving import Saving


@dataclass(frozen=True)
class StepResult:
    """What became of a step.

    tokens: of all samples, prompts included. memory: component -> peak bytes of its ranks. engine_stats: by engine. checkpoint_written:
    whether all ranks say that the files of the checkpoint in the background are on disk.
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
    """One run. What it learns from, and how, is in the subclass; status.py looks at it from another thread.

    in_flight: group -> who has it now. engine_load: samples at each engine now. last: the last finished step of this process.
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
        """What comes between the checkpoint, if there was one, and the first step."""

    @abstractmethod
    async def take_step(self) -> StepResult:
        """Step self.step."""

    @abstractmethod
    async def validate(self) -> dict[str, float]:
        """Metrics of the held-out data; none where there are none."""

    @abstractmethod
    async def state(self, folder: Path) -> dict[str, Any]:
        """What a resumed run needs beside weights, step and sampler; files may go into `folder`."""

    @abstractmethod
    async def restore(self, folder: Path, state: dict[str, Any]) -> None: ...

    async def run(self, logger: MetricLogger) -> None:
        """All steps from where the run stands to its end."""
        await self.start(logger)
        with long_lived():
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
        """Workers up, checkpoint loaded."""
        self.cluster.phase = START
        await self.ready()
        if self.folder.resume is not None:
            folder, state = self.folder.resume.step_dir, self.folder.resume.state
            self.cluster.phase = RESUME
            for group in self.saving.groups:
                await group.call_all("load", str(folder))
            self.sampler.load_state_dict(state["sampler"])
            self.step, runner = state["step"], self.config.runner
            self.total_steps = self.sampler.total_steps(runner.max_epochs, runner.max_steps, self.step, ahead(state))
            await self.restore(folder, state)
            if logger.last_step < self.step:  # the run died between the checkpoint and the line of its step
                logger.log(self.step, state["metrics"])
        await self.begin()

    async def save(self, metrics: dict[str, float]) -> None:
        """`metrics` of the step: its line is written only after the checkpoint."""

        async def describe(folder: Path) -> dict[str, Any]:
            return {"step": self.step, "sampler": self.sampler.state_dict(), "metrics": metrics} | await self.state(folder)

        with self.phase("checkpoint"):
            async with self.actor_alone():
                await self.saving.save(self.step, describe)

    @asynccontextmanager
    async def actor_alone(self) -> AsyncIterator[None]:
        """Around what needs the whole actor outside of training."""
        yield

    @property
    def finished(self) -> bool:
        """Whether this was the last step."""
        return self.step >= self.total_steps

    def due(self, interval: int) -> bool:
        """Every `interval` steps and after the last one; -1 = after the last one alone; 0 = never."""
        return interval != 0 and (self.finished or (interval > 0 and self.step % interval == 0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time it as time/<name>, and say what the run is doing now."""
        self.cluster.phase = Phase(name, self.step)
        with self.timers.phase(name):
            yield


@contextmanager
def long_lived() -> Iterator[None]:
    """What is there now (libraries, prompts) stays:
    the garbage collector does not walk over it again and again while steps make their headers."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
