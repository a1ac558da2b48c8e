"""What the optimizer steps of one global batch become in the log."""

from __future__ import annotations

import math
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from rlinf.algorithms.objective import MetricSums
from rlinf.config.schema import Config
from rlinf.metrics.names import undocumented
from rlinf.training.engine import Update
from rlinf.training.publishing import HandedOut
from rlinf.workers.actor import ActorWorker, step_metrics

NAMES = ("loss", "tokens", "entropy", "ratio", "clipped", "dual_clipped", "approx_kl", "gap", "gap_tokens")


def update(loss: float, tokens: float, ratio: float, gap: float, norm: float, skipped: bool = False, scale: float | None = None) -> Update:
    """A mini-batch of so many tokens of this ratio."""
    sums = dict.fromkeys(NAMES, 0.0) | {"loss": loss, "tokens": tokens, "ratio": ratio * tokens, "gap": gap * tokens, "gap_tokens": tokens}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
    return Update(MetricSums(tensors, {"gap": torch.tensor(2 * gap)}), norm, 1e-3, skipped, {}, scale)


def test_means_are_over_the_tokens_of_all_mini_batches_and_the_norm_over_the_steps_that_were_made() -> None:
    """10 tokens of ratio 1 and 30 of ratio 2: 70 / 40; the third mini-batch, of 10 tokens of ratio 9, was not stepped: 160 / 50."""
    updates = [update(1.0, 10, 1.0, 0.1, 4.0), update(3.0, 30, 2.0, 0.2, 2.0), update(5.0, 10, 9.0, 0.4, math.nan, skipped=True)]
    found = step_metrics(updates)
    assert step_metrics(updates[:2])["train/ratio"] == pytest.approx(1.75) and found["train/ratio"] == pytest.approx(3.2)
    assert found["train/loss"] == pytest.approx(3.0)  # the mean of the mini-batches' losses
    assert (found["train/grad_norm"], found["train/minibatches_skipped"], found["train/first_minibatch_ratio"]) == (3.0, 1.0, 1.0)
    assert found["train/rollout_logprob_gap_mean"] == pytest.approx((1 + 6 + 4) / 50) and found[
        "train/rollout_logprob_gap_max"
    ] == pytest.approx(0.8)
    assert math.isnan(step_metrics(updates[2:])["train/grad_norm"]) and undocumented(set(found)) == []


def test_the_first_mini_batch_is_the_first_with_tokens_and_a_step_without_any_has_no_means() -> None:
    empty = update(0.0, 0, 0.0, 0.0, math.nan, skipped=True)
    found = step_metrics([empty, update(3.0, 30, 2.0, 0.2, 2.0), update(1.0, 10, 1.0, 0.1, 4.0)])
    assert found["train/first_minibatch_ratio"] == 2.0 and found["train/ratio"] == pytest.approx(1.75)
    nothing = step_metrics([empty, empty])
    assert nothing["train/minibatches_skipped"] == 2 and nothing["train/loss"] == nothing["train/tokens"] == 0
    assert all(
        math.isnan(nothing[f"train/{name}"]) for name in ("entropy_loss", "ratio", "first_minibatch_ratio", "rollout_logprob_gap_max")
    )


def test_the_loss_scale_is_logged_where_there_is_one() -> None:
    scaled = step_metrics([update(1.0, 1, 1.0, 0.0, 1.0, scale=2.0**16), update(1.0, 1, 1.0, 0.0, 1.0, scale=2.0**15)])
    assert scaled["train/loss_scale"] == 2.0**15 and undocumented(set(scaled)) == []
    assert "train/loss_scale" not in step_metrics([update(1.0, 1, 1.0, 0.0, 1.0)])


def test_weights_are_brought_back_to_be_published_before_the_first_step() -> None:
    """An actor leaves a GPU for its engines to start; the rest of it stays away."""
    worker, called = ActorWorker.__new__(ActorWorker), Mock()
    worker.offloader, worker.publisher = called.offloader, called.publisher
    called.publisher.hand_out.return_value = HandedOut({"auto": None})
    (sources, _), _ = worker.publish(0, ("auto",))
    assert [name for name, *_ in called.mock_calls] == ["offloader.after_training", "offloader.before_forward", "publisher.hand_out"]
    assert sources == {"auto": None} and not worker.feeds_nobody


@pytest.mark.parametrize(
    ("adv_type", "feeds_nobody", "freed"),
    [("gae", False, ["after_training"]), ("grpo", False, []), ("gae", True, ["after_training", "after_publishing"])],
)
def test_after_its_training_an_actor_makes_room_for_a_critic(
    monkeypatch: pytest.MonkeyPatch, adv_type: str, feeds_nobody: bool, freed: list[str]
) -> None:
    """Which may be trained on the same device before weights are published; these stay, unless the rank publishes to nobody."""
    worker, called = ActorWorker.__new__(ActorWorker), Mock()
    worker.config, worker.offloader, worker.publisher, worker.feeds_nobody = Config(), called.offloader, called.publisher, feeds_nobody
    worker.device = torch.device("cpu")
    worker.config.algorithm.adv_type = adv_type
    monkeypatch.setattr(worker, "_train", called.train)
    monkeypatch.setattr("rlinf.workers.actor.profiled", lambda *_: nullcontext())
    called.train.return_value = ("report", {})
    assert worker.train_step(1, Mock(), Mock()) == ("report", {})
    assert [name for name, *_ in called.mock_calls] == ["publisher.withdraw", "train", *(f"offloader.{name}" for name in freed)]


@pytest.mark.parametrize(("device", "offload", "free"), [("cpu", True, True), ("cpu", False, False), ("cuda", True, False)])
def test_what_engines_read_is_freed_while_the_actor_trains_where_that_is_the_memory_to_save(
    device: str, offload: bool, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it is memory of the host, whose pages cost much to get again."""
    worker, called = ActorWorker.__new__(ActorWorker), Mock()
    worker.config, worker.publisher, worker.feeds_nobody, worker.device = Config(), called.publisher, False, torch.device(device)
    worker.config.rollout.offload = offload
    monkeypatch.setattr(worker, "_train", lambda *_: ("report", {}))
    monkeypatch.setattr("rlinf.workers.actor.profiled", lambda *_: nullcontext())
    worker.train_step(1, Mock(), Mock())
    called.publisher.withdraw.assert_called_once_with(free=free)
