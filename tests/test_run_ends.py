"""A training run that is interrupted or loses a worker: it ends soon, says why, keeps what it had, and can go on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlinf.cluster.processes import marked
from tests.tiny_run import ROOT, lines, run, write_run

LIMIT = 30.0


class Running:
    """A tiny run in the background that has finished at least two steps."""

    def __init__(self, folder: Path, patience: float = 90, options: Sequence[str] = (), **overrides: object) -> None:
        self.folder = folder
        endless = dict(
            cluster__component_placement={"actor": "0-1", "rollout,reward": "0"}, actor__model__pipeline_model_parallel_size=1,
            runner__max_steps=100_000, runner__max_epochs=100_000, runner__save_interval=2, rollout__max_engine_restarts=0,
        )  # fmt: skip
        self.config = write_run(folder, **endless | overrides)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlinf", "train", str(self.config), *options],
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
        )
        metrics = folder / "logs" / "tiny" / "metrics.jsonl"
        deadline = time.monotonic() + patience
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
            assert self.process.poll() is None and time.monotonic() < deadline, self.last_words()
            time.sleep(0.2)
        self.run_id = re.search(r"run (\S+)", (self.logs / "rollout-0.log").read_text()).group(1)

    def last_words(self) -> str:
        """For the message of a test that fails: the end of what the driver wrote. The run is over then."""
        self.process.kill()
        return self.process.communicate()[1][-3000:]

    @property
    def logs(self) -> Path:
        return self.folder / "logs" / "tiny" / "workers"

    def pid(self, component: str, rank: int) -> int:
        return int(re.search(r"pid (\d+)", (self.logs / f"{component}-{rank}.log").read_text()).group(1))

    def end(self) -> tuple[int, str]:
        started = time.monotonic()
        _, errors = self.process.communicate(timeout=LIMIT)
        while marked(self.run_id):
            assert time.monotonic() - started < LIMIT, "processes of the run live on"
            time.sleep(0.1)
        assert not list(Path("/dev/shm").glob(f"*{self.run_id}*"))
        return self.process.returncode, errors


@pytest.fixture
def running(tmp_path: Path):
    run = Running(tmp_path)
    yield run
    run.process.kill()


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_the_run_goes_on_where_it_was(running: Running) -> None:
    running.process.send_signal(signal.SIGINT)
    code, errors = running.end()
    assert code == 130 and "interrupted" in errors and "Traceback" not in errors
    done = lines(running.folder)
    assert [m["step"] for m in done] == list(range(len(done)))
    again = run(running.config, "runner.resume_dir=auto", f"runner.max_steps={len(done)}")
    assert again.returncode == 0, again.stderr[-3000:]
    steps = [m["step"] for m in lines(running.folder)]
    assert steps == list(range(len(done) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("component, rank", [("actor", 1), ("rollout", 0), ("reward", 0)])
def test_a_killed_worker_ends_the_run_and_is_named_with_phase_and_log(running: Running, component: str, rank: int) -> None:
    os.kill(running.pid(component, rank), signal.SIGKILL)
    code, errors = running.end()
    assert code == 1
    last = errors.splitlines()
    message = next(line for line in last if line.startswith("rlinf: "))
    assert f"{component} rank {rank}" in message and re.search(r"phase: step \d+, ", message)
    assert str(running.logs / f"{component}-{rank}.log") in errors
