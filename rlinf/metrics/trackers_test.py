"""Trackers hear the numbers of metrics.jsonl, step by step, and a resumed run goes on in its own run there."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rlinf.errors import UserError
from rlinf.metrics.logger import MetricLogger
from rlinf.metrics.trackers import missing_packages


class Service:
    """Stands in for all three packages and writes down what it is told."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.heard: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def module(self, name: str) -> types.ModuleType:
        made = types.ModuleType(name)
        made.init = made.start_run = self.begin
        made.set_experiment, made.log_params = self.begun.append, self.begun.append
        made.log = lambda values, step: self.heard.append((step, values))
        made.log_metrics = made.log
        made.finish = made.end_run = self.end
        return made

    def begin(self, **words: Any) -> Any:
        self.begun.append(words)
        run = types.SimpleNamespace(id="r7", log=lambda values, step: self.heard.append((step, values)), finish=self.end)
        run.info = types.SimpleNamespace(run_id="r7")
        return run

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
def test_a_tracker_hears_what_metrics_jsonl_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, name, service.module(name))
    logger = MetricLogger(tmp_path / "run-a", [name], project="sums", config={"runner.max_steps": 3})
    logger.log(1, {"rollout/rewards": -2.5, "train/grad_norm": math.nan})
    logger.close()
    assert service.heard == [(1, {"rollout/rewards": -2.5})] and service.ended == 1
    told = str(service.begun)
    assert "sums" in told and "run-a" in told and "runner.max_steps" in told and "r7" not in told
    again = MetricLogger(tmp_path / "run-a", [name], resume_step=1)
    again.log(2, {"rollout/rewards": 1.0})
    again.close()
    assert service.heard[-1] == (2, {"rollout/rewards": 1.0}) and "'r7'" in str(service.begun)


def test_a_damaged_file_of_ids_is_named_and_a_kill_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Service().module("wandb"))
    MetricLogger(tmp_path, ["wandb"]).close()
    file = tmp_path / "trackers.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt))
        MetricLogger(tmp_path, ["wandb"], resume_step=0)
    assert json.loads(file.read_text()) == {"wandb": "r7"}
    file.write_text('{"wandb": "r')
    with pytest.raises(UserError, match="trackers.json: cannot be read .*missing or damaged"):
        MetricLogger(tmp_path, ["wandb"], resume_step=0)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_packages(["tensorboard", "wandb", "mlflow"]) == ["wandb", "mlflow"]
