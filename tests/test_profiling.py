"""A run says how fast it computes, how much memory each rank takes, and leaves traces of the steps that it was asked to record."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rlinf.config.load import load
from rlinf.launch.train import train
from rlinf.metrics.names import undocumented
from tests.tiny_run import ONE_PROCESS, lines, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    config = write_run(
        folder,
        runner__profile_steps=[2],
        runner__peak_tflops=0.5,
        runner__max_steps=2,
        runner__val_check_interval=0,
        runner__save_interval=0,
        **ONE_PROCESS,
    )
    assert train(load(str(config))) == 0
    return folder / "logs" / "tiny"


def test_the_traces_of_a_step_are_there_and_no_others(run_dir: Path) -> None:
    assert sorted(p.name for p in (run_dir / "profile").iterdir()) == ["step_000002-actor-0.json.gz", "step_000002-rollout-0.json.gz"]
    found = {}
    for role in ("actor", "rollout"):
        trace = json.loads(gzip.decompress((run_dir / "profile" / f"step_000002-{role}-0.json.gz").read_bytes()))
        found[role] = {event.get("name", "") for event in trace["traceEvents"]}
        assert "aten::embedding" in found[role]
    assert (
        "aten::mm" in found["actor"]
        and any("Backward" in name for name in found["actor"])
        and not any("Backward" in name for name in found["rollout"])
    )


def test_speed_and_memory_are_metrics(run_dir: Path) -> None:
    for m in lines(run_dir.parent.parent):
        assert m["perf/actor_tflops"] > 0 and m["perf/actor_recompute_tflops"] > 0 and m["perf/rollout_tflops"] > 0
        assert m["perf/actor_mfu"] == pytest.approx(m["perf/actor_tflops"] / 0.5) and m["perf/actor_hfu"] == pytest.approx(
            m["perf/actor_mfu"]
        )
        assert m["perf/rollout_mfu"] == pytest.approx(m["perf/rollout_tflops"] / 0.5)
        assert 0.05 < m["perf/actor_memory_gib"] < 20 and 0.05 < m["perf/rollout_memory_gib"] < 20
        assert undocumented(set(m) - {"step", "time"}) == []
    status = json.loads((run_dir / "status.json").read_text())
    (actor,), (engine,) = status["components"]["actor"], status["components"]["rollout"]
    assert actor["memory_gib"] > 0.05 and engine["memory_gib"] > 0.05
