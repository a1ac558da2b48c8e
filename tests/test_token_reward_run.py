"""Whole runs with a token reward model: what it says is paid, in any layout, and nothing of it is trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlinf.metrics.names import undocumented
from tests.test_call_budget import calls_of
from tests.tiny import make_tiny_model
from tests.tiny_run import STEPS, lines, run, write_run

ONE_PROCESS = dict(
    cluster__backend="local", cluster__num_gpus_per_node=1, cluster__component_placement={"actor,token_reward,rollout,reward": "0"},
    actor__model__tensor_model_parallel_size=1, actor__model__pipeline_model_parallel_size=1,
)  # fmt: skip


def write_scorer(folder: Path) -> dict[str, object]:
    """A token classification model with two labels; the section that names it."""
    make_tiny_model(folder, "qwen2-tied", seed=9)
    tensors = load_file(folder / "model.safetensors")
    hidden = tensors["model.norm.weight"].shape[0]
    head = {"score.weight": torch.randn(2, hidden, generator=torch.Generator().manual_seed(0)), "score.bias": torch.tensor([0.5, -0.5])}
    save_file(tensors | head, folder / "model.safetensors", metadata={"format": "pt"})
    return {"model_dir": str(folder), "model": {"precision": "fp32"}, "weight": 20.0, "output": "probability"}


def advantages(folder: Path, name: str) -> dict[str, float]:
    """Of the samples of the first step, as training saw them."""
    rows = [json.loads(line) for line in (folder / "logs" / name / "samples" / "tokens_000001.jsonl").read_text().splitlines()]
    return {row["sample_id"]: row["advantage"] for row in rows}


def test_scores_are_paid_within_the_budget_of_remote_calls(tmp_path: Path) -> None:
    """All random answers are wrong, so that without the scores every advantage would be 0.

    One call a step; a checkpoint holds nothing of the model.
    """
    config = write_run(
        tmp_path,
        token_reward=write_scorer(tmp_path / "scorer"),
        reward__own_parts={},
        rollout__verify_weights_every=0,
        runner__val_check_interval=0,
        **ONE_PROCESS,
    )
    calls = calls_of(config, tmp_path)
    assert calls["token_reward"] == {"scores": STEPS} and sum(calls["actor"].values()) <= 3 * STEPS + 3 + 6
    steps = lines(tmp_path)
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1)) and undocumented({n for m in steps for n in m} - {"step", "time"}) == []
    for m in steps:
        assert (
            0 < m["rollout/token_reward_min"] < m["rollout/token_reward_mean"] < m["rollout/token_reward_max"] < 1
            and m["time/token_rewards"] > 0
        )
        assert m["rollout/rewards"] == -5 and m["train/grad_norm"] > 0 and math.isfinite(m["train/loss"])
    paid = advantages(tmp_path, "tiny")
    assert len(paid) == 16 and all(paid.values())
    latest = (tmp_path / "logs" / "tiny" / "checkpoints" / "latest").resolve()
    assert sorted(p.name for p in latest.iterdir() if p.is_dir()) == ["actor", "hf"]


def test_a_teacher_has_nothing_to_say_to_its_own_copy_and_draws_another_policy_to_itself(tmp_path: Path) -> None:
    """The first step of a run whose teacher is its start model has no gradient; another teacher's mean score rises."""
    make_tiny_model(tmp_path / "other", "qwen2-tied", layers=4, heads=4, kv_heads=2, seed=9)
    teacher = {"output": "teacher", "model": {"precision": "fp32"}}
    config = write_run(
        tmp_path, token_reward=teacher, rollout__verify_weights_every=0, runner__val_check_interval=0, runner__save_interval=0,
        reward__reward_scale=0, reward__own_parts={}, **ONE_PROCESS,
    )  # fmt: skip
    words = ["algorithm.adv_type=reinforce++", "algorithm.gamma=0", "algorithm.dense_rewards=true", "algorithm.normalize_advantages=false"]
    copied = run(config, *words, f"token_reward.model_dir={tmp_path / 'model'}", "runner.max_steps=1")
    assert copied.returncode == 0, copied.stderr[-4000:]
    (m,) = lines(tmp_path)
    assert all(abs(m[f"rollout/token_reward_{name}"]) < 1e-4 for name in ("mean", "max", "min")) and m["train/grad_norm"] < 1e-4
    words += [f"token_reward.model_dir={tmp_path / 'other'}", "runner.experiment_name=drawn", "runner.max_steps=8", "actor.optim.lr=3e-3"]
    drawn = run(config, *words)
    assert drawn.returncode == 0, drawn.stderr[-4000:]
    scores = [m["rollout/token_reward_mean"] for m in lines(tmp_path, "drawn")]
    assert scores[0] < -0.02 and sum(scores[-2:]) / 2 > 0.7 * scores[0]  # minus a divergence: towards 0


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True], ids=["one score a response", "dense"])
def test_layouts_of_actor_and_model_do_not_matter(tmp_path: Path, dense: bool) -> None:
    """Under Ray with an actor of two data-parallel ranks and a model of two stages, and in one process: the same advantages."""
    scorer, words = write_scorer(tmp_path / "scorer"), ["runner.max_steps=1"]
    words += ["algorithm.adv_type=reinforce++", "algorithm.dense_rewards=true", "token_reward.weight=0.5"] if dense else []
    here = write_run(tmp_path, "here", token_reward=scorer, runner__save_interval=0, runner__val_check_interval=0, **ONE_PROCESS)
    there = write_run(
        tmp_path, "there", token_reward=scorer | {"model": {"precision": "fp32", "pipeline_model_parallel_size": 2}},
        cluster__num_gpus_per_node=3, cluster__component_placement={"actor": "0-1", "token_reward": "1-2", "rollout,reward": "0"},
        runner__save_interval=0, runner__val_check_interval=0,
        actor__model__tensor_model_parallel_size=1, actor__model__pipeline_model_parallel_size=1,
    )  # fmt: skip
    for config in (here, there):
        done = run(config, *words, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = advantages(tmp_path, "here"), advantages(tmp_path, "there")
    assert one.keys() == two.keys() and len(set(one.values())) > 8
    assert all(two[name] == pytest.approx(value, rel=2e-3, abs=1e-3) for name, value in one.items())  # written with four digits
    a, b = lines(tmp_path, "here")[-1], lines(tmp_path, "there")[-1]
    same = ("rollout/token_reward_mean", "rollout/token_reward_max", "rollout/token_reward_min", "train/loss", "train/grad_norm")
    assert all(a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6) for name in same)
