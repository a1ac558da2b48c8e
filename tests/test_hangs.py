"""Hangs planted in real runs: in a collective between ranks, in a verdict, on a full disk. Each is named, and a run may go on behind it."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

from rlinf.config.load import load
from rlinf.errors import Hang, RunFailed
from rlinf.runners import launch
from rlinf.runners.run_folder import RunFolder
from tests.test_tiny_run import ONE_PROCESS, lines, write_run

BUDGET = 20  # seconds; of phases that take well under one on an idle machine
TWO_RANKS: dict[str, object] = {
    "cluster__num_gpus_per_node": 2, "cluster__component_placement": {"actor": "0-1", "rollout,reward": "0"}, "runner__val_check_interval": 0,
    "actor__model__tensor_model_parallel_size": 2, "actor__model__pipeline_model_parallel_size": 1, "runner__phase_timeout": BUDGET,
}  # fmt: skip


def check_lateness(message: str) -> None:
    lasted = re.search(r"has lasted (\d+) s, more than its budget of (\d+) s", message)
    assert lasted is not None and int(lasted[2]) == BUDGET and int(lasted[1]) <= BUDGET + 15


@pytest.mark.slow
def test_a_hang_in_a_collective_is_named_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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
    monkeypatch.setattr(RunFolder, "samples", lambda self, step: Path("/dev/full"))
    config = write_run(tmp_path, runner__val_check_interval=0, **ONE_PROCESS)
    with pytest.raises(RunFailed, match=r"reward rank 0 .* failed in judge .*No space left on device: '/dev/full'") as raised:
        launch.train(load(str(config)))
    assert not isinstance(raised.value, Hang)
