"""Runs a training run in a process of its own, kills it at a chosen instant, and looks at it from outside: at its folder and its shared
memory.

An instant inside a checkpoint write or a weight sync is found by watching for a sign (a `.partial` folder with a number of files; a segment
of the weights). When the sign appears, the driver is frozen; if the sign is still there then, the driver is killed, otherwise it goes on
until the next sign.

Most of the time of a tiny run is spent on imports at its start. So a run may also be forked from a process that has only made the imports
(`FORKS`, multiprocessing's fork server): as a process of its own session, with the same command line, killed by the same signal.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import rlinf
from rlinf.cluster.processes import end_run, marked
from rlinf.errors import RunFailed
from rlinf.metrics.logger import read_metrics
from rlinf.run_paths import METRICS_FILE, PARTIAL, RunPaths

ROOT = Path(rlinf.__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
IMPORTS = (  # what a run in one process comes to import
    "rlinf.cli", "rlinf.config.validate", "rlinf.config.model", "rlinf.launch.train", "rlinf.cluster.local_cluster",
    "rlinf.workers.actor", "rlinf.workers.rollout", "rlinf.rollout.build", "rlinf.rollout.embedded_engine", "rlinf.workers.reward",
    "rlinf.report.page",
)  # fmt: skip
LOOK = 0.0003  # seconds between two looks for a sign
SETTLE = 0.02  # what is still on its way when the driver is frozen has arrived by then
PATIENCE = 240.0  # for a run to get where it is to die, or to end
GONE = 40.0  # for every process of a killed run, and its shared memory


@dataclass(frozen=True)
class Kill:
    """One death.

    kind: start | random | checkpoint | sync. step: the kill comes when this step has been reached. spread: where within the step, 0 to 1.
    victim: the driver, or a worker such as actor-1.
    """

    kind: str
    step: int
    spread: float
    victim: str = "driver"


class Forked:
    """`rlinf WORDS` in a process of the fork server, with those methods of subprocess.Popen that Life needs."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        FORKS.set_forkserver_preload(list(IMPORTS))
        log.touch()  # for those who look before the process has opened it
        self.process = FORKS.Process(target=obey, args=(list(words), log))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if (code := self.process.exitcode) is None:
            raise subprocess.TimeoutExpired("rlinf", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            assert self.process.pid is not None  # __init__ has started it
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()


def obey(words: list[str], log: Path) -> None:
    """In a process that the fork server has made: run `python -m rlinf WORDS` with its output in `log`."""
    os.setsid()
    with log.open("wb") as file, open(os.devnull, "rb") as nothing:
        for number, stream in ((0, nothing), (1, file), (2, file)):
            os.dup2(stream.fileno(), number)
    os.environ["PYTHONPATH"] = search_path()
    sys.argv = ["rlinf", *words]
    runpy.run_module("rlinf", run_name="__main__")


def search_path() -> str:
    return f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"


@dataclass
class Life:
    """One process of a run, from its start to its end. where: what it was doing when it was killed."""

    run_dir: Path
    process: subprocess.Popen[bytes] | Forked
    log: Path
    where: str = ""
    known_as: str | None = None

    @classmethod
    def start(cls, config: Path, run_dir: Path, words: Sequence[str] = (), fork: bool = False) -> Life:
        """Start the run. fork: from a process that has made the imports; otherwise as a new process."""
        log = run_dir.with_name(f"{run_dir.name}.{time.time_ns()}.log")
        command = ["train", str(config), *words]
        if fork:
            return cls(run_dir, Forked(command, log), log)
        env = os.environ | {"PYTHONPATH": search_path()}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlinf", *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=env,
                start_new_session=True,
            )
        return cls(run_dir, process, log)

    def finish(self) -> None:
        """Wait for the end. Raises RunFailed unless the run succeeded."""
        try:
            code = self.process.wait(PATIENCE)
        finally:
            self.process.kill()
        if code != 0:
            raise self.failed(f"ended with exit code {code}")

    def die(self, kill: Kill, step_seconds: float, start_seconds: float) -> None:
        """Wait for the instant, kill, and wait until no process of the run is left. Raises RunFailed when the instant does not come."""
        try:
            self.wait_for(lambda: self.run_id is not None, "did not start")  # now its metrics end where it goes on
            if kill.kind == "start":
                time.sleep(kill.spread * start_seconds)
                self.where = "start" if self.last_step() < kill.step else "first steps"
            elif kill.kind == "random":
                step = max(kill.step, self.resumed_at() + 1)
                self.wait_for(lambda: self.last_step() >= step, f"did not reach step {step}")
                time.sleep(kill.spread * step_seconds)
                self.where = f"after step {self.last_step()}"
            else:
                sign = self.checkpoint_sign if kill.kind == "checkpoint" else self.sync_sign
                self.freeze_at(lambda: sign(kill))
            self.strike(kill.victim)
        finally:
            self.process.kill()
            self.process.wait()
        self.wait_for(lambda: not self.remains(), "left processes or shared memory behind", GONE, alive=False)

    def freeze_at(self, sign: Callable[[], str]) -> None:
        """Return when the driver is frozen while the sign is there."""
        while True:
            self.wait_for(lambda: bool(sign()), "ended before the instant came", pause=LOOK)
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(SETTLE)
            self.where = sign()
            if self.where:
                return
            self.process.send_signal(signal.SIGCONT)

    def strike(self, victim: str) -> None:
        if victim == "driver":
            self.process.kill()
            return
        text = (self.run_dir / "workers" / f"{victim}.log").read_text()
        os.kill(int(re.findall(rf"pid (\d+), run {self.run_id}", text)[-1]), signal.SIGKILL)
        if self.process.wait(GONE) != 1:
            raise self.failed(f"ended with exit code {self.process.returncode} after the death of {victim}")

    def checkpoint_sign(self, kill: Kill) -> str:
        """Whether there is an incomplete checkpoint of the step or a later one, with at least spread x 10 files."""
        for step, partial in RunPaths(self.run_dir).unfinished_checkpoints():
            files = sum(len(names) for _, _, names in os.walk(partial))  # which does not mind that the folder goes away meanwhile
            if partial.suffix == PARTIAL and step >= kill.step and files >= int(kill.spread * 10):
                return f"checkpoint of step {step}, {files} files written"
        return ""

    def sync_sign(self, kill: Kill) -> str:
        """Whether weights of the step or a later one are in shared memory."""
        found = [re.search(r"-v(\d+)-\d+$", p.name) for p in self.segments()]  # spare ones have no version
        return next((f"weight sync {f[1]}" for f in found if f and int(f[1]) >= kill.step), "")

    def segments(self) -> list[Path]:
        return list(Path("/dev/shm").glob(f"rlinf-{self.run_id}-*")) if self.run_id else []

    def remains(self) -> bool:
        return self.run_id is not None and bool(marked(self.run_id) or self.segments())

    @property
    def run_id(self) -> str | None:
        if self.known_as is None and (found := re.search(rb"^run (\S+) in ", self.log.read_bytes(), re.M)):
            self.known_as = found[1].decode()
        return self.known_as

    def resumed_at(self) -> int:
        found = re.search(rb"^run .* goes on after step (\d+)", self.log.read_bytes(), re.M)
        return int(found[1]) if found else 0

    def last_step(self) -> int:
        """The last step in metrics.jsonl; 0 before the first."""
        lines = read_metrics(self.run_dir) if (self.run_dir / METRICS_FILE).exists() else []
        return int(lines[-1]["step"]) if lines else 0

    def wait_for(
        self, condition: Callable[[], bool], otherwise: str, seconds: float = PATIENCE, pause: float = 0.02, alive: bool = True
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or (alive and self.process.poll() is not None):
                raise self.failed(otherwise)
            time.sleep(pause)

    def failed(self, what: str) -> RunFailed:
        tail = self.log.read_text(errors="replace")[-2000:]
        if self.run_id:
            end_run(self.run_id)
        return RunFailed(f"the run {self.run_dir} {what}; the end of its output:\n{tail}")


def newest_checkpoint(run_dir: Path) -> int:
    """The step of the newest complete checkpoint; 0 when there is none."""
    return max(RunPaths(run_dir).complete_checkpoints(), default=0)


def plan_kills(kinds: Sequence[str], steps: int, victims: Sequence[str], seed: int) -> list[Kill]:
    """Kills of these kinds in random order, at steps that rise through the run. In checkpoints and syncs the driver dies, otherwise any
    process."""
    rng = np.random.default_rng(seed)
    order = [k for k in kinds if k == "start"] + list(rng.permutation([k for k in kinds if k != "start"]))
    kills = []
    for i, kind in enumerate(order):
        step = 1 if kind == "start" else 1 + int((i + rng.random()) * (steps - 4) / len(order))
        victim = str(rng.choice(victims)) if kind == "random" else "driver"
        kills.append(Kill(str(kind), step, float(rng.random()), victim))
    return kills
