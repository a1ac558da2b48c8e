"""Runs of a tiny random model, which many tests need: writes their configuration, starts them, reads their metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.tiny import make_tiny_model
from tests.warm import warm_rlinf

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3
ONE_PROCESS: dict[str, object] = {
    "cluster__backend": "local", "cluster__num_gpus_per_node": 1, "cluster__component_placement": {"actor,rollout,reward": "0"},
    "actor__model__tensor_model_parallel_size": 1, "actor__model__pipeline_model_parallel_size": 1,
}  # fmt: skip


def write_run(folder: Path, name: str = "tiny", family: str = "qwen2-tied", **overrides: object) -> Path:
    """A complete configuration of a small run in `folder`: model, data, YAML. The random model answers nothing right; so that there is
    something to learn, a response has a part of its reward by its letters."""
    model, data, parts = folder / "model", folder / "data.jsonl", folder / "parts.py"
    if not model.exists():
        make_tiny_model(model, family, layers=4, heads=4, kv_heads=2)
        data.write_text(
            "".join(
                json.dumps({"prompt": f"What is {i}+{i}? ", "task": "math", "query_id": str(i), "solutions": [f"\\boxed{{{2 * i}}}"]})
                + "\n"
                for i in range(24)
            )
        )
        parts.write_text("def letters(response):\n    return float(sum(response.text.encode()) % 7)\n")
    config = {
        "cluster": {"num_gpus_per_node": 4, "device": "cpu", "threads_per_worker": 1,
                    "component_placement": {"actor": "0-3", "rollout,reward": "0"}},
        "runner": {"output_dir": str(folder / "logs"), "experiment_name": name, "max_steps": STEPS, "max_epochs": 9, "seq_length": 64,
                   "max_tokens_per_mbs": 128, "val_check_interval": -1, "save_interval": 2},
        "data": {"train_data_paths": [str(data)], "val_data_paths": [str(data)], "max_prompt_length": 40, "rollout_batch_size": 4},
        "algorithm": {"group_size": 4, "n_minibatches": 2, "sampling_params": {"max_new_tokens": 16}, "shuffle_rollout": True},
        "rollout": {"model_dir": str(model), "rollout_backend": "embedded", "max_running_requests": 8, "verify_weights_every": 2},
        "actor": {"model": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "precision": "fp32"},
                  "optim": {"lr": 1e-3}},
        "reward": {"reward_scale": 5.0, "own_parts": {"letters": f"{parts}:letters"}},
    }  # fmt: skip
    for key, value in overrides.items():
        section = config
        *path, last = key.split("__")
        for part in path:
            section = section[part]
        section[last] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(config: Path, *words: str, timeout: float = 240, command: str = "train") -> subprocess.CompletedProcess[str]:
    """Call `python -m rlinf`. A run in one process is forked from a process that has already imported everything, which is quicker."""
    if yaml.safe_load(config.read_text())["cluster"].get("backend") == "local" and not any("cluster.backend" in word for word in words):
        return warm_rlinf(command, str(config), *words, timeout=timeout)
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run(
        [sys.executable, "-m", "rlinf", command, str(config), *words], capture_output=True, text=True, timeout=timeout, env=env
    )


def lines(folder: Path, name: str = "tiny") -> list[dict]:
    """The lines of the run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "logs" / name / "metrics.jsonl").read_text().splitlines()]


def repeat_the_last_step(config: Path, folder: Path) -> None:
    """Go on from the checkpoint after step 2 of a run that has ended: step 3 is the same, in its weights and its loss, bit for bit."""
    from safetensors.torch import load_file

    checkpoints = folder / "logs" / "tiny" / "checkpoints"
    model = checkpoints / "step_000003" / "hf" / "model.safetensors"
    whole, loss = load_file(model), lines(folder)[3]["train/loss"]
    again = run(config, f"runner.resume_dir={checkpoints / 'step_000002'}")
    assert again.returncode == 0, again.stderr[-4000:]
    repeated = load_file(model)
    assert all((whole[name] == repeated[name]).all() for name in whole) and lines(folder)[3]["train/loss"] == loss
