"""Confidence intervals of scores, and whether two models differ. Legend: N problems, M metrics, R resamples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlinf.metrics.summary import Interval

RESAMPLES = 10_000
EXACT_UP_TO = 14  # problems that differ: 2^14 sign patterns are enumerated
FLIPS = 50_000
CHUNK = 1_000


def bootstrap_means(values_NM: np.ndarray, seed: int = 0) -> list[Interval]:
    """Means over problems with 95 % percentile bootstrap intervals; all metrics share the resamples of problems (10,000, seeded).

    The samples of a problem stay together: the interval covers the choice of problems as well as the sampling noise.
    """
    n_problems = len(values_NM)
    rng = np.random.default_rng(seed)
    share = np.full(n_problems, 1 / n_problems)
    means_RM = np.concatenate([rng.multinomial(n_problems, share, CHUNK) @ values_NM / n_problems for _ in range(RESAMPLES // CHUNK)])
    low_M, high_M = np.quantile(means_RM, (0.025, 0.975), axis=0)
    return [Interval(float(m), float(lo), float(hi)) for m, lo, hi in zip(values_NM.mean(axis=0), low_M, high_M)]


def is_proportion(values_N: Sequence[float] | np.ndarray) -> bool:
    """Whether a score is 0 or 1 (up to rounding) on every problem, so that its mean is a proportion of problems."""
    values = np.asarray(values_N, dtype=np.float64)
    return bool((np.minimum(np.abs(values), np.abs(values - 1)) < 1e-9).all())


def paired_p_value(before_N: np.ndarray, after_N: np.ndarray, seed: int = 0) -> float:
    """Two-sided randomisation test of equal means on the same problems (R. A. Fisher 1935): under the null, the sign of each problem's
    difference is a coin. Exact where at most 14 problems differ, else from 50,000 seeded draws. Of one sample each, McNemar's exact test.
    """
    if before_N.shape != after_N.shape or before_N.ndim != 1:
        raise ValueError(f"paired problems needed, got {before_N.shape} and {after_N.shape}")
    differences = after_N.astype(np.float64) - before_N
    differences = differences[differences != 0]
    n = len(differences)
    if n == 0:
        return 1.0
    observed = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()  # sums that differ only by rounding are equal
    if n <= EXACT_UP_TO:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs((2 * bits - 1) @ differences) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(FLIPS // CHUNK):
        signs = rng.integers(0, 2, (CHUNK, n)) * 2 - 1
        hits += int((np.abs(signs @ differences) >= observed).sum())
    return (hits + 1) / (FLIPS + 1)
