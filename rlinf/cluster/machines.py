"""The nodes of a Ray cluster as a run counts them: with the ranks that were exported when they were started, and the devices that are
configured."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray

from rlinf.cluster.state import RANK_LABEL, listens
from rlinf.config.schema import ClusterConfig
from rlinf.errors import UserError

NAMES = {"GPU": "GPUs", "CPU": "CPU slots"}  # of Ray's resources, in messages


@dataclass(frozen=True)
class Machine:
    """One node: its rank, Ray's id for it, the address of its raylet, and how many devices the run uses there."""

    rank: int
    ray_id: str
    host: str
    port: int
    devices: int


def wait_for_machines(config: ClusterConfig, device: str, private: bool = False) -> list[Machine]:
    """The first config.num_nodes nodes, by rank, when they are up. private: whether it is a private Ray, which no other node will join.

    Raises UserError that names what is missing at the time-out, and at once when a node of the run has too few devices.
    """
    resource = "GPU" if device == "cuda" else "CPU"
    deadline = time.monotonic() + config.start_timeout
    while (chosen := choose(nodes := alive_nodes(), config, resource, private)) is None:
        if time.monotonic() > deadline:
            raise UserError(missing_message(nodes, config, resource))
        time.sleep(1.0)
    machines = [
        Machine(rank, node["NodeID"], node["NodeManagerAddress"], node["NodeManagerPort"], config.num_gpus_per_node)
        for rank, node in enumerate(chosen)
    ]
    for machine, node in zip(machines, chosen):
        has = devices_of(node, resource)
        if has < config.num_gpus_per_node:
            raise UserError(
                f"cluster.num_gpus_per_node is {config.num_gpus_per_node}, but node {machine.rank} ({machine.host}) has {has} "
                f"{NAMES[resource]}: lower the key, or start the node with more (ray_utils/start_ray.sh)"
            )
    return machines


def choose(nodes: list[dict[str, Any]], config: ClusterConfig, resource: str, private: bool) -> list[dict[str, Any]] | None:
    """The nodes of the run, or None while others may still come.

    A node without a rank and with too few devices, such as a head node to which KubeRay gives no GPU, is passed over when enough other
    nodes are there. While a node has no devices at all, they may still come; a node that has some, but too few, will not get more.
    """
    fit = [n for n in nodes if RANK_LABEL in n["Labels"] or devices_of(n, resource) >= config.num_gpus_per_node]
    some = [n for n in nodes if RANK_LABEL in n["Labels"] or devices_of(n, resource) > 0 or private]
    found = fit if len(fit) >= config.num_nodes else some
    return found[: config.num_nodes] if len(found) >= config.num_nodes else None


def devices_of(node: dict[str, Any], resource: str) -> int:
    """How many of a resource (`GPU` or `CPU`) Ray counts on a node."""
    return int(node["Resources"].get(resource, 0))


def alive_nodes() -> list[dict[str, Any]]:
    """Nodes that answer, in the order of their exported ranks; those without a rank follow, the head first, then by address."""
    nodes = [n for n in ray.nodes() if n["Alive"] and listens(f"{n['NodeManagerAddress']}:{n['NodeManagerPort']}")]
    ranks = [int(n["Labels"][RANK_LABEL]) for n in nodes if RANK_LABEL in n["Labels"]]
    twice = [rank for rank, count in Counter(ranks).items() if count > 1]
    if twice:
        raise UserError(f"two nodes of the Ray cluster were started with RANK={twice[0]}: give every node its own RANK, from 0")
    return sorted(
        nodes,
        key=lambda n: (
            int(n["Labels"].get(RANK_LABEL, 1 << 30)),
            "node:__internal_head__" not in n["Resources"],
            n["NodeManagerAddress"],
            n["NodeID"],
        ),
    )


def missing_message(nodes: list[dict[str, Any]], config: ClusterConfig, resource: str) -> str:
    ranks = [int(n["Labels"][RANK_LABEL]) for n in nodes if RANK_LABEL in n["Labels"]]
    absent = sorted(set(range(config.num_nodes)) - set(ranks))
    present = ", ".join(
        f"{n['NodeManagerAddress']} (rank {n['Labels'].get(RANK_LABEL, 'not given')}, {devices_of(n, resource)} {NAMES[resource]})"
        for n in nodes
    )
    named = f" No node has rank {', '.join(map(str, absent))}." if len(ranks) == len(nodes) else ""
    able = f", not all with {NAMES[resource]}" if len(nodes) >= config.num_nodes else ""
    return (
        f"cluster.num_nodes is {config.num_nodes}, but after cluster.start_timeout = {config.start_timeout} s only {len(nodes)} are up"
        f"{able}: {present}.{named} Run ray_utils/start_ray.sh on the others, or lower cluster.num_nodes"
    )
