"""What this machine has and allows, from files and the kernel, without asking a library or starting anything."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import shutil
import socket
import struct
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from rlinf.errors import RunFailed

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"  # the variable that says which GPUs a process sees; CUDA reads it once
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # x86's and ARM's words for instructions that multiply bf16 numbers
PORTS = range(20000, 32000)  # below the kernel's ephemeral ports, where any outgoing connection could take one
MEETING_PORTS = PORTS[:4000]  # for what one asks for here and another binds a moment later; the rest is dealt out in slices
SLICE, SLICES = 500, 16
EVERYWHERE = ""  # as an address: all that this machine has
SIOCGIFADDR = 0x8915  # Linux's request for the address of an interface
OPEN_FILES = 1 << 20


def has_gpu() -> bool:
    """Whether this machine has a CUDA device that this process may see."""
    hidden = os.environ.get(VISIBLE_GPUS) in ("", "-1")
    return not hidden and Path("/dev/nvidiactl").exists() and any(Path("/dev").glob("nvidia[0-9]*"))


def cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many cores this process may use, by its affinity and the quota of its control group."""
    count = len(os.sched_getaffinity(0))
    if quota_file.exists():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


def triton_lacks(environment: Mapping[str, str] = os.environ, headers: Path | None = None) -> str | None:
    """What Triton, and torch.compile with it, wants on a machine with a GPU and does not find; None = nothing. It compiles a C module
    before it starts its first kernel: with CC, clang or gcc, and the headers of this Python."""
    path = environment.get("PATH", "")
    if not (environment.get("CC") or shutil.which("clang", path=path) or shutil.which("gcc", path=path)):
        return "C compiler (gcc, clang or CC)"
    scheme = sysconfig.get_default_scheme()
    headers = headers or Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))
    return None if (headers / "Python.h").is_file() else f"{headers}/Python.h"


def ports_of(local_rank: int) -> range:
    """The range of ports of one server of this node, by its number on the node. Servers that start together look for a free port long
    before they bind it; with a range each, they do not choose the same."""
    first = len(MEETING_PORTS) + local_rank % SLICES * SLICE
    return PORTS[first : first + SLICE]


def free_port(host: str, among: range = MEETING_PORTS) -> int:
    """A port that a server can bind now at `host`, an address of this machine. Raises RunFailed when there is none."""
    for port in random.SystemRandom().sample(among, min(len(among), 100)):
        if _can_bind(host, port):
            return port
    where = f"{host or 'this machine'} between {among.start} and {among.stop - 1}"
    raise RunFailed(f"no port of {where} is free: `ss -tlnp` shows who listens there; end what is left of other runs, and start again")


def _can_bind(host: str, port: int) -> bool:
    """Tries it by binding: a port may be taken although nothing answers there, as long as a server has bound it and does not serve yet."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and host != EVERYWHERE:  # by address translation it is another of this machine's
                return _can_bind(EVERYWHERE, port)
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface. Raises OSError where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()))[20:24])


def allow_open_files() -> None:
    """Raise the soft limit of open files, 1024 in most shells, to the hard one: a rank has sockets to all others, and a file for each
    shared tensor. At most to a million: where the hard limit is a billion, a program that closes every file that it might have open
    takes minutes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@cache  # each matrix of a weight sync asks
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Names of the CPU's instruction sets in Linux's spelling; empty on other systems."""
    if not cpuinfo.exists():
        return frozenset()
    lines = cpuinfo.read_text().splitlines()
    return frozenset(flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split())


def cpu_multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for products of bf16 numbers. One without takes three times as long for them as for fp32."""
    return not BF16_FLAGS.isdisjoint(cpu_flags(cpuinfo))


def fast_precision(device: str) -> str:
    """`bf16` where products of it are fast, else `fp32`. device: `cuda`, `cpu` or `auto` (cuda where this machine has a GPU)."""
    cuda = has_gpu() if device == "auto" else device == "cuda"
    return "bf16" if cuda or cpu_multiplies_bf16() else "fp32"
