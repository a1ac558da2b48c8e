"""What a node remembers of the Ray that start_ray.sh started on it, addresses, and environment variables with numbers. Imports nothing
heavy."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from rlinf.errors import UserError

LABEL = r"[A-Za-z0-9_-]{1,63}"
ADDRESS = re.compile(rf"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>{LABEL}(?:\.{LABEL})*\.?))(?::(?P<port>[^:]*))?")
RANK_LABEL, GPUS_LABEL = "rlinf-node-rank", "rlinf-node-gpus"  # of a node of start_ray.sh: its RANK; the number of its GPUs
STORE_BYTES = "RLINF_OBJECT_STORE_BYTES"
STORE_REMEDY = (
    "Give /dev/shm more room (in a container --shm-size=256g or --ipc=host, in Kubernetes an emptyDir with medium: Memory), or ask for "
    f"less: export {STORE_BYTES}"
)


def state_folder() -> Path:
    """The folder with the files `address` and `token` (of the cluster), `mark` and `rank` (of this node)."""
    return Path(os.environ.get("RLINF_RAY_STATE") or f"/tmp/rlinf-ray-{os.getuid()}")


def token_variables(token: Path) -> dict[str, str | None]:
    """Variables with which Ray takes its token from a file and from nowhere else; None = not set. An inherited RAY_AUTH_TOKEN would go
    before the file."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_TOKEN": None}


def environment_with(variables: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment with these variables; None removes one."""
    return {name: value for name, value in (os.environ | variables).items() if value is not None}


def split_address(text: str, source: str, port: int) -> tuple[str, int]:
    """Host and port of `host`, `host:port`, `[IPv6]` or `[IPv6]:port`. port: where none is given. Raises UserError that names `source`,
    where the text comes from."""
    match = ADDRESS.fullmatch(text)
    if match is None:
        raise UserError(f"{source}: {text!r} is no address; give host:port, and IPv6 in brackets, such as [fd00::2]:6379")
    given = match["port"]
    return match["ipv6"] or match["name"], port if given is None else port_number(given, f"{source} {text}")


def bracketed(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host


def join_address(host: str, port: int) -> str:
    return f"{bracketed(host)}:{port}"


def silence(address: str) -> str | None:
    """Why nothing accepts connections at host:port, or None when something does."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3.0):
            return None
    except socket.gaierror as error:
        return f"the name {host} is not known here ({error.strerror})"
    except OSError as error:
        return f"nothing answers at {address} ({error.strerror or error})"


def listens(address: str) -> bool:
    """Whether something accepts connections at host:port."""
    return silence(address) is None


def default_port() -> int:
    return port_number(os.environ.get("RLINF_RAY_PORT") or "6379", "RLINF_RAY_PORT")


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
