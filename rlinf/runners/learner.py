"""What a step does with its groups once they are there: advantages, the split over the ranks, the optimizer steps of critic and actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rlinf.cluster.group import WorkerGroup
from rlinf.config.schema import Config
from rlinf.data.records import GroupHeader, Status
from rlinf.data.token_values import plan_dump
from rlinf.runners.roles import Part, Role, summary
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

    def __init__(self, config: Config, actor: WorkerGroup, critic: WorkerGroup | None, token_reward: WorkerGroup | None = None) -> None:
        self.config, self.actor, self.critic, self.token_reward = config, actor, critic, token_reward
        self.written = False
        self.memory: dict[str, list[int]] = {}

    async def learn(self, step: int, scored: Sequence[Scored], dump: str) -> Learned:
        """All optimizer steps of `step`. dump: the file for what training saw of each token."""
        headers, rewards, metrics = [header for header, _ in scored], [], {}
        if self.token_reward is not None:
            headers, rewards, metrics = await self._token_rewards(step, scored)
        advantages = advantages_of(headers, self.config.algorithm)
        trained = trained_samples(headers, self.config.algorithm, self.config.data.seed)
        metrics |= await self._update(step, scored, advantages, trained, dump, rewards)
        metrics["train/samples"] = float(sum(t.sum() for t in trained))
        tokens = sum(int(((h.prompt_length + np.array(h.response_lengths)) * t).sum()) for h, t in zip(headers, trained))
        return Learned(metrics, advantages, tokens)

    async def _token_rewards(self, step: int, scored: Sequence[Scored]) -> tuple[list[GroupHeader], list[Part], dict[str, float]]:
        """The headers with the scores of the token reward model in their rewards; with dense rewards what each token is paid, and then the
        headers stay as they are."""
        headers, payload = [header for header, _ in scored], {header.group_id: ref for header, ref in scored}
        how, role = self.config.token_reward, Role(self.token_reward, self.config.token_reward.model)
        reports, parts = await role.work("scores", (step,), role.look(self.config, headers), payload)
        scores = {name: score for r in reports for name, score in r.scores.items()}
        metrics = score_metrics(headers, scores) | summary(reports, "token_reward", self.config.runner.peak_tflops)
        self.memory["token_reward"] = [r.memory_bytes for r in reports]
        if self.config.algorithm.dense_rewards:
            return headers, parts, metrics
        return [rewarded(header, scores, how.weight) for header in headers], [], metrics

    async def _update(
        self,
        step: int,
        scored: Sequence[Scored],
        advantages: Sequence[np.ndarray],
        trained: Sequence[np.ndarray],
        dump: str,
        rewards: Sequence[Part],
    ) -> dict[str, float]:
        """With a critic its values first, and its own update towards what the actor made of them. rewards: of single tokens."""
        headers, payload = [header for header, _ in scored], {header.group_id: ref for header, ref in scored}
        batch, values, metrics, peak = (self.config, step, headers, advantages, trained), [], {}, self.config.runner.peak_tflops
        if self.critic is not None:
            critic = Role(self.critic, self.config.critic.model)
            critic_shares = critic.split(*batch)
            reports, values = await critic.work("values", (step,), critic_shares, payload)
            metrics |= summary(reports, "critic", peak)
        actor = Role(self.actor, self.config.actor.model)
        plan = plan_dump(dump, headers, advantages, (self.config.data.seed, step))
        reports, targets = await actor.work("train_step", (step, plan), actor.split(*batch), payload, [*values, *rewards])
        metrics |= summary(reports, "actor", peak)
        self.memory["actor"] = [r.memory_bytes for r in reports]
        if self.critic is not None:
            updated = await critic.finish("train_step", (step,), critic_shares, targets)
            metrics |= summary(updated, "critic", peak)
            self.memory["critic"] = [r.memory_bytes for r in updated]
            reports += updated
        self.written = all(r.checkpoint_written for r in reports)
        return metrics


def rewarded(header: GroupHeader, scores: Mapping[str, float], weight: float) -> GroupHeader:
    """Every reward plus weight times the response's score; what is right and wrong stays."""
    verdicts = [v and replace(v, reward=v.reward + weight * scores[name]) for name, v in zip(header.sample_ids, header.verdicts)]
    return replace(header, verdicts=tuple(verdicts))


def score_metrics(headers: Sequence[GroupHeader], scores: Mapping[str, float]) -> dict[str, float]:
    """Scores of responses, before their weight; of right and of wrong answers where there are any."""
    right = {name: v is not None and v.status is Status.RIGHT for h in headers for name, v in zip(h.sample_ids, h.verdicts)}
    values = np.array([scores[name] for name in right])
    found = {"mean": values.mean(), "max": values.max(), "min": values.min()}
    for name, chosen in (("right", np.array(list(right.values()))), ("wrong", ~np.array(list(right.values())))):
        if chosen.any():
            found[name] = values[chosen].mean()
    return {f"rollout/token_reward_{name}": float(value) for name, value in found.items()}
