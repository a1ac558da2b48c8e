"""The Ray backend: a placement group with one bundle for each device, an actor for each seat, and threads that watch them."""

from __future__ import annotations

import logging
import os
import queue
import subprocess
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.cluster.health import PATIENCE, PERIOD, Death, Door, Health, at_most
from rlinf.cluster.host import Setup, WorkerProcess, dotted, process_environment
from rlinf.cluster.machines import Machine, alive_nodes, wait_for_machines
from rlinf.cluster.processes import dismiss, end_run, start_sentinel
from rlinf.cluster.ray_group import RayWorkerGroup
from rlinf.cluster.ray_session import RaySession
from rlinf.cluster.same_code import own_code
from rlinf.config.schema import ClusterConfig
from rlinf.errors import RunFailed, UserError
from rlinf.hardware import has_gpu
from rlinf.scheduling.placement import Node, Plan, Seat, WorkerAddress

log = logging.getLogger(__name__)
CONCURRENCY = 100_000  # calls in flight on one worker; the dispatcher decides how many there are
WorkerActor = ray.remote(WorkerProcess)
FAREWELL = 5.0  # seconds that workers have for their own close()


class RayCluster(Cluster):
    def __init__(self, config: ClusterConfig, run_id: str, log_dir: Path) -> None:
        super().__init__(config, run_id, log_dir)
        self.session = RaySession(run_id, self.log_dir)
        self.machines: list[Machine] = []
        self.groups: list[RayWorkerGroup] = []
        self.filled: set[Seat] = set()  # those that have had a process
        self.ended: queue.SimpleQueue[tuple[RayWorkerGroup, int, int, BaseException | None]] = queue.SimpleQueue()  # ranks, by life
        self.bundles: PlacementGroup | None = None
        self.bundle_of: dict[tuple[int, int], int] = {}
        self.health: Health | None = None
        self.sentinel: subprocess.Popen | None = None
        self.here = ""

    @classmethod
    def open(cls, config: ClusterConfig, run_id: str, log_dir: Path) -> RayCluster:
        cluster = cls(config, run_id, log_dir)
        with ExitStack() as undo:
            undo.callback(cluster.close)
            cluster._connect()
            undo.pop_all()
        return cluster

    def _connect(self) -> None:
        config = self.config
        cuda = config.device == "cuda" or (config.device == "auto" and has_gpu())
        if not self.session.join():
            if config.num_nodes > 1:
                raise UserError(
                    f"cluster.num_nodes is {config.num_nodes}, but no Ray cluster is up here: run ray_utils/start_ray.sh on every node "
                    "first (RANK=0 on this one), or set RAY_ADDRESS"
                )
            self.session.start(config.num_gpus_per_node, cuda)
        if config.device == "auto":
            cuda = any(node["Resources"].get("GPU") for node in alive_nodes())
        self.device = "cuda" if cuda else "cpu"
        folders = (self.session.folder,) if self.session.folder else ()
        self.sentinel = start_sentinel(self.run_id, folders)
        self.machines = wait_for_machines(config, self.device, private=self.session.folder is not None)
        self.here = ray.get_runtime_context().get_node_id()
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        doors = [Door("Ray's control store (GCS)", host, int(port))]
        doors += [Door(f"the raylet of node {m.rank}", m.host, m.port) for m in self.machines]
        self.health = Health(doors, self._deaths, self.failure, lambda: self.phase)
        self.health.start()

    def inventory(self) -> list[Node]:
        return [Node(m.rank, m.devices) for m in self.machines]

    def launch(self, plan: Plan, component: str, worker_class: type | str, *args: Any) -> WorkerGroup:
        seats = plan.of(component)
        if not seats:
            raise ValueError(f"the plan has no seat for {component}")
        bundles = self._reserve(plan) if self.bundles is None else self.bundles
        logs = [self.log_file(seat) for seat in seats]
        start = lambda seat: self._actor(plan, seat, bundles)
        group = RayWorkerGroup(
            component, seats, start, logs, self.failure, self.config.start_timeout, lambda: self.phase,
            lambda *end: self.ended.put(end),
        )  # fmt: skip
        group.start(dotted(worker_class), args)
        self.groups.append(group)
        return group

    def _reserve(self, plan: Plan) -> PlacementGroup:
        """One bundle for each device of the plan, each on its own node."""
        devices = sorted({(s.node, d) for s in plan.seats for d in s.devices})
        resource = "GPU" if self.device == "cuda" else "CPU"
        self.bundle_of = {device: i for i, device in enumerate(devices)}
        self.bundles = bundles = placement_group(
            [{resource: 1}] * len(devices),
            strategy="PACK",
            bundle_label_selector=[{"ray.io/node-id": self.machines[node].ray_id} for node, _ in devices],
        )
        if not bundles.wait(self.config.start_timeout):
            raise RunFailed(
                f"the {len(devices)} devices of the plan were not free within cluster.start_timeout = {self.config.start_timeout} s: "
                "another job holds them (`ray status` shows who uses what)"
            )
        return bundles

    def _actor(self, plan: Plan, seat: Seat, bundles: PlacementGroup) -> Any:
        """Create the process of a seat. Seats that share a device take equal parts of its bundle."""
        again = seat in self.filled  # a file may have been edited since the run began, and the run is to go on
        self.filled.add(seat)
        sharers = Counter((s.node, s.devices[0]) for s in plan.seats)[(seat.node, seat.devices[0])]
        part = int(10_000 / sharers) / 10_000
        peers = plan.of(seat.component)
        first = self.machines[peers[0].node]
        loopback = len({s.node for s in plan.seats}) == 1
        on_node = [s.rank for s in peers if s.node == seat.node]
        machine = self.machines[seat.node]
        address = WorkerAddress(
            seat.component,
            seat.rank,
            len(peers),
            seat.node,
            seat.devices,
            "127.0.0.1" if loopback else first.host,
            0,
            self.run_id,
            self.config.threads_per_worker,
            "127.0.0.1" if loopback else machine.host,
        )
        setup = Setup(
            str(self.log_file(seat)),
            os.getcwd(),
            on_node.index(seat.rank),
            machine.devices,
            self.device == "cuda",
            address.host,
            sentinel=seat.rank == on_node[0] and machine.ray_id != self.here,
            transport=plan.transport,
            code=None if again else own_code(),
        )
        options = {"num_cpus": 0, "num_gpus": part} if self.device == "cuda" else {"num_cpus": part}
        return WorkerActor.options(
            **options,
            max_restarts=0,
            enable_task_events=False,  # nobody reads them: there is no dashboard
            max_concurrency=CONCURRENCY,
            runtime_env={"env_vars": process_environment(self.run_id)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, self.bundle_of[(seat.node, seat.devices[0])]),
        ).remote(address, setup)

    def log_file(self, seat: Seat) -> Path:
        return self.log_dir / f"{seat.component}-{seat.rank}.log"

    def _deaths(self) -> list[Death]:
        ended = []
        with suppress(queue.Empty):
            ended.append(self.ended.get(timeout=PERIOD))
            while True:  # an out-of-memory killer takes several at once
                ended.append(self.ended.get_nowait())
        return [self._death(*one) for one in ended]

    def _death(self, group: RayWorkerGroup, rank: int, life: int, error: BaseException | None) -> Death:
        if error is None:
            raise RuntimeError(f"{group.where(rank)} stopped resting")
        obituary = group.obituary(rank, error)
        return Death(obituary, lambda: group.lose(rank, life, obituary))

    def close(self) -> None:
        with at_most(PATIENCE, "closing the Ray cluster"):
            if self.health is not None:
                self.health.stop()
            if ray.is_initialized():
                self._end_workers()
                self.session.close(keep_logs=self.failure.error is not None)
        left = end_run(self.run_id)
        if left:
            log.error("processes of run %s that could not be ended: %s", self.run_id, left)
        if self.sentinel is not None:
            dismiss(self.sentinel)

    def _end_workers(self) -> None:
        if self.failure.error is None:
            farewells = [actor.end.remote() for group in self.groups for actor in group.actors]
            if farewells:
                ray.wait(farewells, num_returns=len(farewells), timeout=FAREWELL)
        if self.session.folder is not None:
            if self.failure.error is not None:
                end_run(self.run_id)  # a private Ray that may have lost a part of itself is not asked to end the rest
            return
        for group in self.groups:
            for actor in group.actors:
                ray.kill(actor)
        if self.bundles is not None:
            remove_placement_group(self.bundles)
