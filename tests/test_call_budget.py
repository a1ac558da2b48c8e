"""At most three remote calls a group and three a rank per step: what keeps the driver out of the way at a thousand ranks. In the same run:
actor and engine share a device, and give it to each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import make_tiny_model
from tests.tiny_run import ROOT, STEPS, write_run

SCRIPT = """
import json, sys, torch
from rlinf.config.load import load
from rlinf.device import memory_in_use
from rlinf.launch import train as launch
from rlinf.runners.shared_devices import SharedDevices

turns, pass_to = [], SharedDevices.pass_to

async def watched(self, turn):
    before = memory_in_use(torch.device("cpu"))
    await pass_to(self, turn)
    turns.append([turn.name, before, memory_in_use(torch.device("cpu"))])

SharedDevices.pass_to = watched

class Counted(launch.ReasoningRunner):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Counted.made = self

launch.ReasoningRunner = Counted
assert launch.train(load(sys.argv[1])) == 0
runner = Counted.made
megatron = runner.megatron
groups = (megatron.actor, megatron.critic, megatron.token_reward, runner.rollout, runner.reward)
print(json.dumps([{g.component: dict(g.calls) for g in groups if g}, turns]))
"""
Turns = list[tuple[str, int, int]]  # turn, resident bytes before the engine has given up what it does not need in it, and after


def watched_run(config: Path, folder: Path) -> tuple[dict[str, dict[str, int]], Turns]:
    """Remote calls of a whole run, by component and method; and its turns."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), MALLOC_MMAP_THRESHOLD_="65536")  # what is freed leaves the process at once
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(config)], capture_output=True, text=True, timeout=120, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def calls_of(config: Path, folder: Path) -> dict[str, dict[str, int]]:
    return watched_run(config, folder)[0]


def test_calls_of_a_run_stay_within_the_budget_and_memory_changes_hands(tmp_path: Path) -> None:
    config = write_run(
        tmp_path, cluster__backend="local", cluster__num_gpus_per_node=1, cluster__component_placement={"actor,rollout,reward": "0"},
        actor__model__tensor_model_parallel_size=1, actor__model__pipeline_model_parallel_size=1, rollout__verify_weights_every=0,
        runner__save_interval=0, runner__val_check_interval=0, rollout__offload=True, actor__offload_grad=True,
    )  # fmt: skip
    model = make_tiny_model(tmp_path / "model", "qwen2-tied", hidden=512) / "model.safetensors"
    calls, turns = watched_run(config, tmp_path)
    groups = 4 * STEPS
    assert calls["rollout"].pop("generate") == calls["reward"].pop("judge") == groups  # two calls a group
    start = {
        "actor": 3,
        "rollout": 2,
    }  # the first weights and their probe: publish, probe, release; load_weights, probe
    for component, at_start in start.items():
        assert sum(calls[component].values()) <= 3 * STEPS + at_start, calls
    assert not calls["reward"]
    check_memory(turns, model.stat().st_size)


def check_memory(turns: Turns, model: int) -> None:
    """The actor's gradients are about a model's bytes, and so are the weights in shared memory and the engine's view of them; each is there
    only in its turn."""
    assert [name for name, *_ in turns] == ["SYNC", "ROLLOUT", *["TRAIN", "SYNC", "ROLLOUT"] * STEPS]
    for (_, generated, given), (_, trained, _), (_, synced, _) in zip(
        turns[5::3], turns[6::3], turns[7::3]
    ):  # from step 2: Adam has its moments
        assert generated - given >= 0.9 * model  # the engine went to sleep
        assert abs(trained - given) <= 0.3 * model  # gradients came, in place of the shared memory
        assert synced - trained >= 0.8 * model  # they went; the shared memory and the engine's view came
