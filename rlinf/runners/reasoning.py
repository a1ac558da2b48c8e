"""The loop of reasoning RL, in the order of the algorithm: prompts, groups, verdicts, advantages, update, new weights."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.config.schema import Config
from rlinf.data.records import GroupHeader, Prompt
from rlinf.data.sampler import PromptSampler
from rlinf.data.token_values import plan_dump
from rlinf.metrics.logger import MetricLogger
from rlinf.metrics.progress import Progress
from rlinf.metrics.timers import Timers
from rlinf.runners.requests import sampling_of, validation_sampling
from rlinf.runners.roles import Role, summary
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.saving import Saving
from rlinf.runners.selection import Scored, StepBatch, advantages_of, name_groups, next_groups, trained_samples
from rlinf.runners.validation import ValidationScores, score_validation, validation_metrics
from rlinf.runners.weight_sync import WeightSync
from rlinf.rollout.contract import EngineStats, GenerateRequest, SamplingParams, Stop
from rlinf.scheduling.dispatcher import Dispatcher
from rlinf.scheduling.rollout_metrics import rollout_metrics

class ReasoningRunner:
    """One run. The driver sees headers only; tokens go from rollout workers to reward and train workers."""

    def __init__(
        self, config: Config, folder: RunFolder, cluster: Cluster, actor: WorkerGroup, rollout: WorkerGroup, reward: WorkerGroup,
        prompts: Sequence[Prompt], val_prompts: Sequence[Prompt], sampler: PromptSampler, stop: Stop, critic: WorkerGroup | None = None,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.cluster = config, folder, cluster
        self.actor, self.rollout, self.reward, self.critic = actor, rollout, reward, critic
        self.prompts, self.val_prompts, self.sampler, self.stop = prompts, val_prompts, sampler, stop
        self.total_steps = sampler.total_steps(config.runner.max_epochs, config.runner.max_steps)
        self.dispatcher = Dispatcher(rollout.size, config.rollout.max_running_requests, config.algorithm.group_size)
        self.sync = WeightSync(config, actor, rollout, val_prompts or prompts)
        self.saving = Saving(folder, actor, config.runner.async_checkpoint, critic)
        self.timers = Timers()
        self.step = 0
        self.scores: dict[int, ValidationScores] = {}
        self.engine_stats: list[EngineStats] = []
        self.in_flight: dict[str, str] = {}  # group id -> who has it now

    async def run(self, logger: MetricLogger) -> None:
        """All steps from where the run stands to its end."""
        await self.start(logger)
        progress = Progress(self.total_steps, self.step + 1)
        if self.step == 0 and self.val_prompts and self.config.runner.val_check_interval != 0:
            logger.log(0, await self.validate() | self.timers.collect())
        while not self.finished:
            self.step += 1
            metrics = await self.train_step()
            if self.due(self.config.runner.val_check_interval) and self.val_prompts:
                metrics |= await self.validate()
            if self.due(self.config.runner.save_interval):
                await self.save(metrics)
            if self.saving.ready(self.finished):
                await self.complete_checkpoint()
            metrics |= self.timers.collect(tokens=int(metrics["rollout/total_tokens"]))
            logger.log(self.step, metrics)
            progress.step(self.step, metrics)

    async def start(self, logger: MetricLogger) -> None:
        """Workers up, checkpoint loaded, the first weights in the engines."""
        self.cluster.phase = "start"
        await asyncio.gather(self.actor.ready(), self.rollout.ready(), self.reward.ready())
        if self.critic is not None:
            await self.critic.ready()
        if self.folder.resume is not None:
            state = self.folder.resume.state
            for group in self.saving.groups:
                await group.call_all("load", str(self.folder.resume.step_dir))
            self.sampler.load_state_dict(state["sampler"])
            self.step = state["step"]
            self.scores = {int(step): ValidationScores.from_json(s) for step, s in state["validation"].items()}
            if logger.last_step < self.step:  # the run died between the checkpoint and the line of its step
                logger.log(self.step, state["metrics"])
        await self.publish_weights()

    async def train_step(self) -> dict[str, float]:
        """One step of the algorithm."""
        a = self.config.algorithm
        with self.timers.phase("rollout"):
            self.cluster.phase = f"step {self.step}, rollout"
            batch = await self.roll_out()
        headers = [header for header, _ in batch.scored]
        self.sync.refuse_foreign_versions(headers)
        advantages, trained = advantages_of(headers, a), trained_samples(headers, a, self.config.data.seed)
        with self.timers.phase("train"):
            self.cluster.phase = f"step {self.step}, train"
            metrics = await self.update(batch.scored, advantages, trained)
        await self.publish_weights()
        outcome = () if self.critic is not None else advantages  # a critic's advantages are not the driver's numbers
        return rollout_metrics(batch.generated, outcome) | batch.metrics | metrics | self.sync.metrics | await self.speeds(batch, trained)

    async def roll_out(self) -> StepBatch:
        """The groups of this step: answers to the next prompts, judged and filtered."""
        a, dump, taken = self.config.algorithm, str(self.folder.samples(self.step)), Counter[str]()

        async def generate(indices: list[int]) -> list[Scored]:
            prompts = [self.prompts[i] for i in indices]
            return await self.generate(prompts, name_groups(self.step, prompts, taken), a.group_size, sampling_of(a), dump)

        return await next_groups(self.sampler, a, generate)

    async def generate(
        self, prompts: Sequence[Prompt], names: Sequence[str], n: int, sampling: SamplingParams, dump: str
    ) -> list[Scored]:
        """Groups in the order of the prompts, each judged as soon as it is complete."""

        async def one(prompt: Prompt, group_id: str) -> Scored:
            request = GenerateRequest(group_id, prompt.token_ids, n, sampling, self.stop, self.config.algorithm.sampling_params.max_new_tokens)
            async with self.dispatcher.seat(n) as rank:
                self.in_flight[group_id] = f"rollout rank {rank}"
                header_ref, group_ref = self.rollout.ref(rank, "generate", request, prompt, returns=2)
                header = await header_ref
            self.in_flight[group_id] = f"reward rank {rank % self.reward.size}"
            verdicts = await self.reward.call(rank % self.reward.size, "judge", group_ref, dump)
            del self.in_flight[group_id]
            return header.with_verdicts(verdicts), group_ref

        return await gather_or_cancel([one(p, name) for p, name in zip(prompts, names)])

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
        decoded = max(1, sum(s.decoded_tokens for s in stats))
        learned = sum(int(((h.prompt_length + np.array(h.response_lengths)) * t).sum()) for (h, _), t in zip(batch.scored, trained))
        return {
            "rollout/reused_tokens": float(sum(s.reused_tokens for s in stats)),
            "rollout/truncated_mass": sum(s.truncated_mass for s in stats) / decoded,
            "perf/rollout_tokens_per_second": sum(sum(h.response_lengths) for h in batch.generated) / self.timers.seconds["rollout"],
            "perf/train_tokens_per_second": learned / self.timers.seconds["train"],
            "train/samples": float(sum(t.sum() for t in trained)),
        }

    async def publish_weights(self) -> None:
        with self.timers.phase("sync_weights"):
            self.cluster.phase = f"step {self.step}, weight sync"
            await self.sync.publish(self.step)

    async def validate(self) -> dict[str, float]:
        with self.timers.phase("validate"):
            self.cluster.phase = f"step {self.step}, validation"
            dump = str(self.folder.validation(self.step))
            names = name_groups(self.step, self.val_prompts, Counter())
            scored = await self.generate(self.val_prompts, names, 1, validation_sampling(), dump)
        self.scores[self.step] = score_validation([header for header, _ in scored])
        return validation_metrics(self.scores[self.step])

    async def save(self, metrics: dict[str, float]) -> None:
        with self.timers.phase("checkpoint"):
            self.cluster.phase = f"step {self.step}, checkpoint"
            await self.saving.save(self.step, self.state(metrics))

    async def complete_checkpoint(self) -> None:
        with self.timers.phase("checkpoint"):
            await self.saving.complete()

    def state(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What a resumed run needs beside the weights. `metrics` of the step: its line is written only after the checkpoint."""
        validation = {step: scores.to_json() for step, scores in self.scores.items()}
        return {"step": self.step, "weight_version": self.step, "sampler": self.sampler.state_dict(), "validation": validation, "metrics": metrics}

    @property
    def engine_load(self) -> Sequence[int]:
        return self.dispatcher.load

    @property
    def finished(self) -> bool:
        """Whether this was the last step; dynamic sampling uses up the data in fewer steps than total_steps."""
        return self.step >= self.total_steps or self.sampler.exhausted(self.config.runner.max_epochs)

    def due(self, interval: int) -> bool:
        """Every `interval` steps and after the last one; -1 = after the last one alone; 0 = never."""
        return interval != 0 and (self.finished or (interval > 0 and self.step % interval == 0))


async def gather_or_cancel(work: Sequence[Coroutine[Any, Any, Scored]]) -> list[Scored]:
    """Results in order; the first failure is raised and the rest is cancelled."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
