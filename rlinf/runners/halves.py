"""Half a run, for work on one half: engines and verdicts without an actor, or training without engines."""

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
from rlinf.runners.learner import Learner
from rlinf.runners.recorded import RecordedSteps
from rlinf.runners.rollouts import Rollouts
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.selection import advantages_of, known_advantages, next_groups, training_orders
from rlinf.runners.training_loop import TrainingLoop
from rlinf.scheduling.rollout_metrics import rollout_metrics
from rlinf.scheduling.staleness import staleness


class Half(TrainingLoop):
    """Nothing is held out, and nothing beside weights and step is kept."""

    async def begin(self) -> None: ...

    async def validate(self) -> dict[str, float]:
        return {}

    async def state(self, folder: Path) -> dict[str, Any]:
        return {}

    async def restore(self, folder: Path, state: dict[str, Any]) -> None: ...


class RolloutOnly(Half):
    """Every step with the weights that the engines started with: prompts, responses, verdicts, the advantages that training would see."""

    def __init__(
        self, config: Config, folder: RunFolder, cluster: Cluster, rollout: WorkerGroup, reward: WorkerGroup, prompts: Sequence[Prompt],
        sampler: PromptSampler, stop: Stop,
    ) -> None:  # fmt: skip
        super().__init__(config, folder, cluster, sampler, [])
        self.prompts, self.rollout, self.reward = prompts, rollout, reward
        self.rollouts = Rollouts(config, rollout, reward, stop, self.timers)
        self.in_flight, self.engine_load = self.rollouts.in_flight, self.rollouts.dispatcher.load

    async def ready(self) -> None:
        await asyncio.gather(self.rollout.ready(), self.reward.ready())

    async def train_step(self) -> dict[str, float]:
        taken = Counter[str]()
        orders = lambda indices: training_orders(self.config, self.folder, self.prompts, self.step, indices, taken)
        await self.rollouts.begin_trace(self.step)
        with self.phase("rollout"):
            batch = await next_groups(self.sampler, self.config.algorithm, lambda indices: self.rollouts.all(orders(indices)))
        await self.rollouts.end_trace()
        headers = [header for header, _ in batch.scored]
        self.folder.record_order(self.step, [h.group_id for h in headers], [h.group_id for h in batch.generated])
        advantages = known_advantages(advantages_of(headers, self.config.algorithm), self.config)
        metrics = rollout_metrics(batch.generated, advantages) | batch.metrics
        metrics |= self.rollouts.measure(batch.generated, await self.rollouts.engines.ask_all("stats"))
        self.engine_stats, self.step_tokens = self.rollouts.stats, int(metrics["rollout/total_tokens"])
        self.memory = {"rollout": self.rollouts.memory}
        return metrics

    @property
    def finished(self) -> bool:
        return super().finished or self.sampler.exhausted(self.config.runner.max_epochs)


class TrainOnly(Half):
    """The steps of another run's journal, one after the other, from `first` on. reader: the ranks that read it (workers.journal)."""

    def __init__(
        self, config: Config, folder: RunFolder, cluster: Cluster, actor: WorkerGroup, reader: WorkerGroup, steps: RecordedSteps,
        first: int, critic: WorkerGroup | None = None, token_reward: WorkerGroup | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, folder, cluster, steps, [actor] if critic is None else [actor, critic])
        self.reader, self.steps, self.first = reader, steps, first
        self.learner = Learner(config, actor, critic, token_reward)

    async def ready(self) -> None:
        await asyncio.gather(self.reader.ready(), *(group.ready() for group in self.saving.groups))
        if self.learner.token_reward is not None:
            await self.learner.token_reward.ready()

    async def begin(self) -> None:
        self.step = self.first - 1

    async def train_step(self) -> dict[str, float]:
        with self.phase("journal"):
            batch = await self.steps.take(self.step, self.reader)
        headers = [header for header, _ in batch.scored]
        with self.phase("train"):
            learned = await self.learner.learn(self.step, batch.scored, str(self.folder.tokens(self.step)))
        self.saving.written = learned.written
        metrics = rollout_metrics(batch.generated, learned.advantages) | staleness(headers, self.step - 1) | learned.metrics
        metrics["perf/train_tokens_per_second"] = learned.tokens / self.timers.seconds["train"]
        self.step_tokens, self.memory = int(metrics["rollout/total_tokens"]), learned.memory
        return metrics
