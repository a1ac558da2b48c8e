"""A stuck close ends the process, with the exit code that its reason asks for."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

PROGRAM = """
import time
from rlinf.cluster.health import at_most
try:
    {reason}
finally:
    with at_most({limit}, "closing"):
        time.sleep({seconds})
    print("closed")
"""


@pytest.mark.parametrize(("reason", "code"), [("raise KeyboardInterrupt", 130), ("raise ValueError", 1), ("pass", 1)])
def test_a_close_that_takes_too_long_ends_the_process(reason: str, code: int) -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(reason=reason, limit=0.2, seconds=60)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "") and time.monotonic() - started < 30
    assert done.stderr == "closing took longer than 0.2 s; ending the process.\n"


def test_a_close_in_time_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(reason="pass", limit=30, seconds=0)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")
