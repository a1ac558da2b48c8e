"""What makes two evaluations the same; curves that several evaluations add to; words of the command line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlinf.config.load import load
from rlinf.errors import UserError
from rlinf.evaluation.evaluate import identity, write_curves
from rlinf.evaluation.folder import SetFolder
from rlinf.evaluation.models import parse_words
from rlinf.evaluation.results import SetResult, score
from rlinf.evaluation.results_test import tally
from rlinf.files import scratch_of


def identity_of(folder: Path, *words: str, end_tokens: tuple[int, ...] = (2,)) -> dict:
    config = load(None, [f"rollout.model_dir={folder}", "rollout.rollout_backend=sglang", *words]).config
    problems = SimpleNamespace(prompts=(), protocol_json=lambda: {})
    task = SimpleNamespace(model=SimpleNamespace(path=folder), config=config, tokenizer=SimpleNamespace(eos_token_ids=end_tokens))
    return identity(task, problems)  # type: ignore[arg-type]


def test_whatever_changes_samples_or_verdicts_is_part_of_the_identity(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    base = identity_of(tmp_path)
    assert identity_of(tmp_path, "cluster.threads_per_worker=2") == base
    others = [
        identity_of(tmp_path, "rollout.sglang={quantization: fp8}"),
        identity_of(tmp_path, "reward.timeout=3"),
        identity_of(tmp_path, end_tokens=(2, 198)),
        identity_of(tmp_path, "rollout.seed=4"),
    ]
    assert all(other != base for other in others)


def results(step: int, right: float) -> list[SetResult]:
    found = tally(np.full((4, 1), right))
    return [SetResult(f"run-{step}", "run", step, "set", found, score(found))]


def curve_of(folder: Path) -> list[tuple[int, float]]:
    curve = EventAccumulator(str(folder / "run" / "tensorboard"))
    curve.Reload()
    return [(e.step, e.value) for e in curve.Scalars("benchmark/set/avg@1")]


def test_a_series_keeps_the_points_of_earlier_evaluations(tmp_path: Path) -> None:
    for step, right in ((100, 0.0), (200, 1.0), (100, 1.0)):  # the last evaluation of a step counts
        write_curves(results(step, right), tmp_path)
    assert curve_of(tmp_path) == [(100, 1.0), (200, 1.0)]


def test_no_point_is_lost_when_writing_curves_is_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    write_curves(results(100, 1.0), tmp_path)
    for place in (
        "rlinf.evaluation.evaluate.write_whole",
        "rlinf.evaluation.evaluate.shutil.rmtree",
        "rlinf.metrics.logger.MetricLogger.log",
    ):
        with monkeypatch.context() as there, pytest.raises(Killed):
            there.setattr(place, killed)
            write_curves(results(200, 0.0), tmp_path)
    write_curves(results(300, 1.0), tmp_path)
    assert curve_of(tmp_path) == [(100, 1.0), (200, 0.0), (300, 1.0)]


def test_an_evaluation_that_was_killed_as_it_began_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "model" / "set"
    folder.mkdir(parents=True)
    scratch_of(folder / "identity.json").write_text("{")
    assert SetFolder(folder, {"seed": 1}, []).done == set()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds notes.txt but no evaluation"):
        SetFolder(tmp_path / "other", {"seed": 1}, [])


def test_a_long_setting_is_no_folder(tmp_path: Path) -> None:
    word = "evaluation.custom.instruction=" + "Please think. " * 30
    assert parse_words([str(tmp_path), word]) == (None, [str(tmp_path)], [word])


def test_a_mistyped_model_folder_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nope: no folder of a model or a checkpoint, and no configuration either"):
        parse_words([str(tmp_path / "nope"), "evaluation.custom.path=x"])
