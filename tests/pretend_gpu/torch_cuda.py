"""What torch.cuda and NCCL say on the pretend GPU, in a torch that was built without them."""

from __future__ import annotations

import os
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

GPU = torch.ops.pretend_gpu
MEMORY = 16 << 30


def visible() -> list[str]:
    """The GPUs that this process sees. All of them are one: a tensor is of cuda:0."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return names.split(",") if names not in ("", "-1") else []


def nothing(*_: Any, **__: Any) -> None:
    pass


def patch(module: Any, **values: Any) -> None:
    """A function of its own for each name: dynamo refuses one that stands at two places."""
    for name, value in values.items():
        setattr(module, name, anew(value) if isinstance(value, FunctionType) else value)


def anew(function: Any) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs)


class Stream:
    cuda_stream = 0
    device = torch.device("cuda", 0)
    synchronize = wait_stream = wait_event = record_event = nothing


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    record = wait = synchronize = nothing

    def query(self) -> bool:
        return True


generator = torch.Generator()  # nobody draws from it: it is there to be seeded, saved and put back
properties = SimpleNamespace(name="pretend GPU", total_memory=MEMORY, uuid=f"GPU-{visible()}", major=9, minor=0, multi_processor_count=132)
patch(
    torch.cuda,
    _lazy_init=nothing, init=nothing, is_initialized=lambda: True, is_available=lambda: bool(visible()),
    device_count=lambda: len(visible()),
    current_device=lambda: 0, set_device=nothing, _exchange_device=lambda _: 0, _maybe_exchange_device=lambda _: 0,
    synchronize=lambda *_: GPU.synchronize(), is_bf16_supported=lambda *_: True, is_current_stream_capturing=lambda: False,
    Stream=Stream, Event=Event, current_stream=lambda *_: Stream(), default_stream=lambda *_: Stream(),
    get_device_properties=lambda *_: properties, get_device_name=lambda *_: properties.name, get_device_capability=lambda *_: (9, 0),
)  # fmt: skip
patch(
    torch.cuda,
    memory_allocated=lambda *_: GPU.in_use(), max_memory_allocated=lambda *_: GPU.peak(), memory_reserved=lambda *_: GPU.in_use(),
    max_memory_reserved=lambda *_: GPU.peak(), reset_peak_memory_stats=lambda *_: GPU.forget_peak(), empty_cache=nothing,
    mem_get_info=lambda *_: (MEMORY - GPU.in_use(), MEMORY),
    set_per_process_memory_fraction=lambda share, *_: GPU.limit(int(share * MEMORY)),
)  # fmt: skip
patch(
    torch.cuda,
    get_rng_state=lambda *_, **__: generator.get_state(), set_rng_state=lambda state, *_, **__: generator.set_state(state),
    manual_seed=lambda seed: generator.manual_seed(seed), manual_seed_all=lambda seed: generator.manual_seed(seed),
    default_generators=(generator,),
)  # fmt: skip
patch(torch.cuda.random, get_rng_state=torch.cuda.get_rng_state, set_rng_state=torch.cuda.set_rng_state)
patch(torch.cuda.nccl, version=lambda: (2, 0, 0))
patch(torch.backends.cuda, can_use_flash_attention=lambda *_: True)  # where a mask has torch's name for causal

_resize, _to, _copy = torch.UntypedStorage.resize_, torch.UntypedStorage.to, torch.UntypedStorage.copy_


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def copy_(storage: torch.UntypedStorage, source: torch.UntypedStorage, non_blocking: bool = False) -> torch.UntypedStorage:
    if "cuda" not in (storage.device.type, source.device.type):
        return _copy(storage, source, non_blocking)
    bytes_of(storage).copy_(bytes_of(source), non_blocking=non_blocking)
    return storage


def to(storage: torch.UntypedStorage, *, device: torch.device, non_blocking: bool = False) -> torch.UntypedStorage:
    if torch.device(device).type != "cuda":
        return _to(storage, device=device, non_blocking=non_blocking)
    return bytes_of(storage).to(device).untyped_storage()


def resize_(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
    if storage.device.type != "cuda":
        return _resize(storage, nbytes)
    GPU.resize_storage(torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage, 0, (0,), (1,)), nbytes)
    return storage


def share_cuda(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """As CUDA's handles: anybody on this machine can open one as long as this process keeps the memory."""
    tensor = torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage, 0, (0,), (1,))
    name = f"/proc/{os.getpid()}/fd/{GPU.share(tensor)}"
    return 0, name.encode(), storage.nbytes(), 0, b"", 0, b"", False


def new_shared_cuda(device: int, handle: bytes, nbytes: int, *_: Any) -> torch.UntypedStorage:
    return GPU.open_shared(handle.decode(), nbytes).untyped_storage()


torch.UntypedStorage.resize_ = resize_
torch.UntypedStorage.to = to
torch.UntypedStorage.copy_ = copy_
torch.UntypedStorage._share_cuda_ = share_cuda
torch.UntypedStorage._new_shared_cuda = staticmethod(new_shared_cuda)
torch.UntypedStorage._release_ipc_counter = staticmethod(nothing)


class PretendNccl(dist.ProcessGroup):
    """gloo, on the memory behind the tensors of the GPU; it refuses the host's, as NCCL does."""

    Options = SimpleNamespace

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._host = dist.ProcessGroup(store, rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, getattr(timeout, "_timeout", timeout))
        self._host._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._host._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cuda")]

    def getBackendName(self) -> str:
        return "nccl"


def on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.device.type != "cuda":
            raise RuntimeError("No backend type associated with device type cpu")
        return GPU.host_view(value)
    return [on_host(v) for v in value] if isinstance(value, (list, tuple)) else value


def delegate(name: str) -> Any:
    def call(self: PretendNccl, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._host, name)(*map(on_host, args), **kwargs)

    return call


COLLECTIVES = ("all", "broadcast", "gather", "recv", "reduce", "scatter", "send", "_all", "_reduce")
for name in dir(dist.ProcessGroup):
    if name.startswith(COLLECTIVES):
        setattr(PretendNccl, name, delegate(name))

PretendNccl.barrier = lambda self, opts=None: self._host.barrier(dist.BarrierOptions())
dist.Backend.register_backend("pretend_nccl", PretendNccl, devices=["cuda"])
_init, _new_group = dist.init_process_group, dist.new_group


def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    _init("pretend_nccl" if backend == "nccl" else backend, *args, **kwargs)


def new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("pg_options", None)
    return _new_group(ranks, timeout, "pretend_nccl" if backend == "nccl" else backend, *args, **kwargs)


patch(dist, ProcessGroupNCCL=PretendNccl, init_process_group=init_process_group, new_group=new_group, is_nccl_available=lambda: True)
