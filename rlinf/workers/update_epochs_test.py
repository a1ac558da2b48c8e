"""The actor's and the critic's share of a step, as the runner asks for it: all optimizer steps of several passes over the samples, in every
layout, against plain transformers and torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from rlinf.checks.layout import METRIC_TOLERANCE, ROUNDING, WEIGHT_TOLERANCE, deviations, norm, worst
from rlinf.checks.layout_reference import (
    DUAL_CLIP,
    IMPORTANCE_LIMIT,
    OPTIM,
    SETTINGS,
    TEMPERATURE,
    VALUE_CLIP,
    Batch,
    Expected,
    make_batch,
    plain_steps,
)
from rlinf.checks.tiny_model import VOCAB, write_tiny_model
from rlinf.config.schema import ActorModelConfig, Config
from rlinf.data.packing import build_rank_batches
from rlinf.data.token_values import DumpPlan
from rlinf.scheduling.placement import WorkerAddress

EPOCHS = 3
LAYOUTS = [(2, 1, 1, 60), (4, 2, 2, 45)]  # ranks, TP, PP, budget


def configured(folder: Path, tp: int, pp: int, role: str) -> Config:
    """The objective of rlinf.checks.layout_reference as a configuration."""
    config = Config()
    config.cluster.device, config.rollout.model_dir = "cpu", str(folder)
    section, algorithm = getattr(config, role), config.algorithm
    section.model, section.optim = ActorModelConfig(tp, pp, precision="fp32"), OPTIM
    algorithm.update_epochs, algorithm.n_minibatches, algorithm.early_stop_imp_ratio = EPOCHS, 2, None
    algorithm.sampling_params.temperature = TEMPERATURE
    algorithm.clip_ratio_low, algorithm.clip_ratio_high, algorithm.clip_ratio_c = SETTINGS.clip_low, SETTINGS.clip_high, DUAL_CLIP
    algorithm.kl_beta, algorithm.entropy_bonus = SETTINGS.kl_beta, SETTINGS.entropy_bonus
    algorithm.importance_sampling_fix, algorithm.importance_sampling_clip = True, IMPORTANCE_LIMIT
    config.critic.value_clip = VALUE_CLIP
    return config


def trained(at: Any, folder: Path, batch: Batch, budget: int, role: str, dump: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """What a rank reports, and its part of the weights afterwards."""
    from rlinf.workers.actor import ActorWorker
    from rlinf.workers.critic import CriticWorker

    config = configured(folder, at.tp, at.pp, role)
    share = build_rank_batches(
        [g.header() for g in batch.groups], batch.advantages, dp=at.dp, n_minibatches=2, max_tokens=budget, share_prefix=True
    )[at.dp_rank]
    groups = [next(g for g in batch.groups if g.group_id == name) for name in share.group_ids]
    address = WorkerAddress(role, 0, 1, 0, (0,), "127.0.0.1", 0, "run", 1)  # the ranks of the pool have joined each other already
    if role == "actor":
        actor = ActorWorker(address, config)
        actor.__dict__["tokenizer"] = mock.Mock(pieces=lambda ids: [str(i) for i in ids])
        report, _ = actor.train_step(1, DumpPlan(dump, frozenset()), share, *groups)
        engine = actor.engine
    else:
        with mock.patch("rlinf.workers.critic.with_value_head", lambda tensors, *_: tensors):  # the reference has a head already
            critic = CriticWorker(address, config)
        looked_at, _ = critic.values(share, *groups)
        targets = {  # as in the reference: a sample's target is its advantage
            s.sample_id: np.full(len(s), a, np.float32) for g, of in zip(batch.groups, batch.advantages) for s, a in zip(g.samples, of)
        }
        report, engine = critic.train_step(1, targets), critic.engine
        assert report.flops["critic_update"] == pytest.approx(EPOCHS * 3 * looked_at.flops["values"])
    weights = {name: tensor.numpy().copy() for name, tensor in engine.export("param")}
    return report.metrics, weights if at.leads and not at.dp_rank else {}


def check_weights(got: dict[str, np.ndarray], expected: Expected) -> None:
    want = expected.steps[-1].weights
    moved = {name: w - expected.start[name] for name, w in want.items()}
    deviation, name = worst(deviations(got, want, moved, {k: len(expected.steps) * ROUNDING * norm(v) for k, v in want.items()}))
    assert deviation <= WEIGHT_TOLERANCE, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_policy_after_several_passes_is_that_of_transformers(
    rank_pool: Any, tiny_models: dict[str, Path], tmp_path: Path, layout: tuple[int, int, int, int]
) -> None:
    """pi_old stays what it was before the first pass, for the first mini-batch too, whose own forward pass it comes from."""
    (ranks, tp, pp, budget), folder, batch, dump = layout, tiny_models["qwen2-tied"], make_batch(VOCAB), tmp_path / "tokens.jsonl"
    expected = plain_steps(folder, batch, epochs=EPOCHS)
    answers = rank_pool.run(trained, folder, batch, budget, "actor", str(dump), ranks=ranks, tp=tp, pp=pp)
    check_weights({name: w for _, weights in answers for name, w in weights.items()}, expected)
    steps = [step.metrics for step in expected.steps]
    assert len(steps) == 2 * EPOCHS and steps[2]["train/ratio"] != pytest.approx(1, abs=1e-3)  # the second pass over the first mini-batch
    tokens = np.array([m["train/tokens"] for m in steps])
    for metrics, _ in answers:
        assert metrics["train/tokens"] == tokens.sum() and metrics["train/minibatches_skipped"] == 0
        assert metrics["train/loss"] == pytest.approx(np.mean([m["train/loss"] for m in steps]), abs=METRIC_TOLERANCE)
        for name in ("ratio", "clip_fraction", "approx_kl", "kl_loss", "entropy_loss", "rollout_logprob_gap_mean"):
            mean = np.dot([m[f"train/{name}"] for m in steps], tokens) / tokens.sum()
            assert metrics[f"train/{name}"] == pytest.approx(mean, abs=METRIC_TOLERANCE), name
        assert metrics["train/first_minibatch_ratio"] == 1
    rows = {row["sample_id"]: row for row in map(json.loads, dump.read_text().splitlines())}  # each sample once, as the first pass saw it
    first = {s.sample_id for g in batch.minibatches[0][0] for s in g.samples if s.loss_mask.any()}
    assert sorted(rows) == sorted(s.sample_id for g in batch.groups for s in g.samples)
    assert all(rows[name]["ratio_mean"] == 1 for name in first)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_critic_after_several_passes_is_that_of_transformers(rank_pool: Any, tmp_path: Path, layout: tuple[int, int, int, int]) -> None:
    """Old values and targets stay those of before the first pass."""
    (ranks, tp, pp, budget), batch = layout, make_batch(VOCAB)
    folder = write_tiny_model(tmp_path / "critic", "qwen2-tied", head="scalar")
    expected = plain_steps(folder, batch, "scalar", epochs=EPOCHS)
    answers = rank_pool.run(trained, folder, batch, budget, "critic", "", ranks=ranks, tp=tp, pp=pp)
    check_weights({name: w for _, weights in answers for name, w in weights.items()}, expected)
    loss = np.mean([step.metrics["critic/loss"] for step in expected.steps])
    for metrics, _ in answers:
        assert metrics["critic/loss"] == pytest.approx(loss, rel=METRIC_TOLERANCE) and metrics["critic/minibatches_skipped"] == 0
