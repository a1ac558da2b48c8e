from __future__ import annotations

import json
from pathlib import Path

from rlinf.launch.environment import changed_settings
from rlinf.run_paths import ENVIRONMENT_FILE


def test_what_a_start_has_otherwise_than_the_one_before_is_named(tmp_path: Path) -> None:
    settings = {"runner.resume_dir": "auto", "runner.experiment_name": "b", "actor.optim.lr": 0.002, "data.tasks": ("math",), "new.key": 1}
    assert changed_settings(tmp_path, settings) == []
    starts = [
        {"settings": {"actor.optim.lr": 1.0}},
        {"settings": {"runner.resume_dir": None, "runner.experiment_name": "a", "actor.optim.lr": 0.01, "data.tasks": ["math"]}},
    ]
    (tmp_path / ENVIRONMENT_FILE).write_text("".join(json.dumps(start) + "\n" for start in starts))
    assert changed_settings(tmp_path, settings) == ["actor.optim.lr: 0.01, now 0.002"]
    (tmp_path / ENVIRONMENT_FILE).write_text('{"run_id": "of a version that did not record them"}\n')
    assert changed_settings(tmp_path, settings) == []
