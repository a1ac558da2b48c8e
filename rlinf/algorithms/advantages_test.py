"""Published values and laws of the outcome advantages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlinf.algorithms.advantages import ADVANTAGES, COMPARING, centred, grpo, outcome_advantages, rloo, whiten

NEAR = dict(abs=1e-4)
R1 = np.array([1.0, 0, 0, 0])
R2 = np.array([1.0, 1, 0, 0])


def test_published_examples() -> None:
    assert grpo(R1) == pytest.approx([1.5, -0.5, -0.5, -0.5], **NEAR)
    assert grpo(np.array([5.0, -5, -5, -5])) == pytest.approx([1.5, -0.5, -0.5, -0.5], **NEAR)  # the scale of the reward cancels
    assert (R1 - R1.mean()) / R1.std() == pytest.approx([1.7321] + [-0.5774] * 3, **NEAR)  # what the population std would give instead
    assert grpo(R2) == pytest.approx([0.8660, 0.8660, -0.8660, -0.8660], **NEAR)
    assert rloo(R1) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert rloo(R2) == pytest.approx([2 / 3, 2 / 3, -2 / 3, -2 / 3])
    assert ADVANTAGES["dr_grpo"](R1) == pytest.approx([0.75, -0.25, -0.25, -0.25])


@pytest.mark.parametrize("k, right, wrong", [(1, 3.75, -0.25), (4, 1.6771, -0.5590), (8, 0.9682, -0.9682), (15, 0.25, -3.75)])
def test_grpo_of_binary_rewards_has_a_closed_form(k: int, right: float, wrong: float) -> None:
    size = 16
    advantages = grpo(np.array([1.0] * k + [0.0] * (size - k)))
    assert advantages[0] == pytest.approx(np.sqrt((size - 1) * (size - k) / (size * k)), abs=1e-4) == pytest.approx(right, **NEAR)
    assert advantages[-1] == pytest.approx(-np.sqrt((size - 1) * k / (size * (size - k))), abs=1e-4) == pytest.approx(wrong, **NEAR)


rewards = st.lists(st.sampled_from([-5.0, 5.0, 0.0, 0.1]), min_size=2, max_size=8).map(np.array)


@given(rewards, st.floats(0.5, 20), st.floats(-10, 10))
def test_laws(rewards_G: np.ndarray, a: float, b: float) -> None:
    """Sum 0; affine invariance up to the epsilon; RLOO is G/(G-1) times Dr.GRPO; Dr.GRPO over std is GRPO."""
    size = len(rewards_G)
    for name in COMPARING:
        assert ADVANTAGES[name](rewards_G).sum() == pytest.approx(0, abs=1e-9), name
    assert grpo(a * rewards_G + b) == pytest.approx(grpo(rewards_G), abs=1e-3)
    assert rloo(rewards_G) == pytest.approx(centred(rewards_G) * size / (size - 1))
    if len(set(rewards_G)) > 1:
        assert centred(rewards_G) / rewards_G.std(ddof=1) == pytest.approx(grpo(rewards_G), abs=1e-4)


@pytest.mark.parametrize("name", sorted(COMPARING))
@pytest.mark.parametrize("value", [0.1, -5.0, 1 / 3])
def test_equal_rewards_give_exactly_zero(name: str, value: float) -> None:
    assert (ADVANTAGES[name](np.full(3, value)) == 0).all()


@pytest.mark.parametrize("name", sorted(COMPARING))
def test_a_group_of_one_and_a_reward_that_is_not_finite_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="needs at least 2"):
        outcome_advantages([[1.0]], [[3]], name, False)
    with pytest.raises(ValueError, match="not finite"):
        outcome_advantages([[1.0, np.nan]], [[3, 3]], name, False)


def test_whitening_weighs_tokens_and_uses_the_population_variance() -> None:
    """Rewards 1 (2 tokens) and 0 (3 tokens): mean 0.4, population variance 0.24 (arXiv 2501.03262); the unbiased one would be 0.30."""
    assert whiten(np.array([1.0, 0.0]), np.array([2, 3])) == pytest.approx([1.2247, -0.8165], **NEAR)
    assert np.array([0.6, -0.4]) / np.sqrt(0.30) == pytest.approx([1.0954, -0.7303], **NEAR)


def test_reinforce_pp_takes_the_batch_as_its_baseline() -> None:
    """Also for groups of one response."""
    assert outcome_advantages([[5.0], [-5.0]], [[2], [3]], "reinforce++", False) == [np.array([5.0]), np.array([-5.0])]
    white = outcome_advantages([[1.0], [0.0]], [[2], [3]], "reinforce++", True)
    assert np.concatenate(white) == pytest.approx([1.2247, -0.8165], **NEAR)


def test_whitening_gives_mean_0_and_variance_1_over_tokens_and_is_nearly_idempotent() -> None:
    rng = np.random.default_rng(0)
    advantages, tokens = rng.normal(3, 2, 64), rng.integers(0, 30, 64)
    white = whiten(advantages, tokens)
    per_token = np.repeat(white, tokens)
    assert per_token.mean() == pytest.approx(0, abs=1e-12)
    assert per_token.std() == pytest.approx(1, abs=1e-4)
    assert whiten(white, tokens) == pytest.approx(white, abs=1e-4)


def test_whitening_of_equal_advantages_is_exactly_zero() -> None:
    assert (whiten(np.full(4, 0.1), np.array([3, 1, 0, 2])) == 0).all()
    assert (whiten(np.array([1.0, 2.0]), np.array([0, 0])) == 0).all()


@pytest.mark.parametrize("name", sorted(COMPARING))
def test_whitening_of_equally_long_responses_leaves_a_group_without_signal_at_exactly_zero(name: str) -> None:
    """The mean over tokens is 0 then, but sums of 1/3 and the like are not, quite: such a response would count as trained on, and its
    tokens as clipped."""
    rewards = [[5.0, 5, -5], [5.0, 5, 5], [-4.9, 5.1, 5.1], [-5.0, -5, -5]]
    white = outcome_advantages(rewards, [[30] * 3] * 4, name, True)
    assert (white[1] == 0).all() and (white[3] == 0).all() and (white[0] != 0).all()
    longer = outcome_advantages(rewards, [[30, 30, 29]] + [[30] * 3] * 3, name, True)  # a mean that is small, but no rounding
    assert (longer[1] != 0).all()


def test_outcome_advantages_whiten_once_over_the_whole_batch() -> None:
    rewards, tokens = [[5.0, -5, -5, -5], [5.0, 5, -5, -5]], [[2, 3, 4, 5], [6, 7, 8, 9]]
    raw, white = (outcome_advantages(rewards, tokens, "grpo", flag) for flag in (False, True))
    assert [g.shape for g in white] == [(4,), (4,)]
    assert raw[0] == pytest.approx(grpo(R1), abs=1e-5)
    assert np.concatenate(white) == pytest.approx(whiten(np.concatenate(raw), np.concatenate(tokens)))
    shuffled = outcome_advantages(rewards[::-1], tokens[::-1], "grpo", True)[::-1]
    assert np.concatenate(white) == pytest.approx(np.concatenate(shuffled))


@pytest.mark.parametrize("name", ["reinforce++", "reinforce++-baseline"])
def test_reinforce_pp_of_one_group_of_equal_lengths_is_grpo_with_the_population_std(name: str) -> None:
    (white,) = outcome_advantages([[5.0, -5, -5, 5, -5]], [[7] * 5], name, True)
    rewards = np.array([5.0, -5, -5, 5, -5])
    assert white == pytest.approx((rewards - rewards.mean()) / rewards.std(), abs=1e-4)
