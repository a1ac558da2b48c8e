"""Checks of the Python version and of what SGLang and the cluster need besides Python packages: glibc, compilers, the GPU driver, proxies,
file locks."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlinf.checks.finding import FAIL, OK, WARN, Finding

PYTHONS = ((3, 10), (3, 13))  # the oldest and the newest with wheels of SGLang and of Megatron-core
GLIBC = (2, 34)  # of SGLang's wheels
DRIVER = Path("/proc/driver/nvidia/version")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOOPBACK = ("127.0.0.1", "localhost")


def python(version: tuple[int, int], cuda: bool) -> Finding:
    text = ".".join(map(str, version))
    if version < PYTHONS[0]:
        return Finding("python", FAIL, text, "use Python 3.10 or newer")
    if cuda and version > PYTHONS[1]:
        remedy = "make the environment with an older one: PYTHON=python3.12 bash toolkits/setup/venv.sh"
        return Finding("python", WARN, f"{text}, for which SGLang and Megatron-core have no wheels", remedy)
    return Finding("python", OK, text)


def glibc(version: str) -> Finding:
    """Check the C library of a machine with a GPU. version: as os.confstr gives it, `glibc 2.39`."""
    found = re.search(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < GLIBC:
        return Finding("glibc", WARN, f"{found[0]}; SGLang's wheels need 2.34", "use a newer system (Ubuntu 22.04, RHEL 9), or the image")
    return Finding("glibc", OK, found[0] if found else version)


def compilers(environment: Mapping[str, str], needed: bool) -> Iterator[Finding]:
    """Look for nvcc and a C++ compiler where SGLang 0.5.21 looks for them: it compiles rotary embeddings, norms and the key-value cache at
    their first use (sglang/kernels/jit/utils/compile/toolchain.py). needed: whether SGLang is the engine of the run."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    nvcc = Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    found = nvcc if nvcc.is_file() else Path(on_path) if on_path and not home else None
    bad = FAIL if needed else WARN
    why = "SGLang compiles kernels at their first use"
    if found:
        yield Finding("nvcc", OK, str(found))
    else:
        text = f"CUDA_HOME is {home}, where there is no bin/nvcc" if home else "neither on the PATH nor in /usr/local/cuda"
        yield Finding(
            "nvcc", bad, f"{text}; {why}", "install the CUDA toolkit and set CUDA_HOME to its folder, or use the image (docker/README.md)"
        )
    cxx = environment.get("CXX") or "c++"
    if compiler := shutil.which(cxx, path=environment.get("PATH", "")):
        yield Finding("c++", OK, compiler)
    else:
        yield Finding("c++", bad, f"there is no {cxx}; {why}", "install g++ (apt install g++), or set CXX to the C++ compiler")


def triton(lacking: str | None, needed: bool) -> Finding:
    """lacking: hardware.triton_lacks(). needed: SGLang is the engine of the run."""
    if lacking is None:
        return Finding("triton", OK, "finds a C compiler and Python's headers")
    text = f"finds no {lacking}: SGLang's kernels do not start; the actor does without Transformer Engine's layers and kernels of its own"
    remedy = "install gcc and this Python's headers (apt install gcc python3-dev), or use the image (docker/README.md)"
    return Finding("triton", FAIL if needed else WARN, text, remedy)


def driver_version(file: Path = DRIVER) -> str | None:
    """The version of both kinds of kernel module: `... Kernel Module  570.86.15 ...`, `... Open Kernel Module for x86_64  580.65.06
    ...`."""
    found = re.search(r"Kernel Module\b.*?\s(\d{3,}\.[\d.]+)", file.read_text()) if file.exists() else None
    return found[1] if found else None


def proxies(environment: Mapping[str, str]) -> Finding:
    """Check the proxy variables: SGLang calls its own server over loopback, with a client that obeys them."""
    lower = {name.lower(): value for name, value in environment.items() if value}
    named = [name for name in PROXIES if name in lower]
    left_out = {host.strip() for host in lower.get("no_proxy", "").split(",")}
    if named and "*" not in left_out and not left_out.issuperset(LOOPBACK):
        text = f"{' and '.join(named)} also for this machine itself: no_proxy lacks {' or '.join(h for h in LOOPBACK if h not in left_out)}"
        return Finding("proxy", WARN, text, 'export no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}" on every node, before Ray starts')
    return Finding("proxy", OK, f"{' and '.join(named)}, not for this machine" if named else "none is set")


def locks(folder: Path) -> Finding:
    """Check that files can be locked: a run locks its folder, so that no other run writes there."""
    if not os.access(folder, os.W_OK | os.X_OK):  # which writable() says
        return Finding("file locks", OK, "not tried")
    with tempfile.NamedTemporaryFile(prefix=".rlinf-doctor-", dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = f"the file system of {folder} has none ({error.strerror}), and a run locks its folder"
            return Finding("file locks", FAIL, text, "mount it with -o flock (Lustre), or set runner.output_dir on another file system")
    return Finding("file locks", OK, f"{folder} has them")
