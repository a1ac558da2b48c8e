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

from rlinf.cluster.machines import RANK_LABEL, alive_nodes, devices_of
from rlinf.cluster.ray_session import RaySession
from rlinf.errors import UserError


def gpus_or_slots(node: dict[str, Any]) -> int:
    """The number of GPUs, or of CPU slots on a node without GPUs, since it is not known here which of them a run will use."""
    return devices_of(node, "GPU") or devices_of(node, "CPU")


def describe(node: dict[str, Any]) -> str:
    return f"node {node['Labels'].get(RANK_LABEL, '?')} ({node['NodeManagerAddress']})"


def absent(wanted: int) -> str:
    """Dead nodes, and ranks that should be there but are not; how many there should be follows from the devices of the first node."""
    alive = alive_nodes()
    ranks = {int(n["Labels"][RANK_LABEL]) for n in ray.nodes() if RANK_LABEL in n["Labels"]}
    answering = {n["Labels"].get(RANK_LABEL) for n in alive}
    parts = sorted({f"{describe(n)} is dead" for n in ray.nodes() if n["Labels"].get(RANK_LABEL) not in answering})
    each = gpus_or_slots(alive[0]) if alive else 0
    expected = range(max(-(-wanted // each) if each else 0, max(ranks, default=0) + 1))
    missing = [str(rank) for rank in expected if rank not in ranks]
    return "; ".join(parts + ([f"no node has RANK {', '.join(missing)}"] if missing else []))


def wait_for_devices(wanted: int, timeout: float) -> bool:
    """Wait until at least `wanted` devices are alive, and return whether they are; prints changes meanwhile."""
    deadline, shown = time.monotonic() + timeout, ""
    while True:
        alive = alive_nodes()
        there = sum(map(gpus_or_slots, alive))
        line = f"{there} of {wanted} devices on {len(alive)} nodes"
        if there >= wanted:
            say(line + ": " + ", ".join(f"{describe(n)} {gpus_or_slots(n)}" for n in alive))
            return True
        line += f"; {absent(wanted)}"
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
    parser = argparse.ArgumentParser(prog="check_ray.sh", description="Wait until N devices (GPUs, or slots of CPU nodes) are alive.")
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
