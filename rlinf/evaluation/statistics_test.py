"""Intervals cover what they should; the test of differences agrees with the binomial law where there is one."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlinf.evaluation.statistics import bootstrap_means, paired_p_value


def mcnemar(up: int, down: int) -> float:
    """Exact two-sided binomial test of `up` against `down` discordant pairs."""
    n, low = up + down, min(up, down)
    return min(1.0, 2 * sum(comb(n, i) for i in range(low + 1)) / 2**n)


@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 5))
def test_p_value_of_single_samples_is_mcnemars(up: int, down: int, equal: int) -> None:
    before = np.array([0] * up + [1] * down + [1] * equal + [0])
    after = np.array([1] * up + [0] * down + [1] * equal + [0])
    assert paired_p_value(before, after) == pytest.approx(mcnemar(up, down))


def test_p_value_from_draws_is_near_the_exact_one() -> None:
    before, after = np.array([0] * 20 + [1] * 8), np.array([1] * 20 + [0] * 8)
    assert paired_p_value(before, after) == pytest.approx(mcnemar(20, 8), abs=0.005)
    assert paired_p_value(before, after) == paired_p_value(after, before)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(1), 0
    for trial in range(100):
        sample = rng.beta(2, 3, (60, 1))
        low, high = bootstrap_means(sample, seed=trial)[0][1:]
        covered += low <= 0.4 <= high
    assert 88 <= covered <= 99


def test_bootstrap_of_many_metrics_keeps_their_relation() -> None:
    values = np.random.default_rng(0).random((30, 1))
    one, double, constant = bootstrap_means(np.hstack([values, 2 * values, np.ones_like(values)]))
    assert double == pytest.approx(tuple(2 * x for x in one)) and constant == pytest.approx((1, 1, 1))
    assert one.low < one.value < one.high and one.value == pytest.approx(values.mean())
