"""One rank of supervised fine-tuning: the actor's engine with the supervised loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlinf.algorithms.supervised import finalize_supervised, lengths_S, loss_weights_S, sample_losses_S, supervised_objective
from rlinf.config.schema import Config
from rlinf.data.packing import MiniBatch, RankBatch
from rlinf.data.records import Group
from rlinf.scheduling.placement import WorkerAddress
from rlinf.training.packed_batch import PackedBatch
from rlinf.training.parallel import gather_over_data_ranks
from rlinf.training.profiling import profiled
from rlinf.workers.interfaces import TrainReport
from rlinf.workers.megatron import MegatronWorker


class SftWorker(MegatronWorker):
    """Implements workers.interfaces.SftWorker. It does not share its device."""

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        super().__init__(address, config, "actor")

    def train_step(self, step: int, batch: RankBatch, *groups: Group) -> TrainReport:
        """One optimizer step on one global batch."""
        (mini,) = batch.mini_batches
        (packs,) = self.pack(batch, groups)
        weights = self._weights(step, mini, packs)
        with profiled(self.config.runner, step, "actor"):
            update = self.engine.optimize(packs, lambda i, output: supervised_objective(output[0], output[1], weights[i]))
        metrics = {f"sft/{name}": value for name, value in finalize_supervised(update.metrics).items()}
        metrics |= {"sft/grad_norm": update.grad_norm, "sft/lr": update.learning_rate, "sft/skipped": float(update.skipped)}
        timers = {f"time/{part}": seconds for part, seconds in update.timers.items()}
        return self.report(metrics, timers, {}, {})

    def validate(self, batch: RankBatch, *groups: Group) -> dict[str, float]:
        """Token means over the held-out examples, without training on them."""
        (mini,) = batch.mini_batches
        (packs,) = self.pack(batch, groups)
        metrics = finalize_supervised(
            self.engine.evaluate(packs, lambda i, output: supervised_objective(output[0], output[1], token_mean_N(packs[i], mini)))
        )
        return {"sft/val_loss": metrics["loss"], "sft/val_entropy": metrics["entropy"]}

    def _weights(self, step: int, mini: MiniBatch, packs: Sequence[PackedBatch]) -> list[Tensor]:
        """For each micro-batch the weight of each token in the loss; with reweighting, empty on all but the last pipeline stage."""
        sft = self.config.sft
        if sft.reweighting is None:
            return [token_mean_N(batch, mini) for batch in packs]
        outputs = self.engine.logprobs(packs)
        if not outputs:
            return []
        own_S = torch.cat([sample_losses_S(logprobs, b.sample_N, b.n_samples) for (logprobs, _), b in zip(outputs, packs)])
        all_S, start = gather_over_data_ranks(own_S)
        shape = "uniform" if step <= sft.reweighting_burn_in else sft.reweighting
        weights_S = loss_weights_S(all_S, shape, sft.reweighting_temperature)[start : start + len(own_S)]
        parts = weights_S.split([b.n_samples for b in packs])
        return [(part / lengths_S(b.sample_N, b.n_samples))[b.sample_N] for part, b in zip(parts, packs)]


def token_mean_N(batch: PackedBatch, mini: MiniBatch) -> Tensor:
    return torch.full(batch.sample_N.shape, 1.0 / mini.global_tokens, dtype=torch.float64, device=batch.sample_N.device)
