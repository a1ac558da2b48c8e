"""One rank of the actor: packs its share of a global batch, recomputes log-probabilities, runs the optimizer steps, hands out weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from rlinf.algorithms.aggregation import Denominators
from rlinf.algorithms.objective import MetricSums, finalize_metrics
from rlinf.algorithms.token_advantages import SampledTokens, token_advantages, value_targets
from rlinf.config.schema import Config
from rlinf.data.packing import RankBatch
from rlinf.data.records import Group
from rlinf.data.token_values import DumpPlan
from rlinf.data.tokenizer import TextTokenizer, tokenizer_of
from rlinf.scheduling.flops import Work
from rlinf.scheduling.placement import WorkerAddress
from rlinf.training import parallel
from rlinf.training.engine import Update
from rlinf.training.experts import load_metrics
from rlinf.training.offload import Offloader
from rlinf.training.packed_batch import PackedBatch, by_sample, by_token
from rlinf.training.profiling import profiled
from rlinf.training.publishing import Publisher, sequence_logprobs
from rlinf.training.reference import ReferencePolicy
from rlinf.weights.broadcast import Wire, open_store
from rlinf.weights.files import WEIGHTS_FOLDER
from rlinf.weights.routes import BroadcastGroup
from rlinf.weights.server_groups import ServerWire
from rlinf.weights.source import Buckets
from rlinf.workers.interfaces import TokenNumbers, TokenRewards, TrainReport
from rlinf.workers.megatron import MegatronWorker, merged, optimizer_metrics, work_of
from rlinf.workers.objective_settings import objective_settings, token_advantage_settings
from rlinf.workers.token_dump import write_token_values

Logprobs = list[list[torch.Tensor] | None]  # [mini-batch][micro-batch] of [N]; None where they are not known beforehand


class ActorWorker(MegatronWorker):
    """Implements workers.interfaces.ActorWorker."""

    offloader: Offloader

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        super().__init__(address, config, "actor")
        self.reference = ReferencePolicy(self.engine) if config.algorithm.kl_beta > 0 else None
        self.settings = objective_settings(config.algorithm)
        self.token_advantage_settings = token_advantage_settings(config.algorithm)
        self.temperature = config.algorithm.sampling_params.temperature
        self.offloader = Offloader(self.engine, config.actor)
        folder = config.runner.run_dir / WEIGHTS_FOLDER  # all nodes see it
        self.publisher = Publisher(self.engine, address.run_id, folder, config.rollout.weight_bucket_mib << 20)
        self.forward_only = Work()  # passes of this step without a gradient
        self.feeds_nobody = False  # then nothing comes between its training and the engines' turn

    # ---- one step -------------------------------------------------------------------------------------------------------------

    def train_step(self, step: int, dump: DumpPlan, batch: RankBatch, *payloads: Group | TokenNumbers) -> tuple[TrainReport, TokenNumbers]:
        """Pack once, look at the old policy once, then one optimizer step a mini-batch; what each token had goes where `dump` says.

        payloads: the groups, then with a critic the values of their tokens, whose targets are the second result,
        and with dense rewards those.
        """
        groups, numbers = [p for p in payloads if isinstance(p, Group)], [p for p in payloads if not isinstance(p, Group)]
        if not self.config.algorithm.max_staleness:  # no engine is at work that could need them again
            self.publisher.withdraw(free=self.config.rollout.offload and self.device.type == "cpu")  # where it is what offload is to save
        with profiled(self.config.runner, step, "actor"):
            report, targets = self._train(step, dump, batch, groups, numbers)
        if self.feeds_nobody:
            self.hand_over()
        elif self.config.has_critic:  # which may be trained on the same device next
            self.offloader.after_training()
        return report, targets

    def _train(
        self, step: int, dump: DumpPlan, batch: RankBatch, groups: Sequence[Group], numbers: Sequence[TokenNumbers]
    ) -> tuple[TrainReport, TokenNumbers]:
        started = time.perf_counter()
        self.bring_back()
        self.forward_only = Work()
        minibatches = self.pack(batch, groups)
        if self.config.algorithm.interpolates_proximal:
            ages = {s.sample_id: step - s.token_versions for g in groups for s in g.samples}
            for b in (b for packs in minibatches for b in packs):
                b.age_N = by_token(b, ages)
        packed = time.perf_counter()
        trains = self.config.trains_actor(step)
        old: Logprobs = [None] * len(minibatches)
        ref: Logprobs = [None] * len(minibatches)
        finishing = self.token_advantage_settings
        if trains or (finishing is not None and finishing.needs_logprobs):
            old, ref = self._old_logprobs(minibatches), self._reference_logprobs(minibatches)
        rewards = merged([part for part in numbers if isinstance(part, TokenRewards)])
        values = merged([part for part in numbers if not isinstance(part, TokenRewards)])
        targets = self._finish_advantages(minibatches, old, ref, values, rewards)
        recomputed = time.perf_counter()
        timers = {"time/pack": packed - started, "time/recompute_logprobs": recomputed - packed}
        forward_only = {"recompute_logprobs": self.forward_only}
        if not trains:
            return self.report({}, timers, forward_only, {}), targets
        updates = self._optimizer_steps(batch, minibatches, old, ref)
        if self.at.last_stage and self.at.leads:
            write_token_values(dump, self.tokenizer, groups, batch, minibatches, old, updates[: len(minibatches)])
        for part in ("forward_backward", "optimizer"):
            timers[f"time/{part}"] = sum(u.timers[part] for u in updates)
        taught = [(packs[: mini.teaching], packs[mini.teaching :]) for mini, packs in zip(batch.mini_batches, minibatches)]
        epochs = self.config.algorithm.update_epochs
        forward_only["forward_backward"] = epochs * work_of(b for _, looked_at in taught for b in looked_at)
        trained = {"forward_backward": epochs * work_of(b for teaching, _ in taught for b in teaching)}
        return self.report(step_metrics(updates), timers, forward_only, trained), targets

    def _optimizer_steps(
        self, batch: RankBatch, minibatches: Sequence[Sequence[PackedBatch]], old: Logprobs, ref: Logprobs
    ) -> list[Update]:
        """One for each mini-batch and pass over the samples; advantages, pi_old and the reference stay as they were before the first.

        The first mini-batch is trained with the very weights of pi_old: its own forward pass says what pi_old is, and is kept in `old`.
        """
        algorithm, updates = self.config.algorithm, list[Update]()
        for epoch in range(algorithm.update_epochs):
            for i, (mini, packs) in enumerate(zip(batch.mini_batches, minibatches, strict=True)):
                is_old = algorithm.recompute_logprobs and epoch == i == 0
                done = self.engine.update(
                    packs,
                    None if is_old else old[i],
                    ref[i],
                    Denominators(mini.global_tokens, mini.global_samples),
                    self.settings,
                    algorithm.early_stop_imp_ratio,
                    mini.teaching,
                )
                if is_old:
                    old[i] = list(done.logprobs)
                updates.append(done)
        return updates

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return tokenizer_of(self.config)

    def _old_logprobs(self, minibatches: list[list[PackedBatch]]) -> Logprobs:
        """pi_old of every mini-batch; of the first one only when the advantages need it, because it is trained with the very weights."""
        if not self.config.algorithm.recompute_logprobs:
            return [[b.rollout_logprobs_N for b in packs] for packs in minibatches]
        settings = self.token_advantage_settings
        first = self._logprobs(minibatches[0]) if settings is not None and settings.needs_logprobs else None
        return [first, *(self._logprobs(packs) for packs in minibatches[1:])]

    def _reference_logprobs(self, minibatches: list[list[PackedBatch]]) -> Logprobs:
        if self.reference is None:
            return [None] * len(minibatches)
        with self.reference.swapped_in():
            return [self._logprobs(packs) for packs in minibatches]

    def _finish_advantages(
        self,
        minibatches: list[list[PackedBatch]],
        old: Logprobs,
        ref: Logprobs,
        values: TokenNumbers,
        rewards: TokenNumbers,
    ) -> TokenNumbers:
        """What differs from token to token, once for the whole step; only the last stage, which has the logits, needs advantages.

        With a critic's values of this rank's samples: their targets, from the rank that leads.
        """
        settings = self.token_advantage_settings
        if settings is None or not self.at.last_stage:
            return {}
        packs = [b for batches in minibatches for b in batches]
        flat = [
            [None if part is None else part[j] for part, batches in zip(found, minibatches) for j in range(len(batches))]
            for found in (old, ref)
        ]
        of_critic = [by_token(b, values) if self.config.has_critic else None for b in packs]
        of_scorer = [by_token(b, rewards) if self.config.algorithm.dense_rewards else None for b in packs]
        tokens = [
            SampledTokens(
                outcome_N=b.advantages_N,
                logprobs_N=logprobs,
                rollout_logprobs_N=b.rollout_logprobs_N,
                ref_logprobs_N=reference,
                loss_mask_N=b.loss_mask_N,
                sample_N=b.sample_N,
                n_samples=b.n_samples,
                values_N=values_N,
                rewards_N=rewards_N,
            )
            for b, logprobs, reference, values_N, rewards_N in zip(packs, *flat, of_critic, of_scorer, strict=True)
        ]
        for b, advantages in zip(packs, token_advantages(tokens, settings, parallel.sum_over_data_ranks)):
            b.advantages_N = advantages
        if not self.config.has_critic or not self.at.leads:
            return {}
        return merged([by_sample(b, targets) for b, targets in zip(packs, value_targets(tokens, settings))])

    def _logprobs(self, packs: Sequence[PackedBatch]) -> list[torch.Tensor] | None:
        self.forward_only += work_of(packs)
        return [logprobs for logprobs, _ in self.engine.logprobs(packs)] or None

    # ---- weights --------------------------------------------------------------------------------------------------------------

    def publish(self, version: int, transports: tuple[str, ...]) -> tuple[tuple[dict[str, Buckets], float], tuple[np.ndarray, ...]]:
        """Hand out this stage's weights, once for each transport by which this replica feeds engines (weights.routes). A rank that is told
        of no transport is not asked again: it hands its device over after each training.

        Returns what was written by transport (on the rank that leads) with the seconds it took, and the arrays for the object store.
        """
        started = time.perf_counter()
        self.feeds_nobody = not transports
        self.offloader.after_training()
        self.offloader.before_forward()  # before the first step the weights may be away, so that engines could start
        handed = self.publisher.hand_out(version, transports)
        return (handed.sources, time.perf_counter() - started), handed.arrays

    def open_store(self) -> tuple[str, int]:
        """Keep the store at which the broadcast groups meet; where it is."""
        host = self.address.master_addr
        self.store = open_store(host, 0, keeps=True)
        return host, self.store.port

    def join(self, store: tuple[str, int], groups: Sequence[BroadcastGroup]) -> None:
        """Make the broadcast group in which this rank publishes, if there is one; returns when all its members have."""
        for group in groups:
            if group.publisher == self.address.rank:
                meeting, timeout = open_store(*store, keeps=False), self.config.cluster.start_timeout
                if self.config.rollout.joins_groups:
                    self.publisher.wire = ServerWire(group, meeting, self.device, timeout)
                else:
                    self.publisher.wire = Wire(group, group.members[0], meeting, self.device, timeout)

    def release(self, keep: bool = False) -> None:
        """The engines have the weights: hand the device over, and withdraw what publish() wrote,
        unless a restarted engine may need it again."""
        if not keep:
            self.publisher.withdraw()
        self.offloader.after_publishing()

    def close(self) -> None:
        self.publisher.close()

    def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probability of each token given those before it: [n-1] for a sequence of n tokens; empty on all but the last stage."""
        return sequence_logprobs(self.engine, sequences)


def step_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """train/* of one step: token means over all its mini-batches and passes."""
    total: MetricSums = sum((u.metrics for u in updates[1:]), updates[0].metrics)
    metrics = finalize_metrics(total.sums, total.maxima, len(updates)) | optimizer_metrics(updates, "train")
    if loads := [u.expert_load for u in updates if u.expert_load is not None]:
        metrics |= load_metrics(torch.stack(loads).sum(0))
    if updates[-1].loss_scale is not None:
        metrics["train/loss_scale"] = updates[-1].loss_scale
    with_tokens = next((u.metrics for u in updates if u.metrics.sums["tokens"].item()), updates[0].metrics)  # without any there is no ratio
    first = finalize_metrics(with_tokens.sums, with_tokens.maxima)
    metrics["train/first_minibatch_ratio"] = first["train/ratio"]
    metrics["train/first_minibatch_clip_fraction"] = first["train/clip_fraction"]
    return metrics
