"""GAE, whitening and the value loss, against numbers worked out by hand and against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlinf.algorithms.advantages import whiten
from rlinf.algorithms.aggregation import Denominators
from rlinf.algorithms.values import (
    ValueSettings,
    ValueTokens,
    finalize_value_metrics,
    gae,
    moments,
    token_advantages,
    value_objective,
    whiten_tokens,
)

VALUES = np.array([0.2, 0.4, 0.5], np.float32)
ALONE = lambda numbers: numbers  # one rank


@pytest.mark.parametrize(
    ("reward", "lam", "expected"),
    [
        (1.0, 0.95, [0.74625, 0.5750, 0.5000]),
        (1.0, 1.0, [0.8, 0.6, 0.5]),
        (-1.0, 0.95, [-1.05875, -1.3250, -1.5000]),
        (-1.0, 1.0, [-1.2, -1.4, -1.5]),
        (0.0, 0.95, [-0.15625, -0.3750, -0.5000]),
        (0.0, 1.0, [-0.2, -0.4, -0.5]),
    ],
)
def test_gae_of_a_finished_response(reward: float, lam: float, expected: list[float]) -> None:
    assert gae(np.array([0.0, 0.0, reward]), VALUES, 1.0, lam) == pytest.approx(expected, abs=1e-6)


def test_gae_discounts() -> None:
    """gamma 0.9, lambda 0.5, reward 1: delta = [0.16, 0.05, 0.5]; A_2 = 0.5, A_1 = 0.05 + 0.45 * 0.5, A_0 = 0.16 + 0.45 * A_1."""
    assert gae(np.array([0.0, 0.0, 1.0]), VALUES, 0.9, 0.5) == pytest.approx([0.28375, 0.275, 0.5], abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), n=st.integers(1, 12), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_is_the_sum_it_is_defined_as(data: st.DataObject, n: int, gamma: float, lam: float) -> None:
    numbers = arrays(np.float64, n, elements=st.floats(-5, 5))
    rewards, values = data.draw(numbers), data.draw(numbers)
    deltas = rewards + gamma * np.append(values[1:], 0.0) - values
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
    np.testing.assert_allclose(gae(rewards, values, gamma, lam), expected, atol=1e-9)


def test_without_discount_the_value_target_is_the_reward() -> None:
    """gamma = lambda = 1: A_t = R - V_t."""
    advantages = token_advantages(3.0, VALUES, np.ones(3, np.uint8), 1.0, 1.0)
    assert advantages + VALUES == pytest.approx([3.0, 3.0, 3.0])


def test_tokens_of_the_environment_are_no_steps() -> None:
    """As if they were not there; the reward comes with the last token that the policy sampled."""
    mask = np.array([0, 1, 0, 1, 1, 0], np.uint8)
    values = np.array([9.0, 0.2, 9.0, 0.4, 0.5, 9.0], np.float32)
    out = token_advantages(1.0, values, mask, 1.0, 0.95)
    assert out[mask == 1] == pytest.approx([0.74625, 0.5750, 0.5000]) and not out[mask == 0].any()
    assert not token_advantages(1.0, values, np.zeros(6, np.uint8), 1.0, 0.95).any()


def test_whitening_of_two_responses() -> None:
    """Tokens [1, 1, 0, 0, 0]: mean 0.4, population variance 0.24."""
    white = whiten_tokens([np.ones(2), np.zeros(3)], [np.ones(2), np.ones(3)], ALONE)
    assert white[0] == pytest.approx([1.2247] * 2, abs=1e-4) and white[1] == pytest.approx([-0.8165] * 3, abs=1e-4)


def test_whitening_of_constant_responses_is_that_of_outcome_advantages() -> None:
    advantages, lengths = np.array([2.0, -1.0, 0.5]), np.array([3.0, 1.0, 4.0])
    tokens = whiten_tokens([np.full(int(n), a) for a, n in zip(advantages, lengths)], [np.ones(int(n)) for n in lengths], ALONE)
    assert [t[0] for t in tokens] == pytest.approx(whiten(advantages, lengths).tolist())


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 6))
def test_whitening_does_not_depend_on_who_holds_what(seed: int, cut: int) -> None:
    """Two ranks, in lockstep: what the second one adds to each sum is known from a run of its own."""
    rng = np.random.default_rng(seed)
    advantages = [rng.normal(3, 2, n) for n in rng.integers(1, 9, 6)]
    masks = [(rng.random(len(a)) < 0.7).astype(np.uint8) for a in advantages]
    whole = whiten_tokens(advantages, masks, ALONE)
    together = iter(recorded_sums(advantages, masks))
    halves = whiten_tokens(advantages[:cut], masks[:cut], lambda _: next(together))
    for a, b in zip(halves, whole):
        np.testing.assert_array_equal(a, b)
    counted = np.concatenate([w[m == 1] for w, m in zip(whole, masks)])
    assert counted.mean() == pytest.approx(0.0, abs=1e-9) if len(counted) else True
    assert all(not w[m == 0].any() for w, m in zip(whole, masks))


def recorded_sums(advantages: list[np.ndarray], masks: list[np.ndarray]) -> list[np.ndarray]:
    sums: list[np.ndarray] = []
    whiten_tokens(advantages, masks, lambda s: sums.append(s) or s)
    return sums


def test_moments_of_nothing_are_zero() -> None:
    assert moments([], ALONE) == (0.0, 0.0, 0.0)


# ---- the value loss -----------------------------------------------------------------------------------------------------------------


def tokens(values: list[float], old: list[float], returns: list[float], mask: list[int] | None = None, samples: list[int] | None = None) -> ValueTokens:
    samples = samples or [0] * len(values)
    return ValueTokens(
        torch.tensor(values, requires_grad=True), torch.tensor(old), torch.tensor(returns), torch.tensor(mask or [1] * len(values)),
        torch.tensor(samples), max(samples) + 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (0.1, 0.0, 1.0, 0.405, -0.9),  # within the clip range: (V - R)^2 / 2
        (0.5, 0.0, 1.0, 0.32, 0.0),  # moved towards the target beyond 0.2: (0.2 - 1)^2 / 2, and no gradient
        (-0.5, 0.0, 1.0, 1.125, -1.5),  # moved away from it: the worse of the two counts, with its gradient
        (0.5, 0.0, 0.1, 0.08, 0.4),  # overshot: the distance from the value itself is the larger one
    ],
)
def test_value_clipping(value: float, old: float, target: float, loss: float, gradient: float) -> None:
    batch = tokens([value], [old], [target])
    got, _ = value_objective(batch, Denominators(1, 1), ValueSettings("token-mean", 0.2, 16))
    got.backward()
    assert got.item() == pytest.approx(loss) and batch.values_N.grad.item() == pytest.approx(gradient)


def test_without_clipping_the_loss_is_half_the_squared_error() -> None:
    batch = tokens([0.5], [0.0], [1.0])
    got, metrics = value_objective(batch, Denominators(1, 1), ValueSettings("token-mean", None, 16))
    assert got.item() == pytest.approx(0.125) and metrics.sums["clipped"].item() == 0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("token-mean", 10 / 6), ("seq-mean-token-mean", 1.5), ("seq-mean-token-sum", 5.0), ("seq-mean-token-sum-norm", 0.625)],
)
def test_the_value_loss_aggregates_as_the_policy_loss(mode: str, expected: float) -> None:
    """Token losses [1, 1] and [2, 2, 2, 2], L_max = 8."""
    error = [2**0.5] * 2 + [2.0] * 4
    batch = tokens(error, error, [0.0] * 6, samples=[0, 0, 1, 1, 1, 1])
    loss, _ = value_objective(batch, Denominators(6, 2), ValueSettings(mode, 0.5, 8))
    assert loss.item() == pytest.approx(expected)


def test_parts_of_a_mini_batch_add_up_and_masked_tokens_do_not_count() -> None:
    """10 tokens of loss 1 in one micro-batch and 30 of loss 2 in another: 70 / 40."""
    settings_, denominators = ValueSettings("token-mean", None, 16), Denominators(40, 4)
    one = tokens([2**0.5] * 10 + [float("nan")], [0.0] * 11, [0.0] * 11, mask=[1] * 10 + [0])
    two = tokens([2.0] * 30, [0.0] * 30, [0.0] * 30)
    (a, left), (b, right) = (value_objective(t, denominators, settings_) for t in (one, two))
    assert a.item() + b.item() == pytest.approx(1.75)
    assert finalize_value_metrics(left + right)["critic/loss"] == pytest.approx(1.75)
    a.backward()
    assert one.values_N.grad[-1] == 0


def test_metrics_of_a_good_and_a_useless_critic() -> None:
    settings_ = ValueSettings("token-mean", 0.2, 16)
    returns = [1.0, -1.0, 1.0, 3.0]
    read = lambda old: finalize_value_metrics(value_objective(tokens(old, old, returns), Denominators(4, 1), settings_)[1])
    good, shifted, useless = read(returns), read([r - 2 for r in returns]), read([1.0] * 4)
    assert good["critic/explained_variance"] == pytest.approx(1.0) and good["critic/value_error"] == 0
    assert shifted["critic/explained_variance"] == pytest.approx(1.0) and shifted["critic/value_error"] == pytest.approx(2.0)
    assert useless["critic/explained_variance"] == pytest.approx(0.0) and useless["critic/value_error_max"] == pytest.approx(2.0)
    assert useless["critic/return_mean"] == pytest.approx(1.0) and useless["critic/value_mean"] == pytest.approx(1.0)
    same = finalize_value_metrics(value_objective(tokens([0.0], [0.0], [5.0]), Denominators(1, 1), settings_)[1])
    assert np.isnan(same["critic/explained_variance"])  # returns that are all equal have no variance to explain
