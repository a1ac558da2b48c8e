"""One rank of the token reward model: a frozen model that scores every token of a response, such as a process reward model or a teacher.

The score of token t is the head's output at the row of token t itself. (A critic's value for token t is the output one row earlier.) Of a
teacher it is log p(t) - log mu(t): how much likelier the token is to the teacher than it was to the policy that sampled it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from rlinf.config.schema import Config
from rlinf.data.packing import RankBatch
from rlinf.data.records import Group, Sample
from rlinf.scheduling.placement import WorkerAddress
from rlinf.training.model import with_scoring_head
from rlinf.training.offload import Parked
from rlinf.training.packed_batch import PackedBatch, by_sample
from rlinf.workers.interfaces import TokenRewards, TrainReport
from rlinf.workers.megatron import MegatronWorker, merged, work_of

REDUCE: dict[str, Callable[[np.ndarray], float]] = {"mean": np.mean, "sum": np.sum, "last": lambda scores: scores[-1], "min": np.min}


class TokenRewardWorker(MegatronWorker):
    """Implements workers.interfaces.TokenRewardWorker."""

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        super().__init__(address, config, "token_reward")
        self.teaches = self.engine.model.head == "lm"
        if self.teaches:
            self.temperature = config.algorithm.sampling_params.temperature
        self.parked = Parked()
        self.hand_over()

    def first_weights(self, tensors: Mapping[str, Tensor], hidden: int) -> Mapping[str, Tensor]:
        if self.config.head_of(self.role) == "lm":
            return tensors
        tensors, self.bias = with_scoring_head(tensors, hidden)
        return tensors

    def scores(self, batch: RankBatch, *groups: Group) -> tuple[TrainReport, TokenRewards]:
        started = time.perf_counter()
        self.bring_back()
        packs, rows = self._by_teacher(batch, groups) if self.teaches else self._by_head(batch, groups)
        self.hand_over()
        rewards, of_response = TokenRewards(), {}
        if self.at.leads:  # on all but the last stage there are no rows, and so no result
            samples = {s.sample_id: s for g in groups for s in g.samples}
            for name, row in rows.items():
                counted = samples[name].loss_mask.astype(bool)
                scores = log_ratio(row, samples[name]) if self.teaches else self._output(row[1:])  # row[0]: the prompt's last token
                of_response[name] = response_score(scores[counted], self.config.token_reward.reduce)
                if self.config.algorithm.dense_rewards:
                    rewards[name] = (self.config.token_reward.weight * scores).astype(np.float32)
        timers = {"time/token_rewards": time.perf_counter() - started}
        return replace(self.report({}, timers, {"token_rewards": work_of(packs)}, {}), scores=of_response), rewards

    def _by_head(self, batch: RankBatch, groups: Sequence[Group]) -> tuple[list[PackedBatch], dict[str, np.ndarray]]:
        """The head's output at the last token of the prompt and at each token of the response."""
        packs = [b for mini in self.pack(batch, [read_to_the_end(g) for g in groups]) for b in mini]
        return packs, merged([by_sample(b, values) for b, values in zip(packs, self.engine.scores(packs))])

    def _by_teacher(self, batch: RankBatch, groups: Sequence[Group]) -> tuple[list[PackedBatch], dict[str, np.ndarray]]:
        """The log-probability of each token of the response."""
        packs = [b for mini in self.pack(batch, groups) for b in mini]
        return packs, merged([by_sample(b, logprobs) for b, (logprobs, _) in zip(packs, self.engine.logprobs(packs))])

    def _output(self, row: np.ndarray) -> np.ndarray:
        logits = row.astype(np.float64) + self.bias
        return logits if self.config.token_reward.output == "logit" else 1 / (1 + np.exp(-logits))

    def bring_back(self) -> None:
        self.parked.bring_back()

    def hand_over(self) -> None:
        if self.config.token_reward.offload_weight and self.device.type == "cuda":
            self.parked.park(self.engine.model.parameters())


def response_score(scores: np.ndarray, reduce: str) -> float:
    """The score of a response: `reduce` over the scores of the tokens that count; 0 where there are none."""
    return float(REDUCE[reduce](scores)) if len(scores) else 0.0


def log_ratio(logprobs: np.ndarray, sample: Sample) -> np.ndarray:
    """log p - log mu of each token; 0 where the policy did not sample it."""
    return np.where(sample.loss_mask > 0, logprobs.astype(np.float64) - sample.rollout_logprobs, 0.0)


def read_to_the_end(group: Group) -> Group:
    """The group with one more token at the end of each response. Packing leaves out the last token of a response, because it predicts
    nothing that is trained; here the model has to read it."""

    def longer(s: Sample) -> Sample:
        return replace(
            s,
            token_ids=np.append(s.token_ids, s.token_ids.dtype.type(0)),
            rollout_logprobs=np.append(s.rollout_logprobs, np.float32(np.nan)),
            loss_mask=np.append(s.loss_mask, np.uint8(0)),
            versions=(*s.versions, (0, 1)),
        )

    return replace(group, samples=tuple(longer(s) for s in group.samples))
