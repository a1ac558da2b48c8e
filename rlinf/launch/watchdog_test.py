"""A hang is diagnosed: who is stuck, with the stacks of those who are."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlinf.cluster.failure import Failure
from rlinf.cluster.phase import RESUME, START, Phase
from rlinf.cluster.processes import RUN_ID
from rlinf.config.load import load
from rlinf.config.schema import RunnerConfig
from rlinf.data.records import GroupHeader
from rlinf.errors import Hang
from rlinf.launch import watchdog as module
from rlinf.launch.train import train
from rlinf.launch.watchdog import Watchdog, listens, who_waits_for_whom
from rlinf.rewards.verifier import Verifier
from rlinf.rollout.embedded_engine import EmbeddedEngine
from rlinf.run_folder.folder import RunFolder
from rlinf.training.engine import MegatronEngine
from tests.tiny_run import ONE_PROCESS, write_run

STUCK = """
import sys, time
from pathlib import Path
from rlinf.cluster.host import redirect_output
redirect_output(Path(sys.argv[1]))
def the_stuck_function():
    time.sleep(60)
the_stuck_function()
"""


def group(component: str, *running: str, pids: tuple[int, ...] = ()) -> SimpleNamespace:
    in_flight = [Counter({method: 1} if method else {}) for method in running]
    told = {0: 'File "torch/distributed/distributed_c10d.py", line 1 in all_reduce'}
    return SimpleNamespace(
        component=component, size=len(running), in_flight=in_flight, pids=list(pids), where=lambda rank: f"{component} rank {rank}",
        stacks=lambda ranks, seconds: {rank: told[rank] for rank in ranks if rank in told},
    )  # fmt: skip


def make(tmp_path: Path, *groups: SimpleNamespace, **settings: object) -> Watchdog:
    config = RunnerConfig()
    for name, value in ({"phase_timeout": 10} | settings).items():
        setattr(config, name, value)
    return Watchdog(tmp_path, "run-1", config, groups, Failure(), lambda: {"4.a": "rollout rank 1"})


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)


def test_the_stuck_component_is_named_once_and_the_run_ends(tmp_path: Path) -> None:
    watchdog = make(tmp_path, group("actor", "", ""), group("rollout", "", "generate"), group("reward", ""))
    for now in range(100, 130):
        watchdog.look(Phase("rollout", 4), 4, float(now))
        assert (watchdog.failure.error is None) == (now <= 110)
    message = str(watchdog.failure.error)
    assert "step 4, rollout has lasted 11 s, more than its budget of 10 s" in message
    assert (
        "stuck: rollout in generate: 1 of 2 ranks have not answered: rollout rank 1 for 11 s" in message
        and "4.a at rollout rank 1" in message
    )
    with tarfile.open(tmp_path / "diagnosis-000004.tar.gz") as bundle:
        assert sorted(bundle.getnames()) == ["driver.txt", "summary.txt"]
        assert "watchdog_test.py" in bundle.extractfile("driver.txt").read().decode()


def test_the_longest_running_call_is_blamed_not_a_later_one(tmp_path: Path) -> None:
    reward, rollout = group("reward", "judge"), group("rollout", "")
    watchdog = make(tmp_path, rollout, reward)
    watchdog.look(Phase("rollout", 1), 1, 0.0)
    rollout.in_flight[0]["generate"] = 1
    for now in (6.0, 11.0):
        watchdog.look(Phase("rollout", 1), 1, now)
    assert "stuck: reward in judge" in str(watchdog.failure.error)


def test_without_a_call_it_is_the_driver_and_report_lets_the_run_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watchdog = make(tmp_path, group("actor", ""), on_hang="report")
    for now in (0.0, 11.0, 12.0):
        watchdog.look(Phase("train", 1), 1, now)
    err = capsys.readouterr().err
    assert watchdog.failure.error is None and err.count("the run hangs") == 1 and "stuck: the driver" in err


def test_a_stuck_driver_is_told_at_once_although_it_cannot_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watchdog = make(tmp_path, group("actor", ""))
    for now in (0.0, 11.0):
        watchdog.look(Phase("train", 1), 1, now)
    assert isinstance(watchdog.failure.error, Hang) and "stuck: the driver" in capsys.readouterr().err
    with tarfile.open(tmp_path / "diagnosis-000001.tar.gz") as bundle:
        assert "test_a_stuck_driver" in bundle.extractfile("driver.txt").read().decode()


def test_a_driver_that_hears_no_answers_is_blamed_and_not_who_gave_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watchdog = make(tmp_path, group("rollout", "generate"))
    watchdog.heard = 1.0
    for now in (0.0, 11.0):
        watchdog.look(Phase("rollout", 1), 1, now)
    assert "stuck: the driver: its loop has not turned for 10 s" in capsys.readouterr().err


def test_budgets_are_learned_by_phase(tmp_path: Path) -> None:
    watchdog = make(tmp_path, phase_timeout=0)
    now = 0.0
    for phase, seconds in ((START, 50.0), (Phase("rollout", 1), 100.0), (Phase("train", 1), 5.0), (Phase("rollout", 2), 80.0)):
        watchdog.look(phase, 1, now)
        assert watchdog.budget(phase) == (
            1000.0 if phase == Phase("rollout", 2) else float("inf")
        )  # of what was never seen nothing is known
        now += seconds
    watchdog.look(Phase("train", 2), 2, now)
    assert watchdog.budget(Phase("train", 2)) == 600.0
    assert make(tmp_path, phase_timeout=-1).budget(Phase("train", 2)) == float("inf")
    set_to_ten = make(tmp_path)
    assert set_to_ten.budget(START) == float("inf") and set_to_ten.budget(RESUME) == set_to_ten.budget(Phase("train", 2)) == 10.0


def test_a_full_disk_does_not_hide_the_diagnosis(tmp_path: Path) -> None:
    watchdog = make(tmp_path, group("reward", "judge"))
    watchdog.run_dir = Path("/dev/full")  # no folder: every write fails
    for now in (0.0, 11.0):
        watchdog.look(Phase("rollout", 1), 1, now)
    assert "stuck: reward" in str(watchdog.failure.error) and "could not be written" in str(watchdog.failure.error)


def test_a_worker_writes_its_stacks_and_others_are_not_signalled(tmp_path: Path) -> None:
    log, env = tmp_path / "workers" / "actor-0.log", os.environ | {RUN_ID: "run-1"}
    worker = subprocess.Popen([sys.executable, "-c", STUCK, str(log)], env=env)
    deaf = subprocess.Popen(["sleep", "60"], env=env)
    try:
        deadline = time.monotonic() + 30
        while not listens(worker.pid, "run-1"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not listens(deaf.pid, "run-1") and not listens(worker.pid, "run-2") and not listens(1, "run-1")
        watchdog = make(tmp_path, group("actor", "train_step", pids=(worker.pid, deaf.pid)))
        for now in (0.0, 11.0):
            watchdog.look(Phase("train", 1), 1, now)
        assert worker.poll() is None and deaf.poll() is None
    finally:
        for process in (worker, deaf):
            process.kill()
            process.wait()
    with tarfile.open(tmp_path / "diagnosis-000001.tar.gz") as bundle:
        assert "the_stuck_function" in bundle.extractfile("actor-0.log").read().decode()


def test_workers_of_other_machines_are_asked(tmp_path: Path) -> None:
    watchdog = make(tmp_path, group("actor", "train_step", "train_step", pids=(1, 1)))  # a process that is none of ours here
    for now in (0.0, 11.0):
        watchdog.look(Phase("train", 1), 1, now)
    assert "in a collective: actor-0.log" in str(watchdog.failure.error)
    with tarfile.open(tmp_path / "diagnosis-000001.tar.gz") as bundle:
        assert sorted(bundle.getnames()) == ["actor-0.log", "driver.txt", "summary.txt"]


def test_the_rank_outside_a_collective_is_where_to_look() -> None:
    waiting = 'File "torch/distributed/distributed_c10d.py", line 1 in all_reduce'
    assert who_waits_for_whom({"actor-0.log": waiting, "actor-1.log": "File x"}) == [
        "in a collective: actor-0.log; not in it: actor-1.log, look there first"
    ]
    assert who_waits_for_whom({"actor-0.log": "File x"}) == [] and "all of them" in who_waits_for_whom({"actor-0.log": waiting})[0]


PLANTED = [  # where it hangs, and what is to be named
    (Verifier, "verify_many", "reward in judge"),
    (MegatronEngine, "update", "actor in train_step"),
    (EmbeddedEngine, "_work", "rollout in generate"),
    (EmbeddedEngine, "load_weights", "rollout in load_weights"),
    (RunFolder, "record_order", "the driver: no worker has a call to answer"),
    (GroupHeader, "with_verdicts", "the driver: its loop has not turned"),  # while engines are at work
]


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "method", "name"), PLANTED, ids=[f"{owner.__name__}.{method}" for owner, method, _ in PLANTED])
def test_a_hang_in_a_real_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, name: str) -> None:
    released, report, original = threading.Event(), Failure.report, getattr(owner, method)
    monkeypatch.setattr(Failure, "report", lambda self, error: (report(self, error), released.set()))

    def stuck(*args: object) -> object:
        released.wait(120)
        return original(*args)

    async def stuck_beside_the_loop(*args: object) -> object:
        await asyncio.to_thread(released.wait, 120)
        return await original(*args)

    monkeypatch.setattr(owner, method, stuck_beside_the_loop if asyncio.iscoroutinefunction(original) else stuck)
    config = write_run(tmp_path, runner__phase_timeout=5, runner__val_check_interval=0, **ONE_PROCESS)
    with pytest.raises(Hang, match=f"stuck: {name}") as raised:
        train(load(str(config)))
    assert int(re.search(r"has lasted (\d+) s, more than its budget of 5 s", str(raised.value))[1]) <= 5 + 15


def test_a_thread_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    """In one process nobody else could end it."""
    code = (
        "import threading\nfrom pathlib import Path\n"
        "from rlinf.cluster import local_cluster\nfrom rlinf.config.schema import ClusterConfig\nfrom rlinf.errors import RunFailed\n"
        "local_cluster.PATIENCE = 1.0\n"
        "cluster = local_cluster.LocalCluster(ClusterConfig(num_nodes=1, num_gpus_per_node=1, device='cpu'), 'stuck', Path('.'))\n"
        "threading.Thread(target=threading.Event().wait).start()\ncluster.failure.report(RunFailed('it hangs'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == 1 and "it hangs\nThe run did not end within 1 s" in done.stderr
