"""The door of the evaluation: it finds the files of a folder and says so when there are none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import make_tiny_model

SCRIPT = Path(__file__).with_name("run.sh")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return subprocess.run(["bash", str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=120, env=env)


def test_every_file_of_the_folder_is_evaluated(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", "qwen2-tied")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("aime24", "math500"):
        (data / f"{name}.jsonl").write_text(
            json.dumps({"prompt": "1+1?", "task": "math", "query_id": "0", "solutions": ["\\boxed{2}"]}) + "\n"
        )
    local = ["cluster.backend=local", "cluster.device=cpu", "rollout.rollout_backend=embedded", f"evaluation.output_dir={tmp_path / 'out'}"]
    done = run(data, model, *local, *(f"evaluation.{name}.max_tokens=8" for name in ("aime24", "math500")))
    assert done.returncode == 0, done.stderr[-2000:]
    assert {
        p.parent.name: json.loads(p.read_text())["samples_per_problem"] for p in (tmp_path / "out" / "tiny").glob("*/results.json")
    } == {
        "aime24": 32,
        "math500": 4,
    }


def test_mistakes_are_named(tmp_path: Path) -> None:
    for words, expected in (
        (("nowhere", "m"), "give a folder of benchmark files"),
        ((tmp_path, "m"), "holds no benchmark file such as aime24.jsonl"),
    ):
        refused = run(*words)
        assert refused.returncode == 2 and expected in refused.stderr
