"""What holds a worker object: under Ray the process of one seat, in the local backend an object in this process.

A worker class is plain; it is constructed as `worker_class(address, *args)`. A class with async methods lives in the event loop. Any other
class is constructed and called in one thread of its own, because a compute library keeps its threads with the thread that uses it.
`close()` is optional.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import inspect
import logging
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlinf.cluster.processes import RUN_ID, die_with_parent, start_node_sentinel
from rlinf.cluster.same_code import differences, own_code
from rlinf.compute_thread import compute_thread
from rlinf.errors import UserError
from rlinf.hardware import address_of, allow_open_files, cores, free_port
from rlinf.scheduling.placement import PART, WorkerAddress
from rlinf.weights.routes import AUTO, BROADCAST, DISK

# Blocks of activations stay mapped (no page faults a step), on huge pages where the kernel has them. The few that are as large as an
# embedding do not: between them lie small long-lived ones, and each time that a hole has become too small for its block the process grows,
# by 70 MB a step of a 135M model. Of compiled kernels, one for each number of tokens that came, the last ones are kept.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
}  # fmt: skip


def dotted(worker_class: type | str) -> str:
    """A class as 'package.module:Class', so that a process can name it without importing what the class needs."""
    if isinstance(worker_class, str):
        return worker_class
    if worker_class.__module__ == "__main__":
        raise TypeError(f"{worker_class.__name__} is defined in __main__; a worker class must be importable")
    return f"{worker_class.__module__}:{worker_class.__qualname__}"


def load_class(path: str) -> type:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


class Holder:
    """Holds one worker object, and calls its methods in the thread or event loop to which they belong."""

    def __init__(self, address: WorkerAddress) -> None:
        self.address = address
        self.worker: Any = None
        self.is_async = False
        self.thread = compute_thread(f"{address.component}-{address.rank}")
        self.built = asyncio.Event()

    async def build(self, class_path: str, *args: Any) -> None:
        loop = asyncio.get_running_loop()
        worker_class = await loop.run_in_executor(self.thread, load_class, class_path)
        self.is_async = any(inspect.iscoroutinefunction(member) for _, member in inspect.getmembers(worker_class))
        if self.is_async:
            self.worker = worker_class(self.address, *args)
        else:
            self.worker = await loop.run_in_executor(self.thread, lambda: worker_class(self.address, *args))
        self.built.set()

    async def call(self, method: str, *args: Any) -> Any:
        await self.built.wait()  # a failed constructor is reported by `build`
        function = getattr(self.worker, method)
        if not self.is_async:
            return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)
        result = function(*args)
        return await result if inspect.isawaitable(result) else result

    def end(self) -> None:
        """Call the worker's close(), if it has one."""
        if not hasattr(self.worker, "close"):
            return
        if self.is_async:
            self.worker.close()
        else:
            self.thread.submit(self.worker.close).result()


