"""The driver's side of training: splits a batch over the ranks of token reward model, critic and actor, and calls them in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rlinf.cluster.group import Ref, WorkerGroup
from rlinf.config.schema import Config
from rlinf.data.records import GroupHeader
from rlinf.data.token_values import plan_dump
from rlinf.runners.roles import Part, Role
from rlinf.runners.rollouts import Scored
from rlinf.runners.selection import trained_samples
from rlinf.runners.step_metrics import advantage_metrics, report_metrics, token_reward_metrics


@dataclass(frozen=True)
class Rewarded:
    """Groups with all their rewards.

    headers: with the final reward of each response. payloads: group -> its tokens. token_rewards: with dense rewards, those of each token.
    metrics, memory (component -> peak bytes of each of its ranks): of the token reward model.
    """

    headers: Sequence[GroupHeader]
    payloads: Mapping[str, Ref]
    token_rewards: Sequence[Part] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    memory: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """The outcome of all optimizer steps of one step of the loop.

    tokens: how many were trained on, prompts included. memory: component -> peak bytes of each of its ranks.
    checkpoint_written: as in training_loop.StepResult.
    """

    metrics: dict[str, float]
    tokens: int
    memory: dict[str, list[int]]
    checkpoint_written: bool


@dataclass(frozen=True)
class MegatronGroups:
    """The worker groups of a run that hold Megatron models, by role (Config.megatron_roles)."""

    actor: WorkerGroup
    critic: WorkerGroup | None = None
    token_reward: WorkerGroup | None = None

    @property
    def trained(self) -> list[WorkerGroup]:
        """Those that have an optimizer, and files in a checkpoint."""
        return [self.actor] if self.critic is None else [self.actor, self.critic]

    async def ready(self) -> None:
        """Return when all are up. The actor is the first: in one process the others join the process groups that it made."""
        await self.actor.ready()
        for group in (self.critic, self.token_reward):
            if group is not None:
                await group.ready()


class Learner:
    """Calls the worker groups that train (actor, critic) or score tokens (token reward model)."""

    def __init__(self, config: Config, groups: MegatronGroups) -> None:
        self.config, self.peak_tflops = config, config.runner.peak_tflops
        self.actor = Role(groups.actor, config.actor.model)
        self.critic = None if groups.critic is None else Role(groups.critic, config.critic.model)
        self.token_reward = None if groups.token_reward is None else Role(groups.token_reward, config.token_reward.model)

    async def reward(self, scored: Sequence[Scored]) -> Rewarded:
        """Add a token reward model's scores, if there is one, to the verdicts' rewards: to the reward of the response, or with
        algorithm.dense_rewards to each of its tokens."""
        headers, payloads = [header for header, _ in scored], {header.group_id: ref for header, ref in scored}
        if self.token_reward is None:
            return Rewarded(headers, payloads)
        reports, parts = await self.token_reward.run("scores", (), self.token_reward.split_all(self.config, headers), payloads)
        scores = {name: score for r in reports for name, score in r.scores.items()}
        metrics = token_reward_metrics(headers, scores) | report_metrics(reports, "token_reward", self.peak_tflops)
        memory = {"token_reward": [r.memory_bytes for r in reports]}
        if self.config.algorithm.dense_rewards:
            return Rewarded(headers, payloads, parts, metrics, memory)
        weight = self.config.token_reward.weight
        return Rewarded([with_scores(header, scores, weight) for header in headers], payloads, (), metrics, memory)

    async def update(self, step: int, groups: Rewarded, advantages: Sequence[np.ndarray], dump: str) -> Update:
        """The optimizer steps of actor and critic.

        advantages: for each group an array [samples]. dump: the file to which what training saw of some tokens is written.
        With a critic, its values come first; the actor turns them into advantages and returns; the critic is trained on the returns.
        """
        config, headers, payloads = self.config, groups.headers, groups.payloads
        trained = trained_samples(headers, config.algorithm, config.data.seed)
        batch = (config, step, headers, advantages, trained)
        metrics = advantage_metrics(advantages, trained, config)
        values: list[Part] = []
        if self.critic is not None:
            critic_shares = self.critic.split(*batch)
            reports, values = await self.critic.run("values", (), critic_shares, payloads)
            metrics |= report_metrics(reports, "critic", self.peak_tflops)
        plan = plan_dump(dump, headers, advantages, trained, (config.data.seed, step))
        shares, parts = self.actor.split(*batch), [*values, *groups.token_rewards]
        reports, returns = await self.actor.run("train_step", (step, plan), shares, payloads, parts)
        metrics |= report_metrics(reports, "actor", self.peak_tflops)
        last = {"actor": reports}
        if self.critic is not None:
            last["critic"] = await self.critic.run_on_kept_batch("train_step", (step,), critic_shares, returns)
            metrics |= report_metrics(last["critic"], "critic", self.peak_tflops)
        metrics["train/samples"] = float(sum(t.sum() for t in trained))
        return Update(
            metrics,
            tokens=sum(int(((h.prompt_length + np.array(h.response_lengths)) * t).sum()) for h, t in zip(headers, trained)),
            memory={component: [r.memory_bytes for r in reports] for component, reports in last.items()},
            checkpoint_written=all(r.checkpoint_written for reports in last.values() for r in reports),
        )


def with_scores(header: GroupHeader, scores: Mapping[str, float], weight: float) -> GroupHeader:
    """The header with weight * score added to the reward of every response; which responses are right does not change."""
    verdicts = [v and replace(v, reward=v.reward + weight * scores[name]) for name, v in zip(header.sample_ids, header.verdicts)]
    return replace(header, verdicts=tuple(verdicts))
