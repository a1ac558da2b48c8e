"""Runs of a model with a mixture of experts: every expert reaches the engines, is trained and saved, and the run goes on in any layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlinf.weights.tensor_folder import open_hf_folder
from tests.tiny_run import ONE_PROCESS, lines, repeat_the_last_step, run, write_run


def test_experts_are_trained_published_saved_and_go_on(tmp_path: Path) -> None:
    config = write_run(
        tmp_path, family="qwen3-moe", algorithm__kl_beta=0.05, algorithm__entropy_bonus=0.1, rollout__verify_weights_every=1, **ONE_PROCESS
    )
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics, run_dir = lines(tmp_path), tmp_path / "logs" / "tiny"
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert all(m["train/grad_norm"] > 0 and m["train/rollout_logprob_gap_max"] <= 1e-4 for m in metrics[1:])
    assert all(1 <= m["train/expert_load_max"] <= 4 and 0 <= m["train/experts_unused"] < 1 for m in metrics[1:])  # a token has 2 of 8
    assert max(m["sync/probe_gap_max"] for m in metrics if "sync/probe_gap_max" in m) <= 1e-4
    step_dir = run_dir / "checkpoints" / "step_000003"
    start, now = open_hf_folder(tmp_path / "model"), open_hf_folder(step_dir / "hf")
    assert set(start) == set(now)
    assert all((start[name].float() != now[name].float()).any() for name in start if ".mlp." in name)  # the router, and every expert

    repeat_the_last_step(config, tmp_path)


@pytest.mark.slow
def test_experts_divided_among_ranks_and_the_same_run_in_another_layout(tmp_path: Path) -> None:
    settings = dict(family="qwen3-moe", algorithm__entropy_bonus=0.1, rollout__verify_weights_every=1)
    config = write_run(tmp_path, **settings)
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = lines(tmp_path)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert all(m["train/rollout_logprob_gap_max"] <= 1e-4 and m["train/grad_norm"] > 0 for m in metrics[1:])
    again = run(
        config,
        f"runner.resume_dir={tmp_path / 'logs' / 'tiny' / 'checkpoints' / 'step_000002'}",
        "actor.model.pipeline_model_parallel_size=1",
        "actor.model.sequence_parallel=true",
    )
    assert again.returncode == 0, again.stderr[-4000:]
    third, repeated = metrics[3], lines(tmp_path)[3]
    assert repeated["train/loss"] == pytest.approx(third["train/loss"], abs=1e-5)
    assert repeated["train/grad_norm"] == pytest.approx(third["train/grad_norm"], rel=1e-3)
