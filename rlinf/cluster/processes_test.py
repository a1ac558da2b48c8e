from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlinf.cluster.processes import RUN_ID, end_run, marked, new_run_id, start_time

ROOT = Path(__file__).resolve().parent.parent.parent
SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


def spawn(run_id: str, command: list[str] = SLEEP) -> subprocess.Popen:
    return subprocess.Popen(command, env={RUN_ID: run_id})


def gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while start_time(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    return start_time(pid) is None


def test_only_processes_of_the_run_are_ended() -> None:
    run_id = new_run_id()
    ours, other = spawn(run_id), spawn(run_id + "x")
    assert marked(run_id) == [ours.pid]
    assert end_run(run_id) == []
    assert ours.wait() == -signal.SIGTERM
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_descendant_without_the_mark_is_ended_too() -> None:
    run_id = new_run_id()
    parent = spawn(run_id, ["env", "-i", sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    shell = spawn(run_id, ["sh", "-c", "env -i sleep 61 & wait"])
    time.sleep(0.3)
    assert parent.pid not in marked(run_id)  # it threw the mark away, and its parent is this test
    assert len(marked(run_id)) == 2
    end_run(run_id)
    shell.wait()
    assert marked(run_id) == []
    parent.kill()
    parent.wait()


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    run_id = new_run_id()
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    stubborn = spawn(run_id, [sys.executable, "-S", "-c", code])
    time.sleep(0.3)
    assert end_run(run_id, grace=0.3) == []
    assert stubborn.wait() == -signal.SIGKILL


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen(["true"])
    time.sleep(0.2)
    assert start_time(child.pid) is None
    child.wait()
    assert start_time(os.getpid()) is not None


WATCHED = "import sys; from pathlib import Path; from rlinf.cluster.processes import *; {}; print(flush=True); time.sleep(60)"


def speaking(program: str, run_id: str) -> subprocess.Popen:
    """A process that carries the run's mark and has done what it was asked for."""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, env=os.environ | {RUN_ID: run_id}, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    return process


def test_the_sentinel_ends_the_run_when_the_driver_dies(tmp_path: Path) -> None:
    run_id, folder = new_run_id(), tmp_path / "ray"
    folder.mkdir()
    worker = spawn(run_id)
    driver = speaking(WATCHED.format(f"start_sentinel('{run_id}', (Path('{folder}'),))"), run_id)
    segment = Path("/dev/shm") / f"rlinf-{run_id}-v1-0"
    segment.touch()
    time.sleep(0.3)
    assert worker.poll() is None
    driver.kill()
    driver.wait()
    worker.wait(timeout=10)
    deadline = time.monotonic() + 10
    while folder.exists() or segment.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_nodes_sentinel_waits_for_its_last_worker() -> None:
    """An engine that dies is started anew; the sentinel that it had started must not end the node's other workers."""
    run_id = new_run_id()
    other, first = spawn(run_id), speaking(WATCHED.format(f"start_node_sentinel('{run_id}')"), run_id)  # this test is their raylet
    left = subprocess.Popen(
        ["sh", "-c", f"{RUN_ID}={run_id} setsid {sys.executable} -S -c 'import time; time.sleep(60)' & echo $!"], stdout=subprocess.PIPE
    )
    orphan = int(left.stdout.readline())
    left.wait()
    first.kill()
    first.wait()
    time.sleep(1.5)
    assert other.poll() is None and start_time(orphan) is not None
    other.kill()
    other.wait()
    assert gone(orphan, 10)


def test_what_was_started_later_can_be_spared() -> None:
    run_id = new_run_id()
    early = spawn(run_id)
    time.sleep(0.05)
    late = spawn(run_id)
    assert end_run(run_id, by=start_time(early.pid)) == []
    assert early.wait() == -signal.SIGTERM and late.poll() is None
    late.kill()
    late.wait()


def test_a_child_dies_with_its_parent() -> None:
    code = (
        "import os, subprocess, sys; from rlinf.cluster.processes import die_with_parent; me = os.getpid();"
        "child = subprocess.Popen(['sleep', '60'], preexec_fn=lambda: die_with_parent(me));"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert start_time(child) is not None
    parent.kill()
    parent.wait()
    assert gone(child, 5)


def test_sigterm_stops_also_what_ignores_ctrl_c() -> None:
    """A script's background jobs have SIGINT ignored."""
    program = "import time, signal; from rlinf.cluster.processes import terminate_as_interrupt as t; t(); print(flush=True); time.sleep(60)"
    for ignored in (True, False):
        child = subprocess.Popen(
            [sys.executable, "-c", ("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);" if ignored else "") + program],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        child.stdout.readline()
        child.terminate()
        _, errors = child.communicate(timeout=20)
        assert child.returncode != 0 and errors.rstrip().endswith("KeyboardInterrupt")
