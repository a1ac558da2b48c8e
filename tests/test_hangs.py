"""Hangs planted in real runs of several processes, in a collective and in a verdict, and disks that are full.

Each is named, and a run may go on behind it. Hangs in a run of one process are in rlinf/launch/watchdog_test.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlinf.config.load import load
from rlinf.errors import Hang, RunFailed
from rlinf.launch import train as launch
from rlinf.run_folder.checkpoints import read_checkpoint
from rlinf.run_paths import RunPaths
from tests.tiny_run import ONE_PROCESS, lines, run, write_run

BUDGET = 20  # seconds; of phases that take well under one on an idle machine
TWO_RANKS: dict[str, object] = {
    "cluster__num_gpus_per_node": 2, "cluster__component_placement": {"actor": "0-1", "rollout,reward": "0"},
    "runner__val_check_interval": 0, "actor__model__tensor_model_parallel_size": 2, "actor__model__pipeline_model_parallel_size": 1,
    "runner__phase_timeout": BUDGET,
}  # fmt: skip


def check_lateness(message: str) -> None:
    lasted = re.search(r"has lasted (\d+) s, more than its budget of (\d+) s", message)
    assert lasted is not None and int(lasted[2]) == BUDGET and int(lasted[1]) <= BUDGET + 15


@pytest.mark.slow
def test_a_hang_in_a_collective_is_named_and_the_run_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(launch.WORKERS, "actor", "tests.hanging_workers:HangingActor")
    config = write_run(tmp_path, runner__save_interval=1, runner__on_hang="restart", **TWO_RANKS)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "hang-actor").touch()
    assert launch.train(load(str(config))) == 0
    err = capsys.readouterr().err
    check_lateness(err)
    assert "stuck: actor in train_step: 2 of 2 ranks have not answered" in err
    assert "in a collective: actor-0.log; not in it: actor-1.log, look there first" in err
    assert err.count("rlinf: restart 1 of at most 3, from the latest checkpoint") == 1 and "goes on after step 1" in err
    assert [m["step"] for m in lines(tmp_path)] == [1, 2, 3]
    with tarfile.open(tmp_path / "logs" / "tiny" / "diagnosis-000002.tar.gz") as bundle:
        assert "hang_once" in bundle.extractfile("actor-1.log").read().decode()


@pytest.mark.slow
def test_a_hang_before_any_checkpoint_ends_the_run_and_names_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.WORKERS, "reward", "tests.hanging_workers:HangingReward")
    config = write_run(tmp_path, runner__on_hang="restart", **TWO_RANKS)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "hang-reward").touch()
    with pytest.raises(Hang, match="stuck: reward in judge") as raised:
        launch.train(load(str(config)))
    check_lateness(str(raised.value))
    assert re.search(r"1 groups in flight: (1\.\d+) at reward rank 0 \(samples \1/0 to 3\)", str(raised.value))
    with tarfile.open(tmp_path / "logs" / "tiny" / "diagnosis-000001.tar.gz") as bundle:
        assert "hang_once" in bundle.extractfile("reward-0.log").read().decode()
        assert "samples 1." in bundle.extractfile("summary.txt").read().decode()


def test_a_full_disk_is_no_hang_and_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunPaths, "samples", lambda self, step: Path("/dev/full"))
    config = write_run(tmp_path, runner__val_check_interval=0, **ONE_PROCESS)
    with pytest.raises(RunFailed, match=r"reward rank 0 .* failed in judge .*No space left on device: '/dev/full'") as raised:
        launch.train(load(str(config)))
    assert not isinstance(raised.value, Hang)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB, in memory: two checkpoints of the tiny model and no third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() != 0 or mount(folder, "size=8m") != 0:
        pytest.skip("to mount a small disk takes root, and a kernel that lets it")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(folder: Path, options: str) -> int:
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode


@pytest.mark.slow
def test_a_disk_that_fills_up_is_named_and_the_run_goes_on_when_there_is_room(tmp_path: Path, small_disk: Path) -> None:
    endless = {"runner__max_steps": 9, "runner__save_interval": 1, "runner__keep_checkpoints": 0, "runner__val_check_interval": 0}
    config = write_run(tmp_path, runner__output_dir=str(small_disk), **endless, **ONE_PROCESS)
    ended = run(config)
    run_dir = small_disk / "tiny"
    assert ended.returncode == 1, ended.stderr[-4000:]
    told = re.search(
        rf"rlinf: the disk of {run_dir} is full \((\d\.\d) MiB are left at {small_disk}\).*runner.resume_dir=auto", ended.stderr
    )
    assert told is not None and float(told[1]) < 4 and "Traceback" not in ended.stderr.partition("rlinf: the disk")[0]
    latest = (run_dir / "checkpoints" / "latest").resolve()
    step = read_checkpoint(latest).step
    assert 1 <= step < 9
    assert mount(small_disk, "remount,size=64m") == 0
    again = run(config, "runner.resume_dir=auto", f"runner.max_steps={step + 2}")
    assert again.returncode == 0, again.stderr[-4000:]
    metrics = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, step + 3))
