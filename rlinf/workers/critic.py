"""One rank of the critic: values of its share of a global batch, then the optimizer steps towards the targets that come back."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from rlinf.algorithms.aggregation import Denominators
from rlinf.algorithms.values import ValueSettings, finalize_value_metrics
from rlinf.config.schema import Config
from rlinf.data.packing import RankBatch
from rlinf.data.records import Group
from rlinf.device import peak_memory
from rlinf.scheduling.flops import Work
from rlinf.scheduling.placement import WorkerAddress
from rlinf.training.layout import PackedBatch, by_sample, by_token, pack
from rlinf.training.offload import Offloader
from rlinf.training.profiling import profiled
from rlinf.workers.checkpointed import Checkpointed
from rlinf.workers.device import peak_flops
from rlinf.workers.interfaces import TokenNumbers, TrainReport
from rlinf.workers.operations import rank_flops, work_of
from rlinf.workers.train import merged, open_engine


class CriticWorker(Checkpointed):
    """Implements workers.interfaces.CriticWorker. Between the two calls of a step it keeps the packs and the values."""

    role = "critic"

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        self.config = config
        self.engine = open_engine(address, config, "critic")
        self.offloader = Offloader(self.engine, config.critic)
        a = config.algorithm
        self.settings = ValueSettings(a.loss_agg_func, config.critic.value_clip, a.sampling_params.max_new_tokens)
        self.batch = RankBatch((), ())
        self.packs: list[list[PackedBatch]] = []  # by mini-batch, then micro-batch
        self.old_values: list[list[torch.Tensor]] = []

    def values(self, step: int, batch: RankBatch, *groups: Group) -> tuple[TrainReport, TokenNumbers]:
        if [g.group_id for g in groups] != list(batch.group_ids):
            raise ValueError(f"step {step}: payloads do not match the plan")
        started = time.perf_counter()
        self.offloader.before_forward()
        engine = self.engine
        packed = lambda refs: pack(groups, refs, share_prefix=True, temperature=1.0, pad_to=engine.pad_to, device=engine.device)
        self.batch, self.packs = batch, [[packed(refs) for refs in mini.micro_batches] for mini in batch.mini_batches]
        self.old_values = [engine.scores(packs) for packs in self.packs]
        self.hand_over()
        found: TokenNumbers = {}
        if engine.at.leads:  # and on all but the last stage there are no values
            found = merged([by_sample(b, v) for packs, values in zip(self.packs, self.old_values) for b, v in zip(packs, values)])
        flops = rank_flops(engine, self.config.critic.model, {"values": self._work()}, {})
        timers = {"time/values": time.perf_counter() - started}
        return TrainReport({}, timers, peak_memory(engine.device), flops=flops, peak_flops=peak_flops(engine.device)), found

    def train_step(self, step: int, *targets: TokenNumbers) -> TrainReport:
        with profiled(self.config.runner, step, "critic"):
            return self._train(targets)

    def _train(self, targets: Sequence[TokenNumbers]) -> TrainReport:
        started = time.perf_counter()
        self.offloader.before_use()
        target_of, last_stage = merged(targets), self.engine.at.last_stage
        updates = [
            self.engine.update_values(
                packs,
                old,
                [by_token(b, target_of) for b in packs] if last_stage else [],
                Denominators(mini.global_tokens, mini.global_samples),
                self.settings,
            )
            for mini, packs, old in zip(self.batch.mini_batches, self.packs, self.old_values)
        ]
        self.hand_over()
        metrics = finalize_value_metrics(sum((u.metrics for u in updates[1:]), updates[0].metrics), len(updates))
        stepped = [u.grad_norm for u in updates if not u.skipped]
        metrics["critic/grad_norm"] = sum(stepped) / len(stepped) if stepped else float("nan")
        metrics["critic/lr"] = updates[-1].learning_rate
        metrics["critic/minibatches_skipped"] = float(sum(u.skipped for u in updates))
        timers = {"time/critic_update": time.perf_counter() - started}
        flops = rank_flops(self.engine, self.config.critic.model, {}, {"critic_update": self._work()})
        return TrainReport(metrics, timers, peak_memory(self.engine.device), self.checkpoint_written, flops, peak_flops(self.engine.device))

    def _work(self) -> Work:
        return work_of(b for packs in self.packs for b in packs)

    def bring_back(self) -> None:
        self.offloader.before_use()

    def hand_over(self) -> None:
        """Leave the device to those that share it."""
        self.offloader.after_training()
        self.offloader.after_publishing()
