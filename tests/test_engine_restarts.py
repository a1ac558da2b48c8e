"""Engines that are killed again and again: the run goes on as if nobody had, and learns the same."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.test_run_ends import Running
from tests.tiny_run import lines

KILLS = 10
SHAPE = {
    "cluster__component_placement": {"actor": "0", "rollout": "0-1", "reward": "0"}, "cluster__num_gpus_per_node": 2,
    "actor__model__tensor_model_parallel_size": 1, "actor__model__pipeline_model_parallel_size": 1,
    "algorithm__sampling_params": {"max_new_tokens": 24},
}  # fmt: skip


def newest_pid(running: Running, rank: int) -> int:
    return int(re.findall(r"pid (\d+)", (running.logs / f"rollout-{rank}.log").read_text())[-1])


def wait_for(running: Running, folder: Path, name: str, least: float) -> list[dict]:
    deadline = time.monotonic() + 180
    while (steps := lines(folder)[1:])[-1].get(name, 0) < least:
        assert running.process.poll() is None and time.monotonic() < deadline, running.last_words()
        time.sleep(0.1)
    return steps


def stop(running: Running) -> None:
    running.process.send_signal(signal.SIGINT)
    assert running.end()[0] == 130


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_killed_engines_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir(), (tmp_path / "left alone").mkdir()
    running, rng = Running(tmp_path / "killed", rollout__max_engine_restarts=KILLS, **SHAPE), random.Random(5)
    for kill in range(1, KILLS + 1):
        time.sleep(rng.random())
        os.kill(newest_pid(running, rng.randrange(2)), signal.SIGKILL)
        wait_for(running, tmp_path / "killed", "rollout/engine_restarts", kill)
    steps = wait_for(running, tmp_path / "killed", "step", lines(tmp_path / "killed")[-1]["step"] + 2)
    stop(running)
    for m in steps:
        names = [json.loads(line)["sample_id"] for line in (tmp_path / f"killed/logs/tiny/samples/step_{m['step']:06d}.jsonl").open()]
        assert len(names) == 16 == len(set(names)) == m["rollout/samples"]
    clean = Running(tmp_path / "left alone", rollout__max_engine_restarts=0, **SHAPE)
    others = wait_for(clean, tmp_path / "left alone", "step", min(len(steps), 40))
    stop(clean)
    for m, other in zip(steps, others):
        assert m["rollout/response_length"] == other["rollout/response_length"] and m["rollout/staleness_max"] == 0
        assert m["train/rollout_logprob_gap_max"] <= 1e-4 and m["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_one_death_too_many_ends_the_run(tmp_path: Path) -> None:
    running = Running(tmp_path, rollout__max_engine_restarts=1, **SHAPE)
    os.kill(newest_pid(running, 0), signal.SIGKILL)
    wait_for(running, tmp_path, "rollout/engine_restarts", 1)
    os.kill(newest_pid(running, 1), signal.SIGKILL)
    code, errors = running.end()
    assert code == 1 and re.search(r"rlinf: rollout rank 1 .*died \(phase: step \d+, ", errors)


@pytest.mark.slow
def test_half_a_run_survives_too(tmp_path: Path) -> None:
    running = Running(tmp_path, options=["--debug-rollout-only"], rollout__max_engine_restarts=1, **SHAPE)
    os.kill(newest_pid(running, 0), signal.SIGKILL)
    wait_for(running, tmp_path, "rollout/engine_restarts", 1)
    stop(running)


@pytest.mark.slow
def test_an_engine_that_stands_still_is_started_anew(tmp_path: Path) -> None:
    running = Running(tmp_path, rollout__max_engine_restarts=1, rollout__stall_timeout=5, **SHAPE)
    os.kill(newest_pid(running, 0), signal.SIGSTOP)
    wait_for(running, tmp_path, "rollout/engine_restarts", 1)
    stop(running)