def own_stacks() -> str:
    """The stacks of every thread of this process. They go through a file, since faulthandler can only write to a descriptor."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as text:
        with os.fdopen(writer, "w") as out:
            faulthandler.dump_traceback(out, all_threads=True)
        return text.read()


@dataclass(frozen=True)
class Call:
    """A call as its caller serializes it: the method, its arguments without the payloads, the position of each payload, and the number of
    results."""

    method: str
    args: list[Any]
    places: list[int]  # among all arguments, rising
    returns: int

    def with_payloads(self, payloads: Sequence[Any]) -> list[Any]:
        """All arguments in their order."""
        args = [*self.args]
        for place, payload in zip(self.places, payloads, strict=True):
            args.insert(place, payload)
        return args


@dataclass(frozen=True)
class Setup:
    """How a seat's process is prepared: its log, the driver's folder, its rank and the number of device slots on its node, whether it
    uses GPUs, its own address for peers, whether it starts a sentinel for its node, how weights go to the engines (Plan.transport), and the
    code that the driver runs (None: it may be another)."""

    log_file: str
    cwd: str
    local_rank: int
    slots: int
    cuda: bool
    host: str
    sentinel: bool
    transport: str | None = None
    code: dict[str, str] | None = None


class WorkerProcess(Holder):
    """A Holder in a process of its own. It prepares environment, log and end of the process before anything heavy is imported."""

    def __init__(self, address: WorkerAddress, setup: Setup) -> None:
        die_with_parent()
        redirect_output(Path(setup.log_file))
        if os.path.isdir(setup.cwd):
            os.chdir(setup.cwd)
        if setup.sentinel:
            start_node_sentinel(address.run_id)
        allow_open_files()
        where = f"{address.component} rank {address.rank} on node {address.node} ({setup.host})"
        self.stranger = differences(setup.code, own_code(), where) if setup.code is not None else None
        address = replace(address, threads=address.threads or max(1, cores() // setup.slots))
        os.environ.update(seat_environment(address, setup))
        super().__init__(address)
        logging.getLogger("rlinf.cluster").info(
            "%s rank %d of %d, node %d, devices %s, pid %d, run %s",
            address.component,
            address.rank,
            address.world_size,
            address.node,
            address.devices,
            os.getpid(),
            address.run_id,
        )

    async def free_port(self) -> int:
        return free_port(self.address.master_addr)

    async def start(self, master_port: int, class_path: str, *args: Any) -> bytes:
        """Construct the worker; this process's pid, packed as a result of call_packed() is. Raises UserError where the code is another: it
        would not reach the user as one from the constructor."""
        if self.stranger is not None:
            raise UserError(self.stranger)
        self.address = replace(self.address, master_port=master_port)
        os.environ["MASTER_PORT"] = str(master_port)
        await self.build(class_path, *args)
        return pickle.dumps(os.getpid())

    async def call_packed(self, packed: bytes, *payloads: Any) -> Any:
        """call() with a pickled Call and a pickled first result. Ray's own serialization takes several times as long for objects that are
        neither bytes nor large."""
        call: Call = pickle.loads(packed)
        found = await self.call(call.method, *call.with_payloads(payloads))
        if call.returns == 1:
            return pickle.dumps(found, pickle.HIGHEST_PROTOCOL)
        first, *others = found
        return pickle.dumps(first, pickle.HIGHEST_PROTOCOL), *others

    async def stacks(self) -> str:
        """The stacks of every thread. A worker that computes in its own thread can be asked while it computes."""
        return own_stacks()

    async def rest(self) -> None:
        """Never returns: that this call fails tells its caller of the death of the process."""
        await asyncio.Event().wait()


def process_environment(run_id: str) -> dict[str, str]:
    """Environment variables that must be set before the process exists: the run id, and what the C library reads at its start.

    Libraries are told not to look anything up on the internet.
    """
    return {
        RUN_ID: run_id,
        "OMP_WAIT_POLICY": "PASSIVE",  # components that share cores take turns: a waiting thread must not burn them,
        "GOMP_SPINCOUNT": "10000",  # half a millisecond at most: beyond the time between two operations of one step
        **ALLOCATOR,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }


def redirect_output(path: Path) -> None:
    """Write the output of this process and of its children to `path`; at a crash, or on SIGUSR1, also the stacks of all threads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable(file=sys.stderr)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.Formatter.converter = time.gmtime


def seat_environment(address: WorkerAddress, setup: Setup) -> dict[str, str]:
    """Environment variables that torch, its compute library and its process group read when they are imported."""
    env = {
        "RANK": str(address.rank),
        "WORLD_SIZE": str(address.world_size),
        "LOCAL_RANK": str(setup.local_rank),
        "MASTER_ADDR": address.master_addr,
        "OMP_NUM_THREADS": str(address.threads),
        "CUDA_VISIBLE_DEVICES": visible_devices(address.devices, os.environ.get("CUDA_VISIBLE_DEVICES")) if setup.cuda else "",
    }
    if setup.cuda:
        env |= {name: os.environ.get(name, value) for name, value in gpu_environment(address.component, setup.transport).items()}
    interface = interface_of(setup.host)
    if interface:  # NCCL takes a bare name for the beginning of one: eth1 would stand for eth10, too
        sockets = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
        env |= {name: os.environ.get(name) or value for name, value in sockets.items()}
    return env


def gpu_environment(component: str, transport: str | None) -> dict[str, str]:
    """Environment variables of a seat on GPUs, unless the user exported another value."""
    env = {}
    if transport == BROADCAST:  # SGLang has 0 in its processes unless they inherit another, and both ends on a node need the same
        env["NCCL_CUMEM_ENABLE"] = "0"
    if component in ("rollout", PART):  # an engine has its own ideas
        return env
    # Megatron overlaps communication with what comes after it in the one queue that it counts on.
    env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    # From torch.compile Megatron has two small functions; it would start a process for each core, up to 32 of them, beside every rank.
    env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    # Micro-batches differ in size, and blocks that grow leave no holes. Not where memory is handed to another process (device_ipc), nor for
    # a transport that is not known here: not every torch can open such a block there.
    if transport in (None, AUTO, DISK, BROADCAST) and "PYTORCH_ALLOC_CONF" not in os.environ:
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return env


def interface_of(host: str) -> str | None:
    """The network interface that has this IPv4 address; None when none has it (as with address translation)."""
    if host.startswith("127."):
        return "lo"
    for _, name in socket.if_nameindex():
        try:
            found = address_of(name)
        except OSError:
            continue  # an interface without an IPv4 address
        if found == host:
            return name
    return None


def visible_devices(devices: tuple[int, ...], inherited: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for the seat's devices, which are numbered among those that the node's processes may see."""
    names = inherited.split(",") if inherited else None
    return ",".join(names[d] if names else str(d) for d in devices)
