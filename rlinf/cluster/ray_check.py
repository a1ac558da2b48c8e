"""Waits until a Ray cluster has enough devices, and prints which nodes are there, dead or missing. ray_utils/check_ray.sh runs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from rlinf.cluster.machines import NAMES, alive_nodes, devices_of
from rlinf.cluster.ray_session import RaySession
from rlinf.cluster.state import GPUS_LABEL, RANK_LABEL
from rlinf.errors import UserError


def counted(nodes: list[dict[str, Any]]) -> str:
    """The resource that counts as a device: GPUs when a node, dead or alive, has or had one; otherwise CPU slots. Never both: a run uses
    one kind, and the slots of a node that came without its GPUs would pass for them. Ray forgets what a dead node had, but not its labels.
    """
    return "GPU" if any(devices_of(node, "GPU") or int(node["Labels"].get(GPUS_LABEL, 0)) for node in nodes) else "CPU"


def describe(node: dict[str, Any]) -> str:
    rank = node["Labels"].get(RANK_LABEL)
    return f"a node without RANK ({node['NodeManagerAddress']})" if rank is None else f"node {rank} ({node['NodeManagerAddress']})"


def identity(node: dict[str, Any]) -> str:
    """What a node has in common with the one that takes its place: its rank, or else its address."""
    return node["Labels"].get(RANK_LABEL) or node["NodeManagerAddress"]


def absent(wanted: int, nodes: list[dict[str, Any]], alive: list[dict[str, Any]]) -> list[str]:
    """Dead nodes, nodes that came without devices, and ranks that should be there but are not; how many there should be follows from the
    devices of the first node that has any. nodes: all that Ray has ever counted."""
    resource = counted(nodes)
    answering = {identity(node) for node in alive}
    dead = sorted({f"{describe(node)} is dead" for node in nodes if identity(node) not in answering})
    without = [f"{describe(node)} has no {resource} and does not count" for node in alive if not devices_of(node, resource)]
    each = next((devices_of(node, resource) for node in alive if devices_of(node, resource)), 0)
    ranks = {int(node["Labels"][RANK_LABEL]) for node in nodes if RANK_LABEL in node["Labels"]}
    expected = range(max(-(-wanted // each) if each else 0, max(ranks, default=0) + 1))
    missing = [str(rank) for rank in expected if rank not in ranks] if ranks else []  # KubeRay's nodes have none
    return dead + without + ([f"no node has RANK {', '.join(missing)}"] if missing else [])


def wait_for_devices(wanted: int, timeout: float) -> bool:
    """Wait until at least `wanted` devices are alive, and return whether they are; prints changes meanwhile."""
    deadline, shown = time.monotonic() + timeout, ""
    while True:
        nodes, alive = ray.nodes(), alive_nodes()
        resource = counted(nodes)
        there = sum(devices_of(node, resource) for node in alive)
        line = f"{there} of {wanted} {NAMES[resource]} on {len(alive)} nodes"
        if there >= wanted:
            say(line + ": " + ", ".join(f"{describe(node)} {devices_of(node, resource)}" for node in alive))
            return True
        line = "; ".join([line, *absent(wanted, nodes, alive)])
        if line != shown:
            say(line)
            shown = line
        if time.monotonic() > deadline:
            say(f"gave up after {timeout:g} s: {line}")
            return False
        time.sleep(1.0)


def say(line: str) -> None:
    sys.stderr.write(f"check_ray: {line}\n")
    sys.stderr.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="check_ray.sh", description="Wait until N devices (GPUs, or CPU slots without any) are alive.")
    parser.add_argument("devices", type=int, metavar="N")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds to wait (default 600)")
    options = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        session = RaySession(f"check-{os.getpid()}", Path(folder))
        try:
            if not session.join():
                raise UserError("no Ray cluster is up here: run start_ray.sh first")
            return 0 if wait_for_devices(options.devices, options.timeout) else 1
        except UserError as error:
            say(str(error))
            return 2
        finally:
            session.close(keep_logs=False)


if __name__ == "__main__":
    sys.exit(main())
