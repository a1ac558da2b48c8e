"""Supervised fine-tuning in every layout is masked cross-entropy in plain transformers: loss, gradients and held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlinf.algorithms.supervised import loss_weights_S
from rlinf.checks.layout import GRADIENT_TOLERANCE, deviations, worst
from rlinf.checks.layout_reference import OPTIM
from rlinf.checks.tiny_model import VOCAB
from rlinf.config.schema import ActorModelConfig, Config
from rlinf.data.examples import example
from rlinf.data.packing import build_rank_batches
from rlinf.data.records import Group
from rlinf.scheduling.placement import WorkerAddress

SHAPES = ((5, 3), (1, 6), (9, 2), (4, 1), (7, 16), (3, 8), (12, 5))  # prompt and response lengths
LAYOUTS = [(1, 1, 1, False), (3, 1, 1, False), (2, 2, 1, True), (2, 1, 2, False), (4, 2, 2, True), (4, 2, 1, False)]  # ranks, TP, PP, SP
TP, PP, SP = 1, 2, 3
ADDRESS = WorkerAddress("actor", 0, 1, 0, (0,), "127.0.0.1", 0, "run", 1)  # the ranks of the pool have joined each other already


def examples() -> list[Group]:
    """Random ones; two share a start of twenty tokens, which is packed once."""
    rng = np.random.default_rng(0)
    tokens = lambda n: rng.integers(0, VOCAB, n).astype(np.int32)
    common = tokens(20)
    prompts = [tokens(p) if i < 5 else np.concatenate([common, tokens(p)]) for i, (p, _) in enumerate(SHAPES)]
    return [example(f"e{i}", prompt, tokens(r)) for i, (prompt, (_, r)) in enumerate(zip(prompts, SHAPES))]


def plain_losses(folder: Path, groups: list[Group]) -> tuple[dict[str, torch.nn.Parameter], list[torch.Tensor], int]:
    """Parameters, the summed cross-entropy of each response, computed alone, and the number of response tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager")
    losses = []
    for group in groups:
        prompt, response = (torch.from_numpy(ids.astype(np.int64)) for ids in (group.prompt.token_ids, group.samples[0].token_ids))
        ids = torch.cat([prompt, response])[None]
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        losses.append(F.cross_entropy(model(ids).logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"))
    return dict(model.named_parameters()), losses, sum(len(g.samples[0]) for g in groups)


def step(at: Any, folder: Path, groups: list[Group], layout: tuple[Any, ...], budget: int, reweighting: str | None) -> dict[str, Any]:
    """One optimizer step as the runner asks for it, inside a rank."""
    from rlinf.workers.sft import SftWorker

    config = Config()
    config.cluster.device, config.rollout.model_dir, config.actor.optim = "cpu", str(folder), OPTIM
    config.actor.model = ActorModelConfig(layout[TP], layout[PP], layout[SP], precision="fp32")
    config.sft.reweighting, config.sft.reweighting_temperature = reweighting, 0.5
    worker = SftWorker(ADDRESS, config)
    headers = [g.header() for g in groups]
    share = build_rank_batches(
        headers, [np.ones(1, np.float32)] * len(groups), dp=at.dp, n_minibatches=1, max_tokens=budget, share_prefix=True
    )[at.dp_rank]
    mine = [next(g for g in groups if g.group_id == name) for name in share.group_ids]
    before = worker.validate(share, *mine)
    report = worker.train_step(1, share, *mine)
    grads = {name: t.numpy().copy() for name, t in worker.engine.export("exp_avg")}  # beta1 is 0: the first moment is the gradient
    return {"before": before, "metrics": report.metrics, "grads": {} if at.tp_rank or at.dp_rank else grads}


@pytest.mark.parametrize("reweighting", [None, "lin_upper"])
@pytest.mark.parametrize(("layout", "budget"), list(zip(LAYOUTS, (512, 40, 30, 45, 40, 64))))
def test_a_step_is_masked_cross_entropy_in_any_layout(
    rank_pool: Any, tiny_models: dict[str, Path], layout: tuple[Any, ...], budget: int, reweighting: str | None
) -> None:
    folder, groups = tiny_models["qwen2-tied"], examples()
    params, sums, tokens = plain_losses(folder, groups)
    token_mean = sum(sums) / tokens
    if reweighting:
        means = torch.stack([s / len(g.samples[0]) for s, g in zip(sums, groups)])
        objective = (loss_weights_S(means, reweighting, 0.5) * means).sum()
        assert abs(objective.item() - token_mean.item()) > 1e-3  # it is another loss
    else:
        objective = token_mean
    objective.backward()
    expected = {name: p.grad.numpy() for name, p in params.items()}

    ranks = rank_pool.run(step, folder, groups, layout, budget, reweighting, ranks=layout[0], tp=layout[TP], pp=layout[PP])
    for rank in ranks:
        assert rank["metrics"]["sft/loss"] == pytest.approx(token_mean.item(), rel=1e-6)
        assert rank["metrics"]["sft/objective"] == pytest.approx(objective.item(), rel=1e-6)
        assert rank["before"]["sft/val_loss"] == pytest.approx(token_mean.item(), rel=1e-6)
        assert rank["metrics"]["sft/tokens"] == tokens and rank["metrics"]["sft/skipped"] == 0
    got = {name: grad for rank in ranks for name, grad in rank["grads"].items()}
    deviation, name = worst(deviations(got, expected, expected))
    assert deviation <= GRADIENT_TOLERANCE, name


def weights_by_step(at: Any, folder: Path, groups: list[Group]) -> list[list[float]]:
    from rlinf.algorithms.supervised import loss_weights_S
    from rlinf.workers import sft

    seen: list[str] = []

    def spy(losses: torch.Tensor, shape: str, temperature: float) -> torch.Tensor:
        seen.append(shape)
        return loss_weights_S(losses, shape, temperature)

    config = Config()
    config.sft.reweighting, config.sft.reweighting_burn_in = "extremes", 2
    config.cluster.device, config.rollout.model_dir, config.actor.model.precision = "cpu", str(folder), "fp32"
    with mock.patch.object(sft, "loss_weights_S", spy):
        worker = sft.SftWorker(ADDRESS, config)
        share = build_rank_batches(
            [g.header() for g in groups], [np.ones(1)] * len(groups), dp=1, n_minibatches=1, max_tokens=512, share_prefix=True
        )[0]
        for number in (1, 2, 3):
            worker.train_step(number, share, *groups)
    return seen


def test_examples_weigh_the_same_during_burn_in(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    (seen,) = rank_pool.run(weights_by_step, tiny_models["llama"], examples(), ranks=1)
    assert seen == ["uniform", "uniform", "extremes"]
