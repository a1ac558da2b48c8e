"""The loop of reasoning RL, in the order of the algorithm: prompts, groups, verdicts, advantages, update, new weights."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.config.schema import Config
from rlinf.data.records import Prompt
from rlinf.data.sampler import PromptSampler
from rlinf.data.token_values import plan_dump
from rlinf.rollout.contract import Stop
from rlinf.runners.requests import sampling_of, validation_sampling
from rlinf.runners.roles import Role, summary
from rlinf.runners.rollouts import Order, Rollouts, Scored
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.schedules import Logical, Schedule, Shelf, Wallclock
from rlinf.runners.selection import StepBatch, advantages_of, name_groups, trained_samples
from rlinf.runners.training_loop import TrainingLoop
from rlinf.runners.validation import ValidationScores, score_validation, validation_metrics
from rlinf.runners.weight_sync import WeightSync
from rlinf.scheduling.rollout_metrics import rollout_metrics
from rlinf.scheduling.staleness import staleness

SCHEDULES = {"logical": Logical, "wallclock": Wallclock}


class ReasoningRunner(TrainingLoop):
    """The driver sees headers only; tokens go from rollout workers to reward and train workers."""

    def __init__(
        self, config: Config, folder: RunFolder, cluster: Cluster, actor: WorkerGroup, rollout: WorkerGroup, reward: WorkerGroup,
        prompts: Sequence[Prompt], val_prompts: Sequence[Prompt], sampler: PromptSampler, stop: Stop, critic: WorkerGroup | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, folder, cluster, sampler, [actor] if critic is None else [actor, critic])
        self.actor, self.rollout, self.reward, self.critic = actor, rollout, reward, critic
        self.prompts, self.val_prompts = prompts, val_prompts
        self.rollouts = Rollouts(config, rollout, reward, stop)
        self.in_flight, self.engine_load = self.rollouts.in_flight, self.rollouts.dispatcher.load
        self.schedule: Schedule = SCHEDULES[config.algorithm.schedule](
            config, sampler, self.rollouts, Shelf(reward), self.orders, self.total_steps
        )
        self.sync = WeightSync(config, actor, rollout, val_prompts or prompts)
        self.scores: dict[int, ValidationScores] = {}

    async def train_step(self) -> dict[str, float]:
        """One step of the algorithm."""
        a = self.config.algorithm
        with self.phase("rollout"):
            batch = await self.schedule.take(self.step)
            await self.schedule.clear()
        headers = [header for header, _ in batch.scored]
        self.sync.refuse_foreign_versions(headers)
        advantages, trained = advantages_of(headers, a), trained_samples(headers, a, self.config.data.seed)
        with self.phase("train"):
            metrics = await self.update(batch.scored, advantages, trained)
        with self.phase("rollout"):
            await self.schedule.settle()
        await self.publish_weights()
        outcome = () if self.critic is not None else advantages  # a critic's advantages are not the driver's numbers
        metrics |= rollout_metrics(batch.generated, outcome) | staleness(headers, self.step - 1) | batch.metrics
        self.step_tokens = int(metrics["rollout/total_tokens"])
        return metrics | self.sync.metrics | await self.speeds(batch, trained)

    def orders(self, step: int, indices: Sequence[int], met: Counter[str]) -> list[Order]:
        """What is asked of the engines for these training prompts; met: how often the step has met each of them."""
        a, prompts = self.config.algorithm, [self.prompts[i] for i in indices]
        dump = str(self.folder.samples(step))
        return [Order(name, prompt, a.group_size, sampling_of(a), dump) for name, prompt in zip(name_groups(step, prompts, met), prompts)]

    async def update(self, scored: Sequence[Scored], advantages: Sequence[np.ndarray], trained: Sequence[np.ndarray]) -> dict[str, float]:
        """Split the batch over the ranks and train: with a critic its values first, and its own update towards what the actor made of them."""
        headers, payload = [header for header, _ in scored], {header.group_id: ref for header, ref in scored}
        batch, values, metrics = (self.config, self.step, headers, advantages, trained), [], {}
        if self.critic is not None:
            critic = Role(self.critic, self.config.critic.model)
            critic_shares = critic.split(*batch)
            reports, values = await critic.work("values", (self.step,), critic_shares, payload)
            metrics |= summary(reports, "critic")
        actor = Role(self.actor, self.config.actor.model)
        dump = plan_dump(str(self.folder.tokens(self.step)), headers, advantages, (self.config.data.seed, self.step))
        reports, targets = await actor.work("train_step", (self.step, dump), actor.split(*batch), payload, values)
        metrics |= summary(reports, "actor")
        if self.critic is not None:
            updated = await critic.finish("train_step", (self.step,), critic_shares, targets)
            metrics |= summary(updated, "critic")
            reports += updated
        self.saving.written = all(r.checkpoint_written for r in reports)
        return metrics

    async def speeds(self, batch: StepBatch, trained: Sequence[np.ndarray]) -> dict[str, float]:
        """What the engines counted since the last step, and tokens per second of the two big phases."""
        self.engine_stats = stats = await self.rollout.call_all("stats")
        decoded, busy = sum(s.decoded_tokens for s in stats), max(s.busy_seconds for s in stats)
        learned = sum(int(((h.prompt_length + np.array(h.response_lengths)) * t).sum()) for (h, _), t in zip(batch.scored, trained))
        return {
            "rollout/reused_tokens": float(sum(s.reused_tokens for s in stats)),
            "rollout/truncated_mass": sum(s.truncated_mass for s in stats) / max(1, decoded),
            "perf/rollout_tokens_per_second": decoded / busy if busy else 0.0,
            "perf/train_tokens_per_second": learned / self.timers.seconds["train"],
            "train/samples": float(sum(t.sum() for t in trained)),
        }

    async def publish_weights(self) -> None:
        with self.phase("sync_weights", "weight sync"):
            await self.sync.publish(self.step)

    async def validate(self) -> dict[str, float]:
        if not self.val_prompts:
            return {}
        with self.phase("validate", "validation"):
            dump, names = str(self.folder.validation(self.step)), name_groups(self.step, self.val_prompts, Counter())
            orders = [Order(name, prompt, 1, validation_sampling(), dump) for name, prompt in zip(names, self.val_prompts)]
            scored = await self.rollouts.all(orders)
        self.scores[self.step] = score_validation([header for header, _ in scored])
        return validation_metrics(self.scores[self.step])

    async def ready(self) -> None:
        await asyncio.gather(self.actor.ready(), self.rollout.ready(), self.reward.ready())
        if self.critic is not None:  # in one process it joins the groups that the actor has made
            await self.critic.ready()

    async def begin(self) -> None:
        await self.publish_weights()

    async def state(self, folder: Path) -> dict[str, Any]:
        validation = {step: scores.to_json() for step, scores in self.scores.items()}
        kept = await self.schedule.keep(folder / "waiting")
        return {"weight_version": self.step, "validation": validation, "response_lengths": self.rollouts.lengths, "schedule": kept}

    async def restore(self, folder: Path, state: dict[str, Any]) -> None:
        self.scores = {int(step): ValidationScores.from_json(s) for step, s in state["validation"].items()}
        self.rollouts.lengths.update(state["response_lengths"])
        await self.schedule.restore(folder / "waiting", state["schedule"])

    @property
    def finished(self) -> bool:
        """Dynamic sampling uses up the data in fewer steps than total_steps."""
        return super().finished or self.schedule.exhausted
