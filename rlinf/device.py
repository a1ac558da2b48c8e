"""The device of this process. All uses of torch.cuda are here (tests/test_walls.py checks that); other modules only read `device.type`."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from torch.profiler import ProfilerActivity, profile

from rlinf.errors import RunFailed, UserError
from rlinf.hardware import has_gpu


def usable() -> bool:
    """Whether torch can compute on a GPU here."""
    return torch.cuda.is_available()


def choose(setting: str) -> torch.device:
    """The device of cluster.device (auto, cuda, cpu). The cluster shows each worker its own GPUs only, so that the first is its own.

    Attention on a GPU is left to flash attention: where torch prefers cuDNN's, that one builds a plan for every length that it meets, which
    takes tens of milliseconds and is kept for ever, and here no two samples are equally long.
    Raises UserError for a GPU that torch cannot use: what is asked for does not become the CPU in silence.
    """
    cuda = has_gpu() if setting == "auto" else setting == "cuda"
    if cuda and not usable():
        found = f"torch {torch.__version__} cannot use this machine's" if has_gpu() else "this machine has no visible"
        raise UserError(
            f"cluster.device is {setting}, but {found} NVIDIA GPU: `rlinf doctor` says why; to compute on the CPU set cluster.device to cpu"
        )
    if cuda:
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait for what was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back_free_memory(device: torch.device) -> None:
    """Give memory that torch keeps for later use to other processes on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def limit_memory(device: torch.device, share: float) -> None:
    """Let this process fail when it takes more than `share` of the device's memory, instead of its neighbours. A CPU has no such limit."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device)


def memory_in_use(device: torch.device) -> int:
    """Bytes of this process's tensors on a GPU; on CPU the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_memory(device: torch.device) -> int:
    """The largest amount that was in use since the start, or since forget_peak()."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device) -> None:
    """Let peak_memory() count from now on; on CPU the kernel always counts from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def host_copy(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """A copy in host memory; of a GPU's tensor in pinned memory, to which the device can write directly.

    into: an earlier copy to be reused. The copy is complete when this returns.
    """
    if into is None:
        into = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    into.copy_(tensor, non_blocking=True)
    synchronize(tensor.device)
    return into


def share(buffer: Tensor) -> tuple[Any, ...]:
    """What another process of this machine needs to open the memory of a GPU's tensor [bytes]: numbers and bytes, with the GPU's UUID.

    Torch keeps the memory, even of a tensor that is gone, until one process has opened it and let it go, or forgo_shared() was called.
    """
    ordinal, *rest = buffer.untyped_storage()._share_cuda_()
    return (_uuid(ordinal), *rest)


def rebuilding(handle: tuple[Any, ...], device: int | str) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """Torch's function that opens what share() handed out, and its arguments. device: the number of the GPU in the opening process."""
    _, memory, nbytes, offset, counter, counter_offset, event, wait = handle
    tensor = (Tensor, (nbytes,), (1,), 0, torch.UntypedStorage, torch.uint8)
    return rebuild_cuda_tensor, (*tensor, device, memory, nbytes, offset, False, counter, counter_offset, event, wait)


def open_shared(handle: tuple[Any, ...]) -> Tensor:
    """The memory that another process has shared, as bytes. Raises RunFailed when this process does not see its GPU."""
    ordinal = next((i for i in range(gpu_count()) if _uuid(i) == handle[0]), None)
    if ordinal is None:
        raise RunFailed(f"the shared memory is on GPU {handle[0]}, which this process does not see")
    function, arguments = rebuilding(handle, ordinal)
    return function(*arguments)


def forgo_shared(handle: tuple[Any, ...]) -> None:
    """Tell torch that no other process will open the memory, because the process that shared it reads it itself."""
    torch.UntypedStorage._release_ipc_counter(*handle[4:6])


def _uuid(ordinal: int) -> str:
    return str(torch.cuda.get_device_properties(ordinal).uuid)


def recorder() -> profile:
    """Torch's profiler, for the thread that starts it and this process's GPU. A process can only have one at a time."""
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
