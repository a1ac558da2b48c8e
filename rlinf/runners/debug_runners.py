"""The loops of half a run, for work on one half: generation without an actor, or training without engines."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.config.schema import Config
from rlinf.data.records import Prompt
from rlinf.data.sampler import PromptSampler
from rlinf.rollout.contract import Stop
from rlinf.run_folder.folder import RunFolder
from rlinf.runners.learner import Learner, MegatronGroups
from rlinf.runners.own_failures import OwnFailures
from rlinf.runners.recorded import RecordedSteps
from rlinf.runners.requests import training_requests
from rlinf.runners.rollouts import Rollouts, Scored
from rlinf.runners.selection import group_advantages, next_groups, trained_samples
from rlinf.runners.step_metrics import advantage_metrics, rollout_metrics, staleness_metrics
from rlinf.runners.training_loop import StepResult, TrainingLoop


class DebugRunner(TrainingLoop):
    """Has no validation, and no state besides weights and step in its checkpoints."""

    async def begin(self) -> None: ...

    async def validate(self) -> dict[str, float]:
        return {}

    async def state(self, folder: Path) -> dict[str, Any]:
        return {}

    async def restore(self, folder: Path, state: dict[str, Any]) -> None: ...


class RolloutOnlyRunner(DebugRunner):
    """Every step generates and judges with the weights that the engines started with, and computes the advantages of training."""

    sampler: PromptSampler

    def __init__(
        self, config: Config, folder: RunFolder, cluster: Cluster, rollout: WorkerGroup, reward: WorkerGroup, prompts: Sequence[Prompt],
        sampler: PromptSampler, stop: Stop,
    ) -> None:  # fmt: skip
        super().__init__(config, folder, cluster, sampler, [])
        self.prompts, self.rollout, self.reward, self.stop = prompts, rollout, reward, stop
        self.rollouts = Rollouts(config, rollout, reward, self.timers)
        self.in_flight, self.engine_load = self.rollouts.in_flight, self.rollouts.dispatcher.load
        self.own_failures = OwnFailures(config.reward)

    async def ready(self) -> None:
        await asyncio.gather(self.rollout.ready(), self.reward.ready())

    async def take_step(self) -> StepResult:
        algorithm, dump, taken = self.config.algorithm, str(self.folder.paths.samples(self.step)), Counter[str]()

        async def generate(indices: Sequence[int]) -> list[Scored]:
            prompts = [self.prompts[i] for i in indices]
            return await self.rollouts.generate_groups(training_requests(algorithm, self.stop, self.step, prompts, taken, dump))

        await self.rollouts.begin_trace(self.step)
        with self.phase("rollout"):
            batch = await next_groups(self.sampler, algorithm, generate)
        await self.rollouts.end_trace()
        self.own_failures.tell(batch.generated, f"step {self.step}")
        headers = [header for header, _ in batch.scored]
        self.folder.record_order(self.step, [h.group_id for h in headers], [h.group_id for h in batch.generated])
        stats = await self.rollouts.engines.ask_all("stats")
        trained = trained_samples(headers, algorithm, self.config.data.seed)
        metrics = rollout_metrics(batch.generated) | advantage_metrics(group_advantages(headers, algorithm), trained, self.config)
        metrics |= batch.metrics | self.rollouts.metrics(batch.generated, stats)
        return StepResult(metrics, int(metrics["rollout/total_tokens"]), {"rollout": [s.memory_bytes for s in stats]}, stats)

    @property
    def finished(self) -> bool:
        return super().finished or self.sampler.exhausted(self.config.runner.max_epochs)


class TrainOnlyRunner(DebugRunner):
    """Trains on the groups of another run's journal, step by step from `first` on. reader: the workers that read it (workers.journal)."""

    def __init__(
        self, config: Config, folder: RunFolder, cluster: Cluster, megatron: MegatronGroups, reader: WorkerGroup, steps: RecordedSteps,
        first: int,
    ) -> None:  # fmt: skip
        super().__init__(config, folder, cluster, steps, megatron.trained)
        self.megatron, self.reader, self.steps, self.first = megatron, reader, steps, first
        self.learner = Learner(config, megatron)

    async def ready(self) -> None:
        await asyncio.gather(self.megatron.ready(), self.reader.ready())

    async def begin(self) -> None:
        self.step = self.first - 1

    async def take_step(self) -> StepResult:
        with self.phase("journal"):
            batch = await self.steps.take(self.step, self.reader)
        with self.phase("train"):
            groups = await self.learner.reward(batch.scored)
            advantages = group_advantages(groups.headers, self.config.algorithm)
            update = await self.learner.update(self.step, groups, advantages, str(self.folder.paths.tokens(self.step)))
        metrics = rollout_metrics(batch.generated) | staleness_metrics(groups.headers, self.step - 1) | groups.metrics | update.metrics
        metrics["perf/train_tokens_per_second"] = update.tokens / self.timers.seconds["train"]
        memory, written = groups.memory | update.memory, update.checkpoint_written
        return StepResult(metrics, int(metrics["rollout/total_tokens"]), memory, checkpoint_written=written)
