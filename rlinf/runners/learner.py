"""What a step does with its groups once they are there: advantages, the split over the ranks, the optimizer steps of critic and actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlinf.cluster.group import WorkerGroup
from rlinf.config.schema import Config
from rlinf.data.records import GroupHeader
from rlinf.data.token_values import plan_dump
from rlinf.runners.roles import Part, Role, summary
from rlinf.runners.rollouts import Scored
from rlinf.runners.selection import advantages_of, known_advantages, trained_samples
from rlinf.workers.interfaces import TrainReport

Reports = dict[str, list[TrainReport]]  # component -> the last report of each of its ranks


@dataclass(frozen=True)
class Learned:
    """What became of a step's groups.

    advantages: see known_advantages. tokens: that were trained on, prompts included. memory: component -> peak bytes of its ranks.
    written: whether all ranks say that the files of the checkpoint in the background are on disk.
    """

    metrics: dict[str, float]
    advantages: Sequence[np.ndarray]
    tokens: int
    memory: dict[str, list[int]]
    written: bool


class Learner:
    """The roles that compute in a training step, as the loop asks them to."""

    def __init__(self, config: Config, actor: WorkerGroup, critic: WorkerGroup | None, token_reward: WorkerGroup | None = None) -> None:
        self.config, self.actor, self.critic, self.token_reward = config, actor, critic, token_reward

    async def learn(self, step: int, scored: Sequence[Scored], dump: str) -> Learned:
        """All optimizer steps of `step`. dump: the file for what training saw of each token."""
        headers, rewards, metrics, scorers = [header for header, _ in scored], [], {}, {}
        if self.token_reward is not None:
            headers, rewards, metrics, scorers = await self._token_rewards(step, scored)
        advantages = advantages_of(headers, self.config.algorithm)
        trained = trained_samples(headers, self.config.algorithm, self.config.data.seed)
        updated, learners = await self._update(step, scored, advantages, trained, dump, rewards)
        metrics |= updated
        metrics["train/samples"] = float(sum(t.sum() for t in trained))
        tokens = sum(int(((h.prompt_length + np.array(h.response_lengths)) * t).sum()) for h, t in zip(headers, trained))
        memory = {component: [r.memory_bytes for r in reports] for component, reports in (scorers | learners).items()}
        written = all(r.checkpoint_written for reports in learners.values() for r in reports)
        return Learned(metrics, known_advantages(advantages, self.config), tokens, memory, written)

    async def _token_rewards(self, step: int, scored: Sequence[Scored]) -> tuple[list[GroupHeader], list[Part], dict[str, float], Reports]:
        """The headers with the scores of the token reward model in their rewards; with dense rewards what each token is paid, and then the
        headers stay as they are."""
        headers, payload = [header for header, _ in scored], {header.group_id: ref for header, ref in scored}
        how, role = self.config.token_reward, Role(self.token_reward, self.config.token_reward.model)
        reports, parts = await role.work("scores", (step,), role.look(self.config, headers), payload)
        scores = {name: score for r in reports for name, score in r.scores.items()}
        metrics = score_metrics(headers, scores) | summary(reports, "token_reward", self.config.runner.peak_tflops)
        if self.config.algorithm.dense_rewards:
            return headers, parts, metrics, {"token_reward": reports}
        return [rewarded(header, scores, how.weight) for header in headers], [], metrics, {"token_reward": reports}

    async def _update(
        self,
        step: int,
        scored: Sequence[Scored],
        advantages: Sequence[np.ndarray],
        trained: Sequence[np.ndarray],
        dump: str,
        rewards: Sequence[Part],
    ) -> tuple[dict[str, float], Reports]:
        """With a critic its values first, and its own update towards what the actor made of them. rewards: of single tokens."""
        headers, payload = [header for header, _ in scored], {header.group_id: ref for header, ref in scored}
        batch, values, metrics, peak = (self.config, step, headers, advantages, trained), [], {}, self.config.runner.peak_tflops
        if self.critic is not None:
            critic = Role(self.critic, self.config.critic.model)
            critic_shares = critic.split(*batch)
            looked, values = await critic.work("values", (step,), critic_shares, payload)
            metrics |= summary(looked, "critic", peak)
        actor = Role(self.actor, self.config.actor.model)
        plan = plan_dump(dump, headers, advantages, (self.config.data.seed, step))
        acted, targets = await actor.work("train_step", (step, plan), actor.split(*batch), payload, [*values, *rewards])
        metrics |= summary(acted, "actor", peak)
        if self.critic is None:
            return metrics, {"actor": acted}
        followed = await critic.finish("train_step", (step,), critic_shares, targets)
        return metrics | summary(followed, "critic", peak), {"actor": acted, "critic": followed}


def rewarded(header: GroupHeader, scores: Mapping[str, float], weight: float) -> GroupHeader:
    """Every reward plus weight times the response's score; what is right and wrong stays."""
    verdicts = [v and replace(v, reward=v.reward + weight * scores[name]) for name, v in zip(header.sample_ids, header.verdicts)]
    return replace(header, verdicts=tuple(verdicts))


def score_metrics(headers: Sequence[GroupHeader], scores: Mapping[str, float]) -> dict[str, float]:
    """Scores of responses, before their weight; of right and of wrong answers where there are any."""
    right = {name: is_right for h in headers for name, is_right in zip(h.sample_ids, h.right)}
    values = np.array([scores[name] for name in right])
    found = {"mean": values.mean(), "max": values.max(), "min": values.min()}
    for name, chosen in (("right", np.array(list(right.values()))), ("wrong", ~np.array(list(right.values())))):
        if chosen.any():
            found[name] = values[chosen].mean()
    return {f"rollout/token_reward_{name}": float(value) for name, value in found.items()}
