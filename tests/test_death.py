"""Whoever dies, the run ends within 30 seconds, says who and when, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlinf.cluster.processes import end_run, marked, new_run_id

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 30.0


@dataclass
class Run:
    process: subprocess.Popen
    run_id: str
    logs: Path
    temp: Path
    pids: dict

    def ray_process(self, name: str) -> int:
        """The pid of this run's raylet or gcs_server."""
        return next(pid for pid in marked(self.run_id) if Path(f"/proc/{pid}/exe").resolve().name == name)

    def end(self) -> tuple[int, str, float]:
        """Exit code, stderr and the seconds until the driver and everything that carries the run id was gone."""
        started = time.monotonic()
        _, errors = self.process.communicate(timeout=LIMIT)
        while marked(self.run_id):
            assert time.monotonic() - started < LIMIT, [Path(f"/proc/{p}/cmdline").read_bytes() for p in marked(self.run_id)]
            time.sleep(0.1)
        return self.process.returncode, errors, time.monotonic() - started


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    run_id, temp = new_run_id(), Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # short: Ray's sockets live below it
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-m", "tests.cluster_driver", str(tmp_path), run_id, request.param]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(temp), "HOME": str(home)},
    )
    line = process.stdout.readline()
    try:
        assert line, process.communicate()[1]
        yield Run(process, run_id, tmp_path, temp, json.loads(line))
    finally:
        process.kill()
        end_run(run_id)
    deadline = time.monotonic() + 5
    while any(temp.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(temp.iterdir()) == []
    temp.rmdir()
    assert list(home.iterdir()) == []  # no token that would later lock other nodes out
    assert list(Path("/dev/shm").glob(f"*{run_id}*")) == []


@pytest.mark.parametrize("run", ["busy"], indirect=True)
def test_a_killed_worker_ends_the_run_and_is_named(run: Run) -> None:
    os.kill(run.pids["actor"][1], signal.SIGKILL)
    code, errors, seconds = run.end()
    assert code == 1 and seconds < 15
    who = f"actor rank 1 (node 0, pid {run.pids['actor'][1]})"
    assert errors.startswith(f"{who} died (phase: training; running: sleep): the process was killed")
    assert f"Its log: {run.logs / 'actor-1.log'}" in errors


@pytest.mark.slow
@pytest.mark.parametrize("run", ["idle"], indirect=True)
def test_a_worker_that_dies_while_nobody_calls_it_ends_the_run(run: Run) -> None:
    os.kill(run.pids["rollout"], signal.SIGSEGV)
    code, errors, seconds = run.end()
    assert code == 1 and seconds < 15
    who = f"rollout rank 0 (node 0, pid {run.pids['rollout']})"
    assert errors.startswith(f"{who} died (phase: training; running: nothing): Fatal Python error: Segmentation fault")


@pytest.mark.slow
@pytest.mark.parametrize("run", ["busy", "idle"], indirect=True)
def test_a_killed_raylet_ends_the_run_and_is_named(run: Run) -> None:
    os.kill(run.ray_process("raylet"), signal.SIGKILL)
    code, errors, seconds = run.end()
    assert code == 1 and seconds < LIMIT
    assert errors.startswith("the raylet of node 0 is dead") and "(phase: training)" in errors.splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["busy"], indirect=True)
def test_a_killed_control_store_ends_the_run_and_is_named(run: Run) -> None:
    os.kill(run.ray_process("gcs_server"), signal.SIGKILL)
    code, errors, seconds = run.end()
    assert code == 1 and seconds < LIMIT
    assert errors.startswith("Ray's control store (GCS) is dead")


@pytest.mark.slow
@pytest.mark.parametrize("run", ["busy"], indirect=True)
def test_when_the_driver_is_killed_everything_ends(run: Run) -> None:
    (Path("/dev/shm") / f"rlinf-{run.run_id}-v1-0").touch()
    os.kill(run.process.pid, signal.SIGKILL)
    code, _, seconds = run.end()
    assert code == -signal.SIGKILL and seconds < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("run", ["idle"], indirect=True)
def test_an_interrupt_from_the_terminal_is_a_clean_stop(run: Run) -> None:
    os.killpg(run.process.pid, signal.SIGINT)
    code, errors, seconds = run.end()
    assert (code, errors) == (130, "") and seconds < 15
    assert "closed politely" in (run.logs / "actor-0.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("run", ["idle"], indirect=True)
def test_a_terminated_driver_stops_cleanly(run: Run) -> None:
    os.kill(run.process.pid, signal.SIGTERM)
    code, errors, seconds = run.end()
    assert code not in (0, -signal.SIGTERM) and seconds < 15
    assert "closed politely" in (run.logs / "actor-0.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("run", ["stuck"], indirect=True)
def test_a_loop_that_does_not_notice_is_ended_with_the_process(run: Run) -> None:
    os.kill(run.pids["rollout"], signal.SIGKILL)
    code, errors, seconds = run.end()
    assert code == 1 and seconds < LIMIT
    assert "rollout rank 0" in errors and "did not end within 20 s" in errors
