"""Becomes the SGLang server, in the interpreter that has SGLang: sglang_launch.py PARENT_PID CONFIG_FILE

The server must not outlive its worker, so the kernel is asked to kill it with its parent before anything else happens.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, config = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)  # it died before the call above
    os.execv(sys.executable, [sys.executable, "-m", "sglang.launch_server", "--config", config])
