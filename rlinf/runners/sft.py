"""The loop of supervised fine-tuning: each step makes one optimizer step on a batch of examples; validation is the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.config.schema import Config
from rlinf.data.packing import RankBatch, build_rank_batches
from rlinf.data.records import Group
from rlinf.data.sampler import PromptSampler
from rlinf.run_folder.folder import RunFolder
from rlinf.runners.step_metrics import report_metrics
from rlinf.runners.training_loop import StepResult, TrainingLoop

WEIGHT = np.ones(1, np.float32)  # packing wants an advantage for each sample, which this loss does not use


class SftRunner(TrainingLoop):
    """Supervised fine-tuning. val_losses: step -> held-out loss."""

    sampler: PromptSampler

    def __init__(
        self, config: Config, folder: RunFolder, cluster: Cluster, actor: WorkerGroup, examples: Sequence[Group],
        val_examples: Sequence[Group], sampler: PromptSampler,
    ) -> None:  # fmt: skip
        super().__init__(config, folder, cluster, sampler, [actor])
        self.actor, self.examples, self.val_examples = actor, examples, val_examples
        self.val_losses: dict[int, float] = {}

    async def ready(self) -> None:
        await self.actor.ready()

    async def begin(self) -> None: ...

    async def take_step(self) -> StepResult:
        batch = [self.examples[i] for i in self.sampler.next_batch()]
        with self.phase("train"):
            reports = await self.actor.call_each("train_step", [(self.step, share, *groups) for share, groups in self.split(batch)])
        return StepResult(
            report_metrics(reports, "actor"),
            tokens=sum(len(g.prompt.token_ids) + len(g.samples[0]) for g in batch),
            memory={"actor": [r.memory_bytes for r in reports]},
            checkpoint_written=all(r.checkpoint_written for r in reports),
        )

    async def validate(self) -> dict[str, float]:
        if not self.val_examples:
            return {}
        with self.phase("validate"):
            metrics, *_ = await self.actor.call_each("validate", [(share, *groups) for share, groups in self.split(self.val_examples)])
        self.val_losses[self.step] = metrics["sft/val_loss"]
        return metrics

    def split(self, examples: Sequence[Group]) -> list[tuple[RankBatch, list[Group]]]:
        """For each rank, its share of a global batch and the examples in it."""
        model = self.config.actor.model
        dp = model.data_parallel_size(self.actor.size)
        # numbered: a batch across the end of an epoch may hold an example twice
        named = {f"{i}.{g.group_id}": replace(g, group_id=f"{i}.{g.group_id}") for i, g in enumerate(examples)}
        shares = build_rank_batches(
            [g.header() for g in named.values()], [WEIGHT] * len(named), dp=dp, n_minibatches=1,
            max_tokens=self.config.runner.max_tokens_per_mbs, share_prefix=True,
        )  # fmt: skip
        share_of = [shares[model.data_parallel_rank(rank, self.actor.size)] for rank in range(self.actor.size)]
        return [(share, [named[name] for name in share.group_ids]) for share in share_of]

    async def state(self, folder: Path) -> dict[str, Any]:
        return {"val_losses": self.val_losses}

    async def restore(self, folder: Path, state: dict[str, Any]) -> None:
        if self.folder.measures_as(state):
            self.val_losses = {int(step): loss for step, loss in state["val_losses"].items()}
