"""The settings under which both sides of a benchmark run, and the description of the machine that a result keeps."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from rlinf.cluster.host import process_environment
from rlinf.cluster.processes import RUN_ID


def worker_environment() -> dict[str, str]:
    """What a worker of a run has in its environment from its start: allocator, OpenMP, no hub."""
    return {name: value for name, value in process_environment("").items() if name != RUN_ID}


def restart_as_worker() -> None:
    """Start this program again with the settings of a worker, which the C library reads at its start; returns when it has them."""
    wanted = worker_environment()
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


def machine(threads: int) -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": threads, "load_average": os.getloadavg(), "python": platform.python_version(),
        "torch": torch.__version__,
        "environment": {name: value for name, value in worker_environment().items() if name.startswith(("OMP", "GOMP", "GLIBC", "MALLOC"))},
    }  # fmt: skip
