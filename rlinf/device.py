"""The device of this process. Everything that names torch.cuda is here (tests/test_walls.py); the rest asks `device.type` at most."""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def usable() -> bool:
    """Whether torch can compute on a GPU here."""
    return torch.cuda.is_available()


def choose(setting: str) -> torch.device:
    """The device of cluster.device (auto, cuda, cpu). The cluster shows each worker its own GPUs only, so that the first is its own."""
    cuda = usable() if setting == "auto" else setting == "cuda"
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait for what was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back_free_memory(device: torch.device) -> None:
    """Hand what torch keeps for later use to other processes of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def limit_memory(device: torch.device, share: float) -> None:
    """Beyond `share` of the device's memory this process fails, not its neighbour. A CPU has no such limit."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device)


def memory_in_use(device: torch.device) -> int:
    """Bytes of this process's tensors on a GPU; on CPU the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_memory(device: torch.device) -> int:
    """The most that was in use since the start, or since forget_peak()."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device) -> None:
    """From now on peak_memory() counts anew; on CPU the kernel counts from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def host_copy(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """A copy in host memory; of a GPU's tensor in pinned memory, in which the device writes by itself.

    into: an earlier copy to use again. The copy is complete when this returns.
    """
    if into is None:
        into = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    into.copy_(tensor, non_blocking=True)
    synchronize(tensor.device)
    return into


def recorder() -> profile:
    """Torch's profiler, of what the thread that starts it does and of this process's GPU; a process has one at a time."""
    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * usable())


def gpu_count() -> int:
    return torch.cuda.device_count()


def gpu_name() -> str:
    return torch.cuda.get_device_name(0)


def gpu_memory() -> int:
    """Bytes of the first GPU."""
    return torch.cuda.get_device_properties(0).total_memory


def free_gpu_memory() -> int:
    """Bytes of the first GPU that no process holds."""
    return torch.cuda.mem_get_info(0)[0]


def nccl_version() -> Sequence[int]:
    return torch.cuda.nccl.version()
