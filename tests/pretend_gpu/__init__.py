"""GPUs where there are none: processes whose torch has a device `cuda` that is the host's memory and the CPU's kernels.

What goes wrong on a first GPU is mostly not arithmetic: a tensor made on the wrong device, a copy that nobody waited for, memory that is
not given back, a group of processes that refuses the host's tensors. The pretend GPU is strict about these (device.cpp, torch_cuda.py), and
a process under `environment()` takes every path of rlinf that a GPU takes, Megatron-core unchanged. It says nothing of speed, of CUDA's
kernels and their rounding, or of NCCL, for which gloo stands in.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = Path(os.environ.get("RLINF_CACHE", Path.home() / ".cache" / "rlinf")) / "pretend-gpu"


IMPOSSIBLE = None if "+cpu" in version("torch") else "the pretend GPU takes the place of CUDA in a torch without it"


def library() -> Path:
    """The compiled device; made once for a torch and a source. Takes about 20 seconds."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    source = HERE / "device.cpp"
    made_of = source.read_bytes() + (torch / "version.py").read_bytes()
    made = CACHE / f"{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        include = torch / "include"
        subprocess.run(
            ["g++", "-O1", "-w", "-shared", "-fPIC", "-std=c++20", f"-I{include}", f"-I{include}/torch/csrc/api/include", str(source),
             "-o", str(unfinished), f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"],
            check=True,
        )  # fmt: skip
        unfinished.rename(made)
    return made


def transformer_engine() -> Path:
    """Transformer Engine's own Python, of the version that is pinned for GPUs, from the package index; its kernels: extension/."""
    pins = (ROOT / "requirements/gpu.txt").read_text()
    pinned = re.search(r"^transformer-engine\S*==(\S+)", pins, re.M)[1]
    folder = CACHE / f"transformer-engine-{pinned}"
    if not folder.exists():
        unfinished = folder.with_suffix(f".{os.getpid()}")
        packages = [f"transformer-engine=={pinned}", "einops"]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(unfinished), *packages], check=True)
        unfinished.rename(folder)
    return folder


def environment(gpus: int = 1, with_transformer_engine: bool = False) -> dict[str, str]:
    """Of a process, and of those that it starts. gpus: how many the machine has, each of 16 GiB; a process sees one."""
    layers = [str(HERE / "extension"), str(transformer_engine())] if with_transformer_engine else []
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}  # tests/run.sh hides GPUs
    return inherited | {
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), str(ROOT), *layers]),
        "NVTE_PROJECT_BUILDING": "1",  # it is not to look for CUDA's libraries
        "RLINF_PRETEND_GPU": str(library()),
        "RLINF_PRETEND_GPUS": str(gpus),
        "TORCHDYNAMO_DISABLE": "1",  # there is no compiler for it
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
