"""One rank of the token reward model: a frozen model that scores every token of a response, such as a process reward model.

The score of token t is the head's number at the row of token t, which has read it. (A critic's value of token t stands one row earlier.)
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from rlinf.config.schema import Config
from rlinf.data.packing import RankBatch
from rlinf.data.records import Group, Sample
from rlinf.device import peak_memory
from rlinf.scheduling.placement import WorkerAddress
from rlinf.training.layout import by_sample, pack
from rlinf.training.model import with_scoring_head
from rlinf.training.offload import Parked
from rlinf.weights.tensor_folder import open_hf_folder
from rlinf.workers.device import peak_flops
from rlinf.workers.interfaces import TokenRewards, TrainReport
from rlinf.workers.operations import rank_flops, work_of
from rlinf.workers.train import merged, open_engine

REDUCE = {"mean": np.mean, "sum": np.sum, "last": lambda scores: scores[-1], "min": np.min}


class TokenRewardWorker:
    """Implements workers.interfaces.TokenRewardWorker."""

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        self.config, self.dense = config, config.algorithm.dense_rewards
        self.engine = open_engine(address, config, "token_reward")
        _, self.bias = with_scoring_head(open_hf_folder(config.token_reward.model_dir), self.engine.arch.hidden)
        self.parked = Parked()
        self.hand_over()

    def scores(self, step: int, batch: RankBatch, *groups: Group) -> tuple[TrainReport, TokenRewards]:
        if [g.group_id for g in groups] != list(batch.group_ids):
            raise ValueError(f"step {step}: payloads do not match the plan")
        started, engine = time.perf_counter(), self.engine
        self.parked.bring_back()
        whole = [read_to_the_end(g) for g in groups]
        packed = lambda refs: pack(whole, refs, share_prefix=True, temperature=1.0, pad_to=engine.pad_to, device=engine.device)
        packs = [packed(refs) for mini in batch.mini_batches for refs in mini.micro_batches]
        outputs = engine.scores(packs)
        self.hand_over()
        rewards, of_response = TokenRewards(), {}
        if engine.at.leads:  # and on all but the last stage there are no outputs
            rows = merged([by_sample(b, values) for b, values in zip(packs, outputs)])
            counted = {s.sample_id: s.loss_mask.astype(bool) for g in groups for s in g.samples}
            for name, row in rows.items():
                scores = self._output(row[1:])  # the first is of the prompt's last token
                of_response[name] = response_score(scores[counted[name]], self.config.token_reward.reduce)
                if self.dense:
                    rewards[name] = (self.config.token_reward.weight * scores).astype(np.float32)
        timers = {"time/token_rewards": time.perf_counter() - started}
        flops = rank_flops(engine, self.config.token_reward.model, {"token_rewards": work_of(packs)}, {})
        report = TrainReport({}, timers, peak_memory(engine.device), flops=flops, peak_flops=peak_flops(engine.device), scores=of_response)
        return report, rewards

    def _output(self, row: np.ndarray) -> np.ndarray:
        logits = row.astype(np.float64) + self.bias
        return logits if self.config.token_reward.output == "logit" else 1 / (1 + np.exp(-logits))

    def hand_over(self) -> None:
        """Leave the device to those that share it."""
        if self.config.token_reward.offload_weight and self.engine.device.type == "cuda":
            self.parked.park(self.engine.model.parameters())


def response_score(scores: np.ndarray, reduce: str) -> float:
    """One number from the scores of the tokens that count; 0 where there are none."""
    return float(REDUCE[reduce](scores)) if len(scores) else 0.0


def read_to_the_end(group: Group) -> Group:
    """The group with a token behind each response: packing leaves out a response's last token, which predicts nothing,
    but here it is read."""

    def longer(s: Sample) -> Sample:
        return replace(
            s,
            token_ids=np.append(s.token_ids, s.token_ids.dtype.type(0)),
            rollout_logprobs=np.append(s.rollout_logprobs, np.float32(np.nan)),
            loss_mask=np.append(s.loss_mask, np.uint8(0)),
            versions=(*s.versions, (0, 1)),
        )

    return replace(group, samples=tuple(longer(s) for s in group.samples))
