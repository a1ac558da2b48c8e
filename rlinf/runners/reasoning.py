"""The RL training loop, in the order of the algorithm: prompts, groups, verdicts, advantages, update, new weights."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.config.schema import Config
from rlinf.data.records import Prompt
from rlinf.data.sampler import PromptSampler
from rlinf.rollout.contract import Stop
from rlinf.run_folder.folder import RunFolder
from rlinf.run_paths import GROUPS_AHEAD
from rlinf.runners.learner import Learner, MegatronGroups
from rlinf.runners.own_failures import OwnFailures
from rlinf.runners.requests import GroupRequest, training_requests, validation_requests
from rlinf.runners.rollouts import Rollouts
from rlinf.runners.schedule import GroupsOnDisk, Schedule
from rlinf.runners.schedule_logical import Logical
from rlinf.runners.schedule_wallclock import Wallclock
from rlinf.runners.selection import StepBatch, group_advantages
from rlinf.runners.shared_devices import SharedDevices
from rlinf.runners.step_metrics import rollout_metrics, staleness_metrics
from rlinf.runners.training_loop import StepResult, TrainingLoop
from rlinf.runners.validation import ValidationScores, score_validation, validation_metrics
from rlinf.runners.weight_sync import Synced, WeightSync
from rlinf.scheduling.turns import Turn

SCHEDULES: dict[str, Callable[..., Schedule]] = {"logical": Logical, "wallclock": Wallclock}


class ReasoningRunner(TrainingLoop):
    """Runs in the driver, which sees group headers only: the tokens go from rollout workers to reward and train workers directly."""

    def __init__(
        self, config: Config, folder: RunFolder, cluster: Cluster, megatron: MegatronGroups, rollout: WorkerGroup, reward: WorkerGroup,
        prompts: Sequence[Prompt], val_prompts: Sequence[Prompt], sampler: PromptSampler, stop: Stop,
    ) -> None:  # fmt: skip
        super().__init__(config, folder, cluster, sampler, megatron.trained)
        self.megatron, self.rollout, self.reward = megatron, rollout, reward
        self.prompts, self.val_prompts, self.stop = prompts, val_prompts, stop
        self.rollouts = Rollouts(config, rollout, reward, self.timers)
        self.in_flight, self.engine_load = self.rollouts.in_flight, self.rollouts.dispatcher.load
        self.schedule: Schedule = SCHEDULES[config.algorithm.schedule](
            config, sampler, self.rollouts, GroupsOnDisk(reward, folder.paths.samples), self.requests, self.total_steps
        )
        self.learner = Learner(config, megatron)
        self.sync = WeightSync(config, megatron.actor, self.rollouts.engines, val_prompts or prompts)
        self.devices = SharedDevices(self.rollouts.engines, config.rollout.offload)
        self.own_failures = OwnFailures(config.reward)
        self.scores: dict[int, ValidationScores] = {}

    async def take_step(self) -> StepResult:
        """One step of the algorithm: generate, judge, train, give the new weights to the engines."""
        batch = await self.generate()
        with self.phase("train"):
            groups = await self.learner.reward(batch.scored)
            advantages = group_advantages(groups.headers, self.config.algorithm)
            update = await self.learner.update(self.step, groups, advantages, str(self.folder.paths.tokens(self.step)))
        with self.phase("rollout"):
            await self.schedule.before_sync()
        await self.rollouts.end_trace()
        synced = await self.publish_weights()
        metrics = rollout_metrics(batch.generated) | staleness_metrics(groups.headers, self.step - 1) | batch.metrics
        metrics |= groups.metrics | update.metrics | synced.metrics | self.rollouts.metrics(batch.generated, synced.engine_stats)
        metrics["perf/train_tokens_per_second"] = update.tokens / self.timers.seconds["train"]
        memory = groups.memory | update.memory | {"rollout": [s.memory_bytes for s in synced.engine_stats]}
        return StepResult(metrics, int(metrics["rollout/total_tokens"]), memory, synced.engine_stats, update.checkpoint_written)

    async def generate(self) -> StepBatch:
        """The groups of this step with their verdicts. When it returns, shared devices belong to the actor."""
        await self.rollouts.begin_trace(self.step)
        with self.phase("rollout"):
            batch = await self.schedule.take(self.step)
            await self.schedule.before_training()
        if self.config.cluster.backend == "local":  # a process has only one profiler, and the actor needs it next
            await self.rollouts.end_trace()
        await self.devices.pass_to(Turn.TRAIN)
        self.own_failures.tell(batch.generated, f"step {self.step}")
        headers = [header for header, _ in batch.scored]
        self.sync.refuse_foreign_versions(headers)
        self.folder.record_order(self.step, [h.group_id for h in headers], [h.group_id for h in batch.generated])
        if not self.config.algorithm.max_staleness:
            self.sync.forget_sources()
        return batch

    async def publish_weights(self) -> Synced:
        """Give the actor's weights to the engines. When it returns, shared devices belong to the engines."""
        with self.phase("sync_weights"):
            await self.devices.pass_to(Turn.SYNC)
            synced = await self.sync.publish(self.step)
            await self.devices.pass_to(Turn.ROLLOUT)
        return synced

    def requests(self, step: int, indices: Sequence[int], taken: Counter[str]) -> list[GroupRequest]:
        """What to ask of the engines for these prompts of `step`. taken: see training_requests."""
        dump = str(self.folder.paths.samples(step))
        return training_requests(self.config.algorithm, self.stop, step, [self.prompts[i] for i in indices], taken, dump)

    @asynccontextmanager
    async def actor_alone(self) -> AsyncIterator[None]:
        await self.devices.pass_to(Turn.SAVE)
        yield
        await self.devices.pass_to(Turn.ROLLOUT)

    async def validate(self) -> dict[str, float]:
        if not self.val_prompts:
            return {}
        with self.phase("validate"):
            dump = str(self.folder.paths.validation(self.step))
            how = self.config.validation, self.config.algorithm, self.stop
            wanted = validation_requests(*how, self.step, self.val_prompts, dump)
            headers = [header for header, _ in await self.rollouts.generate_held_out(wanted)]
        self.own_failures.tell(headers, str(self.cluster.phase))
        self.scores[self.step] = score_validation(headers, len(self.val_prompts))
        return validation_metrics(self.scores[self.step], [p.source for p in self.val_prompts], self.config.validation.n)

    async def ready(self) -> None:
        await asyncio.gather(self.megatron.ready(), self.rollout.ready(), self.reward.ready())

    async def begin(self) -> None:
        await self.publish_weights()

    async def state(self, folder: Path) -> dict[str, Any]:
        validation = {step: scores.to_json() for step, scores in self.scores.items()}
        kept = await self.schedule.save(folder / GROUPS_AHEAD)
        return {"weight_version": self.step, "validation": validation, "response_lengths": self.rollouts.lengths, "schedule": kept}

    async def restore(self, folder: Path, state: dict[str, Any]) -> None:
        if self.folder.measures_as(state):
            scores = {int(step): ValidationScores.from_json(s) for step, s in state["validation"].items()}
            self.scores = {step: s for step, s in scores.items() if len(s.right) == len(self.val_prompts)}
        self.rollouts.lengths.update(state["response_lengths"])
        self.schedule.total_steps = self.total_steps
        await self.schedule.restore(folder / GROUPS_AHEAD, state["schedule"], self.step)

    @property
    def finished(self) -> bool:
        """Whether this was the last step; with dynamic sampling the data may be used up before total_steps."""
        return super().finished or self.schedule.exhausted
