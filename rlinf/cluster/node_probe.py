"""Asks every node of a running Ray cluster for its clock, and whether it sees a certain folder of this node."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlinf.cluster.machines import RANK_LABEL, alive_nodes
from rlinf.cluster.ray_session import RaySession

PATIENCE = 60.0  # seconds for a node to start a process


@dataclass(frozen=True)
class NodeView:
    """What a node answered. ahead: by how many seconds its clock is ahead of ours, give or take `within`. sees: whether it sees the marker
    file."""

    rank: str
    host: str
    ahead: float
    within: float
    sees: bool


def look_at_nodes(marker: Path) -> list[NodeView]:
    """A view of every node, by rank; empty when no cluster is up here. Raises UserError when the cluster cannot be joined."""
    with tempfile.TemporaryDirectory() as folder:
        session = RaySession(f"doctor-{os.getpid()}", Path(folder))
        try:
            return [_view(node, marker) for node in alive_nodes()] if session.join() else []
        finally:
            session.close(keep_logs=False)


def _view(node: dict, marker: Path) -> NodeView:
    task = ray.remote(_from_inside).options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
    ray.get(task.remote(str(marker)), timeout=PATIENCE)  # the first call starts a process; the second one is quick
    asked = time.time()
    clock, sees = ray.get(task.remote(str(marker)), timeout=PATIENCE)
    answered = time.time()
    middle, within = (asked + answered) / 2, (answered - asked) / 2
    return NodeView(node["Labels"].get(RANK_LABEL, "?"), node["NodeManagerAddress"], clock - middle, within, sees)


def _from_inside(marker: str) -> tuple[float, bool]:
    return time.time(), os.path.exists(marker)
