"""The loop of supervised fine-tuning: examples, one optimizer step, now and then the loss on held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.config.schema import Config
from rlinf.data.packing import RankBatch, build_rank_batches
from rlinf.data.records import Group
from rlinf.data.sampler import PromptSampler
from rlinf.metrics.logger import MetricLogger
from rlinf.metrics.progress import Progress
from rlinf.metrics.timers import Timers
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.saving import Saving

WEIGHT = np.ones(1, np.float32)  # packing carries a scalar for each sample; the loss here has no use for it


class SftRunner:
    """One run. val_losses: the held-out loss by step."""

    engine_load = engine_stats = ()  # there are no rollout engines

    def __init__(
        self, config: Config, folder: RunFolder, cluster: Cluster, actor: WorkerGroup, examples: Sequence[Group], val_examples: Sequence[Group],
        sampler: PromptSampler,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.cluster, self.actor = config, folder, cluster, actor
        self.examples, self.val_examples, self.sampler = examples, val_examples, sampler
        self.total_steps = sampler.total_steps(config.runner.max_epochs, config.runner.max_steps)
        self.saving = Saving(folder, actor, config.runner.async_checkpoint)
        self.timers = Timers()
        self.step = 0
        self.val_losses: dict[int, float] = {}

    async def run(self, logger: MetricLogger) -> None:
        """All steps from where the run stands to its end."""
        await self.start(logger)
        progress = Progress(self.total_steps, self.step + 1)
        if self.step == 0 and self.val_examples and self.config.runner.val_check_interval != 0:
            logger.log(0, await self.validate() | self.timers.collect())
        while self.step < self.total_steps:
            self.step += 1
            batch = [self.examples[i] for i in self.sampler.next_batch()]
            metrics = await self.train_on(batch)
            if self.due(self.config.runner.val_check_interval) and self.val_examples:
                metrics |= await self.validate()
            if self.due(self.config.runner.save_interval):
                await self.save(metrics)
            if self.saving.ready(self.step == self.total_steps):
                await self.complete_checkpoint()
            metrics |= self.timers.collect(tokens=sum(len(g.prompt.token_ids) + len(g.samples[0]) for g in batch))
            logger.log(self.step, metrics)
            progress.step(self.step, metrics)

    async def start(self, logger: MetricLogger) -> None:
        """Workers up, checkpoint loaded."""
        self.cluster.phase = "start"
        await self.actor.ready()
        if self.folder.resume is not None:
            state = self.folder.resume.state
            await self.actor.call_all("load", str(self.folder.resume.step_dir))
            self.sampler.load_state_dict(state["sampler"])
            self.step = state["step"]
            self.val_losses = {int(step): loss for step, loss in state["val_losses"].items()}
            if logger.last_step < self.step:  # the run died between the checkpoint and the line of its step
                logger.log(self.step, state["metrics"])

    async def train_on(self, examples: Sequence[Group]) -> dict[str, float]:
        with self.timers.phase("train"):
            self.cluster.phase = f"step {self.step}, train"
            reports = await self.actor.call_each("train_step", [(self.step, share, *groups) for share, groups in self.split(examples)])
        self.saving.written = all(r.checkpoint_written for r in reports)
        slowest = {name: max(r.timers[name] for r in reports) for name in reports[0].timers}
        return reports[0].metrics | slowest | {"perf/actor_memory_gib": max(r.memory_bytes for r in reports) / 2**30}

    async def validate(self) -> dict[str, float]:
        with self.timers.phase("validate"):
            self.cluster.phase = f"step {self.step}, validation"
            metrics, *_ = await self.actor.call_each("validate", [(share, *groups) for share, groups in self.split(self.val_examples)])
        self.val_losses[self.step] = metrics["sft/val_loss"]
        return metrics

    def split(self, examples: Sequence[Group]) -> list[tuple[RankBatch, list[Group]]]:
        """Each rank's share of a global batch and the examples in it."""
        model = self.config.actor.model
        tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
        dp = self.actor.size // (tp * pp)
        named = {f"{i}.{g.group_id}": replace(g, group_id=f"{i}.{g.group_id}") for i, g in enumerate(examples)}  # an epoch's border may repeat one
        shares = build_rank_batches(
            [g.header() for g in named.values()], [WEIGHT] * len(named), dp=dp, n_minibatches=1, max_tokens=self.config.runner.max_tokens_per_mbs,
            share_prefix=True,
        )  # fmt: skip
        share_of = [shares[rank // tp % dp] for rank in range(self.actor.size)]  # rank order: TP fastest, then DP, then PP
        return [(share, [named[name] for name in share.group_ids]) for share in share_of]

    async def save(self, metrics: dict[str, float]) -> None:
        with self.timers.phase("checkpoint"):
            self.cluster.phase = f"step {self.step}, checkpoint"
            await self.saving.save(self.step, self.state(metrics))

    async def complete_checkpoint(self) -> None:
        with self.timers.phase("checkpoint"):
            await self.saving.complete()

    def state(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What a resumed run needs beside the weights. `metrics` of the step: its line is written only after the checkpoint."""
        return {"step": self.step, "sampler": self.sampler.state_dict(), "val_losses": self.val_losses, "metrics": metrics}

    def due(self, interval: int) -> bool:
        """Every `interval` steps and after the last one; -1 = after the last one alone; 0 = never."""
        return interval != 0 and (self.step == self.total_steps or (interval > 0 and self.step % interval == 0))
