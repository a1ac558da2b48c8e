"""Starts the SGLang server in place of this process, in the interpreter that has SGLang: sglang_launch.py PARENT_PID CONFIG_FILE

The server must not outlive its worker, so this first asks the kernel to kill it when its parent dies.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
MEMORY_SAVER = "enable-memory-saver: true"


def runtimes_of_wheels(folders: list[str]) -> list[str]:
    """Where wheels of CUDA keep a runtime that the loader does not find by itself. `folders`: where packages are."""
    found = []
    for path in (path for folder in folders for path in sorted(Path(folder).glob("nvidia/*/lib/libcudart.so.*"))):
        try:
            ctypes.CDLL(path.name)
        except OSError:
            found.append(str(path.parent))
    return found


def show_runtime_to_loader() -> None:
    """SGLang's memory saver is preloaded into the schedulers, and wants the runtime before there is a torch that knows where it is: a
    scheduler would end with "error while loading shared libraries"."""
    known = os.environ.get("LD_LIBRARY_PATH")
    places = [*([known] if known else []), *runtimes_of_wheels(sys.path)]
    if places:
        os.environ["LD_LIBRARY_PATH"] = ":".join(places)


if __name__ == "__main__":
    parent, config = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)  # the parent died before the call above
    if MEMORY_SAVER in Path(config).read_text():
        show_runtime_to_loader()
    os.execv(sys.executable, [sys.executable, "-m", "sglang.launch_server", "--config", config])
