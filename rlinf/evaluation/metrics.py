"""Scores of repeated sampling, as pure functions. Legend: N problems, n samples of each problem, c of them right, k samples drawn.

Every score is a mean over problems of one number for each problem, so it does not depend on the order of problems or samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb

TAUS = (0.25, 0.5, 0.75, 1.0)
RIGHT = object()  # the class of all right answers in a vote


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that at least one of k samples, drawn from the n without replacement, is right: 1 - C(n-c, k) / C(n, k).

    It is an unbiased estimate for k fresh samples (arXiv 2107.03374, section 2.1); 1 - (1 - c/n)^k is not.
    """
    _check(n, c, k)
    return 1.0 - comb(n - c, k) / comb(n, k)


def g_pass_at_k(n: int, c: int, k: int, tau: float) -> float:
    """Probability that at least ceil(tau k) of k drawn samples are right (arXiv 2412.13147, equation 3); tau = 0 asks for one."""
    _check(n, c, k)
    least = max(1, math.ceil(tau * k - 1e-9))
    return sum(comb(c, j) * comb(n - c, k - j) for j in range(least, min(c, k) + 1)) / comb(n, k)


def mg_pass_at_k(n: int, c: int, k: int) -> float:
    """Mean of G-Pass@k over tau in (0.5, 1]: (2/k) sum of G-Pass@k over tau = i/k, i = ceil(k/2)+1 .. k.

    arXiv 2412.13147, equation 5.
    """
    _check(n, c, k)
    return 2 / k * sum(g_pass_at_k(n, c, k, i / k) for i in range(math.ceil(k / 2) + 1, k + 1))


def maj_at_k(votes: Sequence[Hashable | None], k: int) -> float:
    """The probability that the most frequent answer of k drawn samples is right; when several are equally frequent, each wins equally
    often.

    votes: RIGHT for a right answer, None for a sample without an answer (it does not vote), otherwise anything that names the wrong answer.
    The result is exact: it counts the draws in which the right answer has v votes, t wrong answers also have v, and none has more.
    """
    counts = Counter(votes)
    n, right, silent = len(votes), counts.pop(RIGHT, 0), counts.pop(None, 0)
    _check(n, right, k)
    total = 0.0
    for v in range(1, min(right, k) + 1):
        rest = k - v
        ways = {(0, 0): 1}  # (drawn so far, wrong answers that tie) -> number of draws
        for size in counts.values():
            ways = _add_class(ways, size, v, rest)
        for (drawn, ties), number in ways.items():
            total += comb(right, v) * number * comb(silent, rest - drawn) / (1 + ties)
    return total / comb(n, k)


def _add_class(ways: dict[tuple[int, int], int], size: int, v: int, rest: int) -> dict[tuple[int, int], int]:
    """Draw 0..v of the `size` samples of one wrong answer; v of them make a tie."""
    out: dict[tuple[int, int], int] = {}
    for (drawn, ties), number in ways.items():
        for j in range(min(size, v, rest - drawn) + 1):
            key = (drawn + j, ties + (j == v))
            out[key] = out.get(key, 0) + number * comb(size, j)
    return out


def draw_sizes(n: int) -> list[int]:
    """The values of k that are reported for n samples: powers of two below n, and n."""
    return [2**i for i in range(n.bit_length()) if 2**i < n] + [n]


def stability_size(n: int) -> int:
    """The k of G-Pass@k: the largest power of two up to n/2, because with k = n there would be only one possible draw."""
    return max((2**i for i in range(n.bit_length()) if 2**i <= n // 2), default=1)


def _check(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"0 <= c <= n and 1 <= k <= n are needed, got n={n} c={c} k={k}")
