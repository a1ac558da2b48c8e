"""What a node remembers of the Ray that start_ray.sh started on it, and two questions about this machine. Imports nothing heavy."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def state_folder() -> Path:
    """Files `address` and `token` (of the cluster), `mark` and `rank` (of this node)."""
    return Path(os.environ.get("RLINF_RAY_STATE") or f"/tmp/rlinf-ray-{os.getuid()}")


def listens(address: str) -> bool:
    """Whether something accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(3.0)
        return probe.connect_ex((host, int(port))) == 0


def object_store_bytes() -> int:
    """5 % of the memory, between 512 MiB and 64 GiB; only what is used is ever touched."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(512 << 20, min(64 << 30, memory // 20))
