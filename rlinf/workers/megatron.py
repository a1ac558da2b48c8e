"""What the workers of the Megatron roles have in common: model, packed batches, checkpoints, a device that is shared, reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlinf.config.schema import Config, LoraConfig
from rlinf.data.packing import RankBatch
from rlinf.data.records import Group
from rlinf.device import choose, peak_memory
from rlinf.scheduling.flops import Work, adapter_flops, forward_flops, recomputed_flops, update_flops
from rlinf.scheduling.placement import WorkerAddress
from rlinf.training import checkpoint, parallel
from rlinf.training.engine import MegatronEngine, Update
from rlinf.training.offload import Offloader
from rlinf.training.packed_batch import PackedBatch, pack
from rlinf.weights.architecture import open_architecture
from rlinf.weights.tensor_folder import open_hf_folder
from rlinf.workers.device import peak_flops
from rlinf.workers.interfaces import TokenNumbers, TrainReport


class MegatronWorker:
    """One rank of a role: it joins the role's other ranks and lays the role's model over them.

    role: one of config.schema.MEGATRON_ROLES. It names the section of the configuration and the part of a checkpoint, and says which
    model. temperature: of the log-probabilities that the engine computes. offloader: takes what is not in use off a device that is
    shared; None = everything stays there.
    """

    temperature = 1.0
    offloader: Offloader | None = None
    writing: checkpoint.Writing | None = None

    def __init__(self, address: WorkerAddress, config: Config, role: str) -> None:
        torch.set_num_threads(address.threads)
        self.address, self.config, self.role, self.section = address, config, role, getattr(config, role)
        self.device, model, folder = choose(config.cluster.device), self.section.model, config.model_dir_of(role)
        self.at = parallel.initialize(
            model.tensor_model_parallel_size,
            model.pipeline_model_parallel_size,
            model.context_parallel_size,
            rank=address.rank,
            world_size=address.world_size,
            device=self.device,
            address=f"{address.master_addr}:{address.master_port}",
        )
        arch = open_architecture(folder)
        optim = getattr(self.section, "optim", None)  # a frozen model has neither this nor adapters
        lora = getattr(self.section, "lora", LoraConfig())
        self.engine = MegatronEngine(arch, model, optim, self.at, self.device, config.head_of(role), lora)
        self.engine.load_hf(self.first_weights(open_hf_folder(folder), arch.hidden))

    def first_weights(self, tensors: Mapping[str, Tensor], hidden: int) -> Mapping[str, Tensor]:
        """What the engine starts from. tensors: those of the model folder, whose head may be another than the role's."""
        return tensors

    # ---- one step -------------------------------------------------------------------------------------------------------------

    def pack(self, batch: RankBatch, groups: Sequence[Group]) -> list[list[PackedBatch]]:
        """This rank's share of a global batch, by mini-batch, then micro-batch. Raises ValueError where `groups` are not those of it."""
        came = [g.group_id for g in groups]
        if came != list(batch.group_ids):
            raise ValueError(f"payloads do not match the plan: the groups {came} came for {list(batch.group_ids)}")
        packed = partial(pack, groups, share_prefix=True, temperature=self.temperature, pad_to=self.engine.pad_to, device=self.device)
        return [[packed(refs) for refs in mini.micro_batches] for mini in batch.mini_batches]

    def report(
        self, metrics: dict[str, float], timers: dict[str, float], forward_only: Mapping[str, Work], trained: Mapping[str, Work]
    ) -> TrainReport:
        """What the driver may log of a step. The work is named by the timer of its part of the step: of passes without a gradient, and of
        passes forward and backward."""
        flops = self._flops(forward_only, trained)
        return TrainReport(metrics, timers, peak_memory(self.device), self.checkpoint_written, flops, peak_flops(self.device))

    def _flops(self, forward_only: Mapping[str, Work], trained: Mapping[str, Work]) -> dict[str, float]:
        """Operations of this rank, an even part of those of its model copy, by part of the step; and what activation recompute adds to
        the passes forward and backward (`again`). A head with one output is not counted."""
        engine, copy = self.engine, self.at.tp * self.at.cp * self.at.pp

        def counted(of: Mapping[str, Work], part: str) -> Work:
            work = of.get(part, Work())
            return work if engine.model.head == "lm" else Work(work.rows, 0, work.pairs)

        def both(part: str) -> float:
            looked_at = counted(forward_only, part)
            forward = forward_flops(engine.arch, looked_at) + adapter_flops(engine.arch, engine.lora, looked_at)
            return (forward + update_flops(engine.arch, counted(trained, part), engine.lora)) / copy

        again = sum(recomputed_flops(engine.arch, self.section.model, work) for work in trained.values()) / copy
        return {part: both(part) for part in [*forward_only, *trained]} | {"again": again}

    # ---- checkpoints ----------------------------------------------------------------------------------------------------------

    def save(self, step_dir: str) -> None:
        """Write the checkpoint; with runner.async_checkpoint only begin to, until finish_save()."""
        self.bring_back()
        background, model_dir = self.config.runner.async_checkpoint, Path(self.config.model_dir_of(self.role))
        self.writing = checkpoint.Writing(self.engine, Path(step_dir), model_dir, background, self.role)
        if background:
            self.hand_over()
        else:
            self.finish_save()

    def finish_save(self) -> None:
        """Wait for the files of the last save() and check them."""
        self.bring_back()
        if self.writing is None:
            raise RuntimeError(f"{self.role} rank {self.address.rank}: no checkpoint is being written")
        self.writing.finish()
        self.writing = None
        self.hand_over()

    def load(self, step_dir: str) -> None:
        self.bring_back()
        checkpoint.load(self.engine, Path(step_dir), self.role)
        self.hand_over()

    @property
    def checkpoint_written(self) -> bool:
        """Whether the files of a checkpoint in the background are on disk. Raises RunFailed when they could not be written."""
        return self.writing is not None and self.writing.written

    # ---- a shared device ------------------------------------------------------------------------------------------------------

    def bring_back(self) -> None:
        """Have everything of the engine on the device, to train or for a checkpoint."""
        if self.offloader is not None:
            self.offloader.before_use()

    def hand_over(self) -> None:
        """Leave the device to those that share it."""
        if self.offloader is not None:
            self.offloader.after_training()
            self.offloader.after_publishing()


def work_of(packs: Iterable[PackedBatch]) -> Work:
    """What a pass over these micro-batches has to do (scheduling.flops)."""
    return sum((Work(len(b.token_ids), len(b.predict_rows), b.attended_pairs) for b in packs), Work())


def merged(parts: Iterable[TokenNumbers]) -> dict[str, np.ndarray]:
    """Numbers of the samples of several ranks or micro-batches together."""
    return {name: numbers for part in parts for name, numbers in part.items()}


def optimizer_metrics(updates: Sequence[Update], section: str) -> dict[str, float]:
    """Of the mini-batches of one step, as <section>/*: the mean gradient norm of those that were stepped, the learning rate, and how many
    were skipped."""
    norms = [u.grad_norm for u in updates if not u.skipped]
    return {
        f"{section}/grad_norm": sum(norms) / len(norms) if norms else float("nan"),
        f"{section}/lr": updates[-1].learning_rate,
        f"{section}/minibatches_skipped": float(sum(u.skipped for u in updates)),
    }
