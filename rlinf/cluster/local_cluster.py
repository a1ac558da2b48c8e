"""The local backend: every worker lives in this process. For debugging, tests, and a machine with one GPU without Ray."""

from __future__ import annotations

import asyncio
import os
import threading
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import Ref, Shared, WorkerGroup
from rlinf.cluster.health import PATIENCE, give_up
from rlinf.cluster.host import Holder, dotted
from rlinf.cluster.processes import RUN_ID, dismiss, end_run, start_sentinel
from rlinf.compute_thread import common_thread
from rlinf.config.schema import ClusterConfig
from rlinf.errors import RunFailed, UserError
from rlinf.hardware import VISIBLE_GPUS, cores, free_port, has_gpu
from rlinf.scheduling.placement import Node, Plan, Seat, WorkerAddress

VARIABLES = (RUN_ID, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", VISIBLE_GPUS)


class LocalCluster(Cluster):
    """One node with one device. Workers with async methods share the driver's event loop; everything that computes shares one thread."""

    def __init__(self, config: ClusterConfig, run_id: str, log_dir: Path) -> None:
        super().__init__(config, run_id, log_dir)
        if config.num_nodes != 1 or config.num_gpus_per_node != 1:
            raise UserError(
                "cluster.backend: local keeps everything in one process: set cluster.num_nodes and cluster.num_gpus_per_node to 1, "
                f"not {config.num_nodes} and {config.num_gpus_per_node}, or use cluster.backend: ray"
            )
        if config.device == "cuda" and not has_gpu():
            raise UserError("cluster.device is cuda, but this machine has no visible NVIDIA GPU: set cluster.device to cpu or auto")
        self.device = config.device if config.device != "auto" else "cuda" if has_gpu() else "cpu"
        self.holders: list[Holder] = []
        self.compute = ExitStack()
        self.compute.enter_context(common_thread())
        self.closed = threading.Event()
        threading.Thread(target=self._end_when_stuck, name="rlinf-last-resort", daemon=True).start()
        self.sentinel = start_sentinel(run_id)
        self.environment = {name: os.environ.get(name) for name in VARIABLES}
        os.environ.update({RUN_ID: run_id, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
        if self.device == "cpu":
            os.environ[VISIBLE_GPUS] = ""  # Megatron puts its tensors on a GPU that it sees

    def inventory(self) -> list[Node]:
        return [Node(0, 1)]

    def launch(self, plan: Plan, component: str, worker_class: type | str, *args: Any) -> WorkerGroup:
        seats = plan.of(component)
        port = free_port("127.0.0.1")
        os.environ["MASTER_PORT"] = str(port)
        holders = [
            Holder(
                WorkerAddress(
                    component,
                    seat.rank,
                    len(seats),
                    seat.node,
                    seat.devices,
                    "127.0.0.1",
                    port,
                    self.run_id,
                    self.config.threads_per_worker or cores(),
                )
            )
            for seat in seats
        ]
        self.holders += holders
        return LocalWorkerGroup(self, component, seats, holders, dotted(worker_class), args)

    def _end_when_stuck(self) -> None:
        """End the process when a failure does not end the run. A hanging thread cannot be ended, and Python would wait for it forever."""
        error = self.failure.wait()
        if not self.closed.wait(PATIENCE):
            give_up(f"rlinf: {error}\nThe run did not end within {PATIENCE:.0f} s of this failure; ending the process.")

    def close(self) -> None:
        for holder in self.holders:
            holder.end()
        self.holders = []
        self.compute.close()
        end_run(self.run_id)
        dismiss(self.sentinel)
        for name, value in self.environment.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        self.closed.set()


class LocalWorkerGroup(WorkerGroup):
    """Handles are futures of the driver's loop; a payload is the object itself."""

    def __init__(
        self, cluster: LocalCluster, component: str, seats: Sequence[Seat], holders: list[Holder], class_path: str, args: tuple[Any, ...]
    ) -> None:
        super().__init__(component, seats, cluster.failure, cluster.config.start_timeout)
        self.cluster = cluster
        self.holders = holders
        self.build = (class_path, args)

    async def ready(self) -> None:
        if not self.starts:
            class_path, args = self.build
            self.starts = [Ref(self, h.address.rank, "__init__", quiet(h.build(class_path, *args))) for h in self.holders]
        await super().ready()

    def submit(self, rank: int, method: str, args: tuple[Any, ...], returns: int) -> list[asyncio.Future[Any]]:
        async def run() -> Any:
            await self.ready()
            values = [await a if isinstance(a, asyncio.Future) else a.value if isinstance(a, Shared) else a for a in args]
            return await self.holders[rank].call(method, *values)

        async def item(index: int) -> Any:
            return (await asyncio.shield(whole))[index]  # the second who awaits a task itself takes the frames from its exception

        whole = quiet(run())
        return [whole] if returns == 1 else [quiet(item(i)) for i in range(returns)]

    def resolve(self, handle: asyncio.Future[Any]) -> asyncio.Future[Any]:
        return asyncio.shield(handle)

    async def explain(self, error: BaseException, ref: Ref) -> BaseException:
        if isinstance(error, (UserError, RunFailed)) or not isinstance(error, Exception):
            return error
        text = "".join(traceback.format_exception(error))
        where = f"{self.where(ref.rank)} failed in {ref.method} (phase: {self.cluster.phase})"
        failed = RunFailed(f"{where}: {type(error).__name__}: {error}\n\n{text}")
        failed.__cause__ = error
        return failed

    def where(self, rank: int) -> str:
        return f"{self.component} rank {rank} (this process)"


def quiet(work: Any) -> asyncio.Task[Any]:
    """A task whose error is looked at by those who await it, and by nobody if nobody does."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda t: t.cancelled() or t.exception())
    return task
