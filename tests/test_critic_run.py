"""Whole runs of PPO with a critic: its own layout, warm-up, checkpoint and exact resume, budget of remote calls."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from rlinf.metrics.names import undocumented
from tests.test_call_budget import calls_of
from tests.tiny_run import STEPS, lines, run, write_run
from tests.warm import warm_rlinf

CRITIC = {"model": {"precision": "fp32"}, "optim": {"lr": 1e-2}}
ONE_PROCESS = dict(
    cluster__backend="local", cluster__num_gpus_per_node=1, cluster__component_placement={"actor,critic,rollout,reward": "0"},
    actor__model__tensor_model_parallel_size=1, actor__model__pipeline_model_parallel_size=1,
)  # fmt: skip


def tensors(step_dir: Path) -> dict[str, np.ndarray]:
    """Everything that actor and critic go on from, and both models."""
    found = {}
    for file in sorted([*step_dir.rglob("*.safetensors")]):
        found |= {f"{file.relative_to(step_dir)}:{name}": t.float().numpy() for name, t in load_file(file).items()}
    return found


def check_metrics(metrics: list[dict], warmup: int = 0) -> None:
    steps = [m for m in metrics if m["step"]]
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(m["critic/loss"]) and m["critic/grad_norm"] > 0 and m["critic/minibatches_skipped"] == 0 for m in steps)
    assert [("train/loss" in m) for m in steps] == [m["step"] > warmup for m in steps]
    assert all(m["critic/return_mean"] == pytest.approx(m["rollout/rewards"], abs=10) for m in steps)
    assert undocumented({name for m in steps for name in m} - {"step", "time"}) == []


@pytest.mark.slow
def test_actor_and_critic_in_layouts_of_their_own_and_an_exact_resume(tmp_path: Path) -> None:
    """The actor PP 2, the critic DP 2, on some of the same devices. (Every pair of layouts: runners/roles_test.py.)"""
    config = write_run(
        tmp_path, algorithm__adv_type="gae", critic=CRITIC, algorithm__shuffle_rollout=True, algorithm__update_epochs=2,
        cluster__num_gpus_per_node=3, cluster__component_placement={"actor": "0-1", "critic": "1-2", "rollout,reward": "0"},
        actor__model__tensor_model_parallel_size=1,
    )  # fmt: skip
    done = run(config, "critic.warmup_steps=1", "algorithm.gae_lambda=0.9", timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    check_metrics(lines(tmp_path), warmup=1)
    checkpoints = tmp_path / "logs" / "tiny" / "checkpoints"
    first = tensors(checkpoints / "step_000003")
    assert {"actor", "critic", "hf"} <= {name.split("/")[0] for name in first}
    again = run(
        config, "critic.warmup_steps=1", "algorithm.gae_lambda=0.9", f"runner.resume_dir={checkpoints / 'step_000002'}", timeout=240
    )
    assert again.returncode == 0, again.stderr[-4000:]
    repeated = tensors(checkpoints / "step_000003")
    assert first.keys() == repeated.keys() and all(np.array_equal(first[n], repeated[n]) for n in first)  # bit for bit, actor and critic
    moved = [n for n, t in tensors(checkpoints / "step_000002").items() if not np.array_equal(t, first[n])]
    assert any("critic/hf" in n for n in moved) and any(n.startswith("hf/") for n in moved)


def test_one_process_warm_up_trains_the_critic_alone(tmp_path: Path) -> None:
    config = write_run(
        tmp_path,
        algorithm__adv_type="gae",
        critic=CRITIC | {"warmup_steps": 2},
        runner__save_interval=1,
        runner__keep_checkpoints=0,
        **ONE_PROCESS,
    )
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    check_metrics(lines(tmp_path), warmup=2)
    steps = [tensors(tmp_path / "logs" / "tiny" / "checkpoints" / f"step_{i:06d}") for i in (1, 2, 3)]
    start = {n: t.numpy() for n, t in load_file(tmp_path / "model" / "model.safetensors").items()}
    hf = lambda step, name: step[f"hf/model.safetensors:{name}"]
    assert all(np.array_equal(hf(steps[1], n), t) for n, t in start.items()) and not all(
        np.array_equal(hf(steps[2], n), t) for n, t in start.items()
    )
    scores = [step["critic/hf/model.safetensors:score.weight"] for step in steps]
    assert scores[0].shape == (1, 64) and not np.array_equal(scores[0], scores[1])
    words = [str(tmp_path / "logs" / "tiny"), "--step", "2", "--tolerance", "0"]  # a replay ends with its step, before the warm-up does
    replayed = warm_rlinf("replay", *words, timeout=240)
    assert replayed.returncode == 0 and "critic/loss" in replayed.stdout, replayed.stdout + replayed.stderr[-4000:]


def test_the_critic_stays_within_the_budget_of_remote_calls(tmp_path: Path) -> None:
    """Two calls a step, and not one more to any other component."""
    config = write_run(
        tmp_path,
        algorithm__adv_type="gae",
        critic=CRITIC,
        rollout__verify_weights_every=0,
        runner__save_interval=0,
        runner__val_check_interval=0,
        **ONE_PROCESS,
    )
    calls = calls_of(config, tmp_path)
    assert calls["critic"] == {"values": STEPS, "train_step": STEPS}
    assert calls["actor"]["train_step"] == STEPS and sum(calls["actor"].values()) <= 3 * STEPS + 3


def weights_after(folder: Path, name: str, *words: str) -> tuple[dict[str, np.ndarray], list[dict]]:
    config = write_run(folder, name, algorithm__adv_type="gae", critic=CRITIC, **ONE_PROCESS)
    done = run(config, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return tensors(folder / "logs" / name / "checkpoints" / "step_000001"), lines(folder, name)


@pytest.mark.slow
def test_every_key_of_the_critic_changes_what_is_trained(tmp_path: Path) -> None:
    """One step of the same samples: which model moves says which key acts."""
    plain, _ = weights_after(tmp_path, "plain", "runner.max_steps=1")
    score, actor = "critic/hf/model.safetensors:score.weight", "hf/model.safetensors:model.norm.weight"
    for name, word, changes in [
        ("lambda", "algorithm.gae_lambda=0.5", {score, actor}),
        ("gamma", "algorithm.gamma=0.9", {score, actor}),
        ("clip", "critic.value_clip=null", {score}),
        ("lr", "critic.optim.lr=0.02", {score}),
        ("seed", "critic.seed=7", {score, actor}),
        ("white", "algorithm.normalize_advantages=false", {actor}),
        ("aggregation", "algorithm.loss_agg_func=seq-mean-token-mean", {score, actor}),
    ]:
        other, _ = weights_after(tmp_path, name, "runner.max_steps=1", word)
        assert {n for n in (score, actor) if not np.array_equal(plain[n], other[n])} == changes, name


@pytest.mark.slow
def test_kl_in_the_reward_reaches_the_value_targets(tmp_path: Path) -> None:
    words = ["runner.max_steps=2", "algorithm.kl_beta=5", "algorithm.kl_penalty_type=k2", "algorithm.kl_in=reward"]
    _, metrics = weights_after(tmp_path, "kl", *words, "runner.save_interval=1", "runner.keep_checkpoints=0")
    paid = [m["critic/return_mean"] for m in metrics if m["step"]]
    assert json.dumps(paid) and paid[1] < -1  # in the second step the policy has moved away from the reference
