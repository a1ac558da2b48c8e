"""The interface to the machines of a run. It has two backends: Ray, with a process for each worker, and `local`, with all workers in this
process (cluster.backend)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from rlinf.cluster.failure import Failure
from rlinf.cluster.group import WorkerGroup
from rlinf.cluster.phase import START, Phase
from rlinf.config.schema import ClusterConfig
from rlinf.scheduling.placement import Node, Plan

T = TypeVar("T")


class Cluster(ABC):
    """The machines of one run. phase: set by the runner, and named in the messages of failures. device: "cuda" or "cpu"."""

    device: str
    phase: Phase = START

    def __init__(self, config: ClusterConfig, run_id: str, log_dir: Path) -> None:
        self.config = config
        self.run_id = run_id
        self.log_dir = log_dir.resolve()
        self.failure = Failure()

    @staticmethod
    def connect(config: ClusterConfig, run_id: str, log_dir: Path) -> Cluster:
        """Join the running Ray cluster, start a private one, or use none (backend local). Waits until config.num_nodes nodes are up.

        Raises UserError when the machines are not what the configuration says.
        """
        if config.backend == "local":
            from rlinf.cluster.local_cluster import LocalCluster

            return LocalCluster(config, run_id, log_dir)
        from rlinf.cluster.ray_cluster import RayCluster

        return RayCluster.open(config, run_id, log_dir)

    @abstractmethod
    def inventory(self) -> list[Node]:
        """The nodes of the run, by rank, each with the devices that the run uses."""

    @abstractmethod
    def launch(self, plan: Plan, component: str, worker_class: type | str, *args: Any) -> WorkerGroup:
        """Start one worker for each seat of the component, constructed as worker_class(address, *args). worker_class may be "module:Class".

        Returns before the constructors have returned: see WorkerGroup.ready.
        """

    @abstractmethod
    def close(self) -> None:
        """End every worker and every process that carries the run id. May be called twice."""

    async def guard(self, loop: Coroutine[Any, Any, T]) -> T:
        """Run the runner's loop. The death of a worker or node ends it with RunFailed, even while it waits for something else."""
        return await self.failure.race(loop)
