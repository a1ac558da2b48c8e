"""Runs that train adapters: the engines get the merged weights, the checkpoint holds the adapters and goes on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlinf.weights.tensor_folder import open_hf_folder
from tests.tiny_run import ONE_PROCESS, lines, repeat_the_last_step, run, write_run

ADAPTERS = {"rank": 4, "alpha": 16.0}


def test_adapters_are_trained_published_saved_and_go_on(tmp_path: Path) -> None:
    config = write_run(
        tmp_path,
        actor__lora=ADAPTERS,
        algorithm__kl_beta=0.05,
        algorithm__entropy_bonus=0.1,
        rollout__verify_weights_every=1,
        **ONE_PROCESS,
    )
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics, run_dir = lines(tmp_path), tmp_path / "logs" / "tiny"
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert 0 < metrics[1]["train/kl_loss"] < metrics[3]["train/kl_loss"]  # the reference is the model without adapters
    assert all(m["train/grad_norm"] > 0 and m["train/rollout_logprob_gap_max"] <= 1e-4 for m in metrics[1:])
    assert max(m["sync/probe_gap_max"] for m in metrics if "sync/probe_gap_max" in m) <= 1e-4
    step_dir = run_dir / "checkpoints" / "step_000003"
    held = {name for file in (step_dir / "actor").glob("param-*.safetensors") for name in load_file(file)}
    assert held and all(".lora_A." in name or ".lora_B." in name for name in held)
    start, now = open_hf_folder(tmp_path / "model"), open_hf_folder(step_dir / "hf")
    moved = {name for name in start if (start[name].float() != now[name].float()).any()}
    assert moved == {name.replace(".lora_A.", ".") for name in held if ".lora_A." in name}

    repeat_the_last_step(config, tmp_path)


@pytest.mark.slow
def test_adapters_in_ranks_of_their_own_with_a_critic_that_has_some_too(tmp_path: Path) -> None:
    config = write_run(
        tmp_path, actor__lora=ADAPTERS, critic={"lora": {"rank": 2}, "optim": {"lr": 1e-3}, "model": {"precision": "fp32"}},
        algorithm__adv_type="gae", algorithm__entropy_bonus=0.1, rollout__verify_weights_every=1,
        cluster__component_placement={"actor": "0-3", "critic": "0-1", "rollout,reward": "0"},
    )  # fmt: skip
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = lines(tmp_path)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert all(m["train/rollout_logprob_gap_max"] <= 1e-4 and m["critic/grad_norm"] > 0 for m in metrics[1:])
    step_dir = tmp_path / "logs" / "tiny" / "checkpoints" / "step_000003"
    held = {name for file in (step_dir / "critic").glob("param-*.safetensors") for name in load_file(file)}
    assert "score.weight" in held and all(".lora_" in name for name in held - {"score.weight"})
