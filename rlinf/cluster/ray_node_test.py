from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path
from typing import IO

import pytest

from rlinf.cluster import ray_node
from rlinf.cluster.head import Head
from rlinf.cluster.processes import marked
from rlinf.cluster.ray_node import MARK, environment, launch, lives, start, visible_gpus
from rlinf.cluster.state import STORE_BYTES
from rlinf.errors import UserError
from rlinf.hardware import OPEN_FILES


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [(None, 8), ("0,1", 2), ("GPU-5f3a,GPU-77b0,GPU-901c", 3), ("3", 1), ("", 0), ("-1", 0), ("NoDevFiles", 0)],
)
def test_a_node_offers_the_gpus_that_its_processes_may_see(
    visible: str | None, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray refuses to start with more than CUDA_VISIBLE_DEVICES names; without a driver there are none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    driver, devices = plant(tmp_path, 8, 8)
    assert visible_gpus(driver, devices) == gpus
    assert visible_gpus(tmp_path / "absent", devices) == 0


def test_a_container_that_is_shown_all_gpus_offers_those_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(*plant(tmp_path, 8, 2)) == 2


def plant(folder: Path, shown: int, given: int) -> tuple[Path, Path]:
    """What the driver says in /proc, and the files in /dev."""
    driver, devices = folder / "gpus", folder / "dev"
    for i in range(shown):
        (driver / f"0000:0{i}:00.0").mkdir(parents=True)
    devices.mkdir()
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{i}" for i in range(given))):
        (devices / name).touch()
    return driver, devices


def test_a_head_that_misses_two_connections_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(ray_node, "marked", lambda *_: [1])
    monkeypatch.setattr(ray_node, "name_of", lambda _: "raylet")
    monkeypatch.setattr(ray_node, "listens", lambda _: next(answers))
    assert lives("10.0.0.9:6379", "mark")
    monkeypatch.setattr(ray_node, "listens", lambda _: False)
    assert not lives("10.0.0.9:6379", "mark")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("ValueError: The configured object store size (64.0 GB) exceeds /dev/shm size (0.06 GB).", "--shm-size=256g or --ipc=host"),
        ("the port is taken", "run start_ray.sh again"),
    ],
)
def test_a_start_that_fails_says_what_to_do(words: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def fail(command: list[str], stdout: IO[str], **_: object) -> subprocess.CompletedProcess:
        limits.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        stdout.write(f"a\n{words}\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(ray_node.subprocess, "run", fail)
    (tmp_path / "state").mkdir()
    with pytest.raises(UserError) as caught:
        launch(0, Head("127.0.0.1", 6379), [], tmp_path / "state", "no such mark", 600)
    assert words in str(caught.value) and remedy in str(caught.value) and not (tmp_path / "state").exists()
    assert limits == [min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], OPEN_FILES)]


def test_a_start_that_hangs_is_ended_at_its_limit_and_its_logs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Python says what Ray would, leaves a daemon and hangs; the second time there are logs of the first."""
    slow, mark = tmp_path / "python", f"test-{os.getpid()}"
    slow.write_text("#!/bin/sh\necho starting >&2\nsleep 100 &\nsleep 100\n")
    slow.chmod(0o755)
    monkeypatch.setattr(ray_node.sys, "executable", str(slow))
    for _ in range(2):
        (tmp_path / "state" / "ray").mkdir(parents=True)
        (tmp_path / "state" / "token").write_text("secret")
        with pytest.raises(UserError) as caught:
            launch(1, Head("127.0.0.1", 6379), [], tmp_path / "state", mark, limit=1)
        told, kept = str(caught.value), tmp_path / "state.failed"
        assert told.startswith(
            "`ray start` was not done on node 1 within RLINF_START_TIMEOUT = 1 s, and was ended; its last lines:\nstarting\n"
        )
        assert f"{kept}/ray/session_*/logs" in told and "127.0.0.1:6379" in told and "needs a larger RLINF_START_TIMEOUT" in told
        assert (kept / "ray").is_dir() and not (kept / "token").exists() and not (tmp_path / "state").exists()
        assert marked(mark, MARK) == []


def test_no_token_but_the_state_folders_reaches_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    made = environment(tmp_path, "mark")
    assert "RAY_AUTH_TOKEN" not in made and made["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token") and made[MARK] == "mark"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "RANK is not set: export RANK=0 on the head node, and 1, 2, ... on the others"),
        ({"RANK": "x"}, "RANK is 'x': export RANK=0 on the head node, and 1, 2, ... on the others"),
        ({"RANK": "-1"}, "RANK is '-1': export RANK=0"),
        ({"RANK": "²"}, "RANK is '²': export RANK=0"),
        ({"RANK": "0", "RLINF_RAY_PORT": "x"}, "RLINF_RAY_PORT: 'x' is no port; give a number from 1 to 65535"),
        ({"RANK": "0", "RLINF_RAY_PORT": "99999"}, "RLINF_RAY_PORT: '99999' is no port"),
        ({"RANK": "1", "HEAD_ADDRESS": "node0:x"}, "HEAD_ADDRESS node0:x: 'x' is no port"),
        ({"RANK": "1", "HEAD_ADDRESS": "fd00::2:6379"}, "HEAD_ADDRESS: 'fd00::2:6379' is no address; give host:port, and IPv6 in brackets"),
        ({"RANK": "0", "RLINF_START_TIMEOUT": "10m"}, "RLINF_START_TIMEOUT is '10m': give a whole number of seconds, such as 600"),
        ({"RANK": "1", "RLINF_START_TIMEOUT": "10m"}, "RLINF_START_TIMEOUT is '10m': give a whole number of seconds, such as 600"),
        ({"RANK": "0", "RLINF_NUM_CPUS": "x"}, "RLINF_NUM_CPUS is 'x': give a whole number of process slots"),
        ({"RANK": "0", "RLINF_OBJECT_STORE_BYTES": "64g"}, "RLINF_OBJECT_STORE_BYTES is '64g'"),
        ({"RANK": "0", "RLINF_NUM_GPUS": "2x"}, "RLINF_NUM_GPUS is '2x': give a whole number of GPUs"),
    ],
)
def test_a_variable_that_is_no_number_is_named_with_what_it_is(
    variables: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "HEAD_ADDRESS", "RLINF_RAY_PORT", "RLINF_START_TIMEOUT", "RLINF_NUM_CPUS", "RLINF_NUM_GPUS", STORE_BYTES):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RLINF_RAY_STATE": str(tmp_path / "state"), **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray_node, "listens", lambda _: False)
    with pytest.raises(UserError) as caught:
        start(tmp_path, None)
    assert message in str(caught.value) and not (tmp_path / "state" / "mark").exists()
