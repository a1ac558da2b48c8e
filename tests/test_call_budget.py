"""At most three remote calls a group and three a rank per step: what keeps the driver out of the way at a thousand ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.test_tiny_run import ROOT, STEPS, write_run

SCRIPT = """
import json, sys
from rlinf.config.load import load
from rlinf.runners import launch

class Counted(launch.ReasoningRunner):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Counted.last = self

launch.ReasoningRunner = Counted
assert launch.train(load(sys.argv[1])) == 0
runner = Counted.last
print(json.dumps({g.component: dict(g.calls) for g in (runner.actor, runner.rollout, runner.reward, runner.critic, runner.token_reward) if g}))
"""


def calls_of(config: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Remote calls of a whole run, by component and method."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(config)], capture_output=True, text=True, timeout=120, cwd=folder, env=dict(os.environ, PYTHONPATH=str(ROOT))
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_calls_of_a_run_stay_within_the_budget(tmp_path: Path) -> None:
    config = write_run(
        tmp_path, cluster__backend="local", cluster__num_gpus_per_node=1, cluster__component_placement={"actor,rollout,reward": "0"},
        actor__model__tensor_model_parallel_size=1, actor__model__pipeline_model_parallel_size=1, rollout__verify_weights_every=0,
        runner__save_interval=0, runner__val_check_interval=0,
    )  # fmt: skip
    calls = calls_of(config, tmp_path)
    groups = 4 * STEPS
    assert calls["rollout"].pop("generate") == calls["reward"].pop("judge") == groups  # two calls a group
    start = {"actor": 3, "rollout": 2}  # the first weights and their probe: publish, score, release; load_weights, score
    for component, at_start in start.items():
        assert sum(calls[component].values()) <= 3 * STEPS + at_start, calls
    assert not calls["reward"]
