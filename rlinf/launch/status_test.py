"""The status file of a run that is on its way, and what stays of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlinf.cluster.phase import START, Phase
from rlinf.launch.status import Status
from rlinf.rollout.contract import EngineStats
from rlinf.runners.training_loop import StepResult


def make(tmp_path: Path) -> Status:
    group = SimpleNamespace(
        component="actor", size=1, where=lambda rank: f"actor rank {rank}", in_flight=[Counter(train_step=1, sequence_logprobs=0)]
    )
    loop = SimpleNamespace(step=0, total_steps=9, engine_load=[0, 0], last=StepResult({}, 0))
    return Status(tmp_path, "run", SimpleNamespace(phase=START), [group], loop)


def test_phase_step_and_pace_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("rlinf.launch.status.time.time", lambda: clock[0])
    status = make(tmp_path)
    assert status.snapshot("running")["seconds_per_step"] is None
    for step, at in ((4, 1010.0), (5, 1030.0), (6, 1070.0)):  # the run went on after step 3
        clock[0], status.loop.step, status.cluster.phase = at, step, Phase("rollout", step)
        found = status.snapshot("running")
    assert found["seconds_per_step"] == 30.0 and found["phase"] == "step 6, rollout" and found["phase_since"] == 1070.0
    assert found["components"] == {"actor": [{"where": "actor rank 0", "running": {"train_step": 1}, "memory_gib": None}]}
    status.loop.last = StepResult({}, 0, {"actor": [3 << 29]})
    assert status.snapshot("running")["components"]["actor"][0]["memory_gib"] == 1.5
    assert found["engines"] == [{"samples": 0, "tokens_per_second": None}] * 2
    status.loop.last = StepResult({}, 0, engine_stats=[EngineStats(decoded_tokens=100, busy_seconds=2.0), EngineStats()])
    assert [e["tokens_per_second"] for e in status.snapshot("running")["engines"]] == [50.0, None]


@pytest.mark.parametrize(
    ("error", "state"), [(None, "finished"), (KeyboardInterrupt(), "interrupted"), (RuntimeError("no room"), "failed")]
)
def test_what_stays_says_how_the_run_ended(tmp_path: Path, error: BaseException | None, state: str) -> None:
    make(tmp_path).end(error)
    left = json.loads((tmp_path / "status.json").read_text())
    assert left["state"] == state and left["error"] == (str(error) if error else "")
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
