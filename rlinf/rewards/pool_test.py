import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlinf.rewards.verifier import Item, Verifier

HOSTILE = "9^{9^{9^{9}}}"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(num_processes=2, timeout=1.0) as v:
        yield v


def symbolic(i: int) -> Item:
    return Item(f"\\boxed{{\\sqrt{{{i * i * 3}}}}}", (f"\\boxed{{{i}\\sqrt{{3}}}}",))


def test_survives_kill_minus_nine(verifier: Verifier) -> None:
    assert verifier.verify(*symbolic(2)[:2]).reward == 5.0
    for pid in verifier._pool.worker_pids():
        os.kill(pid, signal.SIGKILL)
    assert [v.status.value for v in verifier.verify_many([symbolic(i) for i in range(3, 9)])] == ["right"] * 6


def test_children_die_with_a_killed_parent() -> None:
    code = "import time\nfrom rlinf.rewards.verifier import Verifier\nv = Verifier()\nv.verify('\\\\boxed{\\\\sqrt{12}}', ['2\\\\sqrt{3}'])\nprint(v._pool.worker_pids(), flush=True)\ntime.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    pids = [int(p) for p in parent.stdout.readline().strip("[]\n").split(",")]
    assert pids
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{p}").exists() for p in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{p}").exists() for p in pids)


def test_close_reaps_every_child_and_thread() -> None:
    v = Verifier(num_processes=2)
    v.verify(*symbolic(2)[:2])
    pids = v._pool.worker_pids()
    v.close()
    assert pids and not any(Path(f"/proc/{p}").exists() for p in pids)
    assert not [t for t in threading.enumerate() if t.name.startswith("rlinf-keeper") and t.is_alive() and t in v.__dict__.values()]
