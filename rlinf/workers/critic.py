"""One rank of the critic: computes the values of its share of a global batch, then makes the optimizer steps towards their targets."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from rlinf.algorithms.aggregation import Denominators
from rlinf.algorithms.values import ValueSettings, finalize_value_metrics
from rlinf.config.schema import Config
from rlinf.data.packing import RankBatch
from rlinf.data.records import Group
from rlinf.scheduling.flops import Work
from rlinf.scheduling.placement import WorkerAddress
from rlinf.training.model import with_value_head
from rlinf.training.offload import Offloader
from rlinf.training.packed_batch import PackedBatch, by_sample, by_token
from rlinf.training.profiling import profiled
from rlinf.workers.interfaces import TokenNumbers, TrainReport
from rlinf.workers.megatron import MegatronWorker, merged, optimizer_metrics, work_of


class CriticWorker(MegatronWorker):
    """Implements workers.interfaces.CriticWorker. It keeps packed batches and values between the two calls of a step."""

    offloader: Offloader

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        super().__init__(address, config, "critic")
        self.offloader = Offloader(self.engine, config.critic)
        a = config.algorithm
        self.settings = ValueSettings(a.loss_agg_func, config.critic.value_clip, a.sampling_params.max_new_tokens)
        self.batch = RankBatch((), ())
        self.packs: list[list[PackedBatch]] = []  # by mini-batch, then micro-batch
        self.old_values: list[list[Tensor]] = []

    def first_weights(self, tensors: Mapping[str, Tensor], hidden: int) -> Mapping[str, Tensor]:
        return with_value_head(tensors, hidden, self.config.critic.seed)

    def values(self, batch: RankBatch, *groups: Group) -> tuple[TrainReport, TokenNumbers]:
        started = time.perf_counter()
        self.offloader.before_forward()
        self.batch, self.packs = batch, self.pack(batch, groups)
        self.old_values = [self.engine.scores(packs) for packs in self.packs]
        self.hand_over()
        found: TokenNumbers = {}
        if self.at.leads:  # on all but the last stage `old_values` is empty, and so is the result
            found = merged([by_sample(b, v) for packs, values in zip(self.packs, self.old_values) for b, v in zip(packs, values)])
        return self.report({}, {"time/values": time.perf_counter() - started}, {"values": self._work()}, {}), found

    def train_step(self, step: int, *targets: TokenNumbers) -> TrainReport:
        with profiled(self.config.runner, step, "critic"):
            return self._train(targets)

    def _train(self, targets: Sequence[TokenNumbers]) -> TrainReport:
        started = time.perf_counter()
        self.bring_back()
        target_of, epochs = merged(targets), self.config.algorithm.update_epochs
        updates = [
            self.engine.update_values(
                packs,
                old,
                [by_token(b, target_of) for b in packs] if self.at.last_stage else [],
                Denominators(mini.global_tokens, mini.global_samples),
                self.settings,
            )
            for _ in range(epochs)
            for mini, packs, old in zip(self.batch.mini_batches, self.packs, self.old_values)
        ]
        self.hand_over()
        metrics = finalize_value_metrics(sum((u.metrics for u in updates[1:]), updates[0].metrics), len(updates))
        metrics |= optimizer_metrics(updates, "critic")
        return self.report(metrics, {"time/critic_update": time.perf_counter() - started}, {}, {"critic_update": epochs * self._work()})

    def _work(self) -> Work:
        return work_of(b for packs in self.packs for b in packs)
