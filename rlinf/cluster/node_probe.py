"""Asks every node of a running Ray cluster for its clock, and whether it sees a certain folder of this node."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlinf.cluster.machines import alive_nodes
from rlinf.cluster.ray_session import RaySession
from rlinf.cluster.state import RANK_LABEL

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


@dataclass(frozen=True)
class SilentNode:
    """A node that did not answer, and why."""

    rank: str
    host: str
    reason: str


def look_at_nodes(marker: Path) -> list[NodeView | SilentNode]:
    """A view of every node, by rank; empty when no cluster is up here. Raises UserError when the cluster cannot be joined."""
    with tempfile.TemporaryDirectory() as folder:
        session = RaySession(f"doctor-{os.getpid()}", Path(folder))
        try:
            return views(alive_nodes(), marker) if session.join() else []
        finally:
            session.close(keep_logs=False)


def views(nodes: list[dict[str, Any]], marker: Path) -> list[NodeView | SilentNode]:
    """What each node answers. The first question starts a process there, on all nodes at once; the second is quick, and tells the time."""
    task = ray.remote(_from_inside)
    asks = [
        task.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote for node in nodes
    ]
    started = [ask(str(marker)) for ask in asks]
    ray.wait(started, num_returns=len(started), timeout=PATIENCE)
    return [_view(node, partial(ask, str(marker)), first) for node, ask, first in zip(nodes, asks, started)]


def _view(node: dict[str, Any], ask: Callable[[], ray.ObjectRef], first: ray.ObjectRef) -> NodeView | SilentNode:
    rank, host = node["Labels"].get(RANK_LABEL, "?"), node["NodeManagerAddress"]
    try:
        ray.get(first, timeout=0)
        asked = time.time()
        clock, sees = ray.get(ask(), timeout=PATIENCE)
    except ray.exceptions.GetTimeoutError:
        return SilentNode(rank, host, f"did not answer within {PATIENCE:g} s")
    except ray.exceptions.RayError as error:  # it has died since it was listed, or its process was killed
        return SilentNode(rank, host, f"failed: {str(error).splitlines()[0]}")
    answered = time.time()
    middle, within = (asked + answered) / 2, (answered - asked) / 2
    return NodeView(rank, host, clock - middle, within, sees)


def _from_inside(marker: str) -> tuple[float, bool]:
    return time.time(), os.path.exists(marker)
