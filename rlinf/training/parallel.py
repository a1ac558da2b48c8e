"""Process groups of a training role: Megatron's tensor, context, data and pipeline groups over gloo or NCCL."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from rlinf.algorithms.objective import MetricSums
from rlinf.device import synchronize


@dataclass(frozen=True)
class Coordinates:
    """The position of this rank in the layout."""

    tp_rank: int
    tp: int
    pp_rank: int
    pp: int
    dp_rank: int
    dp: int
    cp_rank: int
    cp: int

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def leads(self) -> bool:
        """Whether this is the first of the ranks that see the same samples on the same stage, and so have the same results (TP x CP)."""
        return self.tp_rank == 0 and self.cp_rank == 0


TIMEOUT = timedelta(
    minutes=30
)  # of a collective: a rank that lives may have much more to do than another, and one that died is noticed otherwise


def initialize(tp: int, pp: int, cp: int = 1, *, rank: int, world_size: int, device: torch.device, address: str) -> Coordinates:
    """Join the process groups (rank order: TP fastest, then CP, then DP, then PP) and seed Megatron's RNG tracker.

    Two roles in one process (cluster.backend: local) have one rank each and share its groups.
    """
    if dist.is_initialized():
        return coordinates()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=world_size, timeout=TIMEOUT)
    at = set_layout(tp, pp, cp)
    meet(device)
    return at


def meet(device: torch.device) -> None:
    """Every group of this rank sums a number. NCCL connects a group's members in its first collective, which may come after the first
    rollout: what is wrong between two nodes is to show now, and an engine that takes a share of the free memory is to find NCCL's taken."""
    groups = (
        dist.group.WORLD,
        mpu.get_tensor_model_parallel_group(),
        mpu.get_context_parallel_group(),
        mpu.get_data_parallel_group(),
        mpu.get_data_parallel_group(with_context_parallel=True),
        mpu.get_pipeline_model_parallel_group(),
        mpu.get_intra_distributed_optimizer_instance_group(),
    )
    for group in dict.fromkeys(groups):  # in one order on all ranks: who is in the first that is not made yet waits for no other
        if dist.get_world_size(group) > 1:
            dist.all_reduce(torch.ones(1, device=device), group=group)
    synchronize(device)


def set_layout(tp: int, pp: int, cp: int = 1) -> Coordinates:
    """Lay TP, PP and CP over the running process group; a layout that is in place is torn down first."""
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    return coordinates()


def coordinates() -> Coordinates:
    """The position of this rank in the current layout."""
    return Coordinates(
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp=mpu.get_tensor_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        pp=mpu.get_pipeline_model_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp=mpu.get_data_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        cp=mpu.get_context_parallel_world_size(),
    )


def wait_for_all(device: torch.device) -> None:
    """A barrier over all ranks. NCCL is told its device, because it complains when it has to guess."""
    dist.barrier(device_ids=[device.index or 0] if device.type == "cuda" else None)


def merge_over_ranks(part: MetricSums | None) -> MetricSums:
    """Metrics summed and maximised over data-parallel ranks; every rank gets the result. Only ranks of the last stage have a `part`."""
    out: list[MetricSums | None] = [None]
    if part is not None:
        out[0] = part.reduced(lambda t: _all_reduce(t, dist.ReduceOp.SUM), lambda t: _all_reduce(t, dist.ReduceOp.MAX))
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast_object_list(out, src=mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group())
    (merged,) = out
    assert merged is not None
    return merged


def gather_over_data_ranks(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the vectors of all data-parallel ranks one after another, the index at which this rank's begins). Their lengths may differ."""
    parts: list[torch.Tensor] = [values] * mpu.get_data_parallel_world_size()
    dist.all_gather_object(parts, values, group=mpu.get_data_parallel_group())
    return torch.cat(parts), sum(len(part) for part in parts[: mpu.get_data_parallel_rank()])


def sum_over_data_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over data-parallel ranks, on each of them."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def sum_over_stages(values: torch.Tensor) -> torch.Tensor:
    """The sum over data-parallel, context-parallel and pipeline ranks, on each of them."""
    for group in (mpu.get_data_parallel_group(with_context_parallel=True), mpu.get_pipeline_model_parallel_group()):
        if dist.get_world_size(group) > 1:
            dist.all_reduce(values, group=group)
    return values


def _all_reduce(values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    dist.all_reduce(values, op, group=mpu.get_data_parallel_group())
    return values
