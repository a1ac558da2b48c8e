"""What a node remembers of the Ray that start_ray.sh started on it, and environment variables with numbers. Imports nothing heavy."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from rlinf.errors import UserError

STORE_BYTES = "RLINF_OBJECT_STORE_BYTES"
STORE_REMEDY = (
    "Give /dev/shm more room (in a container --shm-size=256g or --ipc=host, in Kubernetes an emptyDir with medium: Memory), or ask for "
    f"less: export {STORE_BYTES}"
)


def state_folder() -> Path:
    """The folder with the files `address` and `token` (of the cluster), `mark` and `rank` (of this node)."""
    return Path(os.environ.get("RLINF_RAY_STATE") or f"/tmp/rlinf-ray-{os.getuid()}")


def listens(address: str) -> bool:
    """Whether something accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(3.0)
        return probe.connect_ex((host, int(port))) == 0


def whole_number(name: str, of: str) -> int | None:
    """The number in an environment variable; None when it is not set or empty. Raises UserError when it is not a whole number."""
    given = os.environ.get(name, "")
    if given and not (given.isascii() and given.isdecimal()):
        raise UserError(f"{name} is {given!r}: give a whole number of {of}, or unset it")
    return int(given) if given else None


def port_number(text: str, source: str) -> int:
    """The port in a text. Raises UserError that names `source`, where the text comes from."""
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 65536):
        raise UserError(f"{source}: {text!r} is no port; give a number from 1 to 65535, such as 6379")
    return int(text)


def object_store_bytes(shm: Path = Path("/dev/shm")) -> int:
    """RLINF_OBJECT_STORE_BYTES, or else 5 % of the memory, between 512 MiB and 64 GiB. Memory that is not used is never touched.

    At most 0.4 of what is free in /dev/shm, where the store is: weights on their way to the engines need the rest, and Ray does not start a
    store above 10 GB that does not fit there.
    """
    given = whole_number(STORE_BYTES, "bytes, such as 68719476736")
    if given is not None:
        return given
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(512 << 20, min(64 << 30, memory // 20, shutil.disk_usage(shm).free * 2 // 5))
