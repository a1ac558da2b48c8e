"""What a step does with its groups once they are there: advantages, the split over the ranks, the optimizer steps of critic and actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlinf.cluster.group import WorkerGroup
from rlinf.config.schema import Config
from rlinf.data.token_values import plan_dump
from rlinf.runners.roles import Role, summary
from rlinf.runners.rollouts import Scored
from rlinf.runners.selection import advantages_of, trained_samples


class Learned(NamedTuple):
    """advantages: as the driver gave them; with a critic it knows only the outcome. tokens: that were trained on, prompts included."""

    metrics: dict[str, float]
    advantages: list[np.ndarray]
    tokens: int


class Learner:
    """written: whether all ranks said in their last report that the files of the checkpoint in the background are on disk.
    memory: component -> peak bytes of its ranks."""

    def __init__(self, config: Config, actor: WorkerGroup, critic: WorkerGroup | None) -> None:
        self.config, self.actor, self.critic = config, actor, critic
        self.written = False
        self.memory: dict[str, list[int]] = {}

    async def learn(self, step: int, scored: Sequence[Scored], dump: str) -> Learned:
        """All optimizer steps of `step`. dump: the file for what training saw of each token."""
        headers = [header for header, _ in scored]
        advantages = advantages_of(headers, self.config.algorithm)
        trained = trained_samples(headers, self.config.algorithm, self.config.data.seed)
        metrics = await self._update(step, scored, advantages, trained, dump)
        metrics["train/samples"] = float(sum(t.sum() for t in trained))
        tokens = sum(int(((h.prompt_length + np.array(h.response_lengths)) * t).sum()) for h, t in zip(headers, trained))
        return Learned(metrics, advantages, tokens)

    async def _update(
        self, step: int, scored: Sequence[Scored], advantages: Sequence[np.ndarray], trained: Sequence[np.ndarray], dump: str
    ) -> dict[str, float]:
        """With a critic its values first, and its own update towards what the actor made of them."""
        headers, payload = [header for header, _ in scored], {header.group_id: ref for header, ref in scored}
        batch, values, metrics, peak = (self.config, step, headers, advantages, trained), [], {}, self.config.runner.peak_tflops
        if self.critic is not None:
            critic = Role(self.critic, self.config.critic.model)
            critic_shares = critic.split(*batch)
            reports, values = await critic.work("values", (step,), critic_shares, payload)
            metrics |= summary(reports, "critic", peak)
        actor = Role(self.actor, self.config.actor.model)
        plan = plan_dump(dump, headers, advantages, (self.config.data.seed, step))
        reports, targets = await actor.work("train_step", (step, plan), actor.split(*batch), payload, values)
        metrics |= summary(reports, "actor", peak)
        self.memory["actor"] = [r.memory_bytes for r in reports]
        if self.critic is not None:
            updated = await critic.finish("train_step", (step,), critic_shares, targets)
            metrics |= summary(updated, "critic", peak)
            self.memory["critic"] = [r.memory_bytes for r in updated]
            reports += updated
        self.written = all(r.checkpoint_written for r in reports)
        return metrics
